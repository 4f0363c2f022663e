"""Metrics of decoded images against their originals, each of which can be left out or added.

A metric sees every batch once and gives its numbers in the end; what networks say of a batch is
computed once and shared. To add one: a class with `update` and `compute`, named where a
`Comparison` is made.

Shape letters: B batch, H and W pixels, F feature channels.
"""

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from mergevq.config.evaluation import Protocol as Rules
from mergevq.metrics.extractor import FeatureExtractor
from mergevq.metrics.frechet import FrechetStatistics, Gaussian, frechet_distance
from mergevq.metrics.image import (
    Mean,
    authors_ssim,
    feature_cosine,
    patch_steps,
    psnr,
    ssim,
    to_pixels,
    to_uint8,
)
from mergevq.metrics.lpips import Perceptual
from mergevq.metrics.sets import Rows
from mergevq.runtime import distributed


class Original(NamedTuple):
    """Images that reconstructions are compared with, and what is computed of them once."""

    image: Float[Tensor, "b 3 h w"]
    """In [-1, 1]."""
    features: Float[Tensor, "b f"] | None
    """Features of the extractor; None without one."""
    taps: list[Float[Tensor, "b _ _ _"]] | None
    """Activations of the network of LPIPS; None without one."""


class Originals:
    """Original images, batch by batch: the networks see each once, however often it is compared.

    Args:
        perceptual: network for LPIPS; None leaves it out.
        extractor: network for feature cosine and Frechet distance; None leaves them out.
    """

    def __init__(self, perceptual: Perceptual | None, extractor: FeatureExtractor | None) -> None:
        self.perceptual, self.extractor = perceptual, extractor
        self.statistics = None if extractor is None else FrechetStatistics(extractor.dim)

    @torch.no_grad()
    def update(self, image: Float[Tensor, "b 3 h w"]) -> Original:
        """Add images in [-1, 1]."""
        features = None
        if self.extractor is not None and self.statistics is not None:
            features = self.extractor.features(to_uint8(image))
            self.statistics.update(features)
        taps = None if self.perceptual is None else self.perceptual.taps(image)
        return Original(image, features, taps)

    def compute(self) -> Gaussian | None:
        """Statistics over all ranks, or None; every rank must call."""
        return None if self.statistics is None else self.statistics.compute()


class Decoded:
    """A batch of decoded images, and features of them that several metrics read."""

    def __init__(
        self, image: Float[Tensor, "b 3 h w"], extractor: FeatureExtractor | None, rules: Rules
    ) -> None:
        """Take images clipped to [-1, 1]."""
        self.image = image
        self._extractor, self._rules = extractor, rules

    @functools.cached_property
    def features(self) -> Float[Tensor, "b f"] | None:
        """Features of the extractor; None without one."""
        if self._extractor is None:
            return None
        pixels = to_pixels(self.image) if self._rules == "authors" else to_uint8(self.image)
        return self._extractor.features(pixels)


@runtime_checkable
class Metric(Protocol):
    """One way to compare images, accumulated over batches and ranks."""

    def update(
        self, original: Original, decoded: Decoded, positions: Int64[Tensor, "b"], /
    ) -> None:
        """Add a batch; a value that is not finite is a ValueError.

        Args:
            original: images.
            decoded: what came back.
            positions: of the images among all images.
        """
        ...

    def compute(self, reference: Gaussian | None, /) -> dict[str, float]:
        """Numbers by name, over all ranks; every rank must call.

        Args:
            reference: of the original images; None leaves out what needs it.
        """
        ...


