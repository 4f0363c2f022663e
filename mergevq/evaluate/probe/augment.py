"""Changes of training pictures for fine-tuning: RandAugment and random erasing.

Source: Cubuk et al. 2020, "RandAugment", section 3 (arXiv:1909.13719); Zhong et al. 2020, "Random
Erasing Data Augmentation", section 3 (arXiv:1708.04896). Ranges and shares are those that Xie et
al. 2022, "SimMIM", appendix A (arXiv:2111.09886) fine-tunes with: two of 15 operations, each done
half of the time, of a strength around 9 of 10 with a deviation of 0.5; erasing of a quarter of the
images.

Differs: posterising keeps at least one bit, so that no picture becomes black.

Shape letters: B images, H and W pixels.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from PIL import Image, ImageEnhance, ImageOps
from torch import Tensor

_NUM_OPERATIONS = 2
_PROBABILITY = 0.5
_DEVIATION = 0.5
_STRONGEST = 10.0
_FILL = (124, 116, 104)
"""Colour outside of a picture that was moved: the mean of ImageNet."""
_ERASED_AREA = (0.02, 1 / 3)
"""Smallest and largest share of the area that is erased."""
_ERASED_ASPECT = (0.3, 1 / 0.3)
"""Smallest and largest height over width of what is erased."""
_NOISE = (-0.1, 0.45)
"""Mean and deviation of what an erased part shows: ImageNet's, in [-1, 1]."""

Operation = Callable[[Image.Image, float], Image.Image]
"""Changes an RGB picture by a strength from 0 to 1, which may have a minus sign."""


def rotate(image: Image.Image, strength: float) -> Image.Image:
    """Rotate against the clock by up to 30 degrees."""
    return image.rotate(30 * strength, Image.Resampling.BICUBIC, fillcolor=_FILL)


def shear_x(image: Image.Image, strength: float) -> Image.Image:
    """Take each row from further right the lower it is, by up to 0.3 pixels a row."""
    return _affine(image, (1.0, 0.3 * strength, 0.0, 0.0, 1.0, 0.0))


def shear_y(image: Image.Image, strength: float) -> Image.Image:
    """Take each column from further down the more it lies to the right, by up to 0.3 pixels."""
    return _affine(image, (1.0, 0.0, 0.0, 0.3 * strength, 1.0, 0.0))


def translate_x(image: Image.Image, strength: float) -> Image.Image:
    """Move to the left by up to 0.45 of the width."""
    return _affine(image, (1.0, 0.0, 0.45 * strength * image.width, 0.0, 1.0, 0.0))


def translate_y(image: Image.Image, strength: float) -> Image.Image:
    """Move up by up to 0.45 of the height."""
    return _affine(image, (1.0, 0.0, 0.0, 0.0, 1.0, 0.45 * strength * image.height))


def color(image: Image.Image, strength: float) -> Image.Image:
    """Strengthen colours by up to 0.9, or with a minus sign fade them."""
    return ImageEnhance.Color(image).enhance(1 + 0.9 * strength)


def contrast(image: Image.Image, strength: float) -> Image.Image:
    """Raise or lower the contrast by up to 0.9."""
    return ImageEnhance.Contrast(image).enhance(1 + 0.9 * strength)


def brightness(image: Image.Image, strength: float) -> Image.Image:
    """Raise or lower the brightness by up to 0.9."""
    return ImageEnhance.Brightness(image).enhance(1 + 0.9 * strength)


def sharpness(image: Image.Image, strength: float) -> Image.Image:
    """Sharpen or blur by up to 0.9."""
    return ImageEnhance.Sharpness(image).enhance(1 + 0.9 * strength)


def autocontrast(image: Image.Image, _strength: float) -> Image.Image:
    """Stretch each channel to the whole range."""
    return ImageOps.autocontrast(image)


def equalize(image: Image.Image, _strength: float) -> Image.Image:
    """Give each channel an even histogram."""
    return ImageOps.equalize(image)


def invert(image: Image.Image, _strength: float) -> Image.Image:
    """Replace each value by 255 minus it."""
    return ImageOps.invert(image)


