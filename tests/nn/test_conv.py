"""Tests of `mergevq.nn.conv`."""

import pytest
import torch
from torch import nn

from mergevq.nn.conv import AdaptiveGroupNorm, ResBlock, Upsample
from tests.support.layers import randomized

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
