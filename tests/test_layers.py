"""Blocks: attention with sizes, merging between attention and MLP, convolutions, positions."""

import math

import pytest
import reference
import torch
from torch import nn

from mergevq.layers import (
    AdaptiveGroupNorm,
    Attention,
    CrossAttention,
    GridBlock,
    LayerScale,
    MergeBlock,
    MergeState,
    MixMlp,
    Mlp,
    QueryBlock,
    ResBlock,
    Upsample,
    initialize,
    sincos,
    sincos_2d,
    to_grid,
    to_tokens,
)

SIZES = torch.tensor([[1.0, 3.0, 1.0, 2.0, 5.0]])


def randomized(module):
    """Weights large enough that every part of a module shows in its output."""
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.3)
    return module


def unmerged(batch, num_tokens):
    return MergeState(index=torch.arange(num_tokens).expand(batch, -1), sizes=None)


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


# ------------------------------------------------------------------------------- convolutions


@pytest.mark.parametrize(("in_channels", "num_weights"), [(8, 2 * 9 * 64 + 4 * 8), (4, None)])
def test_a_residual_block_keeps_the_size_and_has_a_shortcut(in_channels, num_weights):
    block = randomized(ResBlock(in_channels, 8, num_groups=4))
    image = torch.randn(2, in_channels, 3, 5)
    hidden = block.conv1(nn.functional.silu(block.norm1(image)))
    hidden = block.conv2(nn.functional.silu(block.norm2(hidden)))
    shortcut = image if in_channels == 8 else block.shortcut(image)
    torch.testing.assert_close(block(image), shortcut + hidden)
    assert num_weights in (None, sum(parameter.numel() for parameter in block.parameters()))


def test_upsampling_lays_four_channels_out_as_two_by_two_pixels():
    upsample = Upsample(2)
    nn.init.zeros_(upsample.conv.weight)
    with torch.no_grad():
        upsample.conv.bias.copy_(torch.arange(8))
    out = upsample(torch.randn(1, 2, 3, 4))
    assert out.shape == (1, 2, 6, 8)
    assert out[0, 0, :2, :2].tolist() == [[0, 1], [2, 3]]
    assert out[0, 1, 4:, 6:].tolist() == [[4, 5], [6, 7]]


def test_adaptive_norm_takes_gain_and_shift_from_the_codes_statistics():
    norm = randomized(AdaptiveGroupNorm(3, 8, num_groups=4))
    x, codes = torch.randn(2, 8, 4, 4), torch.randn(2, 16, 3).sign()
    gain = norm.gain(codes.std(1))[..., None, None]
    shift = norm.shift(codes.mean(1))[..., None, None]
    expected = gain * nn.functional.group_norm(x, 4, eps=1e-6) + shift
    torch.testing.assert_close(norm(x, codes), expected, rtol=1e-4, atol=1e-4)


def test_adaptive_norm_is_finite_without_deviation():
    norm, codes = AdaptiveGroupNorm(3, 8, num_groups=4), torch.ones(1, 1, 3, requires_grad=True)
    out = norm(torch.randn(1, 8, 1, 1), codes)
    out.square().sum().backward()
    assert out.isfinite().all()
    assert codes.grad.isfinite().all()
    constant = torch.ones(1, 16, 3, requires_grad=True)
    norm(torch.randn(1, 8, 4, 4), constant).square().sum().backward()
    assert constant.grad.isfinite().all()


# ----------------------------------------------------------------------------------- positions


def test_a_grid_is_read_in_raster_order_and_laid_out_again():
    tokens = torch.arange(6.0)[None, :, None]
    assert to_grid(tokens, (2, 3)).tolist() == [[[[0, 1, 2], [3, 4, 5]]]]
    assert torch.equal(to_tokens(to_grid(tokens, (2, 3))), tokens)


def test_gradients_pass_through_the_grid_and_back():
    tokens = torch.randn(2, 6, 3, requires_grad=True)
    grid = to_grid(tokens, (2, 3))
    assert torch.equal(grid, to_grid(tokens.detach(), (2, 3)))
    weights = torch.randn(2, 6, 3)
    (gradient,) = torch.autograd.grad((to_tokens(grid) * weights).sum(), tokens)
    assert torch.equal(gradient, weights)


def test_position_features_by_hand():
    features = sincos(torch.tensor([0.0, 2.0]), 4)
    assert features[0].tolist() == [0, 0, 1, 1]
    # Frequencies are 1 and 1 / 100.
    expected = [math.sin(2), math.sin(0.02), math.cos(2), math.cos(0.02)]
    assert features[1].tolist() == pytest.approx(expected)


def test_grid_features_are_those_of_row_and_column():
    features = sincos_2d((2, 3), 8)
    rows, columns = features[:, :4], features[:, 4:]
    assert torch.equal(rows, sincos(torch.tensor([0, 0, 0, 1, 1, 1.0]), 4))
    assert torch.equal(columns, sincos(torch.tensor([0, 1, 2, 0, 1, 2.0]), 4))


def test_a_cell_has_the_same_features_in_every_grid():
    small, large = sincos_2d((4, 4), 16), sincos_2d((5, 9), 16)
    torch.testing.assert_close(small.reshape(4, 4, 16), large.reshape(5, 9, 16)[:4, :4])


def test_initial_matrices_are_narrow_and_biases_zero():
    module = nn.Sequential(nn.Linear(64, 64), nn.Conv2d(64, 64, 3), nn.Conv2d(4, 4, 3, bias=False))
    initialize(module)
    assert module[0].weight.std().item() == pytest.approx(0.02, rel=0.1)
    assert module[1].weight.std().item() == pytest.approx(0.02, rel=0.1)
    assert module[0].bias.eq(0).all()
    assert module[1].bias.eq(0).all()


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
