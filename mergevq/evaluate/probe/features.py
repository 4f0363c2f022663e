"""Features of images, kept in memory: a tokenizer's by layer, stage and pooling, and baselines.

The baselines are the pixels themselves and their principal components: a representation that does
not beat them has learnt nothing that a probe can use.

Source: Li et al. 2025, "MergeVQ", appendix A.4 (arXiv:2504.00999), which probes "latent tokens"
without saying before or after which step, so every choice is here; Halko et al. 2011, "Finding
Structure with Randomness", algorithm 4.4 (arXiv:0909.4061) for the principal components.

Shape letters: B batch, N images, P pixel values of an image, C channels of a feature.
"""

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import product
from typing import NamedTuple

import torch
from jaxtyping import Float, Int64
from torch import Tensor
from torch.nn import functional

from mergevq.config.base import ImagePool, Stage
from mergevq.config.probing import FeatureConfig
from mergevq.data.batches import Batch
from mergevq.metrics.image import require_finite
from mergevq.runtime.logs import Progress
from mergevq.tokenizer.features import pool_features, run_layers
from mergevq.tokenizer.seams import TokenSet
from mergevq.tokenizer.tokenizer import Tokenizer

PIXELS = "raw pixels"
"""Name of the features that are the pixels."""
_OVERSAMPLING = 16
"""Directions more than asked for, among which the principal ones are found."""
_POWER_STEPS = 4
"""Passes over the data that separate the principal directions from the others."""

# -------------------------------------------------------------------------------- which features


@dataclass(frozen=True, kw_only=True, slots=True)
class FeatureKind:
    """One way to describe an image by a vector."""

    num_kept: int
    """K; as many as there are cells turns merging off."""
    merges: bool
    """Whether K is below the number of cells."""
    stage: Stage
    """Where in the tokenizer."""
    pool: ImagePool
    """How tokens become one vector."""
    layer: int
    """Encoder blocks that are run."""
    last: bool
    """Whether these are all."""

    @property
    def name(self) -> str:
        """For tables and files."""
        words = [f"{self.num_kept} tokens", self.stage]
        if not self.merges:
            words = [f"{self.num_kept} tokens (no merging)"]
            words += [self.stage] * (self.stage != "pre_merge")
        if self.pool == "class":
            words = [words[0], "class token"]
        else:
            words.append(self.pool.replace("_", " "))
        return ", ".join(words + [f"layer {self.layer}"] * (not self.last))


def feature_kinds(tokenizer: Tokenizer, config: FeatureConfig) -> list[FeatureKind]:
    """The features that settings ask for at the tokenizer's image size, each once.

    Choices that give the same numbers are one: without merging all stages before the latents and
    both means agree; the class token has no stage; `unmerged` is `merged` with the mean over cells.
    A stage that needs the last layer is left out of the others.

    Raises:
        ValueError: a K or a layer is impossible.
    """
    model = tokenizer.config
    most = model.most_kept((model.grid_size, model.grid_size))
    num_kepts = sorted({*(config.num_kept or (model.num_kept,)), most})
    blank = torch.zeros(1, 3, model.image_size, model.image_size)
    for count in num_kepts[:-1]:
        tokenizer.num_tokens(blank, count)
    if num_kepts[-1] > most:
        raise ValueError(
            f"tokens ({num_kepts[-1]}) must be at most the {most} cells of an image of "
            f"{model.image_size} pixels"
        )
    for layer in config.layers:
        if not 0 <= layer <= model.reducer.num_layers:
            raise ValueError(
                f"layer ({layer}) must be between 0 and the {model.reducer.num_layers} blocks"
            )
    kinds: dict[FeatureKind, None] = {}
    layers = sorted(set(config.layers)) or [model.reducer.num_layers]
    for num_kept, layer, stage, pool in product(num_kepts, layers, config.stages, config.pools):
        last = layer == model.reducer.num_layers
        if stage in {"latents", "quantized"} and not last and pool != "class":
            continue
        # Asked for by name, the stage before merging is that of every K.
        merges = num_kept < most and stage != "pre_merge"
        stage, pool = _same(stage, pool, merges=merges)
        count = num_kept if merges else most
        kind = FeatureKind(
            num_kept=count, merges=merges, stage=stage, pool=pool, layer=layer, last=last
        )
        kinds[kind] = None
    return sorted(kinds, key=lambda kind: (kind.num_kept, kind.layer))


def _same(stage: Stage, pool: ImagePool, *, merges: bool) -> tuple[Stage, ImagePool]:
    """The simplest choice with the same numbers."""
    before_latents = stage not in {"latents", "quantized"}
    if pool == "class" or before_latents:
        if stage == "unmerged" and pool == "mean":
            pool = "size_weighted_mean"
        stage = "merged" if merges else "pre_merge"
    return stage, pool if merges or pool == "class" else "mean"


# ------------------------------------------------------------------------------------ extraction


class Extracted(NamedTuple):
    """Features and labels of some images."""

    features: dict[str, Float[Tensor, "n _c"]]
    """By name, in float32 in main memory; the last are the raw pixels."""
    label: Int64[Tensor, "n"]
    """Class of each image."""
    index: Int64[Tensor, "n"]  # pyright: ignore[reportIncompatibleMethodOverride]
    """Where in the data set each image was read."""
    digests: tuple[bytes, ...]
    """Hash of the pixels and the label of each image."""

    @property
    def sha256(self) -> str:
        """Hash of all images and labels, in order."""
        return hashlib.sha256(b"".join(self.digests)).hexdigest()


