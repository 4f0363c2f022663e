"""Tests of `mergevq.nn.llama`."""

import pytest
import torch
from torch.nn import functional

from mergevq.nn.llama import Attention, Dropout, RmsNorm, normalized, rotate, rotation
from tests.support.transformer import block


def test_rotation_keeps_lengths_and_is_the_identity_at_the_origin(generator):
    x = torch.randn(2, 3, 4, 8, generator=generator)
    turned = rotate(x, rotation(torch.full((1, 4, 2), 3.0), head_dim=8))
    torch.testing.assert_close(turned.norm(dim=-1), x.norm(dim=-1))
    assert torch.equal(rotate(x, rotation(torch.zeros(1, 4, 2), head_dim=8)), x)


def test_rotated_products_depend_on_the_difference_of_positions(generator):
    query, key = torch.randn(2, 1, 1, 1, 8, generator=generator)

    def product(first, second):
        positions = torch.tensor([[first]]), torch.tensor([[second]])
        turned = [
            rotate(x, rotation(where.float(), head_dim=8))
            for x, where in zip((query, key), positions, strict=True)
        ]
        return float((turned[0] * turned[1]).sum())

    assert product([5, 2], [1, 7]) == pytest.approx(product([6, 5], [2, 10]), abs=1e-5)
    assert product([5, 2], [1, 7]) != pytest.approx(product([5, 2], [7, 1]), abs=1e-3)


def test_half_of_the_pairs_turn_by_row_and_half_by_column():
    turns = rotation(torch.tensor([[[2.0, 0.0], [0.0, 2.0]]]), head_dim=8)
    still = turns.cos[0, 0, :, ::2] == 1
    assert still.tolist() == [[False, False, True, True], [True, True, False, False]]
    assert torch.equal(turns.cos[..., ::2], turns.cos[..., 1::2])


def test_an_input_sees_nothing_after_it(generator):
    attention = block(qk_norm=True)
    x = torch.randn(1, 5, 16, generator=generator)
    turns = rotation(torch.arange(10.0).reshape(1, 5, 2), head_dim=4)
    changed = x.clone()
    changed[:, 3] += 1
    before, after = attention(x, turns), attention(changed, turns)
    assert torch.equal(before[:, :3], after[:, :3])
    assert not torch.isclose(before[:, 3:], after[:, 3:]).all()


def test_grouped_heads_equal_heads_repeated(generator):
    grouped = Attention(dim=16, num_heads=4, key_heads=2, qk_norm=False)
    full = Attention(dim=16, num_heads=4, key_heads=4, qk_norm=False)
    query, key, value = grouped.qkv.weight.detach().split([16, 8, 8])
    key, value = (
        w.unflatten(0, (2, 4)).repeat_interleave(2, 0).flatten(0, 1) for w in (key, value)
    )
    full.load_state_dict(
        {"qkv.weight": torch.cat([query, key, value]), "out.weight": grouped.out.weight}
    )
    x = torch.randn(2, 5, 16, generator=generator)
    torch.testing.assert_close(grouped(x, None), full(x, None))


def test_normalised_queries_and_keys_forget_their_length(generator):
    attention = Attention(dim=16, num_heads=4, key_heads=4, qk_norm=True)
    x = torch.randn(2, 5, 16, generator=generator)
    before = attention(x, None)
    with torch.no_grad():
        attention.qkv.weight[:32] *= 10
    torch.testing.assert_close(attention(x, None), before, rtol=1e-3, atol=1e-3)


def test_the_norm_is_that_of_pytorch_in_any_type(generator):
    norm, reference = RmsNorm(16), torch.nn.RMSNorm(16, eps=1e-5)
    with torch.no_grad():
        norm.weight.copy_(torch.randn(16, generator=generator))
        reference.weight.copy_(norm.weight)
    x = torch.randn(3, 16, generator=generator)
    torch.testing.assert_close(norm(x), reference(x))
    low = norm(x.to(torch.bfloat16))
    assert low.dtype == torch.bfloat16
    torch.testing.assert_close(low.float(), reference(x), rtol=2e-2, atol=2e-2)
    with torch.no_grad():
        for scale in (1.0, 1e-3, 0.0):
            torch.testing.assert_close(norm(scale * x), reference(scale * x))
        assert norm(x.to(torch.bfloat16)).dtype == torch.bfloat16
    # Weights in bf16 multiply numbers in bf16, whatever the sums before were kept in.
    norm.to(torch.bfloat16)
    with torch.set_grad_enabled(mode=False):
        low = norm(x)
    assert low.dtype == norm(x).dtype == torch.bfloat16
    torch.testing.assert_close(low.float(), reference(x), rtol=2e-2, atol=2e-2)
    torch.testing.assert_close(norm(x).float(), reference(x), rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("count", [1, 2, 4])
def test_shares_of_a_batch_drop_what_the_whole_batch_drops(dtype, count):
    x = torch.randn(4, 3, 8, dtype=dtype)
    torch.manual_seed(5)
    whole = functional.dropout(x, 0.3)
    layer, parts = Dropout(0.3), []
    for index, part in enumerate(x.chunk(count)):
        layer.share = (index, count)
        torch.manual_seed(5)
        parts.append(layer(part))
    torch.testing.assert_close(torch.cat(parts), whole)
    assert torch.equal(torch.cat(parts) == 0, whole == 0)
    assert torch.equal(layer.eval()(x), x)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_normalisation_without_gradients_is_that_with_them(dtype):
    x = torch.randn(2, 3, 8).to(dtype)
    expected = normalized(x, dtype)
    with torch.no_grad():
        found = normalized(x, dtype)
    assert found.dtype == dtype
    torch.testing.assert_close(found, expected)
