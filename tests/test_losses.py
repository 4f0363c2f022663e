"""Every term against its definition, worked by hand."""

import math

import pytest
import torch

from mergevq.config import LossConfig
from mergevq.losses import (
    LeCam,
    TokenizerLosses,
    adversarial_weight,
    discriminator_active,
    discriminator_loss,
    generator_loss,
    reconstruction_loss,
    source_loss,
)
from mergevq.merge import Source


def patch_map(*values: float) -> torch.Tensor:
    """One image's verdict, one row of patches."""
    return torch.tensor(values).reshape(1, 1, 1, -1)


def test_reconstruction_loss_is_the_mean_absolute_difference():
    image, reconstruction = torch.zeros(1, 3, 2, 2), torch.full((1, 3, 2, 2), 0.25)
    assert reconstruction_loss(image, reconstruction) == 0.25


def test_hinge_is_zero_once_both_sides_are_a_margin_away():
    assert discriminator_loss(patch_map(1.0, 3.0), patch_map(-1.0, -2.0)) == 0


def test_hinge_of_an_undecided_discriminator_is_one():
    assert discriminator_loss(patch_map(0.0), patch_map(0.0)) == 1


def test_generator_loss_reads_the_mean_over_the_patch_map():
    # The mean of 3 and -1 is 1; -log sigmoid(1) = log(1 + 1/e).
    expected = math.log(1 + math.exp(-1))
    assert generator_loss(patch_map(3.0, -1.0)).item() == pytest.approx(expected)


def test_lecam_starts_at_zero_averages_and_follows_them():
    lecam = LeCam()
    real, fake = patch_map(2.0), patch_map(-3.0)
    # Real is 2 above the average of fakes, fake 3 below that of reals: 4 and 9.
    assert lecam(real, fake) == 13
    lecam.update(real, fake)
    torch.testing.assert_close(lecam.real, torch.tensor(0.002))
    torch.testing.assert_close(lecam.fake, torch.tensor(-0.003))


def test_source_loss_of_even_logits_is_log_k():
    source = Source(torch.tensor([[0, 1, 1, 0]]), 2)
    assert source_loss(torch.zeros(1, 4, 2), source).item() == pytest.approx(math.log(2))


def test_source_loss_of_a_certain_right_answer_is_zero():
    source = Source(torch.tensor([[0, 1, 1, 0]]), 2)
    logits = 100 * torch.nn.functional.one_hot(source.index, 2).float()
    assert source_loss(logits, source).item() == pytest.approx(0, abs=1e-6)


def test_the_adversarial_weight_ramps_after_its_start():
    config = LossConfig(adversarial_weight=0.4, adversarial_start_step=10, adversarial_ramp_steps=4)
    weights = [adversarial_weight(step, config) for step in (0, 9, 10, 11, 13, 14, 99)]
    assert weights == pytest.approx([0, 0, 0.1, 0.2, 0.4, 0.4, 0.4])


def test_the_discriminator_is_trained_before_its_verdict_counts():
    config = LossConfig(discriminator_start_step=5, adversarial_start_step=10)
    assert [discriminator_active(step, config) for step in (4, 5, 10)] == [False, True, True]
    assert adversarial_weight(5, config) == 0


def test_every_weight_of_the_total_has_an_effect():
    losses = TokenizerLosses(*(torch.tensor(float(i + 1)) for i in range(7)))
    config = LossConfig(
        reconstruction_weight=1.0,
        perceptual_weight=10.0,
        commitment_weight=1e3,
        entropy_weight=1e4,
        source_weight=1e5,
        alignment_weight=1e6,
    )
    total = losses.total(config, adversarial_weight=100.0)
    assert total == 1 + 20 + 300 + 4e3 + 5e4 + 6e5 + 7e6


def test_losses_are_finite_in_half_precision_with_large_inputs():
    large = 1e4 * torch.randn(2, 1, 3, 3)
    image = large.expand(-1, 3, -1, -1)
    for dtype in (torch.float16, torch.bfloat16):
        with torch.autocast("cpu", dtype=dtype):
            values = [
                generator_loss(large.to(dtype)),
                discriminator_loss(large.to(dtype), -large.to(dtype)),
                LeCam()(large.to(dtype), large.to(dtype)),
                reconstruction_loss(image.to(dtype), -image.to(dtype)),
            ]
        assert all(value.isfinite() for value in values)
        assert all(value.dtype == torch.float32 for value in values)
