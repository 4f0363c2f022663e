"""Scores of sets of images: inception score, kernel distance, precision and recall.

Source: Salimans et al. 2016, "Improved Techniques for Training GANs", section 4 (arXiv:1606.03498);
Binkowski et al. 2018, "Demystifying MMD GANs", section 4 (arXiv:1801.01401); Kynkaanniemi et al.
2019, "Improved Precision and Recall Metric", section 2 (arXiv:1904.06991).

Shape letters: N real images, M generated images, D feature channels, C classes.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from mergevq.metrics.image import require_finite
from mergevq.runtime import distributed


class Rows:
    """One row per image (features, probabilities) in the order of the images, over all ranks.

    Args:
        name: of the metric, for error messages.
        infinite: accept +inf, as PSNR is for identical images.
    """

    def __init__(self, name: str, *, infinite: bool = False) -> None:
        self.name = name
        self.infinite = infinite
        self.rows: list[Float[Tensor, "_ d"]] = []
        self.positions: list[Int64[Tensor, "_"]] = []

    def update(self, rows: Float[Tensor, "b d"], positions: Int64[Tensor, "b"]) -> None:
        """Add rows; one that is not finite is a ValueError.

        Args:
            rows: of the images.
            positions: of the images among all images, so that the order is the same for any
                batch size and number of ranks.
        """
        bounded = rows.masked_fill(rows == torch.inf, 0) if self.infinite else rows
        require_finite(self.name, bounded, sum(map(len, self.rows)))
        self.rows.append(rows.detach().float().cpu())
        self.positions.append(positions.cpu())

    def compute(self) -> Float[Tensor, "n d"]:
        """Every row of every rank, sorted by position, in float32 on the CPU.

        Raises:
            ValueError: there is no row, or an image came twice.
        """
        dim = self.rows[0].shape[1] if self.rows else 0
        # A rank without images does not know the width, and must send rows of it all the same.
        dim = int(distributed.gather(torch.tensor([dim])).max())
        rows = distributed.gather(torch.cat([torch.empty(0, dim), *self.rows]))
        if len(rows) == 0:
            raise ValueError(f"{self.name} has seen no image; there is nothing to compare")
        positions, order = self._all_positions().sort()
        twice = positions[1:][positions[1:] == positions[:-1]].tolist()
        if twice:
            raise ValueError(
                f"{self.name}: image {twice[0]} came twice ({len(twice)} such); give every image "
                "to one rank"
            )
        return rows[order]

    def order(self) -> Int64[Tensor, "n"]:
        """Position of each row that `compute` gives; every rank must call."""
        return self._all_positions().sort().values

    def _all_positions(self) -> Int64[Tensor, "n"]:
        """Positions of every rank, as they came."""
        none = torch.empty(0, dtype=torch.int64)
        return distributed.gather(torch.cat([none, *self.positions]))


class Spread(NamedTuple):
    """A score over parts of the data."""

    mean: float
    """Over the parts."""
    std: float
    """Over the parts (population)."""


def inception_score(probabilities: Float[Tensor, "m c"], num_splits: int = 10) -> Spread:
    """`exp(E KL(p(y|x) || p(y)))` of each split: from 1 (all alike) to C (sure, and all classes).

    Args:
        probabilities: of the classes, per image; rows sum to one. Splits are contiguous, so the
            images should be in random order of class.
        num_splits: parts; published numbers use 10 of 50,000 images.

    Raises:
        ValueError: there are fewer images than splits, or rows are no probabilities.
    """
    require_finite("inception score", probabilities, 0)
    num_images = len(probabilities)
    if not 1 <= num_splits <= num_images:
        raise ValueError(f"num_splits ({num_splits}) must be between 1 and the {num_images} images")
    given = probabilities.cpu().double()
    if bool((given < 0).any()) or not torch.allclose(given.sum(1), given.new_ones(()), atol=1e-3):
        raise ValueError(
            "inception score: class probabilities must be at least 0 and sum to 1; these are "
            "logits or features"
        )
    scores = []
    for split in range(num_splits):
        part = given[split * num_images // num_splits : (split + 1) * num_images // num_splits]
        marginal = part.mean(0)
        divergence = (torch.xlogy(part, part) - torch.xlogy(part, marginal)).sum(1)
        scores.append(divergence.mean().exp())
    return _spread(scores)


def kernel_distance(
    real: Float[Tensor, "n d"],
    fake: Float[Tensor, "m d"],
    *,
    num_subsets: int = 100,
    subset_size: int = 1000,
    generator: torch.Generator,
) -> Spread:
    """Unbiased squared MMD under the kernel `(x . y / D + 1)**3`, over random subsets.

    Zero on average for two samples of one distribution, so slightly negative about half the time.

    Args:
        real: features of real images.
        fake: features of generated images.
        num_subsets: how many.
        subset_size: images of each kind in a subset, drawn without replacement.
        generator: of the subsets, on the CPU.

    Raises:
        ValueError: features are not finite, or a subset is larger than the data.
    """
    require_finite("kernel distance (real)", real, 0)
    require_finite("kernel distance (fake)", fake, 0)
    smaller = min(len(real), len(fake))
    if not 2 <= subset_size <= smaller:
        raise ValueError(
            f"subset_size ({subset_size}) must be between 2 and the {smaller} images of the "
            "smaller side"
        )
    distances = []
    for _ in range(num_subsets):
        first, second = (
            features[torch.randperm(len(features), generator=generator)[:subset_size]]
            .detach()
            .cpu()
            .double()
            for features in (real, fake)
        )
        within = _off_diagonal_mean(_kernel(first, first)) + _off_diagonal_mean(
            _kernel(second, second)
        )
        distances.append(within - 2 * _kernel(first, second).mean())
    return _spread(distances)


def _kernel(first: Float[Tensor, "n d"], second: Float[Tensor, "m d"]) -> Float[Tensor, "n m"]:
    return (first @ second.T / first.shape[1] + 1) ** 3


def _off_diagonal_mean(square: Float[Tensor, "n n"]) -> Float[Tensor, ""]:
    return (square.sum() - square.trace()) / (len(square) * (len(square) - 1))


def _spread(values: list[Tensor]) -> Spread:
    stacked = torch.stack(values)
    return Spread(mean=float(stacked.mean()), std=float(stacked.std(correction=0)))


class PrecisionRecall(NamedTuple):
    """How far two sets of images cover each other."""

    precision: float
    """Share of generated images that lie among the real ones."""
    recall: float
    """Share of real images that lie among the generated ones."""


def precision_recall(
    real: Float[Tensor, "n d"], fake: Float[Tensor, "m d"], k: int = 3, chunk_size: int = 1024
) -> PrecisionRecall:
    """Precision and recall of nearest-neighbour manifolds.

    A set's manifold is the union of balls around its members, each reaching its k-th nearest
    other member.

    Args:
        real: features of real images.
        fake: features of generated images.
        k: neighbours; published numbers use 3.
        chunk_size: rows of the distance matrix held at a time.

    Raises:
        ValueError: features are not finite, or a set has no k-th neighbour.
    """
    require_finite("precision and recall (real)", real, 0)
    require_finite("precision and recall (fake)", fake, 0)
    smaller = min(len(real), len(fake))
    if not 1 <= k < smaller:
        raise ValueError(f"k ({k}) must be between 1 and one less than the {smaller} images")
    real, fake = real.detach().cpu().double(), fake.detach().cpu().double()
    return PrecisionRecall(
        precision=float(_covered(fake, real, k, chunk_size).double().mean()),
        recall=float(_covered(real, fake, k, chunk_size).double().mean()),
    )


def _covered(
    points: Float[Tensor, "n d"], members: Float[Tensor, "m d"], k: int, chunk_size: int
) -> Bool[Tensor, "n"]:
    """Which points lie in the manifold of the members."""
    # The nearest member of a member is itself, hence k + 1.
    radii = torch.cat(
        [
            distances.kthvalue(k + 1, dim=1).values
            for distances in _squared_distances(members, members, chunk_size)
        ]
    )
    return torch.cat(
        [
            (distances <= radii).any(1)
            for distances in _squared_distances(points, members, chunk_size)
        ]
    )


def _squared_distances(
    first: Float[Tensor, "n d"], second: Float[Tensor, "m d"], chunk_size: int
) -> Iterator[Float[Tensor, "c m"]]:
    """Squared distances, some rows at a time."""
    second_norms = second.square().sum(1)
    for chunk in first.split(chunk_size):
        norms = chunk.square().sum(1)[:, None] + second_norms
        distances = norms - 2 * chunk @ second.T
        # Rounding of equal points must not put them at a distance: radii may be exactly 0.
        yield distances.masked_fill(distances < 1e-12 * norms, 0)
