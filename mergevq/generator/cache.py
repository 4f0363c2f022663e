"""Caches of keys and values with fixed shapes: all inputs, or MergeAR's distinct tokens.

Source: Li et al. 2025, "MergeVQ", section 3.4 and figure 6 (arXiv:2504.00999).

Shape letters: S layers, B rows, H heads of queries, G heads of keys and values, N new inputs,
M filled slots, D channels of a head.
"""

from collections import deque

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from mergevq.config.generator import (
    GeneratorConfig,
)
from mergevq.nn.attention import attend, attend_apart
from mergevq.nn.llama import cell_positions, rotation


class Memory:
    """Keys and values of all layers in one tensor each."""

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
        shape = (config.num_layers, batch, config.key_heads, num_slots, config.head_dim)
        self.keys = torch.zeros(shape, device=device, dtype=dtype)
        self.values = torch.zeros_like(self.keys)
        # Cut once: a decoding step asks for those of every layer.
        self.layers = list(zip(self.keys.unbind(), self.values.unbind(), strict=True))
        positions = cell_positions(config.grid_size, device)[None]
        self.turns = rotation(positions, config.head_dim)
        """Turns of all cells, worked out once."""

    @property
    def num_bytes(self) -> int:
        """Memory of keys and values."""
        return 2 * self.keys.numel() * self.keys.element_size()


class FullCache(Memory):
    """Keys and values of every input, in order; what is not filled is not read."""

    length = 0
    """Inputs that are old."""

    def reset(self) -> None:
        """Forget everything."""
        self.length = 0

    def attend(
        self,
        layer: int,
        query: Float[Tensor, "b h n d"],
        key: Float[Tensor, "b g n d"],
        value: Float[Tensor, "b g n d"],
        mask: Bool[Tensor, "r n m"] | Float[Tensor, "r n m"] | None,
    ) -> Float[Tensor, "b h n d"]:
        """Write new inputs after the old and attend to both; `advance` makes them old.

        Args:
            layer: number of the layer.
            query: of the new inputs.
            key: of the new inputs.
            value: of the new inputs.
            mask: which inputs (last axis) each sees, or what is added to their logits. None lets
                one new input see all, and several, before which there may be none, all up to
                themselves.

        Raises:
            RuntimeError: there is no room.
        """
        count = key.shape[2]
        end = self.length + count
        if end > self.keys.shape[3]:
            raise RuntimeError(
                f"{end} inputs must fit into the cache's {self.keys.shape[3]} slots; reset it "
                "before the next sequence"
            )
        keys, values = self.layers[layer]
        keys[:, :, self.length : end] = key
        values[:, :, self.length : end] = value
        return attend(
            query.to(keys.dtype),
            keys[:, :, :end],
            values[:, :, :end],
            None if mask is None else mask[:, None],
            is_causal=mask is None and count > 1,
        )

    def place(self, codes: Int64[Tensor, "b"]) -> None:
        """Do nothing: the next token goes after the others, and sees them all."""

    def advance(self, count: int) -> None:
        """Keep the first `count` of the inputs last written; the others will be overwritten."""
        self.length += count


