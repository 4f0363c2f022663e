"""PatchGAN: size, patches, independence of images, precision."""

import math

import pytest
import torch
from torch import nn

from mergevq.config.objective import LossConfig
from mergevq.tokenizer.losses.adversarial import (
    Discriminator,
    LeCam,
    adversarial_weight,
    discriminator_active,
    discriminator_loss,
    fitting_num_layers,
    generator_loss,
)
from mergevq.tokenizer.losses.terms import reconstruction_loss


def images(generator, batch=2, side=32):
    return torch.rand(batch, 3, side, side, generator=generator) * 2 - 1


def test_it_has_the_parameters_of_the_authors_discriminator():
    # 2.77 M in the paper's code, where batch normalisation has as many parameters.
    assert sum(p.numel() for p in Discriminator().parameters()) == 2_765_633


def test_it_has_no_batch_normalisation_and_no_running_statistics():
    discriminator = Discriminator()
    assert not any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in discriminator.modules())
    assert not list(discriminator.buffers())


@pytest.mark.parametrize(
    ("side", "num_layers", "patches"), [(256, 3, 30), (64, 3, 6), (32, 3, 2), (16, 2, 2), (8, 1, 2)]
)
def test_an_image_is_cut_into_patches(side, num_layers, patches, generator):
    discriminator = Discriminator(channels=4, num_layers=num_layers)
    logits = discriminator(images(generator, batch=1, side=side))
    assert logits.shape == (1, 1, patches, patches)


@pytest.mark.parametrize("side", range(8, 65))
def test_the_fitting_depth_is_the_largest_that_leaves_four_patches(side):
    def patches(num_layers):
        return side // 2**num_layers - 2

    chosen = fitting_num_layers(side)
    assert patches(chosen) >= 2
    assert chosen == 3 or patches(chosen + 1) < 2


def test_the_fitting_depth_is_at_most_the_one_wished_for():
    assert fitting_num_layers(256) == 3
    assert fitting_num_layers(256, 2) == 2
    assert fitting_num_layers(16, 3) == 2


def test_an_image_too_small_for_a_discriminator_is_an_error():
    with pytest.raises(ValueError, match=r"image_size \(7\) must be at least 8"):
        fitting_num_layers(7)
    with pytest.raises(ValueError, match=r"image side \(23\) must be at least 24"):
        Discriminator(channels=4)(torch.zeros(1, 3, 64, 23))
    with pytest.raises(ValueError, match=r"num_layers \(0\) must be at least 1"):
        Discriminator(num_layers=0)


@pytest.mark.parametrize(("num_layers", "field"), [(1, 16), (2, 34), (3, 70)])
def test_a_patch_sees_as_many_pixels_as_the_convolutions_add_up_to(num_layers, field, generator):
    discriminator = Discriminator(channels=4, num_layers=num_layers)
    # Normalisation looks at the whole image; the convolutions alone do not.
    convs = [m for m in discriminator.layers if not isinstance(m, nn.GroupNorm)]
    image = images(generator, batch=1, side=128).requires_grad_()
    logits = nn.Sequential(*convs)(image)
    middle = logits.shape[-1] // 2
    logits[0, 0, middle, middle].backward()
    rows = image.grad.abs().sum((0, 1, 3)).nonzero()
    assert rows.max() - rows.min() + 1 == field


def test_the_verdict_on_an_image_does_not_depend_on_its_batch(generator):
    discriminator = Discriminator(channels=8)
    image = images(generator, batch=3)
    torch.testing.assert_close(discriminator(image)[1:2], discriminator(image[1:2]))


def test_weights_start_at_the_deviation_of_patchgan():
    discriminator = Discriminator()
    weights = torch.cat(
        [m.weight.flatten() for m in discriminator.layers if hasattr(m, "kernel_size")]
    )
    assert weights.std().item() == pytest.approx(0.02, rel=0.01)
    assert abs(weights.mean().item()) < 1e-4
    gains = torch.cat([m.weight for m in discriminator.layers if isinstance(m, nn.GroupNorm)])
    assert gains.mean().item() == pytest.approx(1.0, abs=0.01)
    assert gains.std().item() == pytest.approx(0.02, rel=0.2)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_large_inputs_stay_finite_under_autocast_at_batch_size_1(dtype, generator):
    discriminator = Discriminator(channels=8)
    image = (1e4 * images(generator, batch=1)).requires_grad_()
    with torch.autocast("cpu", dtype):
        logits = discriminator(image)
    logits.mean().backward()
    assert logits.dtype == torch.float32
    assert logits.isfinite().all()
    assert image.grad.isfinite().all()
    assert all(p.grad.isfinite().all() for p in discriminator.parameters())


def test_it_learns_to_tell_two_images_apart(generator):
    discriminator = Discriminator(channels=8)
    real, fake = images(generator, batch=4), images(generator, batch=4).sign()
    optimizer = torch.optim.Adam(discriminator.parameters(), lr=2e-3)
    for _ in range(20):
        loss = (1 - discriminator(real)).relu().mean() + (1 + discriminator(fake)).relu().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert discriminator(real).mean() > 0.5
    assert discriminator(fake).mean() < -0.5


def patch_map(*values: float) -> torch.Tensor:
    """One image's verdict, one row of patches."""
    return torch.tensor(values).reshape(1, 1, 1, -1)


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
    lecam.update(real.mean(), fake.mean())
    torch.testing.assert_close(lecam.real, torch.tensor(0.002))
    torch.testing.assert_close(lecam.fake, torch.tensor(-0.003))


def test_the_adversarial_weight_ramps_after_its_start():
    config = LossConfig(adversarial_weight=0.4, adversarial_start_step=10, adversarial_ramp_steps=4)
    weights = [adversarial_weight(step, config) for step in (0, 9, 10, 11, 13, 14, 99)]
    assert weights == pytest.approx([0, 0, 0.1, 0.2, 0.4, 0.4, 0.4])


def test_the_discriminator_is_trained_before_its_verdict_counts():
    config = LossConfig(discriminator_start_step=5, adversarial_start_step=10)
    assert [discriminator_active(step, config) for step in (4, 5, 10)] == [False, True, True]
    assert adversarial_weight(5, config) == 0


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
