"""Codes and their source map in one stream: each cell is a new token or a copy that it names.

    [class, M, c_1 .. c_L]        c_i = (relation, group, code)

M is the merge instruction, an embedding of K. A relation is 0 where a kept token opens, 1 to 7 for
a copy of a neighbour (left, up, up-left, up-right, second to the left, second above, above the
second to the left: the first that has the token), 8 for a copy of a token that no neighbour has,
whose group, its number among the kept ones, follows. A code is predicted where a token opens. Parts
that are implied are predicted from one legal value, so they cost nothing; a token enters the
transformer with its group and its code all the same. Only choices that lead to a canonical map of K
tokens are legal, so a sequence's likelihood is that of its codes and of its map, and no source
predictor is needed.

Several cells of one step share a state: the head predicts them one after the other.

Source: this project's own; the source map is that of Li et al. 2025, "MergeVQ", section 3.2
(arXiv:2504.00999).

Shape letters: B batch, R rows, L grid cells, T steps, P parts of a step, F sub-indices of a token,
V values of a part.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Int64
from torch import Tensor
from torch.nn import functional

from mergevq.config.generator import (
    GeneratorConfig,
    SamplingSettings,
)
from mergevq.config.parts import orders as settings
from mergevq.config.parts.orders import (
    NUM_RELATIONS,
)
from mergevq.generator.cache import FullCache
from mergevq.generator.decoding import SequenceDecoder, full_cache, lay_out, turns_at
from mergevq.generator.network import Cache, Network, check_range
from mergevq.generator.seams import Decoder, Draws, Layout, Numbers, Sampled, Sequences
from mergevq.nn.checks import require_all
from mergevq.nn.llama import Rotation

NEIGHBOURS = ((0, -1), (-1, 0), (-1, -1), (-1, 1), (0, -2), (-2, 0), (-1, -2))
"""Rows and columns from a cell to those that it may be a copy of, by relation from 1."""
OTHER = NUM_RELATIONS - 1
"""Relation of a copy of a token that no neighbour has."""
_NAMED = 2
"""Parts before a cell's sub-indices: relation and group."""


