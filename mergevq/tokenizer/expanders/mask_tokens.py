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
from torch.nn import functional

from mergevq.config import parts as settings
from mergevq.data.layouts import Layout
from mergevq.nn.blocks import NORM_EPS, ContextBlock, initialize
from mergevq.nn.norm import LayerNorm
from mergevq.nn.positions import sincos_2d
from mergevq.tokenizer.conditions.tokens import ClassTokens, TextTokens, told, with_present
from mergevq.tokenizer.seams import Condition, Expanded, Given


class MaskTokens(nn.Module):
    """Blocks of attention over cells and codes; the cells are what a decoder is given."""

    can_infer: ClassVar[bool] = False

    def __init__(
        self,
        config: settings.MaskTokens,
        code_dim: int,
        num_slots: int,
        condition: ClassTokens | TextTokens | None = None,
    ) -> None:
        """Build for at most `num_slots` codes of `code_dim` channels; a condition is of `dim`."""
        super().__init__()
        dim = config.dim
        self.mask = nn.Parameter(torch.randn(dim) * dim**-0.5)
        self.slots = nn.Parameter(torch.randn(num_slots, dim) * dim**-0.5)
        self.from_codes = nn.Linear(code_dim, dim)
        self.blocks = nn.ModuleList(
            ContextBlock(dim, config.num_heads) for _ in range(config.num_layers)
        )
        self.norm = LayerNorm(dim, eps=NORM_EPS)
        self.absent = None
        if config.absent == "token":
            self.absent = nn.Parameter(torch.randn(dim) * 0.02)
        initialize(self)
        self.condition = condition

    def forward(
        self,
        codes: Float[Tensor, "b k d"],
        layout: Layout,
        grid_shape: tuple[int, int],
        lengths: Int64[Tensor, "b"] | None = None,
        condition: Condition | None = None,
    ) -> Given:
        """Let the cells of a grid read the codes.

        Args:
            codes: of ordered tokens.
            layout: theirs.
            grid_shape: (height, width) in cells.
            lengths: tokens that each image has, the first ones; None is all.
            condition: of the images, where the expander was built for one.

        Raises:
            ValueError: there are more codes than slots, or a condition is missing.
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
        seen = told(self.condition, condition)
        before = cells if seen is None else torch.cat([cells, seen.tokens.to(read.dtype)], dim=1)
        read, mask = self._present(read, lengths, before.shape[1])
        x = torch.cat([before, read], dim=1)
        if seen is not None:
            mask = with_present(mask, seen.present, before.shape[1], x.shape[1])
        for block in self.blocks:
            x = block(x, mask)
        return Given(self.norm(x[:, : cells.shape[1]]), grid_shape, None)

    def _present(
        self, read: Float[Tensor, "b k e"], lengths: Int64[Tensor, "b"] | None, num_before: int
    ) -> tuple[Float[Tensor, "b n e"], Bool[Tensor, "b 1 1 m"] | None]:
        """Embedded codes without those that are absent, and which inputs are seen (None: all)."""
        if self.absent is None and lengths is None:
            return read, None
        num_kept, num_slots = read.shape[1], len(self.slots)
        slots = torch.arange(num_slots, device=read.device)
        ends = num_kept if lengths is None else lengths[:, None]
        present = (slots < ends).expand(len(read), -1)
        if self.absent is None:
            return read, functional.pad(present[:, None, None, :num_kept], (num_before, 0), value=1)
        absent = (self.absent + self.slots).to(read.dtype)
        padded = functional.pad(read, (0, 0, 0, num_slots - num_kept))
        return torch.where(present[..., None], padded, absent), None

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
        """Expand in training; there is no loss of its own."""
        return Expanded(self(codes, layout, grid_shape, lengths, condition), {})

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
