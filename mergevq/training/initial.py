"""Weights that the training of a tokenizer starts from."""

import logging
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch

from mergevq.config.tokenizer import TokenizerConfig
from mergevq.config.training import TokenizerRun
from mergevq.data.batches import eval_batches
from mergevq.data.images import ImageDataset
from mergevq.runtime.artefacts import load_model, load_strict, read_record, resolve
from mergevq.runtime.settings import from_json
from mergevq.tokenizer.analytic_start import start_decoder_from_components, start_from_components
from mergevq.tokenizer.components import NUM_FITTED, Components, fit_patches, to_patches
from mergevq.tokenizer.decoders.patch import PatchDecoder
from mergevq.tokenizer.interop import initialize_from_dinov2, read_vit
from mergevq.tokenizer.tokenizer import Tokenizer

logger = logging.getLogger("mergevq")

_NUM_IMAGES = 4000
"""Images that components are fitted to, at most: of 64 pixels, they have a million patches of 4."""
_BATCH = 64
"""Images read at once for it."""


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
    return Start(fit_patches(torch.cat(kept), model.patch_size, model.num_bits), num_images)


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
    config = replace(run.model, kept_range=(min(candidates), max(candidates)))
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
    if config.decoder != "patch":
        return config
    settings = replace(config.patch_decoder, bit_components=tuple(bit_components))
    return replace(config, patch_decoder=settings)


def _with_components_of(config: TokenizerConfig, path: str | Path) -> TokenizerConfig:
    """The configuration with the components of another tokenizer's bits where it has none."""
    other = from_json(TokenizerConfig, read_record(resolve(path))["config"])
    if config.patch_decoder.bit_components or other.decoder != "patch":
        return config
    return _with_components(config, other.patch_decoder.bit_components)


def initialize_from(tokenizer: Tokenizer, path: str | Path) -> None:
    """Copy a trained tokenizer's weights; image size and K may be others.

    Raises:
        ValueError: it is not there, or is another architecture.
    """
    saved = load_model(resolve(path), kind="tokenizer")
    other = from_json(TokenizerConfig, saved.record["config"])
    mine = tokenizer.config
    for name in (
        "num_heads",
        "num_decoder_heads",
        "num_source_heads",
        "merge_shape",
        "position_embedding",
        "transformer_norm_eps",
        "patch_norm_eps",
        "patch_norm",
        "decoder",
        *(["patch_decoder"] if mine.decoder == "patch" else []),
    ):
        # The shapes of weights do not tell these apart.
        if getattr(other, name) != getattr(mine, name):
            raise ValueError(
                f"model.{name} ({getattr(mine, name)}) must be {getattr(other, name)}, as in the "
                f"tokenizer of init_from, {path}"
            )
    load_strict(tokenizer, saved.state)
