"""Caches of keys and values with fixed shapes: all inputs, or MergeAR's distinct tokens.

Source: Li et al. 2025, "MergeVQ", section 3.4 and figure 6 (arXiv:2504.00999).

Shape letters: S layers, B rows, H heads of keys and values, N new inputs, M filled slots,
D channels of a head.
"""

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from mergevq.config import GeneratorConfig


class FullCache:
    """Keys and values of every input, in order; what is not filled is not read."""

    def __init__(
        self,
        config: GeneratorConfig,
        *,
        batch: int,
        num_slots: int,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        """Allocate room for `num_slots` inputs of `batch` rows."""
        shape = (config.num_layers, batch, config.key_heads, num_slots, config.head_dim)
        self.keys = torch.zeros(shape, device=device, dtype=dtype)
        self.values = torch.zeros_like(self.keys)
        self.length = 0

    @property
    def num_bytes(self) -> int:
        """Memory of keys and values."""
        return 2 * self.keys.numel() * self.keys.element_size()

    def reset(self) -> None:
        """Forget everything."""
        self.length = 0

    def update(
        self, layer: int, keys: Float[Tensor, "b h n d"], values: Float[Tensor, "b h n d"]
    ) -> tuple[Float[Tensor, "b h m d"], Float[Tensor, "b h m d"]]:
        """Write new inputs after the old and return both; `advance` makes them old.

        Raises:
            RuntimeError: there is no room.
        """
        end = self.length + keys.shape[2]
        if end > self.keys.shape[3]:
            raise RuntimeError(
                f"{end} inputs must fit into the cache's {self.keys.shape[3]} slots; reset it "
                "before the next sequence"
            )
        self.keys[layer, :, :, self.length : end] = keys
        self.values[layer, :, :, self.length : end] = values
        return self.keys[layer, :, :, :end], self.values[layer, :, :, :end]

    def advance(self, count: int) -> None:
        """Keep the first `count` of the inputs last written; the others will be overwritten."""
        self.length += count


class SlotCache:
    """MergeAR's cache: a slot for each distinct token and for duplicates inside the window.

    Every row has its own table of what its slots hold. A token takes the first slot that is free;
    a duplicate's slot is free again when the duplicate has left the window, so nothing is copied
    and no shape changes. Keys were rotated by their token's true cell, wherever they are stored.

    Before a token leaves, K first occurrences and `window` duplicates may be visible to the token
    that is being processed, which itself needs a slot: `slots_for` counts them.
    """

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
        self.window, self.num_prefix = config.window, config.num_prefix
        self.rows = torch.arange(batch, device=device)[:, None]
        self.cells = torch.empty(batch, num_slots, dtype=torch.int64, device=device)
        self.codes = torch.empty_like(self.cells)
        self.first = torch.empty_like(self.cells, dtype=torch.bool)
        self.reset()

    @staticmethod
    def slots_for(config: GeneratorConfig, num_distinct: int) -> int:
        """Slots that always suffice for sequences of at most `num_distinct` distinct tokens."""
        most = config.num_tokens - 1  # The last token is never an input.
        return config.num_prefix + min(num_distinct + config.window + 1, most)

    @property
    def num_bytes(self) -> int:
        """Memory of keys and values."""
        return 2 * self.keys.numel() * self.keys.element_size()

    @property
    def num_distinct(self) -> Int64[Tensor, "b"]:
        """Distinct tokens of each row so far."""
        return self.first.sum(-1) - self.num_prefix

    def reset(self) -> None:
        """Forget everything but the prefix's slots, which are never free."""
        # An empty slot looks like a duplicate that had left the window before the first token.
        self.cells.fill_(-self.window - 1)
        self.codes.fill_(-1)
        self.first.fill_(value=False)
        self.first[:, : self.num_prefix] = True
        self.slots = torch.arange(self.num_prefix, device=self.rows.device).expand(
            len(self.rows), -1
        )
        self.filled = self.num_prefix

    def place(self, codes: Int64[Tensor, "b"], cell: int) -> Bool[Tensor, "b 1 m"]:
        """Give each row's next token a slot, and say which slots that token sees.

        Args:
            codes: the tokens, as indices; an index equal to an earlier one is a duplicate.
            cell: its raster position, the same in all rows.

        Raises:
            RuntimeError: a row has no free slot.
        """
        num_slots = self.cells.shape[1]
        free = ~self.first & (cell - self.cells > self.window)
        slots = torch.where(free.any(-1), free.int().argmax(-1), num_slots)[:, None]
        self.filled = max(self.filled, int(slots.max()) + 1)
        if self.filled > num_slots:
            raise RuntimeError(
                f"a sequence with {int(self.num_distinct.max()) + 1} distinct tokens must fit into "
                f"the cache's {num_slots} slots; hold it to its budget or allocate more"
            )
        repeated = (self.first & (self.codes == codes[:, None])).any(-1, keepdim=True)
        self.cells.scatter_(1, slots, cell)
        self.codes.scatter_(1, slots, codes[:, None])
        self.first.scatter_(1, slots, ~repeated)
        self.slots = slots
        visible = self.first | (cell - self.cells <= self.window)
        return visible[:, None, : self.filled]

    def update(
        self, layer: int, keys: Float[Tensor, "b h n d"], values: Float[Tensor, "b h n d"]
    ) -> tuple[Float[Tensor, "b h m d"], Float[Tensor, "b h m d"]]:
        """Write new inputs into the slots they were given and return all up to the last in use."""
        dtype = self.keys.dtype
        self.keys[layer][self.rows, :, self.slots] = keys.transpose(1, 2).to(dtype)
        self.values[layer][self.rows, :, self.slots] = values.transpose(1, 2).to(dtype)
        return self.keys[layer, :, :, : self.filled], self.values[layer, :, :, : self.filled]
