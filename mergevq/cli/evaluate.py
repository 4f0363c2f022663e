"""The command line of evaluations: `mergevq evaluate NAME`.

Each is a function whose signature is its options and whose docstring is its help. What is heavy is
imported inside, so that help and mistyped options never wait for torch.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from mergevq.cli.options import (
    _PLAIN,
    MAY_BE_EMPTY,
    Counts,
    Sampling,
    SamplingOptions,
    as_text,
    read_fractions,
    whole_numbers,
)
from mergevq.cli.tables import (
    columns,
    correlation_table,
    guidance_table,
    logit_error_line,
    mask_table,
    next_lines,
    numbers_table,
    reconstruction_table,
    robustness_table,
    text_table,
)
from mergevq.config.base import BUNDLED_TOKENIZER, MAX_PIXELS, Device, Precision
from mergevq.config.evaluation import (
    FRACTIONS,
    RENDERED,
    CorrelationSettings,
    GenerationSettings,
    MaskSettings,
    ReconstructionSettings,
    Reconstructor,
    ReferenceKind,
    RobustnessSettings,
    Subject,
    TextSettings,
    TrunkName,
)
from mergevq.config.generator import (
    GuidanceSchedule,
)
from mergevq.config.records import GuidanceSettings, ReconstructionRecord, RobustnessRecord

SubjectOptions = Annotated[Subject, tyro.conf.arg(name="")]


@dataclass(frozen=True, kw_only=True, slots=True)
class SweptOptions(SamplingOptions):
    """Sampling at each of several guidance scales."""

    guidance: float = _PLAIN.guidance_scale
    """first scale of classifier-free guidance; 1 is none."""
    guidance_schedule: GuidanceSchedule = "linear"
    """how it rises from 1 as an image grows; the paper's is linear."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Through:
    """Options of a tokenizer that images go through."""

    model: str = BUNDLED_TOKENIZER
    """directory of a tokenizer, a name of `mergevq models`, or owner/name@revision on Hugging
    Face."""
    decoder: str | None = None
    """directory of a decoder that was trained for the tokenizer, or its id; by default the
    tokenizer's own."""
    num_kept: Counts = ()
    """K, one or several (36,64,144), of ordered tokens so many first ones; the tokenizer's own if
    there are none."""
    batch_size: int = 64
    """images at once."""
    device: Device = "auto"
    """where to compute."""
    precision: Precision = "auto"
    """precision of the model; auto is bf16 where the device gains from it."""

    def settings(self) -> Reconstructor:
        """The same as settings.

        Raises:
            ValueError: K is no number, or out of range.
        """
        return Reconstructor(
            model=self.model,
            decoder=self.decoder,
            num_kept=whole_numbers("num_kept", self.num_kept),
            batch_size=self.batch_size,
            device=self.device,
            precision=self.precision,
        )


ThroughOptions = Annotated[Through, tyro.conf.arg(name="")]
Swept = Annotated[SweptOptions, tyro.conf.arg(name="")]


def reconstruction(
    *,
    subject: SubjectOptions,
    num_kept: Counts = (),
    out: Path = Path("evaluations/reconstruction"),
    reference: Path | None = None,
    show: int = 4,
    baseline_images: int = 500,
) -> None:
    """Measure how well images come back, with the given and with the recovered source.

    Writes OUT/evaluation.json with every number, setting, hash and version;
    OUT/rate_distortion.png, PSNR over bits per pixel beside files of other formats; and
    OUT/worst_best_K.png for each K. Under torchrun the processes share the images.

    Args:
        subject: what is evaluated, and by what.
        num_kept: K, one or several (36,64,144); the tokenizer's own if there are none.
        out: where the results go.
        reference: statistics of the very images (`mergevq evaluate reference --kind
            reconstruction`); taken on the way without.
        show: worst and best images in a picture.
        baseline_images: images that JPEG, WebP, AVIF and JPEG XL compress too (the last with
            pillow-jxl-plugin) and that the baseline `components` is of, evenly spaced; 0 for none.
    """
    settings = ReconstructionSettings(
        subject=subject,
        out=str(out),
        num_kept=whole_numbers("num_kept", num_kept),
        reference=as_text(reference),
        num_shown=show,
        num_baseline_images=baseline_images,
    )
    from mergevq.evaluate.reconstruction import evaluate_reconstruction

    record = evaluate_reconstruction(settings)
    if record is not None:
        print(reconstruction_table(record))
        _print_unmeasured(record)
        print(f"results: {out}")
        print(next_lines(("probe", "knn", "--model", subject.model, "--data", subject.data)))


