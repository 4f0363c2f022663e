"""Tokens of the cells, which read those of the whole image before them.

Source: Zheng et al. 2025, "Hita: Holistic Tokenizer for Autoregressive Image Generation", section 3
(arXiv:2507.02358).

Differs: what a decoder is given for a cell is read at the token of the cell itself. The authors
read it four tokens before, so that the first cells are made without their own tokens and the last
four tokens are never read. These blocks give the input of any decoder.

Shape letters: B batch, L grid tokens, K kept tokens, D channels of codes, E channels given.
"""

from typing import ClassVar

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor, nn

from mergevq.config import parts as settings
from mergevq.data.layouts import Layout
from mergevq.nn.attention import level_mask
from mergevq.nn.blocks import NORM_EPS, ContextBlock, initialize
from mergevq.nn.norm import LayerNorm
from mergevq.nn.positions import sincos_2d
from mergevq.tokenizer.seams import Condition, Expanded, Given


class Fuse(nn.Module):
    """Blocks of attention over codes of the whole image and of cells, in place of cells without."""

    can_infer: ClassVar[bool] = False

    def __init__(self, config: settings.Fuse, code_dim: int, num_holistic: int) -> None:
        """Build for codes of `code_dim` channels, of which the first are of the whole image."""
        super().__init__()
        dim = config.dim
        self.is_causal = config.fusion == "causal"
        self.mask = nn.Parameter(torch.randn(dim) * dim**-0.5)
        self.slots = nn.Parameter(torch.randn(num_holistic, dim) * dim**-0.5)
        self.from_codes = nn.Linear(code_dim, dim)
        self.blocks = nn.ModuleList(
            ContextBlock(dim, config.num_heads) for _ in range(config.num_layers)
        )
        self.norm = LayerNorm(dim, eps=NORM_EPS)
        initialize(self)

    def forward(
        self,
        codes: Float[Tensor, "b k d"],
        layout: Layout,
        grid_shape: tuple[int, int],
        *,
        condition: Condition | None = None,  # noqa: ARG002 - of ordered tokens alone
    ) -> Given:
        """Let the cells of a grid read the codes; one without a code has a learned vector.

        Args:
            codes: of the whole image, then of cells.
            layout: theirs.
            grid_shape: (height, width) in cells.
            condition: of ordered tokens alone.

        Raises:
            ValueError: there are more codes than tokens of the whole image and cells.
        """
        num_kept, num_holistic = layout.num_kept, len(self.slots)
        positions = sincos_2d(grid_shape, len(self.mask), codes.device)
        lacking = num_holistic + len(positions) - num_kept
        if lacking < 0:
            raise ValueError(
                f"tokens ({num_kept}) must be at most {num_holistic + len(positions)}: "
                f"{num_holistic} of the whole image and {len(positions)} of cells"
            )
        read = self.from_codes(codes.to(self.mask.dtype))
        holistic, cells = read[:, :num_holistic], read[:, num_holistic:]
        holistic = holistic + self.slots[:num_kept].to(read.dtype)
        absent = self.mask.to(read.dtype).expand(len(read), min(lacking, len(positions)), -1)
        cells = torch.cat([cells, absent], dim=1) + positions.to(read.dtype)
        x = torch.cat([holistic, cells], dim=1)
        mask = level_mask(torch.arange(x.shape[1], device=x.device)) if self.is_causal else None
        for block in self.blocks:
            x = block(x, mask)
        return Given(self.norm(x[:, holistic.shape[1] :]), grid_shape, None)

    def train_pass(
        self,
        codes: Float[Tensor, "b k d"],
        seen: Float[Tensor, "b k d"],  # noqa: ARG002 - nothing is inferred
        layout: Layout,
        grid_shape: tuple[int, int],
        *,
        inferred: Bool[Tensor, "b"] | None,  # noqa: ARG002 - the order is known of every image
        lengths: Int64[Tensor, "b"] | None = None,
        condition: Condition | None = None,
    ) -> Expanded:
        """Expand in training; there is no loss of its own.

        Raises:
            ValueError: there are `lengths`.
        """
        if lengths is not None:
            raise ValueError(
                f"each of the {layout.num_kept} tokens of an image is read, and none can be "
                "dropped; take a tokenizer whose model.reducer.kind is queries"
            )
        return Expanded(self(codes, layout, grid_shape, condition=condition), {})

    def infer(
        self,
        codes: Float[Tensor, "b k d"],
        grid_shape: tuple[int, int],  # noqa: ARG002 - as of other expanders
        anchors: Int64[Tensor, "b k"] | None = None,  # noqa: ARG002
    ) -> Layout:
        """Refuse: tokens in an order have a layout that nobody needs to infer."""
        raise ValueError(
            f"the layout of {codes.shape[1]} ordered tokens is known; there is nothing to infer"
        )
