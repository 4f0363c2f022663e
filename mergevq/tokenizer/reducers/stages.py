"""Blocks of a reducer that leaves its tokens at one place between them.

Source: Cai et al. 2024, "Matryoshka Multimodal Models", section 3 (arXiv:2405.17430), and Alvar et
al. 2025, "DivPrune", section 3 (arXiv:2503.02175), whose tokens go on through later layers.

Shape letters: B batch, L grid tokens, K kept tokens, N present tokens, C channels.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from mergevq.data.layouts import Source
from mergevq.nn.blocks import run_blocks
from mergevq.tokenizer.seams import TokenSet

Reduction = Callable[[Float[Tensor, "b l c"]], Float[Tensor, "b k c"]]
"""Tokens that are left of features of all cells."""
Choose = Callable[[Float[Tensor, "b l c"], int], tuple[Source, Reduction]]
"""Map and reduction to so many tokens, given the features of all cells."""


class Stages(NamedTuple):
    """Blocks to run, and where between them tokens are left."""

    blocks: nn.ModuleList
    """All blocks, each of tokens alone."""
    num_grid_layers: int | None
    """The first ones, which see all cells; the others see what is left of them. None is all."""
    num_layers: int | None
    """Blocks to run; None is all."""
    recompute: bool
    """Whether the backward pass computes activations again."""

    def run(
        self,
        grid: Float[Tensor, "b l c"],
        class_token: Float[Tensor, "b 1 c"],
        num_kept: int,
        choose: Choose,
        taps: tuple[int, ...],
    ) -> TokenSet:
        """Run the blocks of the grid, reduce it, and run those of its tokens.

        Args:
            grid: features of all cells.
            class_token: theirs, which is never reduced.
            num_kept: K; all L are kept where fewer blocks run than the grid has.
            choose: asked once, after the blocks of the grid.
            taps: numbers of blocks after which tokens are wanted too; 0 is before them.
        """
        num_blocks = len(self.blocks)
        num_run = num_blocks if self.num_layers is None else self.num_layers
        num_grid = num_blocks if self.num_grid_layers is None else self.num_grid_layers
        x = torch.cat([class_token, grid], dim=1)
        outputs = dict.fromkeys(taps, x)
        first = min(num_run, num_grid)
        x = run_blocks(self.blocks, x, first, recompute=self.recompute, outputs=outputs)
        if num_run < num_grid:
            num_kept = grid.shape[1]
        source, reduced = choose(x[:, 1:], num_kept)
        x = torch.cat([x[:, :1], reduced(x[:, 1:])], dim=1)
        later = {tap - num_grid: x for tap in taps if tap > num_grid}
        rest = self.blocks[num_grid:num_run]
        x = run_blocks(rest, x, None, recompute=self.recompute, outputs=later)
        tapped = tuple(
            later[tap - num_grid][:, 1:] if tap > num_grid else reduced(outputs[tap][:, 1:])
            for tap in taps
        )
        return TokenSet(x[:, 1:], x[:, 0], source, tapped)
