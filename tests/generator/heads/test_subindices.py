import math

import pytest
import torch

from mergevq.config.generator import (
    SamplingSettings,
)
from mergevq.generator.sampling import check_finite
from tests.support.generators import TINY, tiny_generator

PLAIN = SamplingSettings()


@pytest.mark.parametrize("order", ["raster", "anchor"])
def test_the_head_asked_part_by_part_gives_the_same_logits(order, generator):
    network = tiny_generator(order, num_head_layers=2).network
    head, sizes = network.head, network.config.part_sizes
    states = torch.randn(3, TINY.dim, generator=generator)
    parts = torch.stack([torch.randint(size, (3,), generator=generator) for size in sizes], -1)
    memory, inputs, steps = [], states, []
    for part in range(len(sizes)):
        steps.append(head.step(inputs, memory, part))
        inputs = network.embed_part(part, parts[:, part])
    for ours, expected in zip(steps, head(states, parts, network.embed_part), strict=True):
        torch.testing.assert_close(ours, expected, rtol=0, atol=1e-5)


def test_choosing_follows_the_joint_distribution():
    network, count = tiny_generator("raster").network, 20_000
    state = torch.randn(1, TINY.dim, generator=torch.Generator().manual_seed(0))
    parts = network.codes(torch.arange(32))
    logits = network.head(state.expand(32, -1), parts, network.embed_part)
    expected = sum(
        part.log_softmax(-1).gather(1, parts[:, number, None])[:, 0]
        for number, part in enumerate(logits)
    ).exp()
    uniforms = torch.rand(count, 2, generator=torch.Generator().manual_seed(1))
    chosen = network.choose(state.expand(count, -1), uniforms, 1.0, PLAIN).parts
    observed = torch.bincount(network.indices(chosen), minlength=32) / count
    # Four standard deviations of the likeliest code's share.
    assert (observed - expected).abs().max() < 4 * math.sqrt(0.25 / count)
    assert expected.sum().item() == pytest.approx(1, abs=1e-5)


def test_a_state_that_is_not_finite_is_reported():
    states = torch.full((1, TINY.dim), torch.nan)
    chosen = tiny_generator("raster").network.choose(states, torch.zeros(1, 2), 1.0, PLAIN)
    with pytest.raises(RuntimeError, match="states or logits are not finite"):
        check_finite(chosen.finite)
