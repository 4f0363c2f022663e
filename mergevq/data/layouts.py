"""Layouts: what a decoder must know about tokens besides their codes, and the bits it costs.

The source map says which kept token each grid token joined; ordered tokens need no map.

Source: Li et al. 2025, "MergeVQ", section 3.2 and appendix A.1 (arXiv:2504.00999).

Differs: the paper's source matrix is never built, an index per grid token does its work in O(L);
kept tokens leave in canonical order (by the lowest raster cell of their group), not in the order
the matching happens to produce.

Shape letters: B batch, L grid tokens, K kept tokens, C channels.
"""

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from mergevq.nn.rows import take_rows, weighted_sum


class Bits(NamedTuple):
    """Cost of storing one image, in bits."""

    tokens: float
    """K tokens of D bits each; NaN of real numbers."""
    source: float
    """The source map: log2 of the number of maps that exist for this L and K."""

    condition: float = 0.0
    """The condition: log2 of the number of classes, or the longest text; 0 without one."""

    @property
    def total(self) -> float:
        """Tokens, source and condition."""
        return self.tokens + self.source + self.condition


@dataclass(frozen=True, slots=True)
class Source:
    """Which kept token each grid token went into.

    The paper's source matrix S of shape (B, K, L) is `one_hot(index).mT`. In canonical order the
    map is a causal sequence: in raster order every cell either opens the next kept token or copies
    one that is open.
    """

    index: Int64[Tensor, "b l"]
    """Position of the kept token, in [0, num_kept)."""

    num_kept: int
    """K."""

    is_implied: bool = False
    """Whether the grid and K imply the map, as of blocks of equal size: then it costs nothing."""

    def sizes(self) -> Int64[Tensor, "b k"]:
        """Grid tokens per kept token; each row sums to L."""
        zeros = self.index.new_zeros(self.index.shape[0], self.num_kept)
        return zeros.scatter_add(1, self.index, torch.ones_like(self.index))

    def anchors(self) -> Int64[Tensor, "b k"]:
        """Lowest raster cell of each kept token's group; increasing in canonical order.

        A kept token that no cell points to, as a predicted source may have, gets L.
        """
        batch, num_tokens = self.index.shape
        cells = torch.arange(num_tokens, device=self.index.device).expand(batch, -1)
        last = self.index.new_full((batch, self.num_kept), num_tokens)
        return last.scatter_reduce(1, self.index, cells, reduce="amin")

    def bits(self, bits_per_token: float) -> Bits:
        """Bits of one image: its K tokens of `bits_per_token` each, and its source map.

        The source is counted as an index into all maps of L cells onto K tokens in canonical
        order, of which there are as many as partitions of L things into K groups: the shortest
        code of one length for all, and the same number for every image.
        """
        num_tokens = self.index.shape[1]
        side = 0.0 if self.is_implied else source_bits(num_tokens, self.num_kept)
        return Bits(self.num_kept * bits_per_token, side)

    def rows(self, index: slice) -> "Source":
        """The maps of some images of a batch."""
        return replace(self, index=self.index[index])

    def to(self, device: torch.device | str) -> "Source":
        """The same map on another device."""
        return replace(self, index=self.index.to(device))


@dataclass(frozen=True, slots=True)
class Ordered:
    """Tokens in an order that says all about their places: a list, or the raster of a grid."""

    num_kept: int
    """K."""

    def bits(self, bits_per_token: float) -> Bits:
        """Bits of one image: its K tokens; the order costs nothing."""
        return Bits(self.num_kept * bits_per_token, 0.0)

    def rows(self, index: slice) -> "Ordered":  # noqa: ARG002 - as of a source map
        """The layout of some images of a batch: that of all."""
        return self

    def to(self, device: torch.device | str) -> "Ordered":  # noqa: ARG002 - as of a source map
        """The same layout: it has no tensor."""
        return self


Layout = Source | Ordered


