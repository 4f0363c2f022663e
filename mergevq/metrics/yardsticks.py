"""Reconstructions that take no training by gradients: what a tokenizer should be held against.

Each is made of training images and tried on others: the mean image, the mean image of the class,
the nearest training image, and a linear codec, which is principal components of whole images with
a scalar quantizer for each. Their bits are those that a receiver needs who has the training images.

Shape letters: N training images, P numbers of an image, M components.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from jaxtyping import Float, Int64, UInt8
from torch import Tensor

Decode = Callable[[Float[Tensor, "b 3 h w"], Int64[Tensor, "b"]], Float[Tensor, "b 3 h w"]]
"""From images in [-1, 1] and their classes to their reconstructions."""
_LLOYD_STEPS = 20
"""Rounds of fitting levels; after these they move by less than a byte of a pixel."""
_LEAST_GAIN = 1e-12
"""Share of the variance below which a gain is one of rounding."""
_IMAGES_PER_LEVEL = 4
"""Least training images for each level of a component: fewer would be learned by heart."""


class Yardstick(NamedTuple):
    """One reconstruction, and its price."""

    name: str
    bits: float
    """Bits of one image."""
    decode: Decode


class TrainingImages(NamedTuple):
    """Images that yardsticks are made of."""

    pixels: UInt8[Tensor, "n 3 h w"]
    label: Int64[Tensor, "n"]
    """Class; -1 for none."""
    num_classes: int

    @property
    def flat(self) -> Float[Tensor, "n p"]:
        """Images in [-1, 1], a row each."""
        return self.pixels.flatten(1).float() / 127.5 - 1


def yardsticks(images: TrainingImages, budgets: list[int]) -> list[Yardstick]:
    """All that there are for these images.

    Args:
        images: of training.
        budgets: bits of the linear codec, which spends no more where images are too few for more
            levels.
    """
    shape = images.pixels.shape[1:]
    flat = images.flat
    mean = flat.mean(0).reshape(shape)
    found = [
        Yardstick("mean image", 0.0, lambda image, _: mean.expand(len(image), *shape)),
    ]
    # Of images without classes, and of classes without images, there is no mean.
    if images.num_classes > 1 and set(range(images.num_classes)) == set(images.label.tolist()):
        means = class_means(flat, images.label, images.num_classes)
        found.append(
            Yardstick(
                "class mean",
                math.log2(images.num_classes),
                lambda image, label: means[label].reshape(image.shape),
            )
        )
    found.append(
        Yardstick(
            "nearest training image",
            math.log2(len(flat)),
            lambda image, _: flat[nearest(flat, image.flatten(1))].reshape(image.shape),
        )
    )
    if len(flat) < 2 * _IMAGES_PER_LEVEL:
        return found
    codec = fit_linear_codec(flat, max(budgets, default=0))
    return found + [
        Yardstick(
            "principal components",
            float(bits),
            lambda image, _, bits=bits: codec.decode(image.flatten(1), bits).reshape(image.shape),
        )
        for bits in sorted({min(bits, len(codec.order)) for bits in budgets})
    ]


def class_means(
    flat: Float[Tensor, "n p"], label: Int64[Tensor, "n"], num_classes: int
) -> Float[Tensor, "c p"]:
    """Mean image of each class; every class must have an image."""
    sums = torch.zeros(num_classes, flat.shape[1]).index_add_(0, label, flat)
    return sums / torch.bincount(label, minlength=num_classes)[:, None]


def nearest(flat: Float[Tensor, "n p"], image: Float[Tensor, "b p"]) -> Int64[Tensor, "b"]:
    """Position of the training image at the least squared distance, the first of equal ones."""
    return (flat.square().sum(1) - 2 * image @ flat.mT).argmin(1)


class LinearCodec(NamedTuple):
    """Principal components of images, with a scalar quantizer for each.

    Bits are given one by one, each to the component that gains most by it over the training images.
    """

    mean: Float[Tensor, "p"]
    components: Float[Tensor, "p m"]
    order: list[int]
    """Component that gets the n-th bit."""
    levels: dict[tuple[int, int], Float[Tensor, "_"]]
    """Levels of a component, ascending, by its number and its bits."""

    def decode(self, flat: Float[Tensor, "b p"], bits: int) -> Float[Tensor, "b p"]:
        """Images as they come back from so many bits, at most as many as were given."""
        coordinates = ((flat - self.mean) @ self.components).double()
        result = torch.zeros_like(coordinates)
        given = torch.bincount(
            torch.tensor(self.order[:bits], dtype=torch.int64), minlength=coordinates.shape[1]
        )
        for number, count in enumerate(given.tolist()):
            if count:
                levels = self.levels[number, count]
                result[:, number] = levels[_cells(coordinates[:, number].contiguous(), levels)]
        return self.mean + (result.float() @ self.components.mT)


def fit_linear_codec(flat: Float[Tensor, "n p"], max_bits: int) -> LinearCodec:
    """Principal components of images and the levels of each.

    Args:
        flat: at least 8 images in [-1, 1], a row each.
        max_bits: most bits of an image; fewer are given where there are not images enough to fit
            more levels to.
    """
    mean = flat.mean(0)
    components = _principal(flat - mean)[:, : max(1, max_bits)]
    coordinates = ((flat - mean) @ components).double().mT.contiguous().sort(1).values
    num_bits = int(math.log2(len(flat) / _IMAGES_PER_LEVEL))
    distortion = coordinates.square().mean(1).tolist()
    levels: dict[tuple[int, int], Float[Tensor, "_"]] = {}
    counts, after = [0] * len(distortion), [0.0] * len(distortion)
    least = _LEAST_GAIN * sum(distortion)

    def prepare(number: int) -> float:
        """Gain of one more bit; none where there are not images enough."""
        bits = counts[number] + 1
        if bits > num_bits:
            return 0.0
        levels[number, bits], after[number] = fit_levels(coordinates[number], bits)
        return distortion[number] - after[number]

    gains = [prepare(number) for number in range(len(distortion))]
    order = []
    while len(order) < max_bits and max(gains) > least:
        number = gains.index(max(gains))
        order.append(number)
        counts[number] += 1
        distortion[number] = after[number]
        gains[number] = prepare(number)
    return LinearCodec(mean, components, order, levels)


def _principal(centred: Float[Tensor, "n p"]) -> Float[Tensor, "p m"]:
    """Orthonormal principal components of centred rows, by falling variance, without empty ones."""
    centred = centred.double()
    if len(centred) >= centred.shape[1]:
        variances, components = torch.linalg.eigh(centred.mT @ centred)
    else:
        # Fewer images than numbers: the products of images among themselves are the smaller table.
        variances, weights = torch.linalg.eigh(centred @ centred.mT)
        components = centred.mT @ weights / variances.clamp_min(1e-300).sqrt()
    keep = variances > 1e-9 * variances[-1]
    return components[:, keep].flip(1).float()


def fit_levels(ordered: Float[Tensor, "n"], num_bits: int) -> tuple[Float[Tensor, "_"], float]:
    """Levels of a scalar quantizer with the least mean squared error (Lloyd-Max), and that error.

    Args:
        ordered: numbers, ascending, in float64.
        num_bits: of one number; there are two to the power of these levels.

    Source: Lloyd 1982, "Least squares quantization in PCM".
    """
    count = 2**num_bits
    places = (torch.arange(count, dtype=torch.float64) + 0.5) / count * len(ordered)
    levels = ordered[places.long()]
    zero = torch.zeros(1, dtype=torch.float64)
    sums = torch.cat([zero, ordered.cumsum(0)])
    for _ in range(_LLOYD_STEPS):
        ends = torch.searchsorted(ordered, (levels[1:] + levels[:-1]) / 2)
        ends = torch.cat([ends.new_zeros(1), ends, ends.new_full((1,), len(ordered))])
        sizes = ends.diff()
        # A level that nothing is near stays where it is.
        levels = torch.where(sizes > 0, sums[ends].diff() / sizes.clamp_min(1), levels)
    error = (ordered - levels[_cells(ordered, levels)]).square().mean()
    return levels, float(error)


def _cells(numbers: Float[Tensor, "n"], levels: Float[Tensor, "_"]) -> Int64[Tensor, "n"]:
    """Position of the nearest level, which are ascending."""
    return torch.searchsorted((levels[1:] + levels[:-1]) / 2, numbers)
