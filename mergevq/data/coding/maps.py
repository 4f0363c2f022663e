"""Source maps as a range coder writes them, with models that learn on the way.

In canonical order every cell, in raster order, either opens the next kept token or copies one that
is open. *Open or copy* is predicted from what the neighbours did, and from how many tokens and
cells are left. A copy names a *neighbour* that has the same token, of six, or *escapes* to one of
the other open tokens, larger and nearer groups first.

A map that no neighbour predicts is written `uniform`: every map is then as likely as any other, at
the price that `data.layouts.source_bits` says. `map_bits` is the shorter of both, measured.

All of it is arithmetic of whole numbers. The same functions write and read, so that both cannot
differ; where they read, what they are given for the symbols is ignored.

Source: Rissanen and Langdon 1981, "Universal modeling and coding", IEEE Transactions on Information
Theory 27, for adaptive contexts; the map as a causal sequence is that of `data.layouts.Source`.

Shape letters: B batch or tiles, L grid cells, K kept tokens.
"""

import functools
import math
from collections import defaultdict
from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from jaxtyping import Int64
from torch import Tensor

from mergevq.config.base import check_choice
from mergevq.data.coding.streams import TOTAL, Coder, Writer
from mergevq.data.layouts import Source

MapModel = Literal["context", "uniform"]
"""Model of a source map: neighbours that predict, or all maps equally likely."""

OFFSETS = ((0, -1), (-1, 0), (-1, -1), (-1, 1), (0, -2), (-2, 0))
"""Neighbours whose token a cell may copy, as (rows, columns) from it: left, up, up-left, up-right,
and the two behind left and up."""
_NEAR = 4
"""Neighbours, the first of these, that make contexts."""
_FIRST = (18, 18, 9, 9, 6, 6)
"""Weights of the neighbours before anything was learned."""
_FIRST_ESCAPE = 12
_STEP = 12
"""Weight that each copied cell adds; neighbours that have the same token share it."""
_PRIOR = 6
"""Cells that the share of tokens left to open counts for, beside the cells seen in a context."""
_MOST_WEIGHTED = 1024
"""Open tokens up to which an escape looks at sizes and distances of all."""
_DISTANCE = 2**16
"""Weight of an open token of one cell at distance 0; whole where it is divided."""
_UNIFORM_CELLS = 2**18
"""Largest L times K that `uniform` has a table for."""
_FRACTION = 40
"""Bits behind the point in that table."""


# --------------------------------------------------------------------------------------- maps


class CellContext(NamedTuple):
    """Neighbours of a cell that are in the grid and before it, in the order of `OFFSETS`."""

    cells: tuple[int, ...]
    """Their raster numbers."""
    directions: tuple[int, ...]
    """Their numbers in `OFFSETS`."""
    num_near: int
    """The first so many of them make contexts."""


@functools.lru_cache(maxsize=8)
def cell_contexts(height: int, width: int) -> list[CellContext]:
    """Neighbours of every cell of a grid in raster order."""
    return [_cell_context(row, column, width) for row in range(height) for column in range(width)]


def _cell_context(row: int, column: int, width: int) -> CellContext:
    """Neighbours of a cell."""
    found = [
        (direction, (row + down) * width + column + right)
        for direction, (down, right) in enumerate(OFFSETS)
        if row + down >= 0 and 0 <= column + right < width
    ]
    directions = tuple(direction for direction, _ in found)
    near = sum(direction < _NEAR for direction in directions)
    return CellContext(tuple(cell for _, cell in found), directions, near)


