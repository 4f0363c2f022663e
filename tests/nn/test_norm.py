"""Tests of `mergevq.nn.norm`."""

import pytest
import torch
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

from mergevq.config.parts import CnnDecoder, CnnStem, Lfq, Merge, Unmerge
from mergevq.config.tokenizer import TokenizerConfig
from mergevq.nn.conv import AdaptiveGroupNorm
from mergevq.nn.norm import GroupNorm, LayerNorm, channels_last_norm
from mergevq.runtime.device import lay_out
from mergevq.tokenizer.losses.adversarial import Discriminator
from mergevq.tokenizer.tokenizer import Tokenizer
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


class Walk(TorchDispatchMode):
    """Notes type and layout of what goes through norms, SiLU, GELU and convolutions."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.__name__.partition(".")[0]
        out = func(*args, **(kwargs or {}))
        if name in WATCHED:
            x = args[0]
            lies = x.ndim < 4 or x.is_contiguous(memory_format=torch.channels_last)
            self.found.append((name, tuple(x.shape), x.dtype, lies))
        return out


WATCHED = {
    "convolution",
    "convolution_backward",
    "gelu",
    "native_group_norm",
    "native_layer_norm",
    "silu",
    "silu_backward",
}


def test_under_autocast_no_layer_on_images_leaves_bf16_or_the_layout():
    config = TokenizerConfig(
        image_size=64,
        stem=CnnStem(channels=8, channel_mult=(1, 2), num_res_blocks=1),
        reducer=Merge(num_layers=2, num_heads=2),
        quantizer=Lfq(num_bits=8),
        expander=Unmerge(dim=16, num_heads=2),
        decoder=CnnDecoder(
            channels=8, channel_mult=(1, 2), num_res_blocks=1, num_layers=1, num_heads=2
        ),
        num_kept=512,
    )
    tokenizer, judge = Tokenizer(config), Discriminator(channels=8)
    for module in (tokenizer, judge):
        lay_out(module, torch.device("cpu"), torch.bfloat16)
    image = torch.rand(2, 3, 64, 64).to(memory_format=torch.channels_last)
    with Walk() as walk:
        with torch.autocast("cpu", torch.bfloat16):
            out = tokenizer(image, 512).reconstruction
            loss = judge(out).square().mean() + out.square().mean()
        loss.backward()
    assert {name for name, *_ in walk.found} == WATCHED
    # Sums of the transformer's blocks, and latents of which the signs count, are float32.
    images = [found for found in walk.found if len(found[1]) == 4]
    wrong = {(name, shape) for name, shape, dtype, _ in images if dtype != torch.bfloat16}
    assert not wrong
    # Small grids are normalised in the contiguous layout; see `_FEW_PIXELS`. Codes, the gradient of
    # the image and that of the tokens behind the class token come from outside.
    astray = {(name, shape) for name, shape, _, lies in images if not lies}
    small = {found for found in astray if found[0] == "native_group_norm" and found[1][2] < 32}
    assert astray - small == {
        ("convolution", (2, 8, 32, 32)),
        ("convolution_backward", (2, 3, 64, 64)),
        ("convolution_backward", (2, 16, 32, 32)),
    }
