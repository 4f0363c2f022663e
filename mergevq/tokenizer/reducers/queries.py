"""Learned queries that read the grid, and are all that is kept of it.

Source: Yu et al. 2024, "An Image is Worth 32 Tokens for Reconstruction and Generation", section 3.2
(arXiv:2406.07550); Ge et al. 2023, "Planting a SEED of Vision in Large Language Model", section 3
(causal queries, arXiv:2307.08041).

Differs: the code of a token is a linear map of its own query's output. In the authors' published
models of the first it is one of several neighbouring queries, whose outputs are reshaped where they
are to be transposed. Causal queries are in one sequence with the grid; SEED's look at features of a
frozen network by cross-attention.

Shape letters: B batch, K kept tokens, L grid tokens, C channels.
"""

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from mergevq.config import parts as settings
from mergevq.data.layouts import Ordered
from mergevq.nn.attention import level_mask
from mergevq.nn.blocks import EncoderBlock, run_blocks
from mergevq.nn.positions import sincos_2d
from mergevq.tokenizer.conditions.tokens import with_present
from mergevq.tokenizer.seams import TokenSet, Told


class Queries(nn.Module):
    """Blocks of attention over class token, grid and queries, of which the first K are kept."""

    def __init__(self, config: settings.Queries, dim: int) -> None:
        """Make the blocks; the encoder initialises them after its projection."""
        super().__init__()
        self.nested, self.causal = config.nested, config.causal
        self.queries = nn.Parameter(torch.randn(config.num_queries, dim) * dim**-0.5)
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
        told: Told | None = None,
    ) -> TokenSet:
        """Run the first `num_layers` blocks (None: all) and keep the first `num_kept` queries.

        Tokens of a condition, `told`, are seen by all as those of the image are.
        """
        cells = grid + sincos_2d(grid_shape, grid.shape[-1], grid.device).to(grid.dtype)
        num_run = len(self.queries) if self.nested else num_kept
        queries = self.queries[:num_run].to(grid.dtype).expand(len(grid), -1, -1)
        recompute = self.checkpointing and self.training
        seen = [class_token, cells]
        if told is not None:
            seen.append(told.tokens.to(grid.dtype))
        x = torch.cat([*seen, queries], dim=1)
        start = sum(each.shape[1] for each in seen)
        mask = causal_mask(start, num_run, x.device) if self.causal else None
        if told is not None:
            mask = with_present(mask, told.present, start, x.shape[1])
        outputs = dict.fromkeys(taps, x)
        x = run_blocks(self.blocks, x, num_layers, recompute=recompute, mask=mask, outputs=outputs)
        kept, *tapped = (
            each[:, start : start + num_kept] for each in (x, *(outputs[tap] for tap in taps))
        )
        return TokenSet(kept, x[:, 0], Ordered(num_kept), tuple(tapped))

    def implied(
        self,
        grid_shape: tuple[int, int],  # noqa: ARG002 - as of other reducers
        num_kept: int,
        num_images: int,  # noqa: ARG002
    ) -> Ordered:
        """The layout of `num_kept` queries."""
        return Ordered(num_kept)


def causal_mask(num_seen: int, num_queries: int, device: torch.device) -> Bool[Tensor, "n n"]:
    """Which inputs each sees: tokens of the image all of their kind, a query those before it too.

    Args:
        num_seen: tokens of the image, in front of the queries.
        num_queries: K.
        device: where the mask is made.
    """
    return level_mask((torch.arange(num_seen + num_queries, device=device) + 1 - num_seen).relu())
