"""Evaluation of a generator's images: `mergevq evaluate generation`.

Images are sampled into a folder, image k of class k mod C, and compared with a training set. An
interrupted run goes on where it was: images are made in batches of fixed numbers, each by one rank,
so they are the same however many ranks there were and wherever it stopped.

Source: Brock et al. 2019, "Large Scale GAN Training for High Fidelity Natural Image Synthesis",
appendix (arXiv:1809.11096), for nearest neighbours in features as a check for memorised images.

Shape letters: B batch, N images, H and W pixels, F feature channels, M samples to look up.
"""

import warnings
from pathlib import Path
from typing import NamedTuple

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from mergevq.config.evaluation import GenerationSettings
from mergevq.config.identity import Identity, require_same_classes
from mergevq.config.records import GenerationRecord
from mergevq.data.images import open_images
from mergevq.evaluate.classes import Classifier, open_classifier
from mergevq.evaluate.neighbours import Neighbours, nearest_neighbours, neighbour_picture
from mergevq.evaluate.real import Real, measure_real
from mergevq.evaluate.samples import (
    ARRAY,
    Samples,
    open_samples,
    sample_missing,
    sample_size,
    write_array,
)
from mergevq.evaluate.subject import (
    RECORD,
    evaluation_record,
    extractor_record,
    json_numbers,
    reference_record,
    require_fresh,
)
from mergevq.generator.generation import Pair, class_labels, load_run
from mergevq.metrics.extractor import FeatureExtractor
from mergevq.metrics.frechet import FrechetStatistics, Gaussian, Reference, frechet_distance
from mergevq.metrics.references import (
    ImageHashes,
    open_reference,
    reference_features,
    require_classes,
)
from mergevq.metrics.sets import Rows, inception_score, kernel_distance, precision_recall
from mergevq.runtime import distributed
from mergevq.runtime.device import deterministic, resolve_device
from mergevq.runtime.files import write_json
from mergevq.runtime.logs import Progress
from mergevq.runtime.random import step_generator
from mergevq.runtime.settings import to_json

_SUBSET_SIZE = 1000
"""Images of each kind in a subset of the kernel distance, as in published numbers."""
_PRECISION_NEIGHBOURS = 3
"""That reach to the edge of a ball, as in published numbers."""


class GenerationScores(NamedTuple):
    """Scores of a set of samples."""

    numbers: dict[str, float]
    left_out: list[str]
    """Measurements that could not be made, and why."""
    pixels_sha256: str
    """Over all samples."""
    features: Float[Tensor, "n f"]
    """Features of all samples."""


def evaluate_generation(settings: GenerationSettings) -> GenerationRecord | None:
    """Sample what is missing, measure, and write the results; on every rank, under `torchrun`.

    Returns:
        What was written to `evaluation.json`; None on ranks other than the main one.

    Raises:
        ValueError: generator, reference or settings do not fit, or a number is not finite.
        RuntimeError: a file is damaged.
    """
    out = Path(settings.out)
    require_fresh(out)
    world = distributed.init(resolve_device(settings.device))
    try:
        return _evaluate(settings, out, world)
    finally:
        distributed.shutdown()


def _evaluate(
    settings: GenerationSettings, out: Path, world: distributed.World
) -> GenerationRecord | None:
    """The whole evaluation on one rank; see `evaluate_generation`."""
    extractor = FeatureExtractor(settings.extractor, world.device)
    pair, logit_error = None, None
    if settings.run is not None:
        pair, logit_error = load_run(settings.run, world.device)
    size = sample_size(settings, pair)
    # Before any sampling, which may take days: an unfit reference is not worth them.
    reference = open_reference(
        Path(settings.reference), "generation", extractor=extractor, image_size=size
    )
    _require_same_classes(settings, pair, reference)
    classifier = _classifier(settings, pair, world.device)
    unscored = _without_probabilities(extractor)
    if distributed.is_main():
        _warn(settings, pair, unscored)
    samples = _samples(settings, pair, out, world)
    scores = measure_generation(
        samples,
        world,
        extractor=extractor,
        reference=reference.statistics,
        reference_features=_reference_features(settings, extractor),
        unscored=unscored,
        classifier=classifier,
        labels=None if classifier is None else _labels(settings, pair, samples),
        batch_size=settings.batch_size,
    )
    against = Against(extractor, reference.statistics, classifier, size)
    real = _real(settings, pair, against, samples.num_images, world)
    neighbours = _look_up(settings, scores, extractor, size, world)
    if not distributed.is_main():
        return None
    out.mkdir(parents=True, exist_ok=True)
    _picture(settings, samples, neighbours, size, out)
    frechet = extractor.metric_name("frechet")
    record: GenerationRecord = {
        "kind": "generation evaluation",
        "settings": to_json(settings),
        **evaluation_record(world),
        "generator": None if pair is None else pair.generator_hash,
        "tokenizer": None if pair is None else pair.tokenizer_hash,
        "logit_error": logit_error,
        "samples": {
            "num_images": samples.num_images,
            "size": list(samples.size),
            "pixels_sha256": scores.pixels_sha256,
            "array": str(out / ARRAY) if settings.write_array else None,
        },
        "extractor": extractor_record(extractor),
        "classifier": None if classifier is None else extractor_record(classifier.network),
        "reference": reference_record(settings.reference, reference),
        **json_numbers(scores.numbers | _beside(real, extractor, scores.numbers[frechet])),
        "left_out": scores.left_out,
        "nearest_distances": None if neighbours is None else neighbours.distance.tolist(),
    }
    write_json(out / RECORD, record)
    return record


