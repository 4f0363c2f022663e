"""Weights that training starts from."""

import logging
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch

from mergevq.config import parts
from mergevq.config.identity import Identity
from mergevq.config.tokenizer import TokenizerConfig
from mergevq.config.training import TokenizerRun
from mergevq.data.batches import eval_batches
from mergevq.data.images import ImageDataset
from mergevq.generator.build import AnyGenerator, saved_generator
from mergevq.generator.generation import class_names
from mergevq.nn.positions import to_patches
from mergevq.runtime.artefacts import load_model, load_strict, read_record, resolve
from mergevq.runtime.files import some
from mergevq.runtime.settings import changed_settings, from_json, to_json
from mergevq.tokenizer.analytic.components import NUM_FITTED, Components, fit_patches
from mergevq.tokenizer.analytic.start import start_decoder_from_components, start_from_components
from mergevq.tokenizer.decoders.patch import PatchDecoder
from mergevq.tokenizer.interop import initialize_from_dinov2, read_vit
from mergevq.tokenizer.tokenizer import Tokenizer

logger = logging.getLogger("mergevq")

_NUM_IMAGES = 4000
"""Images that components are fitted to, at most: of 64 pixels, they have a million patches of 4."""
_BATCH = 64
"""Images read at once for it."""
_FREE_OF_TOKENIZERS = (
    "image_size",
    "num_kept",
    "kept_range",
    "reducer.layer_scale",
    "reducer.locality",
    "reducer.start_noise",
    "reducer.temperature",
    "reducer.exploration",
    "reducer.align_margin",
    "reducer.align_weight",
    "branches.gains",
    "condition.dropout",
    "condition.num_bytes",
    "decoder.layer_scale",
    "quantizer.entropy_temperature",
    "quantizer.codebook_entropy",
    "quantizer.sample_temperature",
    "quantizer.confidence_weight",
    "quantizer.orthogonality_weight",
    "quantizer.kl_weight",
    "quantizer.distance_weights",
    "quantizer.means",
    "quantizer.gradient",
    "quantizer.update.codebook_weight",
    "quantizer.update.decay",
    "quantizer.update.restart_below",
)
"""Settings that may differ from those of a tokenizer that training starts from: weights fit any
size and K, and layer scale is where fresh weights begin."""
_FREE_OF_GENERATORS = (
    "num_classes",
    "grid_size",
    "num_kept",
    "ffn_dim",
    "order.window",
    "order.groups",
    "order.flex_attention",
    "order.masking",
    "order.visible_weight",
    "dropout",
    "class_dropout",
    "label_smoothing",
)
"""The same for generators. The class table is made anew where classes differ; a grid has no weights
of its own; None and a number may mean one hidden width, and weights of another do not fit; the rest
is how it is trained."""
_CLASS_TABLE = "network.class_embedding.weight"


class Start(NamedTuple):
    """Start of `init_codes` components."""

    components: Components
    """Components of the patches of training images."""
    num_images: int
    """Images that they were fitted to."""

    def describe(self) -> str:
        """One line for the log."""
        components = self.components
        counts = Counter(component for component, _ in components.bits)
        side = components.patch_size
        return (
            f"codes start as {len(components.bits)} bits of {len(counts)} components of {side} x "
            f"{side} pixels, {'+'.join(str(counts[each]) for each in sorted(counts))}, fitted to "
            f"{self.num_images} images"
        )


