"""A classifier that tells the classes of a generator, and how often it is right on real images.

Shape letters: B images, H and W pixels.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from jaxtyping import Int64, UInt8
from torch import Tensor

from mergevq.data.batches import eval_batches
from mergevq.data.images import open_images
from mergevq.metrics.extractor import FeatureExtractor
from mergevq.metrics.image import Mean, to_uint8
from mergevq.runtime.distributed import World
from mergevq.runtime.logs import Progress


class Classifier(NamedTuple):
    """A network and the outputs of it that are classes of a generator."""

    network: FeatureExtractor
    outputs: tuple[int, ...]
    """Output of each class, in the generator's order."""

    def classes(self, pixels: UInt8[Tensor, "b 3 h w"]) -> Int64[Tensor, "b"]:
        """The likeliest of the generator's classes, on the CPU."""
        return self.network.probabilities(pixels)[:, list(self.outputs)].argmax(1).cpu()


def open_classifier(
    path: str | Path, outputs: Sequence[int], num_classes: int, device: torch.device
) -> Classifier:
    """Open a TorchScript file that gives class probabilities.

    Args:
        path: of the file.
        outputs: those of the generator's classes, in order; none is all that there are.
        num_classes: of the generator.
        device: where it runs.

    Raises:
        ValueError: there is no such output, or their number is not that of the classes.
    """
    network = FeatureExtractor(path, device)
    found = network.probabilities(torch.zeros(1, 3, 32, 32, dtype=torch.uint8)).shape[1]
    chosen = tuple(outputs) or tuple(range(found))
    if len(chosen) != num_classes:
        raise ValueError(
            f"classifier {path} tells {len(chosen)} classes and the generator has {num_classes}; "
            f"name which of its {found} outputs they are, in order, by --classifier-outputs"
        )
    if max(chosen) >= found:
        raise ValueError(
            f"classifier_outputs ({max(chosen)}) must be below the {found} outputs of {path}"
        )
    return Classifier(network, chosen)


def real_accuracy(
    classifier: Classifier,
    data: str,
    class_names: Sequence[str],
    world: World,
    *,
    image_size: int,
    max_pixels: int,
    batch_size: int,
) -> float:
    """Share of real images whose class is told, over all ranks.

    Args:
        classifier: of the generator's classes.
        data: images, best held out ones; see `DataConfig.path`.
        class_names: of the generator, in order; none are not compared.
        world: this process.
        image_size: side of an image in pixels, that of the samples.
        max_pixels: largest picture that is read, as width times height.
        batch_size: images at once on each rank.

    Raises:
        ValueError: the images are of other classes, or of none.
    """
    dataset = open_images(data, max_pixels=max_pixels)
    if dataset.num_classes != len(classifier.outputs) or (
        class_names and list(dataset.class_names) != list(class_names)
    ):
        raise ValueError(
            f"{data} has the {dataset.num_classes} classes {', '.join(dataset.class_names)}, and "
            f"must have the {len(classifier.outputs)} of the generator: {', '.join(class_names)}"
        )
    correct, progress = Mean("class accuracy"), Progress(len(dataset), unit="image")
    batches = eval_batches(
        dataset,
        image_size=image_size,
        batch_size=batch_size * world.world_size,
        rank=world.rank,
        world_size=world.world_size,
        num_workers=0,
    )
    for batch in batches:
        told = classifier.classes(to_uint8(batch.image).to(world.device))
        correct.update((told == batch.label).double())
        progress.update(len(told) * world.world_size)
    progress.close()
    return correct.compute().mean