def robustness(
    *,
    subject: SubjectOptions,
    num_kept: int | None = None,
    fractions: tuple[str, ...] = tuple(map(str, FRACTIONS)),
    map_fractions: Annotated[tuple[str, ...], MAY_BE_EMPTY] = (),
    joint: tyro.conf.FlagCreatePairsOff[bool] = False,
    radius: int | None = None,
    seed: int = 0,
    out: Path = Path("evaluations/robustness"),
) -> None:
    """Measure what wrong tokens do to images: some are replaced by nearby codes, then decoded.

    Generators make such mistakes and encoders do not. Writes OUT/evaluation.json and
    OUT/robustness.png. A fraction of 0 is the reconstruction. With an extractor the mean of the
    Frechet distances at 0.5 to 0.9 is given too: pFID, called after the extractor.

    Args:
        subject: what is evaluated, and by what.
        num_kept: K; the tokenizer's own by default.
        fractions: shares of the tokens that are replaced (0,0.5,0.9).
        map_fractions: shares of the cells that the source map puts into the group of another cell
            (0,0.02,0.1,0.5), beside it or any, of the given map and of the recovered one.
        joint: also with tokens and cells wrong together, in each of --map-fractions but 0, and
            with the map recovered from wrong tokens.
        radius: most bits in which a replacement differs; by default the three of pFID, which are
            the smallest with at least 200, 280 and 360 of 4096 codes within them, and may be one.
        seed: of which tokens, bits and cells.
        out: where the results go.
    """
    settings = RobustnessSettings(
        subject=subject,
        out=str(out),
        num_kept=num_kept,
        fractions=read_fractions("fractions", fractions),
        map_fractions=read_fractions("map_fractions", map_fractions) if map_fractions else (),
        joint=joint,
        radius=radius,
        seed=seed,
    )
    from mergevq.evaluate.robustness.run import evaluate_robustness

    record = evaluate_robustness(settings)
    if record is not None:
        print(robustness_table(record))
        _print_unmeasured(record)
        _print_left_out(record["left_out"])
        print(f"results: {out}")
        given = ("evaluate", "correlation", out, "OTHERS")
        print(next_lines(("train", "RECIPE", "--regularizer.kind", "perturb"), given))


def correlation(
    *,
    records: Annotated[tyro.conf.Positional[tuple[Path, ...]], MAY_BE_EMPTY],
    out: Path = Path("evaluations/correlation"),
) -> None:
    """Rank tokenizers by reconstructions, wrong tokens and samples, and correlate the ranks.

    Spearman's rho of pFID and of rFID with gFID, each of one extractor, over three tokenizers or
    more, and the least that is significant of so many. Writes OUT/evaluation.json.

    Args:
        records: directories of `mergevq evaluate robustness` and `generation`, one of each for
            every tokenizer; they are paired by its hash.
        out: where the results go.
    """
    settings = CorrelationSettings(records=tuple(map(str, records)), out=str(out))
    from mergevq.evaluate.robustness.correlation import evaluate_correlation

    print(correlation_table(evaluate_correlation(settings)))
    print(f"results: {out}")
    print(next_lines(("evaluate", "robustness", "--model", "ANOTHER", "--extractor", "FILE")))


