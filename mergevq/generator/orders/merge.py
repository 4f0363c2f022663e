"""MergeAR's order: all cells row by row, with later duplicates of a token hidden.

Source: Li et al. 2025, "MergeVQ", section 3.4, equation 12 and figure 6 (arXiv:2504.00999).

    [class, M, x_1 .. x_L]

M is the merge instruction, an embedding of K, and x_i is the token of cell i.

Differs: groups are tokens of equal code, in training as in sampling, where the paper trains on the
tokenizer's groups (`groups="source"` is the paper); a sample is held to K distinct tokens.

Shape letters: B batch, R rows, L grid cells, K slots of tokens, T tokens of a sequence, M tokens
and drafts, P parts of a token, C channels, N inputs, E inputs looked at, V values of a part.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Int64
from torch import Tensor
from torch.nn import functional
from torch.nn.attention.flex_attention import BlockMask, create_block_mask

from mergevq.config.generator import (
    Drafted,
    GeneratorConfig,
    OneByOne,
    SamplingSettings,
)
from mergevq.config.parts import orders as config
from mergevq.generator.cache import SlotCache
from mergevq.generator.decoding import (
    cache_type,
    lay_out,
    turns_at,
)
from mergevq.generator.network import Cache, Network, Restriction
from mergevq.generator.seams import (
    Decoder,
    Draws,
    Layout,
    Numbers,
    Sampled,
    Sequences,
)
from mergevq.generator.static.caches import StaticSlotCache, static_turns_at
from mergevq.generator.static.decoder import token_decoder
from mergevq.nn.llama import Rotation


@dataclass(frozen=True)
class Merge:
    """All cells in raster order with duplicates hidden (`seams.Order`)."""

    config: config.Merge
    compresses: bool = True
    """Whether its cache is compressed; see `SlotCache`."""

    @property
    def targets(self) -> None:
        """No vectors of places."""

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Do nothing: the order has no weights."""

    def draw(self, sequences: Sequences, numbers: Numbers) -> Sequences:  # noqa: ARG002
        """The same: nothing about the order is random."""
        return sequences

    def num_inputs(self, config: GeneratorConfig, num_kept: int) -> int:  # noqa: ARG002
        """The prefix and all cells but the last."""
        return config.num_prefix + config.num_tokens - 1

    def parts(
        self,
        codes: Int64[Tensor, "b t f"],
        sequences: Sequences,  # noqa: ARG002
        config: GeneratorConfig,  # noqa: ARG002
    ) -> Int64[Tensor, "b t p"]:
        """The sub-indices alone."""
        return codes

    def layout(
        self, network: Network, parts: Int64[Tensor, "b t p"], sequences: Sequences
    ) -> Layout:
        """Each input sees those up to itself that are no duplicates, and the window."""
        if self.config.groups == "code":
            groups = sequences.indices
        elif sequences.source_index is None:
            raise ValueError("order.groups 'source' needs source_index, the tokenizer's source map")
        else:
            groups = sequences.source_index
        prefix = network.config.num_prefix
        first = functional.pad(first_occurrence(groups)[:, :-1], (prefix, 0), value=True)
        window = self.config.window
        compiled = self.config.flex_attention and network.training and first.is_cuda
        mask: Tensor | BlockMask
        mask = merge_block_mask(first, window) if compiled else merge_mask(first, window)
        return lay_out(network, sequences, parts, network.cell_positions()[None], mask)

    def cache(
        self, network: Network, *, batch: int, num_kept: int, settings: SamplingSettings
    ) -> SlotCache:
        """A slot for each distinct token and for the window."""
        config, window = network.config, self.config.window
        held = self.compresses and _is_held(settings)
        num_distinct = num_kept if held else config.num_tokens
        return SlotCache(
            config,
            window=window,
            batch=batch,
            num_slots=SlotCache.slots_for(config, num_distinct, window),
            device=network.device,
            dtype=cache_type(network),
            reuses=self.compresses,
        )

    def rules(
        self,
        network: Network,
        cache: Cache,
        *,
        batch: int,
        num_kept: int,
        settings: SamplingSettings,
    ) -> "Budget | None":
        """At most K distinct tokens, if the settings hold an image to its budget."""
        if not _is_held(settings) or not isinstance(cache, SlotCache):
            return None
        return Budget(network, cache, batch=batch, num_kept=num_kept)

    def turns(
        self,
        cache: Cache,
        parts: Int64[Tensor, "r p"],  # noqa: ARG002
        token: int,
    ) -> Rotation:
        """Turns of the cell that the token is."""
        return turns_at(cache, token)

    def static_cache(
        self, network: Network, *, batch: int, num_kept: int, settings: SamplingSettings
    ) -> StaticSlotCache:
        """A slot for each distinct token and for the window, or for every token."""
        config = network.config
        held = self.compresses and _is_held(settings)
        return StaticSlotCache(
            config,
            window=self.config.window,
            batch=batch,
            num_distinct=num_kept if held else config.num_tokens,
            device=network.device,
            dtype=cache_type(network),
        )

    def static_rules(
        self,
        network: Network,
        cache: Cache,
        *,
        batch: int,
        num_kept: int,
        settings: SamplingSettings,
    ) -> "StaticBudget | None":
        """At most K distinct tokens, if the settings hold an image to its budget."""
        if not _is_held(settings) or not isinstance(cache, StaticSlotCache):
            return None
        return StaticBudget(network, cache, batch, num_kept)

    def static_turns(
        self,
        cache: Cache,
        parts: Int64[Tensor, "r p"],  # noqa: ARG002
        token: Int64[Tensor, "1"],
    ) -> Rotation:
        """Turns of the cell that the token is."""
        return static_turns_at(cache, token)

    def seen(
        self,
        network: Network,
        tokens: Int64[Tensor, "b m p"],
        slots: Int64[Tensor, "b n"],
        end: int,
    ) -> Bool[Tensor, "b n e"]:
        """Inputs up to each that are no duplicates, and the window (`drafts.reader.CellByCell`)."""
        first = first_occurrence(network.indices(tokens))
        first = functional.pad(first, (network.config.num_prefix, 0), value=True)[:, None, :end]
        distance = slots[..., None] - torch.arange(end, device=slots.device)
        return (distance >= 0) & ((distance <= self.config.window) | first)

    def restriction(
        self,
        network: Network,
        tokens: Int64[Tensor, "b m p"],
        cells: Int64[Tensor, "b n"],
        num_kept: int,
        settings: SamplingSettings,
    ) -> "Present | None":
        """Where K distinct tokens came before, only those, if images are held to the budget."""
        if not _is_held(settings):
            return None
        numbers = torch.arange(tokens.shape[1], device=cells.device)
        before = numbers < cells[..., None]
        first = first_occurrence(network.indices(tokens))
        is_free = (before & first[:, None]).sum(-1) < num_kept
        if is_free.all():
            return None
        return Present(
            parts=tokens.repeat_interleave(cells.shape[1], dim=0),
            is_there=before.flatten(0, 1),
            is_free=is_free.flatten()[:, None],
            sizes=network.config.part_sizes,
        )

    def decoder(
        self,
        network: Network,
        labels: Int64[Tensor, "b"],
        num_kept: int,
        draws: Draws,
        settings: SamplingSettings,
    ) -> Decoder:
        """One cell in each step."""
        return token_decoder(network, self, labels, num_kept, draws, settings)

    def sampled(self, network: Network, decoder: Decoder) -> Sampled:
        """Cells in raster order, and which of them are equal."""
        indices = network.indices(decoder.parts())
        return Sampled(indices, equal_cells(indices), None, decoder.num_steps, decoder.kv_bytes)