class RowCache(Memory):
    """Keys and values of every input, of each row at slots of its own, which may be written again.

    For rows of which some are further than others. The caller's mask keeps what was written for
    inputs that were taken back out of sight until it is overwritten.
    """

    def reset(self) -> None:
        """Forget everything; the next inputs are the prefix."""
        self.slots: Tensor | None = None

    def put_at(self, slots: Int64[Tensor, "b n"], end: int) -> None:
        """Slots of the next inputs, all below `end`; slots from there on are not attended to."""
        self.slots, self.end = slots, end

    def place(self, codes: Int64[Tensor, "b"]) -> None:
        """Do nothing: `put_at` gives the place."""

    def advance(self, count: int) -> None:
        """Do nothing: an input stays in its slot until another is put there."""

    def attend(
        self,
        layer: int,
        query: Float[Tensor, "b h n d"],
        key: Float[Tensor, "b g n d"],
        value: Float[Tensor, "b g n d"],
        mask: Float[Tensor, "b n m"] | None,
    ) -> Float[Tensor, "b h n d"]:
        """Write new inputs into their slots and attend to what the mask leaves.

        Args:
            layer: number of the layer.
            query: of the new inputs.
            key: of the new inputs.
            value: of the new inputs.
            mask: what is added to the logits of the slots below `end`; None for the prefix, each
                input of which sees all up to itself.
        """
        keys, values = self.layers[layer]
        count = key.shape[2]
        if self.slots is None:
            keys[:, :, :count], values[:, :, :count] = key, value
            return attend(
                query.to(keys.dtype),
                keys[:, :, :count],
                values[:, :, :count],
                None,
                is_causal=count > 1,
            )
        rows = torch.arange(len(key), device=key.device)[:, None]
        keys[rows, :, self.slots] = key.transpose(1, 2).to(keys.dtype)
        values[rows, :, self.slots] = value.transpose(1, 2).to(values.dtype)
        return attend(
            query.to(keys.dtype),
            keys[:, :, : self.end],
            values[:, :, : self.end],
            None if mask is None else mask[:, None],
        )


