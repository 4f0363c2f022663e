"""A finished run of the quickstart, measured and pictured."""

import json
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int64
from PIL import Image
from torch import Tensor

from mergevq.config.generator import (
    SampleRun,
)
from mergevq.config.probing import FeatureConfig, LinearConfig
from mergevq.config.training import GeneratorRun, TokenizerRun
from mergevq.data.batches import Batch, eval_batches, open_train_val
from mergevq.data.codes import no_indices
from mergevq.data.images import ImageDataset
from mergevq.evaluate.compare import measure
from mergevq.evaluate.probe.linear import ProbeRow, probe_rows
from mergevq.generator.generation import class_labels, generate, load_pair
from mergevq.generator.weights import as_weights
from mergevq.metrics.codes import CodebookStatistics
from mergevq.metrics.judge import Judge, fit_judge
from mergevq.report.lettering import shown_names
from mergevq.report.pictures import merge_map, to_pil
from mergevq.runtime.device import autocast, resolve_device
from mergevq.runtime.environment import missing
from mergevq.runtime.logs import Progress
from mergevq.runtime.run import RunDirectory, read_run_record
from mergevq.tokenizer.tokenizer import Tokenizer

_BATCH_SIZE = 64
"""Images measured at a time."""
_CODED = 64
"""Images whose source maps are written, to know their bits."""
_MAX_PICTURED = 10
"""Images in a picture: one of each class where there are classes."""
_SAMPLES_PER_CLASS = 20
"""Images a class that the generator is judged by."""
_SAMPLES_AT_ONCE = 50
_PROBED_SIZE = 16
"""Side of the pixels that are probed beside the tokens."""
_PROBE = LinearConfig(rates=(1e-3, 1e-2), num_epochs=30)
"""Short enough for a report."""


class Pictured(NamedTuple):
    """Some images at one K, in pictures."""

    num_kept: int
    merge_maps: list[Image.Image]
    given: list[Image.Image]
    """Reconstructions with the encoder's source."""
    recovered: list[Image.Image]
    """Reconstructions with the source inferred from the codes."""


class Recognised(NamedTuple):
    """Shares of held-out images that a classifier of real images takes for what they are."""

    given: float
    """Accuracy on reconstructions with the encoder's source."""
    recovered: float
    """Accuracy on reconstructions with the source inferred from the codes."""
    real: float
    """Accuracy on the images themselves."""


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
    """By K, `Outcome.numbers` of `mergevq.evaluate.compare`."""
    recognised: dict[int, Recognised]
    """Whether a classifier still knows them, by K; empty without classes."""
    probes: list[ProbeRow]
    """Probes of the tokens for classes, beside pixels; empty without classes."""
    usage: CodebookStatistics
    """Statistics of the held-out images' tokens at the nominal K."""
    originals: list[Image.Image]
    labels: list[str]
    """Class of each original, empty without classes."""
    pictured: list[Pictured]
    """The originals at each K."""


class GeneratorTrial(NamedTuple):
    """A finished training of a generator, and samples of it."""

    run: GeneratorRun
    record: dict[str, Any]
    """`run.json`."""
    log: list[dict[str, Any]]
    """`metrics.jsonl`."""
    num_parameters: int
    guidance: float
    """Scale of the guidance that the samples were drawn with."""
    class_names: list[str]
    samples: list[list[Image.Image]]
    """For each class, numbered images in order: none is selected."""
    nearest: list[Image.Image]
    """The training image closest in pixels to the first sample of each class."""
    accuracy: float
    """Share of samples that a classifier of real images takes for the class that was asked for."""
    real_accuracy: float
    """The same classifier on held-out real images."""
    num_real: int
    """Held-out real images."""


def examine(run: TokenizerRun) -> Trial:
    """Measure the model that a run produced on images it has not seen.

    Raises:
        ValueError: the run is not there or damaged, or its tokens are real numbers.
    """
    directory = RunDirectory(run.out)
    device = resolve_device(run.train.device)
    tokenizer = Tokenizer.from_pretrained(directory.model, precision="float32", device=device)
    dataset = open_train_val(run.data)[1]
    num_kepts = sorted({run.model.num_kept, *run.train.eval_num_kept})
    # Float32 whatever the training was in: the numbers then depend on the model alone.
    precision = autocast(device, None)
    batches = _batches(run, dataset)
    coded = () if missing("codec") else range(_CODED)
    outcomes = measure(
        tokenizer, batches, num_kepts, perceptual=None, autocast=precision, coded=coded
    )
    train_set, _ = open_train_val(run.data)
    probes, recognised = [], {}
    if dataset.num_classes > 0:
        judge = _judge(_batches(run, train_set))
        recognised = {k: _recognise(tokenizer, batches, k, judge) for k in num_kepts}
        probes = probe_rows(
            tokenizer,
            _batches(run, train_set),
            _batches(run, dataset),
            num_kepts,
            features=FeatureConfig(pixel_side=_PROBED_SIZE),
            linear=_PROBE,
            seed=run.train.seed,
        )
    usage = outcomes[run.model.num_kept].codebook
    if usage is None:
        raise ValueError(no_indices("the page of a quickstart"))
    images, labels = _examples(run, dataset)
    return Trial(
        run=run,
        record=read_run_record(directory.record),
        log=[json.loads(line) for line in directory.metrics.read_text("utf-8").splitlines()],
        num_parameters=sum(parameter.numel() for parameter in tokenizer.parameters()),
        num_images=outcomes[run.model.num_kept].num_images,
        measured={num_kept: outcome.numbers() for num_kept, outcome in outcomes.items()},
        recognised=recognised,
        probes=probes,
        usage=usage,
        originals=[to_pil(image) for image in images],
        labels=labels,
        pictured=[_picture(tokenizer, images.to(device), num_kept) for num_kept in num_kepts],
    )