class MapCoder:
    """Codes source maps of one grid one after the other, and learns from each."""

    def __init__(self, grid_shape: tuple[int, int], num_kept: int) -> None:
        """Begin with nothing learned.

        Args:
            grid_shape: (height, width) in cells.
            num_kept: K of every map.
        """
        self.height, self.width = grid_shape
        self.num_kept = num_kept
        self._seen: dict[int, list[int]] = defaultdict(lambda: [0, 0])
        self._weights: dict[int, list[int]] = defaultdict(lambda: [*_FIRST])
        self._escape: dict[int, int] = defaultdict(lambda: _FIRST_ESCAPE)

    def code(self, coder: Coder, index: Sequence[int]) -> list[int]:
        """Write a map, or read one; returns it.

        Args:
            coder: where to.
            index: kept token of each cell, canonical; read, anything of that length.
        """
        num_cells = self.height * self.width
        found: list[int] = []
        opened: list[bool] = []
        sizes: list[int] = []
        last: list[int] = []
        for cell, context in enumerate(cell_contexts(self.height, self.width)):
            num_open, num_left = len(sizes), num_cells - cell
            to_open = self.num_kept - num_open
            if num_open == 0 or to_open == num_left:
                opens = True
            elif to_open == 0:
                opens = False
            else:
                near = [opened[each] for each in context.cells[: context.num_near]]
                given = int(index[cell] == num_open)
                opens = self._opens(coder, near, to_open, num_left, given)
            if opens:
                token = num_open
                sizes.append(0)
                last.append(0)
            else:
                token = self._copies(coder, found, sizes, last, index[cell])
            sizes[token] += 1
            last[token] = cell
            found.append(token)
            opened.append(opens)
        return found

    def _opens(
        self, coder: Coder, near: Sequence[bool], to_open: int, num_left: int, given: int
    ) -> bool:
        """Whether a cell opens the next token.

        The context is the share of neighbours that did, in quarters; before any was seen in it, the
        share of cells that must.
        """
        counts = self._seen[-1 if not near else (4 * sum(near) * 2 + len(near)) // (2 * len(near))]
        frequencies = [
            counts[0] * num_left + _PRIOR * (num_left - to_open),
            counts[1] * num_left + _PRIOR * to_open,
        ]
        symbol = coder.code(frequencies, given)
        counts[symbol] += 1
        return bool(symbol)

    def _copies(
        self,
        coder: Coder,
        found: Sequence[int],
        sizes: Sequence[int],
        last: Sequence[int],
        token: int,
    ) -> int:
        """Open token that a cell copies: a neighbour's, or one of the others."""
        cell = len(found)
        context = cell_contexts(self.height, self.width)[cell]
        beside = [found[each] for each in context.cells]
        kind = len(set(beside[: context.num_near]))
        weights = self._weights[kind]
        candidates: dict[int, int] = {}
        for direction, each in zip(context.directions, beside, strict=True):
            candidates[each] = candidates.get(each, 0) + weights[direction]
        tokens, frequencies = list(candidates), list(candidates.values())
        if len(candidates) < len(sizes):
            frequencies.append(self._escape[kind])
        if len(frequencies) == 1:
            return tokens[0]
        symbol = tokens.index(token) if token in candidates else len(tokens)
        symbol = coder.code(frequencies, symbol)
        if symbol < len(tokens):
            same = [
                d for d, t in zip(context.directions, beside, strict=True) if t == tokens[symbol]
            ]
            for direction in same:
                weights[direction] += _STEP // len(same)
            return tokens[symbol]
        self._escape[kind] += _STEP
        others = [each for each in range(len(sizes)) if each not in candidates]
        position = others.index(token) if token in others else 0
        return others[self._points(coder, others, position, sizes, last, cell)]

    def _points(
        self,
        coder: Coder,
        others: Sequence[int],
        position: int,
        sizes: Sequence[int],
        last: Sequence[int],
        cell: int,
    ) -> int:
        """Position among the open tokens that no neighbour has."""
        if not 1 < len(others) <= _MOST_WEIGHTED:
            return coder.uniform(len(others), position)
        row, column = divmod(cell, self.width)
        frequencies = []
        for token in others:
            last_row, last_column = divmod(last[token], self.width)
            distance = row - last_row + abs(column - last_column)
            frequencies.append(_DISTANCE * sizes[token] // (1 + distance) + 1)
        return coder.code(frequencies, position)


def code_uniform(
    coder: Coder, index: Sequence[int], grid_shape: tuple[int, int], num_kept: int
) -> list[int]:
    """Write a map, or read one, where all maps are equally likely; returns it.

    The arguments are those of `MapCoder`. The price of any map is `source_bits(L, K)`.
    """
    num_cells = math.prod(grid_shape)
    table = open_shares(num_cells, num_kept)
    found: list[int] = []
    num_open = 0
    for cell in range(num_cells):
        num_left = num_cells - cell
        share = table[num_left][num_open]
        if 0 < share < TOTAL:
            symbol = coder.code([TOTAL - share, share], int(index[cell] == num_open))
        else:
            symbol = int(share > 0)
        if symbol:
            found.append(num_open)
            num_open += 1
        else:
            found.append(coder.uniform(num_open, index[cell]))
    return found


def has_uniform(num_cells: int, num_kept: int) -> bool:
    """Whether `code_uniform` has a table for so many cells and tokens."""
    return num_cells * num_kept <= _UNIFORM_CELLS


@functools.lru_cache(maxsize=4)
def open_shares(num_cells: int, num_kept: int) -> list[list[int]]:
    """Share, of `TOTAL`, of the maps in which the next cell opens a token.

    `open_shares(L, K)[n][j]` is for n cells that are left and j tokens that are open. With N(n, j)
    the number of ways to go on, N(n, j) = j N(n-1, j) + N(n-1, j+1); the table follows the ratio
    N(n, j+1) / N(n, j), which stays small where N itself has thousands of digits.
    """
    one = 1 << _FRACTION
    ratios = [0] * (num_kept + 1)
    table = [[TOTAL] * num_kept + [0]]
    for num_left in range(1, num_cells + 1):
        # Where as many tokens as cells are left, all open; the first cell always does.
        forced = num_kept - num_left
        row, following = [TOTAL] * num_kept + [0], [0] * (num_kept + 1)
        if forced >= 1:
            # One way to go on. With one token more open, one cell copies instead.
            following[forced] = one * sum(range(forced + 1, num_kept + 1))
        for num_open in range(max(1, forced + 1), num_kept):
            ratio, above = ratios[num_open], ratios[num_open + 1]
            ways = num_open * one + ratio
            # Neither is certain where both are possible.
            row[num_open] = min(max(1, TOTAL * ratio // ways), TOTAL - 1)
            following[num_open] = ratio * ((num_open + 1) * one + above) // ways
        table.append(row)
        ratios = following
    return table


def map_bits(source: Source, grid_shape: tuple[int, int] | None = None) -> list[int]:
    """Bits of each source map as it is written, by itself: measured, not a bound.

    Streams are whole words of 32 bits. `Source.bits` is the bound beside it: the price where all
    maps are equally likely.

    Args:
        source: in canonical order.
        grid_shape: (height, width) in cells; None is a square.

    Raises:
        ValueError: a map is not canonical, or not of this grid.
        RuntimeError: the `codec` extra is not installed.
    """
    side = math.isqrt(source.index.shape[1])
    shape = grid_shape or (side, side)
    return [
        8 * len(write_maps(source.rows(slice(i, i + 1)), shape)[1])
        for i in range(len(source.index))
    ]


def write_maps(source: Source, grid_shape: tuple[int, int]) -> tuple[MapModel, bytes]:
    """Maps as a stream of their own, by the model that makes it shorter."""
    streams: list[tuple[MapModel, bytes]] = []
    for model in map_models(source.index.shape[1], source.num_kept):
        writer = Writer()
        code_maps(writer, model, source.index, grid_shape, source.num_kept)
        streams.append((model, writer.to_bytes()))
    return min(streams, key=lambda stream: len(stream[1]))


def map_models(num_cells: int, num_kept: int) -> tuple[MapModel, ...]:
    """Models that there are for maps of such a grid."""
    return ("context", "uniform") if has_uniform(num_cells, num_kept) else ("context",)


def code_maps(
    coder: Coder,
    model: MapModel,
    index: Int64[Tensor, "b l"],
    grid_shape: tuple[int, int],
    num_kept: int,
) -> Int64[Tensor, "b l"]:
    """Write maps, or read as many; returns them.

    Args:
        coder: where to.
        model: see `MapModel`.
        index: kept token of each cell, canonical; read, anything of that shape.
        grid_shape: (height, width) in cells.
        num_kept: K of every map.

    Raises:
        ValueError: a map that is written is not canonical, the grid does not fit, or a stream that
            is read is not one of maps.
    """
    check_choice("model", model, MapModel)
    if math.prod(grid_shape) != index.shape[1]:
        raise ValueError(
            f"grid_shape {grid_shape} must have the {index.shape[1]} cells of the source"
        )
    if isinstance(coder, Writer):
        require_canonical(index, num_kept)
    context = MapCoder(grid_shape, num_kept)
    rows = [
        context.code(coder, row)
        if model == "context"
        else code_uniform(coder, row, grid_shape, num_kept)
        for row in index.tolist()
    ]
    return torch.tensor(rows, dtype=torch.int64).view(index.shape)


def require_canonical(index: Int64[Tensor, "b l"], num_kept: int) -> None:
    """Raise `ValueError` unless each map has K tokens, first met in the order 0, 1, 2, .."""
    for number, row in enumerate(index.tolist()):
        num_open = 0
        for token in row:
            if not 0 <= token <= num_open:
                break
            num_open += token == num_open
        else:
            if num_open == num_kept:
                continue
        raise ValueError(
            f"source of image {number} must meet its {num_kept} kept tokens in the order 0, 1, "
            f"2, .. and meets {num_open} so; data.layouts.canonicalize orders it"
        )
