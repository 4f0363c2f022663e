"""Recipes shrunk so that each trains in seconds on a CPU."""

from dataclasses import replace

from mergevq.config.training import GeneratorRun, TokenizerRun


def shrink(run: TokenizerRun) -> TokenizerRun:
    """Cut a run down to seconds on a CPU, keeping its structure: for tests and first tries."""
    model = run.model
    side = 8 * model.patch_size
    if model.decoder == "patch":
        model = replace(model, patch_decoder=replace(model.patch_decoder, width=16))
    return replace(
        run,
        model=replace(
            model,
            image_size=side,
            channels=8,
            # Components start in pairs of channels, beside a pair for each bit.
            patch_dim=128 if run.init_codes == "components" else 32,
            num_res_blocks=1,
            num_layers=3,
            num_heads=2,
            num_kept=16,
            num_decoder_layers=1,
            num_decoder_heads=2,
            source_dim=16,
            num_source_layers=1,
            num_source_heads=2,
        ),
        kept=replace(run.kept, candidates=(16, 24, 32)),
        teacher=replace(run.teacher, view_size=6 * model.patch_size, num_prototypes=16),
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


def shrink_generator(run: GeneratorRun) -> GeneratorRun:
    """Cut a generator's run down likewise; its grid is 8 x 8, as of what `shrink` makes."""
    everything = run.model.order == "raster"
    candidates = (64,) if everything else (16, 24)[: len(run.kept.candidates)]
    return replace(
        run,
        model=replace(
            run.model,
            dim=16,
            num_layers=2,
            num_heads=2,
            num_head_layers=1,
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
        sampling=replace(run.sampling, num_steps=None if run.sampling.num_steps is None else 4),
    )