class Budget:
    """The rule that an image has at most K distinct tokens (`decoding.Rules`)."""

    def __init__(self, network: Network, cache: SlotCache, *, batch: int, num_kept: int) -> None:
        """Watch sequences from their beginning.

        Args:
            network: of whose tokens these are.
            cache: that holds all tokens before.
            batch: images, the first rows of the cache.
            num_kept: K.
        """
        self._network, self._cache, self._batch, self._num_kept = network, cache, batch, num_kept
        self._num_distinct: list[int] = []
        self._present: Present | None = None

    def next(self, before: Sequence[Int64[Tensor, "b p"]]) -> Restriction | None:  # noqa: ARG002
        """Only tokens that are there already, in images that have K distinct ones."""
        num_distinct = self._cache.num_distinct[: self._batch]
        # Once all budgets are spent nothing changes any more.
        if num_distinct != self._num_distinct:
            self._num_distinct = num_distinct
            self._present = self._look()
        return self._present

    def _look(self) -> "Present | None":
        """Rules of the images as they are now."""
        is_spent = [count >= self._num_kept for count in self._num_distinct]
        if not any(is_spent):
            return None
        codes = self._cache.codes[: self._batch]
        return Present(
            parts=self._network.codes(codes.clamp_min(0)),
            is_there=codes >= 0,
            is_free=~torch.tensor(is_spent, device=codes.device)[:, None],
            sizes=self._network.config.part_sizes,
        )


