"""The command line of evaluations: `mergevq evaluate NAME`.

Each is a function whose signature is its options and whose docstring is its help. What is heavy is
imported inside, so that help and mistyped options never wait for torch.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from mergevq.config import Device, GuidanceSchedule, Precision, SampleRun, SamplingSettings
from mergevq.config_evaluate import (
    GenerationSettings,
    ReconstructionSettings,
    RobustnessSettings,
    Subject,
    TrunkName,
)


def reconstruction(  # noqa: PLR0913 - each is an option
    *,
    model: str,
    data: str,
    tokens: tuple[str, ...] = (),
    out: Path = Path("evaluations/reconstruction"),
    lpips: Path | None = None,
    lpips_trunk: TrunkName = "alex",
    extractor: Path | None = None,
    reference: Path | None = None,
    image_size: int | None = None,
    max_images: int | None = None,
    show: int = 4,
    baseline_images: int = 500,
    batch_size: int = 64,
    precision: Precision = "float32",
    device: Device = "auto",
    num_workers: int = 2,
) -> None:
    """Measure how well images come back, with the given and with the recovered source.

    Writes OUT/evaluation.json with every number, setting, hash and version;
    OUT/rate_distortion.png, PSNR over bits per pixel beside JPEG and WebP of the same images; and
    OUT/worst_best_K.png for each K. Under torchrun the processes share the images.

    Args:
        model: directory of a tokenizer, or its Hugging Face id.
        data: a folder of images, a parquet file, WebDataset shards, or `digits`.
        tokens: K, one or several (36,64,144); the tokenizer's own if there are none.
        out: where the results go.
        lpips: file or folder with LPIPS weights; LPIPS is left out without.
        lpips_trunk: network of LPIPS.
        extractor: TorchScript file for Frechet distance and feature cosine, which are left out
            without. Only the Inception-2015 file gives a distance called FID.
        reference: statistics of the very images (`mergevq evaluate reference --kind
            reconstruction`); taken on the way without.
        image_size: refuse a model that was not trained at so many pixels.
        max_images: look at only so many, evenly spaced.
        show: worst and best images in a picture.
        baseline_images: images that JPEG and WebP compress too, evenly spaced; 0 for none.
        batch_size: images at once, over all processes.
        precision: of the model.
        device: where to compute.
        num_workers: loader processes; 0 loads in this one.
    """
    settings = ReconstructionSettings(
        subject=Subject(
            model=model,
            data=data,
            lpips=_text(lpips),
            lpips_trunk=lpips_trunk,
            extractor=_text(extractor),
            image_size=image_size,
            max_images=max_images,
            batch_size=batch_size,
            device=device,
            precision=precision,
            num_workers=num_workers,
        ),
        out=str(out),
        num_kept=_numbers("tokens", tokens),
        reference=_text(reference),
        num_shown=show,
        num_baseline_images=baseline_images,
    )
    from mergevq.evaluate import evaluate_reconstruction

    record = evaluate_reconstruction(settings)
    if record is not None:
        print(reconstruction_table(record))
        _print_left_out(record)
        print(f"results: {out}")


def robustness(  # noqa: PLR0913 - each is an option
    *,
    model: str,
    data: str,
    tokens: int | None = None,
    fractions: tuple[str, ...] = ("0", "0.1", "0.3", "0.5", "0.7", "0.9"),
    radius: int | None = None,
    seed: int = 0,
    out: Path = Path("evaluations/robustness"),
    lpips: Path | None = None,
    lpips_trunk: TrunkName = "alex",
    extractor: Path | None = None,
    image_size: int | None = None,
    max_images: int | None = None,
    batch_size: int = 64,
    precision: Precision = "float32",
    device: Device = "auto",
    num_workers: int = 2,
) -> None:
    """Measure what wrong tokens do to images: some are replaced by nearby codes, then decoded.

    Generators make such mistakes and encoders do not. Writes OUT/evaluation.json and
    OUT/robustness.png. A fraction of 0 is the reconstruction.

    Args:
        model: directory of a tokenizer, or its Hugging Face id.
        data: a folder of images, a parquet file, WebDataset shards, or `digits`.
        tokens: K; the tokenizer's own by default.
        fractions: shares of the tokens that are replaced (0,0.5,0.9).
        radius: most bits in which a replacement differs; by default the smallest with at least
            200/4096 of the codebook within it.
        seed: of which tokens and which bits.
        out: where the results go.
        lpips: file or folder with LPIPS weights; LPIPS is left out without.
        lpips_trunk: network of LPIPS.
        extractor: TorchScript file for Frechet distance and feature cosine, left out without.
        image_size: refuse a model that was not trained at so many pixels.
        max_images: look at only so many, evenly spaced.
        batch_size: images at once, over all processes.
        precision: of the model.
        device: where to compute.
        num_workers: loader processes; 0 loads in this one.
    """
    settings = RobustnessSettings(
        subject=Subject(
            model=model,
            data=data,
            lpips=_text(lpips),
            lpips_trunk=lpips_trunk,
            extractor=_text(extractor),
            image_size=image_size,
            max_images=max_images,
            batch_size=batch_size,
            device=device,
            precision=precision,
            num_workers=num_workers,
        ),
        out=str(out),
        num_kept=tokens,
        fractions=_fractions(fractions),
        radius=radius,
        seed=seed,
    )
    from mergevq.robustness import evaluate_robustness

    record = evaluate_robustness(settings)
    if record is not None:
        print(robustness_table(record))
        _print_left_out(record)
        print(f"results: {out}")


def reference(  # noqa: PLR0913 - each is an option
    *,
    data: str,
    out: Path,
    kind: Literal["reconstruction", "generation"],
    extractor: Path,
    image_size: int,
    max_images: int | None = None,
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
    model: str = "",
    tokenizer: str = "",
    # torchrun takes --num for an abbreviation of an option of its own.
    num: Annotated[int, tyro.conf.arg(aliases=["--num-images"])] = 50_000,
    samples: Path | None = None,
    out: Path = Path("evaluations/generation"),
    classifier: Path | None = None,
    data: str | None = None,
    neighbours: int = 8,
    npz: tyro.conf.FlagCreatePairsOff[bool] = False,
    tokens: int | None = None,
    guidance: float = 1.0,
    guidance_schedule: GuidanceSchedule = "constant",
    guidance_interval: tuple[float, float] = (0.0, 1.0),
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    steps: int | None = None,
    budget: bool = True,
    seed: int = 0,
    batch_size: int = 64,
    device: Device = "auto",
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
        model: directory of the generator, or its Hugging Face id.
        tokenizer: directory of the tokenizer of its tokens, or its Hugging Face id.
        num: images, of class 0, 1, .. in turn; a multiple of the classes makes them uniform. Under
            torchrun it is called --num-images.
        samples: evaluate these instead, a folder of images or an `.npz` with arr_0.
        out: where samples and results go.
        classifier: TorchScript file that tells the generator's classes, for class accuracy.
        data: training images, to show the nearest of them beside some samples.
        neighbours: samples shown so.
        npz: also write OUT/samples.npz (arr_0), as the ADM evaluator reads it.
        tokens: K, one of those trained on; the generator's own by default.
        guidance: scale of classifier-free guidance; 1 is none.
        guidance_schedule: how it rises from 1 as an image grows.
        guidance_interval: part of the sequence that is guided.
        temperature: 0 takes the most likely value.
        top_k: sample among the so many most likely values; 0 is all.
        top_p: sample among the most likely values that together have this probability.
        steps: of random order: forward passes; one for each token by default.
        budget: of merge order: hold an image to K distinct tokens.
        seed: of the samples.
        batch_size: images at once.
        device: where to compute.

    Raises:
        ValueError: a generator without its tokenizer.
    """
    if bool(model) != bool(tokenizer):
        raise ValueError("--model and --tokenizer must be given together")
    run = None
    if model:
        run = SampleRun(
            model=model,
            tokenizer=tokenizer,
            num_images=num,
            num_kept=tokens,
            seed=seed,
            batch_size=batch_size,
            device=device,
            settings=SamplingSettings(
                guidance_scale=guidance,
                guidance_schedule=guidance_schedule,
                guidance_interval=guidance_interval,
                temperature=temperature,
                top_k=top_k,
                top_p=top_p,
                budget=budget,
                num_steps=steps,
            ),
        )
    settings = GenerationSettings(
        reference=str(reference),
        extractor=str(extractor),
        out=str(out),
        run=run,
        samples=_text(samples),
        classifier=_text(classifier),
        data=data,
        num_looked_up=neighbours,
        write_array=npz,
        batch_size=batch_size,
        device=device,
    )
    from mergevq.evaluate_generation import evaluate_generation

    record = evaluate_generation(settings)
    if record is not None:
        print(generation_table(record))
        for text in record["left_out"]:
            print(f"without {text}")
        print(f"results: {out}")