def _picture(
    settings: GenerationSettings,
    samples: Samples,
    neighbours: Neighbours | None,
    size: int,
    out: Path,
) -> None:
    """Draw some samples beside the nearest training images, where these were looked up."""
    if neighbours is None or settings.data is None:
        return
    images = open_images(settings.data, max_pixels=settings.max_pixels)
    picture = neighbour_picture(samples, images, neighbours, size)
    picture.save(out / "nearest_neighbours.png")


def _labels(
    settings: GenerationSettings, pair: Pair | None, samples: Samples
) -> Int64[Tensor, "n"] | None:
    """Class that each sample was asked for; None where samples were not made here."""
    if settings.run is None or pair is None:
        return None
    numbers = range(samples.num_images)
    return class_labels(settings.run, pair.generator.config.num_classes, numbers)


def _samples(
    settings: GenerationSettings, pair: Pair | None, out: Path, world: distributed.World
) -> Samples:
    """All samples, of which those that are missing are made, and written as an array if asked."""
    if settings.run is not None and pair is not None:
        sample_missing(pair, settings.run, out, world)
    distributed.barrier()
    samples = open_samples(settings, out)
    if settings.write_array and distributed.is_main():
        out.mkdir(parents=True, exist_ok=True)
        write_array(samples, out / ARRAY, settings.batch_size)
    return samples


def _require_same_classes(
    settings: GenerationSettings, pair: Pair | None, reference: Reference
) -> None:
    """Check that reference and training images are of the classes that the generator draws.

    Raises:
        ValueError: they are of others.
    """
    names = () if pair is None else pair.class_names
    require_classes(names, reference, Path(settings.reference))
    if settings.data is None or settings.run is None or not names:
        return
    images = open_images(settings.data, max_pixels=settings.max_pixels)
    if images.class_names:
        require_same_classes(
            Identity(class_names=names),
            Identity(class_names=images.class_names),
            where=f"the generator in {settings.run.model}",
            way_out=f"give the images that it was trained on, not {settings.data}",
        )


def _without_probabilities(extractor: FeatureExtractor) -> str | None:
    """Why an extractor has no class score, which is of probabilities; None if it has one."""
    # Not of one colour, whose features may by chance be a distribution.
    pixels = (torch.arange(2 * 3 * 32 * 32) % 251).to(torch.uint8).view(2, 3, 32, 32)
    try:
        inception_score(extractor.probabilities(pixels), num_splits=1)
    except (ValueError, RuntimeError, torch.jit.Error) as error:
        # The last line of TorchScript's is the file's own message.
        return str(error).strip().splitlines()[-1]
    return None


def _warn(settings: GenerationSettings, pair: Pair | None, unscored: str | None) -> None:
    """Say before any sampling what will be missing or uneven."""
    if unscored is not None:
        warnings.warn(
            f"extractor {settings.extractor} gives no class probabilities, so the class score is "
            f"left out: {unscored}",
            stacklevel=3,
        )
    if settings.run is None or pair is None:
        return
    count = len(settings.run.classes) or max(1, pair.generator.config.num_classes)
    rest = settings.run.num_images % count
    if rest:
        above = settings.run.num_images - rest + count
        warnings.warn(
            f"{settings.run.num_images} images are not as many of each of {count} classes: {rest} "
            f"of these have one more. Published numbers have as many of each: --num {above}",
            stacklevel=3,
        )


