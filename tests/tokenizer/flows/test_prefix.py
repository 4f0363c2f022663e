"""The flow over prefixes: what it sees, and where it starts."""

import pytest
import torch

from mergevq.tokenizer.flows.decoder import FlowNetwork
from tests.support.flows import LAYOUTS, flow_config, network_of, shown_of

TIME = torch.tensor([0.1, 0.5, 0.9])


def points():
    return torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("kind", LAYOUTS)
def test_velocities_are_zero_at_the_start(kind):
    network = FlowNetwork(flow_config(kind))
    assert not network(points(), TIME, shown_of(kind)).any()


@pytest.mark.parametrize("kind", LAYOUTS)
def test_no_bit_changes_with_a_token_that_is_hidden_and_some_with_one_that_is_shown(kind):
    network, lengths = network_of(flow_config(kind)), torch.tensor([1, 2, 4])
    shown = shown_of(kind, lengths=lengths)
    order = network.flow.read(shown).ranks[:, :5]
    velocity = network(points(), TIME, shown)
    hidden = (order >= lengths[:, None])[..., None]
    changed = shown._replace(codes=torch.where(hidden, 7.0, shown.codes))
    assert torch.equal(network(points(), TIME, changed), velocity)
    for image in range(3):
        codes = shown.codes.clone()
        codes[image, order[image].argmin()] += 1
        other = network(points(), TIME, shown._replace(codes=codes))
        assert not torch.equal(other[image], velocity[image])


@pytest.mark.parametrize("kind", LAYOUTS)
def test_all_tokens_shown_is_the_path_without_lengths(kind):
    network, shown = network_of(flow_config(kind)), shown_of(kind)
    everything = shown._replace(lengths=torch.full((3,), 5))
    velocity = network(points(), TIME, shown)
    assert torch.equal(network(points(), TIME, everything), velocity)


@pytest.mark.parametrize("kind", LAYOUTS)
def test_images_do_not_see_each_other_and_every_parameter_has_a_gradient(kind):
    network, shown = network_of(flow_config(kind)), shown_of(kind)
    velocity = network(points(), TIME, shown)
    velocity.square().sum().backward()
    assert [n for n, p in network.named_parameters() if p.grad is None] == []
    x = points()
    x[0] += 1
    assert torch.equal(network(x, TIME, shown)[1:], velocity[1:])


def test_recomputed_activations_give_the_same_gradients():
    network, gradients = network_of(flow_config()), []
    for checkpointing in (False, True):
        network.flow.checkpointing = checkpointing
        network.zero_grad()
        network(points(), TIME, shown_of("ordered")).square().sum().backward()
        gradients.append([p.grad.clone() for p in network.parameters()])
    assert all(torch.equal(*pair) for pair in zip(*gradients, strict=True))


def test_tokens_without_a_map_are_refused_by_a_decoder_of_maps():
    network = network_of(flow_config("source"))
    with pytest.raises(ValueError, match="trained on tokens with a source map, and has none"):
        network(points(), TIME, shown_of("ordered"))
