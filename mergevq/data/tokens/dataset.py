"""Encoded images, read row by row from their files.

Shape letters: B rows of a batch, L grid tokens, K kept tokens, P parts of a token.
"""

import copy
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Int64
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from mergevq.data.codes import join
from mergevq.data.layouts import Layout, Ordered, Source, require_source
from mergevq.data.tokens.files import (
    AGAIN,
    Shard,
    TokenRecord,
    broken_names,
    check_rows,
    check_seal,
    map_shard,
    read_state,
    record_of,
    sealed_shards,
    shard_path,
)


class TokenBatch(NamedTuple):
    """Tokens of some images, for one K."""

    parts: Int64[Tensor, "b k p"]
    """Parts of the tokens, in the order of the layout."""
    layout: Layout
    """Their places: of a merging tokenizer the source map."""
    label: Int64[Tensor, "b"]
    """Class, -1 for none."""
    sizes: tuple[int, ...]
    """Values of each part."""

    @property
    def indices(self) -> Int64[Tensor, "b k"]:
        """The parts of a token in one number; a ValueError above 63 bits (`CodeSpec.join`)."""
        return join(self.parts, self.sizes)

    @property
    def source(self) -> Source:
        """Which of them each cell of the grid copies; a ValueError without a source map."""
        return require_source(self.layout, "a sequence of cells or of slots")


class Origin(NamedTuple):
    """Images that rows were made from."""

    position: Int64[Tensor, "b"]
    """Where in the data the image is."""
    mirrored: Int64[Tensor, "b"]
    """1 for a mirror image, 0 for the image itself."""