# ------------------------------------------------------------------------------------ tables


def reconstruction_table(record: Mapping[str, Any]) -> str:
    """The numbers of an evaluation, a column for each K."""
    results = record["results"]
    rows = [["", *(f"K = {result['num_kept']}" for result in results)]]
    names = [
        name for r in results for part in ("given", "recovered") for name in r[part]["metrics"]
    ]
    for name in dict.fromkeys(names):
        for source in ("given", "recovered"):
            values = [_number(result[source], name) for result in results]
            rows.append([f"{name}, {source}", *values])
    rows.append(["source accuracy", *(f"{r['source_accuracy']:.4f}" for r in results)])
    for name in ("usage", "perplexity"):
        rows.append([f"codebook {name}", *(f"{r['codebook'][name]:.4g}" for r in results)])
    balance = [[min(p, 1 - p) for p in result["codebook"]["bit_probs"]] for result in results]
    rows.append(["rarer value of a bit, least", *(f"{min(values):.4f}" for values in balance)])
    rows.append(
        ["rarer value of a bit, mean", *(f"{sum(values) / len(values):.4f}" for values in balance)]
    )
    for name in ("tokens", "source", "total"):
        rows.append([f"bits, {name}", *(f"{r['bits'][name]:.1f}" for r in results)])
    rows.append(["bits per pixel", *(f"{r['bits']['per_pixel']:.4f}" for r in results)])
    rows.append(["images per second", *(f"{r['images_per_second']:.3g}" for r in results)])
    data = record["data"]
    lines = [_columns(rows), "", f"{data['num_images']} images of {data['image_size']} pixels"]
    if data["num_unreadable"]:
        lines[-1] += f"; {data['num_unreadable']} cannot be read"
    if record["baselines"]:
        lines += ["", _columns(_baseline_rows(record["baselines"]))]
    return "\n".join(lines)


