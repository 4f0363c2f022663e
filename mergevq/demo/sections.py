"""Pages of the quickstart's report: what was measured, and what it means."""

import math
from collections.abc import Sequence

from PIL import Image

from mergevq.config.parts import bits_of
from mergevq.data.layouts import source_bits
from mergevq.demo.trial import GeneratorTrial, Trial, training_seconds
from mergevq.report.lettering import shown_names
from mergevq.report.page import Highlight, Picture, Section, Table
from mergevq.report.pictures import contact_sheet
from mergevq.report.plots import PLOT_SCALE, bar_plot, line_plot
from mergevq.runtime.run import RunDirectory
from mergevq.training.panels import codebook_panels, likelihood_panels, loss_panels, psnr_panels

_SHEET_SCALE = 0.75
"""Size of a picture of images on the page, as in `Picture.scale`."""
_SAMPLES_PICTURED = 8
"""Samples of each class in the picture."""


def tokenizer_sections(trial: Trial, *, plots: bool = True) -> list[Section]:
    """Sections about a tokenizer; with `plots`, drawn too, which takes matplotlib."""
    return [
        reconstruction_section(trial),
        numbers_section(trial),
        *([probe_section(trial)] if trial.probes else []),
        *([training_section(trial)] if plots else []),
        codebook_section(trial, plots=plots),
    ]


def reconstruction_section(trial: Trial) -> Section:
    """The same images at the nominal K and at every K."""
    model = trial.run.model
    nominal = next(p for p in trial.pictured if p.num_kept == model.num_kept)
    columns = [trial.originals, nominal.merge_maps, nominal.given, nominal.recovered]
    titles = ["original", "merge map", "given source", "recovered source"]
    bits = bits_of(model.quantizer.sizes)
    by_k, titles_by_k = [trial.originals], ["original"]
    for pictured in trial.pictured:
        by_k += [pictured.merge_maps, pictured.given]
        titles_by_k += [f"{pictured.num_kept} tokens", "given source"]
    return Section(
        title="Reconstructions",
        text=(
            "Every image is cut into a grid of cells. The encoder merges cells that look alike, "
            f"until {model.num_kept} tokens are left, and each becomes a code of {bits:g} "
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
    num_bits = bits_of(run.model.quantizer.sizes)
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
            *_recognised_rows(trial),
            ["Bits per image: tokens", *(f"{k * num_bits:g}" for k in measured)],
            ["Bits per image: source", *(f"{maps[k]:.1f}" for k in measured)],
            *_coded_rows(trial),
            row("Bits per image: total", "bits", 1),
            row("Bits per pixel, given source", "bits_per_pixel", 3),
            [
                "Bits per pixel, recovered source",
                *(f"{k * num_bits / run.model.image_size**2:.3f}" for k in measured),
            ],
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
            f"given source the total.{_recognition(trial)}"
        ),
        tables=[table],
    )


def _coded_rows(trial: Trial) -> list[list[str]]:
    """Bits of source maps as they are written, at every K; none where they were not."""
    coded = [numbers.get("map_bits") for numbers in trial.measured.values()]
    bits = [f"{each:.1f}" for each in coded if each is not None]
    return [["Bits per image: source as coded", *bits]] if len(bits) == len(coded) else []


def _recognised_rows(trial: Trial) -> list[list[str]]:
    """Shares of recognised reconstructions at every K; none without classes."""
    found = trial.recognised.values()
    if not found:
        return []
    return [
        ["Recognised, given source", *(f"{100 * share.given:.1f} %" for share in found)],
        ["Recognised, recovered source", *(f"{100 * share.recovered:.1f} %" for share in found)],
    ]


def _recognition(trial: Trial) -> str:
    """Who recognises, and how well; nothing without classes."""
    if not trial.recognised:
        return ""
    real = next(iter(trial.recognised.values())).real
    return (
        " Recognised is the share that a classifier of real images takes for what they show; of "
        f"the images themselves it knows {100 * real:.1f} %."
    )


