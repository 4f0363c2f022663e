"""Metrics of reconstructions and of codes: per image first, then one mean over all images.

Source: Wang et al. 2004, "Image Quality Assessment: From Error Visibility to Structural
Similarity", section III (doi:10.1109/TIP.2003.819861).

Differs: PSNR is of each image and then averaged; the authors' evaluation takes one PSNR of a whole
batch, which is lower and depends on how images fall into batches. Codebook usage is of a window of
tokens at least as long as the codebook, not of a batch.

Shape letters: B batch, H and W pixels, L grid cells, D feature channels or bits of a token.

Functions give one value per image; accumulators take them batch by batch (`update`) and give the
result over all ranks (`compute`, which every rank must call and which changes nothing).
"""

import math
from typing import NamedTuple

import torch
from jaxtyping import Float, Int64, Shaped, UInt8
from torch import Tensor

from mergevq.runtime import distributed

_HAIR = 1e-3
"""Part of a byte that float32 may lose between bytes and [-1, 1]."""


def require_finite(name: str, values: Shaped[Tensor, "b *rest"], first: int) -> None:
    """Refuse NaN and infinity.

    Args:
        name: of the metric, for the message.
        values: one item per row.
        first: number of the first row among all items seen.

    Raises:
        ValueError: an item is not finite; the message names the metric and the item.
    """
    bad = ~values.isfinite().reshape(len(values), math.prod(values.shape[1:])).all(1)
    items = bad.nonzero()[:, 0].tolist()
    if items:
        raise ValueError(
            f"{name}: item {first + items[0]} is not finite ({len(items)} of {len(values)} in "
            "this batch); a metric of such values means nothing"
        )


def to_uint8(
    image: Float[Tensor, "*b 3 h w"], *, truncated: bool = False
) -> UInt8[Tensor, "*b 3 h w"]:
    """The pixels a saved file would hold: [-1, 1] becomes 0..255, rounded, clipped outside.

    A pixel that is not finite is a ValueError.

    Args:
        image: any shape.
        truncated: cut off what is behind the point instead of rounding, as the authors' code does.
    """
    pixels = to_pixels(image)
    # A byte that became float32 and comes back a hair smaller is still that byte.
    return ((pixels + _HAIR).floor() if truncated else pixels.round()).to(torch.uint8)


def to_pixels(image: Float[Tensor, "*b 3 h w"]) -> Float[Tensor, "*b 3 h w"]:
    """[-1, 1] as 0..255, between bytes too, clipped outside.

    A pixel that is not finite is a ValueError.
    """
    require_finite("image", image, 0)
    return ((image.float() + 1) * 127.5).clamp(0, 255)


def psnr(
    image: Float[Tensor, "b 3 h w"],
    reconstruction: Float[Tensor, "b 3 h w"],
    *,
    rounded: bool = True,
    truncated: bool = False,
) -> Float[Tensor, "b"]:
    """Peak signal-to-noise ratio of each image, in dB; infinite where nothing differs.

    A pixel that is not finite is a ValueError.

    Args:
        image: in [-1, 1].
        reconstruction: in [-1, 1].
        rounded: compare the pixels that saved files would hold; else the values as they are,
            whose range is 2.
        truncated: where rounded, as in `to_uint8`.
    """
    first, second, data_range = _comparable(
        "psnr", image, reconstruction, rounded=rounded, truncated=truncated
    )
    mean_squared_error = (first - second).square().mean((1, 2, 3))
    return (10 * torch.log10(data_range**2 / mean_squared_error)).float()


def ssim(
    image: Float[Tensor, "b 3 h w"],
    reconstruction: Float[Tensor, "b 3 h w"],
    *,
    rounded: bool = True,
) -> Float[Tensor, "b"]:
    """Structural similarity of each image, mean over colours and positions, 1 where equal.

    An 11x11 Gaussian window of standard deviation 1.5, population covariance, only windows that
    lie inside the image, K1 = 0.01 and K2 = 0.03: what scikit-image computes with
    `gaussian_weights=True, sigma=1.5, use_sample_covariance=False`.

    Args:
        image: in [-1, 1], at least 11 pixels on each side.
        reconstruction: in [-1, 1].
        rounded: compare the pixels that saved files would hold; else the values as they are,
            whose range is 2.

    Raises:
        ValueError: the image is smaller than the window, or a pixel is not finite.
    """
    height, width = image.shape[-2:]
    if min(height, width) < 11:
        raise ValueError(
            f"image of {height}x{width} pixels must be at least as large as the 11x11 window of "
            "SSIM; report PSNR alone"
        )
    pair = _comparable("ssim", image, reconstruction, rounded=rounded, truncated=False)
    offsets = torch.arange(-5, 6, dtype=torch.float64)
    weights = torch.exp(-0.5 * (offsets / 1.5) ** 2)
    return _similarity(pair, weights / weights.sum(), 1.0)