def measure_generation(  # noqa: PLR0913 - what is compared, by what
    samples: Samples,
    world: distributed.World,
    *,
    extractor: FeatureExtractor,
    reference: Gaussian,
    reference_features: Float[Tensor, "r f"] | None,
    unscored: str | None = None,
    classifier: Classifier | None = None,
    labels: Int64[Tensor, "n"] | None = None,
    batch_size: int,
    seed: int = 0,
) -> GenerationScores:
    """Compare samples with a training set; on every rank.

    Args:
        samples: what is evaluated.
        world: this process.
        extractor: what sees the images.
        reference: statistics of the training set.
        reference_features: of some training images, on the main rank; None leaves out what needs
            needs them.
        unscored: why the extractor has no class score; None measures it.
        classifier: tells classes; None leaves class accuracy out.
        labels: classes of the samples, where there is a classifier.
        batch_size: images at once.
        seed: of the subsets of the kernel distance.
    """
    statistics, hashes = FrechetStatistics(extractor.dim), ImageHashes()
    features, probabilities = Rows("features"), Rows("class probabilities")
    correct = Rows("class accuracy")
    progress = Progress(-(-samples.num_images // world.world_size), unit="image")
    with deterministic(world.device):
        for pixels, positions in samples.batches(batch_size, world):
            found = extractor.features(pixels)
            statistics.update(found)
            features.update(found, positions)
            if unscored is None:
                probabilities.update(extractor.probabilities(pixels), positions)
            hashes.update(pixels, positions)
            if classifier is not None and labels is not None:
                told = classifier.classes(pixels)
                correct.update((told == labels[positions]).float()[:, None], positions)
            progress.update(len(positions))
    progress.close()
    everything = features.compute()
    numbers = {
        extractor.metric_name("frechet"): frechet_distance(reference, statistics.compute()),
        "num_images": float(len(everything)),
    }
    left_out = []
    name = extractor.metric_name("class_score")
    if unscored is None:
        score = inception_score(probabilities.compute(), min(10, len(everything)))
        numbers |= {name: score.mean, f"{name}_std": score.std}
    else:
        left_out.append(f"{name}: the extractor gives no class probabilities ({unscored})")
    if reference_features is None:
        left_out.append(
            "kernel distance, precision and recall: the reference holds no features or images"
        )
    else:
        numbers |= _feature_scores(everything, reference_features, extractor, seed)
    if classifier is None:
        left_out.append("class accuracy: no classifier was given")
    else:
        numbers["class_accuracy"] = float(correct.compute().double().mean())
    return GenerationScores(numbers, left_out, hashes.compute(), everything)


def _reference_features(
    settings: GenerationSettings, extractor: FeatureExtractor
) -> Float[Tensor, "r f"] | None:
    """Those of the reference, on the main rank."""
    if not distributed.is_main():
        return None
    return reference_features(Path(settings.reference), extractor, settings.batch_size)


def _feature_scores(
    fake: Float[Tensor, "n f"],
    real: Float[Tensor, "r f"],
    extractor: FeatureExtractor,
    seed: int,
) -> dict[str, float]:
    """Kernel distance, precision and recall."""
    smaller = min(len(fake), len(real))
    kernel = kernel_distance(
        real,
        fake,
        subset_size=min(_SUBSET_SIZE, smaller),
        generator=step_generator(seed, "kernel distance", 0),
        device=extractor.device,
    )
    covered = precision_recall(real, fake, k=_PRECISION_NEIGHBOURS, device=extractor.device)
    name = extractor.metric_name("kernel")
    return {
        name: kernel.mean,
        f"{name}_std": kernel.std,
        extractor.metric_name("precision"): covered.precision,
        extractor.metric_name("recall"): covered.recall,
        "num_reference_features": float(len(real)),
    }


def _classifier(
    settings: GenerationSettings, pair: Pair | None, device: torch.device
) -> Classifier | None:
    """The classifier that was asked for; see `open_classifier`."""
    if settings.classifier is None or pair is None:
        return None
    outputs, num_classes = settings.classifier_outputs, pair.generator.config.num_classes
    return open_classifier(settings.classifier, outputs, num_classes, device)


class Against(NamedTuple):
    """Networks and statistics that images are held against."""

    extractor: FeatureExtractor
    reference: Gaussian
    """Statistics of the training set."""
    classifier: Classifier | None
    size: int
    """Side of an image in pixels."""


def _real(
    settings: GenerationSettings,
    pair: Pair | None,
    against: Against,
    num_images: int,
    world: distributed.World,
) -> Real | None:
    """Numbers of as many held-out images; None where there are none."""
    if settings.val_data is None:
        return None
    return measure_real(
        settings.val_data,
        num_images,
        world,
        image_size=against.size,
        extractor=against.extractor,
        reference=against.reference,
        classifier=against.classifier,
        class_names=() if pair is None else pair.class_names,
        max_pixels=settings.max_pixels,
        batch_size=settings.batch_size,
    )


def _beside(real: Real | None, extractor: FeatureExtractor, frechet: float) -> dict[str, float]:
    """Numbers of real images by name, and the ratio of the samples' distance to theirs."""
    if real is None:
        return {}
    numbers = {
        extractor.metric_name("frechet_real"): real.frechet,
        extractor.metric_name("frechet_ratio"): frechet / real.frechet,
    }
    if real.class_accuracy is not None:
        numbers["class_accuracy_real"] = real.class_accuracy
    return numbers


def _look_up(
    settings: GenerationSettings,
    scores: GenerationScores,
    extractor: FeatureExtractor,
    image_size: int,
    world: distributed.World,
) -> Neighbours | None:
    """Neighbours of the first samples, where there are training images."""
    if settings.data is None:
        return None
    return nearest_neighbours(
        scores.features[: settings.num_looked_up],
        open_images(settings.data, max_pixels=settings.max_pixels),
        extractor,
        world,
        image_size=image_size,
        batch_size=settings.batch_size,
    )