def find_start(
    run: TokenizerRun, dataset: ImageDataset, *, max_images: int = _NUM_IMAGES
) -> Start | None:
    """Fit components to the training images of a run; None where it starts from something else.

    The same images give the same components: they are evenly spaced, centre squares, not mirrored.

    Args:
        run: its `init_codes` decides.
        dataset: training images.
        max_images: images to look at.

    Raises:
        ValueError: there are too few images.
    """
    if run.init_codes != "components":
        return None
    model = run.model
    num_patches = min(len(dataset), max_images) * model.num_tokens
    stride = max(1, -(-num_patches // NUM_FITTED))
    kept, num_seen, num_images = [], 0, 0
    for batch in eval_batches(
        dataset,
        image_size=model.image_size,
        batch_size=_BATCH,
        max_images=max_images,
        num_workers=run.data.num_workers,
    ):
        patches = to_patches(batch.image, model.patch_size).flatten(0, 1)
        # Every so manieth of all images' patches together, wherever batches are cut.
        kept.append(patches[-num_seen % stride :: stride].clone())
        num_seen += len(patches)
        num_images += len(batch.image)
    return Start(fit_patches(torch.cat(kept), model.patch_size, model.quantizer.dim), num_images)


def initial_tokenizer(run: TokenizerRun, start: Start | None = None) -> Tokenizer:
    """Make the tokenizer of a run: random, analytic, from a ViT, or with another's weights.

    Args:
        run: says which of them.
        start: from `find_start`, where `init_codes` is components.

    Raises:
        ValueError: the weights to start from are missing, or are another architecture's.
    """
    candidates = run.kept.candidates
    # The saved model remembers which K it was trained on, and what its bits are of.
    least = 1 if run.regularizer.drops else min(candidates)
    config = replace(run.model, kept_range=(least, max(candidates)))
    if run.init_codes == "components":
        if start is None:
            raise ValueError("init_codes (components) needs components: see find_start")
        return _analytic_tokenizer(config, start.components)
    if run.init_from is not None:
        config = _with_components_of(config, run.init_from)
    tokenizer = Tokenizer(config)
    if run.init_vit is not None:
        initialize_from_dinov2(tokenizer, read_vit(run.init_vit))
    if run.init_from is not None:
        initialize_from(tokenizer, run.init_from)
        if run.loss.adversarial_weight > 0:
            logger.warning(
                "starting from %s with a fresh discriminator: it is trained from step %d, and its "
                "verdict counts from step %d",
                run.init_from,
                run.loss.discriminator_start_step,
                run.loss.adversarial_start_step,
            )
    return tokenizer


def _analytic_tokenizer(config: TokenizerConfig, components: Components) -> Tokenizer:
    """A tokenizer whose codes are analytic; a CNN decoder has random weights all the same."""
    tokenizer = Tokenizer(_with_components(config, [bit for bit, _ in components.bits]))
    start_from_components(tokenizer.encoder, components)
    if isinstance(tokenizer.decoder, PatchDecoder):
        start_decoder_from_components(tokenizer.decoder, components)
    return tokenizer


def _with_components(config: TokenizerConfig, bit_components: Sequence[int]) -> TokenizerConfig:
    """The configuration of a tokenizer whose bits are of these components."""
    if not isinstance(config.decoder, parts.PatchDecoder):
        return config
    decoder = replace(config.decoder, bit_components=tuple(bit_components))
    return replace(config, decoder=decoder)


def _with_components_of(config: TokenizerConfig, path: str | Path) -> TokenizerConfig:
    """The configuration with the components of another tokenizer's bits where it has none."""
    other = from_json(TokenizerConfig, read_record(resolve(path))["config"])
    mine, theirs = config.decoder, other.decoder
    if not isinstance(mine, parts.PatchDecoder) or mine.bit_components:
        return config
    if not isinstance(theirs, parts.PatchDecoder):
        return config
    return _with_components(config, theirs.bit_components)


def initialize_from(tokenizer: Tokenizer, path: str | Path) -> None:
    """Copy a trained tokenizer's weights; K may be another, and image size unless cells have some.

    Raises:
        ValueError: it is not there, or is another architecture.
    """
    saved = load_model(resolve(path), kind="tokenizer")
    other = from_json(TokenizerConfig, saved.record["config"])
    free = set(_FREE_OF_TOKENIZERS)
    if isinstance(tokenizer.config.reducer, parts.GlobalMap):
        free.remove("image_size")  # Each cell of the grid has an embedding.
    _require_same_architecture(
        tokenizer.config, other, free=free, what=f"tokenizer of init_from, {path}"
    )
    load_strict(tokenizer, saved.state)


def initialize_generator_from(
    generator: AnyGenerator, path: str | Path, made_from: Identity | None = None
) -> None:
    """Copy a trained generator's weights; of the table of classes, those of the same names.

    Args:
        generator: gets the weights.
        path: directory of the trained one, its name in the package, or owner/name@revision on
            Hugging Face.
        made_from: what `generator` will be trained on; None compares numbers of classes alone.

    Raises:
        ValueError: it is not there, or is another architecture or order.
    """
    saved = load_model(resolve(path), kind="generator")
    trained = saved_generator(saved)
    other, mine = trained.config, generator.config
    _require_same_architecture(
        mine, other, free=_FREE_OF_GENERATORS, what=f"generator of init_from, {path}"
    )
    extra = saved.record["extra"]
    names = made_from.class_names if made_from is not None else ()
    known = class_names(extra, other.num_classes, where=Path(path))
    weights = trained.state_dict()
    if other.num_classes != mine.num_classes or (names and known and names != known):
        fresh = [name for name in names if name not in known] or list(names)
        logger.warning(
            "starting from %s with a fresh class embedding for %s: it was trained on %d classes "
            "(%s) and these tokens have %d (%s); all other weights are kept",
            path,
            some(fresh, 5) or "every class",
            other.num_classes,
            some(list(known), 5) or "unnamed",
            mine.num_classes,
            some(list(names), 5) or "unnamed",
        )
        table = generator.state_dict()[_CLASS_TABLE].clone()
        for number, name in enumerate(names):
            if name in known:
                table[number] = weights[_CLASS_TABLE][known.index(name)]
        weights[_CLASS_TABLE] = table
    if made_from is not None and extra.get("tokenizer") != made_from.tokenizer:
        logger.warning(
            "starting from %s, which was trained on tokens of tokenizer %s; these are of %s, and "
            "every code means something else",
            path,
            extra.get("tokenizer"),
            made_from.tokenizer,
        )
    load_strict(generator, weights)


def _require_same_architecture(
    mine: object, other: object, *, free: Collection[str], what: str
) -> None:
    """Compare all settings of two models; the shapes of weights do not tell every difference.

    Args:
        mine: settings of the model to be trained.
        other: settings of the one whose weights it starts from.
        free: settings, or sections of them, that may differ.
        what: the other model.

    Raises:
        ValueError: a setting that is not free differs.
    """
    changed = changed_settings(to_json(other), to_json(mine))
    wrong = [
        f"model.{name} ({after}) must be {before}"
        for name, (before, after) in changed.items()
        if not any(name == part or name.startswith(f"{part}.") for part in free)
    ]
    if wrong:
        raise ValueError(f"{'; '.join(wrong)}, as in the {what}")