def probe_section(trial: Trial) -> Section:
    """Knowledge of classes in the tokens, beside that in their pixels."""
    supervised = (
        " This tokenizer was trained with the labels, so the class token has seen them: only data "
        "it was not trained on would tell what it learned of images."
        if trial.run.teacher.kind == "labels"
        else ""
    )
    return Section(
        title="Representation",
        text=(
            "A linear classifier and a vote of the 20 nearest training images, on features that "
            "are not trained further, tell held-out images apart. Raw pixels and their principal "
            f"components are what the tokens have to beat.{supervised}"
        ),
        tables=[
            Table(
                header=["", "channels", "linear", "nearest neighbours"],
                rows=[
                    [
                        row.name,
                        f"{row.dim}",
                        f"{100 * row.linear_accuracy:.1f} %",
                        f"{100 * row.knn_accuracy:.1f} %",
                    ]
                    for row in trial.probes
                ],
                caption=f"Share of {trial.num_images} held-out images of which the class is found.",
            )
        ],
    )


def training_section(trial: Trial) -> Section:
    """How training went."""
    return Section(
        title="Training",
        text="The loss is the weighted sum of its terms; the terms are shown before weighting.",
        pictures=[
            Picture(
                name="losses",
                image=line_plot(loss_panels(trial.run, trial.log), x_label="step"),
                caption="Loss and its terms, each on one batch.",
                scale=PLOT_SCALE,
            ),
            Picture(
                name="psnr",
                image=line_plot(psnr_panels(trial.log), x_label="step", share_y=True),
                caption="Held-out images, with the encoder's source and with the one recovered "
                "from the codes.",
                scale=PLOT_SCALE,
            ),
        ],
    )


def codebook_section(trial: Trial, *, plots: bool = True) -> Section:
    """Which codes the tokens take; with `plots`, drawn too."""
    usage, num_bits = trial.usage, bits_of(trial.run.model.quantizer.sizes)
    return Section(
        title="Codes",
        text=(
            f"A token is {num_bits:g} bits, one of {usage.num_values:,} codes. The "
            f"{usage.num_tokens:,} tokens of the held-out images at K = {trial.run.model.num_kept} "
            f"use {usage.num_distinct:,} of them, {100 * usage.usage:.1f} %; the perplexity, "
            f"{usage.perplexity:.1f}, is "
            "how many equally frequent codes would be as varied. A bit that is nearly always 0 or "
            f"always 1 carries nothing: {usage.num_dead_bits} of {num_bits:g} are constant."
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
                image=line_plot(codebook_panels(trial.log), x_label="step"),
                caption="Over the latest tokens seen in training.",
                scale=PLOT_SCALE,
            ),
        ]
        if plots
        else [],
    )


