"""A transformer block that merges tokens between attention and MLP.

Source: Bolya et al. 2023, "Token Merging", section 3 (proportional attention, arXiv:2210.09461);
Li et al. 2025, "MergeVQ", section 3.2 and appendix A (arXiv:2504.00999).

Shape letters: B batch, N tokens, K kept tokens, L grid tokens, C channels.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn
from torch.nn import functional

from mergevq.nn.blocks import NORM_EPS, Attention, LayerScale, Mlp
from mergevq.tokenizer.reducers.matching import match, merge_step


@dataclass(frozen=True, slots=True)
class MergeState:
    """State that an encoder block passes on beside its tokens."""

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
