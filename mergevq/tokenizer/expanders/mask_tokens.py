"""One mask token in every cell of the grid, which reads the codes by attention.

Source: Yu et al. 2024, "An Image is Worth 32 Tokens for Reconstruction and Generation", section 3.2
(arXiv:2406.07550).

Differs: these blocks give the input of any decoder, where the authors' are the decoder. Its norms
get no style, which would carry codes past these blocks.

Shape letters: B batch, L grid tokens, K kept tokens, D channels of codes, E channels given.
"""

from typing import ClassVar

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor, nn

from mergevq.config import parts as settings
from mergevq.data.layouts import Layout
from mergevq.nn.blocks import NORM_EPS, ContextBlock, initialize
from mergevq.nn.norm import LayerNorm
from mergevq.nn.positions import sincos_2d
from mergevq.tokenizer.seams import Expanded, Given


class MaskTokens(nn.Module):
    """Blocks of attention over cells and codes; the cells are what a decoder is given."""

    can_infer: ClassVar[bool] = False

    def __init__(self, config: settings.MaskTokens, code_dim: int, num_slots: int) -> None:
        """Build for at most `num_slots` codes of `code_dim` channels."""
        super().__init__()
        dim = config.dim
        self.mask = nn.Parameter(torch.randn(dim) * dim**-0.5)
        self.slots = nn.Parameter(torch.randn(num_slots, dim) * dim**-0.5)
        self.from_codes = nn.Linear(code_dim, dim)
        self.blocks = nn.ModuleList(
            ContextBlock(dim, config.num_heads) for _ in range(config.num_layers)
        )
        self.norm = LayerNorm(dim, eps=NORM_EPS)
        initialize(self)

    def forward(
        self, codes: Float[Tensor, "b k d"], layout: Layout, grid_shape: tuple[int, int]
    ) -> Given:
        """Let the cells of a grid read the codes.

        Raises:
            ValueError: there are more codes than slots.
        """
        num_kept, num_slots = layout.num_kept, len(self.slots)
        if num_kept > num_slots:
            raise ValueError(
                f"tokens ({num_kept}) must be at most {num_slots}, the queries "
                "(reducer.num_queries)"
            )
        read = self.from_codes(codes.to(self.mask.dtype))
        read = read + self.slots[:num_kept].to(read.dtype)
        cells = self.mask + sincos_2d(grid_shape, len(self.mask), codes.device)
        cells = cells.to(read.dtype).expand(len(codes), -1, -1)
        x = torch.cat([cells, read], dim=1)
        for block in self.blocks:
            x = block(x)
        return Given(self.norm(x[:, : cells.shape[1]]), grid_shape, None)

    def train_pass(
        self,
        codes: Float[Tensor, "b k d"],
        seen: Float[Tensor, "b k d"],  # noqa: ARG002 - nothing is inferred
        layout: Layout,
        grid_shape: tuple[int, int],
        *,
        inferred: Bool[Tensor, "b"] | None,  # noqa: ARG002 - the order is known of every image
    ) -> Expanded:
        """Expand in training; there is no loss of its own."""
        return Expanded(self(codes, layout, grid_shape), {})

    def infer(
        self,
        codes: Float[Tensor, "b k d"],
        grid_shape: tuple[int, int],  # noqa: ARG002 - as of other expanders
        anchors: Int64[Tensor, "b k"] | None = None,  # noqa: ARG002
    ) -> Layout:
        """Refuse: ordered tokens have a layout that nobody needs to infer."""
        raise ValueError(
            f"the layout of {codes.shape[1]} ordered tokens is known; there is nothing to infer"
        )