def posterize(image: Image.Image, strength: float) -> Image.Image:
    """Keep the highest 4 bits of each value, or down to 1."""
    return ImageOps.posterize(image, max(1, 4 - int(4 * strength)))


def solarize(image: Image.Image, strength: float) -> Image.Image:
    """Invert the values from a threshold on, which falls from 256 to 0."""
    return ImageOps.solarize(image, 256 - int(256 * strength))


def solarize_add(image: Image.Image, strength: float) -> Image.Image:
    """Add up to 110 to the values below 128."""
    added = int(110 * strength)
    table = [min(255, value + added) if value < 128 else value for value in range(256)]
    return image.point(table * 3)


SIGNED: tuple[Operation, ...] = (
    rotate,
    shear_x,
    shear_y,
    translate_x,
    translate_y,
    color,
    contrast,
    brightness,
    sharpness,
)
"""Operations whose strength gets a random sign."""
OPERATIONS: tuple[Operation, ...] = (
    *SIGNED,
    autocontrast,
    equalize,
    invert,
    posterize,
    solarize,
    solarize_add,
)
"""All operations, each as likely as the others."""


def _affine(
    image: Image.Image, coefficients: tuple[float, float, float, float, float, float]
) -> Image.Image:
    """Take pixel (x, y) from (a x + b y + c, d x + e y + f)."""
    return image.transform(
        image.size,
        Image.Transform.AFFINE,
        coefficients,
        Image.Resampling.BICUBIC,
        fillcolor=_FILL,
    )


@dataclass(frozen=True, slots=True)
class RandAugment:
    """Two random operations on a picture."""

    magnitude: float
    """Mean strength, from 0 to 10."""

    def __call__(self, image: Image.Image, generator: torch.Generator) -> Image.Image:
        """Change an RGB picture, of which the size stays.

        Args:
            image: RGB.
            generator: draws operations, strengths and signs, as many numbers each time.
        """
        chosen = torch.randint(len(OPERATIONS), (_NUM_OPERATIONS,), generator=generator)
        strengths = self.magnitude + _DEVIATION * torch.randn(_NUM_OPERATIONS, generator=generator)
        happens, signs = torch.rand(2, _NUM_OPERATIONS, generator=generator).tolist()
        for number, strength, draw, sign in zip(
            chosen.tolist(), strengths.tolist(), happens, signs, strict=True
        ):
            operation = OPERATIONS[number]
            share = min(max(strength, 0.0), _STRONGEST) / _STRONGEST
            if operation in SIGNED and sign < 0.5:
                share = -share
            if draw < _PROBABILITY:
                image = operation(image, share)
        return image


def erase(
    image: Float[Tensor, "b 3 h w"], probability: float, generator: torch.Generator
) -> Float[Tensor, "b 3 h w"]:
    """Replace a random rectangle by noise, in each image with the given probability.

    Args:
        image: in [-1, 1]; the result is a copy, in the same range.
        probability: in [0, 1].
        generator: draws everything, on the CPU.
    """
    image = image.clone()
    for row in range(len(image)):
        if float(torch.rand((), generator=generator)) >= probability:
            continue
        top, left, height, width = _rectangle(image.shape[2], image.shape[3], generator)
        noise = torch.randn(3, height, width, generator=generator) * _NOISE[1] + _NOISE[0]
        part = image[row, :, top : top + height, left : left + width]
        part.copy_(noise.clamp(-1, 1))
    return image


def _rectangle(height: int, width: int, generator: torch.Generator) -> tuple[int, int, int, int]:
    """Top, left, height and width of a random rectangle; after ten that do not fit it is empty."""
    (low, high), (flat, tall) = _ERASED_AREA, (math.log(each) for each in _ERASED_ASPECT)
    for _ in range(10):
        draws = torch.rand(4, generator=generator).tolist()
        area = height * width * (low + draws[0] * (high - low))
        aspect = math.exp(flat + draws[1] * (tall - flat))
        rows, columns = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < rows < height and 0 < columns < width:
            top = int(draws[2] * (height - rows + 1))
            left = int(draws[3] * (width - columns + 1))
            return top, left, rows, columns
    return 0, 0, 0, 0
