"""Tests of `mergevq.metrics.image`."""

import math

import pytest
import torch
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from mergevq.metrics.image import (
    Mean,
    authors_ssim,
    feature_cosine,
    patch_steps,
    psnr,
    ssim,
    to_uint8,
)
from tests.support import reference

NAN = float("nan")
_PROFILE = torch.exp(-0.5 * (torch.arange(-5, 6, dtype=torch.float64) / 1.5) ** 2)
GAUSSIAN = _PROFILE.outer(_PROFILE) / _PROFILE.sum() ** 2
UNIFORM = torch.full((7, 7), 1 / 49, dtype=torch.float64)


def image_pair(generator, height=40, width=33):
    """Smooth images, one flat one, and noisy reconstructions that leave [-1, 1] here and there."""
    coarse = torch.rand(4, 3, 5, 5, generator=generator) * 2 - 1
    image = torch.nn.functional.interpolate(coarse, (height, width), mode="bilinear")
    image[3] = 0.98
    noise = torch.randn(image.shape, generator=generator)
    strength = torch.tensor([0.02, 0.1, 0.5, 0.01])[:, None, None, None]
    return image, image + strength * noise


def channels_last(image):
    return image.permute(0, 2, 3, 1).numpy()


# ------------------------------------------------------------------------------------- images


def test_pixels_are_rounded_and_clipped_as_in_a_file():
    values = torch.tensor([-1.2, -1.0, -0.9961, 0.0, 0.0079, 1.0, 1.5])
    pixels = to_uint8(values.expand(1, 3, 1, 7))
    assert pixels[0, 0, 0].tolist() == [0, 0, 0, 128, 129, 255, 255]


def test_every_stored_pixel_survives_the_way_to_an_image_and_back():
    stored = torch.arange(256, dtype=torch.uint8).expand(1, 3, 1, 256)
    assert torch.equal(to_uint8(stored.float() / 127.5 - 1), stored)


def test_psnr_of_one_level_of_difference_is_known():
    image = torch.full((1, 3, 12, 12), 1 / 255)
    expected = 20 * math.log10(255)
    assert psnr(image, image + 2 / 255).item() == pytest.approx(expected, abs=1e-4)


def test_psnr_of_unrounded_images_takes_values_as_they_are():
    image = torch.zeros(1, 3, 12, 12)
    # The difference is 1 of a range of 2; and 0.001 is invisible only after rounding.
    assert psnr(image, image + 1, rounded=False).item() == pytest.approx(20 * math.log10(2))
    assert psnr(image, image + 0.001).item() == math.inf
    assert psnr(image, image + 0.001, rounded=False).item() == pytest.approx(66.0206, abs=1e-3)


def test_psnr_is_that_of_scikit_image(generator):
    image, reconstruction = image_pair(generator)
    first, second = channels_last(to_uint8(image)), channels_last(to_uint8(reconstruction))
    pairs = zip(first, second, strict=True)
    expected = [peak_signal_noise_ratio(*pair, data_range=255) for pair in pairs]
    assert psnr(image, reconstruction).tolist() == pytest.approx(expected, abs=1e-4)


def test_ssim_is_that_of_scikit_image(generator):
    image, reconstruction = image_pair(generator)
    first, second = channels_last(to_uint8(image)), channels_last(to_uint8(reconstruction))
    options = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False}
    expected = [
        structural_similarity(*pair, channel_axis=-1, data_range=255, **options)
        for pair in zip(first, second, strict=True)
    ]
    assert min(expected) < 0.6
    assert ssim(image, reconstruction).tolist() == pytest.approx(expected, abs=1e-5)


def test_ssim_of_unrounded_images_is_that_of_scikit_image(generator):
    image, reconstruction = image_pair(generator, 11, 20)
    first, second = channels_last(image.double()), channels_last(reconstruction.double())
    options = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False}
    expected = [
        structural_similarity(*pair, channel_axis=-1, data_range=2, **options)
        for pair in zip(first, second, strict=True)
    ]
    assert ssim(image, reconstruction, rounded=False).tolist() == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize(
    ("metric", "window", "freedom", "truncated"),
    [(ssim, GAUSSIAN, 0, False), (authors_ssim, UNIFORM, 1, True)],
)
@pytest.mark.parametrize(("height", "width"), [(11, 11), (40, 33), (64, 23)])
def test_ssim_is_its_definition_window_by_window(
    generator, metric, window, freedom, truncated, height, width
):
    image, other = image_pair(generator, height, width)
    first, second = (to_uint8(each, truncated=truncated).double() for each in (image, other))
    expected = reference.ssim(first, second, window, freedom).float()
    torch.testing.assert_close(metric(image, other), expected, rtol=1e-6, atol=1e-6)


