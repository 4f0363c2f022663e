"""Blocks of the tokenizer: attention with sizes, MLPs, residual and resampling convolutions.

Source: Bolya et al. 2023, "Token Merging", section 3 (proportional attention, arXiv:2210.09461);
Yu et al. 2024, "Language Model Beats Diffusion", appendix A (convolutions, adaptive group norm,
arXiv:2310.05737); Li et al. 2025, "MergeVQ", section 3.2 and appendix A (arXiv:2504.00999).

Shape letters: B batch, N tokens, M keys, K kept tokens, C channels, H and W grid cells or pixels.
"""

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from mergevq.nn.attention import attend
from mergevq.nn.norm import LayerNorm
from mergevq.nn.positions import to_grid, to_tokens

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
        self,
        x: Float[Tensor, "b n c"],
        sizes: Float[Tensor, "b n"] | None = None,
        mask: Bool[Tensor, "*mask n"] | None = None,
    ) -> Attended:
        """Attend.

        Args:
            x: tokens.
            mask: true where a token (axis before the last) sees another, without sizes; None is
                all.
            sizes: grid tokens in each; a token that stands for s of them is attended to as s
                would be, through log s added to its logits (paper, equation 14). None is all 1.
        """
        batch, num_tokens, dim = x.shape
        qkv = self.qkv(x).reshape(batch, num_tokens, 3, self.num_heads, dim // self.num_heads)
        query, key, value = qkv.permute(2, 0, 3, 1, 4)
        bias = mask if sizes is None else sizes.log().to(query.dtype)[:, None, None, :]
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


class GridBlock(nn.Module):
    """A pre-norm transformer block on the full grid, as the decoder has them."""

    def __init__(
        self, dim: int, num_heads: int, layer_scale: float, norm_eps: float = NORM_EPS
    ) -> None:
        """Make the layers; `dim` must be a multiple of `num_heads`."""
        super().__init__()
        self.norm1 = LayerNorm(dim, eps=norm_eps)
        self.attn = Attention(dim, num_heads)
        self.ls1 = LayerScale(dim, layer_scale)
        self.norm2 = LayerNorm(dim, eps=norm_eps)
        self.mlp = MixMlp(dim)
        self.ls2 = LayerScale(dim, layer_scale)

    def forward(
        self, x: Float[Tensor, "b n c"], grid_shape: tuple[int, int]
    ) -> Float[Tensor, "b n c"]:
        """Attend and transform on a grid of (height, width) cells."""
        x = x + self.ls1(self.attn(self.norm1(x)).tokens)
        return x + self.ls2(self.mlp(self.norm2(x), grid_shape))


class EncoderBlock(nn.Module):
    """A pre-norm transformer block with gains on its branches."""

    def __init__(self, dim: int, num_heads: int, layer_scale: float, norm_eps: float) -> None:
        """Make the layers; `dim` must be a multiple of `num_heads`."""
        super().__init__()
        self.norm1 = LayerNorm(dim, eps=norm_eps)
        self.attn = Attention(dim, num_heads)
        self.ls1 = LayerScale(dim, layer_scale)
        self.norm2 = LayerNorm(dim, eps=norm_eps)
        self.mlp = Mlp(dim)
        self.ls2 = LayerScale(dim, layer_scale)

    def forward(
        self, x: Float[Tensor, "b n c"], mask: Bool[Tensor, "*mask n"] | None = None
    ) -> Float[Tensor, "b n c"]:
        """Let the tokens look at each other, or at those of a mask as `Attention` has it."""
        x = x + self.ls1(self.attn(self.norm1(x), mask=mask).tokens)
        return x + self.ls2(self.mlp(self.norm2(x)))


def run_blocks(
    blocks: nn.ModuleList,
    x: Float[Tensor, "b n c"],
    num_layers: int | None,
    *,
    recompute: bool,
    mask: Bool[Tensor, "*mask n"] | None = None,
    outputs: dict[int, Float[Tensor, "b n c"]] | None = None,
) -> Float[Tensor, "b n c"]:
    """Run the first blocks of a stack, each of which takes tokens and a mask alone.

    Args:
        blocks: the stack.
        x: tokens.
        num_layers: blocks to run; None is all.
        recompute: keep no activations for the backward pass, which computes them again.
        mask: which tokens each sees; None is all.
        outputs: gets the tokens after the blocks that it has numbers of, from 1; 0 is before them.
    """
    outputs = {} if outputs is None else outputs
    if 0 in outputs:
        outputs[0] = x
    for number, block in enumerate(list(blocks)[:num_layers], 1):
        x = checkpoint(block, x, mask, use_reentrant=False) if recompute else block(x, mask)
        if number in outputs:
            outputs[number] = x
    return x


class ContextBlock(nn.Module):
    """A pre-norm transformer block on tokens without a grid."""

    def __init__(self, dim: int, num_heads: int) -> None:
        """Make the layers; `dim` must be a multiple of `num_heads`."""
        super().__init__()
        self.norm1 = LayerNorm(dim, eps=NORM_EPS)
        self.attn = Attention(dim, num_heads)
        self.norm2 = LayerNorm(dim, eps=NORM_EPS)
        self.mlp = Mlp(dim)

    def forward(
        self, x: Float[Tensor, "b n c"], mask: Bool[Tensor, "*mask n"] | None = None
    ) -> Float[Tensor, "b n c"]:
        """Let the tokens look at each other, or at those of a mask as `Attention` has it."""
        x = x + self.attn(self.norm1(x), mask=mask).tokens
        return x + self.mlp(self.norm2(x))


class QueryBlock(nn.Module):
    """Cross-attention to a context, then a transformer block among the queries."""

    def __init__(self, dim: int, num_heads: int) -> None:
        """Make the layers; `dim` must be a multiple of `num_heads`."""
        super().__init__()
        self.norm = LayerNorm(dim, eps=NORM_EPS)
        self.cross = CrossAttention(dim, num_heads)
        self.block = ContextBlock(dim, num_heads)

    def forward(
        self, x: Float[Tensor, "b n c"], context: Float[Tensor, "b m c"]
    ) -> Float[Tensor, "b n c"]:
        """Refine the queries `x`."""
        return self.block(x + self.cross(self.norm(x), context))


def initialize(module: nn.Module) -> None:
    """Truncated normal of deviation 0.02 for every matrix and convolution, zero for every bias."""
    for part in module.modules():
        if isinstance(part, nn.Linear | nn.Conv2d):
            nn.init.trunc_normal_(part.weight, std=0.02)
            if part.bias is not None:
                nn.init.zeros_(part.bias)
