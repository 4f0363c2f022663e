"""How well two masks agree, one value for each image.

Two empty masks agree wholly, in every measure; one empty mask and another that is not agree in
nothing. Boundaries are pixels of a mask with a neighbour above, below or beside them that is not of
it, the outside of the picture among those, and agree within 1 pixel in any direction.

Source: IoU and Dice are definitions; the boundary measure is that of Perazzi et al. 2016, "A
Benchmark Dataset and Evaluation Methodology for Video Object Segmentation", section 4, with a
tolerance of 1 pixel.

Shape letters: B batch, H and W pixels.
"""

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor
from torch.nn import functional

from mergevq.metrics.image import Mean


def overlap(
    found: Bool[Tensor, "b h w"], truth: Bool[Tensor, "b h w"]
) -> tuple[Int64[Tensor, "b"], Int64[Tensor, "b"]]:
    """Pixels in both masks, and pixels in either."""
    return (found & truth).sum((1, 2)), (found | truth).sum((1, 2))


def iou(found: Bool[Tensor, "b h w"], truth: Bool[Tensor, "b h w"]) -> Float[Tensor, "b"]:
    """Intersection over union."""
    both, either = overlap(found, truth)
    return torch.where(either == 0, 1.0, both / either.clamp(min=1))


def dice(found: Bool[Tensor, "b h w"], truth: Bool[Tensor, "b h w"]) -> Float[Tensor, "b"]:
    """Twice the intersection over the sum of both."""
    both, either = overlap(found, truth)
    return torch.where(either == 0, 1.0, 2 * both / (both + either).clamp(min=1))


def boundary_f(found: Bool[Tensor, "b h w"], truth: Bool[Tensor, "b h w"]) -> Float[Tensor, "b"]:
    """Harmonic mean of the shares of each boundary that the other one is within 1 pixel of."""
    edges = [boundary(mask) for mask in (found, truth)]
    wide = [functional.max_pool2d(each.float()[:, None], 3, 1, 1)[:, 0] > 0 for each in edges]
    counts = [each.sum((1, 2)) for each in edges]
    precision, recall = (
        (edges[n] & wide[1 - n]).sum((1, 2)) / counts[n].clamp(min=1) for n in range(2)
    )
    value = 2 * precision * recall / (precision + recall).clamp(min=1e-9)
    return torch.where(counts[0] + counts[1] == 0, 1.0, value)


def boundary(mask: Bool[Tensor, "b h w"]) -> Bool[Tensor, "b h w"]:
    """Pixels of a mask with one of four neighbours that is not of it."""
    around = functional.pad(mask, (1, 1, 1, 1))
    inside = around[:, :-2, 1:-1] & around[:, 2:, 1:-1] & around[:, 1:-1, :-2] & around[:, 1:-1, 2:]
    return mask & ~inside


class MaskScores:
    """Agreement of masks that arrive in batches: means over images, and one IoU over all pixels."""

    def __init__(self) -> None:
        self._means = {name: Mean(name) for name in ("iou", "dice", "boundary_f")}
        self._pixels = torch.zeros(2, dtype=torch.int64)

    def update(self, found: Bool[Tensor, "b h w"], truth: Bool[Tensor, "b h w"]) -> None:
        """Add a batch.

        Args:
            found: masks as they came back.
            truth: masks as they were.
        """
        for measure in (iou, dice, boundary_f):
            self._means[measure.__name__].update(measure(found, truth))
        self._pixels += torch.stack([each.sum() for each in overlap(found, truth)])

    @property
    def num_images(self) -> int:
        """Images so far."""
        return int(self._means["iou"].state[1])

    def compute(self) -> dict[str, float]:
        """`iou`, `dice` and `boundary_f` over images, and `ciou`, of the pixels of all images.

        Raises:
            ValueError: there was no image.
        """
        numbers = {name: mean.compute().mean for name, mean in self._means.items()}
        both, either = self._pixels.tolist()
        return numbers | {"ciou": both / either if either else 1.0}
