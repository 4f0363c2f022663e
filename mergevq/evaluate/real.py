"""Real held-out images measured as samples are: what the numbers of samples are to be held against.

The ratio of both Frechet distances is 1 for samples that are as far from the training set as images
that nobody trained on. Both are of equally many images, since the distance falls with their number.

Source: arXiv:2604.28190 (ratios of Frechet distances).

Shape letters: B images, H and W pixels.
"""

from collections.abc import Sequence
from typing import NamedTuple

from mergevq.data.batches import eval_batches
from mergevq.data.images import open_images
from mergevq.evaluate.classes import Classifier
from mergevq.metrics.extractor import FeatureExtractor
from mergevq.metrics.frechet import FrechetStatistics, Gaussian, frechet_distance
from mergevq.metrics.image import Mean, to_uint8
from mergevq.runtime.distributed import World
from mergevq.runtime.logs import Progress


class Real(NamedTuple):
    """Numbers of real images."""

    frechet: float
    """Frechet distance to the training set."""
    class_accuracy: float | None
    """Share whose class is told; None without a classifier."""


def measure_real(  # noqa: PLR0913 - all that the numbers depend on
    data: str,
    num_images: int,
    world: World,
    *,
    image_size: int,
    extractor: FeatureExtractor,
    reference: Gaussian,
    classifier: Classifier | None,
    class_names: Sequence[str],
    max_pixels: int,
    batch_size: int,
) -> Real:
    """Measure as many real images as there are samples, over all ranks.

    Args:
        data: images that no generator was trained on; see `DataConfig.path`.
        num_images: samples; as many images are taken, evenly spaced.
        world: this process.
        image_size: side of an image in pixels, that of the samples.
        extractor: what sees the images.
        reference: statistics of the training set.
        classifier: tells the generator's classes; None leaves its accuracy out.
        class_names: of the generator, in order; none are not compared.
        max_pixels: largest picture that is read, as width times height.
        batch_size: images at once on each rank.

    Raises:
        ValueError: there are fewer images than samples, or they are of other classes.
    """
    dataset = open_images(data, max_pixels=max_pixels)
    if classifier is not None and (
        dataset.num_classes != len(classifier.outputs)
        or (class_names and list(dataset.class_names) != list(class_names))
    ):
        raise ValueError(
            f"{data} has the {dataset.num_classes} classes {', '.join(dataset.class_names)}, and "
            f"must have the {len(classifier.outputs)} of the generator: {', '.join(class_names)}"
        )
    statistics, correct = FrechetStatistics(extractor.dim), Mean("class accuracy")
    progress = Progress(min(num_images, len(dataset)), unit="image")
    batches = eval_batches(
        dataset,
        image_size=image_size,
        batch_size=batch_size * world.world_size,
        max_images=min(num_images, len(dataset)),
        rank=world.rank,
        world_size=world.world_size,
        num_workers=0,
    )
    for batch in batches:
        pixels = to_uint8(batch.image).to(world.device)
        statistics.update(extractor.features(pixels))
        if classifier is not None:
            correct.update((classifier.classes(pixels) == batch.label).double())
        progress.update(len(pixels) * world.world_size)
    progress.close()
    real = statistics.compute()
    if real.num_samples != num_images:
        raise ValueError(
            f"{data} holds {real.num_samples} images and must hold as many as there are samples "
            f"({num_images}), since a Frechet distance depends on the number; draw fewer samples, "
            "or give more images"
        )
    accuracy = None if classifier is None else correct.compute().mean
    return Real(frechet_distance(reference, real), accuracy)
