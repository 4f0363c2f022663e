"""Every setting of an evaluation, and every key of its record: `mergevq evaluate`; no torch."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal, TypedDict

from mergevq.config import (
    MAX_PIXELS,
    Device,
    Precision,
    TokenizerConfig,
    check_max_pixels,
    check_numbers,
)
from mergevq.config_generator import MAX_GUIDANCE, SampleRun

TrunkName = Literal["vgg", "alex", "squeeze"]
"""Networks of LPIPS."""
ReferenceKind = Literal["reconstruction", "generation"]
"""What a reference is compared with: the very images that went in, or a training set."""
Protocol = Literal["own", "authors"]
"""How images are prepared and compared, other than by which network.

`own`: resized bicubic; pixels are rounded to bytes; SSIM has a Gaussian window and population
covariance; the extractor sees bytes. `authors`: as their evaluation code, for numbers that are put
beside theirs: resized bilinear; pixels are cut off to bytes; SSIM has a uniform window of 7 x 7 and
sample covariance; the extractor sees pixels between bytes too.
"""
_LEAST_STEP = 1e-3
"""Of guidance scales: far below what changes a score."""
_MOST_SCALES = 1000
"""Of one sweep."""
FRACTIONS = (0.0, 0.1, 0.3, 0.5, 0.6, 0.7, 0.8, 0.9)
"""Shares of wrong tokens: none, few, and those whose mean `evaluate robustness` gives."""


def _require(condition: bool, message: str) -> None:  # noqa: FBT001 - reads as an assertion
    """Raise `ValueError(message)` unless the condition holds."""
    if not condition:
        raise ValueError(message)


@dataclass(frozen=True, kw_only=True, slots=True)
class Subject:
    """A tokenizer, images, and the networks that compare them."""

    model: str
    """Directory of a tokenizer, or owner/name@revision on Hugging Face."""
    data: str
    """A folder of images, a parquet file, WebDataset shards, or `digits`."""
    lpips: str | None = None
    """File or folder with the LPIPS weights; None leaves LPIPS out."""
    lpips_trunk: TrunkName = "alex"
    """Network of LPIPS."""
    extractor: str | None = None
    """TorchScript file for Frechet distance and feature cosine; None leaves them out. Only the
    Inception-2015 file gives a distance called FID."""
    image_size: int | None = None
    """Side the model must have been trained at, in pixels; None accepts any."""
    max_images: int | None = None
    """Only so many, evenly spaced; None is all."""
    max_pixels: int = MAX_PIXELS
    """Largest picture that is read, as width times height; larger ones count as unreadable."""
    batch_size: int = 64
    """Images at once, over all ranks."""
    device: Device = "auto"
    """Where to compute."""
    precision: Precision = "float32"
    """Of the model; metrics are always float32 or better."""
    num_workers: int = 2
    """Loading processes; 0 loads in this one."""
    protocol: Protocol = "own"
    """How images are prepared and compared; `authors` for numbers beside those of the paper."""

    def __post_init__(self) -> None:
        """Reject impossible counts."""
        _require(self.batch_size >= 1, f"batch_size ({self.batch_size}) must be at least 1")
        _require(self.num_workers >= 0, f"num_workers ({self.num_workers}) must be at least 0")
        _require(
            self.max_images is None or self.max_images >= 1,
            f"max_images ({self.max_images}) must be at least 1, or None for all",
        )
        check_max_pixels(self.max_pixels)


@dataclass(frozen=True, kw_only=True, slots=True)
class ReconstructionSettings:
    """All that an evaluation of reconstructions depends on."""

    subject: Subject
    out: str
    """Directory of results; must not hold any."""
    num_kept: tuple[int, ...] = ()
    """Each K; none is the tokenizer's own."""
    reference: str | None = None
    """Statistics of the very images, of kind `reconstruction`; None takes them on the way."""
    num_shown: int = 4
    """Worst and best images that are shown."""
    num_baseline_images: int = 500
    """Images that JPEG and WebP compress too, evenly spaced; 0 leaves them out."""

    def __post_init__(self) -> None:
        """Reject counts below 0."""
        check_numbers(self)
        for name in ("num_shown", "num_baseline_images"):
            _require(getattr(self, name) >= 0, f"{name} ({getattr(self, name)}) must be at least 0")


@dataclass(frozen=True, kw_only=True, slots=True)
class RobustnessSettings:
    """All that a curve of robustness depends on."""

    subject: Subject
    out: str
    """Directory of results; must not hold any."""
    num_kept: int | None = None
    """K; None is the tokenizer's own."""
    fractions: tuple[float, ...] = FRACTIONS
    """Shares of the tokens that are replaced."""
    radius: int | None = None
    """Most bits that differ; None is each of the smallest whose balls have 200, 280 and 360 of
    4,096 codes or more."""
    seed: int = 0
    """Of which tokens and which bits."""

    def __post_init__(self) -> None:
        """Reject fractions outside [0, 1], and none at all."""
        check_numbers(self)
        _require(len(self.fractions) > 0, "fractions () must hold at least one: 0 is none replaced")
        for fraction in self.fractions:
            _require(0 <= fraction <= 1, f"fraction ({fraction}) must be between 0 and 1")


