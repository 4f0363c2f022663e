"""Whole numbers to bytes and back, each at the price of its probability.

Probabilities are given as whole frequencies. They become shares of 2**20, whose floating-point
products in the coder are exact, so the bytes depend on neither machine nor number of threads.

Source: Martin 1979, "Range encoding: an algorithm for removing redundancy from a digitised
message"; Bamler 2022, "Understanding Entropy Coding With Asymmetric Numeral Systems (ANS)"
(arXiv:2201.01741), for the library.
"""

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np

from mergevq.runtime.environment import needing

WORD_BYTES = 4
"""A stream is a whole number of words."""
TOTAL = 2**20
"""Sum of the shares of all symbols: below the 2**24 of the coder, above any alphabet here."""
_MOST_SYMBOLS = 2**16
"""Largest alphabet of symbols with frequencies of their own."""
MOST_UNIFORM = 2**24 - 1
"""Largest alphabet of symbols that are equally likely."""
_WORD = np.dtype("<u4")
_PURPOSE = "coding tokens and source maps"

Frequencies = Sequence[int]
"""Positive weights of the symbols 0, 1, 2, .."""


class Writer:
    """Writes symbols to a stream."""

    def __init__(self) -> None:
        """Begin an empty stream."""
        stream = _library()
        self._models = stream.model
        self._encoder = stream.queue.RangeEncoder()
        # Symbols of alphabets of one size go to the library in one call, which is much faster.
        self._waiting: list[tuple[int, Sequence[int]]] = []

    def code(self, frequencies: Frequencies, symbol: int) -> int:
        """Write a symbol; returns it."""
        self._waiting.append((symbol, shares(frequencies)))
        return symbol

    def uniform(self, size: int, symbol: int) -> int:
        """Write one of `size` equally likely symbols; returns it.

        Raises:
            ValueError: `size` is above the largest alphabet.
        """
        _require_uniform(size)
        if size > 1:
            self._flush()
            self._encoder.encode(symbol, self._models.Uniform(size))
        return symbol

    def to_bytes(self) -> bytes:
        """The stream so far, a whole number of words."""
        self._flush()
        return self._encoder.get_compressed().astype(_WORD).tobytes()

    def _flush(self) -> None:
        """Hand over the symbols that wait."""
        family = self._models.Categorical(perfect=False)
        for _, run in itertools.groupby(self._waiting, key=lambda item: len(item[1])):
            symbols, tables = zip(*run, strict=True)
            table = np.array(tables, dtype=np.float64) / TOTAL
            self._encoder.encode(np.array(symbols, dtype=np.int32), family, table)
        self._waiting = []


class Reader:
    """Reads the symbols of a stream, with the frequencies that they were written with."""

    def __init__(self, data: bytes) -> None:
        """Begin at the start of a stream.

        Raises:
            ValueError: it is not a whole number of words.
        """
        if len(data) % WORD_BYTES:
            raise ValueError(
                f"a stream of {len(data)} bytes is not a whole number of words of {WORD_BYTES}"
            )
        stream = _library()
        self._models = stream.model
        self._decoder = stream.queue.RangeDecoder(np.frombuffer(data, _WORD).astype(np.uint32))

    def code(self, frequencies: Frequencies, symbol: int) -> int:  # noqa: ARG002 - as of a writer
        """Read a symbol.

        Raises:
            ValueError: the stream is not one of such symbols.
        """
        table = np.array(shares(frequencies), dtype=np.float64) / TOTAL
        return self._read(self._models.Categorical(table, lazy=True, perfect=False))

    def uniform(self, size: int, symbol: int) -> int:  # noqa: ARG002 - as of a writer
        """Read one of `size` equally likely symbols.

        Raises:
            ValueError: the stream is not one of such symbols, or `size` is above the largest
                alphabet.
        """
        _require_uniform(size)
        return 0 if size == 1 else self._read(self._models.Uniform(size))

    def require_end(self) -> None:
        """Raise `ValueError` where words are left that no symbol needed."""
        if not self._decoder.maybe_exhausted():
            raise ValueError("the stream is longer than its symbols")

    def _read(self, model: object) -> int:
        """Read a symbol; an impossible one is a ValueError."""
        try:
            return int(self._decoder.decode(model))
        except AssertionError as error:
            raise ValueError("the stream has a symbol that does not exist") from error


Coder = Writer | Reader
"""Where symbols go to or come from: a model that calls it is written once for both."""


def shares(frequencies: Frequencies) -> list[int]:
    """Frequencies in proportion, each at least 1, that sum to `TOTAL`.

    Examples:
        >>> shares([3, 1])
        [786432, 262144]

    Raises:
        ValueError: a frequency is not positive, or there are fewer than 2 or too many of them.
    """
    if not 2 <= len(frequencies) <= _MOST_SYMBOLS or min(frequencies) < 1:
        raise ValueError(
            f"frequencies ({len(frequencies)}, the least {min(frequencies, default=0)}) must be 2 "
            f"to {_MOST_SYMBOLS} positive numbers"
        )
    total = sum(frequencies)
    if len(frequencies) == 2:
        # Most symbols are bits: the same as below, faster.
        first, second = (1 + (TOTAL - 2) * each // total for each in frequencies)
        return [TOTAL - second, second] if first >= second else [first, TOTAL - first]
    # What is left after one for each, so that the rounded parts never exceed the total.
    free = TOTAL - len(frequencies)
    parts = [1 + free * each // total for each in frequencies]
    parts[parts.index(max(parts))] += TOTAL - sum(parts)
    return parts


def _library() -> Any:  # noqa: ANN401 - compiled, without types
    """Streams of the library, or a RuntimeError that names the extra."""
    with needing("codec", _PURPOSE):
        import constriction
    return constriction.stream  # pyright: ignore[reportAttributeAccessIssue]


def _require_uniform(size: int) -> None:
    """Raise `ValueError` where an alphabet is empty or too large."""
    if not 1 <= size <= MOST_UNIFORM:
        raise ValueError(f"size ({size}) must be between 1 and {MOST_UNIFORM}")
