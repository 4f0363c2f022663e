"""Caches of keys and values whose places and tables are tensors on the device.

Source: Li et al. 2025, "MergeVQ", section 3.4 and figure 6 (arXiv:2504.00999).

All slots are attended to, under a mask, so nothing has a shape that depends on the place in the
sequence, and nothing is read on the host.

Shape letters: R rows, H heads of queries, G heads of keys and values, N new inputs, M slots,
D channels of a head.
"""

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from mergevq.config.generator import (
    GeneratorConfig,
)
from mergevq.generator.cache import Memory
from mergevq.generator.decoding import cache_type
from mergevq.generator.network import Cache, Network
from mergevq.nn.attention import attend, attend_apart
from mergevq.nn.llama import Rotation


def static_turns_at(cache: Cache, token: Int64[Tensor, "1"]) -> Rotation:
    """Turns of the cell that is as far along in raster order as a token in its sequence."""
    return Rotation(*(table.index_select(2, token) for table in cache.turns))


def static_cache(network: Network, batch: int, num_inputs: int) -> "StaticCache":
    """Room for the prefix and `num_inputs` more inputs."""
    return StaticCache(
        network.config,
        batch=batch,
        num_slots=network.config.num_prefix + num_inputs,
        device=network.device,
        dtype=cache_type(network),
    )


