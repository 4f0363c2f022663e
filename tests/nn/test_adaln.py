"""Tests of `mergevq.nn.adaln`."""

import pytest
import torch

from mergevq.nn.adaln import AdaBlock, AdaMlp, AdaOutput, TimeEmbedding, modulate, zero_start
from mergevq.nn.blocks import initialize


def opened(module):
    """A module whose modulations are not zero any more."""
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return module


def test_a_block_is_the_identity_at_the_start():
    x, cond = torch.randn(2, 5, 8), torch.randn(2, 1, 4)
    assert torch.equal(AdaBlock(8, 2, 4)(x, cond, (5,)), x)
    assert torch.equal(AdaMlp(8, 4)(x, cond), x)
    assert not AdaOutput(8, 4, 3)(x, cond).any()
    block = AdaBlock(8, 2, 4, num_sets=2)
    initialize(block)
    zero_start(block)
    assert torch.equal(block(x, cond, (3, 2)), x)


def test_modulation_by_hand():
    x = torch.tensor([[[1.0, 2.0]]])
    assert modulate(x, torch.tensor([[[1.0, 0.0]]]), torch.tensor([[[1.0, -1.0]]])).tolist() == [
        [[3, 0]]
    ]


def test_each_set_of_tokens_has_a_modulation_of_its_own():
    block, cond = opened(AdaBlock(8, 2, 4, num_sets=2)), torch.randn(2, 1, 4)
    x = torch.randn(2, 1, 8).expand(-1, 5, -1)
    out = block(x, cond, (3, 2))
    # Equal tokens of one set stay equal; those of the other set become others.
    assert torch.allclose(out[:, 0], out[:, 2], atol=1e-5)
    assert torch.allclose(out[:, 3], out[:, 4], atol=1e-5)
    assert not torch.allclose(out[:, 0], out[:, 3], atol=1e-2)


def test_a_token_has_its_own_condition():
    mlp, x, cond = opened(AdaMlp(8, 4)), torch.randn(2, 5, 8), torch.randn(2, 5, 4)
    changed = cond.clone()
    changed[:, 3] += 1
    same = (mlp(x, cond) == mlp(x, changed)).all(-1)
    assert same[:, [0, 1, 2, 4]].all()
    assert not same[:, 3].any()


@pytest.mark.parametrize("gap", [0.01, 0.001])
def test_near_times_are_told_apart(gap):
    embed = TimeEmbedding(32)
    near = embed(torch.tensor([0.5, 0.5 + gap])).detach()
    # Without the scale of 1,000 they would differ by less than a thousandth.
    assert float((near[0] - near[1]).abs().max()) > 0.01
