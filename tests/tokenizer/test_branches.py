"""Two branches: semantic channels for the teacher, pixel channels of earlier blocks for pixels."""

import functools
from dataclasses import replace

import pytest
import torch

from mergevq.config.objective import NoTeacher, SelfDistillation
from mergevq.config.parts import OneBranch, Residual, Shared, TwoBranches
from mergevq.config.recipes.digits import digits32, digits32_dual, digits32_queries
from mergevq.nn.norm import GroupNorm
from mergevq.runtime import distributed
from mergevq.tokenizer.tokenizer import Tokenizer
from mergevq.training.tokenizer_step import build
from tests.support.config import refused
from tests.support.small import shrink

NUM_KEPT = 16


def tokenizer(**values):
    """Three blocks; 3 of 8 bits are semantic."""
    config = shrink(digits32()).model
    values = {"semantic_dim": 3, **values}
    torch.manual_seed(0)
    model = Tokenizer(replace(config, branches=TwoBranches(**values)))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return model.eval()


def with_parts(config):
    """Makes the configuration with other parts."""
    return functools.partial(replace, config)


def images():
    return torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(1)) * 2 - 1


@pytest.mark.parametrize("decodes", ["pixel", "both"])
def test_semantic_codes_reach_the_picture_only_where_both_are_decoded(decodes):
    model = tokenizer(decodes=decodes)
    encoded = model.encode(images(), NUM_KEPT)
    codes = encoded.codes.clone()
    codes[..., :3] *= -1
    picture = model.decode(encoded.codes, encoded.layout)
    assert torch.equal(model.decode(codes, encoded.layout), picture) == (decodes == "pixel")
    same_map = torch.equal(model.recover(codes).index, model.recover(encoded.codes).index)
    assert same_map or decodes == "both"
    codes[..., 3:] *= -1
    assert not torch.equal(model.decode(codes, encoded.layout), picture)


def test_no_block_behind_the_taps_changes_a_pixel_code():
    model = tokenizer(taps=(1,))
    # All tokens are kept, so that later blocks do not decide which cells join.
    before = model.encode(images(), 64).latents
    with torch.no_grad():
        for parameter in model.encoder.reducer.blocks[1].parameters():
            parameter.add_(0.3)
    after = model.encode(images(), 64).latents
    assert torch.equal(before[..., 3:], after[..., 3:])
    assert not torch.allclose(before[..., :3], after[..., :3])


def test_pixel_latents_are_the_sum_of_taps_by_definition():
    model = tokenizer(taps=(0, 2), gains=(0.6, 1.0))
    out = model.encoder(images(), 64)
    found = model.encoder.latents(out)[..., 3:]
    tapped, expected = model.encoder.tapped, 0
    for number, (tap, gain) in enumerate([(0, 0.6), (2, 1.0)]):
        tokens = model.encoder(images(), 64, num_layers=tap).tokens
        norm = tapped.norms[number]
        assert isinstance(norm, GroupNorm)
        activated = torch.nn.functional.silu(norm(tokens.mT).mT)
        expected = expected + gain * tapped.to_latents[number](activated)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_teacher_and_picture_move_the_weights_of_their_own_branch():
    model = tokenizer().train()
    encoder = model.encoder
    ways = [encoder.to_latents.weight, encoder.tapped.to_latents[0].weight]
    output = model(images(), NUM_KEPT)
    for loss, expected in (
        (output.summary.square().mean(), [True, False]),
        (output.reconstruction.square().mean(), [False, True]),
    ):
        found = torch.autograd.grad(loss, ways, allow_unused=True, retain_graph=True)
        moved = [gradient is not None and bool(gradient.any()) for gradient in found]
        assert moved == expected


def test_the_summary_is_the_mean_of_semantic_codes():
    model = tokenizer().train()
    output = model(images(), NUM_KEPT)
    assert torch.equal(output.summary, output.encoded.codes[..., :3].mean(1))
    view = images()[..., :24, :24]
    expected = model.encode(view, 9).codes[..., :3].mean(1)
    assert torch.equal(model(images(), NUM_KEPT, view).summary, expected)


def test_the_self_teacher_compares_semantic_channels():
    run = shrink(digits32_dual())
    teacher = SelfDistillation(view_size=24, num_prototypes=16)
    world = distributed.World(rank=0, world_size=1, local_rank=0, device=torch.device("cpu"))
    learner = build(replace(run, teacher=teacher), world, num_classes=0)
    assert learner.state.teacher.head.bottleneck.layers[0].in_features == 8
    assert build(replace(run, teacher=NoTeacher()), world, num_classes=0).state.teacher is None


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"semantic_dim": 8}, "branches.semantic_dim (8) must be below the 8 channels"),
        ({"taps": (4,)}, "branches.taps (4,) must all be between 0 and the 3 blocks"),
    ],
)
def test_branches_that_do_not_fit_are_refused(values, message):
    config = shrink(digits32()).model
    assert refused(with_parts(config), branches=TwoBranches(**values)).startswith(message)


@pytest.mark.parametrize("part", [Shared(branch_dims=(8, 8)), Residual(branch_dims=(8, 8))])
def test_the_semantic_channels_must_be_those_of_the_first_table(part):
    config = replace(shrink(digits32()).model, quantizer=part)
    message = "branches.semantic_dim (4) must be the first of quantizer.branch_dims (8, 8)"
    assert refused(with_parts(config), branches=TwoBranches(semantic_dim=4)) == message
    assert replace(config, branches=TwoBranches(semantic_dim=8)).decoded_dim == 8
    assert replace(config, branches=OneBranch()).decoded_dim == 16


def test_queries_have_no_tap_before_the_first_block():
    config = shrink(digits32_queries()).model
    assert "same for every image" in refused(with_parts(config), branches=TwoBranches(taps=(0,)))
    assert replace(config, branches=TwoBranches(taps=(1,))).summary_dim == 4
