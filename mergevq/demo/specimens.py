"""A few pictures to click on, for a visitor who has none at hand; drawn here, so nobody's files."""

import math

import torch
from PIL import Image

from mergevq.data.images import ImageDataset, open_images
from mergevq.report.pictures import to_pil
from mergevq.runtime.environment import installed_version

NUM_SPECIMENS = 4


def specimens(
    size: int, dataset: ImageDataset | None = None, *, are_digits: bool = False
) -> list[Image.Image]:
    """Pictures for a page.

    Args:
        size: side in pixels of those that are drawn.
        dataset: the first of these are taken, where there are some.
        are_digits: else handwritten digits of scikit-learn are, where it is installed.
    """
    if dataset is None and are_digits and installed_version("scikit-learn") is not None:
        dataset = open_images("digits")
    if dataset is not None:
        return [dataset.read(number) for number in range(min(NUM_SPECIMENS, len(dataset)))]
    return [_hills(size), _stripes(size), _disk(size), _texture(size)]


def _coordinates(size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows and columns of pixels, in [0, 1)."""
    places = (torch.arange(size) + 0.5) / size
    return places[:, None].expand(size, size), places[None].expand(size, size)


def _painted(*layers: tuple[torch.Tensor, torch.Tensor]) -> Image.Image:
    """Colours in [0, 1] over each other, each where its cover in [0, 1] is."""
    image = torch.zeros(3, *layers[0][0].shape[-2:])
    for colour, cover in layers:
        image = image + cover * (colour - image)
    return to_pil(2 * image - 1)


def _colour(red: float, green: float, blue: float) -> torch.Tensor:
    """One colour, of any size."""
    return torch.tensor([red, green, blue])[:, None, None]


def _edge(signed: torch.Tensor, size: int) -> torch.Tensor:
    """Cover of the area where a length is positive, soft over one pixel."""
    return (signed * size + 0.5).clamp(0, 1)


def _hills(size: int) -> Image.Image:
    """A sky that pales towards three ranges of hills."""
    row, column = _coordinates(size)
    sky = _colour(0.25, 0.5, 0.85) + row * _colour(0.8, 0.45, 0.05)
    layers = [(sky.clamp(0, 1), torch.ones(size, size))]
    for number in range(3):
        wave = (column * (5 + 2 * number) + 1.7 * number).sin()
        height = 0.5 + 0.15 * number + 0.07 * wave
        shade = 1 - 0.25 * number
        layers.append((shade * _colour(0.35, 0.6, 0.4), _edge(row - height, size)))
    return _painted(*layers)


def _stripes(size: int) -> Image.Image:
    """Slanted stripes of two colours."""
    row, column = _coordinates(size)
    wave = (2 * math.pi * 5 * (column + 0.5 * row)).sin() / (2 * math.pi * 5)
    ground = _colour(0.95, 0.9, 0.75).expand(3, size, size)
    return _painted((ground, torch.ones(size, size)), (_colour(0.7, 0.2, 0.25), _edge(wave, size)))


def _disk(size: int) -> Image.Image:
    """A ball with its shadow on the ground."""
    row, column = _coordinates(size)
    wall = _colour(0.8, 0.8, 0.85) * (1 - 0.3 * row)
    shadow = 0.3 - torch.hypot((column - 0.58) / 1.2, (row - 0.78) * 3.5)
    distance = torch.hypot(column - 0.48, row - 0.5)
    light = (1.1 - 2.2 * torch.hypot(column - 0.38, row - 0.38)).clamp(0.25, 1)
    return _painted(
        (wall, torch.ones(size, size)),
        (_colour(0.55, 0.45, 0.35), _edge(row - 0.66, size)),
        (_colour(0.25, 0.2, 0.15), 0.7 * _edge(shadow, size)),
        (light * _colour(0.95, 0.6, 0.15), _edge(0.28 - distance, size)),
    )


def _texture(size: int) -> Image.Image:
    """Noise of several sizes in the colours of stone."""
    numbers = torch.Generator().manual_seed(0)
    noise = torch.zeros(1, 1, size, size)
    for cells in (3, 6, 12, 24):
        coarse = torch.rand(1, 1, cells, cells, generator=numbers) - 0.5
        fine = torch.nn.functional.interpolate(coarse, (size, size), mode="bicubic")
        noise = noise + fine * 3 / cells**0.5
    shade = (0.5 + 0.35 * noise[0, 0]).clamp(0, 1)
    stone = _colour(0.2, 0.22, 0.28) + shade * _colour(0.7, 0.6, 0.5)
    return _painted((stone.clamp(0, 1), torch.ones(size, size)))
