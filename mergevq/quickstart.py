"""The first thing a new user runs: train on handwritten digits, and look at what came out.

A quickstart is a directory: `tokenizer/` is the training run, `report.html` and the pictures beside
it are made from it, and can be made again.
"""

import json
import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from mergevq.checkpoint import load_model, read_json, to_json
from mergevq.config import TokenizerRun
from mergevq.data import Batch, ImageDataset, eval_batches, open_train_val
from mergevq.merge import source_bits
from mergevq.metrics import CodebookStatistics, CodebookUsage
from mergevq.pictures import contact_sheet, merge_map, to_pil
from mergevq.recipes import digits32
from mergevq.reconstruction import measure
from mergevq.report import (
    PLOT_SCALE,
    Curve,
    Highlight,
    Panel,
    Picture,
    Section,
    Table,
    bar_plot,
    line_plot,
    require_plots,
    write_report,
)
from mergevq.run import Progress, RunDirectory, autocast, changed_settings, resolve_device
from mergevq.tokenizer import Tokenizer
from mergevq.train_tokenizer import train

logger = logging.getLogger("mergevq")

_BATCH_SIZE = 64
"""Images measured at a time."""
_MAX_PICTURED = 10
"""Images in a picture: one of each class where there are classes."""
_SHEET_SCALE = 0.75
"""Size of a picture of images on the page, as in `Picture.scale`."""


def quickstart(out: Path, num_steps: int | None = None) -> Path:
    """Train the recipe `digits32` and write a report on it; returns the path of the page.

    What is there is kept: a finished training is reported on again, one that was interrupted goes
    on, and one with other settings is refused.

    Args:
        out: directory of the training run, the report and its pictures.
        num_steps: optimizer steps; None is as many as the recipe has.

    Raises:
        ValueError: the directory holds something else.
        RuntimeError: a package is missing, or training was interrupted.
    """
    run = digits32()
    steps = run.train.num_steps if num_steps is None else num_steps
    return run_and_report(replace(run, train=replace(run.train, num_steps=steps)), out)


def run_and_report(run: TokenizerRun, out: Path) -> Path:
    """Train a tokenizer in `out/tokenizer`, unless it is there, and write `out/report.html`.

    Raises:
        ValueError: the directory holds something else.
        RuntimeError: a package is missing, or training was interrupted.
    """
    require_plots()
    directory = RunDirectory(out / "tokenizer")
    run = replace(run, out=str(directory.path))
    _check_directory(run, out)
    if _steps_done(directory) < run.train.num_steps:
        train(run, resume=directory.record.is_file())
    else:
        logger.warning(
            "%s is trained already, so only the report is made again; delete %s to train anew",
            directory.path,
            out,
        )
    if (done := _steps_done(directory)) < run.train.num_steps:
        raise RuntimeError(
            f"training stopped at step {done} of {run.train.num_steps}; the same command goes on "
            "from there"
        )
    trial = examine(run)
    report = out / "report.html"
    write_report(
        report,
        tokenizer_sections(trial),
        title="MergeVQ quickstart",
        text=_introduction(trial),
        highlights=_highlights(trial),
    )
    return report


def _check_directory(run: TokenizerRun, out: Path) -> None:
    """Refuse a directory whose contents are not this run's.

    Raises:
        ValueError: they are not.
    """
    directory = RunDirectory(run.out)
    if not directory.record.is_file():
        if out.exists() and any(out.iterdir()):
            raise ValueError(
                f"{out} is not empty and holds no quickstart; choose another directory with --out"
            )
        return
    # The directory may have been moved.
    old = read_json(directory.record)["run"] | {"out": run.out}
    changed = changed_settings(old, json.loads(json.dumps(to_json(run))))
    if changed:
        named = ", ".join(f"{name} is {a} there and {b} here" for name, (a, b) in changed.items())
        raise ValueError(
            f"{out} holds a quickstart with other settings ({named}); choose another directory "
            f"with --out, or delete {out}"
        )


