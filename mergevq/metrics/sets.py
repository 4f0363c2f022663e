"""Scores of sets of images: inception score, kernel distance, precision and recall.

Source: Salimans et al. 2016, "Improved Techniques for Training GANs", section 4 (arXiv:1606.03498);
Binkowski et al. 2018, "Demystifying MMD GANs", section 4 (arXiv:1801.01401); Kynkaanniemi et al.
2019, "Improved Precision and Recall Metric", section 2 (arXiv:1904.06991).

Shape letters: N real images, M generated images, D feature channels, C classes.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from mergevq.metrics.image import require_finite
from mergevq.runtime import distributed
from mergevq.runtime.device import full_float32

_BLOCK = 1024
"""Rows of a matrix of pairs that are held at a time."""
_PAIRS = 4096
"""Pairs whose distance is computed in float64 at a time."""
_FEW = 16
"""Most pairs of a point whose distance is computed in float64 by themselves; of more, all are."""
_SPARE = 4
"""Neighbours beyond the k-th that are looked at in float64."""
_EPS = torch.finfo(torch.float32).eps


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
    device: torch.device | str = "cpu",
) -> Spread:
    """Unbiased squared MMD under the kernel `(x . y / D + 1)**3`, over random subsets.

    Zero on average for two samples of one distribution, so slightly negative about half the time.
    Products are of float32 and their sums of float64: off by less than 1e-6 of the mean kernel.

    Args:
        real: features of real images.
        fake: features of generated images.
        num_subsets: how many.
        subset_size: images of each kind in a subset, drawn without replacement.
        generator: of the subsets, on the CPU.
        device: where to compute.

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
    sides = [features.detach().float().to(device) for features in (real, fake)]
    distances = []
    with full_float32(sides[0].device):
        for _ in range(num_subsets):
            first, second = (
                features[_draw(len(features), subset_size, generator).to(features.device)]
                for features in sides
            )
            within = sum(
                (_kernel_sum(part, part) - _kernel_trace(part)) / (subset_size * (subset_size - 1))
                for part in (first, second)
            )
            distances.append(within - 2 * _kernel_sum(first, second) / subset_size**2)
    return _spread(distances)


def _draw(count: int, size: int, generator: torch.Generator) -> Int64[Tensor, "s"]:
    """Some of many, without replacement."""
    return torch.randperm(count, generator=generator)[:size]


def _kernel_sum(first: Float[Tensor, "n d"], second: Float[Tensor, "m d"]) -> Float[Tensor, ""]:
    """Sum of the kernel over all pairs, in float64 on the CPU."""
    sums = []
    for rows in first.split(_BLOCK):
        kernel = (rows @ second.T).div_(first.shape[1]).add_(1).pow_(3)
        # A row of float32 is summed pairwise, and MPS has no float64.
        sums.append(kernel.sum(1).cpu().double().sum())
    return torch.stack(sums).sum()


def _kernel_trace(features: Float[Tensor, "n d"]) -> Float[Tensor, ""]:
    """Sum of the kernel over all features with themselves, in float64 on the CPU."""
    squares = features.square().sum(1).cpu().double()
    return ((squares / features.shape[1] + 1) ** 3).sum()


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
    real: Float[Tensor, "n d"],
    fake: Float[Tensor, "m d"],
    k: int = 3,
    *,
    block_size: int = _BLOCK,
    device: torch.device | str = "cpu",
) -> PrecisionRecall:
    """Precision and recall of nearest-neighbour manifolds.

    A set's manifold is the union of balls around its members, each reaching its k-th nearest
    other member. Distances are computed in float32, and again in float64, from differences, where
    float32 cannot tell on which side of an edge a point lies.

    Args:
        real: features of real images.
        fake: features of generated images.
        k: neighbours; published numbers use 3.
        block_size: rows of the distance matrix held at a time.
        device: where to compute in float32; float64 is on the CPU.

    Raises:
        ValueError: features are not finite, or a set has no k-th neighbour.
    """
    require_finite("precision and recall (real)", real, 0)
    require_finite("precision and recall (fake)", fake, 0)
    smaller = min(len(real), len(fake))
    if not 1 <= k < smaller:
        raise ValueError(f"k ({k}) must be between 1 and one less than the {smaller} images")
    exact = [features.detach().cpu().double() for features in (real, fake)]
    # Distances stay, and what float32 rounds is of the size of the norms.
    centre = exact[0].mean(0)
    first, second = (_Points(each, (each - centre).float().to(device)) for each in exact)
    precise = torch.zeros(len(fake), dtype=torch.bool)
    recalled = torch.zeros(len(real), dtype=torch.bool)
    with full_float32(torch.device(device)):
        first_balls, second_balls = (_balls(each, k, block_size) for each in (first, second))
        for block in _distances(second, first, block_size):
            squared, error, rows = block.squared, block.error, block.rows
            precise[rows] = _covered(squared, error, second, rows, first_balls)
            own = second_balls.of(rows)
            recalled |= _covered(squared.T, error.T, first, torch.arange(len(real)), own)
    return PrecisionRecall(float(precise.double().mean()), float(recalled.double().mean()))


class _Points(NamedTuple):
    """Features in both precisions."""

    exact: Float[Tensor, "n d"]
    """In float64 on the CPU."""
    rounded: Float[Tensor, "n d"]
    """Minus a common centre, in float32 on the device."""


class _Distances(NamedTuple):
    """Squared distances of some points from all members, in float32."""

    rows: Int64[Tensor, "c"]
    """Numbers of the points, on the CPU."""
    squared: Float[Tensor, "c m"]
    error: Float[Tensor, "c m"]
    """Most that they may be off."""


