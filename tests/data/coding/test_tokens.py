import math

import numpy as np
import pytest
import torch

from mergevq.data.coding.streams import TOTAL, Reader, Writer
from mergevq.data.coding.tokens import LEAST_BITS, TokenCoder, code_tokens, least_bits, neighbours
from mergevq.data.layouts import Source
from tests.data.coding.test_maps import Recorder, random_maps

SIZES = [(2**18,), (2**4, 2**5), (2, 2, 2), (8, 5, 5, 5), (3,), (1000, 2), (7,), (1, 6)]


def draws(sizes, tiles, num_kept, seed=0):
    numbers = np.random.default_rng(seed)
    parts = [numbers.integers(0, size, (tiles, num_kept)) for size in sizes]
    return torch.from_numpy(np.stack(parts, -1))


def written(parts, sizes, source, shape):
    writer = Writer()
    assert torch.equal(code_tokens(writer, parts, sizes, source, shape), parts)
    return writer.to_bytes()


@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("with_map", [True, False])
def test_tokens_come_back_bit_for_bit(sizes, with_map):
    source = random_maps((4, 5), 9, count=2) if with_map else None
    parts = draws(sizes, 2, 9)
    reader = Reader(written(parts, sizes, source, (4, 5)))
    read = code_tokens(reader, torch.zeros_like(parts), sizes, source, (4, 5))
    assert torch.equal(read, parts)
    reader.require_end()


@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_random_tokens_cost_their_bits_and_what_learning_takes(sizes):
    parts = draws(sizes, 5, 40)
    bits = 8 * len(written(parts, sizes, None, (8, 8)))
    # A few bits for each of the places that are learned.
    nodes = sum(min(size, 20) for size in sizes) + 18
    assert bits < 200 * sum(map(math.log2, sizes)) + 20 * nodes


def test_bits_that_are_mostly_alike_cost_less():
    parts = draws((2**8,), 1, 200) & 3
    assert 8 * len(written(parts, (2**8,), None, (16, 16))) < 0.5 * 8 * 200


def test_tokens_like_those_beside_them_cost_less_with_their_map():
    """Columns of a grid whose every token is the one above."""
    index = torch.arange(64)[None]
    parts = draws((2**8,), 1, 8).repeat(1, 8, 1)
    alone = written(parts, (2**8,), None, (8, 8))
    assert len(written(parts, (2**8,), Source(index, 64), (8, 8))) < len(alone)


@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_no_tokens_cost_less_than_the_least(sizes):
    for value in (0, *(size - 1 for size in sizes)):
        parts = torch.tensor([[min(value, size - 1) for size in sizes]] * 300)[None]
        bits = 8 * len(written(parts, sizes, None, (1, 300)))
        assert bits >= math.floor(300 * least_bits(sizes))


def test_neighbours_are_the_tokens_left_of_and_above_where_each_was_opened():
    source = Source(torch.tensor([[0, 1, 0, 2, 1, 3]]), 4)
    # 0 1 0
    # 2 1 3: 2 is below 0; 3 is to the right of 1 and below 0.
    assert neighbours(source, (2, 3)) == [[[], [0], [0], [1, 0]]]


def test_a_bit_is_predicted_as_by_hand():
    """Two tokens of one bit: the first has none beside it, the second has the first."""
    recorder = Recorder()
    TokenCoder([2]).code(recorder, [[1], [1], [1]], [[], [0], [0, 1]])
    # Own counts 2 and 2; then 2 and 3 and nothing seen beside a 1; then 2 and 4, and other company.
    first, second, third = (frequencies[1] / TOTAL for frequencies, _ in recorder.said)
    assert (first, second, third) == pytest.approx((1 / 2, 3 / 5, 4 / 6), abs=1e-5)
    recorder = Recorder()
    TokenCoder([2]).code(recorder, [[1], [1], [1]], [[], [0], [1]])
    # Seen once beside a 1: (1 * 6 + 4 * 4) of (1 * 6 + 4 * 6).
    assert recorder.said[-1][0][1] / TOTAL == pytest.approx(22 / 30, abs=1e-5)


def test_branches_that_no_value_has_cost_nothing():
    """One bit for the value 4 of five, three for each other."""
    recorder = Recorder()
    TokenCoder([5]).code(recorder, [[4], [3], [0]], [[], [], []])
    assert [symbol for _, symbol in recorder.said] == [1, 0, 1, 1, 0, 0, 0]


def test_a_part_of_one_value_costs_nothing():
    assert written(torch.zeros(1, 9, 1, dtype=torch.int64), (1,), None, (3, 3)) == b""
    assert least_bits((1,)) == 0
    assert least_bits((4, 5)) == pytest.approx(3 * LEAST_BITS)


@pytest.mark.parametrize("bit", [0, 1])
def test_no_bit_is_held_for_more_likely_than_15_of_16(bit):
    recorder = Recorder()
    TokenCoder([2]).code(recorder, [[bit]] * 60, [[]] * 60)
    assert recorder.said[-1][0][bit] == TOTAL - TOTAL // 16


def test_the_bytes_are_these_on_every_machine():
    parts = torch.arange(27).view(1, 9, 3) % torch.tensor([8, 5, 3])
    source = random_maps((4, 5), 9, count=1)
    assert written(parts, (8, 5, 3), source, (4, 5)).hex() == "c9e3310744d0242e"
