"""A classifier that tells the classes of a generator.

Shape letters: B images, H and W pixels.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from jaxtyping import Int64, UInt8
from torch import Tensor

from mergevq.metrics.extractor import FeatureExtractor


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
