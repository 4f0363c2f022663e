"""Tokens as a range coder writes them, bit by bit, with statistics that are learned on the way.

A part of a token with 2**n values is n bits. A part with another number of values is coded along a
binary tree whose impossible branches cost nothing. Each bit is predicted from its own statistics
and from the same bit of the tokens beside it: where there is a source map, those to the left of and
above the cell that opened the token, else the token before.

Shape letters: B tiles of a picture, K kept tokens, L grid cells, P parts of a token.
"""

import math
from collections.abc import Sequence

import torch
from jaxtyping import Int64
from torch import Tensor

from mergevq.data.coding.streams import TOTAL, Coder
from mergevq.data.layouts import Source

_LEAST = TOTAL // 16
"""Least share of either value of a bit."""
LEAST_BITS = -math.log2(1 - 1 / 16)
"""Fewest bits that a bit of a token takes: the least size of a file of so many tokens."""
_PARENT = 4
"""Weight of a bit's own statistics beside those of its context."""


class TokenCoder:
    """Codes the tokens of one picture after the other, and learns from each."""

    def __init__(self, sizes: Sequence[int]) -> None:
        """Begin with nothing learned.

        Args:
            sizes: values of each part of a token, as `CodeSpec.sizes` has them.
        """
        self.sizes = tuple(sizes)
        self._own: dict[tuple[int, int, int], list[int]] = {}
        self._context: dict[tuple[tuple[int, int, int], int], list[int]] = {}

    def code(
        self, coder: Coder, parts: Sequence[Sequence[int]], beside: Sequence[Sequence[int]]
    ) -> list[list[int]]:
        """Write the tokens of a picture, or read them; returns them.

        Args:
            coder: where to.
            parts: of each token; read, anything of that shape.
            beside: positions of earlier tokens that predict each token; see `neighbours`.
        """
        found: list[list[int]] = []
        for token, near in zip(parts, beside, strict=True):
            values = [
                self._part(coder, number, token[number], [found[each][number] for each in near])
                for number in range(len(self.sizes))
            ]
            found.append(values)
        return found

    def _part(self, coder: Coder, number: int, value: int, near: Sequence[int]) -> int:
        """One part of a token, from its highest bit on."""
        size = self.sizes[number]
        is_binary = size & (size - 1) == 0
        prefix = 0
        for place in reversed(range((size - 1).bit_length())):
            if ((2 * prefix + 1) << place) >= size:
                prefix *= 2
                continue
            key = (number, place, 0 if is_binary else prefix)
            ones = sum(each >> place & 1 for each in near)
            # The sum of their signs; 3 where there is no token beside it.
            context = 2 * ones - len(near) if near else 3
            prefix = 2 * prefix + self._bit(coder, key, context, value >> place & 1)
        return prefix

    def _bit(self, coder: Coder, key: tuple[int, int, int], context: int, bit: int) -> int:
        """One bit: counts of its context, and the share of its own counts for those to come."""
        own = self._own.setdefault(key, [2, 2])
        counts = self._context.setdefault((key, context), [0, 0])
        total = sum(own)
        zero, one = (counts[each] * total + _PARENT * own[each] for each in (0, 1))
        share = min(max(TOTAL * one // (zero + one), _LEAST), TOTAL - _LEAST)
        bit = coder.code([TOTAL - share, share], bit)
        own[bit] += 1
        counts[bit] += 1
        return bit


def neighbours(source: Source, grid_shape: tuple[int, int]) -> list[list[list[int]]]:
    """For each token of each map, the tokens left of and above the cell that opened it.

    Args:
        source: in canonical order, so that both are earlier tokens.
        grid_shape: (height, width) in cells.
    """
    width = grid_shape[1]
    found = []
    for row, anchors in zip(source.index.tolist(), source.anchors().tolist(), strict=True):
        found.append(
            [
                [row[each] for each in _beside(cell, width) if row[each] < token]
                for token, cell in enumerate(anchors)
            ]
        )
    return found


def _beside(cell: int, width: int) -> list[int]:
    """Cells to the left of and above a cell."""
    left = [cell - 1] if cell % width else []
    return left + ([cell - width] if cell >= width else [])


def least_bits(sizes: Sequence[int]) -> float:
    """Fewest bits that a token of these parts can take."""
    # On its shortest way through the tree a part passes at least its highest bit.
    bits = [(size - 1).bit_length() if size & (size - 1) == 0 else 1 for size in sizes if size > 1]
    return LEAST_BITS * sum(bits)


def code_tokens(
    coder: Coder,
    parts: Int64[Tensor, "b k p"],
    sizes: Sequence[int],
    source: Source | None,
    grid_shape: tuple[int, int],
) -> Int64[Tensor, "b k p"]:
    """Write the tokens of some tiles, or read as many; returns them.

    Args:
        coder: where to.
        parts: of the tokens; read, anything of that shape.
        sizes: values of each part.
        source: maps that were coded before; None where the file has none.
        grid_shape: (height, width) in cells.

    Raises:
        ValueError: a stream that is read is not one of tokens.
    """
    tokens = TokenCoder(sizes)
    if source is None:
        chain = [[position - 1] if position else [] for position in range(parts.shape[1])]
        beside = [chain] * len(parts)
    else:
        beside = neighbours(source, grid_shape)
    rows = [tokens.code(coder, *each) for each in zip(parts.tolist(), beside, strict=True)]
    return torch.tensor(rows, dtype=torch.int64).view(parts.shape)
