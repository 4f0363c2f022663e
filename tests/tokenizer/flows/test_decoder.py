"""Decoding along a flow: an image is of its tokens, its seed and its number alone."""

from dataclasses import replace

import pytest
import torch

from mergevq.config.recipes.digits import digits32
from mergevq.data.layouts import Source
from mergevq.nn.flow import solve, time_grid
from mergevq.runtime.artefacts import save_model, tokens_hash
from mergevq.runtime.random import step_generator
from mergevq.tokenizer.flows.decoder import FlowDecoder, FlowNetwork, Noise
from mergevq.tokenizer.tokenizer import Tokenizer
from tests.support.flows import GRID, LAYOUTS, flow_config, network_of, shown_of
from tests.support.small import shrink


def rows_of(layout, rows):
    return Source(layout.index[rows], 5) if isinstance(layout, Source) else layout


@pytest.mark.parametrize("kind", LAYOUTS)
@pytest.mark.parametrize("solver", ["ab2", "sde"])
def test_an_image_depends_on_seed_and_number_and_not_on_the_batch(kind, solver):
    decoder = FlowDecoder(network_of(flow_config(kind, solver=solver)))
    shown = shown_of(kind, num_images=10)
    images = decoder.decode(shown.codes, shown.layout, GRID, Noise(4, range(10)))
    for row in (0, 7, 9):
        one = decoder.decode(
            shown.codes[[row]], rows_of(shown.layout, [row]), GRID, Noise(4, [row])
        )
        assert torch.equal(one[0], images[row])
    others = [
        decoder.decode(shown.codes, shown.layout, GRID, Noise(5, range(10))),
        decoder.decode(shown.codes, shown.layout, GRID, Noise(4, range(1, 11))),
    ]
    for other in others:
        assert not any(torch.equal(*pair) for pair in zip(other, images, strict=True))


def test_decoding_is_the_solution_of_the_flow_by_hand():
    network = network_of(flow_config(guidance_scale=2.0))
    network.mean.copy_(torch.tensor([0.1, 0.2, 0.3]))
    network.std.copy_(torch.tensor([0.5, 1.0, 2.0]))
    shown = shown_of("ordered")
    noise = torch.stack(
        [torch.randn(1, 3, 16, 16, generator=step_generator(0, "flow", i))[0] for i in range(3)]
    )
    embedded, nothing = network.flow.read(shown), network.flow.read(shown.without())

    def velocity(x, time):
        times = torch.full((3,), time)
        without = network.flow(x, times, nothing)
        return without + 2 * (network.flow(x, times, embedded) - without)

    with torch.no_grad():
        x = solve(velocity, noise, time_grid(3, "ab2"), "ab2")
    wanted = x * network.std[:, None, None] + network.mean[:, None, None]
    found = FlowDecoder(network).decode(shown.codes, shown.layout, GRID)
    torch.testing.assert_close(found, wanted)
    torch.testing.assert_close(network.unscaled(network.scaled(wanted)), wanted)


def test_one_step_of_the_mean_velocity_is_the_same_image_from_every_noise():
    """At time 1 the best velocity is noise minus the mean, so one step draws nothing."""
    network = network_of(flow_config(num_steps=1, solver="euler"))
    mean = torch.randn(3, 16, 16)
    decoder, shown = FlowDecoder(network), shown_of("ordered")
    network.flow.register_forward_hook(lambda _, args, __: args[0] - mean)
    images = decoder.decode(shown.codes, shown.layout, GRID)
    torch.testing.assert_close(images, mean.expand(3, -1, -1, -1))


def test_a_number_for_each_image_is_needed():
    decoder, shown = FlowDecoder(network_of(flow_config())), shown_of("ordered")
    with pytest.raises(ValueError, match=r"image_ids \(2\) must be as many as images \(3\)"):
        decoder.decode(shown.codes, shown.layout, GRID, Noise(0, [1, 2]))


@pytest.fixture(scope="module")
def material(tmp_path_factory):
    """Two random tokenizers, and a decoder for the first."""
    folder = tmp_path_factory.mktemp("material")
    for seed, name in enumerate(("tokenizer", "other")):
        torch.manual_seed(seed)
        Tokenizer(shrink(digits32()).model).save_pretrained(folder / name)
    network = network_of(replace(flow_config("source"), code_dim=8))
    extra = {"tokenizer": tokens_hash(folder / "tokenizer")}
    save_model(
        folder / "decoder", network.state_dict(), network.config, kind="decoder", extra=extra
    )
    return folder


def test_a_decoder_comes_back_as_it_was_saved_and_is_no_part_of_the_tokenizer(material):
    plain = Tokenizer.from_pretrained(material / "tokenizer")
    tokenizer = Tokenizer.from_pretrained(material / "tokenizer", decoder=material / "decoder")
    assert plain.state_dict().keys() == tokenizer.state_dict().keys()
    network = network_of(replace(flow_config("source"), code_dim=8))
    image = torch.rand(2, 3, 32, 32) * 2 - 1
    encoded = tokenizer.encode(image, 16)
    noise = Noise(3, [5, 6])
    wanted = FlowDecoder(network).decode(encoded.codes, encoded.layout, (8, 8), noise)
    found = tokenizer.decode(encoded.codes, encoded.layout, (8, 8), noise)
    assert torch.equal(found, wanted)
    assert torch.equal(tokenizer.reconstruct(image, 16, noise=noise).image, wanted)
    assert not torch.equal(plain.decode(encoded.codes, encoded.layout), wanted)


def test_the_decoder_of_another_tokenizer_is_refused_in_one_line(material):
    with pytest.raises(ValueError, match="was trained on tokens of tokenizer") as refused:
        Tokenizer.from_pretrained(material / "other", decoder=material / "decoder")
    assert "\n" not in str(refused.value)
    with pytest.raises(ValueError, match="holds a tokenizer, and a decoder is needed here"):
        Tokenizer.from_pretrained(material / "other", decoder=material / "tokenizer")


def test_a_network_has_the_scale_of_its_data_in_its_weights():
    assert {"mean", "std"} <= FlowNetwork(flow_config()).state_dict().keys()
