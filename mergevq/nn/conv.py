"""Residual and resampling convolutions.

Source: Yu et al. 2024, "Language Model Beats Diffusion", appendix A (adaptive group norm,
arXiv:2310.05737); Tian et al. 2024, "Visual Autoregressive Modeling: Scalable Image Generation via
Next-Scale Prediction", section 3.2 (sums over scales, arXiv:2404.02905).

Shape letters: B batch, C channels, H and W pixels or grid cells, N tokens of a scale or of several.
"""

from collections.abc import Iterator, Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from mergevq.nn.blocks import NORM_EPS
from mergevq.nn.norm import GroupNorm, channels_last_norm, is_slow
from mergevq.nn.positions import to_grid, to_tokens


class ResBlock(nn.Module):
    """Two 3x3 convolutions, each after group norm and SiLU, around a shortcut."""

    def __init__(self, in_channels: int, out_channels: int, num_groups: int) -> None:
        """Convolutions have no bias; the shortcut is 1x1 when the width changes."""
        super().__init__()
        self.norm1 = GroupNorm(num_groups, in_channels, eps=NORM_EPS)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1, bias=False)
        self.norm2 = GroupNorm(num_groups, out_channels, eps=NORM_EPS)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        self.shortcut = (
            nn.Identity()
            if in_channels == out_channels
            else nn.Conv2d(in_channels, out_channels, 1, bias=False)
        )

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b d h w"]:
        """Transform without changing the size."""
        hidden = self.conv1(functional.silu(self.norm1(x)))
        hidden = self.conv2(functional.silu(self.norm2(hidden)))
        return self.shortcut(x) + hidden


class Upsample(nn.Module):
    """Twice the side: a 3x3 convolution to four times the channels, then depth to space."""

    def __init__(self, channels: int) -> None:
        """Keep the number of channels."""
        super().__init__()
        self.conv = nn.Conv2d(channels, 4 * channels, 3, padding=1)

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h2 w2"]:
        """Double height and width."""
        return functional.pixel_shuffle(self.conv(x), 2)


class AdaptiveGroupNorm(nn.Module):
    """Group norm whose gain and shift come from the codes of the whole image."""

    def __init__(self, style_dim: int | None, channels: int, num_groups: int) -> None:
        """Gain reads the deviation of each channel of the codes, shift its mean.

        Without codes (`style_dim` None) both are learned numbers, as in any group norm.
        """
        super().__init__()
        self.norm = GroupNorm(num_groups, channels, eps=NORM_EPS, affine=style_dim is None)
        self.gain = None if style_dim is None else nn.Linear(style_dim, channels)
        self.shift = None if style_dim is None else nn.Linear(style_dim, channels)

    def forward(
        self, x: Float[Tensor, "b c h w"], codes: Float[Tensor, "b n d"] | None
    ) -> Float[Tensor, "b c h w"]:
        """Normalise `x` in the style of the codes."""
        if self.gain is None or self.shift is None or codes is None:
            return self.norm(x)
        # Statistics of signs need more than bf16's 8 bits; one token has no deviation.
        codes = codes.float()
        deviation = (codes.var(1, correction=min(1, codes.shape[1] - 1)) + NORM_EPS).sqrt()
        gain, shift = self.gain(deviation.to(x.dtype)), self.shift(codes.mean(1).to(x.dtype))
        if is_slow(x):
            return channels_last_norm(x, self.norm.num_groups, gain, shift, self.norm.eps)
        return gain[..., None, None] * self.norm(x) + shift[..., None, None]


def to_scale(grid: Float[Tensor, "b c h h"], scale: int) -> Float[Tensor, "b n c"]:
    """Means of a grid's areas, `scale` along each side, in raster order."""
    return to_tokens(functional.interpolate(grid, size=(scale, scale), mode="area"))


def from_scale(
    codes: Float[Tensor, "b n c"], side: int, kernel: Float[Tensor, "c c 3 3"]
) -> Float[Tensor, "b c h h"]:
    """Codes of a square scale on a grid with `side` cells along each side: bicubic, then filtered.

    Args:
        codes: in raster order.
        side: of the grid.
        kernel: of the filter.
    """
    scale = round(codes.shape[1] ** 0.5)
    grid = to_grid(codes, (scale, scale)).contiguous()
    if scale != side:
        grid = functional.interpolate(grid, size=(side, side), mode="bicubic")
    return functional.conv2d(grid, kernel, padding=1)


def scale_sums(
    codes: Float[Tensor, "b n c"],
    scales: Sequence[int],
    kernels: Float[Tensor, "s c c 3 3"],
) -> Iterator[Float[Tensor, "b c h h"]]:
    """Sums over the first scale, the first two, and so on, on the grid of the last.

    In float32 under any autocast, and each sum adds one scale to the one before: the same codes
    give the same bits to whoever adds them.

    Args:
        codes: of all scales, or of the first ones, the coarsest first; others count as zeros.
        scales: sides of all.
        kernels: filter of each scale.
    """
    counts = [scale**2 for scale in scales]
    with torch.autocast(codes.device.type, enabled=False):
        missing = sum(counts) - codes.shape[1]
        padded = functional.pad(codes.float(), (0, 0, 0, missing))
        total: Tensor | None = None
        for own, kernel in zip(padded.split(counts, dim=1), kernels.float(), strict=True):
            added = from_scale(own, scales[-1], kernel)
            total = added if total is None else total + added
            yield total
