"""Tests of `mergevq.tokenizer.reducers.merge`."""

import pytest
import torch

from mergevq.config.parts import Merge as Settings
from mergevq.tokenizer.reducers.matching import centres
from mergevq.tokenizer.reducers.merge import Merge, MergeBlock, MergeState, nearness
from tests.support import reference
from tests.support.layers import randomized, unmerged

SIZES = torch.tensor([[1.0, 3.0, 1.0, 2.0, 5.0]])


# --------------------------------------------------------------------------------- transformer


@pytest.mark.parametrize("num_merged", [0, 1, 4])
def test_a_merging_block_leaves_the_stated_number_of_tokens(num_merged):
    block = randomized(MergeBlock(8, 2, layer_scale=0.1))
    x, state = block(torch.randn(2, 10, 8), unmerged(2, 9), num_merged)
    assert x.shape == (2, 10 - num_merged, 8)
    assert state.index.shape == (2, 9)
    assert [len(image.unique()) for image in state.index] == [9 - num_merged] * 2
    assert state.index.max() == 8 - num_merged


def test_sizes_are_counts_of_cells_with_the_class_token_first():
    block = randomized(MergeBlock(8, 2, layer_scale=0.1))
    x, state = block(torch.randn(2, 17, 8), unmerged(2, 16), 8)
    x, state = block(x, state, 3)
    for image in range(2):
        counts = state.index[image].bincount(minlength=5)
        assert state.sizes[image].tolist() == [1, *counts.tolist()]


def test_a_block_without_merging_is_a_plain_transformer_block():
    block, x = randomized(MergeBlock(8, 2, layer_scale=0.1)), torch.randn(2, 6, 8)
    hidden = x + block.ls1.gamma * block.attn(block.norm1(x)).tokens
    expected = hidden + block.ls2.gamma * block.mlp(block.norm2(hidden))
    out, state = block(x, unmerged(2, 5), 0)
    torch.testing.assert_close(out, expected)
    assert state.sizes is None


def test_what_is_merged_are_tokens_after_attention_by_their_keys_before():
    block, x = randomized(MergeBlock(8, 2, layer_scale=0.1)), torch.randn(1, 9, 8)
    attended = block.attn(block.norm1(x))
    hidden = (x + block.ls1.gamma * attended.tokens)[0]
    step = reference.step_matrix(reference.matching(attended.keys[0, 1:], 3))
    means = step @ hidden[1:] / step.sum(1, keepdim=True)
    merged = torch.cat([hidden[:1], means])[None]
    expected = merged + block.ls2.gamma * block.mlp(block.norm2(merged))
    out, state = block(x, unmerged(1, 8), 3)
    torch.testing.assert_close(out, expected)
    assert state.index[0].tolist() == step.argmax(0).tolist()


def test_the_class_token_is_never_merged_however_alike_it_is():
    block = randomized(MergeBlock(8, 2, layer_scale=0.0))
    # All tokens are equal, so the class token would be as good a partner as any.
    x, state = block(torch.ones(1, 9, 8), unmerged(1, 8), 4)
    assert x.shape == (1, 5, 8)
    assert state.sizes.tolist() == [[1, 1 + 4, 1, 1, 1]]
    assert sorted(state.index[0].unique().tolist()) == [0, 1, 2, 3]


def test_a_second_block_attends_in_proportion_to_sizes():
    block, x = randomized(MergeBlock(8, 2, layer_scale=0.1)), torch.randn(1, 6, 8)
    state = MergeState(index=torch.tensor([[0, 1, 1, 1, 2, 3, 3, 4, 4, 4, 4, 4]]), sizes=None)
    sized = MergeState(index=state.index, sizes=torch.cat([torch.ones(1, 1), SIZES], dim=1))
    hidden = x + block.ls1.gamma * block.attn(block.norm1(x), sized.sizes).tokens
    expected = hidden + block.ls2.gamma * block.mlp(block.norm2(hidden))
    torch.testing.assert_close(block(x, sized, 0)[0], expected)
    assert not torch.allclose(block(x, state, 0)[0], expected)


# ------------------------------------------------------------------------------------ locality


def merged(locality, num_kept=6, shape=(4, 6)):
    torch.manual_seed(0)
    reducer = Merge(Settings(num_layers=3, num_heads=2, layer_scale=0.1, locality=locality), 8)
    grid = torch.randn(4, 24, 8, generator=torch.Generator().manual_seed(1))
    return reducer(grid, torch.zeros(4, 1, 8), shape, num_kept)


def spread(found, width):
    """Mean squared distance of cells from the centre of their token."""
    index = found.layout.index
    middle = centres(index, found.layout.num_kept, width)
    rows = torch.arange(index.shape[1])
    cells = torch.stack([rows // width, rows % width], -1).expand(len(index), -1, -1)
    own = middle.gather(1, index[..., None].expand(-1, -1, 2))
    return (cells - own).square().sum(-1).mean()


def test_without_locality_places_do_not_count():
    assert torch.equal(merged(0.0).layout.index, merged(0.0, shape=(6, 4)).layout.index)
    assert not torch.equal(merged(5.0).layout.index, merged(5.0, shape=(6, 4)).layout.index)


def test_the_more_local_the_nearer_are_the_cells_of_a_token():
    spreads = [spread(merged(locality), 6) for locality in (0.0, 1.0, 100.0)]
    assert spreads[0] > spreads[1] > spreads[2]
    assert spreads[0] > 1.3 * spreads[2]


def test_a_side_of_the_grid_costs_the_locality():
    near = nearness(0.5, (4, 8))
    places = near.places(torch.arange(32)[None], 32)
    corners = places[0, [0, 7]]
    torch.testing.assert_close((corners[1] - corners[0]).norm(), torch.tensor(0.5 * 7 / 8))
    assert nearness(0.0, (4, 8)) is None


# ----------------------------------------------------------------------------------- precision


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_blocks_compute_in_the_precision_of_their_weights(dtype):
    block, x = MergeBlock(8, 2, 0.1).to(dtype), torch.randn(2, 9, 8).to(dtype)
    x, state = block(x, unmerged(2, 8), 3)
    x, state = block(x, state, 2)
    assert x.dtype == dtype
    assert state.sizes.dtype == torch.float32
    assert x.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_blocks_stay_close_to_full_precision_under_autocast(dtype):
    block, x = MergeBlock(8, 2, 0.1), torch.randn(2, 9, 8)
    expected, _ = block(x, unmerged(2, 8), 0)
    with torch.autocast("cpu", dtype=dtype):
        out, _ = block(x, unmerged(2, 8), 0)
    torch.testing.assert_close(out.float(), expected, rtol=0.02, atol=0.02)
