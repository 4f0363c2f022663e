"""Measurements of trained arms, and of yardsticks, on the same held-out images.

Shape letters: B batch, N held-out images.
"""

import contextlib
from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Int64, UInt8
from torch import Tensor

from mergevq.config.contest import Arm, ContestSettings, PointRecord, YardstickRecord
from mergevq.config.parts import require_no_condition
from mergevq.config.tokenizer import TokenizerConfig
from mergevq.config.training import TokenizerRun
from mergevq.data.batches import eval_batches
from mergevq.data.codes import require_parts
from mergevq.data.images import ImageDataset
from mergevq.evaluate.analytic import NAME as COMPONENTS
from mergevq.evaluate.analytic import AnalyticBaseline
from mergevq.evaluate.compare import Evaluations, Outcome
from mergevq.evaluate.subject import json_numbers
from mergevq.metrics.comparison import Originals, comparison
from mergevq.metrics.extractor import FeatureExtractor
from mergevq.metrics.image import to_uint8
from mergevq.metrics.lpips import Perceptual
from mergevq.metrics.references import ImageHashes
from mergevq.metrics.yardsticks import TrainingImages, yardsticks
from mergevq.runtime.device import autocast, resolve_precision
from mergevq.runtime.environment import missing
from mergevq.runtime.logs import Progress
from mergevq.tokenizer.tokenizer import Tokenizer

_BATCH = 64
"""Images at once."""
_CODED = 64
"""Images whose source maps are written, to know their bits: evenly spaced over all."""


class Points(NamedTuple):
    """K at which an arm is measured."""

    num_kept: dict[str, int]
    """K by what was asked for, such as `K = 20` or `296 bits`."""
    left_out: list[str]
    """Sentences on what an arm does not have."""


class HeldOut(NamedTuple):
    """Images that no arm has seen, and the networks that compare them."""

    pixels: UInt8[Tensor, "n 3 h w"]
    label: Int64[Tensor, "n"]
    device: torch.device
    perceptual: Perceptual | None
    extractor: FeatureExtractor | None

    @property
    def pixels_sha256(self) -> str:
        """Digest of the images after the crop."""
        hashes = ImageHashes()
        hashes.update(self.pixels, torch.arange(len(self.pixels)))
        return hashes.compute()


def points(settings: ContestSettings, arm: Arm) -> Points:
    """Each K of an arm that was asked for and that it has.

    At equal bits it is the K of those it was trained between whose bits, tokens and layout
    together, are nearest below.

    Raises:
        ValueError: tokens of the arm are real numbers, which have no bits to compare.
    """
    require_no_condition(arm.run.model.condition, f"a comparison with {arm.name}")
    require_parts(arm.run.model.quantizer.sizes, f"a comparison with {arm.name}")
    if not settings.num_kept and not settings.bits:
        return Points({"own K": arm.run.model.num_kept}, [])
    found, left_out = {}, []
    config, costs = arm.run.model, bits_of(arm.run)
    for num_kept in settings.num_kept:
        try:
            config.kept_by.check_kept((config.grid_size, config.grid_size), num_kept)
        except ValueError as error:
            left_out.append(f"{arm.name} at K = {num_kept}: {error}")
        else:
            found[f"K = {num_kept}"] = num_kept
    for bits in settings.bits:
        within = {num_kept: cost for num_kept, cost in costs.items() if cost <= bits}
        if within:
            found[f"{bits} bits"] = max(within, key=lambda num_kept: (within[num_kept], num_kept))
        else:
            least = min(costs.values())
            left_out.append(f"{arm.name} at {bits} bits: it takes at least {least:.1f}")
    return Points(found, left_out)


def bits_of(run: TokenizerRun) -> dict[int, float]:
    """Bits of one image at each K that there is between the smallest and the largest trained on."""
    with torch.device("meta"):
        tokenizer = Tokenizer(run.model)
    grid_shape = (run.model.grid_size, run.model.grid_size)
    found = {}
    for num_kept in range(min(run.kept.candidates), max(run.kept.candidates) + 1):
        try:
            run.model.kept_by.check_kept(grid_shape, num_kept)
        except ValueError:
            continue
        found[num_kept] = tokenizer.bits(num_kept).total
    return found


