"""Metrics of images and of sets of images, against their definitions written down as they stand."""

import torch
from torch import Tensor

from benchmarks.entry import Entry, Pair
from mergevq.metrics.image import authors_ssim, ssim, to_uint8
from mergevq.metrics.sets import kernel_distance, precision_recall

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


# ------------------------------------------------------------------------ sets of images


def features(count: int, dim: int, seed: int) -> Tensor:
    """Not negative and alike, as features of Inception are."""
    generator = torch.Generator().manual_seed(seed)
    basis = torch.rand(64, dim, generator=generator) ** 4
    mixed = torch.rand(count, 64, generator=generator) @ basis / 64
    return mixed + 0.3 * torch.rand(count, dim, generator=generator) ** 3


def kernel_distance_pair(count: int, dim: int, num_subsets: int) -> Pair:
    """Subsets of float64, as the formula has them."""
    real, fake = features(count, dim, 0), features(count, dim, 1)
    size = count // 2

    def kernel(x: Tensor, y: Tensor) -> Tensor:
        return (x @ y.T / dim + 1) ** 3

    def plain() -> float:
        generator, distances = torch.Generator().manual_seed(0), []
        for _ in range(num_subsets):
            x, y = (
                side[torch.randperm(count, generator=generator)[:size]].double()
                for side in (real, fake)
            )
            within = [k.sum() - k.trace() for k in (kernel(x, x), kernel(y, y))]
            mean = sum(within) / (size * (size - 1))
            distances.append(mean - 2 * kernel(x, y).mean())
        return float(torch.stack(distances).mean())

    def ours() -> float:
        generator = torch.Generator().manual_seed(0)
        options = {"num_subsets": num_subsets, "subset_size": size, "generator": generator}
        return kernel_distance(real, fake, **options).mean

    def agree(plain: float, ours: float) -> None:
        assert abs(plain - ours) < 1e-6 * float(kernel(real[:64], fake[:64]).mean())

    return Pair(plain, ours, agree)


def precision_recall_pair(count: int, dim: int) -> Pair:
    """All distances in float64, a block of rows at a time."""
    real, fake = features(count, dim, 0), features(count, dim, 1)

    def distances(x: Tensor, y: Tensor) -> list[Tensor]:
        return [
            (rows.square().sum(1)[:, None] + y.square().sum(1) - 2 * rows @ y.T).clamp_min(0)
            for rows in x.split(1024)
        ]

    def covered(points: Tensor, members: Tensor) -> float:
        radii = torch.cat([d.kthvalue(4, dim=1).values for d in distances(members, members)])
        inside = [(d <= radii).any(1) for d in distances(points, members)]
        return float(torch.cat(inside).double().mean())

    def plain() -> tuple[float, float]:
        x, y = real.double(), fake.double()
        return covered(y, x), covered(x, y)

    def agree(plain: tuple[float, float], ours: tuple[float, float]) -> None:
        assert plain == ours

    return Pair(plain, lambda: tuple(precision_recall(real, fake)), agree)


ENTRIES = (
    Entry("SSIM, 16 images of 64 px", lambda: ssim_pair(16, 64)),
    Entry("SSIM, 4 images of 256 px", lambda: ssim_pair(4, 256)),
    Entry("SSIM, 1 image of 512 px", lambda: ssim_pair(1, 512)),
    Entry("SSIM of the authors' protocol, 1 image of 512 px", lambda: authors_ssim_pair(1, 512)),
    Entry("kernel distance, 2 subsets of 500 x 2,048", lambda: kernel_distance_pair(1000, 2048, 2)),
    Entry(
        "kernel distance, 1 subset of 1,000 x 2,048", lambda: kernel_distance_pair(2000, 2048, 1)
    ),
    Entry("precision and recall, 1,000 x 2,048", lambda: precision_recall_pair(1000, 2048)),
    Entry("precision and recall, 2,000 x 2,048", lambda: precision_recall_pair(2000, 2048)),
)