@dataclass(frozen=True)
class StaticBudget:
    """The rule of `Budget` from the tables of a cache on the device (`static.decoder`)."""

    network: Network
    cache: StaticSlotCache
    batch: int
    """Images, the first rows of the cache."""
    num_kept: int
    """K."""

    def at(
        self,
        token: Int64[Tensor, "1"],  # noqa: ARG002
        previous: Int64[Tensor, "b p"],  # noqa: ARG002
    ) -> "Present":
        """Only tokens that are there already, in images that have K distinct ones."""
        codes = self.cache.codes[: self.batch]
        return Present(
            parts=self.network.codes(codes.clamp_min(0)),
            is_there=codes >= 0,
            is_free=self.cache.num_distinct[: self.batch] < self.num_kept,
            sizes=self.network.config.part_sizes,
        )


@dataclass(frozen=True)
class Present:
    """The rule that a token is one of some (`network.Restriction`).

    Sub-indices are restricted in turn, each to those of the tokens that agree so far.
    """

    parts: Int64[Tensor, "b k p"]
    """The tokens."""
    is_there: Bool[Tensor, "b k"]
    """Which of them an image has."""
    is_free: Bool[Tensor, "b 1"]
    """Images that the rule is not for."""
    sizes: tuple[int, ...]
    """Values of each part."""

    def allowed(self, part: int, chosen: Sequence[Tensor]) -> Bool[Tensor, "b v"]:
        """Values of a part among the tokens that agree with the parts chosen before."""
        agrees = self.is_there
        for earlier, value in enumerate(chosen):
            agrees = agrees & (self.parts[..., earlier] == value[:, None])
        counts = agrees.new_zeros(len(agrees), self.sizes[part], dtype=torch.int64)
        return (counts.scatter_add(1, self.parts[..., part], agrees.long()) > 0) | self.is_free

    def part(
        self,
        part: int,  # noqa: ARG002
        choice: Int64[Tensor, "b"],
        chosen: Sequence[Tensor],  # noqa: ARG002
    ) -> Int64[Tensor, "b"]:
        """The choice itself."""
        return choice


def _is_held(settings: SamplingSettings) -> bool:
    """Whether a sample is held to K distinct tokens."""
    return isinstance(settings.passes, OneByOne | Drafted) and settings.passes.budget


def leaders(groups: Int64[Tensor, "b t"]) -> Int64[Tensor, "b t"]:
    """For each position the first one of its row with the same value; a leader is its own."""
    ordered, order = groups.sort(dim=1, stable=True)
    index = torch.arange(groups.shape[1], device=groups.device).expand_as(groups)
    starts = torch.zeros_like(ordered)
    starts[:, 1:] = torch.where(ordered[:, 1:] != ordered[:, :-1], index[:, 1:], 0)
    # Sorting is stable, so a run of equal values starts with the earliest of them.
    return torch.zeros_like(order).scatter(1, order, order.gather(1, starts.cummax(1).values))


def first_occurrence(groups: Int64[Tensor, "b t"]) -> Bool[Tensor, "b t"]:
    """Whether each position is the first of its row with that value."""
    return leaders(groups) == torch.arange(groups.shape[1], device=groups.device)


def equal_cells(indices: Int64[Tensor, "b l"]) -> Int64[Tensor, "b l"]:
    """Source map of tokens grouped by equality, in canonical order."""
    opened = first_occurrence(indices).cumsum(1) - 1
    return opened.gather(1, leaders(indices))


def merge_mask(first: Bool[Tensor, "b n"], window: int) -> Bool[Tensor, "b n n"]:
    """Visibility of MergeAR: input j to query i iff j <= i and (i - j <= window or first[j]).

    Args:
        first: inputs that stay visible: the prefix, and first occurrences.
        window: w of figure 6; earlier duplicates within it are visible too.
    """
    index = torch.arange(first.shape[1], device=first.device)
    distance = index[:, None] - index[None, :]
    return (distance >= 0) & ((distance <= window) | first[:, None, :])


def merge_block_mask(first: Bool[Tensor, "b n"], window: int) -> BlockMask:
    """`merge_mask` for flex attention, which skips blocks in which nothing is visible."""
    batch, length = first.shape
    return create_block_mask(
        lambda row, _, query, key: (key <= query) & ((query - key <= window) | first[row, key]),
        B=batch,
        H=None,
        Q_LEN=length,
        KV_LEN=length,
        device=str(first.device),
    )