def read_images(
    dataset: ImageDataset, image_size: int, max_images: int | None, num_workers: int
) -> TrainingImages:
    """Images as bytes, evenly spaced over the data, with their classes."""
    batches = list(
        eval_batches(
            dataset,
            image_size=image_size,
            batch_size=_BATCH,
            max_images=None if max_images is None else min(max_images, len(dataset)),
            num_workers=num_workers,
        )
    )
    pixels = torch.cat([to_uint8(batch.image) for batch in batches])
    return TrainingImages(pixels, torch.cat([b.label for b in batches]), dataset.num_classes)


def measure_arm(
    tokenizer: Tokenizer, run: TokenizerRun, asked: Points, held_out: HeldOut, progress: Progress
) -> list[PointRecord]:
    """Reconstruct held-out images at each K; in the precision of training.

    Args:
        tokenizer: a trained one.
        run: how it was trained.
        asked: each K.
        held_out: the images.
        progress: told of each image.

    Raises:
        ValueError: a number is not finite.
    """
    device, count = held_out.device, len(held_out.pixels)
    coded = () if missing("codec") else range(0, count, max(1, count // _CODED))
    evaluations = Evaluations(
        tokenizer,
        list(asked.num_kept.values()),
        perceptual=held_out.perceptual,
        extractor=held_out.extractor,
        autocast=autocast(device, resolve_precision(run.train.precision, device)),
        coded=coded,
    )
    for first in range(0, count, _BATCH):
        pixels = held_out.pixels[first : first + _BATCH]
        positions = torch.arange(first, first + len(pixels))
        labels = torch.full_like(positions, -1)
        evaluations.update((pixels.float() / 127.5 - 1).to(device), positions, labels)
        progress.update(len(pixels))
    reference = evaluations.originals.compute()
    outcomes = {each.num_kept: each.compute(reference) for each in evaluations.each}
    return [
        {
            "label": label,
            "num_kept": num_kept,
            "bits_tokens": outcomes[num_kept].bits.tokens,
            "bits_layout": outcomes[num_kept].bits.source,
            "bits_layout_coded": outcomes[num_kept].map_bits,
            **json_numbers(_numbers(outcomes[num_kept])),
        }
        for label, num_kept in asked.num_kept.items()
    ]


def _numbers(outcome: Outcome) -> dict[str, float]:
    """Every metric, those of the recovered source with `_recovered` after them, and code use."""
    recovered = {} if outcome.recovered is None else outcome.recovered
    numbers = outcome.given | {f"{name}_recovered": value for name, value in recovered.items()}
    if outcome.source_accuracy is not None:
        numbers["source_accuracy"] = outcome.source_accuracy
    if outcome.codebook is not None:
        numbers["codebook_usage"] = outcome.codebook.usage
        numbers["perplexity"] = outcome.codebook.perplexity
    return numbers


def measure_yardsticks(
    images: TrainingImages, held_out: HeldOut, budgets: Sequence[int]
) -> list[YardstickRecord]:
    """Every yardstick on the held-out images.

    Args:
        images: of training.
        held_out: the images of the arms.
        budgets: bits of the linear codec.
    """
    found = yardsticks(images, list(budgets))
    originals = Originals(held_out.perceptual, held_out.extractor)
    each = [comparison(held_out.perceptual, held_out.extractor) for _ in found]
    count = len(held_out.pixels)
    with contextlib.closing(Progress(count * len(found), unit="image")) as progress:
        for first in range(0, count, _BATCH):
            image = held_out.pixels[first : first + _BATCH].float() / 127.5 - 1
            label = held_out.label[first : first + _BATCH]
            positions = torch.arange(first, first + len(image))
            original = originals.update(image.to(held_out.device))
            for yardstick, compared in zip(found, each, strict=True):
                decoded = yardstick.decode(image, label)
                compared.update(original, decoded.to(held_out.device), positions)
                progress.update(len(image))
    reference = originals.compute()
    return [
        {
            "name": yardstick.name,
            "bits": yardstick.bits,
            **json_numbers(compared.compute(reference)),
        }
        for yardstick, compared in zip(found, each, strict=True)
    ]


def measure_components(
    config: TokenizerConfig, held_out: HeldOut, num_kept: Sequence[int]
) -> list[YardstickRecord]:
    """PSNR of codes that learned nothing, at each K; none beside a tokenizer that has none."""
    count = len(held_out.pixels)
    baseline = AnalyticBaseline(config, range(count))
    baseline.update(held_out.pixels, torch.arange(count))
    return [
        {"name": COMPONENTS, "bits": 8 * each.mean_bytes, **json_numbers({"psnr": each.psnr})}
        for each in baseline.compute(sorted(set(num_kept)))
    ]