def _steps_done(directory: RunDirectory) -> int:
    """Steps behind the saved model; 0 where there is none."""
    if not directory.model.is_dir():
        return 0
    return load_model(directory.model, kind="tokenizer").record["extra"]["step"]


# ------------------------------------------------------------------------------------ measuring


class Pictured(NamedTuple):
    """Some images at one K, in pictures."""

    num_kept: int
    merge_maps: list[Image.Image]
    given: list[Image.Image]
    """Reconstructions with the encoder's source."""
    recovered: list[Image.Image]
    """Reconstructions with the source inferred from the codes."""


class Trial(NamedTuple):
    """A finished training and what was measured of it."""

    run: TokenizerRun
    record: dict[str, Any]
    """`run.json`."""
    log: list[dict[str, Any]]
    """`metrics.jsonl`."""
    num_parameters: int
    num_images: int
    """Held-out images that were measured."""
    measured: dict[int, dict[str, float]]
    """By K, what `mergevq.reconstruction.measure` gives."""
    usage: CodebookStatistics
    """Of the held-out images' tokens at the nominal K."""
    originals: list[Image.Image]
    labels: list[str]
    """Class of each original, empty without classes."""
    pictured: list[Pictured]
    """The originals at each K."""


def examine(run: TokenizerRun) -> Trial:
    """Measure the model that a run produced on images it has not seen.

    Raises:
        ValueError: the run is not there or damaged.
    """
    directory = RunDirectory(run.out)
    device = resolve_device(run.train.device)
    tokenizer = Tokenizer.from_pretrained(directory.model).to(device)
    dataset = open_train_val(run.data)[1]
    num_kepts = sorted({run.model.num_kept, *run.train.eval_num_kept})
    bar = Progress(len(num_kepts) * len(dataset), unit="measurement")
    measured = {}
    for num_kept in num_kepts:
        batches = _held_out(run, dataset)
        # Float32 whatever the training was in: the numbers then depend on the model alone.
        measured[num_kept] = dict(
            measure(tokenizer, batches, num_kept, perceptual=None, autocast=autocast(device, None))
        )
        bar.update(len(dataset))
    bar.close()
    images, labels = _examples(run, dataset)
    return Trial(
        run=run,
        record=read_json(directory.record),
        log=[json.loads(line) for line in directory.metrics.read_text("utf-8").splitlines()],
        num_parameters=sum(parameter.numel() for parameter in tokenizer.parameters()),
        num_images=int(measured[run.model.num_kept]["num_images"]),
        measured=measured,
        usage=_count_codes(tokenizer, _held_out(run, dataset), len(dataset)),
        originals=[to_pil(image) for image in images],
        labels=labels,
        pictured=[_picture(tokenizer, images.to(device), num_kept) for num_kept in num_kepts],
    )


def _held_out(run: TokenizerRun, dataset: ImageDataset) -> Sequence[Batch]:
    """Every held-out image once."""
    return list(
        eval_batches(
            dataset, image_size=run.model.image_size, batch_size=_BATCH_SIZE, num_workers=0
        )
    )


@torch.no_grad()
def _count_codes(
    tokenizer: Tokenizer, batches: Sequence[Batch], num_images: int
) -> CodebookStatistics:
    """How all tokens at the nominal K use the codebook."""
    device = next(tokenizer.parameters()).device
    config = tokenizer.config
    window = max(2**config.num_bits, num_images * config.num_kept)
    usage = CodebookUsage(config.num_bits, window=window, device=device)
    for batch in batches:
        usage.update(tokenizer.encode(batch.image.to(device)).indices)
    return usage.compute()


