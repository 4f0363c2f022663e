"""Wrong source maps: some cells take the group of another cell.

A generator, or a map recovered from its tokens, puts cells into wrong groups. A cell takes the
group of one of the four cells beside it, or of any cell; every group keeps a cell, and the map that
comes out is canonical, with the tokens in its order.

Source: this project's own, after the perturbed tokens of Qiu et al. 2025, "Robust Latent Matters:
Boosting Image Generation with Sampling Error Synthesis" (arXiv:2503.08354).

Shape letters: B batch, K kept tokens, L cells.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Int64
from torch import Tensor

from mergevq.config.evaluation import Groups
from mergevq.data.layouts import Source, canonicalize
from mergevq.runtime.random import step_generator


class Moved(NamedTuple):
    """Maps of which some cells are in another group than before."""

    source: Source
    """Canonical."""
    order: Int64[Tensor, "b k"]
    """Position of each token among those of the map before: `take_rows(codes, order)`."""
    num_moved: Int64[Tensor, "b"]
    """Cells in another group."""


def move_cells(
    source: Source,
    grid_shape: tuple[int, int],
    groups: Groups,
    counts: Sequence[int],
    *,
    seed: int,
    image_ids: Sequence[int],
) -> dict[int, Moved]:
    """Put so many cells of each map into the group of another cell; gives the maps by the count.

    Cells move in an order that is drawn. One whose neighbours are all in its own group waits until
    one of them has moved. One that is alone in its group changes places with the other cell, so
    that no group is lost, and a count may be exceeded by 1. Where no cell is left that can move,
    as of one group, fewer do.

    Args:
        source: canonical.
        grid_shape: (height, width) in cells.
        groups: `neighbour`, of a cell above, below or beside; `random`, of any cell.
        counts: cells that move; a smaller count is on the way to a larger one.
        seed: of the draws.
        image_ids: an image's draws depend on the seed and on its number here.
    """
    near = _beside(grid_shape) if groups == "neighbour" else None
    wanted = sorted(set(counts))
    rows: dict[int, list[list[int]]] = {count: [] for count in wanted}
    moved: dict[int, list[int]] = {count: [] for count in wanted}
    for row, image_id in zip(source.index.tolist(), image_ids, strict=True):
        generator = step_generator(seed, f"robustness of maps, {groups}", image_id)
        mover = _Mover(row, near, generator)
        for count in wanted:
            mover.advance(count)
            rows[count].append(list(mover.group))
            moved[count].append(mover.num_moved)
    found = {}
    for count, index in rows.items():
        wrong = Source(torch.tensor(index, device=source.index.device), source.num_kept)
        found[count] = Moved(*canonicalize(wrong), torch.tensor(moved[count]))
    return found


def _beside(grid_shape: tuple[int, int]) -> list[list[int]]:
    """Cells above, to the left, to the right and below of each cell."""
    height, width = grid_shape
    steps = ((-1, 0), (0, -1), (0, 1), (1, 0))
    return [
        [
            (row + down) * width + column + along
            for down, along in steps
            if 0 <= row + down < height and 0 <= column + along < width
        ]
        for row in range(height)
        for column in range(width)
    ]


class _Mover:
    """Moves cells of one map, more and more of them.

    Args:
        row: group of each cell.
        near: cells whose groups a cell may take; None is all.
        generator: of the draws.
    """

    def __init__(
        self, row: list[int], near: list[list[int]] | None, generator: torch.Generator
    ) -> None:
        self.first, self.group, self.near = row, list(row), near
        self.sizes = [row.count(group) for group in range(max(row) + 1)]
        self.num_moved = 0
        self.waiting: list[int] = torch.randperm(len(row), generator=generator).tolist()
        self.uniforms: list[float] = torch.rand(len(row), generator=generator).tolist()
        """Number in [0, 1) that chooses the other cell of each."""

    def advance(self, count: int) -> None:
        """Move cells until so many have moved, or no other can."""
        stuck = False
        while self.num_moved < count and not stuck:
            before, left = self.num_moved, []
            for cell in self.waiting:
                if self.num_moved >= count or not self._move(cell):
                    left.append(cell)
            self.waiting, stuck = left, self.num_moved == before

    def _move(self, cell: int) -> bool:
        """Move a cell, unless it has been; whether it is in another group now."""
        own = self.first[cell]
        if self.group[cell] != own:
            return True
        is_alone = self.sizes[own] == 1
        others = [
            other
            for other in (range(len(self.group)) if self.near is None else self.near[cell])
            # A cell that takes this one's place must not come back to where it was.
            if self.group[other] != own and not (is_alone and self.first[other] == own)
        ]
        if not others:
            return False
        other = others[int(self.uniforms[cell] * len(others))]
        group = self.group[other]
        self.group[cell] = group
        self.num_moved += 1
        if is_alone:
            self.num_moved += group == self.first[other]
            self.group[other] = own
        else:
            self.sizes[own] -= 1
            self.sizes[group] += 1
        return True
