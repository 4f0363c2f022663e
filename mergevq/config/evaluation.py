"""Settings of evaluations, `mergevq evaluate`, and of quality that is asked for; no torch."""

from dataclasses import dataclass, fields
from typing import Literal

from mergevq.config.base import BUNDLED_TOKENIZER, MAX_PIXELS, Device, Precision, require
from mergevq.config.generator import (
    SampleRun,
)
from mergevq.config.ranges import check_numbers

TrunkName = Literal["vgg", "alex", "squeeze"]
"""Networks of LPIPS."""
ReferenceKind = Literal["reconstruction", "generation"]
"""Kinds of a reference: the very images that went in, or a training set."""
Protocol = Literal["own", "authors"]
"""How images are prepared and compared, other than by which network.

`own`: resized bicubic; pixels are rounded to bytes; SSIM has a Gaussian window and population
covariance; the extractor sees bytes. `authors`: as their evaluation code, for numbers that are put
beside theirs: resized bilinear; pixels are cut off to bytes; SSIM has a uniform window of 7 x 7 and
sample covariance; the extractor sees pixels between bytes too.
"""
RENDERED = "rendered"
"""Text that is drawn for the evaluation, in place of data."""
Groups = Literal["neighbour", "random"]
"""Where a wrong source map has a cell's group from: a cell above, below or beside it, or any."""
FRACTIONS = (0.0, 0.1, 0.3, 0.5, 0.6, 0.7, 0.8, 0.9)
"""Shares of wrong tokens: none, few, and those whose mean `evaluate robustness` gives."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Subject:
    """A tokenizer, images, and the networks that compare them."""

    model: str = BUNDLED_TOKENIZER
    """Directory of a tokenizer, a name of `mergevq models`, or owner/name@revision on Hugging
    Face."""
    decoder: str | None = None
    """Directory of a decoder that was trained for the tokenizer, or its id; None is the tokenizer's
    own."""
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
    precision: Precision = "auto"
    """Precision of the model; metrics are always float32 or better. auto is bf16 where the device
    gains from it."""
    num_workers: int = 2
    """Loading processes; 0 loads in this one."""
    protocol: Protocol = "own"
    """How images are prepared and compared; `authors` for numbers beside those of the paper."""

    def __post_init__(self) -> None:
        """Reject impossible counts."""
        check_numbers(self)


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
    """Images that JPEG, WebP and, where Pillow writes them, AVIF and JPEG XL compress too, evenly
    spaced, and that the baseline `components` is of; 0 leaves all out."""

    def __post_init__(self) -> None:
        """Reject counts below 0."""
        check_numbers(self)


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
    map_fractions: tuple[float, ...] = ()
    """Shares of the cells that the source map puts into another group, given and recovered; none
    leaves wrong maps out."""
    joint: bool = False
    """Whether tokens and cells are wrong together too, in equal shares, and the map recovered from
    wrong tokens."""
    radius: int | None = None
    """Most bits that differ; None is each of the smallest whose balls have 200, 280 and 360 of
    4,096 codes or more."""
    seed: int = 0
    """Seed of which tokens, bits and cells are wrong."""

    def __post_init__(self) -> None:
        """Reject fractions outside [0, 1], none at all, and both wrong without shares of cells."""
        check_numbers(self)
        require(
            bool(self.map_fractions) or not self.joint,
            "joint needs shares of the cells beside those of the tokens: --map-fractions 0.1,0.5",
        )
        require(len(self.fractions) > 0, "fractions () must hold at least one: 0 is none replaced")


@dataclass(frozen=True, kw_only=True, slots=True)
class Reconstructor:
    """A tokenizer, and how images go through it."""

    model: str = BUNDLED_TOKENIZER
    """Directory of a tokenizer, a name of `mergevq models`, or owner/name@revision on Hugging
    Face."""
    decoder: str | None = None
    """Directory of a decoder that was trained for the tokenizer, or its id; None is the tokenizer's
    own."""
    num_kept: tuple[int, ...] = ()
    """Each K; none is the tokenizer's own."""
    batch_size: int = 64
    """Images at once."""
    device: Device = "auto"
    """Where to compute."""
    precision: Precision = "auto"
    """Precision of the model; auto is bf16 where the device gains from it."""

    def __post_init__(self) -> None:
        """Reject impossible counts."""
        check_numbers(self)


@dataclass(frozen=True, kw_only=True, slots=True)
class TextSettings:
    """All that an evaluation of text in reconstructions depends on."""

    through: Reconstructor
    out: str
    """Directory of results; must not hold any."""
    data: str = RENDERED
    """`rendered`, or a file of JSON lines with image, box and text."""
    image_size: int | None = None
    """Side of the images in pixels; None is what the tokenizer was trained at."""
    max_images: int = 200
    """Images that are rendered, or read, evenly spaced, of those in the file."""
    max_pixels: int = MAX_PIXELS
    """Largest picture that is read, as width times height."""
    seed: int = 0
    """Seed of rendered words, places and backgrounds."""

    def __post_init__(self) -> None:
        """Reject impossible counts."""
        check_numbers(self)


@dataclass(frozen=True, kw_only=True, slots=True)
class MaskSettings:
    """All that an evaluation of masks depends on."""

    through: Reconstructor
    data: str
    """A folder of images, a parquet file, WebDataset shards, or `digits`: masks are where they are
    brighter than one half."""
    out: str
    """Directory of results; must not hold any."""
    max_images: int | None = None
    """Only so many, evenly spaced; None is all."""
    max_pixels: int = MAX_PIXELS
    """Largest picture that is read, as width times height; larger ones count as unreadable."""

    def __post_init__(self) -> None:
        """Reject impossible counts."""
        check_numbers(self)


@dataclass(frozen=True, kw_only=True, slots=True)
class CorrelationSettings:
    """All that a correlation over tokenizers depends on."""

    records: tuple[str, ...]
    """`evaluation.json` of evaluations of robustness and of generation, or their directories."""
    out: str
    """Directory of results; must not hold any."""


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
    """The samples' own run; its device is used throughout."""
    samples: str | None = None
    """Images that are there already instead: a folder, or an `.npz` with arr_0."""
    classifier: str | None = None
    """TorchScript file that tells the generator's classes; None leaves class accuracy out."""
    classifier_outputs: tuple[int, ...] = ()
    """Its outputs that are the generator's classes, in order; none is all that it has."""
    val_data: str | None = None
    """Held-out images, of which as many as there are samples are measured too."""
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
        require(
            (self.run is None) != (self.samples is None),
            "either a generator (--generator) or --samples is needed, not both",
        )
        require(
            self.classifier is None or self.run is not None,
            "--classifier needs the classes, which only a generator has (--generator)",
        )
        require(
            self.classifier is not None or not self.classifier_outputs,
            "--classifier-outputs needs a --classifier",
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class Quality:
    """How many tokens a picture is given: at most one of these, none is the tokenizer's own K."""

    num_kept: int | None = None
    """K, of each tile."""
    psnr: float | None = None
    """Least PSNR in dB: the fewest tokens that reach it."""
    lpips: float | None = None
    """Largest LPIPS distance: the fewest tokens that stay below it."""
    bits_per_pixel: float | None = None
    """Most bits of the file for each pixel of the picture: the most tokens that fit."""

    def __post_init__(self) -> None:
        """Reject two targets at once, and impossible ones."""
        check_numbers(self)
        given = [item.name for item in fields(self) if getattr(self, item.name) is not None]
        require(
            len(given) <= 1,
            f"{len(given)} targets ({', '.join(given)}) are given, and at most 1 can be met: "
            "leave the others out",
        )
