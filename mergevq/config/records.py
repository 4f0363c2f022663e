"""Keys of the records that evaluations and probes write; no torch."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal, TypedDict

from mergevq.config.base import RecoverySource, require
from mergevq.config.evaluation import (
    CorrelationSettings,
    GenerationSettings,
    Groups,
    MaskSettings,
    ReconstructionSettings,
    ReferenceKind,
    RobustnessSettings,
    TextSettings,
    TrunkName,
)
from mergevq.config.generator import (
    SampleRun,
)
from mergevq.config.probing import ProbeRun
from mergevq.config.ranges import check_numbers
from mergevq.config.tokenizer import TokenizerConfig

_MOST_SCALES = 1000
"""Most scales of one sweep."""


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
        require(first <= stop, f"stop ({stop}) must be at least the first guidance_scale ({first})")
        require(
            self._num_steps < _MOST_SCALES,
            f"from {first} to {stop} in steps of {step} are {self._num_steps + 1} scales, and "
            f"at most {_MOST_SCALES} are evaluated: take a larger step, or a lower stop",
        )
        end = first + self._num_steps * step
        require(
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
    """Description of a reference in its file: `mergevq evaluate reference`."""

    kind: ReferenceKind
    extractor: str
    extractor_sha256: str
    data: str
    pixels_sha256: str
    num_images: int
    image_size: int
    crop: str
    class_names: list[str]
    """In label order; empty where nothing is known of the classes."""


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
    """Entries of every evaluation."""

    format_version: int
    world_size: int
    command: str
    environment: dict[str, Any]
    """Versions, commit and machine: `mergevq.runtime.run.environment`."""


class SubjectRecord(TypedDict):
    """Entries of every evaluation of a tokenizer."""

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
    """The bound: log2 of the number of maps there are."""
    source_coded: float | None
    """The map as `mergevq compress` writes it, mean over the images that JPEG compresses too; null
    where there are none, or no `codec` extra. Evaluations before it have none."""
    condition: float
    """The condition of the image; 0 without a condition. Evaluations before it have none.
    """
    total: float
    """Tokens, the bound of the map, and the condition."""
    per_pixel: float
    """With the given source: tokens and map."""
    per_pixel_recovered: float
    """With the recovered source, which needs tokens only."""


class ContinuousRecord(TypedDict):
    """Tokens that are real numbers."""

    num_floats: int
    """Real numbers of one image."""
    active_channels: int
    """Channels whose variance over all tokens is above 0.01."""


class ExtremeRecord(Numbers):
    """One of the worst or best images."""

    image: str


class ReconstructionResult(TypedDict):
    """Results at one K."""

    num_kept: int
    given: Numbers
    recovered: Numbers | None
    """None where grid and K imply the layout, so that nothing is to recover."""
    source_accuracy: float | None
    codebook: CodebookRecord | None
    """None of tokens that are real numbers."""
    bits: BitsRecord | None
    """Likewise."""
    continuous: ContinuousRecord | None
    """None of tokens with indices; evaluations of earlier versions have no such entry."""
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
    """Share of the codebook."""
    neighbours: list[int]
    """Which of the paper's numbers of neighbours, among 4,096 codes, it stands for."""


class RobustnessResult(Numbers):
    """Results for one kind of mistakes."""

    fraction: float
    radius: int | None
    """None where nothing is replaced."""
    source: RecoverySource
    """Source map. Evaluations before it have none, and nothing below on cells."""
    map_fraction: float
    """Share of the cells that are put into another group."""
    groups: Groups | None
    """None where no cell is."""
    num_replaced: int
    num_moved: float
    """Cells in another group, mean over images."""


class RobustnessRecord(EvaluationRecord, SubjectRecord, Numbers):
    """`evaluation.json` of `mergevq evaluate robustness`; its metrics are over all results."""

    kind: Literal["robustness evaluation"]
    settings: Annotated[dict[str, Any], RobustnessSettings]
    balls: list[BallRecord]
    results: list[RobustnessResult]
    left_out: list[str]


class ReaderRecord(TypedDict):
    """Which program read the text."""

    name: str
    version: str
    sha256: str
    """Hash of the file of its recogniser."""


class TextScores(TypedDict):
    """Shares of words that were read right."""

    num_words: int
    text_exact: float | None
    """Read to the letter, case and all; null of no word."""
    text_1_minus_ned: float | None
    """1 - edit distance by the longer text; likewise."""


class TextBucket(TypedDict):
    """Words of one range of heights."""

    low: float
    """Least height in pixels."""
    high: float
    """Heights are below it."""
    scores: TextScores
    refined: TextScores
    """Over words that were read to the letter in the original."""


class TextRow(TypedDict):
    """Results of the images of one kind."""

    name: str
    """`original`, `degraded` (a half of the side and back), `wrong image` (the originals' readings
    against texts of other images), or `reconstruction`."""
    num_kept: int | None
    source: RecoverySource | None
    buckets: list[TextBucket]
    mean_exact: float | None
    """Mean of the buckets that have words; null without any."""
    mean_1_minus_ned: float | None