def test_an_identity_scores_perfectly(generator):
    image, _ = image_pair(generator)
    assert psnr(image, image).tolist() == [math.inf] * 4
    assert ssim(image, image).tolist() == [1.0] * 4


def test_each_image_has_its_own_score_whatever_its_batch(generator):
    image, reconstruction = image_pair(generator)
    for metric in (psnr, ssim):
        alone = [metric(image[i : i + 1], reconstruction[i : i + 1]).item() for i in range(4)]
        assert metric(image, reconstruction).tolist() == pytest.approx(alone, rel=1e-6)


def test_ssim_of_an_image_smaller_than_its_window_says_so():
    image = torch.zeros(1, 3, 10, 64)
    with pytest.raises(ValueError, match=r"10x64 pixels .* 11x11 window"):
        ssim(image, image)


@pytest.mark.parametrize("metric", [psnr, ssim])
@pytest.mark.parametrize("rounded", [True, False])
def test_a_reconstruction_that_is_not_a_number_has_no_score(metric, rounded):
    image = torch.zeros(3, 3, 16, 16)
    broken = image.clone()
    broken[1, 2, 3, 4] = NAN
    name = metric.__name__
    with pytest.raises(ValueError, match=rf"{name} \(reconstruction\): item 1 is not finite"):
        metric(image, broken, rounded=rounded)
    with pytest.raises(ValueError, match=rf"{name} \(image\): item 1 is not finite"):
        metric(broken, image, rounded=rounded)


def test_pixels_of_an_image_that_is_not_finite_are_refused():
    with pytest.raises(ValueError, match="image: item 0 is not finite"):
        to_uint8(torch.full((1, 3, 2, 2), math.inf))


def test_feature_cosine_is_the_cosine_of_the_angle():
    features = torch.tensor([[3.0, 0.0], [1.0, 1.0], [2.0, 0.0], [0.0, 5.0]])
    others = torch.tensor([[7.0, 0.0], [1.0, 0.0], [0.0, 3.0], [0.0, -1.0]])
    expected = [1.0, math.sqrt(0.5), 0.0, -1.0]
    assert feature_cosine(features, others).tolist() == pytest.approx(expected)


def test_features_without_direction_have_no_cosine():
    features = torch.tensor([[1.0, 0.0], [0.0, 0.0]])
    with pytest.raises(ValueError, match="features of item 1 are all zero"):
        feature_cosine(torch.ones(2, 2), features)


# --------------------------------------------------------------------------------------- mean


def test_a_short_last_batch_weighs_by_its_items():
    mean = Mean("l1")
    mean.update(torch.tensor([1.0, 2.0, 3.0]))
    mean.update(torch.tensor([10.0]))
    assert mean.compute() == (4.0, 4.0, 4, 0)


def test_a_value_counts_for_the_items_it_is_the_mean_of():
    mean = Mean("l1")
    mean.update(torch.tensor([1.0, 5.0]), torch.tensor([3, 1]))
    average = mean.compute()
    assert (average.mean, average.num_items) == (2.0, 4)


def test_the_mean_of_many_batches_is_that_of_one(generator):
    values = torch.rand(1000, generator=generator)
    streamed, whole = Mean("l1"), Mean("l1")
    whole.update(values)
    for part in values.split(7):
        streamed.update(part)
    assert streamed.compute().mean == pytest.approx(whole.compute().mean, rel=1e-12)
    assert streamed.compute().num_items == 1000


def test_merged_means_are_the_mean_of_all():
    first, second = Mean("l1"), Mean("l1")
    first.update(torch.tensor([1.0]))
    second.update(torch.tensor([2.0, 6.0]))
    first.merge(second)
    assert (first.compute().mean, first.compute().num_items) == (3.0, 3)