def _examples(
    run: TokenizerRun, dataset: ImageDataset
) -> tuple[Float[Tensor, "n 3 h w"], list[str]]:
    """The first held-out images of each class, or just the first ones, and their classes."""
    images, labels = [], []
    for batch in _held_out(run, dataset):
        for image, label in zip(batch.image, batch.label.tolist(), strict=True):
            if label == -1 or label not in labels:
                images.append(image)
                labels.append(label)
    order = sorted(range(len(images)), key=labels.__getitem__)[:_MAX_PICTURED]
    names = ["" if labels[i] == -1 else dataset.class_names[labels[i]] for i in order]
    return torch.stack([images[i] for i in order]), names


@torch.no_grad()
def _picture(tokenizer: Tokenizer, images: Float[Tensor, "n 3 h w"], num_kept: int) -> Pictured:
    """Merge maps and both reconstructions."""
    given = tokenizer.reconstruct(images, num_kept)
    recovered = tokenizer.reconstruct(images, num_kept, source="recovered")
    shape = given.encoded.grid_shape
    return Pictured(
        num_kept=num_kept,
        merge_maps=[
            merge_map(image, index, shape)
            for image, index in zip(images, given.source.index, strict=True)
        ],
        given=[to_pil(image) for image in given.image],
        recovered=[to_pil(image) for image in recovered.image],
    )


def training_seconds(log: Sequence[dict[str, Any]], batch_size: int) -> float:
    """Time spent on the logged steps, also when they were taken by several processes."""
    seconds, counted = 0.0, 0
    for line in log:
        if "images_per_second" in line:
            num_steps = line["step"] + 1 - counted
            seconds += num_steps * batch_size / line["images_per_second"]
            counted += num_steps
    return seconds


# ------------------------------------------------------------------------------------- sections


def tokenizer_sections(trial: Trial) -> list[Section]:
    """What there is to say about a tokenizer."""
    return [
        reconstruction_section(trial),
        numbers_section(trial),
        training_section(trial),
        codebook_section(trial),
        run_section(trial),
    ]


def reconstruction_section(trial: Trial) -> Section:
    """The same images at the nominal K and at every K."""
    model = trial.run.model
    nominal = next(p for p in trial.pictured if p.num_kept == model.num_kept)
    columns = [trial.originals, nominal.merge_maps, nominal.given, nominal.recovered]
    titles = ["original", "merge map", "given source", "recovered source"]
    by_k, titles_by_k = [trial.originals], ["original"]
    for pictured in trial.pictured:
        by_k += [pictured.merge_maps, pictured.given]
        titles_by_k += [f"{pictured.num_kept} tokens", "given source"]
    return Section(
        title="Reconstructions",
        text=(
            "Every image is cut into a grid of cells. The encoder merges cells that look alike, "
            f"until {model.num_kept} tokens are left, and each becomes a code of {model.num_bits} "
            "bits. A merge map paints all cells that share a token, wherever they lie, in their "
            "mean colour.\n\n"
            "To paint the image again the decoder must know which cell belongs to which token: "
            "the source. With the given source it is told by the encoder, and the map has to be "
            "stored with the tokens. The recovered source is inferred from the codes alone, which "
            "is all there is when tokens come from a generator."
        ),
        pictures=[
            Picture(
                name="reconstructions",
                image=_sheet(columns, titles, trial.labels),
                caption=f"Images that training has not seen, with {model.num_kept} tokens each.",
                scale=_SHEET_SCALE,
            ),
            Picture(
                name="tokens",
                image=_sheet(by_k, titles_by_k, trial.labels),
                caption="The same images and the same model with fewer and with more tokens: the "
                "number is chosen for each image, without training again.",
                scale=_SHEET_SCALE,
            ),
        ],
    )


def _sheet(
    columns: Sequence[Sequence[Image.Image]], titles: Sequence[str], labels: Sequence[str]
) -> Image.Image:
    """Columns of pictures, a row for each image."""
    rows = list(zip(*columns, strict=True))
    return contact_sheet(rows, titles, row_titles=labels if any(labels) else ())