def authors_ssim(
    image: Float[Tensor, "b 3 h w"], reconstruction: Float[Tensor, "b 3 h w"]
) -> Float[Tensor, "b"]:
    """Structural similarity as the authors' evaluation takes it, for numbers beside theirs.

    Of bytes that are cut off, not rounded; a uniform window of 7x7, sample covariance (divided by
    48): what scikit-image computes by default with `data_range=255`.

    Args:
        image: in [-1, 1], at least 7 pixels on each side.
        reconstruction: in [-1, 1].

    Raises:
        ValueError: the image is smaller than the window, or a pixel is not finite.
    """
    height, width = image.shape[-2:]
    if min(height, width) < 7:
        raise ValueError(
            f"image of {height}x{width} pixels must be at least as large as the 7x7 window of SSIM"
        )
    pair = _comparable("ssim", image, reconstruction, rounded=True, truncated=True)
    return _similarity(pair, torch.full((7,), 1 / 7, dtype=torch.float64), 49 / 48)


def _similarity(
    pair: "_Pair", weights: Float[Tensor, "w"], correction: float
) -> Float[Tensor, "b"]:
    """SSIM with a window of these weights along each side.

    Args:
        pair: two images.
        weights: summing to one.
        correction: factor of variances and covariance.
    """
    first, second, data_range = pair

    def blur(planes: Tensor) -> Tensor:
        return _blur(planes, weights)

    first_mean, second_mean = blur(first), blur(second)
    # Only the sum of the two variances counts, and the mean of a sum is one window less.
    squares = blur(first.square().addcmul_(second, second))
    covariance = blur(first * second)
    luminance_floor, contrast_floor = (0.01 * data_range) ** 2, (0.03 * data_range) ** 2
    # In place: at a size above the processor's cache, fresh memory costs more than arithmetic.
    product = first_mean * second_mean
    mean_squares = first_mean.square_().addcmul_(second_mean, second_mean)
    variances = squares.sub_(mean_squares).mul_(correction).add_(contrast_floor)
    structure = covariance.sub_(product).mul_(2 * correction).add_(contrast_floor).div_(variances)
    luminance = product.mul_(2).add_(luminance_floor).div_(mean_squares.add_(luminance_floor))
    return luminance.mul_(structure).mean((1, 2, 3)).float()


class Steps(NamedTuple):
    """Differences between neighbouring pixels: sums over both directions and all colours."""

    border: Float[Tensor, "b"]
    """Absolute differences across borders of patches."""
    inside: Float[Tensor, "b"]
    """Those between pixels of one patch."""
    energy: Float[Tensor, "b"]
    """Squares of these."""


def patch_steps(image: Float[Tensor, "b 3 h w"], side: int) -> Steps:
    """Differences of each image between pixels that touch at a side, by patches from its corner.

    A pixel that is not finite is a ValueError.

    Args:
        image: any range.
        side: pixels per side of a patch.
    """
    require_finite("patch_steps", image, 0)
    sums = torch.zeros(3, len(image), dtype=torch.float64)
    for dim in (2, 3):
        # Float32 on the device, as in other sums over pixels; sums over images are float64.
        step = image.float().diff(dim=dim)
        is_border = torch.arange(1, step.shape[dim] + 1, device=image.device) % side == 0
        border, inside = (
            step.index_select(dim, chosen.nonzero()[:, 0]) for chosen in (is_border, ~is_border)
        )
        parts = (border.abs(), inside.abs(), inside.square())
        sums += torch.stack([part.sum((1, 2, 3)).cpu().double() for part in parts])
    return Steps(*sums)


def feature_cosine(
    features: Float[Tensor, "b d"], reconstructed_features: Float[Tensor, "b d"]
) -> Float[Tensor, "b"]:
    """Cosine between each image's features and those of its reconstruction, 1 where parallel.

    Raises:
        ValueError: a feature is not finite, or all features of an image are zero.
    """
    units = []
    for tensor in (features, reconstructed_features):
        require_finite("feature_cosine", tensor, 0)
        norm = tensor.float().norm(dim=-1, keepdim=True)
        zero = (norm[:, 0] == 0).nonzero()[:, 0].tolist()
        if zero:
            raise ValueError(f"feature_cosine: the features of item {zero[0]} are all zero")
        units.append(tensor.float() / norm)
    return (units[0] * units[1]).sum(-1).clamp(-1, 1)


