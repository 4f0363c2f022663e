"""Transformer blocks that merge tokens between attention and MLP.

Source: Bolya et al. 2023, "Token Merging", section 3 (proportional attention, arXiv:2210.09461);
Li et al. 2025, "MergeVQ", section 3.2 and appendix A (arXiv:2504.00999).

Shape letters: B batch, N tokens, K kept tokens, L grid tokens, C channels.
"""

from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from mergevq.config import parts as settings
from mergevq.config.parts import MergeShape
from mergevq.data.layouts import Source, canonicalize, merge
from mergevq.nn.blocks import NORM_EPS, Attention, LayerScale, Mlp
from mergevq.nn.norm import LayerNorm
from mergevq.nn.rows import take_rows
from mergevq.tokenizer.reducers.matching import centres, match, merge_schedule, merge_step
from mergevq.tokenizer.seams import TokenSet


class Nearness(NamedTuple):
    """Preference for tokens that are near to each other."""

    per_cell: float
    """Cosine that two tokens lose for each cell between their centres."""
    width: int
    """Cells in a row of the grid."""

    def places(self, index: Int64[Tensor, "b l"], num_tokens: int) -> Float[Tensor, "b n 2"]:
        """Centres of tokens, in units in which distance is taken from a cosine."""
        return self.per_cell * centres(index, num_tokens, self.width)


def nearness(locality: float, grid_shape: tuple[int, int]) -> Nearness | None:
    """Preference of reducer `merge` on a grid of (height, width) cells; None where it has none."""
    return Nearness(locality / max(grid_shape), grid_shape[1]) if locality > 0 else None


@dataclass(frozen=True, slots=True)
class MergeState:
    """State that an encoder block passes on beside its tokens."""

    index: Int64[Tensor, "b l"]
    """Present token of each grid cell, not counting the class token."""
    sizes: Float[Tensor, "b n"] | None
    """Grid cells per token, class token first; None while nothing has been merged."""
    near: Nearness | None = None
    """Whether near tokens merge first; None is no."""


class MergeBlock(nn.Module):
    """A pre-norm transformer block that merges tokens between attention and MLP."""

    def __init__(
        self, dim: int, num_heads: int, layer_scale: float, norm_eps: float = NORM_EPS
    ) -> None:
        """Make the layers; `dim` must be a multiple of `num_heads`."""
        super().__init__()
        self.norm1 = LayerNorm(dim, eps=norm_eps)
        self.attn = Attention(dim, num_heads)
        self.ls1 = LayerScale(dim, layer_scale)
        self.norm2 = LayerNorm(dim, eps=norm_eps)
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


class Merge(nn.Module):
    """The encoder's transformer: every block merges some tokens, until K are left."""

    def __init__(self, config: settings.Merge, dim: int) -> None:
        """Make the blocks; the encoder initialises them after its projection."""
        super().__init__()
        self.shape: MergeShape = config.shape
        self.locality = config.locality
        self.blocks = nn.ModuleList(
            MergeBlock(dim, config.num_heads, config.layer_scale, config.norm_eps)
            for _ in range(config.num_layers)
        )
        self.checkpointing = False

    def forward(
        self,
        grid: Float[Tensor, "b l c"],
        class_token: Float[Tensor, "b 1 c"],
        grid_shape: tuple[int, int],
        num_kept: int,
        *,
        num_layers: int | None = None,
        taps: tuple[int, ...] = (),
    ) -> TokenSet:
        """Run the first `num_layers` blocks (None: all) on the way to `num_kept` tokens."""
        batch, num_tokens, _ = grid.shape
        x = torch.cat([class_token, grid], dim=1)
        cells = torch.arange(num_tokens, device=grid.device).expand(batch, -1)
        state = MergeState(index=cells, sizes=None, near=nearness(self.locality, grid_shape))
        tapped = dict.fromkeys(taps, (x, state))
        counts = merge_schedule(num_tokens, num_kept, len(self.blocks), self.shape)
        blocks = list(zip(self.blocks, counts, strict=True))[:num_layers]
        for number, (block, count) in enumerate(blocks, 1):
            if self.checkpointing and self.training:
                x, state = checkpoint(block, x, state, count, use_reentrant=False)
            else:
                x, state = block(x, state, count)
            if number in tapped:
                tapped[number] = (x, state)
        source, order = canonicalize(Source(state.index, x.shape[1] - 1))
        # Copied to their cells and averaged over those of a token: as if merged where it was.
        means = tuple(
            merge(take_rows(tokens[:, 1:], then.index), source)
            for tokens, then in (tapped[tap] for tap in taps)
        )
        return TokenSet(take_rows(x[:, 1:], order), x[:, 0], source, means)

    def implied(
        self,
        grid_shape: tuple[int, int],
        num_kept: int,
        num_images: int,
    ) -> None:
        """Nothing: which cells join depends on the image."""


def _merge_all_but_first(
    x: Float[Tensor, "b n c"], keys: Float[Tensor, "b n d"], state: MergeState, num_merged: int
) -> tuple[Float[Tensor, "b m c"], MergeState]:
    """One merging step on the tokens behind the class token."""
    sizes = x.new_ones(x.shape[:2], dtype=torch.float32) if state.sizes is None else state.sizes
    places = None if state.near is None else state.near.places(state.index, x.shape[1] - 1)
    destination = match(keys[:, 1:], num_merged, places)
    # With the class token alone in the first group nothing has to be cut off and put back.
    groups = functional.pad(destination + 1, (1, 0))
    merged = merge_step(x, sizes, groups, x.shape[1] - num_merged)
    index = destination.gather(1, state.index)
    return merged.tokens, replace(state, index=index, sizes=merged.sizes)
