"""What a tokenizer's reconstructions are worth: `mergevq evaluate reconstruction`.

Every image goes once through the model's own crop, and from there to the model, to the extractor's
reference and to JPEG and WebP alike: a model that changes nothing is at distance 0.

What is written is valid JSON: a PSNR that is infinite, because an image came back exactly, is null
there and its name is listed under `infinite`.

Shape letters: B batch, N images, H and W pixels, F feature channels.
"""

import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple, cast

import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from mergevq import distributed
from mergevq.baselines import FILE_FORMATS, BaselineMeasurement, Baselines
from mergevq.checkpoint import model_hash, resolve, to_json, write_json
from mergevq.config import FORMAT_VERSION
from mergevq.config_evaluate import (
    EvaluationRecord,
    ExtractorRecord,
    ExtremeRecord,
    ForeignReference,
    LpipsRecord,
    Numbers,
    OwnReference,
    ReconstructionRecord,
    ReconstructionResult,
    ReconstructionSettings,
    Subject,
    SubjectRecord,
    TrunkName,
)
from mergevq.data import Batch, eval_batches
from mergevq.extractor import FeatureExtractor, sha256_of
from mergevq.frechet import (
    MIN_SAMPLES,
    FrechetStatistics,
    Gaussian,
    Reference,
    frechet_distance,
)
from mergevq.images import ImageDataset, open_images, read_nearest, spread
from mergevq.merge import source_bits
from mergevq.metrics import to_uint8
from mergevq.perceptual import Perceptual, load_perceptual, weights_digest
from mergevq.pictures import contact_sheet, merge_map, to_pil
from mergevq.reconstruction import Comparison, Evaluation, Outcome
from mergevq.references import AUTHORS_CROP, CROP, ImageHashes, open_reference
from mergevq.report import Curve, Panel, has_plots, line_plot
from mergevq.run import (
    Progress,
    autocast,
    command_line,
    deterministic,
    environment,
    resolve_device,
    resolve_precision,
    step_generator,
)
from mergevq.tokenizer import Tokenizer

RECORD = "evaluation.json"


class Opened(NamedTuple):
    """A subject, ready to compute."""

    subject: Subject
    world: distributed.World
    tokenizer: Tokenizer
    tokenizer_hash: str
    images: ImageDataset
    perceptual: Perceptual | None
    extractor: FeatureExtractor | None
    precision: torch.dtype | None
    """What the model is autocast to; None is float32."""

    @property
    def num_images(self) -> int:
        """Images that will be looked at."""
        limit = self.subject.max_images
        return len(self.images) if limit is None else min(limit, len(self.images))

    @property
    def positions(self) -> list[int]:
        """Where in the data these images are."""
        return spread(len(self.images), self.num_images)

    def autocast(self) -> torch.autocast:
        """The precision of the model."""
        return autocast(self.world.device, self.precision)

    def batches(self) -> Iterator[Batch]:
        """This rank's images."""
        return eval_batches(
            self.images,
            image_size=self.tokenizer.config.image_size,
            batch_size=self.subject.batch_size,
            max_images=self.subject.max_images,
            rank=self.world.rank,
            world_size=self.world.world_size,
            num_workers=self.subject.num_workers,
            bilinear=self.subject.protocol == "authors",
        )


class Extreme(NamedTuple):
    """One of the worst or best images."""

    position: int
    """In the data."""
    psnr: float
    """With the given source."""
    psnr_recovered: float


class Measured(NamedTuple):
    """What was found at one K."""

    num_kept: int
    outcome: Outcome
    worst: list[Extreme]
    """Lowest PSNR first."""
    best: list[Extreme]
    """Highest first."""
    shared_psnr: tuple[float, float]
    """Given and recovered, over the images that JPEG and WebP compress too, or all."""


class Reconstructions(NamedTuple):
    """What was found at every K, over the same images."""

    measured: list[Measured]
    baselines: list[BaselineMeasurement]
    pixels_sha256: str
    """Over the images after the crop."""
    num_images: int