def text(
    *,
    through: ThroughOptions,
    data: str = RENDERED,
    image_size: int | None = None,
    max_images: int = 200,
    max_pixels: int = MAX_PIXELS,
    seed: int = 0,
    out: Path = Path("evaluations/text"),
) -> None:
    """Measure how much text can still be read, in words of known places, by their height.

    Words are read by rapidocr (extra `text`): in the originals, which is the ceiling, in the
    originals at half of the side and back, and in what comes back with the given and with the
    recovered source. Writes OUT/evaluation.json and OUT/words.png.

    Args:
        through: the tokenizer, and how images go through it.
        data: `rendered`, words in the font of Pillow on flat and noisy backgrounds, or a file of
            JSON lines with image, box (left, top, right, bottom) and text.
        image_size: side of the images in pixels; what the tokenizer was trained at by default.
        max_images: images that are rendered, or read, evenly spaced.
        max_pixels: largest picture that is read, as width times height.
        seed: of rendered words, places and backgrounds.
        out: where the results go.
    """
    settings = TextSettings(
        through=through.settings(),
        out=str(out),
        data=data,
        image_size=image_size,
        max_images=max_images,
        max_pixels=max_pixels,
        seed=seed,
    )
    from mergevq.evaluate.content.text import evaluate_text

    print(text_table(evaluate_text(settings)))
    print(f"results: {out}")
    print(next_lines(("evaluate", "reconstruction", "--model", through.model, "--data", "FOLDER")))


def masks(
    *,
    through: ThroughOptions,
    data: str,
    max_images: int | None = None,
    max_pixels: int = MAX_PIXELS,
    out: Path = Path("evaluations/masks"),
) -> None:
    """Measure how well masks come back, by the number of tokens, beside codings of as many bits.

    A mask is where an image is brighter than one half. IoU, Dice and the agreement of boundaries
    within 1 pixel, of ordered tokens for 1, 2, 4, .. first ones. Writes OUT/evaluation.json and
    OUT/masks.png, IoU over bits.

    Args:
        through: the tokenizer, and how masks go through it.
        data: a folder of images or masks, a parquet file, WebDataset shards, or `digits`.
        max_images: only so many, evenly spaced; all by default.
        max_pixels: largest picture that is read, as width times height; larger ones count as
            unreadable.
        out: where the results go.
    """
    settings = MaskSettings(
        through=through.settings(),
        data=data,
        out=str(out),
        max_images=max_images,
        max_pixels=max_pixels,
    )
    from mergevq.evaluate.content.masks import evaluate_masks

    print(mask_table(evaluate_masks(settings)))
    print(f"results: {out}")
    print(next_lines(("evaluate", "reconstruction", "--model", through.model, "--data", data)))


def reference(  # noqa: PLR0913 - each is an option
    *,
    data: str,
    out: Path,
    kind: ReferenceKind,
    extractor: Path,
    image_size: int,
    max_images: int | None = None,
    max_pixels: int = MAX_PIXELS,
    features: int = 10_000,
    array: Path | None = None,
    batch_size: int = 64,
    device: Device = "auto",
    num_workers: int = 2,
) -> None:
    """Write the statistics of images that others will be compared with.

    Reconstructions are compared with the very images that went in, generated images with the
    training set; the file says which it is for, and evaluating the other refuses it.

    Args:
        data: a folder of images, a parquet file, WebDataset shards, or `digits`.
        out: `.npz` file with mu and sigma, as other tools read it.
        kind: what will be compared with it.
        extractor: TorchScript file of the network that sees the images.
        image_size: side in pixels that images are cropped to, the model's.
        max_images: take only so many, evenly spaced.
        max_pixels: largest picture that is read, as width times height; larger ones count as
            unreadable.
        features: also keep the features of so many images, for kernel distance, precision and
            recall of generated images; 0 for none.
        array: also write the images as one `.npz` (arr_0, uint8, NHWC), as the ADM evaluator reads
            samples and references; with one process.
        batch_size: images at once, over all processes.
        device: where to compute.
        num_workers: loader processes; 0 loads in this one.
    """
    from mergevq.metrics.references import make_reference

    written = make_reference(
        data,
        out,
        kind,
        extractor=extractor,
        image_size=image_size,
        max_images=max_images,
        max_pixels=max_pixels,
        num_features=features if kind == "generation" else 0,
        array=array,
        batch_size=batch_size,
        device=device,
        num_workers=num_workers,
    )
    if written is not None:
        size = f"{written['image_size']} x {written['image_size']}"
        print(f"{out}: for {kind}, {written['num_images']} images of {size} pixels")
        print(f"extractor: {written['extractor']} ({written['extractor_sha256'][:12]})")
        if array is not None:
            print(f"images: {array}")
        print(next_lines(("evaluate", kind, "--reference", out, "--extractor", extractor)))