class Psnr:
    """Peak signal-to-noise ratio: its mean, and each image's.

    The mean is infinite as soon as one image came back exactly; `num_exact` counts those, and where
    there are any, `psnr_finite` is the mean of the others.
    """

    def __init__(self, *, truncated: bool) -> None:
        """Args: truncated: cut pixels to whole numbers, as the authors do, instead of rounding."""
        self._truncated = truncated
        self._mean = Mean("psnr", infinite=True)
        self.rows = Rows("psnr", infinite=True)
        """PSNR of each image, one column."""

    def update(self, original: Original, decoded: Decoded, positions: Int64[Tensor, "b"]) -> None:
        """Add a batch."""
        values = psnr(original.image, decoded.image, truncated=self._truncated)
        self._mean.update(values)
        self.rows.update(values[:, None], positions)

    def compute(self, reference: Gaussian | None) -> dict[str, float]:  # noqa: ARG002 - none needed
        """The mean, and how many came back exactly."""
        average = self._mean.compute()
        numbers = {"psnr": average.mean, "num_exact": float(average.num_infinite)}
        if 0 < average.num_infinite < average.num_items:
            numbers["psnr_finite"] = average.finite_mean
        return numbers


class MeanOf:
    """Mean of one number for each image."""

    def __init__(
        self, name: str, measure: Callable[[Original, Decoded], Float[Tensor, "b"]]
    ) -> None:
        """Args: name: of the number; measure: gives it for each image of a batch."""
        self._name, self._measure = name, measure
        # From the start: a rank that gets no image takes part in every sum.
        self._mean = Mean(name)

    def update(
        self,
        original: Original,
        decoded: Decoded,
        positions: Int64[Tensor, "b"],  # noqa: ARG002 - as of other metrics
    ) -> None:
        """Add a batch."""
        self._mean.update(self._measure(original, decoded))

    def compute(self, reference: Gaussian | None) -> dict[str, float]:  # noqa: ARG002 - none needed
        """The mean."""
        return {self._name: self._mean.compute().mean}


class Frechet:
    """Frechet distance of decoded images' features to those of a reference."""

    def __init__(self, extractor: FeatureExtractor) -> None:
        """Args: extractor: network that the features are of."""
        self._name = extractor.metric_name("frechet")
        self._statistics = FrechetStatistics(extractor.dim)

    def update(
        self,
        original: Original,  # noqa: ARG002 - as of other metrics
        decoded: Decoded,
        positions: Int64[Tensor, "b"],  # noqa: ARG002
    ) -> None:
        """Add a batch."""
        if decoded.features is not None:
            self._statistics.update(decoded.features)

    def compute(self, reference: Gaussian | None) -> dict[str, float]:
        """The distance; nothing without a reference."""
        if reference is None:
            return {}
        return {self._name: frechet_distance(reference, self._statistics.compute())}


class Seams:
    """Seams between patches that are decoded each by itself, and detail inside them.

    `seam_ratio` is the mean absolute difference of pixels across borders of patches over that
    inside patches, in proportion to the same of the originals: 1 is no seams. `sharpness` is the
    energy of differences inside patches, likewise: below 1 is blur. Both are of the sums over all
    images; a number is left out where the images it is a share of are flat.

    Source: Yue et al. 2025, "UniFlow" (arXiv:2510.10575), whose decoder of patches has seams
    without blocks among all cells.
    """

    def __init__(self, side: int) -> None:
        """Args: side: pixels per side of a patch."""
        self._side = side
        self._sums = torch.zeros(2, 3, dtype=torch.float64)
        """Sums of `Steps`, of the originals and of the decoded images."""

    def update(
        self,
        original: Original,
        decoded: Decoded,
        positions: Int64[Tensor, "b"],  # noqa: ARG002 - as of other metrics
    ) -> None:
        """Add a batch."""
        for row, image in enumerate((original.image, decoded.image)):
            self._sums[row] += torch.stack(patch_steps(image, self._side)).sum(-1)

    def compute(self, reference: Gaussian | None) -> dict[str, float]:  # noqa: ARG002 - none needed
        """Both ratios. There are as many borders in both, so sums are as good as means."""
        originals, images = distributed.sum(self._sums).tolist()
        numbers = {}
        if originals[0] > 0 and images[1] > 0:
            numbers["seam_ratio"] = images[0] / images[1] * originals[1] / originals[0]
        if originals[2] > 0:
            numbers["sharpness"] = images[2] / originals[2]
        return numbers


def l1(original: Original, decoded: Decoded) -> Float[Tensor, "b"]:
    """Mean absolute difference of each image, in units of [-1, 1]."""
    return (original.image - decoded.image).abs().mean((1, 2, 3))


