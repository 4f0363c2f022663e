"""The head whose parts do not depend on each other."""

import itertools
from dataclasses import replace

import pytest
import torch

from mergevq.config.generator import (
    SamplingSettings,
)
from mergevq.config.parts.heads import (
    Independent,
)
from mergevq.generator.build import build_generator
from tests.support.generators import TINY


@pytest.fixture
def network(generator):
    config = replace(TINY, head=Independent(sizes=(4, 8)))
    network = build_generator(config).eval().network
    with torch.no_grad():
        for output in network.head.outputs:
            output.weight.normal_(generator=generator)
    return network


def test_no_part_depends_on_another(network, generator):
    states = torch.randn(2, TINY.dim, generator=generator)
    one = network.head(states, torch.tensor([[0, 0], [1, 2]]), network.embed_part)
    two = network.head(states, torch.tensor([[3, 7], [2, 0]]), network.embed_part)
    assert all(map(torch.equal, one, two))
    assert not torch.equal(one[0][0], one[0][1])


def test_probabilities_of_all_tokens_are_products_that_sum_to_one(network, generator):
    state = torch.randn(1, TINY.dim, generator=generator)
    logits = network.head(state, torch.zeros(1, 2).long(), network.embed_part)
    first, second = (part.detach().softmax(-1)[0] for part in logits)
    tokens = itertools.product(range(4), range(8))
    assert sum(float(first[a] * second[b]) for a, b in tokens) == pytest.approx(1, abs=1e-5)


def test_guided_choices_are_those_of_the_logits(network, generator):
    states = torch.randn(6, TINY.dim, generator=generator)
    settings = SamplingSettings(temperature=0.0)
    chosen = network.choose(states, torch.zeros(3, 2), 2.0, settings, scored=True)
    logits = network.head(states, torch.zeros(6, 2).long(), network.embed_part)
    for part, found in zip(logits, chosen.parts.unbind(-1), strict=True):
        guided = part[3:] + 2 * (part[:3] - part[3:])
        assert torch.equal(found, guided.argmax(-1))
    assert (chosen.log_prob < 0).all()
