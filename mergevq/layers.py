"""Blocks of the tokenizer: attention with sizes, MLPs, residual and resampling convolutions.

Source: Bolya et al. 2023, "Token Merging", section 3 (proportional attention, arXiv:2210.09461);
Yu et al. 2024, "Language Model Beats Diffusion", appendix A (convolutions, adaptive group norm,
arXiv:2310.05737); Li et al. 2025, "MergeVQ", section 3.2 and appendix A (arXiv:2504.00999).

Shape letters: B batch, N tokens, M keys, K kept tokens, C channels, H and W grid cells or pixels.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn
from torch.nn import functional

from mergevq.attention import attend, trains_on_cpu
from mergevq.merge import match, merge_step

NORM_EPS = 1e-6
"""Added to the variance in every normalisation that has no setting of its own."""


class LayerScale(nn.Module):
    """A learned gain per channel, so that a deep stack starts near the identity."""

    def __init__(self, dim: int, initial: float) -> None:
        """Start every channel at `initial`."""
        super().__init__()
        self.gamma = nn.Parameter(torch.full((dim,), initial))

    def forward(self, x: Float[Tensor, "b n c"]) -> Float[Tensor, "b n c"]:
        """Scale the channels."""
        return x * self.gamma


class Attended(NamedTuple):
    """Result of self-attention."""

    tokens: Float[Tensor, "b n c"]
    """Mixed tokens."""
    keys: Float[Tensor, "b n d"]
    """Keys averaged over heads: what token merging compares."""


class Attention(nn.Module):
    """Multi-head self-attention whose keys can weigh more than one."""

    def __init__(self, dim: int, num_heads: int) -> None:
        """Make the projections; `dim` must be a multiple of `num_heads`."""
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(
        self, x: Float[Tensor, "b n c"], sizes: Float[Tensor, "b n"] | None = None
    ) -> Attended:
        """Attend.

        Args:
            x: tokens.
            sizes: grid tokens in each; a token that stands for s of them is attended to as s
                would be, through log s added to its logits (paper, equation 14). None is all 1.
        """
        batch, num_tokens, dim = x.shape
        qkv = self.qkv(x).reshape(batch, num_tokens, 3, self.num_heads, dim // self.num_heads)
        query, key, value = qkv.permute(2, 0, 3, 1, 4)
        bias = None if sizes is None else sizes.log().to(query.dtype)[:, None, None, :]
        mixed = attend(query, key, value, bias)
        tokens = self.proj(mixed.transpose(1, 2).reshape(batch, num_tokens, dim))
        return Attended(tokens, key.mean(1))


class CrossAttention(nn.Module):
    """Multi-head attention of queries to other tokens."""

    def __init__(self, dim: int, num_heads: int) -> None:
        """Make the projections; `dim` must be a multiple of `num_heads`."""
        super().__init__()
        self.num_heads = num_heads
        self.q = nn.Linear(dim, dim)
        self.kv = nn.Linear(dim, 2 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(
        self, x: Float[Tensor, "b n c"], context: Float[Tensor, "b m c"]
    ) -> Float[Tensor, "b n c"]:
        """Let every token of `x` look at all of `context`."""
        batch, num_tokens, dim = x.shape
        heads = (self.num_heads, dim // self.num_heads)
        query = self.q(x).unflatten(-1, heads).transpose(1, 2)
        key, value = self.kv(context).unflatten(-1, (2, *heads)).permute(2, 0, 3, 1, 4)
        mixed = attend(query, key, value, None)
        return self.proj(mixed.transpose(1, 2).reshape(batch, num_tokens, dim))


class Mlp(nn.Module):
    """Two linear layers with a GELU between."""

    def __init__(self, dim: int) -> None:
        """Widen by 4."""
        super().__init__()
        self.fc1 = nn.Linear(dim, 4 * dim)
        self.fc2 = nn.Linear(4 * dim, dim)

    def forward(self, x: Float[Tensor, "b n c"]) -> Float[Tensor, "b n c"]:
        """Apply to each token alone."""
        return self.fc2(functional.gelu(self.fc1(x)))


class MixMlp(nn.Module):
    """An MLP with a depth-wise 3x3 convolution inside, so that neighbouring cells mix."""

    def __init__(self, dim: int) -> None:
        """Widen by 4."""
        super().__init__()
        self.fc1 = nn.Linear(dim, 4 * dim)
        self.dwconv = nn.Conv2d(4 * dim, 4 * dim, 3, padding=1, groups=4 * dim)
        self.fc2 = nn.Linear(4 * dim, dim)

    def forward(
        self, x: Float[Tensor, "b n c"], grid_shape: tuple[int, int]
    ) -> Float[Tensor, "b n c"]:
        """Apply on a grid of (height, width) cells in raster order."""
        hidden = to_grid(self.fc1(x), grid_shape)
        return self.fc2(functional.gelu(to_tokens(self.dwconv(hidden))))


@dataclass(frozen=True, slots=True)
class MergeState:
    """What an encoder block passes on beside its tokens."""

    index: Int64[Tensor, "b l"]
    """Present token of each grid cell, not counting the class token."""
    sizes: Float[Tensor, "b n"] | None
    """Grid cells per token, class token first; None while nothing has been merged."""


class MergeBlock(nn.Module):
    """A pre-norm transformer block that merges tokens between attention and MLP."""

    def __init__(
        self, dim: int, num_heads: int, layer_scale: float, norm_eps: float = NORM_EPS
    ) -> None:
        """Make the layers; `dim` must be a multiple of `num_heads`."""
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=norm_eps)
        self.attn = Attention(dim, num_heads)
        self.ls1 = LayerScale(dim, layer_scale)
        self.norm2 = nn.LayerNorm(dim, eps=norm_eps)
        self.mlp = Mlp(dim)
        self.ls2 = LayerScale(dim, layer_scale)

    def forward(
        self, x: Float[Tensor, "b n c"], state: MergeState, num_merged: int
    ) -> tuple[Float[Tensor, "b m c"], MergeState]:
        """Attend, merge `num_merged` tokens away, transform.

        Args:
            x: class token, which is never merged, and N - 1 others.
            state: where grid cells are now.
            num_merged: tokens to remove, from 0 to half of the N - 1.
        """
        attended = self.attn(self.norm1(x), state.sizes)
        x = x + self.ls1(attended.tokens)
        if num_merged > 0:
            x, state = _merge_all_but_first(x, attended.keys, state, num_merged)
        return x + self.ls2(self.mlp(self.norm2(x))), state


def _merge_all_but_first(
    x: Float[Tensor, "b n c"], keys: Float[Tensor, "b n d"], state: MergeState, num_merged: int
) -> tuple[Float[Tensor, "b m c"], MergeState]:
    """One merging step on the tokens behind the class token."""
    sizes = x.new_ones(x.shape[:2], dtype=torch.float32) if state.sizes is None else state.sizes
    destination = match(keys[:, 1:], num_merged)
    # With the class token alone in the first group nothing has to be cut off and put back.
    groups = functional.pad(destination + 1, (1, 0))
    merged = merge_step(x, sizes, groups, x.shape[1] - num_merged)
    index = destination.gather(1, state.index)
    return merged.tokens, MergeState(index=index, sizes=merged.sizes)


class GridBlock(nn.Module):
    """A pre-norm transformer block on the full grid, as the decoder has them."""

    def __init__(
        self, dim: int, num_heads: int, layer_scale: float, norm_eps: float = NORM_EPS
    ) -> None:
        """Make the layers; `dim` must be a multiple of `num_heads`."""
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=norm_eps)
        self.attn = Attention(dim, num_heads)
        self.ls1 = LayerScale(dim, layer_scale)
        self.norm2 = nn.LayerNorm(dim, eps=norm_eps)
        self.mlp = MixMlp(dim)
        self.ls2 = LayerScale(dim, layer_scale)

    def forward(
        self, x: Float[Tensor, "b n c"], grid_shape: tuple[int, int]
    ) -> Float[Tensor, "b n c"]:
        """Attend and transform on a grid of (height, width) cells."""
        x = x + self.ls1(self.attn(self.norm1(x)).tokens)
        return x + self.ls2(self.mlp(self.norm2(x), grid_shape))


class ContextBlock(nn.Module):
    """A pre-norm transformer block on tokens without a grid."""

    def __init__(self, dim: int, num_heads: int) -> None:
        """Make the layers; `dim` must be a multiple of `num_heads`."""
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=NORM_EPS)
        self.attn = Attention(dim, num_heads)
        self.norm2 = nn.LayerNorm(dim, eps=NORM_EPS)
        self.mlp = Mlp(dim)

    def forward(self, x: Float[Tensor, "b n c"]) -> Float[Tensor, "b n c"]:
        """Let the tokens look at each other."""
        x = x + self.attn(self.norm1(x)).tokens
        return x + self.mlp(self.norm2(x))


class QueryBlock(nn.Module):
    """Cross-attention to a context, then a transformer block among the queries."""

    def __init__(self, dim: int, num_heads: int) -> None:
        """Make the layers; `dim` must be a multiple of `num_heads`."""
        super().__init__()
        self.norm = nn.LayerNorm(dim, eps=NORM_EPS)
        self.cross = CrossAttention(dim, num_heads)
        self.block = ContextBlock(dim, num_heads)

    def forward(
        self, x: Float[Tensor, "b n c"], context: Float[Tensor, "b m c"]
    ) -> Float[Tensor, "b n c"]:
        """Refine the queries `x`."""
        return self.block(x + self.cross(self.norm(x), context))


class ResBlock(nn.Module):
    """Two 3x3 convolutions, each after group norm and SiLU, around a shortcut."""

    def __init__(self, in_channels: int, out_channels: int, num_groups: int) -> None:
        """Convolutions have no bias; the shortcut is 1x1 when the width changes."""
        super().__init__()
        self.norm1 = nn.GroupNorm(num_groups, in_channels, eps=NORM_EPS)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1, bias=False)
        self.norm2 = nn.GroupNorm(num_groups, out_channels, eps=NORM_EPS)
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

    def __init__(self, num_bits: int, channels: int, num_groups: int) -> None:
        """Gain reads the standard deviation of each bit over the grid, shift its mean."""
        super().__init__()
        self.norm = nn.GroupNorm(num_groups, channels, eps=NORM_EPS, affine=False)
        self.gain = nn.Linear(num_bits, channels)
        self.shift = nn.Linear(num_bits, channels)

    def forward(
        self, x: Float[Tensor, "b c h w"], codes: Float[Tensor, "b l d"]
    ) -> Float[Tensor, "b c h w"]:
        """Normalise `x` in the style of the unmerged codes."""
        # Statistics of L signs need more than bf16's 8 bits; one cell has no deviation.
        codes = codes.float()
        deviation = (codes.var(1, correction=min(1, codes.shape[1] - 1)) + NORM_EPS).sqrt()
        gain = self.gain(deviation.to(x.dtype))[..., None, None]
        shift = self.shift(codes.mean(1).to(x.dtype))[..., None, None]
        return gain * self.norm(x) + shift


def to_grid(
    tokens: Float[Tensor, "b n c"], grid_shape: tuple[int, int]
) -> Float[Tensor, "b c h w"]:
    """Lay raster-ordered tokens on their (height, width) grid."""
    grid = tokens.mT.unflatten(2, grid_shape)
    # The view is in channels_last, which GPUs like; on CPUs it makes group norm's backward pass
    # several times slower (docs/log.md).
    return grid.contiguous() if trains_on_cpu(tokens) else grid


def to_tokens(grid: Float[Tensor, "b c h w"]) -> Float[Tensor, "b n c"]:
    """Read a grid in raster order."""
    return grid.flatten(2).mT


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


def initialize(module: nn.Module) -> None:
    """Truncated normal of deviation 0.02 for every matrix and convolution, zero for every bias."""
    for part in module.modules():
        if isinstance(part, nn.Linear | nn.Conv2d):
            nn.init.trunc_normal_(part.weight, std=0.02)
            if part.bias is not None:
                nn.init.zeros_(part.bias)