def standard_metrics(
    perceptual: Perceptual | None, extractor: FeatureExtractor | None, rules: Rules
) -> list[Metric]:
    """Every metric of images that these networks allow, in the order of tables.

    Args:
        perceptual: network for LPIPS; None leaves it out.
        extractor: network for feature cosine and Frechet distance; None leaves them out.
        rules: how images are compared.
    """
    is_authors = rules == "authors"
    similarity = authors_ssim if is_authors else ssim
    metrics: list[Metric] = [
        Psnr(truncated=is_authors),
        MeanOf("ssim", lambda original, decoded: similarity(original.image, decoded.image)),
        MeanOf("l1", l1),
    ]
    if perceptual is not None:
        metrics.append(MeanOf("lpips", functools.partial(_lpips, perceptual)))
    if extractor is not None:
        metrics += [MeanOf(cosine_name(extractor), _cosine), Frechet(extractor)]
    return metrics


def _lpips(network: Perceptual, original: Original, decoded: Decoded) -> Float[Tensor, "b"]:
    """LPIPS of each image."""
    taps = network.taps(original.image) if original.taps is None else original.taps
    return network.between(taps, network.taps(decoded.image))


def _cosine(original: Original, decoded: Decoded) -> Float[Tensor, "b"]:
    """Cosine between an extractor's features of each image.

    Raises:
        ValueError: there are no features to compare.
    """
    if original.features is None or decoded.features is None:
        raise ValueError("the feature cosine needs features of both originals and decoded images")
    return feature_cosine(original.features, decoded.features)


def cosine_name(extractor: FeatureExtractor) -> str:
    """Name of the mean cosine between an extractor's features."""
    return f"feature_cosine_{extractor.name}"


class Comparison:
    """Likeness of decoded images to their originals, over images that arrive in batches."""

    def __init__(
        self,
        metrics: Sequence[Metric],
        extractor: FeatureExtractor | None = None,
        rules: Rules = "own",
    ) -> None:
        """Compare by these metrics.

        Args:
            metrics: see `standard_metrics`.
            extractor: network whose features of decoded images they read; None is none.
            rules: how pixels of decoded images are rounded for it.
        """
        self.metrics = metrics
        self.num_images = torch.zeros(1, dtype=torch.float64)
        """Images of this rank so far."""
        self._extractor = extractor
        self._rules: Rules = rules

    @torch.no_grad()
    def update(
        self,
        original: Original,
        decoded: Float[Tensor, "b 3 h w"],
        positions: Int64[Tensor, "b"],
    ) -> None:
        """Add a batch; a value that is not finite is a ValueError.

        Args:
            original: images, as `Originals` with the same networks gave them.
            decoded: what came back; clipped to [-1, 1].
            positions: of the images among all images.
        """
        batch = Decoded(decoded.float().clamp(-1, 1), self._extractor, self._rules)
        for metric in self.metrics:
            metric.update(original, batch, positions)
        self.num_images += len(positions)

    @property
    def psnr(self) -> Rows:
        """PSNR of each image.

        Raises:
            ValueError: it is not among the metrics.
        """
        for metric in self.metrics:
            if isinstance(metric, Psnr):
                return metric.rows
        raise ValueError("PSNR is not among the metrics of this comparison")

    def compute(self, reference: Gaussian | None = None) -> dict[str, float]:
        """Numbers of every metric by name, over all ranks; every rank must call.

        Args:
            reference: of the original images, for the Frechet distance; None leaves it out.
        """
        return {
            name: value
            for metric in self.metrics
            for name, value in metric.compute(reference).items()
        }


def comparison(
    perceptual: Perceptual | None = None,
    extractor: FeatureExtractor | None = None,
    rules: Rules = "own",
    patch_size: int | None = None,
) -> Comparison:
    """A comparison by all of `standard_metrics`, and by `Seams` of patches of a size."""
    metrics = standard_metrics(perceptual, extractor, rules)
    if patch_size is not None and patch_size > 1:
        metrics.append(Seams(patch_size))
    return Comparison(metrics, extractor, rules)