@torch.no_grad()
def extract(
    tokenizer: Tokenizer,
    batches: Iterable[Batch],
    kinds: Sequence[FeatureKind],
    *,
    pixel_side: int,
    progress: Progress | None = None,
) -> Extracted:
    """Run the encoder once for each K and layer, and keep what is asked for.

    Args:
        tokenizer: in evaluation mode, where it is to run.
        batches: of images of the trained size, each image once.
        kinds: see `feature_kinds`.
        pixel_side: see `FeatureConfig`.
        progress: counts images.

    Raises:
        ValueError: a feature is not finite, or there are no images.
    """
    device = next(tokenizer.parameters()).device
    parts: dict[str, list[Tensor]] = {kind.name: [] for kind in kinds} | {PIXELS: []}
    labels, indices, digests = [], [], []
    for batch in batches:
        first = len(digests)
        image = batch.image.to(device)
        for (num_kept, layer), group in _passes(kinds).items():
            out = run_layers(tokenizer, image, num_kept, layer)
            for kind in group:
                parts[kind.name].append(_pool(tokenizer, out, kind, first))
        parts[PIXELS].append(shrunk_pixels(batch.image, pixel_side))
        labels.append(batch.label)
        indices.append(batch.index)
        digests += _digests(batch)
        if progress is not None:
            progress.update(len(batch.label))
    if not digests:
        raise ValueError("the data set holds no images")
    return Extracted(
        features={name: torch.cat(tensors) for name, tensors in parts.items()},
        label=torch.cat(labels),
        index=torch.cat(indices),
        digests=tuple(digests),
    )


def _passes(kinds: Sequence[FeatureKind]) -> dict[tuple[int, int], list[FeatureKind]]:
    """Features by the pass of the encoder that they come from."""
    passes: dict[tuple[int, int], list[FeatureKind]] = {}
    for kind in kinds:
        passes.setdefault((kind.num_kept, kind.layer), []).append(kind)
    return passes


def _pool(
    tokenizer: Tokenizer, out: TokenSet, kind: FeatureKind, first: int
) -> Float[Tensor, "b c"]:
    """One feature of a batch, which must be finite."""
    pooled = pool_features(tokenizer.encoder, tokenizer.quantizer, out, kind.stage, kind.pool)
    values = pooled.float()
    require_finite(f"features at stage {kind.stage} ({kind.name})", values, first)
    return values.cpu()


def require_labels(label: Int64[Tensor, "n"], where: str) -> None:
    """Refuse images that cannot teach or test a classifier.

    Args:
        label: class of each image, -1 for none.
        where: the images, for the message.

    Raises:
        ValueError: some have no label, or all have the same.
    """
    num_missing = int((label < 0).sum())
    if num_missing:
        raise ValueError(
            f"{num_missing} of {len(label)} images of {where} have no label, and a probe needs one "
            "for each: use a folder with a sub-folder per class, or shards with a label column"
        )
    if len(label.unique()) < 2:
        raise ValueError(
            f"all {len(label)} images of {where} are of one class, and a probe needs at least two"
        )


def shrunk_pixels(image: Float[Tensor, "b 3 h w"], side: int) -> Float[Tensor, "b p"]:
    """Pixels as one vector, averaged over squares until both sides are at most `side`."""
    height, width = image.shape[2:]
    if max(height, width) > side:
        scale = side / max(height, width)
        size = (max(1, round(height * scale)), max(1, round(width * scale)))
        image = functional.adaptive_avg_pool2d(image, size)
    return image.flatten(1)


def _digests(batch: Batch) -> list[bytes]:
    """Hash of the pixels and the label of each image."""
    images = batch.image.contiguous().numpy()
    return [
        hashlib.sha256(image.tobytes() + str(label).encode()).digest()
        for image, label in zip(images, batch.label.tolist(), strict=True)
    ]


# -------------------------------------------------------------------------- principal components


class Pca(NamedTuple):
    """Directions in which some features vary most."""

    mean: Float[Tensor, "p"]
    directions: Float[Tensor, "p c"]
    """Orthonormal, the strongest first."""

    def project(self, values: Float[Tensor, "n p"]) -> Float[Tensor, "n c"]:
        """Coordinates along the directions."""
        return (values - self.mean) @ self.directions


def fit_pca(values: Float[Tensor, "n p"], dim: int, generator: torch.Generator) -> Pca:
    """Find principal directions by power iteration from random ones.

    Args:
        values: one row per image.
        dim: number of directions; fewer come back where rows or columns are fewer.
        generator: draws the first guess, on the CPU.
    """
    mean = values.mean(0)
    centred = values - mean
    least = min(centred.shape)
    width = min(dim + _OVERSAMPLING, least)
    guess = torch.randn(centred.shape[1], width, generator=generator)
    basis = torch.linalg.qr(centred @ guess).Q
    for _ in range(_POWER_STEPS):
        basis = torch.linalg.qr(centred @ torch.linalg.qr(centred.mT @ basis).Q).Q
    directions = torch.linalg.svd(basis.mT @ centred, full_matrices=False).Vh
    return Pca(mean, directions[: min(dim, least)].mT.contiguous())