def run_section(trial: Trial, generator: GeneratorTrial | None = None) -> Section:
    """The command that was run, where, and for how long."""
    record = trial.record
    environment = record["environment"]
    rows = [
        ["Command", record["command"]],
        ["Started", record["started_at"]],
        *([["Interruptions", f"{len(record['resumed'])}"]] if record["resumed"] else []),
        *_training_rows(trial, "images", "Tokenizer"),
        *([] if generator is None else _training_rows(generator, "sequences", "Generator")),
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


def next_section(trial: Trial) -> Section:
    """Commands to run next, with the model that was made here and with pictures of one's own."""
    model = RunDirectory(trial.run.out).model
    rows = [
        ["Look at this model in a browser", f"mergevq demo --model {model}"],
        [
            "Reconstruct a picture of your own",
            f"mergevq reconstruct PICTURE --model {model} --size-policy resize",
        ],
        [
            "Train on a folder of your pictures",
            "mergevq train photos64 --data.path FOLDER --out runs/photos",
        ],
        ["See what else can be trained", "mergevq recipes"],
    ]
    return Section(title="What next", tables=[Table(header=["", "command"], rows=rows)])


def _training_rows(trial: Trial | GeneratorTrial, what: str, name: str) -> list[list[str]]:
    """How long one of the trainings took."""
    settings = trial.run.train
    seconds = training_seconds(trial.log, settings.batch_size)
    rate = settings.num_steps * settings.batch_size / seconds
    return [
        [f"{name}: training", f"{settings.num_steps:,} steps of {settings.batch_size} {what}"],
        [f"{name}: time", f"{duration(seconds)} with validation, {rate:,.0f} {what} a second"],
        [f"{name}: parameters", f"{trial.num_parameters:,}"],
    ]


def generator_sections(trial: GeneratorTrial, *, plots: bool = True) -> list[Section]:
    """Sections about a generator; with `plots`, drawn too."""
    columns = [row[:_SAMPLES_PICTURED] for row in trial.samples]
    names = shown_names(trial.class_names)
    pairs = [[row[0] for row in trial.samples], trial.nearest]
    num_samples = sum(len(row) for row in trial.samples)
    table = Table(
        header=["", "real, held out", "sampled"],
        rows=[
            ["Images", f"{trial.num_real:,}", f"{num_samples:,}"],
            [
                "Taken for the class they are of",
                f"{100 * trial.real_accuracy:.1f} %",
                f"{100 * trial.accuracy:.1f} %",
            ],
        ],
        caption="By a support vector machine on grey images of 8 x 8 pixels, fitted to the real "
        "training images.",
    )
    return [
        Section(
            title="Samples",
            text=(
                "A second model, MergeAR, learned to write the tokens of an image one grid cell "
                "after the other, given its class. It sees every token where it first occurred, "
                "and of the repetitions only the latest. The tokenizer turns what it writes into "
                f"pixels. Guidance is {trial.guidance:g}; no sample was selected."
            ),
            tables=[table],
            pictures=[
                Picture(
                    name="samples",
                    image=contact_sheet(columns, row_titles=names),
                    caption=f"The first {len(columns[0])} samples of each class.",
                    scale=_SHEET_SCALE,
                ),
                Picture(
                    name="memory",
                    image=contact_sheet(
                        list(zip(*pairs, strict=True)),
                        ["sample", "nearest training image"],
                        row_titles=names,
                    ),
                    caption="The first sample of each class beside the training image with the "
                    "closest pixels: a copy would show here.",
                    scale=_SHEET_SCALE,
                ),
                *([likelihood_picture(trial)] if plots else []),
            ],
        )
    ]


def likelihood_picture(trial: GeneratorTrial) -> Picture:
    """Likelihood of the codes during training."""
    num_values = math.prod(trial.run.model.head.sizes)
    return Picture(
        name="likelihood",
        image=line_plot(likelihood_panels(trial.log), x_label="step", share_y=True),
        caption=f"An even guess among {num_values:,} codes has {math.log(num_values):.2f} nats.",
        scale=PLOT_SCALE,
    )


def duration(seconds: float | int) -> str:
    """Minutes and seconds."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"


def introduction(trial: Trial) -> str:
    """First words of the report."""
    model = trial.run.model
    return (
        f"A tokenizer was trained on {trial.run.data.path}. It turns an image of "
        f"{model.image_size} x {model.image_size} pixels into {model.num_kept} tokens of "
        f"{bits_of(model.quantizer.sizes):g} bits, or as many tokens as are asked for, and back. "
        "Everything below was measured on images that were held out of training."
    )


def highlights(trial: Trial, generator: GeneratorTrial | None = None) -> list[Highlight]:
    """Numbers to see at first sight."""
    model = trial.run.model
    numbers = trial.measured[model.num_kept]
    seconds = training_seconds(trial.log, trial.run.train.batch_size)
    shown = [
        Highlight(value=f"{model.num_kept} of {model.num_tokens}", label="tokens per image"),
        Highlight(
            value=f"{numbers['bits']:.0f} bits",
            label=f"per image with its source, {numbers['bits_per_pixel']:.2f} per pixel",
        ),
        Highlight(value=f"{numbers['psnr']:.1f} dB", label="PSNR, given source"),
        Highlight(value=f"{numbers['psnr_recovered']:.1f} dB", label="PSNR, recovered source"),
    ]
    if generator is not None:
        seconds += training_seconds(generator.log, generator.run.train.batch_size)
        shown.append(
            Highlight(
                value=f"{100 * generator.accuracy:.0f} %",
                label="of samples are taken for the class that was asked for, "
                f"{100 * generator.real_accuracy:.0f} % of real images",
            )
        )
    return [*shown, Highlight(value=duration(seconds), label="training time")]
