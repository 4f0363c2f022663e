"""Tokens as a flow decoder is given them, and which of them it sees.

Source: Bachmann et al. 2025, "FlexTok: Resampling Images into 1D Token Sequences of Flexible
Length", section 3 (nested dropout, and a vector in the place of what is dropped, arXiv:2502.13967).

Differs: tokens with a source map have an order of their own, by the number of cells; without their
source map, which is always there, the first ones would be the top of the picture.

Shape letters: B batch, K tokens, N slots, L cells, D channels of codes, C channels.
"""

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor, nn
from torch.nn import functional

from mergevq.data.layouts import Layout, Source
from mergevq.nn.positions import to_grid, to_tokens
from mergevq.nn.rows import take_rows


class Shown(NamedTuple):
    """Tokens of some images, and how much of them a decoder is shown."""

    codes: Float[Tensor, "b k d"]
    """Codes in the order of the layout."""
    layout: Layout
    """Places of the tokens."""
    grid_shape: tuple[int, int]
    """(height, width) in cells."""
    lengths: Int64[Tensor, "b"] | None = None
    """Tokens that each image shows, the first by `ranks`; None is all."""
    is_null: Bool[Tensor, "b"] | None = None
    """Images that show nothing, not even that their tokens are hidden; None is none."""

    def without(self) -> "Shown":
        """The same images showing nothing."""
        shape, device = (len(self.codes),), self.codes.device
        return self._replace(is_null=torch.ones(shape, dtype=torch.bool, device=device))


class Embedded(NamedTuple):
    """Tokens that a decoder has read, once for an image and for all times."""

    tokens: Float[Tensor, "b n c"]
    """Tokens by slot; where a decoder has a condition of each patch, these."""
    ranks: Int64[Tensor, "b n"]
    """Place of each among the tokens of its image, from 0, by how much it matters."""
    lengths: Int64[Tensor, "b"]
    """Tokens that are shown, of the lowest ranks."""
    is_null: Bool[Tensor, "b"]
    """Images that show nothing."""
    cells: Int64[Tensor, "b l"] | None
    """Slot that each cell has its token in; None of ordered tokens."""
    grid_shape: tuple[int, int]
    """(height, width) in cells."""

    def repeated(self, count: int) -> "Embedded":
        """The images several times, one round after the other."""
        if count == 1:
            return self
        return Embedded(
            tokens=self.tokens.repeat(count, 1, 1),
            ranks=self.ranks.repeat(count, 1),
            lengths=self.lengths.repeat(count),
            is_null=self.is_null.repeat(count),
            cells=None if self.cells is None else self.cells.repeat(count, 1),
            grid_shape=self.grid_shape,
        )


def ranks(layout: Layout, num_images: int, device: torch.device) -> Int64[Tensor, "b k"]:
    """Place of each token among those of its image, from 0, by how much it matters.

    Ordered tokens come in their order; with a source map those of more cells come first, and of
    equally many those that open first.
    """
    if not isinstance(layout, Source):
        return torch.arange(layout.num_kept, device=device).expand(num_images, -1)
    order = layout.sizes().argsort(dim=1, descending=True, stable=True)
    return order.argsort(dim=1)


class TokenReader(nn.Module):
    """Codes to channels; a vector for those that are hidden, and one for images without any."""

    def __init__(self, code_dim: int, dim: int, num_slots: int | None) -> None:
        """Make the layers; without a number of slots there is one for each token."""
        super().__init__()
        self.num_slots = num_slots
        self.embed = nn.Linear(code_dim, dim)
        self.hidden = nn.Parameter(0.02 * torch.randn(dim))
        self.null = nn.Parameter(0.02 * torch.randn(dim))

    def forward(self, shown: Shown) -> Embedded:
        """Embed all tokens; slots that an image has no token for are hidden.

        Raises:
            ValueError: there are more tokens than slots.
        """
        codes, layout, device = shown.codes, shown.layout, shown.codes.device
        batch, count = codes.shape[:2]
        slots = count if self.num_slots is None else self.num_slots
        if count > slots:
            raise ValueError(
                f"tokens ({count}) must be at most {slots}, the most that the decoder was trained "
                "with"
            )
        last = torch.arange(count, slots, device=device).expand(batch, -1)
        lengths, is_null = shown.lengths, shown.is_null
        if lengths is None:
            lengths = torch.full((batch,), count, device=device)
        if is_null is None:
            is_null = torch.zeros(batch, dtype=torch.bool, device=device)
        return Embedded(
            # Padded before, so that the same tokens are the same bits among any number.
            tokens=self.embed(functional.pad(codes, (0, 0, 0, slots - count))),
            ranks=torch.cat([ranks(layout, batch, device), last], dim=1),
            lengths=lengths.clamp(max=count),
            is_null=is_null,
            cells=layout.index if isinstance(layout, Source) else None,
            grid_shape=shown.grid_shape,
        )

    def seen(
        self, embedded: Embedded, visible: Bool[Tensor, "b n"] | None = None
    ) -> Float[Tensor, "b n c"]:
        """Tokens by slot, with a vector in the place of each that is hidden.

        Args:
            embedded: of `forward`.
            visible: further slots are hidden where it is false; None hides no more.
        """
        shows = embedded.ranks < embedded.lengths[:, None]
        if visible is not None:
            shows = shows & visible
        tokens = embedded.tokens
        hidden = self.hidden.to(tokens.dtype)
        tokens = torch.where(shows[..., None], tokens, hidden)
        return torch.where(embedded.is_null[:, None, None], self.null.to(tokens.dtype), tokens)


def on_patches(
    tokens: Float[Tensor, "b n c"],
    index: Int64[Tensor, "b l"],
    grid_shape: tuple[int, int],
    num_patches: int,
) -> Float[Tensor, "b m c"]:
    """The token of the cell that each patch lies in.

    Args:
        tokens: by slot.
        index: slot of each cell.
        grid_shape: (height, width) in cells.
        num_patches: patches along a side of a cell.
    """
    grid = to_grid(take_rows(tokens, index), grid_shape)
    return to_tokens(functional.interpolate(grid, scale_factor=num_patches, mode="nearest"))
