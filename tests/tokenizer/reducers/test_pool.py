"""Tests of `mergevq.tokenizer.reducers.pool` and of blocks of a grid."""

import math
from dataclasses import replace

import pytest
import torch

from mergevq.config.parts import Pool as Settings
from mergevq.data.layouts import blocks, canonicalize, unmerge
from mergevq.tokenizer.reducers.pool import Pool

SMALL = Settings(num_layers=2, num_heads=2, layer_scale=0.1)


def reducer():
    torch.manual_seed(0)
    return Pool(SMALL, 8)


def tokens(height, width):
    numbers = torch.Generator().manual_seed(1)
    return torch.randn(2, height * width, 8, generator=numbers)


def pooled(grid, shape, num_kept):
    return reducer()(grid, torch.zeros(2, 1, 8), shape, num_kept)


def test_cells_of_a_grid_that_divides_are_in_the_block_that_covers_them():
    index = blocks((4, 4), (2, 2)).index.reshape(4, 4)
    assert index.tolist() == [[0, 0, 1, 1], [0, 0, 1, 1], [2, 2, 3, 3], [2, 2, 3, 3]]


@pytest.mark.parametrize(
    ("shape", "counts"),
    [((16, 16), (12, 12)), ((5, 7), (2, 3)), ((3, 8), (3, 8)), ((4, 6), (1, 1))],
)
def test_blocks_are_a_partition_in_canonical_order_of_nearly_equal_sizes(shape, counts):
    source = blocks(shape, counts)
    sizes = source.sizes()[0]
    assert sizes.sum() == math.prod(shape)
    sides = [
        (length // count, -(-length // count)) for length, count in zip(shape, counts, strict=True)
    ]
    assert sizes.min() >= sides[0][0] * sides[1][0]
    assert sizes.max() <= sides[0][1] * sides[1][1]
    assert torch.equal(canonicalize(source).source.index, source.index)
    assert source.bits(3.0) == (3.0 * math.prod(counts), 0.0, 0.0)


def test_a_token_is_the_mean_of_its_cells():
    grid = tokens(4, 6)
    found = pooled(grid, (4, 6), 6)
    assert reducer().config.counts((4, 6), 6) == (2, 3)
    alike = reducer()(grid, torch.zeros(2, 1, 8), (4, 6), 24).tokens
    means = alike.reshape(2, 2, 2, 3, 2, 8).mean((2, 4)).flatten(1, 2)
    torch.testing.assert_close(found.tokens, means, rtol=0, atol=1e-6)
    # The class token has seen the grid before it was pooled.
    assert found.class_token.abs().max() > 0


def test_blocks_behind_the_means_see_means_alone():
    torch.manual_seed(0)
    module = Pool(replace(SMALL, num_grid_layers=1), 8)
    grid, class_token = tokens(4, 6), torch.zeros(2, 1, 8)
    found = module(grid, class_token, (4, 6), 6, taps=(0, 1, 2))
    seen = module.blocks[0](torch.cat([class_token, grid], dim=1))
    means = seen[:, 1:].reshape(2, 2, 2, 3, 2, 8).mean((2, 4)).flatten(1, 2)
    after = module.blocks[1](torch.cat([seen[:, :1], means], dim=1))
    torch.testing.assert_close(found.tokens, after[:, 1:], rtol=0, atol=1e-6)
    torch.testing.assert_close(found.class_token, after[:, 0], rtol=0, atol=1e-6)
    torch.testing.assert_close(found.taps[1], means, rtol=0, atol=1e-6)
    assert torch.equal(found.taps[2], found.tokens)
    # A probe of an early block reads all cells.
    assert module(grid, class_token, (4, 6), 6, num_layers=0).tokens.shape[1] == 24


def test_more_blocks_before_the_means_than_there_are_is_an_error():
    with pytest.raises(ValueError, match=r"num_grid_layers \(3\) must be at most .*\(2\)"):
        replace(SMALL, num_grid_layers=3)


def test_with_all_cells_nothing_is_pooled():
    found = pooled(tokens(4, 4), (4, 4), 16)
    assert torch.equal(found.layout.index[0], torch.arange(16))
    assert torch.equal(unmerge(found.tokens, found.layout), found.tokens)


@pytest.mark.parametrize(
    ("shape", "num_kept", "counts"),
    [
        ((16, 16), 144, (12, 12)),
        ((16, 16), 36, (6, 6)),
        ((16, 16), 2, (1, 2)),
        ((8, 16), 8, (2, 4)),
    ],
)
def test_blocks_are_as_square_as_can_be(shape, num_kept, counts):
    assert SMALL.counts(shape, num_kept) == counts


def test_a_number_that_is_no_rows_times_columns_is_refused_with_the_nearest_two():
    with pytest.raises(ValueError, match=r"num_kept \(17\) must be .* such as 16 or 18"):
        SMALL.check_kept((16, 16), 17)
    assert SMALL.nearest_kept((16, 16), 17) == 16
    assert SMALL.nearest_kept((16, 16), 1000) == 256
    with pytest.raises(ValueError, match=r"num_kept \(17\) must be"):
        pooled(tokens(16, 16), (16, 16), 17)