def generation(  # noqa: PLR0913 - each is an option
    *,
    reference: Path,
    extractor: Path,
    sampling: Sampling,
    # torchrun takes --num for an abbreviation of an option of its own.
    num: Annotated[int, tyro.conf.arg(aliases=["--num-images"])] = 50_000,
    samples: Path | None = None,
    out: Path = Path("evaluations/generation"),
    classifier: Path | None = None,
    classifier_outputs: Annotated[tuple[int, ...], MAY_BE_EMPTY] = (),
    val_data: str | None = None,
    data: str | None = None,
    max_pixels: int = MAX_PIXELS,
    neighbours: int = 8,
    npz: tyro.conf.FlagCreatePairsOff[bool] = False,
    batch_size: int = 64,
) -> None:
    """Sample images, as many of each class, and compare them with the training set.

    Frechet distance, class score (Inception score), kernel distance, precision and recall. Writes
    OUT/samples, OUT/evaluation.json and, with --data, OUT/nearest_neighbours.png. Stopped and
    started again it goes on where it was; under torchrun the processes share the work, and the
    images are the same.

    Args:
        reference: statistics of the training set (`mergevq evaluate reference --kind generation`),
            or an `.npz` of the ADM evaluator.
        extractor: TorchScript file of the network that sees the images. Only the Inception-2015
            file gives numbers called FID, Inception score and KID.
        sampling: what samples, and how.
        num: images, of class 0, 1, .. in turn; a multiple of the classes makes them uniform. Under
            torchrun it is called --num-images.
        samples: evaluate these instead, a folder of images or an `.npz` with arr_0.
        out: where samples and results go.
        classifier: TorchScript file that tells the generator's classes, for class accuracy.
        classifier_outputs: its outputs that are the generator's classes, in order, where it has
            more: 0 217 482 ..
        val_data: held-out images, of which as many as samples are measured too: their distance, the
            ratio to it, and how often the classifier is right.
        data: training images, to show the nearest of them beside some samples.
        max_pixels: largest picture of these and of samples that is read, as width times height.
        neighbours: samples shown so.
        npz: also write OUT/samples.npz (arr_0), as the ADM evaluator reads it.
        batch_size: images at once.
    """
    run = None
    if sampling.generator or sampling.model:
        run = sampling.run(num_images=num, batch_size=batch_size)
    settings = GenerationSettings(
        reference=str(reference),
        extractor=str(extractor),
        out=str(out),
        run=run,
        samples=as_text(samples),
        classifier=as_text(classifier),
        classifier_outputs=classifier_outputs,
        val_data=val_data,
        data=data,
        max_pixels=max_pixels,
        num_looked_up=neighbours,
        write_array=npz,
        batch_size=batch_size,
        device=sampling.device,
    )
    from mergevq.evaluate.generation import evaluate_generation

    record = evaluate_generation(settings)
    if record is not None:
        print(numbers_table(record))
        if run is not None and record["logit_error"] is not None:
            print(logit_error_line(run.weights, record["logit_error"]))
        _print_left_out(record["left_out"])
        print(f"results: {out}")
        given = ("--reference", reference, "--extractor", extractor)
        print(next_lines(("evaluate", "guidance", *given)))


