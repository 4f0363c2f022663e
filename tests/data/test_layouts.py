"""Tests of `mergevq.data.layouts`."""

import math

import pytest
import torch

from mergevq.data.layouts import Source, canonicalize, merge, source_bits, unmerge
from mergevq.tokenizer.expanders.recovery import most_likely_source
from mergevq.tokenizer.reducers.matching import match, merge_schedule, merge_step
from mergevq.tokenizer.reducers.merge import MergeBlock, MergeState
from tests.support import reference

# Cells 0 and 2 share a token, so do 1, 4 and 5; cell 3 is alone.
SOURCE = Source(torch.tensor([[0, 1, 0, 2, 1, 1]]), 3)


def merged_source(num_tokens=49, counts=(20, 10, 3), batch=3):
    """A source that random keys produced over several steps, not yet in canonical order."""
    index = torch.arange(num_tokens).expand(batch, -1)
    for count in counts:
        index = match(torch.randn(batch, num_tokens, 8), count).gather(1, index)
        num_tokens -= count
    return Source(index, num_tokens)


def test_merging_agrees_with_the_source_matrix():
    grid, source = torch.randn(3, 49, 5), merged_source()
    for image, index in enumerate(source.index):
        matrix = reference.source_matrix(index, source.num_kept)
        expected = matrix @ grid[image] / matrix.sum(1, keepdim=True)
        torch.testing.assert_close(merge(grid, source)[image], expected)


def test_merging_undoes_unmerging():
    kept, source = torch.randn(3, 16, 5), merged_source()
    torch.testing.assert_close(merge(unmerge(kept, source), source), kept)


def test_unmerging_puts_group_means_at_all_their_cells():
    grid = torch.tensor([[[1.0], [2.0], [5.0], [7.0], [3.0], [4.0]]])
    assert merge(grid, SOURCE)[0, :, 0].tolist() == [3, 3, 7]
    assert unmerge(merge(grid, SOURCE), SOURCE)[0, :, 0].tolist() == [3, 3, 3, 7, 3, 3]


def test_gradients_pass_through_merging_and_unmerging():
    grid = torch.ones(1, 6, 1, requires_grad=True)
    kept = torch.ones(1, 3, 1, requires_grad=True)
    (merge(grid, SOURCE)[:, 0].sum() + unmerge(kept, SOURCE)[:, 4].sum()).backward()
    assert grid.grad[0, :, 0].tolist() == [0.5, 0, 0.5, 0, 0, 0]
    assert kept.grad[0, :, 0].tolist() == [0, 1, 0]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_large_groups_keep_their_mean_in_low_precision(dtype):
    # A bfloat16 sum of ones stops at 256, a float16 sum of 100s overflows.
    tokens, index = torch.full((1, 1024, 1), 100, dtype=dtype), torch.zeros(1, 1024).long()
    merged = merge_step(tokens, torch.ones(1, 1024), index, 1)
    assert merged.tokens.item() == 100
    assert merged.tokens.dtype == dtype
    assert merged.sizes.item() == 1024
    assert merge(tokens, Source(index, 1)).item() == 100


def test_merging_blocks_that_pass_features_on_give_means_of_the_original_grid():
    blocks = [MergeBlock(8, 2, layer_scale=0.0) for _ in range(3)]
    grid, class_token = torch.randn(2, 32, 8), torch.randn(2, 1, 8)
    x = torch.cat([class_token, grid], dim=1)
    state = MergeState(index=torch.arange(32).expand(2, -1), sizes=None)
    for block, count in zip(blocks, merge_schedule(32, 7, num_layers=3), strict=True):
        x, state = block(x, state, count)
    torch.testing.assert_close(x[:, 1:], merge(grid, Source(state.index, 7)))
    assert torch.equal(state.sizes[:, 1:], Source(state.index, 7).sizes().float())
    # The class token is in no group.
    assert torch.equal(x[:, :1], class_token)
    assert state.sizes[:, 0].tolist() == [1, 1]


def test_sizes_and_anchors_by_hand():
    assert SOURCE.sizes().tolist() == [[2, 3, 1]]
    assert SOURCE.anchors().tolist() == [[0, 1, 3]]


def test_sizes_sum_to_the_grid():
    assert merged_source().sizes().sum(1).tolist() == [49, 49, 49]


def test_a_token_without_cells_is_anchored_behind_the_grid():
    source = Source(torch.tensor([[2, 0, 0]]), 4)
    assert source.anchors().tolist() == [[1, 3, 0, 3]]
    assert source.sizes().tolist() == [[2, 0, 1, 0]]


def test_canonical_order_by_hand():
    source, order = canonicalize(Source(torch.tensor([[2, 0, 2, 1, 0, 0]]), 3))
    assert torch.equal(source.index, SOURCE.index)
    assert order.tolist() == [[2, 0, 1]]


def test_in_canonical_order_a_cell_opens_the_next_token_or_copies_an_open_one():
    source = canonicalize(merged_source()).source
    highest = source.index.cummax(1).values
    opened = torch.cat([torch.full((3, 1), -1), highest], dim=1)
    assert (source.index <= opened[:, :-1] + 1).all()
    assert highest[:, -1].tolist() == [15, 15, 15]
    assert (source.anchors().diff() > 0).all()


def test_canonical_order_keeps_every_token_with_its_cells():
    before, grid = merged_source(), torch.randn(3, 49, 2)
    source, order = canonicalize(before)
    kept = merge(grid, before).gather(1, order[..., None].expand(-1, -1, 2))
    torch.testing.assert_close(kept, merge(grid, source))
    assert torch.equal(canonicalize(source).source.index, source.index)


# --------------------------------------------------------------------------------------- bits


@pytest.mark.parametrize("num_tokens", range(1, 7))
def test_source_bits_count_the_maps_that_exist(num_tokens):
    for num_kept in range(1, num_tokens + 1):
        num_maps = len(reference.canonical_maps(num_tokens, num_kept))
        assert source_bits(num_tokens, num_kept) == pytest.approx(math.log2(num_maps))


@pytest.mark.parametrize(("num_tokens", "num_kept"), [(256, 144), (256, 36), (400, 399)])
def test_source_bits_stay_exact_at_real_sizes(num_tokens, num_kept):
    expected = math.log2(reference.num_partitions(num_tokens, num_kept))
    assert source_bits(num_tokens, num_kept) == pytest.approx(expected, rel=1e-12)


def test_an_image_costs_its_tokens_and_its_source():
    bits = SOURCE.bits(18.0)
    assert bits.tokens == 3 * 18
    # Six things fall into three groups in 90 ways.
    assert bits.source == pytest.approx(math.log2(90))
    assert bits.total == bits.tokens + bits.source


def test_an_unmerged_image_needs_no_bits_for_its_source():
    assert Source(torch.arange(9)[None], 9).bits(18.0).total == 9 * 18


def test_certain_logits_of_a_canonical_map_give_it_back(generator):
    source = canonicalize(Source(torch.randint(0, 6, (3, 20), generator=generator), 6)).source
    occurring = Source(source.index, 6)
    logits = torch.nn.functional.one_hot(occurring.index, 6).float()
    full = (occurring.sizes() > 0).all(-1)
    assert full.any()
    assert torch.equal(most_likely_source(logits).index[full], occurring.index[full])
