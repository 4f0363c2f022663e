"""Every way to attend computes the same; which one runs is a question of speed alone."""

import pytest
import torch
from torch.nn import functional

from mergevq.nn import attention
from mergevq.nn.attention import attend, attend_apart

# Of bf16: 8 bits of mantissa, in logits and in weights.
TOLERANCE = 2e-2


def parts(dtype, *, key_heads=4, num_queries=7, num_keys=7):
    shapes = [(2, 4, num_queries, 8), (2, key_heads, num_keys, 8), (2, key_heads, num_keys, 8)]
    return [torch.randn(shape).to(dtype).requires_grad_() for shape in shapes]


def exact(query, key, value, **how):
    wide = [part.detach().float() for part in (query, key, value)]
    grouped = query.shape[1] != key.shape[1]
    return functional.scaled_dot_product_attention(*wide, **how, enable_gqa=grouped)


@pytest.mark.parametrize("most", [512, 0])
@pytest.mark.parametrize("key_heads", [1, 2, 4])
def test_training_in_bf16_on_a_cpu_attends_as_float32_does(monkeypatch, most, key_heads):
    monkeypatch.setattr(attention, "_MAX_WRITTEN_OUT", most)
    query, key, value = parts(torch.bfloat16, key_heads=key_heads)
    mixed = attend(query, key, value, None)
    assert mixed.dtype == torch.bfloat16
    torch.testing.assert_close(
        mixed.float(), exact(query, key, value), atol=TOLERANCE, rtol=TOLERANCE
    )


@pytest.mark.parametrize("most", [512, 0])
def test_a_mask_hides_and_a_bias_adds(monkeypatch, most):
    monkeypatch.setattr(attention, "_MAX_WRITTEN_OUT", most)
    query, key, value = parts(torch.bfloat16)
    mask = torch.rand(2, 1, 7, 7) > 0.5
    mask |= torch.eye(7, dtype=torch.bool)
    bias = torch.rand(2, 1, 1, 7)
    for given in (mask, bias.bfloat16()):
        wide = given if given.dtype == torch.bool else given.float()
        torch.testing.assert_close(
            attend(query, key, value, given).float(),
            exact(query, key, value, attn_mask=wide),
            atol=TOLERANCE,
            rtol=TOLERANCE,
        )


@pytest.mark.parametrize("most", [512, 0])
def test_a_query_sees_no_later_key(monkeypatch, most):
    monkeypatch.setattr(attention, "_MAX_WRITTEN_OUT", most)
    query, key, value = parts(torch.bfloat16)
    mixed = attend(query, key, value, None, is_causal=True)
    expected = exact(query, key, value, is_causal=True)
    torch.testing.assert_close(mixed.float(), expected, atol=TOLERANCE, rtol=TOLERANCE)
    torch.testing.assert_close(mixed[:, :, 0], value[:, :, 0])


@pytest.mark.parametrize("most", [512, 0])
def test_gradients_are_those_of_float32(monkeypatch, most):
    monkeypatch.setattr(attention, "_MAX_WRITTEN_OUT", most)
    given = parts(torch.bfloat16)
    wide = [part.detach().float().requires_grad_() for part in given]
    weight = torch.randn(2, 4, 7, 8)
    found = torch.autograd.grad((attend(*given, None).float() * weight).sum(), given)
    expected = torch.autograd.grad((attend(*wide, None) * weight).sum(), wide)
    for one, other in zip(found, expected, strict=True):
        assert (one.float() - other).norm() < 0.03 * other.norm()


def test_half_precision_on_a_cpu_trains_in_float32():
    query, key, value = parts(torch.float16)
    bias = torch.rand(1, 1, 1, 7).half()
    mixed = attend(query, key, value, bias)
    expected = exact(query, key, value, attn_mask=bias.float())
    assert torch.equal(mixed, expected.half())
    with torch.autocast("cpu", dtype=torch.float16):
        assert torch.equal(attend(query, key, value, bias), mixed)


@pytest.mark.parametrize("has_matrix_units", [False, True])
def test_without_a_gradient_matrix_units_use_the_kernel_as_it_is(monkeypatch, has_matrix_units):
    monkeypatch.setattr(attention, "_HAS_MATRIX_UNITS", has_matrix_units)
    query, key, value = (part.detach() for part in parts(torch.bfloat16, num_keys=5))
    kernel = functional.scaled_dot_product_attention(query, key, value)
    mixed = attend(query, key, value, None)
    assert torch.equal(mixed, kernel) == has_matrix_units
    torch.testing.assert_close(mixed, kernel, atol=TOLERANCE, rtol=TOLERANCE)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("key_heads", [1, 2, 4])
def test_a_key_that_lies_apart_counts_as_one_of_the_others(key_heads, dtype):
    # Of four key heads the fused kernel is used, of fewer the keys are put together.
    query, key, value = (
        part.detach() for part in parts(dtype, key_heads=key_heads, num_queries=1, num_keys=6)
    )
    for seen in (slice(0, 6), slice(0, 1)):
        others, own = (key[:, :, :5], value[:, :, :5]), (key[:, :, 5:], value[:, :, 5:])
        mask = torch.zeros(2, 1, 1, 5, dtype=torch.bool)
        mask[..., seen] = True
        whole = functional.pad(mask, (0, 1), value=True)
        expected = attend(query, key, value, whole)
        for given in (mask, torch.zeros(mask.shape, dtype=dtype).masked_fill(~mask, -torch.inf)):
            torch.testing.assert_close(attend_apart(query, *others, *own, given), expected)
    unmasked = attend_apart(query, *others, *own, None)
    torch.testing.assert_close(unmasked, attend(query, key, value, None))


def test_a_key_that_lies_apart_may_weigh_far_more_or_less():
    query, key, value = (part.detach() for part in parts(torch.float32, num_queries=1, num_keys=6))
    for length in (0.0, 100.0, -100.0):
        own_key = query * length
        mixed = attend_apart(query, key, value, own_key, value[:, :, :1], None)
        whole = torch.cat([key, own_key], 2), torch.cat([value, value[:, :, :1]], 2)
        torch.testing.assert_close(mixed, attend(query, *whole, None))
