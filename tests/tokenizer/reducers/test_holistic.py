"""Tests of `mergevq.tokenizer.reducers.holistic`."""

from dataclasses import replace

import pytest
import torch

from mergevq.config.parts import Holistic as Settings
from mergevq.config.recipes.digits import digits32_queries
from mergevq.config.recipes.holistic import digits32_holistic
from mergevq.data.layouts import Ordered
from mergevq.tokenizer.reducers.holistic import Holistic
from mergevq.tokenizer.tokenizer import Tokenizer
from tests.support.small import shrink

GRID = (3, 4)
NUM_HOLISTIC = 3
NUM_ALL = 15


def reducer(**changes):
    """Blocks of 8 channels, three of which the last two are causal."""
    torch.manual_seed(0)
    sizes = {"num_holistic": NUM_HOLISTIC, "num_layers": 3, "num_full_layers": 1, "num_heads": 2}
    model = Holistic(Settings(**(sizes | changes)), 8)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return model


def given():
    """Cells and class token of two images."""
    numbers = torch.Generator().manual_seed(1)
    return torch.randn(2, 12, 8, generator=numbers), torch.randn(2, 1, 8, generator=numbers)


def test_a_token_of_the_second_stage_is_that_of_attention_to_those_before_it():
    model, (grid, cls) = reducer(num_layers=2), given()
    start = model(grid, cls, GRID, NUM_ALL, num_layers=1)
    found = model(grid, cls, GRID, NUM_ALL)
    order = [
        start.tokens[:, :NUM_HOLISTIC],
        start.class_token[:, None],
        start.tokens[:, NUM_HOLISTIC:],
    ]
    before = torch.cat(order, dim=1)
    for place in range(NUM_ALL + 1):
        expected = model.blocks[1](before[:, : place + 1])[:, -1]
        if place == NUM_HOLISTIC:
            torch.testing.assert_close(found.class_token, expected, rtol=1e-4, atol=1e-5)
        else:
            token = found.tokens[:, place - (place > NUM_HOLISTIC)]
            torch.testing.assert_close(token, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("num_full_layers", "reads"), [(0, False), (1, True)])
def test_tokens_of_the_whole_image_see_cells_in_the_first_stage_alone(num_full_layers, reads):
    model, (grid, cls) = reducer(num_full_layers=num_full_layers), given()
    grid.requires_grad_()
    out = model(grid, cls, GRID, NUM_ALL)
    for seen in (out.tokens[:, :NUM_HOLISTIC], out.class_token):
        (gradient,) = torch.autograd.grad(seen.sum(), grid, retain_graph=True)
        assert bool(gradient.abs().amin() > 0) is reads
        assert bool(gradient.any()) is reads
    (gradient,) = torch.autograd.grad(out.tokens[:, NUM_HOLISTIC + 4].sum(), grid)
    assert gradient[:, 4].any()
    assert bool(gradient[:, 5:].any()) is reads


def test_cells_and_class_token_read_the_tokens_of_the_whole_image():
    model, (grid, cls) = reducer(num_full_layers=0), given()
    first = model(grid, cls, GRID, NUM_ALL)
    with torch.no_grad():
        model.holistic[1] *= -1
    again = model(grid, cls, GRID, NUM_ALL)
    assert torch.equal(first.tokens[:, 0], again.tokens[:, 0])
    assert (first.tokens[:, 1:] != again.tokens[:, 1:]).any(-1).all()
    assert (first.class_token != again.class_token).any(-1).all()


@pytest.mark.parametrize("num_kept", [1, 3, 4, 11])
def test_fewer_tokens_are_the_first_of_all(num_kept):
    model, (grid, cls) = reducer(), given()
    everything = model(grid, cls, GRID, NUM_ALL, taps=(0, 1, 2))
    fewer = model(grid, cls, GRID, num_kept, taps=(0, 1, 2))
    assert fewer.layout == Ordered(num_kept)
    assert torch.equal(fewer.tokens, everything.tokens[:, :num_kept])
    assert torch.equal(fewer.class_token, everything.class_token)
    for some, tokens in zip(fewer.taps, everything.taps, strict=True):
        assert torch.equal(some, tokens[:, :num_kept])


def test_taps_are_the_tokens_that_fewer_blocks_leave():
    model, (grid, cls) = reducer(), given()
    taps = model(grid, cls, GRID, NUM_ALL, taps=(3, 2, 1, 0)).taps
    for number, tokens in zip((3, 2, 1, 0), taps, strict=True):
        assert torch.equal(tokens, model(grid, cls, GRID, NUM_ALL, num_layers=number).tokens)


def test_weights_are_as_many_as_their_definition_has():
    # qkv 3, proj 1, MLP 8 of 8 x 8; biases 3 + 1 + 4 + 1, two norms and two gains.
    blocks = 3 * (12 * 8 * 8 + 15 * 8)
    assert sum(p.numel() for p in reducer().parameters()) == NUM_HOLISTIC * 8 + blocks


def test_the_bits_of_an_image_are_those_of_all_tokens_and_of_no_map():
    model = Tokenizer(shrink(digits32_holistic()).model)
    bits = model.bits(4 + 64)
    assert (bits.tokens, bits.source) == (68 * model.quantizer.spec.bits, 0.0)
    assert not model.has_maps


@pytest.mark.parametrize("num_holistic", [0, 4])
def test_a_token_of_the_whole_image_is_one_of_any_grid(num_holistic):
    config = shrink(digits32_holistic()).model
    part = replace(config.reducer, num_holistic=num_holistic)
    model = Tokenizer(replace(config, reducer=part, num_kept=num_holistic + 64))
    assert model.num_tokens(torch.zeros(1, 3, 32, 32)) == num_holistic + 64
    assert model.num_tokens(torch.zeros(1, 3, 64, 32)) == num_holistic + 128
    assert model.num_tokens(torch.zeros(1, 3, 24, 24)) == num_holistic + 36
    half = (num_holistic + 32) / 64
    assert model.config.kept_in_proportion((6, 6), half) == num_holistic + 18
    assert model.config.kept_in_proportion((6, 6), num_holistic / 64) == max(num_holistic, 1)


def test_more_tokens_than_there_are_and_more_full_blocks_than_blocks_are_refused():
    settings = Settings(num_holistic=4)
    message = r"num_kept \(17\) must be between 1 and 16: 4 tokens of the whole image .* 12 cells"
    with pytest.raises(ValueError, match=message):
        settings.check_kept(GRID, 17)
    assert settings.nearest_kept(GRID, 17) == 16
    message = r"reducer\.num_full_layers \(4\) must be at most reducer\.num_layers \(3\)"
    with pytest.raises(ValueError, match=message):
        Settings(num_layers=3, num_full_layers=4)
    model = digits32_holistic().model
    with pytest.raises(ValueError, match=r"num_kept \(69\) must be between 1 and the 68 tokens"):
        replace(model, num_kept=69)
    with pytest.raises(ValueError, match=r"'holistic', .*: set model\.expander\.kind to fuse"):
        replace(model, expander=digits32_queries().model.expander)