class Average(NamedTuple):
    """A mean over items, and over how many."""

    mean: float
    """Infinite as soon as one item is."""
    finite_mean: float
    """Over the finite items alone; NaN where there is none."""
    num_items: int
    """All items, finite or not."""
    num_infinite: int
    """Infinite items: for PSNR the images that were reproduced exactly."""


class Mean:
    """Mean over items that arrive in batches of any size: sums and counts, in float64.

    Args:
        name: of the metric, for error messages.
        infinite: accept +inf items, as PSNR has for identical images.
    """

    def __init__(self, name: str, *, infinite: bool = False) -> None:
        self.name = name
        self.infinite = infinite
        self.state: Float[Tensor, "3"] = torch.zeros(3, dtype=torch.float64)
        """Sum of the finite items, their number, number of infinite items; states add up."""

    def update(self, values: Float[Tensor, "b"], counts: Int64[Tensor, "b"] | None = None) -> None:
        """Add one value per item.

        A value that is NaN, or infinite where that is no possible result, is a ValueError.

        Args:
            values: of the items.
            counts: how many items each value is already the mean of; None is one.
        """
        values = values.detach().cpu().double()
        counts = torch.ones(len(values), dtype=torch.int64) if counts is None else counts.cpu()
        infinite = (values == math.inf) if self.infinite else torch.zeros_like(values).bool()
        finite_values = values.masked_fill(infinite, 0)
        require_finite(self.name, finite_values, int(self.state[1:].sum()))
        num_infinite = counts[infinite].sum()
        self.state += torch.stack(
            [(finite_values * counts).sum(), counts.sum() - num_infinite, num_infinite]
        )

    def merge(self, other: "Mean") -> None:
        """Add what another accumulator of the same metric has seen."""
        self.state += other.state

    def compute(self) -> Average:
        """Mean over every item of every rank.

        Raises:
            ValueError: there was no item.
        """
        total, num_finite, num_infinite = distributed.sum(self.state).tolist()
        if num_finite + num_infinite == 0:
            raise ValueError(f"{self.name} has seen no item; there is no mean to give")
        finite_mean = total / num_finite if num_finite else math.nan
        return Average(
            mean=math.inf if num_infinite else finite_mean,
            finite_mean=finite_mean,
            num_items=int(num_finite + num_infinite),
            num_infinite=int(num_infinite),
        )


class _Pair(NamedTuple):
    """Two images made comparable, and the range of their pixels."""

    first: Float[Tensor, "b 3 h w"]
    second: Float[Tensor, "b 3 h w"]
    data_range: float


def _comparable(
    name: str,
    image: Float[Tensor, "b 3 h w"],
    reconstruction: Float[Tensor, "b 3 h w"],
    *,
    rounded: bool,
    truncated: bool,
) -> _Pair:
    """Both images in float64, as files would hold them or as they are."""
    require_finite(f"{name} (image)", image, 0)
    require_finite(f"{name} (reconstruction)", reconstruction, 0)
    first, second = image.detach(), reconstruction.detach()
    if rounded:
        first, second = (to_uint8(each, truncated=truncated) for each in (first, second))
    if first.device.type == "mps":
        # MPS has no float64, and the variances of SSIM are differences that float32 would blur.
        first, second = first.cpu(), second.cpu()
    return _Pair(first.double(), second.double(), 255.0 if rounded else 2.0)


def _blur(
    planes: Float[Tensor, "b c h w"], weights: Float[Tensor, "k"]
) -> Float[Tensor, "b c h-k+1 w-k+1"]:
    """Weighted mean of each square window that lies inside the image."""
    return _slide(_slide(planes, weights, 2), weights, 3)


def _slide(
    planes: Float[Tensor, "b c h w"], weights: Float[Tensor, "k"], dim: int
) -> Float[Tensor, "b c _ _"]:
    """Weighted mean of each window along one side.

    One multiplication and addition of whole planes for each weight: the cost grows with the number
    of pixels, and a convolution in float64 has no fast path on a CPU.
    """
    count = planes.shape[dim] - len(weights) + 1
    first, *others = weights.tolist()
    total = first * planes.narrow(dim, 0, count)
    for start, weight in enumerate(others, start=1):
        total.add_(planes.narrow(dim, start, count), alpha=weight)
    return total