def numbers_section(trial: Trial) -> Section:
    """Quality and cost at every K."""
    run, measured = trial.run, trial.measured
    num_bits = run.model.num_bits
    maps = {k: source_bits(run.model.num_tokens, k) for k in measured}

    def row(label: str, name: str, digits: int) -> list[str]:
        return [label, *(f"{numbers[name]:.{digits}f}" for numbers in measured.values())]

    def percent(label: str, name: str) -> list[str]:
        return [label, *(f"{100 * numbers[name]:.1f} %" for numbers in measured.values())]

    table = Table(
        header=["", *(f"K = {num_kept}" for num_kept in measured)],
        rows=[
            row("PSNR, given source (dB)", "psnr", 2),
            row("PSNR, recovered source (dB)", "psnr_recovered", 2),
            row("SSIM, given source", "ssim", 4),
            row("SSIM, recovered source", "ssim_recovered", 4),
            percent("Source accuracy", "source_accuracy"),
            ["Bits per image: tokens", *(f"{k * num_bits}" for k in measured)],
            ["Bits per image: source", *(f"{maps[k]:.1f}" for k in measured)],
            row("Bits per image: total", "bits", 1),
            row("Bits per pixel", "bits_per_pixel", 3),
            percent("Codebook usage", "codebook_usage"),
            row("Perplexity", "perplexity", 1),
        ],
        caption=f"Means over {trial.num_images} held-out images of {run.model.image_size} x "
        f"{run.model.image_size} pixels, each with K of {run.model.num_tokens} possible tokens.",
    )
    return Section(
        title="Numbers",
        text=(
            "PSNR and SSIM compare the image with its reconstruction; higher is better, and SSIM "
            "ends at 1. Source accuracy is the share of cells for which the token was inferred "
            "correctly from the codes. The recovered source needs the bits of the tokens only, the "
            "given source the total."
        ),
        tables=[table],
    )


def training_section(trial: Trial) -> Section:
    """How training went."""
    terms = [name for name in _terms(trial.run) if any(line.get(name) for line in trial.log)]
    panels = [
        Panel(title=_words(name), curves=[_curve(trial.log, name)]) for name in ["loss", *terms]
    ]
    num_kepts = trial.run.train.eval_num_kept or (trial.run.model.num_kept,)
    quality = [
        Panel(
            title=f"PSNR, {words} source (dB)",
            curves=[
                replace(_curve(trial.log, f"{name}@{k}"), label=f"K = {k}", colour=colour)
                for colour, k in enumerate(num_kepts)
            ],
        )
        for name, words in (("psnr", "given"), ("psnr_recovered", "recovered"))
    ]
    return Section(
        title="Training",
        text="The loss is the weighted sum of its terms; the terms are shown before weighting.",
        pictures=[
            Picture(
                name="losses",
                image=line_plot(panels, x_label="step"),
                caption="Loss and its terms, each on one batch.",
                scale=PLOT_SCALE,
            ),
            Picture(
                name="psnr",
                image=line_plot(quality, x_label="step", share_y=True),
                caption="Held-out images, with the encoder's source and with the one recovered "
                "from the codes.",
                scale=PLOT_SCALE,
            ),
        ],
    )


def _terms(run: TokenizerRun) -> list[str]:
    """Names of the loss terms that have a weight."""
    names = [name for name in run.loss.__slots__ if name.endswith("_weight")]
    return [name.removesuffix("_weight") for name in names if getattr(run.loss, name) > 0]


def _words(name: str) -> str:
    """A field's name as a title."""
    return name.replace("_", " ").capitalize()


def _curve(log: Sequence[dict[str, Any]], name: str) -> Curve:
    """One number over the steps at which it was logged."""
    lines = [line for line in log if name in line]
    return Curve(x=[line["step"] + 1 for line in lines], y=[line[name] for line in lines])


