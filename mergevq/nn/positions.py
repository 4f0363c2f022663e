"""Grids as sequences of tokens, and fixed positions of sines and cosines.

Source: Dosovitskiy et al. 2021, "An Image is Worth 16x16 Words" (arXiv:2010.11929), for tokens in
raster order.

Shape letters: B batch, C channels, H and W grid cells, P numbers of a
patch.
"""

import math

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

from mergevq.nn.attention import trains_on_cpu


def to_grid(
    tokens: Float[Tensor, "b n c"], grid_shape: tuple[int, int]
) -> Float[Tensor, "b c h w"]:
    """Lay raster-ordered tokens on their (height, width) grid."""
    grid = tokens.mT.unflatten(2, grid_shape)
    # The view is in channels_last, which convolutions in bf16 like; in float32 on CPUs it makes
    # the backward pass of group norm several times slower (docs/log.md).
    slow = trains_on_cpu(tokens) and tokens.dtype == torch.float32
    return grid.contiguous() if slow else grid


def to_tokens(grid: Float[Tensor, "b c h w"]) -> Float[Tensor, "b n c"]:
    """Read a grid in raster order."""
    return grid.flatten(2).mT


def to_patches(image: Float[Tensor, "b c h2 w2"], patch_size: int) -> Float[Tensor, "b n p"]:
    """Cut an image into patches in raster order, numbered as the weights of a convolution are."""
    return functional.pixel_unshuffle(image, patch_size).flatten(2).mT


def from_patches(
    patches: Float[Tensor, "b n p"], patch_size: int, grid_shape: tuple[int, int]
) -> Float[Tensor, "b c h2 w2"]:
    """Inverse of `to_patches` on a grid of (height, width) patches."""
    return functional.pixel_shuffle(patches.mT.unflatten(2, grid_shape), patch_size)


def sincos(
    positions: Float[Tensor, "n"], dim: int, max_period: float = 10_000.0
) -> Float[Tensor, "n dim"]:
    """Sine and cosine features of real positions, `dim` even (Vaswani et al. 2017, section 3.5)."""
    frequencies = torch.exp(
        torch.arange(dim // 2, device=positions.device) * (-math.log(max_period) / (dim // 2))
    )
    angles = positions[:, None] * frequencies
    return torch.cat([angles.sin(), angles.cos()], dim=-1)


def sincos_2d(
    grid_shape: tuple[int, int], dim: int, device: torch.device | None = None
) -> Float[Tensor, "n dim"]:
    """Features of all cells of a grid in raster order: half for the row, half for the column."""
    height, width = grid_shape
    rows = torch.arange(height, device=device, dtype=torch.float32).repeat_interleave(width)
    columns = torch.arange(width, device=device, dtype=torch.float32).repeat(height)
    return torch.cat([sincos(rows, dim // 2), sincos(columns, dim // 2)], dim=-1)
