import contextlib
import itertools
import math

import numpy as np
import pytest
import torch

from mergevq.data.coding.maps import (
    OFFSETS,
    MapCoder,
    cell_contexts,
    code_maps,
    code_uniform,
    has_uniform,
    map_bits,
    map_models,
    open_shares,
    write_maps,
)
from mergevq.data.coding.streams import TOTAL, Reader, Writer
from mergevq.data.layouts import Source, canonicalize, source_bits

SHAPES = [
    ((1, 1), 1),
    ((4, 4), 1),
    ((4, 4), 16),
    ((1, 9), 4),
    ((9, 1), 4),
    ((3, 7), 9),
    ((8, 8), 20),
]


def canonical(index, num_kept):
    return canonicalize(Source(torch.as_tensor(index, dtype=torch.int64), num_kept)).source


def random_maps(shape, num_kept, seed=0, count=3):
    """Maps onto all kept tokens: each has a cell of its own, all other cells any."""
    generator = torch.Generator().manual_seed(seed)
    num_cells = math.prod(shape)
    index = torch.randint(num_kept, (count, num_cells), generator=generator)
    for row in index:
        row[torch.randperm(num_cells, generator=generator)[:num_kept]] = torch.arange(num_kept)
    return canonical(index, num_kept)


def smooth_map(side, num_kept, seed=0):
    """The nearest of K points to each cell."""
    numbers = np.random.default_rng(seed)
    points = numbers.permutation(side * side)[:num_kept]
    cells = np.stack(np.divmod(np.arange(side * side), side), -1)
    distance = np.abs(cells[:, None] - cells[points][None]).sum(-1)
    return canonical(distance.argmin(-1)[None], num_kept)


def equally_likely(num_cells, num_kept, seed):
    """A map drawn evenly among all, by the counts of exact whole numbers."""
    ways = [[0] * (num_kept + 2) for _ in range(num_cells + 1)]
    ways[0][num_kept] = 1
    for n in range(1, num_cells + 1):
        for j in range(num_kept + 1):
            ways[n][j] = j * ways[n - 1][j] + ways[n - 1][j + 1]
    numbers = np.random.default_rng(seed)
    index, num_open = [], 0
    for n in range(num_cells, 0, -1):
        if numbers.uniform() < ways[n - 1][num_open + 1] / ways[n][num_open]:
            index.append(num_open)
            num_open += 1
        else:
            index.append(int(numbers.integers(num_open)))
    return Source(torch.tensor([index]), num_kept)


class Recorder(Writer):
    """A writer that keeps what it was given."""

    def __init__(self):
        super().__init__()
        self.said = []

    def code(self, frequencies, symbol):
        self.said.append((list(frequencies), symbol))
        return super().code(frequencies, symbol)

    def uniform(self, size, symbol):
        self.said.append((size, symbol))
        return super().uniform(size, symbol)


# ---------------------------------------------------------------------------- there and back


@pytest.mark.parametrize(("shape", "num_kept"), SHAPES)
@pytest.mark.parametrize("model", ["context", "uniform"])
@pytest.mark.parametrize("seed", range(3))
def test_a_map_comes_back_bit_for_bit(shape, num_kept, model, seed):
    source = random_maps(shape, num_kept, seed)
    writer = Writer()
    written = code_maps(writer, model, source.index, shape, num_kept)
    assert torch.equal(written, source.index)
    reader = Reader(writer.to_bytes())
    read = code_maps(reader, model, torch.zeros_like(source.index), shape, num_kept)
    assert torch.equal(read, source.index)
    reader.require_end()


@pytest.mark.parametrize("model", ["context", "uniform"])
def test_every_map_of_a_small_grid_comes_back(model):
    for index in itertools.product(range(3), repeat=6):
        if len(set(index)) < 3:
            continue
        source = canonical([index], 3)
        writer = Writer()
        code_maps(writer, model, source.index, (2, 3), 3)
        reader = Reader(writer.to_bytes())
        zeros = torch.zeros_like(source.index)
        assert torch.equal(code_maps(reader, model, zeros, (2, 3), 3), source.index)


@pytest.mark.parametrize("seed", range(3))
def test_structured_maps_come_back(seed):
    source = smooth_map(12, 30, seed)
    model, stream = write_maps(source, (12, 12))
    assert model == "context"
    zeros = torch.zeros_like(source.index)
    assert torch.equal(code_maps(Reader(stream), model, zeros, (12, 12), 30), source.index)


@pytest.mark.parametrize(("shape", "num_kept"), [((1, 1), 1), ((5, 4), 1), ((5, 4), 20)])
def test_the_only_map_there_is_costs_nothing(shape, num_kept):
    assert map_bits(random_maps(shape, num_kept), shape) == [0, 0, 0]


# ------------------------------------------------------------------------------------ prices


@pytest.mark.parametrize("num_kept", [2, 20, 64, 144, 250])
@pytest.mark.parametrize("seed", range(2))
def test_no_map_costs_more_than_its_bound_and_two_words(num_kept, seed):
    bound = source_bits(256, num_kept)
    for source in (equally_likely(256, num_kept, seed), random_maps((16, 16), num_kept, seed, 1)):
        (bits,) = map_bits(source)
        assert bits <= bound + 64


@pytest.mark.parametrize("num_kept", [2, 20, 64, 144, 250])
def test_all_maps_equally_likely_cost_the_bound(num_kept):
    source, writer = equally_likely(256, num_kept, 5), Writer()
    code_maps(writer, "uniform", source.index, (16, 16), num_kept)
    assert abs(8 * len(writer.to_bytes()) - source_bits(256, num_kept)) < 64