@dataclass(frozen=True, kw_only=True, slots=True)
class GenerationSettings:
    """All that an evaluation of generated images depends on."""

    reference: str
    """Statistics of the training set, of kind `generation`, or a file of the ADM evaluator."""
    extractor: str
    """TorchScript file of the network that sees the images."""
    out: str
    """Directory of samples and results; one that was begun is gone on with."""
    run: SampleRun | None = None
    """What samples; its device is used throughout."""
    samples: str | None = None
    """Images that are there already instead: a folder, or an `.npz` with arr_0."""
    classifier: str | None = None
    """TorchScript file that tells the generator's classes; None leaves class accuracy out."""
    data: str | None = None
    """Training images, to find nearest neighbours in; None leaves them out."""
    max_pixels: int = MAX_PIXELS
    """Largest picture that is read, as width times height, of these and of samples."""
    num_looked_up: int = 8
    """Samples whose neighbours are shown."""
    write_array: bool = False
    """Also write the samples as one `.npz`, for the ADM evaluator."""
    batch_size: int = 64
    """Images measured at once."""
    device: Device = "auto"
    """Where to compute."""

    def __post_init__(self) -> None:
        """Reject both or neither of what samples and what is there."""
        check_numbers(self)
        _require(
            (self.run is None) != (self.samples is None),
            "either a generator (--model) or --samples is needed, not both",
        )
        _require(
            self.classifier is None or self.run is not None,
            "--classifier needs the classes, which only a generator has (--model)",
        )
        check_max_pixels(self.max_pixels)
        for name in ("batch_size", "num_looked_up"):
            _require(getattr(self, name) >= 1, f"{name} ({getattr(self, name)}) must be at least 1")


@dataclass(frozen=True, kw_only=True, slots=True)
class GuidanceSettings:
    """All that a sweep of guidance scales depends on."""

    evaluation: GenerationSettings
    """At each scale. Its own scale is the first, and each has a folder in its directory."""
    stop: float = 4.0
    """Last scale; a whole number of steps from the first."""
    step: float = 0.1
    """From one scale to the next."""

    def __post_init__(self) -> None:
        """Reject images that are there already, and a range that does not end at its end."""
        check_numbers(self)
        first, stop, step = self.run.settings.guidance_scale, self.stop, self.step
        _require(
            _LEAST_STEP <= step <= MAX_GUIDANCE,
            f"step ({step}) must be between {_LEAST_STEP:g} and {MAX_GUIDANCE:g}",
        )
        _require(
            first <= stop <= MAX_GUIDANCE,
            f"stop ({stop}) must be between the first guidance_scale ({first}) and "
            f"{MAX_GUIDANCE:g}",
        )
        _require(
            self._num_steps < _MOST_SCALES,
            f"from {first} to {stop} in steps of {step} are {self._num_steps + 1} scales, and "
            f"at most {_MOST_SCALES} are evaluated: take a larger step, or a lower stop",
        )
        end = first + self._num_steps * step
        _require(
            abs(end - stop) < 1e-6,
            f"stop ({stop}) must be a whole number of steps ({step}) from the first "
            f"guidance_scale ({first}), such as {end:.6g}",
        )

    @property
    def run(self) -> SampleRun:
        """How images are sampled, at the first scale.

        Raises:
            ValueError: nothing is sampled: the images are there already.
        """
        if self.evaluation.run is None:
            raise ValueError("a sweep of guidance needs a generator: --generator")
        return self.evaluation.run

    @property
    def _num_steps(self) -> int:
        """From the first scale to the last."""
        return round((self.stop - self.run.settings.guidance_scale) / self.step)

    @property
    def scales(self) -> tuple[float, ...]:
        """Each scale, ascending, without the rounding errors of a sum."""
        first = self.run.settings.guidance_scale
        return tuple(round(first + n * self.step, 6) for n in range(self._num_steps + 1))

    def at(self, scale: float) -> GenerationSettings:
        """The evaluation at one scale, in its folder."""
        settings = replace(self.run.settings, guidance_scale=scale)
        return replace(
            self.evaluation,
            out=str(Path(self.evaluation.out) / f"{scale}"),
            run=replace(self.run, settings=settings),
        )


# ------------------------------------------------------------------------------- what is written


class Numbers(TypedDict):
    """Metrics as JSON, which has no word for infinity."""

    metrics: dict[str, float | None]
    """By name; infinite ones are null."""
    infinite: list[str]
    """Names of those."""


class ExtractorRecord(TypedDict):
    """Which network saw the images."""

    name: str
    path: str
    sha256: str
    dim: int


class LpipsRecord(TypedDict):
    """Which LPIPS compared them."""

    trunk: TrunkName
    sha256: str


class ReferenceRecord(TypedDict):
    """What a reference says about itself, in its file: `mergevq evaluate reference`."""

    kind: ReferenceKind
    extractor: str
    extractor_sha256: str
    data: str
    pixels_sha256: str
    num_images: int
    image_size: int
    crop: str