@dataclass(frozen=True)
class Stream:
    """All cells in raster order with the source map (`seams.Order`)."""

    config: settings.Stream

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Do nothing: the order has no weights."""

    def draw(self, sequences: Sequences, numbers: Numbers) -> Sequences:  # noqa: ARG002
        """The same: nothing about the order is random."""
        return sequences

    def num_inputs(self, config: GeneratorConfig, num_kept: int) -> int:
        """The prefix and all steps but the last."""
        return config.num_prefix + config.num_states(num_kept) - 1

    def parts(
        self, codes: Int64[Tensor, "b l f"], sequences: Sequences, config: GeneratorConfig
    ) -> Int64[Tensor, "b t p"]:
        """Relation, group and sub-indices of the cells of each step.

        Raises:
            ValueError: the map is missing or not canonical, or copies differ.
        """
        groups = sequences.source_index
        if groups is None:
            raise ValueError("order 'stream' needs source_index: the kept token that each cell is")
        if not torch.compiler.is_compiling():
            _check_map(groups, sequences.num_kept)
            _check_copies(codes, groups, sequences.num_kept)
        relation = relations(groups, config.grid_size)
        cells = torch.cat([relation[..., None], groups[..., None], codes], dim=-1)
        return cells.unflatten(1, (-1, config.order.tokens_per_step)).flatten(2)

    def layout(
        self, network: Network, parts: Int64[Tensor, "b t p"], sequences: Sequences
    ) -> Layout:
        """Each step is at its first cell, and sees all up to itself."""
        config = network.config
        per_step = config.order.tokens_per_step
        layout = lay_out(network, sequences, parts, network.cell_positions()[None, ::per_step])
        cells = parts.unflatten(2, (per_step, -1)).flatten(1, 2)
        relation, groups = cells[..., 0], cells[..., 1]
        opens = relation == 0
        near, opened = neighbours(groups, config.grid_size), opens.cumsum(1) - opens.long()
        left = torch.arange(config.num_tokens, 0, -1, device=groups.device)
        size = max(config.kept_candidates)
        legal = [
            legal_relations(near, opened, left, sequences.num_kept),
            legal_groups(near, opened, relation, size),
            *(legal_codes(relation, size) for size in config.head.sizes),
        ]
        # What is implied is predicted as 0, the one value that is legal.
        named = torch.where(relation == OTHER, groups, 0)
        codes = cells[..., _NAMED:] * opens[..., None]
        targets = torch.cat([relation[..., None], named[..., None], codes], dim=-1)
        return layout._replace(
            targets=targets.unflatten(1, (-1, per_step)).flatten(2),
            allowed={
                cell * len(legal) + part: allowed[:, cell::per_step]
                for cell in range(per_step)
                for part, allowed in enumerate(legal)
            },
        )

    def cache(
        self,
        network: Network,
        *,
        batch: int,
        num_kept: int,
        settings: SamplingSettings,  # noqa: ARG002
    ) -> FullCache:
        """A slot for every input."""
        return full_cache(network, batch, network.config.num_states(num_kept) - 1)

    def rules(
        self,
        network: Network,
        cache: Cache,  # noqa: ARG002
        *,
        batch: int,
        num_kept: int,
        settings: SamplingSettings,  # noqa: ARG002
    ) -> "Maps":
        """Only choices that lead to a canonical map of K tokens."""
        return Maps(network, batch=batch, num_kept=num_kept)

    def turns(
        self,
        cache: Cache,
        parts: Int64[Tensor, "r p"],  # noqa: ARG002
        token: int,
    ) -> Rotation:
        """Turns of the first cell of the step."""
        return turns_at(cache, token * self.config.tokens_per_step)

    def decoder(
        self,
        network: Network,
        labels: Int64[Tensor, "b"],
        num_kept: int,
        draws: Draws,
        settings: SamplingSettings,
    ) -> Decoder:
        """A few cells in each step."""
        return SequenceDecoder(network, self, labels, num_kept, draws, settings)

    def sampled(self, network: Network, decoder: Decoder) -> Sampled:
        """Cells in raster order, and the kept token that each is."""
        per_step = network.config.order.tokens_per_step
        cells = decoder.parts().unflatten(2, (per_step, -1)).flatten(1, 2)
        indices = network.indices(cells)
        return Sampled(indices, cells[..., 1], None, decoder.num_steps, decoder.kv_bytes)


class Maps:
    """The source maps of a batch as far as they are decoded (`decoding.Rules`)."""

    def __init__(self, network: Network, *, batch: int, num_kept: int) -> None:
        """Begin with no cell.

        Args:
            network: of whose tokens these are.
            batch: images.
            num_kept: K.
        """
        self.config, self.num_kept = network.config, num_kept
        shape, device = (batch, self.config.num_tokens), network.device
        self.groups = torch.full(shape, -1, dtype=torch.int64, device=device)
        """Group of each cell; -1 where it is not decoded."""
        self.codes = self.groups[:, :num_kept, None].repeat(1, 1, len(self.config.head.sizes))
        """Sub-indices of each kept token; -1 where it is not decoded."""
        self.opened = torch.zeros(batch, dtype=torch.int64, device=device)
        """Kept tokens of each image so far."""
        self.num_cells = 0
        """Cells so far."""

    def next(self, before: Sequence[Int64[Tensor, "b p"]]) -> "Step":
        """Rules for the cells after those of the steps before."""
        per_step = self.config.order.tokens_per_step
        for parts in before[self.num_cells // per_step :]:
            for cell in parts.unflatten(1, (per_step, -1)).unbind(1):
                group = cell[:, 1]
                self.groups[:, self.num_cells] = group
                where = group[:, None, None].expand(-1, 1, cell.shape[1] - _NAMED)
                self.codes.scatter_(1, where, cell[:, None, _NAMED:])
                self.opened = torch.maximum(self.opened, group + 1)
                self.num_cells += 1
        return Step(self)


class Step:
    """Rules for the cells of one step, each after those before it (`network.Restriction`)."""

    def __init__(self, maps: Maps) -> None:
        """Go on from maps as they are."""
        self.maps = maps
        self.num_parts = _NAMED + len(maps.config.head.sizes)

    def allowed(self, part: int, chosen: Sequence[Tensor]) -> Bool[Tensor, "b v"]:
        """Values of a part that lead to a canonical map."""
        config = self.maps.config
        cell, field = divmod(part, self.num_parts)
        own = chosen[cell * self.num_parts :]
        if field >= _NAMED:
            return legal_codes(own[0], config.head.sizes[field - _NAMED])
        near, opened = self._before(cell, chosen)
        if field == 0:
            left = torch.tensor(config.num_tokens - self.maps.num_cells - cell)
            return legal_relations(near, opened, left.to(near.device), self.maps.num_kept)
        return legal_groups(near, opened, own[0], config.part_sizes[1])

    def part(
        self, part: int, choice: Int64[Tensor, "b"], chosen: Sequence[Tensor]
    ) -> Int64[Tensor, "b"]:
        """The choice where a token opens; the group and the code of a copy are its token's."""
        cell, field = divmod(part, self.num_parts)
        own = chosen[cell * self.num_parts :]
        if field == 0:
            return choice
        relation = own[0]
        if field == 1:
            near, opened = self._before(cell, chosen)
            # Choices from what is not finite may open too many; that is an error in the end.
            opens = opened.clamp_max(self.maps.num_kept - 1)[:, None]
            values = torch.cat([opens, near, choice[:, None]], dim=1)
            return values.gather(1, relation[:, None])[:, 0]
        group = own[1]
        known = self.maps.codes[:, :, field - _NAMED]
        code = known.gather(1, group[:, None])[:, 0]
        for earlier in range(cell):
            other = chosen[earlier * self.num_parts :]
            code = torch.where(other[1] == group, other[field], code)
        return torch.where(relation == 0, choice, code)

    def _before(
        self, cell: int, chosen: Sequence[Tensor]
    ) -> tuple[Int64[Tensor, "b 7"], Int64[Tensor, "b"]]:
        """Groups of a cell's neighbours, -1 where there are none, and kept tokens so far."""
        maps = self.maps
        now = chosen[1 :: self.num_parts][:cell]
        opened = maps.opened
        for group in now:
            opened = torch.maximum(opened, group + 1)
        rows, columns = maps.config.grid_size
        row, column = divmod(maps.num_cells + cell, columns)
        near = []
        for down, right in NEIGHBOURS:
            inside = 0 <= row + down < rows and 0 <= column + right < columns
            back = -(down * columns + right)
            if inside and back <= cell:
                near.append(now[cell - back])
            elif inside:
                near.append(maps.groups[:, maps.num_cells + cell - back])
            else:
                near.append(torch.full_like(opened, -1))
        return torch.stack(near, dim=1), opened


