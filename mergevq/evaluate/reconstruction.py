"""Evaluation of a tokenizer's reconstructions: `mergevq evaluate reconstruction`.

Every image goes once through the model's own crop, and from there to the model, to the extractor's
reference and to the files of other formats alike: a model that changes nothing is at distance 0.

What is written is valid JSON: a PSNR that is infinite, because an image came back exactly, is null
there and its name is listed under `infinite`.

Shape letters: B batch, N images, H and W pixels.
"""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple, cast

import torch
from PIL import Image

from mergevq.config.evaluation import ReconstructionSettings
from mergevq.config.records import (
    BitsRecord,
    CodebookRecord,
    ExtremeRecord,
    OwnReference,
    ReconstructionRecord,
    ReconstructionResult,
)
from mergevq.data.images import ImageDataset
from mergevq.data.layouts import Source
from mergevq.evaluate.analytic import NAME, AnalyticBaseline
from mergevq.evaluate.compare import Evaluation, Evaluations, Outcome
from mergevq.evaluate.subject import (
    RECORD,
    Opened,
    evaluation_record,
    images_at,
    json_numbers,
    opened,
    reference_record,
    require_fresh,
    require_same_images,
    subject_record,
    subject_reference,
)
from mergevq.metrics.baselines import BaselineMeasurement, Baselines
from mergevq.metrics.codes import CodebookStatistics
from mergevq.metrics.frechet import Gaussian, Reference
from mergevq.metrics.image import to_uint8
from mergevq.metrics.references import ImageHashes
from mergevq.report.pictures import contact_sheet, merge_map, to_pil
from mergevq.report.plots import Curve, Panel, has_plots, line_plot
from mergevq.runtime import distributed
from mergevq.runtime.device import deterministic
from mergevq.runtime.environment import missing
from mergevq.runtime.files import write_json
from mergevq.runtime.logs import Progress
from mergevq.runtime.settings import to_json
from mergevq.tokenizer.conditions.values import condition_of
from mergevq.tokenizer.flows.decoder import Noise
from mergevq.tokenizer.tokenizer import Tokenizer


class Extreme(NamedTuple):
    """One of the worst or best images."""

    position: int
    """In the data."""
    psnr: float
    """With the given source."""
    psnr_recovered: float | None
    """With the recovered source; None where there is no map."""


class Measured(NamedTuple):
    """Results at one K."""

    num_kept: int
    outcome: Outcome
    worst: list[Extreme]
    """Lowest PSNR first."""
    best: list[Extreme]
    """Highest first."""
    shared_psnr: tuple[float, ...]
    """Given and, where there are maps, recovered, over the images that other formats compress too,
    or all."""


class Reconstructions(NamedTuple):
    """Results at every K, over the same images."""

    measured: list[Measured]
    baselines: list[BaselineMeasurement]
    pixels_sha256: str
    """Over the images after the crop."""
    num_images: int


def evaluate_reconstruction(settings: ReconstructionSettings) -> ReconstructionRecord | None:
    """Evaluate and write table, plot and pictures; on every rank, under `torchrun`.

    Returns:
        What was written to `evaluation.json`; None on ranks other than the main one.

    Raises:
        ValueError: model, data, reference or settings do not fit, or a number is not finite.
        RuntimeError: a file is damaged.
    """
    out = Path(settings.out)
    require_fresh(out)
    plotting = distributed.is_main() and has_plots(out / "rate_distortion.png")
    with opened(settings.subject) as subject:
        reference = subject_reference(settings, subject)
        found = measure_reconstructions(
            subject,
            settings.num_kept or (subject.tokenizer.config.num_kept,),
            reference=reference,
            num_shown=settings.num_shown,
            num_baseline_images=settings.num_baseline_images,
        )
        if not distributed.is_main():
            return None
        out.mkdir(parents=True, exist_ok=True)
        if plotting and not subject.tokenizer.quantizer.spec.is_continuous:
            curves = rate_distortion(found, subject.tokenizer.config.image_size)
            panel = Panel(title="PSNR in dB, mean over images", curves=curves)
            line_plot([panel], x_label="bits per pixel").save(out / "rate_distortion.png")
        for measured in found.measured:
            if measured.worst:
                name = f"worst_best_{measured.num_kept}.png"
                worst_best_picture(subject, measured).save(out / name)
        record = _record(settings, subject, reference, found)
        write_json(out / RECORD, record)
        return record