def _baseline_rows(baselines: Sequence[Mapping[str, Any]]) -> list[list[str]]:
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


def robustness_table(record: Mapping[str, Any]) -> str:
    """The numbers of a curve, a row for each fraction."""
    results = record["results"]
    names = list(results[0]["metrics"])
    rows = [["fraction", "tokens", *names]]
    rows += [
        [
            f"{result['fraction']:g}",
            str(result["num_replaced"]),
            *(_number(result, name) for name in names),
        ]
        for result in results
    ]
    ball = (
        f"replaced by codes of at most {record['radius']} other bits, "
        f"{record['ball_share']:.3%} of the codebook"
    )
    return "\n".join([_columns(rows), "", ball])


def generation_table(record: Mapping[str, Any]) -> str:
    """The numbers of an evaluation, a row each."""
    return _columns([[name, _number(record, name)] for name in record["metrics"]])


def _number(part: Mapping[str, Any], name: str) -> str:
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


def _print_left_out(record: Mapping[str, Any]) -> None:
    """Say what was not measured, and why."""
    if record["lpips"] is None:
        print("without LPIPS: give its weights with --lpips")
    if record["extractor"] is None:
        print("without Frechet distance and feature cosine: give a network with --extractor")


# ------------------------------------------------------------------------------- what is read


def _text(path: Path | None) -> str | None:
    """A path as it is recorded."""
    return None if path is None else str(path)


def _numbers(name: str, texts: Sequence[str]) -> tuple[int, ...]:
    """Whole numbers, separated by commas or spaces.

    Raises:
        ValueError: something else is between them.
    """
    try:
        return tuple(int(part) for text in texts for part in text.split(",") if part.strip())
    except ValueError:
        raise ValueError(
            f"{name} ({' '.join(texts)}) must be whole numbers: --{name} 36,64,144"
        ) from None


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
    command.__name__: command for command in (reconstruction, generation, reference, robustness)
}
