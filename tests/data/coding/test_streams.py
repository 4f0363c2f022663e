import builtins
import math

import numpy as np
import pytest

from mergevq.data.coding.streams import MOST_UNIFORM, TOTAL, Reader, Writer, shares


def draws(seed, count=400):
    """Symbols with frequencies of many sizes, and some that are equally likely."""
    numbers = np.random.default_rng(seed)
    for _ in range(count):
        size = int(numbers.integers(2, 9))
        frequencies = (10 ** numbers.uniform(0, 9, size)).astype(int).tolist()
        yield frequencies, int(numbers.integers(size)), int(numbers.integers(1, 1000))


@pytest.mark.parametrize("seed", range(3))
def test_what_is_written_is_read(seed):
    writer = Writer()
    for frequencies, symbol, size in draws(seed):
        assert writer.code(frequencies, symbol) == symbol
        writer.uniform(size, symbol % size)
    reader = Reader(writer.to_bytes())
    for frequencies, symbol, size in draws(seed):
        assert reader.code(frequencies, 0) == symbol
        assert reader.uniform(size, 0) == symbol % size
    reader.require_end()


def test_a_symbol_costs_what_its_probability_says():
    writer = Writer()
    for _ in range(800):
        writer.code([1, 3, 12], 1)
    for _ in range(100):
        writer.uniform(1000, 7)
    assert abs(8 * len(writer.to_bytes()) - 800 * math.log2(16 / 3) - 100 * math.log2(1000)) < 64


def test_certain_symbols_cost_nothing():
    writer = Writer()
    assert [writer.uniform(1, 0) for _ in range(5)] == [0] * 5
    assert writer.to_bytes() == b""
    assert Reader(b"").uniform(1, 0) == 0


@pytest.mark.parametrize("frequencies", [[1, 1], [1, 10**30], [5] * 1000, [10**9, 1, 1], [7, 2, 1]])
def test_shares_are_positive_in_proportion_and_sum_to_the_total(frequencies):
    found = shares(frequencies)
    assert sum(found) == TOTAL
    assert min(found) >= 1
    for share, frequency in zip(found, frequencies, strict=True):
        assert abs(share - TOTAL * frequency / sum(frequencies)) <= 1 + len(frequencies)


@pytest.mark.parametrize("frequencies", [[], [3], [0, 1], [-1, 5], [1] * (2**16 + 1)])
def test_other_frequencies_are_refused(frequencies):
    with pytest.raises(ValueError, match="must be 2 to 65536 positive numbers"):
        shares(frequencies)


@pytest.mark.parametrize("size", [0, -1, MOST_UNIFORM + 1])
def test_other_alphabets_are_refused(size):
    for coder in (Writer(), Reader(b"")):
        with pytest.raises(ValueError, match=rf"size \({size}\) must be between 1 and"):
            coder.uniform(size, 0)


def test_the_largest_alphabet_is_written():
    writer = Writer()
    writer.uniform(MOST_UNIFORM, MOST_UNIFORM - 1)
    assert Reader(writer.to_bytes()).uniform(MOST_UNIFORM, 0) == MOST_UNIFORM - 1


def test_the_bytes_are_these_on_every_machine():
    writer = Writer()
    for symbol in (0, 1, 1, 0, 1, 1, 1, 1, 1, 0):
        writer.code([1, 2], symbol)
    writer.uniform(10, 3)
    assert writer.to_bytes().hex() == "f20c8d3a"


def test_a_stream_of_other_things_is_refused():
    with pytest.raises(ValueError, match="5 bytes is not a whole number of words of 4"):
        Reader(b"abcde")
    reader = Reader(b"\xff" * 8)
    with pytest.raises(ValueError, match="a symbol that does not exist"):
        [reader.uniform(10, 0) for _ in range(10)]
    reader = Reader(bytes(range(1, 41)))
    reader.uniform(10, 0)
    with pytest.raises(ValueError, match="longer than its symbols"):
        reader.require_end()


@pytest.mark.parametrize("make", [Writer, lambda: Reader(b"")])
def test_without_the_library_the_extra_is_named(make, monkeypatch):
    real = builtins.__import__

    def without(name, *args, **kwargs):
        if name == "constriction":
            raise ModuleNotFoundError("no", name=name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(RuntimeError, match=r"needs constriction, which is not .*install"):
        make()