class SlotCache(Memory):
    """MergeAR's cache: a slot for each distinct token and for duplicates inside the window.

    Every row has its own table of what its slots hold. A token attends to the slots from outside,
    and then takes that of the duplicate which its successor will not see any more, or else the
    next one that was never used: nothing is copied, no shape changes, and all slots in use are
    seen by the next token, whatever it is. Keys were rotated by their token's true cell, wherever
    they are stored.
    """

    def __init__(
        self,
        config: GeneratorConfig,
        *,
        window: int,
        batch: int,
        num_slots: int,
        device: torch.device,
        dtype: torch.dtype,
        reuses: bool = True,
    ) -> None:
        """Allocate slots.

        Args:
            config: sizes of keys and values.
            window: a duplicate stays visible to this many tokens after it.
            batch: rows.
            num_slots: of each row; `slots_for` gives a number that suffices.
            device: where keys and values are.
            dtype: their type.
            reuses: whether the slot of a duplicate that nobody will see again takes another token;
                without it every token stays where it is, and a mask hides it: the same attention
                in the memory of a full cache, to compare with.
        """
        super().__init__(config, batch=batch, num_slots=num_slots, device=device, dtype=dtype)
        self.window, self.num_prefix, self.reuses = window, config.num_prefix, reuses
        self.rows = torch.arange(batch, device=device)[:, None]
        most = num_slots - self.num_prefix
        self.codes = torch.empty(batch, most, dtype=torch.int64, device=device)
        """Distinct tokens of each row in the order in which they came, as indices; -1 is none."""
        self.reset()

    @staticmethod
    def slots_for(config: GeneratorConfig, num_distinct: int, window: int) -> int:
        """Slots that always suffice for sequences of at most `num_distinct` distinct tokens."""
        most = config.num_tokens - 1  # The last token is never an input.
        # Without a window a duplicate is written where the next token will be.
        return config.num_prefix + min(num_distinct + max(window, 1), most)

    @property
    def num_distinct(self) -> list[int]:
        """Distinct tokens of each row so far."""
        return [len(known) for known in self._known]

    def reset(self) -> None:
        """Forget everything; the next inputs are the prefix."""
        batch = len(self.rows)
        self.codes.fill_(-1)
        self.filled = 0
        # Tables are looked at by one thread and change with every token: here, not on the device.
        self._known: list[dict[int, int]] = [{} for _ in range(batch)]
        self._lengths = [self.num_prefix] * batch
        self._recent: deque[list[int | None]] = deque(maxlen=self.window)
        # Where the next token goes: one slot, or another in each row.
        self._slot: int | Int64[Tensor, "b 1"] = 0
        # Slots that later tokens see; only where none is used again.
        self._visible = torch.ones(batch, self.keys.shape[3], dtype=torch.bool)

    def advance(self, count: int) -> None:
        """Do nothing: an input is kept in the slot that it was given."""

    def place(self, codes: Int64[Tensor, "b"]) -> Bool[Tensor, "b 1 m"] | None:
        """Give each row's next token a slot, and say which slots that token sees.

        Args:
            codes: the tokens, as indices; an index equal to an earlier one is a duplicate.

        Returns:
            True for the slots seen, the token's own not among them; None is all in use.

        Raises:
            RuntimeError: a row has no free slot.
        """
        batch, num_slots = len(self.rows), self.keys.shape[3]
        seen = self._lengths.copy()
        leaves = self.window > 0 and len(self._recent) == self.window
        leaving = self._recent[0] if leaves else [None] * batch
        slots, left, orders, recent = [], [], [], []
        for row, (code, slot) in enumerate(zip(codes.tolist(), leaving, strict=True)):
            known = self._known[row]
            is_new = code not in known
            orders.append(known.setdefault(code, len(known)))
            hidden = slot
            if slot is None or not self.reuses:
                slot = self._lengths[row]
                self._lengths[row] += is_new or self.window > 0 or not self.reuses
            if self.window == 0 and not is_new:
                hidden = slot
            slots.append(slot)
            left.append(hidden)
            recent.append(None if is_new else slot)
        if max(slots) >= num_slots:
            raise RuntimeError(
                f"a sequence with {max(self.num_distinct)} distinct tokens must fit into the "
                f"cache's {num_slots} slots; hold it to its budget or allocate more"
            )
        self._recent.append(recent)
        if None in recent:
            columns = torch.tensor(orders, device=codes.device)[:, None]
            self.codes.scatter_(1, columns, codes[:, None])
        self.filled = max(seen)
        is_same = len(set(slots)) == 1
        self._slot = slots[0] if is_same else torch.tensor(slots, device=codes.device)[:, None]
        if not self.reuses:
            return self._hide(left)
        if min(seen) == self.filled:
            return None
        lengths = torch.tensor(seen, device=codes.device)[:, None, None]
        return torch.arange(self.filled, device=codes.device) < lengths

    def _hide(self, slots: list[int | None]) -> Bool[Tensor, "b 1 m"]:
        """Slots that this token sees; those given, one of a row, no later token will."""
        seen = self._visible[:, None, : self.filled].to(self.keys.device, copy=True)
        for row, slot in enumerate(slots):
            if slot is not None:
                self._visible[row, slot] = False
        return seen

    def attend(
        self,
        layer: int,
        query: Float[Tensor, "b h n d"],
        key: Float[Tensor, "b g n d"],
        value: Float[Tensor, "b g n d"],
        mask: Bool[Tensor, "b 1 m"] | Float[Tensor, "b 1 m"] | None,
    ) -> Float[Tensor, "b h n d"]:
        """Attend to the slots and to the token itself, then write it into the slot it was given.

        The first inputs after a reset are the prefix, each of which sees all up to itself.

        Args:
            layer: number of the layer.
            query: of one token, or of the prefix.
            key: of the same.
            value: of the same.
            mask: what `place` said, or what is added to the logits of the slots in use.
        """
        dtype = self.keys.dtype
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
        keys, values = self.layers[layer]
        if self.filled == 0:
            count = key.shape[2]
            keys[:, :, :count], values[:, :, :count] = key, value
            return attend(query, key, value, None, is_causal=count > 1)
        mixed = attend_apart(
            query,
            keys[:, :, : self.filled],
            values[:, :, : self.filled],
            key,
            value,
            None if mask is None else mask[:, None],
        )
        if isinstance(self._slot, int):
            there = slice(self._slot, self._slot + 1)
            keys[:, :, there], values[:, :, there] = key, value
        else:
            keys[self.rows, :, self._slot] = key.transpose(1, 2)
            values[self.rows, :, self._slot] = value.transpose(1, 2)
        return mixed
