"""Distances between sets of images, as a fixed network sees them.

Source: Heusel et al. 2017, "GANs Trained by a Two Time-Scale Update Rule", section 2
(arXiv:1706.08500); Salimans et al. 2016, "Improved Techniques for Training GANs", section 4
(arXiv:1606.03498); Binkowski et al. 2018, "Demystifying MMD GANs", section 4 (arXiv:1801.01401);
Kynkaanniemi et al. 2019, "Improved Precision and Recall Metric", section 2 (arXiv:1904.06991).

Differs: the trace of the matrix square root in the Frechet distance is the sum of the singular
values of a product of two factors, so a covariance without full rank gives a finite, real number.
Only the Inception-2015 file that the field uses gives numbers called FID; with any other network
its name is part of the metric's.

Shape letters: B batch, N real images, M generated images, D feature channels, C classes.

Accumulators take features batch by batch (`update`) and give the result over all ranks (`compute`,
which every rank must call and which changes nothing).
"""

import json
import os
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from mergevq import distributed
from mergevq.files import parse_json
from mergevq.metrics import require_finite
from mergevq.npz import array_names, open_array, read_array, read_text

MIN_SAMPLES = 2048
"""Below this many samples a covariance of Inception's 2,048 features has no full rank, and the
distance is biased upwards by more than most differences of interest."""

MAX_DIM = 8192
"""Most feature channels of statistics that are read: sigma then has 512 MiB."""


class Gaussian(NamedTuple):
    """Mean and covariance of a set of features."""

    mean: Float[Tensor, "d"]
    """In float64 on the CPU."""
    covariance: Float[Tensor, "d d"]
    """The unbiased one, divided by the number of samples minus one."""
    num_samples: int | None
    """None where a file does not say."""


class FrechetStatistics:
    """Mean and covariance of features that arrive in batches: float64 on the CPU, D**2 numbers.

    Args:
        dim: D.
    """

    def __init__(self, dim: int) -> None:
        self.num_samples = 0
        self.mean: Float[Tensor, "d"] = torch.zeros(dim, dtype=torch.float64)
        self.scatter: Float[Tensor, "d d"] = torch.zeros(dim, dim, dtype=torch.float64)
        """Sum of the outer products of the samples minus their mean."""

    def update(self, features: Float[Tensor, "b d"]) -> None:
        """Add a batch.

        Raises:
            ValueError: the features have another dimension, or are not finite.
        """
        if features.shape[1] != len(self.mean):
            raise ValueError(
                f"features of dimension {features.shape[1]} must have the dimension "
                f"{len(self.mean)} of the statistics"
            )
        require_finite("frechet distance", features, self.num_samples)
        if len(features) == 0:
            return
        samples = features.detach().cpu().double()
        mean = samples.mean(0)
        centred = samples - mean
        self._add(len(samples), mean, centred.T @ centred)

    def merge(self, other: "FrechetStatistics") -> None:
        """Add what another accumulator has seen."""
        if other.num_samples:
            self._add(other.num_samples, other.mean, other.scatter)

    def _add(
        self, num_samples: int, mean: Float[Tensor, "d"], scatter: Float[Tensor, "d d"]
    ) -> None:
        # Chan et al. 1983: never a difference of two large sums.
        total = self.num_samples + num_samples
        shift = mean - self.mean
        self.scatter += scatter + shift.outer(shift) * (self.num_samples * num_samples / total)
        self.mean = self.mean + shift * (num_samples / total)
        self.num_samples = total

    def compute(self) -> Gaussian:
        """Mean and covariance over every sample of every rank.

        Raises:
            ValueError: there are fewer than two samples.
        """
        total = int(distributed.sum(torch.tensor(self.num_samples)))
        if total < 2:
            raise ValueError(f"a covariance needs at least 2 samples and there are {total}")
        mean = distributed.sum(self.mean * (self.num_samples / total))
        shift = self.mean - mean
        scatter = distributed.sum(self.scatter + self.num_samples * shift.outer(shift))
        return Gaussian(mean=mean, covariance=scatter / (total - 1), num_samples=total)


class Reference(NamedTuple):
    """Statistics from a file, and what its writer said about them."""

    statistics: Gaussian
    metadata: dict[str, object]
    """Empty for files of the ADM evaluator, which say nothing."""


def save_reference(
    path: str | Path,
    statistics: Gaussian,
    metadata: Mapping[str, str | int | float | bool | None],
    features: Float[Tensor, "n d"] | None = None,
) -> None:
    """Write statistics as `.npz`, with the keys `mu` and `sigma` that other tools read.

    Args:
        path: of the file; an existing one is replaced at once, never in part.
        statistics: to write.
        metadata: to find again on reading: the extractor's hash, the data, the crop.
        features: of some of the images, for kernel distance, precision and recall.
    """
    path = Path(path)
    more: dict[str, Any] = {} if features is None else {"features": features.cpu().numpy()}
    unfinished = path.with_name(path.name + ".unfinished")
    with unfinished.open("wb") as file:
        np.savez(
            file,
            mu=statistics.mean.numpy(),
            sigma=statistics.covariance.numpy(),
            num_samples=np.array(statistics.num_samples or 0),
            metadata=np.array(json.dumps(dict(metadata))),
            **more,
        )
    os.replace(unfinished, path)