def guidance(  # noqa: PLR0913 - each is an option
    *,
    reference: Path,
    extractor: Path,
    sampling: Swept,
    stop: float = 4.0,
    step: float = 0.1,
    num: Annotated[int, tyro.conf.arg(aliases=["--num-images"])] = 50_000,
    out: Path = Path("evaluations/guidance"),
    classifier: Path | None = None,
    classifier_outputs: Annotated[tuple[int, ...], MAY_BE_EMPTY] = (),
    npz: tyro.conf.FlagCreatePairsOff[bool] = False,
    batch_size: int = 64,
) -> None:
    """Evaluate a generator at each guidance scale from --guidance to --stop, and name the best.

    Each scale is sampled and measured as by `mergevq evaluate generation`, in OUT/SCALE. Writes
    OUT/evaluation.json with the numbers of all, and OUT/guidance.png. Stopped and started again it
    goes on where it was; under torchrun the processes share the work. A scale takes as long as one
    `evaluate generation`, and keeps its samples; find the region with few images (--num) first.

    Args:
        reference: statistics of the training set (`mergevq evaluate reference --kind generation`),
            or an `.npz` of the ADM evaluator.
        extractor: TorchScript file of the network that sees the images. Only the Inception-2015
            file gives numbers called FID, Inception score and KID.
        sampling: what samples, and how.
        stop: last scale, a whole number of steps from the first.
        step: from one scale to the next.
        num: images at each scale, of class 0, 1, .. in turn. Under torchrun it is called
            --num-images.
        out: where the folders of the scales and the results go.
        classifier: TorchScript file that tells the generator's classes, for class accuracy.
        classifier_outputs: its outputs that are the generator's classes, in order, where it has
            more: 0 217 482 ..
        npz: also write OUT/SCALE/samples.npz (arr_0), as the ADM evaluator reads it.
        batch_size: images at once.
    """
    settings = GuidanceSettings(
        evaluation=GenerationSettings(
            reference=str(reference),
            extractor=str(extractor),
            out=str(out),
            run=sampling.run(num_images=num, batch_size=batch_size),
            classifier=as_text(classifier),
            classifier_outputs=classifier_outputs,
            write_array=npz,
            batch_size=batch_size,
            device=sampling.device,
        ),
        stop=stop,
        step=step,
    )
    from mergevq.evaluate.guidance_sweep import evaluate_guidance

    record = evaluate_guidance(settings)
    if record is not None:
        print(guidance_table(record))
        _print_left_out(record["left_out"])
        print(f"results: {out}")
        print(next_lines(("sample", "--guidance", "SCALE", "--out", "samples")))


def selftest(
    *,
    extractor: Path | None = None,
    lpips: Path | None = None,
    lpips_trunk: TrunkName = "alex",
    device: Device = "auto",
) -> None:
    """Check the metrics on this machine where the answer is known.

    Images that come back exactly have infinite PSNR, SSIM 1, LPIPS 0 and a Frechet distance below
    0.001; of two Gaussians the distance is that of the closed form. Ends with an error if not.

    Args:
        extractor: TorchScript file whose Frechet distance is checked too.
        lpips: file or folder with LPIPS weights, to check them too.
        lpips_trunk: network of LPIPS.
        device: where to compute.

    Raises:
        RuntimeError: a metric is wrong.
    """
    from mergevq.evaluate.selftest import check_metrics

    checks = check_metrics(as_text(extractor), as_text(lpips), lpips_trunk, device)
    rows = [["metric", "found", "must be", ""]]
    rows += [
        [check.name, f"{check.found:.6g}", check.wanted, "ok" if check.passed else "WRONG"]
        for check in checks
    ]
    print(columns(rows))
    wrong = [check.name for check in checks if not check.passed]
    if wrong:
        raise RuntimeError(
            f"{', '.join(wrong)}: not what it must be; no result here is to be trusted"
        )


def _print_unmeasured(record: ReconstructionRecord | RobustnessRecord) -> None:
    """Say which networks were not given."""
    if record["lpips"] is None:
        print("without LPIPS: give its weights with --lpips")
    if record["extractor"] is None:
        print("without Frechet distance and feature cosine: give a network with --extractor")


def _print_left_out(texts: Sequence[str]) -> None:
    """Say what was not measured, and why."""
    for text in texts:
        print(f"without {text}")


COMMANDS: dict[str, Callable[..., None]] = {
    command.__name__: command
    for command in (
        reconstruction,
        generation,
        guidance,
        reference,
        robustness,
        correlation,
        text,
        masks,
        selftest,
    )
}