class TextData(TypedDict):
    """Which text was read."""

    path: str
    num_images: int
    num_words: int
    """Words of all heights."""
    num_outside: int
    """Words that are left out: of another height, or not wholly inside the square."""
    image_size: int
    pixels_sha256: str


class TextRecord(EvaluationRecord):
    """`evaluation.json` of `mergevq evaluate text`."""

    kind: Literal["text evaluation"]
    settings: Annotated[dict[str, Any], TextSettings]
    model: ModelRecord
    data: TextData
    reader: ReaderRecord
    rows: list[TextRow]


class MaskRow(Numbers):
    """Agreement of the masks of one kind: means over images, and `ciou` of all pixels."""

    name: str
    """`original`, `degraded` (a half of the side and back), `reconstruction`, or a coding."""
    num_kept: int | None
    """K; of a coding, the one whose bits it has."""
    source: RecoverySource | None
    bits: float | None
    """Bits of one mask, of codings the mean; null of none, and of real numbers."""
    num_above_budget: int
    """Masks whose smallest coding has more bits than the tokens."""


class MaskRecord(EvaluationRecord):
    """`evaluation.json` of `mergevq evaluate masks`."""

    kind: Literal["mask evaluation"]
    settings: Annotated[dict[str, Any], MaskSettings]
    model: ModelRecord
    data: DataRecord
    num_empty: int
    """Masks without a pixel, which agree wholly with one that comes back empty."""
    rows: list[MaskRow]


class CorrelatedTokenizer(TypedDict):
    """Distances of one tokenizer: of reconstructions, with wrong tokens, and of samples."""

    tokenizer: str
    """Hash."""
    reconstruction: float
    perturbed: float
    generation: float
    records: list[str]
    """Paths of the evaluations of robustness and of generation."""


class CorrelationRecord(EvaluationRecord, Numbers):
    """`evaluation.json` of `mergevq evaluate correlation`; its metrics are Spearman's rho."""

    kind: Literal["correlation evaluation"]
    settings: Annotated[dict[str, Any], CorrelationSettings]
    extractor: ExtractorRecord
    distance: str
    """Name of the Frechet distance."""
    tokenizers: list[CorrelatedTokenizer]
    smallest_significant: float | None
    """Least absolute rho with p < 0.05, two-sided; null where none is, of so few tokenizers."""


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
    """Logit error of the weights that sampled; None for those of the file."""
    samples: SamplesRecord
    extractor: ExtractorRecord
    classifier: ExtractorRecord | None
    reference: OwnReference | ForeignReference
    left_out: list[str]
    nearest_distances: list[list[float]] | None


class ScaleResult(Numbers):
    """Results at one guidance scale."""

    scale: float
    folder: str
    """Folder of samples and their evaluation, in the directory of the sweep."""
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


# ------------------------------------------------------------------------------- what is written


class ProbedModel(TypedDict):
    """Which tokenizer was probed."""

    sha256: str
    config: Annotated[dict[str, Any], TokenizerConfig]
    teacher: str | None
    """Teacher of its class token; None if its training run is not there."""


class ProbedImages(TypedDict):
    """Images to learn from, or to be tested on."""

    num_images: int
    num_broken: int
    sha256: str
    """Over the images after the crop."""


class ProbedData(TypedDict):
    """Both sets; the same one when one image is left out at a time."""

    class_names: list[str]
    num_unseen_class: int
    """Test images of classes that no training image has."""
    most_frequent_class_accuracy: float
    train: ProbedImages
    val: ProbedImages
    num_in_both: int | None
    """Test images that are training images too; None when one is left out at a time."""


class ScoredRow(TypedDict):
    """Accuracies and confusions of one feature."""

    name: str
    accuracy: float
    standard_error: float
    top5_accuracy: float | None
    confusion: list[str]
    """Counts by predicted class, a line for each class."""
    pictures: list[str]
    dim: int
    """Channels."""


class SweptRate(TypedDict):
    """One learning rate of a linear probe."""

    rate: float
    held_out_accuracy: float
    accuracy: float


class LinearRow(ScoredRow):
    """A linear probe."""

    rate: float
    rate_at_edge: bool
    sweep: list[SweptRate]


class NumNeighbours(TypedDict):
    """One k."""

    k: int
    accuracy: float


class KnnRow(ScoredRow):
    """A vote of neighbours; its accuracy is of the first k."""

    by_k: list[NumNeighbours]


class FinetuneRow(ScoredRow):
    """A fine-tuned encoder."""

    rate: float
    num_steps: int
    batch_size: int
    num_skipped_steps: int
    losses: list[float]


class ProbeRecord(TypedDict):
    """`probe.json`."""

    format_version: int
    kind: Literal["probe"]
    method: Literal["linear", "knn", "finetune"]
    run: Annotated[dict[str, Any], ProbeRun]
    model: ProbedModel
    data: ProbedData
    environment: dict[str, Any]
    """Versions, commit and machine: `mergevq.runtime.run.environment`."""
    rows: Sequence[LinearRow | KnnRow | FinetuneRow]
    """One for each feature; of fine-tuning, linear ones of frozen features before."""
