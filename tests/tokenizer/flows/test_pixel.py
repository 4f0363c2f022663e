"""The flow of patches by themselves: no patch sees another, and one step draws nothing."""

import pytest
import torch

from mergevq.config.parts import PixelFlow
from mergevq.nn.flow import flow_loss, mix
from mergevq.tokenizer.flows.decoder import FlowDecoder, FlowNetwork
from tests.support.flows import GRID, flow_config, layout_of, network_of, shown_of

TIME = torch.tensor([0.1, 0.5, 0.9])


def config_of(num_global_layers=0, **solution):
    decoder = PixelFlow(
        patch_size=2, dim=16, num_global_layers=num_global_layers, num_heads=2, width=16, depth=2
    )
    return flow_config("source", decoder=decoder, **solution)


def points():
    return torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(3))


def test_permuted_patches_with_their_conditions_give_permuted_velocities():
    flow = network_of(config_of()).flow
    patches, order = torch.randn(3, 64, 12), torch.randperm(64)
    conditions = flow.read(shown_of("source")).tokens
    assert conditions.shape == (3, 64, 16)
    velocity = flow.denoise(patches, TIME, conditions)
    assert torch.equal(
        flow.denoise(patches[:, order], TIME, conditions[:, order]), velocity[:, order]
    )


@pytest.mark.parametrize("num_global_layers", [0, 1])
def test_a_pixel_changes_its_own_patch_alone(num_global_layers):
    network, x = network_of(config_of(num_global_layers)), points()
    velocity = network(x, TIME, shown_of("source"))
    x[1, :, 5, 9] += 1
    changed = (network(x, TIME, shown_of("source")) != velocity).any(1)
    rows, columns = changed[1].any(1).nonzero().flatten(), changed[1].any(0).nonzero().flatten()
    assert (rows.tolist(), columns.tolist()) == ([4, 5], [8, 9])
    assert not changed[[0, 2]].any()


@pytest.mark.parametrize("num_global_layers", [0, 1])
def test_a_token_reaches_other_cells_through_the_trunk_alone(num_global_layers):
    network, shown = network_of(config_of(num_global_layers)), shown_of("source")
    velocity = network(points(), TIME, shown)
    codes = shown.codes.clone()
    codes[:, 2] += 1
    changed = (network(points(), TIME, shown._replace(codes=codes)) != velocity).any(1)
    own = (layout_of("source").index == 2).unflatten(1, GRID)
    own = own.repeat_interleave(4, 1).repeat_interleave(4, 2)
    assert changed[own].all()
    assert changed[~own].any() == (num_global_layers > 0)


def test_at_the_start_one_step_returns_the_noise_itself():
    network = FlowNetwork(config_of(num_steps=1, solver="euler"))
    decoder, shown = FlowDecoder(network.eval()), shown_of("source")
    noise = decoder._draw(0, range(3), 16, 16)[0]
    assert torch.equal(decoder.decode(shown.codes, shown.layout, GRID), noise)


@pytest.mark.slow
def test_one_step_is_the_mean_of_two_images_of_one_token_row_and_many_steps_are_one_of_them():
    torch.manual_seed(0)
    decoder = PixelFlow(patch_size=4, dim=16, num_global_layers=0, num_heads=2, width=64, depth=3)
    images = torch.stack([torch.full((3, 4, 4), value) for value in (-1.0, 1.0)])
    shown = shown_of("source", 1)._replace(grid_shape=(1, 1))
    shown = shown._replace(layout=layout_of("source", 1))
    one = torch.zeros(1, 1, dtype=torch.int64)
    shown = shown._replace(codes=shown.codes[:, :1], layout=type(shown.layout)(one, 1))
    network = FlowNetwork(flow_config("source", decoder=decoder))
    optimizer = torch.optim.AdamW(network.parameters(), lr=3e-3)
    for _ in range(600):
        data, noise = images[torch.randint(2, (64,))], torch.randn(64, 3, 4, 4)
        time = torch.rand(64)
        many = shown._replace(
            codes=shown.codes.expand(64, -1, -1), layout=type(shown.layout)(one.expand(64, -1), 1)
        )
        loss = flow_loss(network(mix(data, noise, time), time, many), data, noise)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    found = {}
    for num_steps in (1, 20):
        config = flow_config("source", decoder=decoder, num_steps=num_steps, solver="euler")
        other = FlowNetwork(config)
        other.load_state_dict(network.state_dict())
        found[num_steps] = FlowDecoder(other.eval()).decode(
            many.codes[:32], type(shown.layout)(one.expand(32, -1), 1), (1, 1)
        )
    nearest = {
        n: torch.minimum((x - 1).square(), (x + 1).square()).mean() for n, x in found.items()
    }
    assert found[1].square().mean() < 0.25 < found[20].square().mean()
    assert nearest[20] < found[20].square().mean() / 4
    assert found[1].std(0).mean() < found[20].std(0).mean() / 2