class ForeignReference(TypedDict):
    """A reference of another tool, which says nothing about itself."""

    path: str
    sha256: str


class OwnReference(ForeignReference, ReferenceRecord):
    """A reference of this one, or images that were described on the way."""


class ModelRecord(TypedDict):
    """Which tokenizer was evaluated."""

    path: str
    hash: str
    config: Annotated[dict[str, Any], TokenizerConfig]


class DataRecord(TypedDict):
    """Which images it was evaluated on."""

    path: str
    num_images: int
    num_unreadable: int
    pixels_sha256: str
    """Over the images after the crop."""
    image_size: int
    crop: str


class EvaluationRecord(TypedDict):
    """Of every evaluation."""

    format_version: int
    world_size: int
    command: str
    environment: dict[str, Any]
    """Versions, commit and machine: `mergevq.run.environment`."""


class SubjectRecord(TypedDict):
    """Of every evaluation of a tokenizer."""

    model: ModelRecord
    data: DataRecord
    lpips: LpipsRecord | None
    extractor: ExtractorRecord | None
    precision: str


class CodebookRecord(TypedDict):
    """How tokens use the codebook."""

    usage: float
    attained: float
    perplexity: float
    num_tokens: int
    bit_probs: list[float]


class BitsRecord(TypedDict):
    """Bits of one image."""

    tokens: float
    source: float
    total: float
    per_pixel: float
    """With the given source: tokens and map."""
    per_pixel_recovered: float
    """With the recovered source, which needs tokens only."""


class ExtremeRecord(Numbers):
    """One of the worst or best images."""

    image: str


class ReconstructionResult(TypedDict):
    """What was found at one K."""

    num_kept: int
    given: Numbers
    recovered: Numbers
    source_accuracy: float
    codebook: CodebookRecord
    bits: BitsRecord
    worst: list[ExtremeRecord]
    best: list[ExtremeRecord]
    images_per_second: float


class BaselineRecord(Numbers):
    """Files of another format at the bytes of one K."""

    file_format: str
    budget_bytes: int
    mean_bytes: float
    num_images: int
    num_above_budget: int


class ReconstructionRecord(EvaluationRecord, SubjectRecord):
    """`evaluation.json` of `mergevq evaluate reconstruction`."""

    kind: Literal["reconstruction evaluation"]
    settings: Annotated[dict[str, Any], ReconstructionSettings]
    reference: OwnReference | None
    results: list[ReconstructionResult]
    baselines: list[BaselineRecord]


class BallRecord(TypedDict):
    """The codes that may replace one."""

    radius: int
    """Most bits in which they differ from it."""
    share: float
    """Of the codebook."""
    neighbours: list[int]
    """Which of the paper's numbers of neighbours, among 4,096 codes, it stands for."""


class RobustnessResult(Numbers):
    """What was found at one fraction in one ball."""

    fraction: float
    radius: int | None
    """None where nothing is replaced."""
    num_replaced: int


class RobustnessRecord(EvaluationRecord, SubjectRecord, Numbers):
    """`evaluation.json` of `mergevq evaluate robustness`; its metrics are over all results."""

    kind: Literal["robustness evaluation"]
    settings: Annotated[dict[str, Any], RobustnessSettings]
    balls: list[BallRecord]
    results: list[RobustnessResult]
    left_out: list[str]


class SamplesRecord(TypedDict):
    """Which samples were evaluated."""

    num_images: int
    size: list[int]
    pixels_sha256: str
    array: str | None


class GenerationRecord(EvaluationRecord, Numbers):
    """`evaluation.json` of `mergevq evaluate generation`."""

    kind: Literal["generation evaluation"]
    settings: Annotated[dict[str, Any], GenerationSettings]
    generator: str | None
    """Hash; None where samples were given."""
    tokenizer: str | None
    logit_error: float | None
    """Of the weights that sampled; None for those of the file."""
    samples: SamplesRecord
    extractor: ExtractorRecord
    classifier: ExtractorRecord | None
    reference: OwnReference | ForeignReference
    left_out: list[str]
    nearest_distances: list[list[float]] | None


class ScaleResult(Numbers):
    """What was found at one guidance scale."""

    scale: float
    folder: str
    """Of samples and their evaluation, in the directory of the sweep."""
    pixels_sha256: str


class BestScale(TypedDict):
    """A guidance scale that no other is better than, by one metric."""

    metric: str
    scale: float
    value: float


class GuidanceRecord(EvaluationRecord):
    """`evaluation.json` of `mergevq evaluate guidance`."""

    kind: Literal["guidance evaluation"]
    settings: Annotated[dict[str, Any], GuidanceSettings]
    generator: str | None
    """Hash."""
    tokenizer: str | None
    extractor: ExtractorRecord
    classifier: ExtractorRecord | None
    reference: OwnReference | ForeignReference
    results: list[ScaleResult]
    """By ascending scale."""
    best: list[BestScale]
    """By Frechet distance and, where it was measured, by class score."""
    left_out: list[str]
