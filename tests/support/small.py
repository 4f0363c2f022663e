"""Recipes shrunk so that each trains in seconds on a CPU."""

from dataclasses import replace

from mergevq.config.generator import (
    Several,
)
from mergevq.config.objective import (
    HuggingFace,
    Labels,
    NoTeacher,
    SelfDistillation,
    Teacher,
    TorchScript,
)
from mergevq.config.parts import (
    CnnDecoder,
    CnnStem,
    DivPrune,
    Fuse,
    GlobalMap,
    Holistic,
    LearnedMerge,
    MaskTokens,
    Merge,
    PatchDecoder,
    PatchStem,
    PixelFlow,
    Pool,
    PrefixFlow,
    Queries,
    Select,
    Unmerge,
)
from mergevq.config.parts.orders import Scale
from mergevq.config.training import DecoderRun, GeneratorRun, TokenizerRun

_SIZES = {
    CnnStem: {"channels": 8, "num_res_blocks": 1},
    PatchStem: {"width": 32, "num_groups": 8},
    Merge: {"num_layers": 3, "num_heads": 2},
    LearnedMerge: {"num_layers": 3, "num_heads": 2},
    Pool: {"num_layers": 3, "num_heads": 2},
    GlobalMap: {"num_layers": 3, "num_heads": 2},
    DivPrune: {"num_layers": 3, "num_heads": 2},
    Select: {"num_layers": 3, "num_merger_layers": 1, "num_heads": 2},
    Holistic: {"num_holistic": 4, "num_layers": 3, "num_full_layers": 2, "num_heads": 2},
    Queries: {"num_queries": 64, "num_layers": 3, "num_heads": 2},
    Unmerge: {"dim": 16, "num_layers": 1, "num_heads": 2},
    Fuse: {"dim": 16, "num_layers": 1, "num_heads": 2},
    MaskTokens: {"dim": 16, "num_layers": 1, "num_heads": 2},
    CnnDecoder: {"channels": 8, "num_res_blocks": 1, "num_layers": 1, "num_heads": 2},
    PatchDecoder: {"width": 16, "num_heads": 2},
    PrefixFlow: {"dim": 16, "num_layers": 2, "num_heads": 2},
    PixelFlow: {"dim": 16, "num_global_layers": 1, "num_heads": 2, "width": 16, "depth": 2},
}
"""Sizes of small parts; a kind that is not named stays as it is."""


def _small_teacher(teacher: Teacher, view_size: int) -> Teacher:
    """A teacher of a small view, and of few prototypes where it has some."""
    match teacher:
        case SelfDistillation():
            return replace(teacher, view_size=view_size, num_prototypes=16)
        case HuggingFace() | TorchScript():
            return replace(teacher, view_size=view_size)
        case NoTeacher() | Labels():
            return teacher


def shrink(run: TokenizerRun) -> TokenizerRun:
    """Cut a run down to seconds on a CPU, keeping its structure: for tests and first tries."""
    model = run.model
    # Weights to start from have their sizes: those of the package are small.
    sizes = _SIZES if run.init_from is None else {}
    parts = {
        name: replace(part, **sizes.get(type(part), {}))
        for name in ("stem", "reducer", "quantizer", "expander", "decoder")
        for part in [getattr(model, name)]
    }
    if run.init_codes == "components":
        # Components start in pairs of channels, beside a pair for each bit.
        parts["stem"] = replace(parts["stem"], width=128)
    return replace(
        run,
        model=replace(model, **parts, image_size=8 * model.patch_size, num_kept=16),
        kept=replace(run.kept, candidates=(16, 24, 32)),
        loss=replace(run.loss, discriminator_channels=8),
        teacher=_small_teacher(run.teacher, view_size=6 * model.patch_size),
        train=replace(
            run.train,
            num_steps=2,
            batch_size=4,
            log_every=1,
            image_every=2,
            eval_every=2,
            num_eval_images=4,
            save_every=2,
            eval_num_kept=(16, 24),
        ),
    )


def shrink_decoder(run: DecoderRun) -> DecoderRun:
    """Cut the run of a decoder down likewise, for a tokenizer that `shrink` made small."""
    decoder = replace(run.decoder, **_SIZES[type(run.decoder)])
    schedule = getattr(decoder, "schedule", None)
    return replace(
        run,
        decoder=decoder,
        solution=replace(run.solution, num_steps=getattr(schedule, "num_groups", 2)),
        num_kept=(16, 32),
        data=replace(run.data, max_images=16),
        train=replace(
            run.train,
            num_steps=2,
            batch_size=4,
            log_every=1,
            image_every=2,
            eval_every=2,
            num_eval_images=4,
            save_every=2,
            eval_num_kept=(16,),
        ),
    )


def _few(passes):
    """As many passes as a small grid allows."""
    return replace(passes, num_steps=4) if isinstance(passes, Several) else passes


def shrink_generator(run: GeneratorRun) -> GeneratorRun:
    """Cut a generator's run down likewise; its grid is 8 x 8, as of what `shrink` makes."""
    everything = not run.model.order.merges
    candidates = (64,) if everything else (16, 24)[: len(run.kept.candidates)]
    if isinstance(run.model.order, Scale):
        candidates = run.kept.candidates
    return replace(
        run,
        model=replace(
            run.model,
            head=replace(run.model.head, num_layers=1),
            dim=16,
            num_layers=2,
            num_heads=2,
            ffn_dim=32,
            grid_size=(8, 8),
            num_kept=candidates[0],
            kept_candidates=candidates if run.model.kept_candidates else (),
        ),
        kept=replace(run.kept, candidates=candidates),
        train=replace(
            run.train,
            num_steps=2,
            batch_size=4,
            log_every=1,
            image_every=2,
            eval_every=2,
            num_eval_images=4,
            save_every=2,
            eval_num_kept=(),
        ),
        sampling=replace(run.sampling, passes=_few(run.sampling.passes)),
    )