@pytest.mark.parametrize(("num_kept", "share"), [(20, 0.45), (64, 0.65)])
def test_a_smooth_map_costs_far_less_than_its_bound(num_kept, share):
    bits = [map_bits(smooth_map(16, num_kept, seed))[0] for seed in range(4)]
    assert max(bits) < share * source_bits(256, num_kept)


def test_stripes_cost_next_to_nothing():
    source = canonical(torch.arange(256)[None] // 32, 8)
    assert map_bits(source)[0] <= 0.2 * source_bits(256, 8)


def test_a_picture_learns_from_its_tiles():
    maps = torch.cat([smooth_map(16, 40, seed).index for seed in range(4)])
    alone = sum(map_bits(Source(maps, 40)))
    assert 8 * len(write_maps(Source(maps, 40), (16, 16))[1]) < alone - 32


@pytest.mark.parametrize(("num_cells", "num_kept"), [(1, 1), (5, 2), (7, 7), (9, 4), (12, 1)])
def test_shares_of_maps_that_open_are_those_of_exact_counts(num_cells, num_kept):
    ways = {(0, j): int(j == num_kept) for j in range(num_kept + 2)}
    table = open_shares(num_cells, num_kept)
    for n in range(1, num_cells + 1):
        for j in range(num_kept + 1):
            ways[n, j] = j * ways[n - 1, j] + ways[n - 1, j + 1]
            if ways[n, j]:
                exact = TOTAL * ways[n - 1, j + 1] / ways[n, j]
                assert abs(table[n][j] - exact) <= 1
        ways[n, num_kept + 1] = 0


def test_a_large_grid_has_no_table_and_is_coded_by_context():
    assert map_models(256, 256) == ("context", "uniform")
    assert not has_uniform(2**12, 2**7)
    assert map_models(2**12, 2**7) == ("context",)


# ---------------------------------------------------------------------------- by hand


def test_neighbours_are_those_in_the_grid():
    assert OFFSETS == ((0, -1), (-1, 0), (-1, -1), (-1, 1), (0, -2), (-2, 0))
    contexts = cell_contexts(3, 3)
    assert contexts[0] == ((), (), 0)
    assert contexts[2] == ((1, 0), (0, 4), 1)
    assert contexts[3] == ((0, 1), (1, 3), 2)
    assert contexts[8] == ((7, 5, 4, 6, 2), (0, 1, 2, 4, 5), 3)


def test_a_tiny_map_is_written_as_by_hand():
    """Cells 0 1 / 0 0 / 1 0 with K = 2.

    0 opens. 1: 1 token in 5 cells, nothing seen beside (one neighbour, which opened: 4 quarters).
    From then on nothing is left to open. Cell 2: above 0 (18) and up-right 1 (9), no other token.
    Cell 3: left 0, above 1, up-left 0; cell 2 taught `above` of two tokens 12. Cell 4: above 0,
    up-right 0, and two above 0 are alone, so 1 is the escape. Cell 5: left 1, above 0, up-left 0,
    two above 1.
    """
    recorder = Recorder()
    MapCoder((3, 2), 2).code(recorder, [0, 1, 0, 0, 1, 0])
    assert recorder.said == [
        ([6 * 4, 6 * 1], 1),
        ([18, 9], 0),
        ([18 + 9, 18 + 12], 0),
        ([18 + 9 + 6, 12], 1),
        (1, 0),
        ([18 + 6 + 6, 18 + 12 + 9 + 6], 1),
    ]


def test_an_escape_prefers_large_and_near_groups():
    """0 0 1 2 3 3 . in a row: of 0 and 1, which no neighbour of the last cell has."""
    recorder = Recorder()
    MapCoder((1, 7), 4).code(recorder, [0, 0, 1, 2, 3, 3, 0])
    # 0 has two cells, the last at distance 5; 1 has one at 4; 2 at 3.
    weights = [2**16 * 2 // 6 + 1, 2**16 * 1 // 5 + 1, 2**16 * 1 // 4 + 1]
    assert recorder.said[-1] == (weights, 0)


def test_where_all_are_equally_likely_the_numbers_are_counts():
    """Three cells onto two tokens: 0 0 1, 0 1 0 and 0 1 1."""
    recorder = Recorder()
    code_uniform(recorder, [0, 1, 1], (1, 3), 2)
    (opens, symbol), pointer = recorder.said
    assert symbol == 1
    assert opens[1] / TOTAL == pytest.approx(2 / 3, abs=1e-5)
    assert pointer == (2, 1)


def test_the_bytes_are_these_on_every_machine():
    source = smooth_map(6, 9)
    model, stream = write_maps(source, (6, 6))
    assert (model, stream.hex()) == ("context", "c7756d91d4fdae15")


# ---------------------------------------------------------------------------- refused


@pytest.mark.parametrize(
    ("index", "num_kept"),
    [([1, 0, 0, 0], 2), ([0, 0, 0, 0], 2), ([0, 2, 1, 0], 3), ([0, 1, 2, 0], 2)],
)
def test_a_map_that_is_not_canonical_is_refused(index, num_kept):
    with pytest.raises(ValueError, match=rf"image 0 must meet its {num_kept} kept tokens"):
        map_bits(Source(torch.tensor([index]), num_kept))


def test_another_grid_is_refused():
    with pytest.raises(ValueError, match=r"\(3, 5\) must have the 16 cells"):
        map_bits(random_maps((4, 4), 3), (3, 5))


def test_any_bytes_are_a_map_or_an_error():
    numbers = np.random.default_rng(0)
    blank = torch.zeros(1, 20, dtype=torch.int64)
    for model in ("context", "uniform"):
        for _ in range(50):
            reader = Reader(numbers.bytes(4 * int(numbers.integers(0, 6))))
            with contextlib.suppress(ValueError):
                index = code_maps(reader, model, blank, (4, 5), 6)
                assert torch.equal(canonical(index, 6).index, index)