def grid_of(layout: Layout, grid_shape: tuple[int, int] | None, num_cells: int) -> tuple[int, int]:
    """Rows and columns of the grid that tokens are decoded on.

    Args:
        layout: of the tokens.
        grid_shape: those that are asked for; None is a square.
        num_cells: of the square, where the layout has no cells.

    Raises:
        ValueError: the grid has other cells than the layout.
    """
    if grid_shape is None:
        side = math.isqrt(layout.index.shape[1] if isinstance(layout, Source) else num_cells)
        grid_shape = (side, side)
    if isinstance(layout, Source) and math.prod(grid_shape) != layout.index.shape[1]:
        raise ValueError(
            f"grid_shape {grid_shape} must have the {layout.index.shape[1]} cells of the "
            "source; pass the grid_shape that encode returned"
        )
    return grid_shape


def blocks(grid_shape: tuple[int, int], counts: tuple[int, int], num_images: int = 1) -> Source:
    """The map of a grid cut into blocks: cell (r, c) is in block (r n // h, c m // w).

    Args:
        grid_shape: (h, w) in cells.
        counts: (n, m), blocks along each direction, at most as many as cells.
        num_images: rows of the map, all alike.
    """
    (height, width), (rows, columns) = grid_shape, counts
    down = torch.arange(height) * rows // height
    along = torch.arange(width) * columns // width
    index = (down[:, None] * columns + along).flatten()
    return Source(index.expand(num_images, -1), rows * columns, is_implied=True)


def joined(layouts: Sequence[Layout]) -> Layout:
    """The layout of several batches of one tokenizer, at one K, as one batch."""
    first = layouts[0]
    if isinstance(first, Ordered):
        return first
    maps = [require_source(layout, "joining batches") for layout in layouts]
    return replace(first, index=torch.cat([each.index for each in maps]))


def require_source(layout: Layout, purpose: str) -> Source:
    """The source map of a layout.

    Args:
        layout: of a batch of images.
        purpose: what needs the map, for the message.

    Raises:
        ValueError: the layout has none.
    """
    if isinstance(layout, Source):
        return layout
    raise ValueError(
        f"{purpose} needs a source map, and the {layout.num_kept} tokens of this tokenizer are "
        "ordered and have none; take a tokenizer whose model.reducer.kind is merge or pool"
    )


@functools.cache
def source_bits(num_tokens: int, num_kept: int) -> float:
    """Log2 of the Stirling number of the second kind S(num_tokens, num_kept).

    Examples:
        Three cells onto two tokens: 0 0 1, 0 1 0 and 0 1 1.

        >>> round(2 ** source_bits(3, 2))
        3
    """
    # S(n, k) = k S(n-1, k) + S(n-1, k-1); Python's integers keep it exact at any size.
    row = [1] + [0] * num_kept
    for _ in range(num_tokens):
        row = [0] + [k * row[k] + row[k - 1] for k in range(1, num_kept + 1)]
    return math.log2(row[num_kept])


def merge(grid: Float[Tensor, "b l c"], source: Source) -> Float[Tensor, "b k c"]:
    """Average the grid tokens that share a kept token; one that no cell points to is 0."""
    sizes = source.sizes().to(torch.promote_types(grid.dtype, torch.float32))
    shares = 1 / sizes.gather(1, source.index)
    return weighted_sum(grid, shares, source.index, source.num_kept).to(grid.dtype)


def unmerge(kept: Float[Tensor, "b k c"], source: Source) -> Float[Tensor, "b l c"]:
    """Copy each kept token to every grid cell it stands for (paper, equation 11)."""
    return take_rows(kept, source.index)


class Canonical(NamedTuple):
    """Kept tokens in canonical order."""

    source: Source
    """The source map of the ordered tokens."""
    order: Int64[Tensor, "b k"]
    """Position each of them had before; `take_rows(tokens, order)` orders them."""


def canonicalize(source: Source) -> Canonical:
    """Sort kept tokens by anchor, the lowest raster cell of their group."""
    order = source.anchors().argsort(-1)
    rank = order.argsort(-1)
    return Canonical(Source(rank.gather(1, source.index), source.num_kept), order)
