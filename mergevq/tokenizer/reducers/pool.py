"""Transformer blocks, and means over blocks of a grid's cells behind some of them.

The map of cells to tokens follows from the grid and K, so that it costs no bits: what merging is to
be compared with at equal bits.

Source: Cai et al. 2024, "Matryoshka Multimodal Models", section 3 (arXiv:2405.17430).

Differs: tokens may go through transformer blocks after they are pooled; blocks of any legal K
cover the grid without overlap, where the authors' average pooling leaves out cells of a grid that
does not divide and leaves 256 cells as they are for 144 tokens.

Shape letters: B batch, K kept tokens, L grid tokens, C channels.
"""

from dataclasses import replace

from jaxtyping import Float
from torch import Tensor, nn

from mergevq.config import parts as settings
from mergevq.data.layouts import Source, blocks, merge
from mergevq.nn.blocks import EncoderBlock
from mergevq.runtime.device import send
from mergevq.tokenizer.reducers.stages import Reduction, Stages
from mergevq.tokenizer.seams import TokenSet


class Pool(nn.Module):
    """Blocks of attention, of which the first see all cells and the others means over blocks."""

    def __init__(self, config: settings.Pool, dim: int) -> None:
        """Make the blocks; the encoder initialises them after its projection."""
        super().__init__()
        self.config = config
        self.num_grid_layers = config.num_grid_layers
        self.blocks = nn.ModuleList(
            EncoderBlock(dim, config.num_heads, config.layer_scale, config.norm_eps)
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
        """Run the first `num_layers` blocks (None: all); cells are averaged behind the grid's."""
        recompute = self.checkpointing and self.training

        def means(cells: Float[Tensor, "b l c"], num_kept: int) -> tuple[Source, Reduction]:
            layout = self.implied(grid_shape, num_kept, len(cells))
            layout = replace(layout, index=send(layout.index, cells.device))
            return layout, lambda cells: merge(cells, layout)

        stages = Stages(self.blocks, self.num_grid_layers, num_layers, recompute)
        return stages.run(grid, class_token, num_kept, means, taps)

    def implied(self, grid_shape: tuple[int, int], num_kept: int, num_images: int) -> Source:
        """The map of a grid cut into `num_kept` blocks, for each of the images.

        Raises:
            ValueError: a grid cannot be cut into as many.
        """
        counts = self.config.counts(grid_shape, num_kept)
        if counts is None:
            self.config.check_kept(grid_shape, num_kept)
            raise ValueError(f"num_kept ({num_kept}) must be a number of blocks")
        return blocks(grid_shape, counts, num_images)
