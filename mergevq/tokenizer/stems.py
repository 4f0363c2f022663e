"""Stems: image to grid tokens.

Source: Li et al. 2025, "MergeVQ", appendix A (arXiv:2504.00999).

Differs: a patch stem has fixed positions where the authors' code has none, and may do without its
norm.

Shape letters: B batch, C channels, L grid cells, H and W pixels or cells.
"""

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from mergevq.config import parts as settings
from mergevq.nn.conv import ResBlock
from mergevq.nn.norm import GroupNorm
from mergevq.nn.positions import sincos, to_grid
from mergevq.nn.precision import without_autocast

_POSITION_PERIOD = 64.0
"""Longest period of the position features of a stem without norm, in about as many cells as an
image has on a side: all features then differ within it."""
_POSITION_SCALE = 0.5
"""Their amplitude, beside components of patches that are seldom above 1 or 2."""


def cnn_stem(config: settings.CnnStem) -> nn.Sequential:
    """Residual levels; every level but the last ends in a convolution of stride 2."""
    stem: list[nn.Module] = [nn.Conv2d(3, config.channels, 3, padding=1, bias=False)]
    width = config.channels
    for level, mult in enumerate(config.channel_mult):
        channels = config.channels * mult
        for block in range(config.num_res_blocks):
            stem.append(ResBlock(channels if block else width, channels, config.num_groups))
        if level + 1 < len(config.channel_mult):
            stem.append(nn.Conv2d(channels, channels, 3, stride=2, padding=1))
        width = channels
    return nn.Sequential(*stem)


def patch_stem(config: settings.PatchStem) -> nn.Module:
    """One convolution per patch; `norm` of the settings decides about the rest."""
    if not config.norm:
        return PlainStem(config)
    return nn.Sequential(
        nn.Conv2d(3, config.width, config.patch_size, stride=config.patch_size),
        GroupNorm(config.width, config.width, eps=config.norm_eps),
    )


class PlainStem(nn.Module):
    """One convolution per patch and positions, in the weights' precision whatever autocast says.

    Nothing after it can tell brightness or colour that half precision has rounded away here.
    """

    def __init__(self, config: settings.PatchStem) -> None:
        """Build for settings without norm."""
        super().__init__()
        patch = config.patch_size
        self.conv = nn.Conv2d(3, config.width, patch, stride=patch)
        self.num_positions = config.num_positions

    def forward(self, image: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b c h2 w2"]:
        """Turn each patch into channels."""
        with without_autocast(image):
            grid = self.conv(image)
        shape = (grid.shape[2], grid.shape[3])
        positions = paired_positions(shape, self.num_positions, grid.device)
        free = grid.shape[1] - positions.shape[1]
        positions = functional.pad(positions, (free, 0)).to(grid.dtype)
        return grid + to_grid(positions[None], shape)


def paired_positions(
    grid_shape: tuple[int, int], num_features: int, device: torch.device | None = None
) -> Float[Tensor, "l c"]:
    """Features of all cells of a grid in raster order, each as itself and its negative.

    In pairs they have the mean 0, so that a norm over channels only scales what is beside them.

    Args:
        grid_shape: (height, width) in cells.
        num_features: a multiple of 4: sines and cosines of rows and of columns.
        device: where to make them.
    """
    height, width = grid_shape
    rows = torch.arange(height, device=device, dtype=torch.float32).repeat_interleave(width)
    columns = torch.arange(width, device=device, dtype=torch.float32).repeat(height)
    half = num_features // 2
    features = torch.cat([sincos(axis, half, _POSITION_PERIOD) for axis in (rows, columns)], -1)
    return _POSITION_SCALE * torch.stack([features, -features], -1).flatten(1)