# ----------------------------------------------------------------------------- the evaluation


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
        reference = _reference(settings, subject)
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
        if plotting:
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
    evaluations = [
        Evaluation(
            tokenizer,
            count,
            perceptual=subject.perceptual,
            extractor=extractor,
            autocast=subject.autocast(),
            protocol=subject.subject.protocol,
        )
        for count in dict.fromkeys(num_kept)
        if tokenizer.num_tokens(blank, count)
    ]
    compressed = _evenly(subject.positions, num_baseline_images)
    baselines = Baselines([_num_bytes(tokenizer, e.num_kept) for e in evaluations], compressed)
    originals, hashes = Originals(extractor), ImageHashes()
    progress = Progress(len(evaluations) * share, unit="reconstruction")
    with deterministic(world.device):
        for batch in subject.batches():
            image = batch.image.to(world.device)
            pixels = to_uint8(batch.image)
            hashes.update(pixels, batch.index)
            features = originals.update(image)
            for evaluation in evaluations:
                evaluation.update(image, batch.index, features)
                progress.update(len(image))
            baselines.update(pixels, batch.index)
    progress.close()
    pixels_sha256 = hashes.compute()
    _require_same_images(reference, pixels_sha256)
    statistics = originals.compute() if reference is None else reference.statistics
    measured = [_measured(e, statistics, num_shown, compressed) for e in evaluations]
    return Reconstructions(
        measured=measured,
        baselines=baselines.compute() if compressed else [],
        pixels_sha256=pixels_sha256,
        num_images=measured[0].outcome.num_images,
    )