def test_computing_a_mean_leaves_it_as_it_was():
    mean = Mean("l1")
    mean.update(torch.tensor([1.0]))
    assert mean.compute() == mean.compute()


def test_one_identical_image_makes_the_mean_psnr_infinite_and_is_counted():
    mean = Mean("psnr", infinite=True)
    mean.update(torch.tensor([20.0, math.inf]))
    mean.update(torch.tensor([30.0]))
    assert mean.compute() == (math.inf, 25.0, 3, 1)


def test_a_mean_of_identical_images_alone_is_infinite():
    mean = Mean("psnr", infinite=True)
    mean.update(torch.tensor([math.inf, math.inf]))
    average = mean.compute()
    assert average.mean == math.inf
    assert math.isnan(average.finite_mean)
    assert (average.num_items, average.num_infinite) == (2, 2)


@pytest.mark.parametrize(
    ("infinite", "value"), [(False, math.inf), (True, -math.inf), (True, NAN), (False, NAN)]
)
def test_a_mean_names_the_item_that_is_not_finite(infinite, value):
    mean = Mean("lpips", infinite=infinite)
    mean.update(torch.zeros(5))
    with pytest.raises(ValueError, match="lpips: item 7 is not finite"):
        mean.update(torch.tensor([0.0, 0.0, value]))
    assert mean.compute().num_items == 5


def test_a_mean_of_nothing_is_an_error():
    with pytest.raises(ValueError, match="l1 has seen no item"):
        Mean("l1").compute()


# ----------------------------------------------------------------------------------- codebook


def test_authors_ssim_by_definition(generator):
    """Window by window, in the words of the definition."""
    image = torch.rand(1, 3, 9, 8, generator=generator) * 2 - 1
    other = (image + torch.randn(image.shape, generator=generator) * 0.2).clamp(-1, 1)
    first, second = (((each + 1) * 127.5 + 1e-3).floor().double()[0] for each in (image, other))
    values = []
    for channel in range(3):
        for top in range(3):
            for left in range(2):
                x, y = (
                    each[channel, top : top + 7, left : left + 7].flatten()
                    for each in (first, second)
                )
                covariance = ((x - x.mean()) * (y - y.mean())).sum() / 48
                c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
                values.append(
                    (2 * x.mean() * y.mean() + c1)
                    * (2 * covariance + c2)
                    / ((x.mean() ** 2 + y.mean() ** 2 + c1) * (x.var() + y.var() + c2))
                )
    expected = float(torch.stack(values).mean())
    assert float(authors_ssim(image, other)) == pytest.approx(expected, abs=1e-6)
    assert float(authors_ssim(image, image)) == pytest.approx(1)
    with pytest.raises(ValueError, match="6x9 pixels must be at least as large as the 7x7"):
        authors_ssim(torch.zeros(1, 3, 6, 9), torch.zeros(1, 3, 6, 9))


def test_truncated_bytes_lose_what_is_behind_the_point():
    image = torch.tensor([-1.0, -1 + 1.9 / 127.5, 1.0]).view(3, 1, 1)
    assert to_uint8(image, truncated=True).flatten().tolist() == [0, 1, 255]
    assert to_uint8(image).flatten().tolist() == [0, 2, 255]


def test_steps_across_borders_of_patches_and_inside_them_are_counted_by_hand():
    rows = torch.tensor([[0.0, 1.0, 3.0, 7.0], [0.0, 1.0, 3.0, 5.0]])
    images = torch.stack([rows.expand(3, 2, 4), torch.zeros(3, 2, 4)])
    found = patch_steps(images, 2)
    # To the right 1 | 2 | 4 and 1 | 2 | 2, of which the middle one is at a border; down 0 0 0 2.
    assert found.border.tolist() == [3 * (2 + 2), 0]
    assert found.inside.tolist() == [3 * (1 + 4 + 1 + 2 + 2), 0]
    assert found.energy.tolist() == [3 * (1 + 16 + 1 + 4 + 4), 0]
    # In patches of one row all steps down are across borders.
    assert patch_steps(images, 1).border.tolist() == [3 * (7 + 5 + 2), 0]
    with pytest.raises(ValueError, match="patch_steps: item 0 is not finite"):
        patch_steps(torch.full((1, 3, 4, 4), torch.nan), 2)