def _batches(run: TokenizerRun, dataset: ImageDataset) -> Sequence[Batch]:
    """Every image once."""
    return list(
        eval_batches(
            dataset, image_size=run.model.image_size, batch_size=_BATCH_SIZE, num_workers=0
        )
    )


def _judge(batches: Sequence[Batch]) -> Judge:
    """A classifier of real images."""
    return fit_judge((batch.image, batch.label) for batch in batches)


def _stacked(batches: Sequence[Batch]) -> tuple[Float[Tensor, "n 3 h w"], Int64[Tensor, "n"]]:
    """All images and their classes."""
    return torch.cat([batch.image for batch in batches]), torch.cat([b.label for b in batches])


@torch.no_grad()
def _recognise(
    tokenizer: Tokenizer, batches: Sequence[Batch], num_kept: int, judge: Judge
) -> Recognised:
    """Judge images and their reconstructions by a classifier."""
    image, label = _stacked(batches)
    device = next(tokenizer.parameters()).device
    given, recovered = (
        torch.cat(
            [
                tokenizer.reconstruct(batch.image.to(device), num_kept, source).image.cpu()
                for batch in batches
            ]
        )
        for source in ("given", "recovered")
    )
    return Recognised(*(judge.accuracy(part, label) for part in (given, recovered, image)))


def _examples(
    run: TokenizerRun, dataset: ImageDataset
) -> tuple[Float[Tensor, "n 3 h w"], list[str]]:
    """The first held-out images of each class, or just the first ones, and their classes."""
    images, labels = [], []
    for batch in _batches(run, dataset):
        for image, label in zip(batch.image, batch.label.tolist(), strict=True):
            if label == -1 or label not in labels:
                images.append(image)
                labels.append(label)
    order = sorted(range(len(images)), key=labels.__getitem__)[:_MAX_PICTURED]
    class_names = shown_names(dataset.class_names)
    names = ["" if labels[i] == -1 else class_names[labels[i]] for i in order]
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


def examine_generator(run: GeneratorRun, data: TokenizerRun) -> GeneratorTrial:
    """Draw samples of every class and let a classifier of real images say what they are.

    The classifier is fitted to the tokenizer's training images.

    Args:
        run: of a generator with classes, finished.
        data: the run whose images are real.

    Raises:
        ValueError: the run is not there or damaged.
    """
    directory = RunDirectory(run.out)
    device = resolve_device(run.train.device)
    exact = load_pair(directory.model, run.tokens.tokenizer, device)
    pair = exact._replace(generator=as_weights(exact.generator, "float32"))
    num_classes = pair.generator.config.num_classes
    samples = SampleRun(
        num_images=_SAMPLES_PER_CLASS * num_classes,
        seed=run.train.seed,
        settings=run.sampling,
    )
    bar = Progress(samples.num_images, unit="sample")
    parts = []
    for first in range(0, samples.num_images, _SAMPLES_AT_ONCE):
        ids = range(first, min(first + _SAMPLES_AT_ONCE, samples.num_images))
        parts.append(generate(pair, samples, ids)[1].cpu())
        bar.update(len(ids))
    bar.close()
    images = torch.cat(parts)
    asked = class_labels(samples, num_classes, range(samples.num_images))
    train_set, held_out = (list(_batches(data, part)) for part in open_train_val(data.data))
    real, real_label = _stacked(held_out)
    judge = _judge(train_set)
    return GeneratorTrial(
        run=run,
        record=read_run_record(directory.record),
        log=[json.loads(line) for line in directory.metrics.read_text("utf-8").splitlines()],
        num_parameters=sum(parameter.numel() for parameter in exact.generator.parameters()),
        guidance=float(run.sampling.guidance_scale),
        class_names=list(pair.class_names),
        samples=[[to_pil(image) for image in images[asked == c]] for c in range(num_classes)],
        nearest=_nearest(images[:num_classes], train_set),
        accuracy=judge.accuracy(images, asked),
        real_accuracy=judge.accuracy(real, real_label),
        num_real=len(real),
    )


def _nearest(samples: Float[Tensor, "n 3 h w"], batches: Sequence[Batch]) -> list[Image.Image]:
    """The image closest to each sample, pixel by pixel."""
    images = torch.cat([batch.image for batch in batches])
    found = torch.cdist(samples.flatten(1), images.flatten(1)).argmin(1)
    return [to_pil(images[position]) for position in found]


def training_seconds(log: Sequence[dict[str, Any]], batch_size: int) -> float:
    """Time spent on the logged steps, also when they were taken by several processes."""
    seconds, counted = 0.0, 0
    for line in log:
        rate = line.get("images_per_second", line.get("sequences_per_second"))
        if rate is not None:
            num_steps = line["step"] + 1 - counted
            seconds += num_steps * batch_size / rate
            counted += num_steps
    return seconds
