"""The command line of evaluations: `mergevq evaluate NAME`.

Each is a function whose signature is its options and whose docstring is its help. What is heavy is
imported inside, so that help and mistyped options never wait for torch.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, TypeVar

import tyro

from mergevq.config import MAX_PIXELS, Device
from mergevq.config_evaluate import (
    FRACTIONS,
    BaselineRecord,
    GenerationRecord,
    GenerationSettings,
    GuidanceRecord,
    GuidanceSettings,
    Numbers,
    ReconstructionRecord,
    ReconstructionSettings,
    ReferenceKind,
    RobustnessRecord,
    RobustnessSettings,
    Subject,
    TrunkName,
)
from mergevq.config_generator import GuidanceSchedule, SampleRun, SamplingSettings, Weights
from mergevq.terminal import shown_default

Number = TypeVar("Number", int, float)

Counts = Annotated[
    tuple[str, ...], tyro.conf.arg(metavar="K,K,..", help_behavior_hint=shown_default)
]
"""An option that takes numbers with commas or spaces between them; see `whole_numbers`."""
SubjectOptions = Annotated[Subject, tyro.conf.arg(name="")]
_PLAIN = SamplingSettings()


@dataclass(frozen=True, kw_only=True, slots=True)
class SamplingOptions:
    """What samples, and how: options of `mergevq sample` and of `mergevq evaluate generation`."""

    generator: str = ""
    """directory of the generator, or owner/name@revision on Hugging Face."""
    tokenizer: str = ""
    """directory of the tokenizer of its tokens, or owner/name@revision on Hugging Face; by default
    where it was when the generator was trained."""
    num_kept: int | None = None
    """K, one of those trained on; the generator's own by default."""
    guidance: float = _PLAIN.guidance_scale
    """scale of classifier-free guidance; 1 is none."""
    guidance_schedule: GuidanceSchedule = _PLAIN.guidance_schedule
    """how it rises from 1 as an image grows."""
    guidance_power: float = _PLAIN.guidance_power
    """exponent of the schedule `power`."""
    guidance_interval: tuple[float, float] = _PLAIN.guidance_interval
    """part of the sequence that is guided."""
    temperature: tuple[float, ...] = (1.0,)
    """one number, or one for each part of a token; 0 takes the most likely value."""
    top_k: tuple[int, ...] = (0,)
    """sample among the so many most likely values; 0 is all; one number, or one for each part."""
    top_p: tuple[float, ...] = (1.0,)
    """sample among the most likely values that together have this probability; one number, or one
    for each part."""
    steps: int | None = None
    """of random order: forward passes, several tokens in each; one token each by default."""
    budget: bool = True
    """of merge order: hold an image to K distinct tokens."""
    seed: int = 0
    """of the run."""
    weights: Weights = "float32"
    """bf16 and int8 are faster, and change what is sampled a little."""
    device: Device = "auto"
    """where to compute."""

    def run(self, *, num_images: int, batch_size: int) -> SampleRun:
        """The run that these options ask for.

        Raises:
            ValueError: there is no generator, its tokenizer is not known, or a setting is wrong.
        """
        if not self.generator:
            raise ValueError("--generator is missing: the directory of the generator")
        tokenizer = self.tokenizer
        if not tokenizer:
            from mergevq.generation import known_tokenizer

            tokenizer = known_tokenizer(self.generator)
        return SampleRun(
            model=self.generator,
            tokenizer=tokenizer,
            num_images=num_images,
            num_kept=self.num_kept,
            seed=self.seed,
            batch_size=batch_size,
            weights=self.weights,
            device=self.device,
            settings=SamplingSettings(
                guidance_scale=self.guidance,
                guidance_schedule=self.guidance_schedule,
                guidance_power=self.guidance_power,
                guidance_interval=self.guidance_interval,
                temperature=_one_or_several(self.temperature),
                top_k=_one_or_several(self.top_k),
                top_p=_one_or_several(self.top_p),
                budget=self.budget,
                num_steps=self.steps,
            ),
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class SweptOptions(SamplingOptions):
    """What samples, and how, at each of several guidance scales."""

    guidance: float = _PLAIN.guidance_scale
    """first scale of classifier-free guidance; 1 is none."""
    guidance_schedule: GuidanceSchedule = "linear"
    """how it rises from 1 as an image grows; the paper's is linear."""


Sampling = Annotated[SamplingOptions, tyro.conf.arg(name="")]
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
    OUT/rate_distortion.png, PSNR over bits per pixel beside JPEG and WebP of the same images; and
    OUT/worst_best_K.png for each K. Under torchrun the processes share the images.

    Args:
        subject: what is evaluated, and by what.
        num_kept: K, one or several (36,64,144); the tokenizer's own if there are none.
        out: where the results go.
        reference: statistics of the very images (`mergevq evaluate reference --kind
            reconstruction`); taken on the way without.
        show: worst and best images in a picture.
        baseline_images: images that JPEG and WebP compress too, evenly spaced; 0 for none.
    """
    settings = ReconstructionSettings(
        subject=subject,
        out=str(out),
        num_kept=whole_numbers("num_kept", num_kept),
        reference=_text(reference),
        num_shown=show,
        num_baseline_images=baseline_images,
    )
    from mergevq.evaluate import evaluate_reconstruction

    record = evaluate_reconstruction(settings)
    if record is not None:
        print(reconstruction_table(record))
        _print_unmeasured(record)
        print(f"results: {out}")


def robustness(
    *,
    subject: SubjectOptions,
    num_kept: int | None = None,
    fractions: tuple[str, ...] = tuple(map(str, FRACTIONS)),
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
        radius: most bits in which a replacement differs; by default the three of pFID, which are
            the smallest with at least 200, 280 and 360 of 4096 codes within them, and may be one.
        seed: of which tokens and which bits.
        out: where the results go.
    """
    settings = RobustnessSettings(
        subject=subject,
        out=str(out),
        num_kept=num_kept,
        fractions=_fractions(fractions),
        radius=radius,
        seed=seed,
    )
    from mergevq.robustness import evaluate_robustness

    record = evaluate_robustness(settings)
    if record is not None:
        print(robustness_table(record))
        _print_unmeasured(record)
        _print_left_out(record["left_out"])
        print(f"results: {out}")


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
    from mergevq.references import make_reference

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
        data: training images, to show the nearest of them beside some samples.
        max_pixels: largest picture of these and of samples that is read, as width times height.
        neighbours: samples shown so.
        npz: also write OUT/samples.npz (arr_0), as the ADM evaluator reads it.
        batch_size: images at once.
    """
    run = None
    if sampling.generator or sampling.tokenizer:
        run = sampling.run(num_images=num, batch_size=batch_size)
    settings = GenerationSettings(
        reference=str(reference),
        extractor=str(extractor),
        out=str(out),
        run=run,
        samples=_text(samples),
        classifier=_text(classifier),
        data=data,
        max_pixels=max_pixels,
        num_looked_up=neighbours,
        write_array=npz,
        batch_size=batch_size,
        device=sampling.device,
    )
    from mergevq.evaluate_generation import evaluate_generation

    record = evaluate_generation(settings)
    if record is not None:
        print(_numbers_table(record))
        if record["logit_error"] is not None:
            print(logit_error_line(sampling.weights, record["logit_error"]))
        _print_left_out(record["left_out"])
        print(f"results: {out}")


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
        npz: also write OUT/SCALE/samples.npz (arr_0), as the ADM evaluator reads it.
        batch_size: images at once.
    """
    settings = GuidanceSettings(
        evaluation=GenerationSettings(
            reference=str(reference),
            extractor=str(extractor),
            out=str(out),
            run=sampling.run(num_images=num, batch_size=batch_size),
            classifier=_text(classifier),
            write_array=npz,
            batch_size=batch_size,
            device=sampling.device,
        ),
        stop=stop,
        step=step,
    )
    from mergevq.guidance_sweep import evaluate_guidance

    record = evaluate_guidance(settings)
    if record is not None:
        print(guidance_table(record))
        _print_left_out(record["left_out"])
        print(f"results: {out}")


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
    from mergevq.evaluate import check_metrics

    checks = check_metrics(_text(extractor), _text(lpips), lpips_trunk, device)
    rows = [["metric", "found", "must be", ""]]
    rows += [
        [check.name, f"{check.found:.6g}", check.wanted, "ok" if check.passed else "WRONG"]
        for check in checks
    ]
    print(_columns(rows))
    wrong = [check.name for check in checks if not check.passed]
    if wrong:
        raise RuntimeError(
            f"{', '.join(wrong)}: not what it must be; no result here is to be trusted"
        )


# ------------------------------------------------------------------------------------ tables


def reconstruction_table(record: ReconstructionRecord) -> str:
    """The numbers of an evaluation, a column for each K."""
    results = record["results"]
    rows = [["", *(f"K = {result['num_kept']}" for result in results)]]
    parts = {
        "given": [result["given"] for result in results],
        "recovered": [result["recovered"] for result in results],
    }
    names = [name for numbers in parts.values() for each in numbers for name in each["metrics"]]
    for name in dict.fromkeys(names):
        for source, numbers in parts.items():
            rows.append([f"{name}, {source}", *(_number(each, name) for each in numbers)])
    rows.append(["source accuracy", *(f"{r['source_accuracy']:.4f}" for r in results)])
    rows.append(["codebook usage", *(f"{r['codebook']['usage']:.1%}" for r in results)])
    rows.append(["codebook perplexity", *(f"{r['codebook']['perplexity']:.4g}" for r in results)])
    balance = [[min(p, 1 - p) for p in result["codebook"]["bit_probs"]] for result in results]
    rows.append(["rarer value of a bit, least", *(f"{min(values):.4f}" for values in balance)])
    rows.append(
        ["rarer value of a bit, mean", *(f"{sum(values) / len(values):.4f}" for values in balance)]
    )
    for name in ("tokens", "source", "total"):
        rows.append([f"bits, {name}", *(f"{r['bits'][name]:.1f}" for r in results)])
    for source, name in (("given", "per_pixel"), ("recovered", "per_pixel_recovered")):
        rows.append([f"bits per pixel, {source}", *(f"{r['bits'][name]:.4f}" for r in results)])
    rows.append(["images per second", *(f"{r['images_per_second']:.3g}" for r in results)])
    data = record["data"]
    lines = [_columns(rows), "", f"{data['num_images']} images of {data['image_size']} pixels"]
    if data["num_unreadable"]:
        lines[-1] += f"; {data['num_unreadable']} cannot be read"
    if record["baselines"]:
        lines += ["", _columns(_baseline_rows(record["baselines"]))]
    return "\n".join(lines)


def _baseline_rows(baselines: Sequence[BaselineRecord]) -> list[list[str]]:
    """JPEG and WebP at the bytes of each K."""
    rows = [["whole files", "budget", "bytes", "psnr", "above budget"]]
    rows += [
        [
            baseline["file_format"],
            str(baseline["budget_bytes"]),
            f"{baseline['mean_bytes']:.1f}",
            _number(baseline, "psnr"),
            f"{baseline['num_above_budget']} of {baseline['num_images']}",
        ]
        for baseline in baselines
    ]
    return rows


def robustness_table(record: RobustnessRecord) -> str:
    """The numbers of a curve, a row for each fraction in each ball."""
    results = record["results"]
    names = list(results[0]["metrics"])
    rows = [["fraction", "bits", "tokens", *names]]
    rows += [
        [
            f"{result['fraction']:g}",
            "-" if result["radius"] is None else str(result["radius"]),
            str(result["num_replaced"]),
            *(_number(result, name) for name in names),
        ]
        for result in results
    ]
    lines = [_columns(rows), ""]
    for ball in record["balls"]:
        stands = f", for {' and '.join(map(str, ball['neighbours']))} of 4096"
        lines.append(
            f"replaced by codes of at most {ball['radius']} other bits, {ball['share']:.3%} of the "
            f"codebook{stands if ball['neighbours'] else ''}"
        )
    if record["metrics"]:
        lines += ["", _numbers_table(record)]
    return "\n".join(lines)


def guidance_table(record: GuidanceRecord) -> str:
    """The numbers of a sweep, a row for each scale, and which scale is the best."""
    results = record["results"]
    names = [name for name in results[0]["metrics"] if not name.startswith("num_")]
    rows = [["guidance", *names]]
    rows += [[f"{each['scale']}", *(_number(each, name) for name in names)] for each in results]
    lines = [_columns(rows), ""]
    lines += [
        f"best {best['metric']}: {best['value']:.4f} at guidance {best['scale']}"
        for best in record["best"]
    ]
    return "\n".join(lines)


def _numbers_table(record: GenerationRecord | RobustnessRecord) -> str:
    """The numbers of an evaluation as a whole, a row each."""
    return _columns([[name, _number(record, name)] for name in record["metrics"]])


def _number(part: Numbers, name: str) -> str:
    """A number as text; infinite ones say so."""
    if name in part["infinite"]:
        return "inf"
    value = part["metrics"].get(name)
    if value is None:
        return "-"
    return f"{value:.0f}" if name.startswith("num_") else f"{value:.4f}"


def _columns(rows: Sequence[Sequence[str]]) -> str:
    """Rows of text in columns, the first to the left, the others to the right."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join(
        "  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]).rstrip()
        for row in rows
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


def logit_error_line(weights: Weights, error: float) -> str:
    """What weights of fewer bits cost, in words."""
    return f"{weights} weights: logits are off by {error:.2%} of their spread"


# ------------------------------------------------------------------------------- what is read


def _text(path: Path | None) -> str | None:
    """A path as it is recorded."""
    return None if path is None else str(path)


def whole_numbers(name: str, texts: Sequence[str]) -> tuple[int, ...]:
    """Whole numbers, separated by commas or spaces.

    Raises:
        ValueError: something else is between them.
    """
    try:
        return tuple(int(part) for text in texts for part in text.split(",") if part.strip())
    except ValueError:
        option = name.replace("_", "-")
        raise ValueError(
            f"{name} ({' '.join(texts)}) must be whole numbers: --{option} 16,20"
        ) from None


def _one_or_several(numbers: tuple[Number, ...]) -> Number | tuple[Number, ...]:
    """A single number for all parts of a token, or one for each."""
    return numbers[0] if len(numbers) == 1 else numbers


def _fractions(texts: Sequence[str]) -> tuple[float, ...]:
    """Shares, separated by commas or spaces.

    Raises:
        ValueError: something else is between them, or there is none.
    """
    try:
        shares = tuple(float(part) for text in texts for part in text.split(",") if part.strip())
    except ValueError:
        shares = ()
    if not shares or not all(map(math.isfinite, shares)):
        raise ValueError(
            f"fractions ({' '.join(texts)}) must be numbers from 0 to 1: --fractions 0,0.5"
        )
    return shares


COMMANDS: dict[str, Callable[..., None]] = {
    command.__name__: command
    for command in (reconstruction, generation, guidance, reference, robustness, selftest)
}
