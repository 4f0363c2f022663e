"""Transformer blocks on the whole grid, then means of its blocks of cells.

The map of cells to tokens follows from the grid and K, so that it costs no bits: what merging is to
be compared with at equal bits.

Source: Cai et al. 2024, "Matryoshka Multimodal Models", section 3 (arXiv:2405.17430).

Differs: blocks of any legal K cover the grid without overlap, where the authors' average pooling
leaves out cells of a grid that does not divide and leaves 256 cells as they are for 144 tokens.

Shape letters: B batch, K kept tokens, L grid tokens, C channels.
"""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from mergevq.config import parts as settings
from mergevq.data.layouts import Source, blocks, merge
from mergevq.nn.blocks import EncoderBlock, run_blocks
from mergevq.tokenizer.seams import TokenSet


class Pool(nn.Module):
    """Blocks of attention, and a mean over each block of cells after the last one."""

    def __init__(self, config: settings.Pool, dim: int) -> None:
        """Make the blocks; the encoder initialises them after its projection."""
        super().__init__()
        self.config = config
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
        """Run the first `num_layers` blocks (None: all); all of them end in `num_kept` means."""
        recompute = self.checkpointing and self.training
        x = torch.cat([class_token, grid], dim=1)
        outputs = dict.fromkeys(taps, x)
        x = run_blocks(self.blocks, x, num_layers, recompute=recompute, outputs=outputs)
        is_last = num_layers is None or num_layers == len(self.blocks)
        layout = self.implied(grid_shape, num_kept if is_last else grid.shape[1], len(x))
        layout = layout.to(x.device)
        means = tuple(merge(outputs[tap][:, 1:], layout) for tap in taps)
        return TokenSet(merge(x[:, 1:], layout), x[:, 0], layout, means)

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