def neighbours(groups: Int64[Tensor, "b l"], grid_shape: tuple[int, int]) -> Int64[Tensor, "b l 7"]:
    """Groups of each cell's neighbours by relation; -1 outside of the grid."""
    grid = functional.pad(groups.unflatten(1, grid_shape), (2, 1, 2, 0), value=-1)
    rows, columns = grid_shape
    return torch.stack(
        [
            grid[:, 2 + down : 2 + down + rows, 2 + right : 2 + right + columns].flatten(1)
            for down, right in NEIGHBOURS
        ],
        dim=-1,
    )


def relations(groups: Int64[Tensor, "b l"], grid_shape: tuple[int, int]) -> Int64[Tensor, "b l"]:
    """Relation of each cell of canonical maps to those before it."""
    highest = functional.pad(groups.cummax(1).values[:, :-1], (1, 0), value=-1)
    is_near = neighbours(groups, grid_shape) == groups[..., None]
    copied = torch.where(is_near.any(-1), 1 + is_near.int().argmax(-1), OTHER)
    return torch.where(groups > highest, 0, copied)


def legal_relations(
    near: Int64[Tensor, "*b 7"],
    opened: Int64[Tensor, "*b"],
    left: Int64[Tensor, "*_"],
    num_kept: int,
) -> Bool[Tensor, "*b 9"]:
    """Relations after which a canonical map of K tokens is still possible.

    Args:
        near: groups of the neighbours; -1 is none.
        opened: kept tokens before the cell.
        left: cells from this one on.
        num_kept: K.
    """
    copies = (left > num_kept - opened)[..., None]
    earlier = torch.ones(7, 7, dtype=torch.bool, device=near.device).tril(-1)
    repeats = ((near[..., None] == near[..., None, :]) & earlier).any(-1)
    distinct = (near >= 0) & ~repeats
    opens = (opened < num_kept)[..., None]
    others = (opened > distinct.sum(-1))[..., None]
    return torch.cat([opens, distinct & copies, others & copies], dim=-1)


def legal_groups(
    near: Int64[Tensor, "*b 7"],
    opened: Int64[Tensor, "*b"],
    relation: Int64[Tensor, "*b"],
    size: int,
) -> Bool[Tensor, "*b v"]:
    """Groups that a cell may name: open ones that no neighbour has; else 0, which is not named."""
    numbers = torch.arange(size, device=near.device)
    is_near = torch.zeros(*opened.shape, size + 1, dtype=torch.bool, device=near.device)
    is_near = is_near.scatter(-1, near.remainder(size + 1), True)[..., :size]
    free = (numbers < opened[..., None]) & ~is_near
    return torch.where((relation == OTHER)[..., None], free, numbers == 0)


def legal_codes(relation: Int64[Tensor, "*b"], size: int) -> Bool[Tensor, "*b v"]:
    """Values of a sub-index: all where a token opens; else 0, as a copy has its token's."""
    return (relation == 0)[..., None] | (torch.arange(size, device=relation.device) == 0)


def _check_map(groups: Int64[Tensor, "b l"], num_kept: int) -> None:
    """Check that maps are canonical.

    Raises:
        ValueError: kept tokens are not numbered as they open, or are not K.
    """
    check_range("source_index", groups, num_kept - 1, "the last kept token")
    highest = groups.cummax(1).values
    steps = functional.pad(highest, (1, 0), value=-1).diff(dim=1)
    require_all(
        (steps <= 1) & (highest[:, -1:] == num_kept - 1),
        f"source_index must be canonical: its {num_kept} kept tokens numbered from 0 in the "
        "order in which they open, each of one cell at least",
    )


def _check_copies(
    codes: Int64[Tensor, "b l f"], groups: Int64[Tensor, "b l"], num_kept: int
) -> None:
    """Check that copies are equal.

    Raises:
        ValueError: cells of one kept token differ.
    """
    where = groups[..., None].expand_as(codes)
    kept = codes.new_zeros(len(codes), num_kept, codes.shape[2]).scatter(1, where, codes)
    if (kept.gather(1, where) != codes).any():
        raise ValueError("cells of one kept token must have the same index")
