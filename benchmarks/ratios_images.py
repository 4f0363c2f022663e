"""Metrics of images and of sets of images, against their definitions written down as they stand."""

import torch
from torch import Tensor

from benchmarks.entry import Entry, Pair
from mergevq.metrics.image import authors_ssim, ssim, to_uint8

# ------------------------------------------------------------------------------------- SSIM


def ssim_by_matrices(first: Tensor, second: Tensor, weights: Tensor, correction: float) -> Tensor:
    """SSIM of bytes, each filter a product with the matrix that holds a window in every row."""
    x, y = first.double(), second.double()

    def blur(planes: Tensor) -> Tensor:
        rows, columns = (_windows(length, weights) for length in planes.shape[2:])
        return rows @ planes @ columns.T

    x_mean, y_mean = blur(x), blur(y)
    x_variance = correction * (blur(x * x) - x_mean**2)
    y_variance = correction * (blur(y * y) - y_mean**2)
    covariance = correction * (blur(x * y) - x_mean * y_mean)
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    similarity = (2 * x_mean * y_mean + c1) * (2 * covariance + c2)
    similarity /= (x_mean**2 + y_mean**2 + c1) * (x_variance + y_variance + c2)
    return similarity.mean((1, 2, 3)).float()


def _windows(length: int, weights: Tensor) -> Tensor:
    matrix = torch.zeros(length - len(weights) + 1, length, dtype=torch.float64)
    for start, weight in enumerate(weights.tolist()):
        matrix.diagonal(start).fill_(weight)
    return matrix


def gaussian_window() -> Tensor:
    weights = torch.exp(-0.5 * (torch.arange(-5, 6, dtype=torch.float64) / 1.5) ** 2)
    return weights / weights.sum()


def uniform_window() -> Tensor:
    return torch.full((7,), 1 / 7, dtype=torch.float64)


def images(count: int, side: int) -> tuple[Tensor, Tensor]:
    """Smooth images, and the same with noise, in [-1, 1]."""
    generator = torch.Generator().manual_seed(0)
    coarse = torch.rand(count, 3, 8, 8, generator=generator) * 2 - 1
    image = torch.nn.functional.interpolate(coarse, (side, side), mode="bicubic").clamp(-1, 1)
    noise = torch.randn(image.shape, generator=generator)
    return image, (image + 0.1 * noise).clamp(-1, 1)


def ssim_pair(count: int, side: int) -> Pair:
    image, other = images(count, side)

    def plain() -> Tensor:
        return ssim_by_matrices(to_uint8(image), to_uint8(other), gaussian_window(), 1.0)

    return Pair(plain, lambda: ssim(image, other), torch.testing.assert_close)


def authors_ssim_pair(count: int, side: int) -> Pair:
    image, other = images(count, side)

    def plain() -> Tensor:
        pixels = (to_uint8(each, truncated=True) for each in (image, other))
        return ssim_by_matrices(*pixels, uniform_window(), 49 / 48)

    return Pair(plain, lambda: authors_ssim(image, other), torch.testing.assert_close)


ENTRIES = (
    Entry("SSIM, 16 images of 64 px", lambda: ssim_pair(16, 64)),
    Entry("SSIM, 4 images of 256 px", lambda: ssim_pair(4, 256)),
    Entry("SSIM, 1 image of 512 px", lambda: ssim_pair(1, 512)),
    Entry("SSIM of the authors' protocol, 1 image of 512 px", lambda: authors_ssim_pair(1, 512)),
)