def _distances(points: _Points, members: _Points, block_size: int) -> Iterator[_Distances]:
    """Squared distances in float32, some rows at a time."""
    all_norms = members.rounded.square().sum(1)
    # Of a sum of D rounded products; both norms, and what centring rounded, are off by less.
    relative = _EPS * (8 + 2 * points.rounded.shape[1] ** 0.5)
    for rows in torch.arange(len(points.rounded)).split(block_size):
        block = points.rounded[rows[0] : rows[-1] + 1]
        norms = block.square().sum(1)[:, None] + all_norms
        yield _Distances(rows, norms.addmm(block, members.rounded.T, alpha=-2), relative * norms)


@dataclass(frozen=True)
class _Balls:
    """A ball around each of some members, to its k-th nearest other member."""

    k: int
    members: _Points
    """All members."""
    numbers: Int64[Tensor, "c"]
    """Those whose balls these are, on the CPU."""
    squared: Float[Tensor, "c"]
    """Radii in float32."""
    error: Float[Tensor, "c"]
    """Most that they may be off."""
    nearest: Int64[Tensor, "c s"]
    """The k nearest members and a few more, in float32; on the device."""
    furthest: Float[Tensor, "c"]
    """Least squared distance of all others."""

    def of(self, chosen: Int64[Tensor, "b"]) -> "_Balls":
        """Some of them."""
        here = chosen.to(self.squared.device)
        parts = (self.squared, self.error, self.nearest, self.furthest)
        return _Balls(self.k, self.members, self.numbers[chosen], *(part[here] for part in parts))

    def exact(self) -> Float[Tensor, "c"]:
        """Radii in float64."""
        nearest = self.nearest.cpu()
        radii = self._radii(self.numbers, nearest)
        unsure = ((radii > self.furthest.cpu()) & (radii > 0)).nonzero()[:, 0]
        if len(unsure) and nearest.shape[1] < len(self.members.exact):
            numbers = self.numbers[unsure]
            distances = _squared(self.members.exact[numbers], self.members.exact)
            again = distances.topk(nearest.shape[1], largest=False).indices
            radii[unsure] = self._radii(numbers, again)
        return radii

    def _radii(
        self, numbers: Int64[Tensor, "b"], candidates: Int64[Tensor, "b s"]
    ) -> Float[Tensor, "b"]:
        """Squared distance from the k-th nearest other member, which is among the candidates."""
        rows = numbers[:, None].expand_as(candidates).flatten()
        everyone = self.members.exact
        squared = _squared_pairs(everyone, rows, everyone, candidates.flatten())
        # The nearest member of a member is itself, hence k + 1.
        return squared.view_as(candidates).kthvalue(self.k + 1, dim=1).values


def _balls(members: _Points, k: int, block_size: int) -> _Balls:
    """The balls of all members."""
    count = min(k + 1 + _SPARE, len(members.exact))
    parts = []
    for block in _distances(members, members, block_size):
        nearest = block.squared.topk(count, largest=False)
        error = block.error.amax(1)
        parts.append((nearest.values[:, k], error, nearest.indices, nearest.values[:, -1] - error))
    squared, error, indices, furthest = (torch.cat(column) for column in zip(*parts, strict=True))
    numbers = torch.arange(len(members.exact))
    return _Balls(k, members, numbers, squared, error, indices, furthest)


def _covered(
    squared: Float[Tensor, "p m"],
    error: Float[Tensor, "p m"],
    points: _Points,
    numbers: Int64[Tensor, "p"],
    balls: _Balls,
) -> Bool[Tensor, "p"]:
    """Which points lie in one of some balls.

    Args:
        squared: distances of the points from the balls' centres, in float32.
        error: most that they may be off.
        points: among others.
        numbers: of the points.
        balls: of members.
    """
    margin, error = balls.squared - squared, error + balls.error
    inside = (margin > error).any(1)
    is_open = (margin.abs() <= error) & ~inside[:, None]
    inside, counts = inside.cpu(), is_open.sum(1).cpu()
    few, many = counts <= _FEW, (counts > _FEW).nonzero()[:, 0]
    rows, columns = (is_open & few.to(is_open.device)[:, None]).nonzero().cpu().unbind(1)
    if len(rows):
        needed, places = columns.unique(return_inverse=True)
        radii, centres = balls.of(needed).exact()[places], balls.numbers[columns]
        pairs = _squared_pairs(points.exact, numbers[rows], balls.members.exact, centres)
        inside[rows[pairs <= radii]] = True
    if len(many):
        centres = balls.members.exact[balls.numbers]
        distances = _squared(points.exact[numbers[many]], centres)
        inside[many] = (distances <= balls.exact()).any(1)
    return inside


def _squared_pairs(
    points: Float[Tensor, "n d"],
    rows: Int64[Tensor, "p"],
    members: Float[Tensor, "m d"],
    columns: Int64[Tensor, "p"],
) -> Float[Tensor, "p"]:
    """Squared distances of pairs, from differences: equal points are at exactly 0."""
    squared = [
        (points[left] - members[right]).square().sum(1)
        for left, right in zip(rows.split(_PAIRS), columns.split(_PAIRS), strict=True)
    ]
    return torch.cat(squared)


def _squared(points: Float[Tensor, "c d"], members: Float[Tensor, "m d"]) -> Float[Tensor, "c m"]:
    """Squared distances of all pairs, from products."""
    norms = points.square().sum(1)[:, None] + members.square().sum(1)
    distances = norms - 2 * points @ members.T
    # Rounding of equal points must not put them at a distance: radii may be exactly 0.
    return distances.masked_fill(distances < 1e-12 * norms, 0)