class Originals:
    """Features of the original images, batch by batch.

    Args:
        extractor: what sees them; without one there are none.
    """

    def __init__(self, extractor: FeatureExtractor | None) -> None:
        self.extractor = extractor
        self.statistics = None if extractor is None else FrechetStatistics(extractor.dim)

    def update(self, image: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b f"] | None:
        """Add images in [-1, 1]; gives their features, or None."""
        if self.extractor is None or self.statistics is None:
            return None
        features = self.extractor.features(to_uint8(image))
        self.statistics.update(features)
        return features

    def compute(self) -> Gaussian | None:
        """Statistics over all ranks, or None; every rank must call."""
        return None if self.statistics is None else self.statistics.compute()


def _measured(
    evaluation: Evaluation, statistics: Gaussian | None, num_shown: int, compressed: Sequence[int]
) -> Measured:
    """Everything about one K; every rank must call."""
    outcome = evaluation.compute(statistics)
    positions = evaluation.given.psnr.order()
    given = evaluation.given.psnr.compute()[:, 0]
    recovered = evaluation.recovered.psnr.compute()[:, 0]
    table = [
        Extreme(*row)
        for row in zip(positions.tolist(), given.tolist(), recovered.tolist(), strict=True)
    ]
    chosen = torch.tensor(compressed or positions.tolist(), dtype=torch.int64)
    shared = torch.isin(positions, chosen)
    means = [float(values.double()[shared].mean()) for values in (given, recovered)]
    return Measured(
        num_kept=evaluation.num_kept,
        outcome=outcome,
        worst=sorted(table, key=lambda row: (row.psnr, row.position))[:num_shown],
        best=sorted(table, key=lambda row: (-row.psnr, row.position))[:num_shown],
        shared_psnr=(means[0], means[1]),
    )


def _num_bytes(tokenizer: Tokenizer, num_kept: int) -> int:
    """Of one image: tokens and source map, rounded up."""
    config = tokenizer.config
    bits = num_kept * config.num_bits + source_bits(config.num_tokens, num_kept)
    return math.ceil(bits / 8)


def _evenly(positions: Sequence[int], count: int) -> list[int]:
    """Some of many, evenly spaced."""
    count = min(count, len(positions))
    return [positions[i * len(positions) // count] for i in range(count)]


# -------------------------------------------------------------------------------- what is opened


@contextmanager
def opened(subject: Subject) -> Iterator[Opened]:
    """Load model, data and networks, and take this process's place among the ranks.

    Raises:
        ValueError: one of them is not there, or the model was trained at another size.
        RuntimeError: a file is damaged.
    """
    world = distributed.init(resolve_device(subject.device))
    try:
        directory = resolve(subject.model)
        tokenizer = Tokenizer.from_pretrained(directory).to(world.device)
        trained_size = tokenizer.config.image_size
        if subject.image_size not in {None, trained_size}:
            raise ValueError(
                f"image_size ({subject.image_size}) must be the {trained_size} pixels that the "
                f"model in {directory} was trained at; leave --image-size out, or give a model of "
                f"{subject.image_size} pixels"
            )
        images = open_images(subject.data, max_pixels=subject.max_pixels)
        if distributed.is_main():
            _warn_of_enlarging(images, trained_size)
        perceptual = None
        if subject.lpips is not None:
            perceptual = load_perceptual(subject.lpips_trunk, subject.lpips)
        extractor = None
        if subject.extractor is not None:
            extractor = FeatureExtractor(subject.extractor, world.device)
        yield Opened(
            subject=subject,
            world=world,
            tokenizer=tokenizer,
            tokenizer_hash=model_hash(directory),
            images=images,
            perceptual=None if perceptual is None else perceptual.to(world.device),
            extractor=extractor,
            precision=resolve_precision(subject.precision, world.device),
        )
    finally:
        distributed.shutdown()


def require_fresh(out: Path) -> None:
    """Check that no earlier evaluation would be overwritten.

    Raises:
        ValueError: there is one.
    """
    if (out / RECORD).exists():
        raise ValueError(
            f"{out / RECORD} is there already; choose another directory with --out, or delete it"
        )


def _warn_of_enlarging(images: ImageDataset, image_size: int) -> None:
    """Say so when the data are smaller than what the model sees."""
    _, image = read_nearest(images, 0, {})
    if min(image.size) < image_size:
        warnings.warn(
            f"the first image has {image.width} x {image.height} pixels and is enlarged to "
            f"{image_size} x {image_size}: numbers are of enlarged images",
            stacklevel=2,
        )


def _reference(settings: ReconstructionSettings, subject: Opened) -> Reference | None:
    """The reference that was asked for.

    Raises:
        ValueError: it does not fit, or nothing would look at it.
    """
    if settings.reference is None:
        return None
    if subject.extractor is None:
        raise ValueError(
            f"reference {settings.reference} needs --extractor, the file it was made with"
        )
    return open_reference(
        Path(settings.reference),
        "reconstruction",
        extractor=subject.extractor,
        image_size=subject.tokenizer.config.image_size,
    )


def _require_same_images(reference: Reference | None, pixels_sha256: str) -> None:
    """Check that a reference is of the images that were reconstructed.

    Raises:
        ValueError: it is of others.
    """
    if reference is not None and reference.metadata.get("pixels_sha256") != pixels_sha256:
        raise ValueError(
            f"the reference is of other images ({reference.metadata.get('num_images')} of "
            f"{reference.metadata.get('data')}) than were reconstructed; leave --reference out, or "
            "write one of these images, with the same --max-images"
        )


# ------------------------------------------------------------------------------- what is written


def json_numbers(numbers: Mapping[str, float]) -> Numbers:
    """Numbers as JSON: infinite ones are null, and named under `infinite`.

    Raises:
        ValueError: a number is NaN.
    """
    broken = [name for name, value in numbers.items() if math.isnan(value)]
    if broken:
        raise ValueError(f"{', '.join(broken)} is not a number; there is no result to report")
    infinite = [name for name, value in numbers.items() if math.isinf(value)]
    values = {name: None if name in infinite else value for name, value in numbers.items()}
    return {"metrics": values, "infinite": infinite}


def evaluation_record(world: distributed.World) -> EvaluationRecord:
    """What any evaluation depends on besides its settings, as JSON."""
    return {
        "format_version": FORMAT_VERSION,
        "world_size": world.world_size,
        "command": command_line(),
        "environment": environment(world.device),
    }


def subject_record(subject: Opened, pixels_sha256: str, num_images: int) -> SubjectRecord:
    """What any evaluation of a tokenizer depends on, as JSON."""
    perceptual, extractor = subject.perceptual, subject.extractor
    return {
        "model": {
            "path": subject.subject.model,
            "hash": subject.tokenizer_hash,
            "config": to_json(subject.tokenizer.config),
        },
        "data": {
            "path": subject.subject.data,
            "num_images": num_images,
            "num_unreadable": subject.num_images - num_images,
            "pixels_sha256": pixels_sha256,
            "image_size": subject.tokenizer.config.image_size,
            "crop": CROP if subject.subject.protocol == "own" else AUTHORS_CROP,
        },
        "lpips": None if perceptual is None else _lpips_record(perceptual),
        "extractor": None if extractor is None else extractor_record(extractor),
        "precision": str(subject.precision or torch.float32).removeprefix("torch."),
    }


def extractor_record(extractor: FeatureExtractor) -> ExtractorRecord:
    """Which network saw the images, as JSON."""
    return {
        "name": extractor.name,
        "path": str(extractor.path),
        "sha256": extractor.sha256,
        "dim": extractor.dim,
    }


def reference_record(path: str, reference: Reference) -> OwnReference | ForeignReference:
    """What images were compared with, as JSON: the file, and what it says about itself."""
    record = {"path": path, "sha256": sha256_of(path), **reference.metadata}
    return cast("OwnReference | ForeignReference", record)


def _lpips_record(perceptual: Perceptual) -> LpipsRecord:
    """Which LPIPS it was, as JSON."""
    return {"trunk": perceptual.trunk, "sha256": weights_digest(perceptual.state_dict())}


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


def _result(images: ImageDataset, measured: Measured) -> ReconstructionResult:
    """One K as JSON."""
    outcome = measured.outcome

    def shown(extremes: list[Extreme]) -> list[ExtremeRecord]:
        return [
            {
                "image": images.name(extreme.position),
                **json_numbers({"psnr": extreme.psnr, "psnr_recovered": extreme.psnr_recovered}),
            }
            for extreme in extremes
        ]

    return {
        "num_kept": measured.num_kept,
        "given": json_numbers(outcome.given),
        "recovered": json_numbers(outcome.recovered),
        "source_accuracy": outcome.source_accuracy,
        "codebook": {
            "usage": outcome.codebook.usage,
            "attained": outcome.codebook.attained,
            "perplexity": outcome.codebook.perplexity,
            "num_tokens": outcome.codebook.num_tokens,
            "bit_probs": outcome.codebook.bit_probs.tolist(),
        },
        "bits": {
            "tokens": outcome.bits.tokens,
            "source": outcome.bits.source,
            "total": outcome.bits.total,
            "per_pixel": outcome.bits.total / outcome.num_pixels,
            "per_pixel_recovered": outcome.bits.tokens / outcome.num_pixels,
        },
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
    curves = [
        Curve(
            x=[each / num_pixels for each in price],
            y=[measured.shared_psnr[number] for measured in ordered],
            label=label,
            colour=number,
        )
        for number, (label, price) in enumerate(
            (
                ("given source: tokens and map", [each.total for each in bits]),
                ("recovered source: tokens", [each.tokens for each in bits]),
            )
        )
    ]
    for number, file_format in enumerate(FILE_FORMATS, start=len(curves)):
        files = [file for file in found.baselines if file.file_format == file_format]
        curves.append(
            Curve(
                x=[8 * file.mean_bytes / num_pixels for file in files],
                y=[file.psnr for file in files],
                label=f"{file_format}, with header" if files else "",
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
        image = next(images).image.to(subject.world.device)
        with subject.autocast():
            given = subject.tokenizer.reconstruct(image, measured.num_kept)
            recovered = subject.tokenizer.reconstruct(image, measured.num_kept, "recovered").image
        original = image[0].cpu()
        grid = merge_map(original, given.source.index[0].cpu(), given.encoded.grid_shape)
        decoded = [to_pil(part[0].float().clamp(-1, 1)) for part in (given.image, recovered)]
        rows.append([to_pil(original), grid, *decoded])
        texts = [f"{extreme.psnr:.2f} dB", f"{extreme.psnr_recovered:.2f} dB"]
        name = subject.images.name(extreme.position)
        name = name if len(name) <= 24 else f"..{name[-22:]}"
        captions.append([name, f"{measured.num_kept} tokens", *texts])
    for label, extremes in named:
        titles += [f"{label} {number}" for number in range(1, len(extremes) + 1)]
    header = ("original", "merge map", "given source", "recovered source")
    return contact_sheet(rows, header, titles, captions=captions)


def images_at(subject: Opened, positions: Sequence[int]) -> Iterator[Batch]:
    """Some images by their positions, as one batch on this rank alone."""
    return eval_batches(
        subject.images.subset(positions),
        image_size=subject.tokenizer.config.image_size,
        batch_size=len(positions),
        num_workers=0,
        bilinear=subject.subject.protocol == "authors",
    )


# --------------------------------------------------------------------------------- the self-test


class Check(NamedTuple):
    """A metric where its value is known."""

    name: str
    found: float
    wanted: str
    """In words."""
    passed: bool


def check_metrics(
    extractor: str | None = None,
    lpips: str | None = None,
    trunk: TrunkName = "alex",
    device: str = "auto",
) -> list[Check]:
    """Measure images that come back exactly, and Gaussians whose distance has a closed form.

    Args:
        extractor: TorchScript file whose distance is measured too.
        lpips: file or folder with LPIPS weights, to measure it too.
        trunk: network of LPIPS.
        device: where to compute.

    Raises:
        ValueError: a file is not there, or a number is NaN.
        RuntimeError: a file is damaged.
    """
    place = resolve_device(device)
    network = None if extractor is None else FeatureExtractor(extractor, place)
    perceptual = None if lpips is None else load_perceptual(trunk, lpips)
    # Smooth, as images are: all noise looks alike to a network.
    coarse = 2 * torch.rand(32, 3, 8, 8, generator=step_generator(0, "images", 0)) - 1
    image = torch.nn.functional.interpolate(coarse, size=64, mode="bilinear").to(place)
    originals = Originals(network)
    comparison = Comparison(
        perceptual=None if perceptual is None else perceptual.to(place), extractor=network
    )
    features = originals.update(image)
    comparison.update(image, image, torch.arange(len(image)), features)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="a Frechet distance of")
        numbers = comparison.compute(originals.compute())
    written = json_numbers(numbers)
    checks = [
        Check(
            name="psnr",
            found=numbers["psnr"],
            wanted="infinite, and written as null",
            passed=written["infinite"] == ["psnr"] and written["metrics"]["psnr"] is None,
        )
    ]
    known = {"ssim": 1.0, "l1": 0.0, "lpips": 0.0}
    if network is not None:
        known[network.metric_name("frechet")] = 0.0
    checks += [
        Check(name, numbers[name], f"{value:g}, to 0.001", abs(numbers[name] - value) < 1e-3)
        for name, value in known.items()
        if name in numbers
    ]
    return [*checks, *_check_gaussians()]


def _check_gaussians() -> list[Check]:
    """Distances of covariances with the same axes, one of less than full rank, and of a shift."""
    numbers = torch.rand(
        2 * 6 + 6 * 6 + MIN_SAMPLES * 6, generator=step_generator(0, "gaussians", 0)
    )
    means, axes, samples = numbers.double().split([2 * 6, 6 * 6, MIN_SAMPLES * 6])
    means, axes = means.view(2, 6), torch.linalg.qr(axes.view(6, 6)).Q
    spreads = torch.tensor([[1, 2, 3, 4, 5, 6], [3, 0, 1, 0, 2, 2]], dtype=torch.float64)
    first, second = (
        Gaussian(mean, axes @ spread.square().diag() @ axes.T, None)
        for mean, spread in zip(means, spreads, strict=True)
    )
    apart = (means[0] - means[1]).square().sum() + (spreads[0] - spreads[1]).square().sum()
    here, there = FrechetStatistics(6), FrechetStatistics(6)
    for part in samples.view(-1, 6).split(500):
        here.update(part)
        there.update(part + 0.5)
    checks = []
    for name, found, wanted in (
        ("frechet, of Gaussians", frechet_distance(first, second), float(apart)),
        ("frechet, of a shift", frechet_distance(here.compute(), there.compute()), 6 * 0.5**2),
    ):
        checks.append(Check(name, found, f"{wanted:.6g}", abs(found - wanted) < 1e-6))
    return checks
