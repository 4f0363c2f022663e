"""Blocks: attention with sizes, merging between attention and MLP, convolutions, positions."""

import pytest
import torch
from torch import nn

from mergevq.nn.blocks import (
    Attention,
    CrossAttention,
    GridBlock,
    LayerScale,
    MixMlp,
    Mlp,
    QueryBlock,
    initialize,
)
from mergevq.tokenizer.reducers.merge import MergeBlock
from tests.support import reference
from tests.support.layers import randomized, unmerged

SIZES = torch.tensor([[1.0, 3.0, 1.0, 2.0, 5.0]])


def by_definition(attention, x, sizes):
    """Attention of one image, head by head, from the module's weights."""
    head_dim = x.shape[1] // attention.num_heads
    projections = [part.split(head_dim, dim=1) for part in attention.qkv(x).chunk(3, dim=1)]
    heads = [
        reference.attention(query, key, value, sizes)
        for query, key, value in zip(*projections, strict=True)
    ]
    return attention.proj(torch.cat(heads, dim=1)), sum(projections[1]) / attention.num_heads


# ---------------------------------------------------------------------------------- attention


def test_attention_follows_the_definition():
    attention, x = randomized(Attention(12, 3)), torch.randn(2, 5, 12)
    sizes = torch.cat([SIZES, SIZES.flip(1)])
    plain, weighted = attention(x), attention(x, sizes)
    for image in range(2):
        tokens, keys = by_definition(attention, x[image], torch.ones(5))
        torch.testing.assert_close(plain.tokens[image], tokens)
        torch.testing.assert_close(plain.keys[image], keys)
        tokens, keys = by_definition(attention, x[image], sizes[image])
        torch.testing.assert_close(weighted.tokens[image], tokens)
        torch.testing.assert_close(weighted.keys[image], keys)


def test_a_token_of_size_s_is_attended_to_as_s_equal_tokens():
    attention, x = randomized(Attention(12, 3)), torch.randn(1, 5, 12)
    repeats = SIZES[0].long()
    repeated = attention(x.repeat_interleave(repeats, dim=1)).tokens
    first_of_each = repeats.cumsum(0) - repeats
    torch.testing.assert_close(attention(x, SIZES).tokens, repeated[:, first_of_each])


def test_sizes_of_one_change_nothing():
    attention, x = randomized(Attention(12, 3)), torch.randn(2, 5, 12)
    torch.testing.assert_close(attention(x, torch.ones(2, 5)).tokens, attention(x).tokens)


def test_cross_attention_looks_at_the_context_alone():
    cross, x, context = (
        randomized(CrossAttention(12, 3)),
        torch.randn(1, 2, 12),
        torch.randn(1, 5, 12),
    )
    query = cross.q(x[0]).split(4, dim=1)
    key, value = (part.split(4, dim=1) for part in cross.kv(context[0]).chunk(2, dim=1))
    heads = map(reference.attention, query, key, value, [torch.ones(5)] * 3)
    torch.testing.assert_close(cross(x, context)[0], cross.proj(torch.cat(list(heads), dim=1)))


def test_an_order_of_the_context_does_not_matter_and_queries_stay_apart():
    cross, x, context = randomized(CrossAttention(8, 2)), torch.randn(2, 3, 8), torch.randn(2, 5, 8)
    torch.testing.assert_close(cross(x, context.flip(1)), cross(x, context))
    torch.testing.assert_close(cross(x[:, 1:2], context), cross(x, context)[:, 1:2])


def test_layer_scale_starts_a_block_near_the_identity():
    x = torch.randn(2, 6, 8)
    torch.testing.assert_close(
        MergeBlock(8, 2, 1e-5)(x, unmerged(2, 5), 0)[0], x, atol=1e-3, rtol=0
    )
    torch.testing.assert_close(GridBlock(8, 2, 1e-5)(x, (2, 3)), x, atol=1e-3, rtol=0)
    assert LayerScale(3, 0.5)(torch.ones(1, 1, 3)).tolist() == [[[0.5, 0.5, 0.5]]]


def test_an_mlp_treats_every_token_alone_and_a_mixing_one_its_neighbours_too():
    mlp, mixing = randomized(Mlp(8)), randomized(MixMlp(8))
    x = torch.randn(1, 25, 8)
    other = x.clone()
    # The cell in the middle of a 5 x 5 grid.
    other[:, 12] += 1
    changed = (mlp(x) != mlp(other)).any(-1)[0]
    assert changed.nonzero()[:, 0].tolist() == [12]
    changed = (mixing(x, (5, 5)) - mixing(other, (5, 5))).abs().amax(-1)[0] > 1e-6
    assert changed.nonzero()[:, 0].tolist() == [6, 7, 8, 11, 12, 13, 16, 17, 18]


def test_a_mixing_mlp_on_one_cell_is_a_plain_one_with_the_kernels_centre():
    mixing, x = randomized(MixMlp(4)), torch.randn(3, 1, 4)
    hidden = mixing.fc1(x) * mixing.dwconv.weight[:, 0, 1, 1] + mixing.dwconv.bias
    expected = mixing.fc2(nn.functional.gelu(hidden))
    torch.testing.assert_close(mixing(x, (1, 1)), expected)


def test_a_query_block_refines_queries_by_context_then_each_other():
    block = randomized(QueryBlock(8, 2))
    x, context = torch.randn(2, 3, 8), torch.randn(2, 5, 8)
    inner = block.block
    hidden = x + block.cross(block.norm(x), context)
    hidden = hidden + inner.attn(inner.norm1(hidden)).tokens
    expected = hidden + inner.mlp(inner.norm2(hidden))
    torch.testing.assert_close(block(x, context), expected)


def test_initial_matrices_are_narrow_and_biases_zero():
    module = nn.Sequential(nn.Linear(64, 64), nn.Conv2d(64, 64, 3), nn.Conv2d(4, 4, 3, bias=False))
    initialize(module)
    assert module[0].weight.std().item() == pytest.approx(0.02, rel=0.1)
    assert module[1].weight.std().item() == pytest.approx(0.02, rel=0.1)
    assert module[0].bias.eq(0).all()
    assert module[1].bias.eq(0).all()