def codebook_section(trial: Trial) -> Section:
    """Which codes the tokens take."""
    usage, num_bits = trial.usage, trial.run.model.num_bits
    panels = [
        Panel(title="Share of codes in use", curves=[_curve(trial.log, "codebook_usage")]),
        Panel(title="Perplexity", curves=[_curve(trial.log, "perplexity")]),
    ]
    return Section(
        title="Codes",
        text=(
            f"A token is {num_bits} bits, one of {2**num_bits:,} codes. The {usage.num_tokens:,} "
            f"tokens of the held-out images at K = {trial.run.model.num_kept} take "
            f"{usage.num_distinct:,} different ones; the perplexity, {usage.perplexity:.1f}, is "
            "how many equally frequent codes would be as varied. A bit that is nearly always 0 or "
            f"always 1 carries nothing: {usage.num_dead_bits} of {num_bits} are constant."
        ),
        pictures=[
            Picture(
                name="bits",
                image=bar_plot(
                    usage.bit_probs.tolist(),
                    title="Probability that a bit is 1",
                    x_label="bit",
                    y_range=(0.0, 1.0),
                    reference=0.5,
                ),
                caption="Held-out images; at the dashed line a bit carries the most.",
                scale=PLOT_SCALE,
            ),
            Picture(
                name="codebook",
                image=line_plot(panels, x_label="step"),
                caption="Over the latest tokens seen in training.",
                scale=PLOT_SCALE,
            ),
        ],
    )


def run_section(trial: Trial) -> Section:
    """What was run, where, and for how long."""
    settings, record = trial.run.train, trial.record
    environment = record["environment"]
    seconds = training_seconds(trial.log, settings.batch_size)
    num_images = settings.num_steps * settings.batch_size
    rows = [
        ["Command", record["command"]],
        ["Started", record["started_at"]],
        *([["Interruptions", f"{len(record['resumed'])}"]] if record["resumed"] else []),
        ["Training", f"{settings.num_steps:,} steps of {settings.batch_size} images"],
        ["Training time", f"{_duration(seconds)} with validation"],
        ["Images per second", f"{num_images / seconds:,.0f}"],
        ["Parameters", f"{trial.num_parameters:,}"],
        [
            "Hardware",
            f"{environment['device']}, {environment['num_threads']} threads on "
            f"{environment['num_cpus']} cores, {environment['platform']}",
        ],
        [
            "Versions",
            f"mergevq {environment['mergevq']}, torch {environment['torch']}, "
            f"Python {environment['python']}",
        ],
        ["Commit", environment["git_commit"] or "installed package"],
        ["Run directory", trial.run.out],
    ]
    return Section(title="This run", tables=[Table(header=["", ""], rows=rows)])


def _duration(seconds: float) -> str:
    """Minutes and seconds."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"


def _introduction(trial: Trial) -> str:
    """First words of the report."""
    model = trial.run.model
    return (
        f"A tokenizer was trained on {trial.run.data.path}. It turns an image of "
        f"{model.image_size} x {model.image_size} pixels into {model.num_kept} tokens of "
        f"{model.num_bits} bits, or as many tokens as are asked for, and back. Everything below "
        "was measured on images that were held out of training."
    )


def _highlights(trial: Trial) -> list[Highlight]:
    """What to know at first sight."""
    model = trial.run.model
    numbers = trial.measured[model.num_kept]
    seconds = training_seconds(trial.log, trial.run.train.batch_size)
    return [
        Highlight(value=f"{model.num_kept} of {model.num_tokens}", label="tokens per image"),
        Highlight(
            value=f"{numbers['bits']:.0f} bits",
            label=f"per image with its source, {numbers['bits_per_pixel']:.2f} per pixel",
        ),
        Highlight(value=f"{numbers['psnr']:.1f} dB", label="PSNR, given source"),
        Highlight(value=f"{numbers['psnr_recovered']:.1f} dB", label="PSNR, recovered source"),
        Highlight(value=_duration(seconds), label="training time"),
    ]