class TokenDataset(Dataset[dict[str, Tensor]]):
    """A sized, map-style collection of encoded images, read from disk when they are asked for.

    `torch.utils.data.DataLoader` takes it, with workers or without: a row is a dictionary of
    `indices` (K,), `source` (L,), which tokens of a map have, and `label` (), -1 for none, all
    int64. With `record.flip` an image is two rows, so a pass over all rows shows it twice.
    """

    def __init__(
        self,
        directory: Path,
        record: TokenRecord,
        shards: Mapping[int, Sequence[Shard]],
        broken: tuple[str, ...],
        num_kept: int | None = None,
    ) -> None:
        self._num_kept = num_kept
        self.directory = directory
        self.record = record
        self.broken = broken
        """Names of the images that could not be read, which have no rows."""
        self._shards = shards
        self._rows: NDArray[np.int64] | None = None
        num_rows = [shard.num_rows for shard in shards[record.num_kept[0]]]
        self._first_rows = np.cumsum([0, *num_rows])
        self._mapped: dict[tuple[int, int], dict[str, NDArray[Any]]] = {}

    def __len__(self) -> int:
        return int(self._first_rows[-1]) if self._rows is None else len(self._rows)

    def __getitem__(self, position: int) -> dict[str, Tensor]:
        """Tokens of one row; see the class.

        Args:
            position: in [-len, len).

        Raises:
            IndexError: there is no such row, which ends a `for`.
            ValueError: there are several K, and `open_tokens` was given none.
        """
        if not -len(self) <= position < len(self):
            raise IndexError(f"position ({position}) must be in [{-len(self)}, {len(self)})")
        batch = self.batch([position % len(self)], self._num_kept)
        row = {"indices": batch.indices[0], "label": batch.label[0]}
        return row | ({"source": batch.source.index[0]} if self.record.layout == "source" else {})

    def __getstate__(self) -> dict[str, Any]:
        """Everything but mapped files, which a worker maps for itself."""
        return self.__dict__ | {"_mapped": {}}

    def subset(self, positions: Sequence[int]) -> "TokenDataset":
        """Some of the rows, in this order, from the same files.

        Raises:
            ValueError: there is no such row.
        """
        chosen = copy.copy(self)
        chosen._mapped = self._mapped
        chosen._rows = self._locate(positions)
        return chosen

    @property
    def num_kept(self) -> tuple[int, ...]:
        """Each K there is, smallest first."""
        return self.record.num_kept

    def batch(self, positions: Sequence[int], num_kept: int | None = None) -> TokenBatch:
        """Read rows.

        Args:
            positions: rows in [0, len), in any order.
            num_kept: K; None where there is only one.

        Raises:
            ValueError: there is no such row or K.
            RuntimeError: a shard is missing or damaged.
        """
        chosen, record = self.require_kept(num_kept), self.record
        layout: Layout = Ordered(chosen)
        if record.layout == "source":
            layout = Source(self._read("source", positions, chosen), chosen)
        return TokenBatch(
            parts=record.parts_of(self._read(record.tokens_name, positions, chosen)),
            layout=layout,
            label=self._read("label", positions, chosen),
            sizes=record.sizes,
        )

    def origin(self, positions: Sequence[int]) -> Origin:
        """Which images rows were made from.

        Raises:
            ValueError: there is no such row.
            RuntimeError: a shard is missing or damaged.
        """
        num_kept = self.num_kept[0]
        return Origin(
            position=self._read("position", positions, num_kept),
            mirrored=self._read("mirrored", positions, num_kept),
        )

    def require_kept(self, num_kept: int | None) -> int:
        """The K that is meant; None is the only one.

        Raises:
            ValueError: there is no such K, or none was named and there are several.
        """
        if num_kept is None and len(self.num_kept) == 1:
            return self.num_kept[0]
        if num_kept not in self.num_kept:
            choices = " or ".join(map(str, self.num_kept))
            raise ValueError(
                f"num_kept ({num_kept}) must be {choices}, of which {self.directory} has tokens"
            )
        return num_kept

    def _read(self, name: str, positions: Sequence[int], num_kept: int) -> Int64[Tensor, "b *rest"]:
        """One tensor's rows.

        Raises:
            ValueError: there is no such row.
        """
        rows = self._locate(positions)
        record = self.record
        widths = {record.tokens_name: record.tokens_shape(num_kept), "source": (record.num_mapped,)}
        width = widths.get(name, ())
        values = np.empty((len(rows), *width), dtype=np.int64)
        numbers = np.searchsorted(self._first_rows, rows, side="right") - 1
        for number in np.unique(numbers).tolist():
            here = numbers == number
            values[here] = self._arrays(num_kept, number)[name][
                rows[here] - self._first_rows[number]
            ]
        return torch.from_numpy(values)

    def _locate(self, positions: Sequence[int]) -> NDArray[np.int64]:
        """Rows of the files.

        Raises:
            ValueError: there is no such row.
        """
        rows = np.asarray(positions, dtype=np.int64)
        outside = rows[(rows < 0) | (rows >= len(self))]
        if outside.size:
            raise ValueError(f"position ({outside[0]}) must be in [0, {len(self)}), the rows")
        return rows if self._rows is None else self._rows[rows]

    def _arrays(self, num_kept: int, number: int) -> dict[str, NDArray[Any]]:
        """A shard's arrays in mapped memory; checked when they are first asked for."""
        if (num_kept, number) not in self._mapped:
            path = shard_path(self.directory, num_kept, number)
            shard = self._shards[num_kept][number]
            check_seal(path, shard)
            arrays = map_shard(path).arrays
            check_rows(path, arrays, self.record, num_kept, shard.num_rows)
            self._mapped[num_kept, number] = arrays
        return self._mapped[num_kept, number]


def open_tokens(directory: str | Path, num_kept: int | None = None) -> TokenDataset:
    """Open a folder of tokens; no shard is read yet.

    Args:
        directory: that `mergevq encode` wrote.
        num_kept: K of single rows, where there are several.

    Raises:
        ValueError: there are no tokens, or not all of them, or none of that K, or `tokens.json` is
            damaged.
    """
    directory = Path(directory)
    state = read_state(directory)
    record = record_of(directory, state)
    if state["shards"] is None:
        raise ValueError(f"{directory} is not complete; {AGAIN}")
    shards = sealed_shards(directory, record, state)
    dataset = TokenDataset(directory, record, shards, broken_names(state), num_kept)
    if num_kept is not None:
        dataset.require_kept(num_kept)
    return dataset
