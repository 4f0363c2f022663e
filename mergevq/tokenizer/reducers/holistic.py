"""Learned tokens of the whole image before those of the cells.

Source: Zheng et al. 2025, "Hita: Holistic Tokenizer for Autoregressive Image Generation", section 3
(arXiv:2507.02358).

    [g_1 .. g_H, class, x_1 .. x_L]

In the first blocks all see all, so that the H tokens g read the image. In those behind them each
sees itself and those before it: g_i no cell, a cell all g. The H + L tokens but the class token are
kept in this order, or the first K of them.

Differs: features of a frozen network are no input of the encoder, so that no other network is
needed to encode; the class token stands between both kinds and reads the H tokens, which a teacher
reaches through it; both kinds have one quantizer.

Shape letters: B batch, K kept tokens, L grid tokens, C channels.
"""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from mergevq.config import parts as settings
from mergevq.data.layouts import Ordered
from mergevq.nn.attention import level_mask
from mergevq.nn.blocks import EncoderBlock, run_blocks
from mergevq.nn.positions import sincos_2d
from mergevq.tokenizer.seams import TokenSet


class Holistic(nn.Module):
    """Blocks of attention over tokens of the whole image, class token and cells."""

    def __init__(self, config: settings.Holistic, dim: int) -> None:
        """Make the blocks; the encoder initialises them after its projection."""
        super().__init__()
        self.num_full_layers = config.num_full_layers
        self.holistic = nn.Parameter(torch.randn(config.num_holistic, dim) * dim**-0.5)
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
        """Run the first `num_layers` blocks (None: all) and keep the first `num_kept` tokens.

        All H + L tokens are run whatever K is, so that those of a smaller K are the first of a
        larger one.
        """
        cells = grid + sincos_2d(grid_shape, grid.shape[-1], grid.device).to(grid.dtype)
        holistic = self.holistic.to(grid.dtype).expand(len(grid), -1, -1)
        x = torch.cat([holistic, class_token, cells], dim=1)
        num_full = self.num_full_layers
        last = len(self.blocks) if num_layers is None else num_layers
        recompute = self.checkpointing and self.training
        outputs = dict.fromkeys((tap for tap in taps if tap <= num_full), x)
        x = run_blocks(self.blocks, x, min(num_full, last), recompute=recompute, outputs=outputs)
        if last > num_full:
            mask = level_mask(torch.arange(x.shape[1], device=x.device))
            later = dict.fromkeys((tap - num_full for tap in taps if tap > num_full), x)
            behind = self.blocks[num_full:last]
            x = run_blocks(behind, x, None, recompute=recompute, mask=mask, outputs=later)
            outputs |= {num_full + number: tokens for number, tokens in later.items()}
        place = len(self.holistic)
        kept, *tapped = (
            torch.cat([each[:, :place], each[:, place + 1 :]], dim=1)[:, :num_kept]
            for each in (x, *(outputs[tap] for tap in taps))
        )
        return TokenSet(kept, x[:, place], Ordered(num_kept), tuple(tapped))

    def implied(
        self,
        grid_shape: tuple[int, int],  # noqa: ARG002 - as of other reducers
        num_kept: int,
        num_images: int,  # noqa: ARG002
    ) -> Ordered:
        """The layout of `num_kept` tokens."""
        return Ordered(num_kept)