def measure_reconstructions(
    subject: Opened,
    num_kept: Sequence[int],
    *,
    reference: Reference | None = None,
    num_shown: int = 0,
    num_baseline_images: int = 0,
) -> Reconstructions:
    """Go through the images once and measure at every K; on every rank.

    Args:
        subject: what is evaluated.
        num_kept: each K.
        reference: of the very images; None takes it from them on the way.
        num_shown: worst and best images to find.
        num_baseline_images: images to compress too.

    Raises:
        ValueError: a K is not legal, a number is not finite, or the reference is of other images.
    """
    tokenizer, extractor, world = subject.tokenizer, subject.extractor, subject.world
    blank = torch.empty(1, 3, tokenizer.config.image_size, tokenizer.config.image_size)
    share = -(-subject.num_images // world.world_size)
    for count in num_kept:
        tokenizer.num_tokens(blank, count)
    is_continuous = tokenizer.quantizer.spec.is_continuous
    # Real numbers have no bits that a file could be held to.
    compressed = [] if is_continuous else _evenly(subject.positions, num_baseline_images)
    evaluations = Evaluations(
        tokenizer,
        num_kept,
        perceptual=subject.perceptual,
        extractor=extractor,
        autocast=subject.autocast(),
        protocol=subject.subject.protocol,
        coded=() if missing("codec") else compressed,
    )
    budgets = (
        []
        if is_continuous
        else [_num_bytes(tokenizer, evaluation.num_kept) for evaluation in evaluations.each]
    )
    baselines, hashes = Baselines(budgets, compressed), ImageHashes()
    analytic = AnalyticBaseline(tokenizer.config, compressed)
    progress = Progress(len(evaluations.each) * share, unit="reconstruction")
    with deterministic(world.device):
        for batch in subject.batches():
            pixels = to_uint8(batch.image)
            hashes.update(pixels, batch.index)
            evaluations.update(batch.image.to(world.device), batch.index, batch.label)
            progress.update(len(evaluations.each) * len(pixels))
            baselines.update(pixels, batch.index)
            analytic.update(pixels, batch.index)
    progress.close()
    pixels_sha256 = hashes.compute()
    require_same_images(reference, pixels_sha256)
    statistics = evaluations.originals.compute() if reference is None else reference.statistics
    measured = [_measured(e, statistics, num_shown, compressed) for e in evaluations.each]
    return Reconstructions(
        measured=measured,
        baselines=[
            *baselines.compute(),
            *analytic.compute([each.num_kept for each in evaluations.each]),
        ]
        if compressed
        else [],
        pixels_sha256=pixels_sha256,
        num_images=measured[0].outcome.num_images,
    )


def _measured(
    evaluation: Evaluation, statistics: Gaussian | None, num_shown: int, compressed: Sequence[int]
) -> Measured:
    """Everything about one K; every rank must call."""
    outcome = evaluation.compute(statistics)
    positions = evaluation.given.psnr.order()
    compared = (evaluation.given, evaluation.recovered)
    columns = [each.psnr.compute()[:, 0] for each in compared if each is not None]
    given, recovered = columns[0].tolist(), [column.tolist() for column in columns[1:]]
    recovered = recovered[0] if recovered else [None] * len(given)
    table = [Extreme(*row) for row in zip(positions.tolist(), given, recovered, strict=True)]
    chosen = torch.tensor(compressed or positions.tolist(), dtype=torch.int64)
    shared = torch.isin(positions, chosen)
    return Measured(
        num_kept=evaluation.num_kept,
        outcome=outcome,
        worst=sorted(table, key=lambda row: (row.psnr, row.position))[:num_shown],
        best=sorted(table, key=lambda row: (-row.psnr, row.position))[:num_shown],
        shared_psnr=tuple(float(column.double()[shared].mean()) for column in columns),
    )


def _num_bytes(tokenizer: Tokenizer, num_kept: int) -> int:
    """Bytes of one image: tokens and source map, rounded up."""
    return math.ceil(tokenizer.bits(num_kept).total / 8)


def _evenly(positions: Sequence[int], count: int) -> list[int]:
    """Some of many, evenly spaced."""
    count = min(count, len(positions))
    return [positions[i * len(positions) // count] for i in range(count)]


def _record(
    settings: ReconstructionSettings,
    subject: Opened,
    reference: Reference | None,
    found: Reconstructions,
) -> ReconstructionRecord:
    """Content of `evaluation.json`."""
    compared = None
    if settings.reference is not None and reference is not None:
        # A file that says nothing about itself is refused for reconstructions.
        compared = cast("OwnReference", reference_record(settings.reference, reference))
    return {
        "kind": "reconstruction evaluation",
        "settings": to_json(settings),
        **evaluation_record(subject.world),
        **subject_record(subject, found.pixels_sha256, found.num_images),
        "reference": compared,
        "results": [_result(subject.images, measured) for measured in found.measured],
        "baselines": [
            {
                "file_format": baseline.file_format,
                **json_numbers({"psnr": baseline.psnr}),
                "budget_bytes": baseline.budget_bytes,
                "mean_bytes": baseline.mean_bytes,
                "num_images": baseline.num_images,
                "num_above_budget": baseline.num_above_budget,
            }
            for baseline in found.baselines
        ],
    }


def _codebook(statistics: CodebookStatistics) -> CodebookRecord:
    """Use of the codebook as JSON."""
    return {
        "usage": statistics.usage,
        "attained": statistics.attained,
        "perplexity": statistics.perplexity,
        "num_tokens": statistics.num_tokens,
        "bit_probs": statistics.bit_probs.tolist(),
    }


def _bits(outcome: Outcome) -> BitsRecord:
    """Bits of one image as JSON."""
    return {
        "tokens": outcome.bits.tokens,
        "source": outcome.bits.source,
        "source_coded": outcome.map_bits,
        "condition": outcome.bits.condition,
        "total": outcome.bits.total,
        "per_pixel": outcome.bits.total / outcome.num_pixels,
        "per_pixel_recovered": (outcome.bits.total - outcome.bits.source) / outcome.num_pixels,
    }


def _result(images: ImageDataset, measured: Measured) -> ReconstructionResult:
    """One K as JSON."""
    outcome = measured.outcome

    def shown(extremes: list[Extreme]) -> list[ExtremeRecord]:
        return [
            {
                "image": images.name(extreme.position),
                **json_numbers(
                    {
                        name: value
                        for name, value in extreme._asdict().items()
                        if name != "position" and value is not None
                    }
                ),
            }
            for extreme in extremes
        ]

    return {
        "num_kept": measured.num_kept,
        "given": json_numbers(outcome.given),
        "recovered": None if outcome.recovered is None else json_numbers(outcome.recovered),
        "source_accuracy": outcome.source_accuracy,
        "codebook": None if outcome.codebook is None else _codebook(outcome.codebook),
        "bits": None if outcome.codebook is None else _bits(outcome),
        "continuous": None
        if outcome.channels is None
        else {"num_floats": outcome.num_floats, "active_channels": outcome.channels.num_active},
        "worst": shown(measured.worst),
        "best": shown(measured.best),
        "images_per_second": outcome.images_per_second,
    }


def rate_distortion(found: Reconstructions, image_size: int) -> list[Curve]:
    """PSNR over bits per pixel: both sources, and files of about the same bytes.

    The given source has to be stored beside the tokens; the recovered one needs tokens only.
    """
    num_pixels = image_size**2
    ordered = sorted(found.measured, key=lambda measured: measured.num_kept)
    bits = [measured.outcome.bits for measured in ordered]
    prices = [("given source: tokens and map", [each.total for each in bits])]
    if all(measured.outcome.recovered is not None for measured in ordered):
        prices.append(("recovered source: tokens", [each.tokens for each in bits]))
    else:
        prices = [("tokens", [each.total for each in bits])]
    curves = [
        Curve(
            x=[each / num_pixels for each in price],
            y=[measured.shared_psnr[number] for measured in ordered],
            label=label,
            colour=number,
        )
        for number, (label, price) in enumerate(prices)
    ]
    formats = dict.fromkeys(file.file_format for file in found.baselines)
    for number, file_format in enumerate(formats, start=len(curves)):
        files = [file for file in found.baselines if file.file_format == file_format]
        curves.append(
            Curve(
                x=[8 * file.mean_bytes / num_pixels for file in files],
                y=[file.psnr for file in files],
                label=file_format if file_format == NAME else f"{file_format}, with header",
                colour=number,
            )
        )
    return curves


@torch.no_grad()
def worst_best_picture(subject: Opened, measured: Measured) -> Image.Image:
    """The worst and the best images: original, merge map, and both reconstructions."""
    rows, captions, titles = [], [], []
    named = [("worst", measured.worst), ("best", measured.best)]
    shown = [extreme for _, extremes in named for extreme in extremes]
    for extreme in shown:
        images = images_at(subject, [extreme.position])
        batch = next(images)
        image, config = batch.image.to(subject.world.device), subject.tokenizer.config
        condition = condition_of(config.condition, batch.label, "an evaluation")
        with subject.autocast():
            embedded = subject.tokenizer.embed(image)
            noise = Noise(0, [extreme.position])
            given = subject.tokenizer.reconstruct(
                embedded, measured.num_kept, noise=noise, condition=condition
            )
            decoded = [given.image]
            if subject.tokenizer.has_maps:
                again = subject.tokenizer.reconstruct(
                    embedded, measured.num_kept, "recovered", noise
                )
                decoded.append(again.image)
        original = image[0].cpu()
        layout = given.encoded.layout
        grid = None
        if isinstance(layout, Source):
            grid = merge_map(original, layout.index[0].cpu(), given.encoded.grid_shape)
        pictures = [to_pil(part[0].float().clamp(-1, 1)) for part in decoded]
        rows.append([to_pil(original), *([] if grid is None else [grid]), *pictures])
        values = (extreme.psnr, extreme.psnr_recovered)
        texts = [f"{value:.2f} dB" for value in values if value is not None]
        name = subject.images.name(extreme.position)
        name = name if len(name) <= 24 else f"..{name[-22:]}"
        kept = f"{measured.num_kept} tokens"
        captions.append([name, *([] if grid is None else [kept]), *texts])
    for label, extremes in named:
        titles += [f"{label} {number}" for number in range(1, len(extremes) + 1)]
    header = ["original", "merge map", "given source", "recovered source"]
    if not subject.tokenizer.has_maps:
        header = ["original", "blocks", "decoded"] if len(rows[0]) > 2 else ["original", "decoded"]
    return contact_sheet(rows, header, titles, captions=captions)
