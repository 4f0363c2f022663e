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

import io
import json
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from mergevq.data.npz import array_names, open_array, read_array, read_text
from mergevq.metrics.image import require_finite
from mergevq.runtime import distributed
from mergevq.runtime.files import parse_json, write_bytes

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
    metadata: Mapping[str, str | int | float | bool | list[str] | None],
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
    file = io.BytesIO()
    np.savez(
        file,
        mu=statistics.mean.numpy(),
        sigma=statistics.covariance.numpy(),
        num_samples=np.array(statistics.num_samples or 0),
        metadata=np.array(json.dumps(dict(metadata))),
        **more,
    )
    write_bytes(path, file.getvalue())


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