def load_reference(path: str | Path) -> Reference:
    """Read statistics from `.npz`: our own, those of the ADM evaluator, or any `mu` and `sigma`.

    Of an ADM file only `mu` and `sigma` are read: its images (`arr_0`) and the statistics of
    spatial features (`mu_s`, `sigma_s`) stay on disk.

    Raises:
        ValueError: there is no such file, it is no `.npz`, or it has no usable statistics.
    """
    path = Path(path)
    names = array_names(path)
    if not {"mu", "sigma"} <= names:
        raise ValueError(
            f"reference {path} holds no mu and sigma; compute statistics of its images first"
        )
    shapes = [open_array(path, name).shape for name in ("mu", "sigma")]
    if len(shapes[0]) != 1 or shapes[1] != shapes[0] * 2:
        raise ValueError(
            f"reference {path}: sigma of shape {shapes[1]} must be square, of the length of mu, "
            f"{shapes[0]}"
        )
    mean, covariance = (
        torch.from_numpy(
            read_array(path, name, num_dims=num_dims, max_side=MAX_DIM).astype(np.float64)
        )
        for name, num_dims in (("mu", 1), ("sigma", 2))
    )
    if not (mean.isfinite().all() and covariance.isfinite().all()):
        raise ValueError(f"reference {path}: mu or sigma is not finite; write the reference again")
    num_samples = 0
    if "num_samples" in names:
        num_samples = int(read_array(path, "num_samples", num_dims=0, max_side=0)[()])
        if num_samples < 0:
            raise ValueError(f"reference {path}: num_samples ({num_samples}) must be at least 0")
    metadata: object = {}
    if "metadata" in names:
        metadata = parse_json(read_text(path, "metadata"), where=f"metadata of {path}")
    if not isinstance(metadata, dict):
        raise ValueError(f"reference {path}: metadata must be an object of JSON")
    return Reference(Gaussian(mean, covariance, num_samples or None), metadata)


def load_features(path: str | Path) -> Float[Tensor, "n d"] | None:
    """Features that `save_reference` wrote; None where the file has none.

    Raises:
        ValueError: there is no such file, or it is no `.npz`.
    """
    if "features" not in array_names(Path(path)):
        return None
    features = read_array(Path(path), "features", num_dims=2, max_side=MAX_DIM)
    found = torch.from_numpy(features.astype(np.float32))
    require_finite(f"features of {path}", found, 0)
    return found


def frechet_distance(first: Gaussian, second: Gaussian) -> float:
    """Squared Frechet (Wasserstein-2) distance between two Gaussians.

    `|m1 - m2|**2 + tr(S1) + tr(S2) - 2 tr((S1 S2)**0.5)`. With S1 = A A^T and S2 = B B^T, the
    eigenvalues of S1 S2 are the squared singular values of A^T B, so the last trace is their sum.

    Warns when either side has fewer than 2,048 samples.

    Raises:
        ValueError: the dimensions differ, a number is not finite, or a covariance is none.
    """
    if first.mean.shape != second.mean.shape:
        raise ValueError(
            f"statistics of dimension {len(first.mean)} cannot be compared with dimension "
            f"{len(second.mean)}: they come from different extractors"
        )
    known = [part.num_samples for part in (first, second) if part.num_samples is not None]
    if known and min(known) < MIN_SAMPLES:
        warnings.warn(
            f"a Frechet distance of {min(known)} samples is biased upwards; use at least "
            f"{MIN_SAMPLES}, and compare only distances of equal numbers of samples",
            stacklevel=2,
        )
    product = _factor(first.covariance).T @ _factor(second.covariance)
    shared = torch.linalg.svdvals(product).sum()
    traces = first.covariance.trace() + second.covariance.trace()
    distance = (first.mean - second.mean).square().sum() + traces - 2 * shared
    if not distance.isfinite():
        raise ValueError("frechet distance: a mean is not finite; the statistics are damaged")
    # Exactly 0 in theory for equal statistics; rounding leaves about 1e-15 of the traces.
    return max(0.0, float(distance))


def _factor(covariance: Float[Tensor, "d d"]) -> Float[Tensor, "d r"]:
    """A of rank r with A A^T equal to a covariance, directions without variance left out."""
    if not covariance.isfinite().all():
        raise ValueError("frechet distance: a covariance is not finite; the statistics are damaged")
    variances, directions = torch.linalg.eigh((covariance + covariance.T) / 2)
    largest = float(variances[-1])
    # Files in float32 have negative variances of about 1e-7 of the largest.
    if float(variances[0]) < -1e-4 * abs(largest):
        raise ValueError(
            f"frechet distance: a covariance has a variance of {float(variances[0]):.3g} beside "
            f"{largest:.3g}; none may be negative, the statistics are damaged"
        )
    kept = variances > len(variances) * torch.finfo(torch.float64).eps * largest
    return directions[:, kept] * variances[kept].sqrt()


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
        """Of every rank, as they came."""
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