class StaticCache(Memory):
    """Keys and values of every input, in order, all of which are attended to under a mask."""

    def __init__(
        self,
        config: GeneratorConfig,
        *,
        batch: int,
        num_slots: int,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        """Allocate `num_slots` slots for each of `batch` rows."""
        super().__init__(config, batch=batch, num_slots=num_slots, device=device, dtype=dtype)
        self.slots = torch.arange(num_slots, device=device)
        self.length = torch.zeros(1, dtype=torch.int64, device=device)
        """Inputs that are old."""
        self.is_empty = True

    def reset(self) -> None:
        """Forget everything; the next inputs are the prefix."""
        self.length.zero_()
        self.is_empty = True

    def place(self, codes: Int64[Tensor, "r"]) -> Bool[Tensor, "1 1 m"]:  # noqa: ARG002 - all new
        """Slots that the next token sees, its own among them."""
        return (self.slots <= self.length)[None, None]

    def advance(self, count: int) -> None:
        """Make the first `count` of the inputs last written old."""
        self.length.add_(count)
        self.is_empty = False

    def attend(
        self,
        layer: int,
        query: Float[Tensor, "r h n d"],
        key: Float[Tensor, "r g n d"],
        value: Float[Tensor, "r g n d"],
        mask: Bool[Tensor, "1 1 m"] | Float[Tensor, "1 1 m"] | None,
    ) -> Float[Tensor, "r h n d"]:
        """Write a new input after the old and attend to those of the mask.

        Args:
            layer: number of the layer.
            query: of one token, or of the prefix, each of which sees all up to itself.
            key: of the same.
            value: of the same.
            mask: what `place` said, or what is added to the logits of the slots; None for the
                prefix.
        """
        keys, values = self.layers[layer]
        if self.is_empty:
            return _attend_prefix(keys, values, query, key, value)
        keys.index_copy_(2, self.length, key.to(keys.dtype))
        values.index_copy_(2, self.length, value.to(values.dtype))
        plain = None if mask is None else mask[:, None]
        return attend(query.to(keys.dtype), keys, values, plain)


class StaticSlotCache(Memory):
    """MergeAR's cache (`cache.SlotCache`), whose tables are on the device."""

    def __init__(
        self,
        config: GeneratorConfig,
        *,
        window: int,
        batch: int,
        num_distinct: int,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        """Allocate slots.

        Args:
            config: sizes of keys and values.
            window: a duplicate stays visible to this many tokens after it.
            batch: rows.
            num_distinct: most distinct tokens of a row.
            device: where everything is.
            dtype: type of keys and values.
        """
        # As many as `SlotCache.slots_for`, and one for the last token, which is put in here.
        most = min(num_distinct + max(window, 1), config.num_tokens)
        num_slots = config.num_prefix + most
        super().__init__(config, batch=batch, num_slots=num_slots, device=device, dtype=dtype)
        self.window, self.num_prefix = window, config.num_prefix
        whole = {"dtype": torch.int64, "device": device}
        self.slots = torch.arange(num_slots, device=device)
        self.codes = torch.empty(batch, num_distinct, **whole)
        """Distinct tokens of each row in the order in which they came, as indices; -1 is none."""
        self.num_distinct = torch.empty(batch, 1, **whole)
        """Distinct tokens of each row so far."""
        self.lengths = torch.empty(batch, 1, **whole)
        """Slots that were used in each row."""
        self.recent = torch.empty(batch, max(window, 1), **whole)
        """Slots of the last tokens that are duplicates, in a ring; -1 of others."""
        self.slot = torch.empty(batch, 1, **whole)
        """Where the next token of each row goes."""
        self.num_placed = torch.zeros(1, **whole)
        self.reset()

    def reset(self) -> None:
        """Forget everything; the next inputs are the prefix."""
        self.codes.fill_(-1)
        self.recent.fill_(-1)
        self.num_distinct.zero_()
        self.num_placed.zero_()
        self.lengths.fill_(self.num_prefix)
        self.is_empty = True

    def advance(self, count: int) -> None:  # noqa: ARG002 - an input stays where it is
        """Take note that the prefix is filled in."""
        self.is_empty = False

    def place(self, codes: Int64[Tensor, "r"]) -> Bool[Tensor, "r 1 m"]:
        """Give each row's next token a slot, and say which slots that token sees beside its own."""
        codes = codes[:, None]
        is_new = ~(self.codes == codes).any(1, keepdim=True)
        # What is not finite may break the budget; that is an error in the end.
        column = self.num_distinct.clamp_max(self.codes.shape[1] - 1)
        known = self.codes.gather(1, column)
        self.codes.scatter_(1, column, torch.where(is_new, codes, known))
        self.num_distinct.add_(is_new)
        seen = self.slots < self.lengths
        place = self.num_placed % self.recent.shape[1]
        leaving = self.recent.index_select(1, place)
        takes = leaving < 0
        slot = torch.where(takes, self.lengths, leaving).clamp_max(len(self.slots) - 1)
        self.slot.copy_(slot)
        if self.window > 0:
            self.lengths.add_(takes)
            self.recent.index_copy_(1, place, torch.where(is_new, -1, slot))
        else:
            # A duplicate is written where the next token will be.
            self.lengths.add_(is_new)
        self.num_placed.add_(1)
        return seen[:, None]

    def attend(
        self,
        layer: int,
        query: Float[Tensor, "r h n d"],
        key: Float[Tensor, "r g n d"],
        value: Float[Tensor, "r g n d"],
        mask: Bool[Tensor, "r 1 m"] | Float[Tensor, "r 1 m"] | None,
    ) -> Float[Tensor, "r h n d"]:
        """Attend to the slots of the mask and to the token itself, then write it into its slot.

        Arguments are those of `StaticCache.attend`.
        """
        keys, values = self.layers[layer]
        if self.is_empty:
            return _attend_prefix(keys, values, query, key, value)
        query, key, value = (each.to(keys.dtype) for each in (query, key, value))
        plain = None if mask is None else mask[:, None]
        mixed = attend_apart(query, keys, values, key, value, plain)
        where = self.slot[:, None, :, None].expand_as(key)
        keys.scatter_(2, where, key)
        values.scatter_(2, where, value)
        return mixed


def _attend_prefix(
    keys: Float[Tensor, "r g m d"],
    values: Float[Tensor, "r g m d"],
    query: Float[Tensor, "r h n d"],
    key: Float[Tensor, "r g n d"],
    value: Float[Tensor, "r g n d"],
) -> Float[Tensor, "r h n d"]:
    """Write the prefix into the first slots; each of its inputs sees all up to itself."""
    count = key.shape[2]
    keys[:, :, :count], values[:, :, :count] = key, value
    written = keys[:, :, :count], values[:, :, :count]
    return attend(query.to(keys.dtype), *written, None, is_causal=count > 1)
