"""Tests of `mergevq.nn.norm`."""

import pytest
import torch
from torch.nn import functional

from mergevq.nn.conv import AdaptiveGroupNorm
from mergevq.nn.norm import GroupNorm, LayerNorm, channels_last_norm
from tests.support.layers import randomized

HALF = 2**-8
"""Largest relative distance of a number from its neighbour in bf16."""


def picture(batch, channels, height, width, mean=0.5):
    """An image in bf16 and channels_last, whose gradient is wanted."""
    x = 2 * torch.randn(batch, channels, height, width) + mean
    return x.bfloat16().to(memory_format=torch.channels_last).requires_grad_()


def in_double(x, num_groups, weight, bias, gradient, eps):
    """Group norm and its gradients, written out in float64."""
    x, weight, bias = (each.detach().double().requires_grad_() for each in (x, weight, bias))
    groups = x.reshape(len(x), num_groups, -1)
    centred = groups - groups.mean(2, keepdim=True)
    normed = (centred / (centred.square().mean(2, keepdim=True) + eps).sqrt()).view(x.shape)
    per_image = weight if weight.ndim == 2 else weight[None]
    shift = bias if bias.ndim == 2 else bias[None]
    out = normed * per_image[..., None, None] + shift[..., None, None]
    return out, *torch.autograd.grad(out, (x, weight, bias), gradient.double())


def error(found, right):
    """Distance of one tensor from another, over its norm."""
    return float((found - right).detach().norm() / right.detach().norm())


# The first is large enough for torch's forward pass in channels_last; no power of 2 divides the
# last.
@pytest.mark.parametrize(
    ("shape", "num_groups"), [((2, 8, 32, 36), 4), ((3, 16, 8, 8), 4), ((2, 6, 5, 3), 2)]
)
@pytest.mark.parametrize("per_image", [False, True])
def test_group_norm_in_channels_last_is_its_definition(shape, num_groups, per_image):
    x = picture(*shape)
    of = shape[:2] if per_image else shape[1:2]
    weight = (1 + 0.3 * torch.randn(of)).requires_grad_()
    bias = torch.randn(of, requires_grad=True)
    out = channels_last_norm(x, num_groups, weight, bias, 1e-6)
    gradient = torch.randn_like(out)
    gradients = torch.autograd.grad(out, (x, weight, bias), gradient)
    expected = in_double(x, num_groups, weight, bias, gradient, 1e-6)
    for found, right in zip((out, *gradients), expected, strict=True):
        assert error(found, right) < 2 * HALF
    assert out.is_contiguous(memory_format=torch.channels_last)
    assert gradients[0].is_contiguous(memory_format=torch.channels_last)


def test_group_norm_in_channels_last_needs_no_gain():
    x = picture(2, 8, 4, 4)
    out = channels_last_norm(x, 4, None, None, 1e-6)
    gradient = torch.randn_like(out)
    one, zero = torch.ones(8), torch.zeros(8)
    expected = in_double(x, 4, one, zero, gradient, 1e-6)
    (found,) = torch.autograd.grad(out, x, gradient)
    assert error(found, expected[1]) < 2 * HALF


def test_float32_images_are_normalised_by_torch_to_the_last_bit():
    norm = randomized(GroupNorm(4, 8))
    x = torch.randn(2, 8, 4, 4, requires_grad=True)
    expected = functional.group_norm(x, 4, norm.weight, norm.bias, norm.eps)
    assert torch.equal(norm(x), expected)
    (mine,) = torch.autograd.grad(norm(x).square().sum(), x)
    (right,) = torch.autograd.grad(expected.square().sum(), x)
    assert torch.equal(mine, right)
    tokens, layer = torch.randn(2, 3, 8), randomized(LayerNorm(8))
    assert torch.equal(
        layer(tokens), functional.layer_norm(tokens, (8,), layer.weight, layer.bias, layer.eps)
    )


def test_adaptive_norm_is_the_same_in_both_layouts():
    norm = randomized(AdaptiveGroupNorm(3, 8, num_groups=4))
    x, codes = picture(2, 8, 4, 4), torch.randn(2, 16, 3).sign()
    with torch.autocast("cpu", torch.bfloat16):
        found = norm(x, codes)
        expected = norm(x.contiguous(), codes)
    torch.testing.assert_close(found, expected, rtol=2 * HALF, atol=4 * HALF)


@pytest.mark.parametrize("layer", [LayerNorm(8), GroupNorm(4, 8)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_norm_keeps_the_type_of_its_input_under_autocast(layer, dtype):
    x = torch.randn(2, 8, 8, 8).to(dtype)
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(x).dtype == dtype
