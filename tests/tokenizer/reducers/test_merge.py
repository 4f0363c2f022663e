"""Tests of `mergevq.tokenizer.reducers.merge`."""

import pytest
import torch

from mergevq.tokenizer.reducers.merge import MergeBlock, MergeState
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
