"""Reconstructions that take no training, by hand."""

import math

import pytest
import torch

from mergevq.metrics.yardsticks import (
    TrainingImages,
    class_means,
    fit_levels,
    fit_linear_codec,
    nearest,
    yardsticks,
)


def numbers(*values):
    return torch.tensor(values, dtype=torch.float64)


def images_of(bytes_, label=(), num_classes=0):
    """Grey images of one pixel."""
    pixels = torch.tensor(bytes_, dtype=torch.uint8)[:, None, None, None].expand(-1, 3, 1, 1)
    return TrainingImages(pixels, torch.tensor(label or [-1] * len(bytes_)), num_classes)


def test_class_means_and_the_nearest_image_by_hand():
    flat = torch.tensor([[0.0, 0.0], [1.0, 0.0], [1.0, 1.0], [0.0, 1.0]])
    means = class_means(flat, torch.tensor([0, 0, 1, 1]), 2)
    assert means.tolist() == [[0.5, 0.0], [0.5, 1.0]]
    assert nearest(flat, torch.tensor([[0.9, 0.2], [0.1, 0.8], [0.0, 0.0]])).tolist() == [1, 3, 0]


def test_levels_are_the_means_of_what_is_nearest_to_them():
    levels, error = fit_levels(numbers(-4, -1, 0, 1, 6, 7), 1)
    assert levels.tolist() == [-1, 6.5]
    assert error == pytest.approx((9 + 0 + 1 + 4 + 0.25 + 0.25) / 6)


def test_a_number_at_each_level_has_no_error():
    levels, error = fit_levels(numbers(-1, -1, 0, 0, 2, 2, 5, 5), 2)
    assert (levels.tolist(), error) == ([-1, 0, 2, 5], 0)


def test_a_bit_goes_where_it_gains_most():
    """Corners of a rectangle: one bit for the long side, the second for the short one."""
    corners = torch.tensor([[-4.0, -1.0], [-4.0, 1.0], [4.0, -1.0], [4.0, 1.0]])
    flat = corners.repeat(4, 1) + torch.tensor([10.0, 20.0])
    codec = fit_linear_codec(flat, 5)
    assert len(codec.order) == 2, "more bits gain nothing"
    assert codec.components.abs().allclose(torch.eye(2), atol=1e-5)
    mean, one, two = (codec.decode(flat, bits) for bits in (0, 1, 2))
    assert mean.allclose(torch.tensor([10.0, 20.0]).expand(16, 2), atol=1e-4)
    assert (flat - one).square().mean(0).allclose(torch.tensor([0.0, 1.0]), atol=1e-4)
    assert two.allclose(flat, atol=1e-4)


@pytest.mark.parametrize("shape", [(12, 30), (60, 6)], ids=["few images", "many images"])
def test_components_are_those_of_the_singular_values(shape):
    flat = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    codec = fit_linear_codec(flat, 3)
    basis = torch.linalg.svd(flat - flat.mean(0), full_matrices=False)[2][:3].mT
    assert (codec.components.mT @ basis).abs().allclose(torch.eye(3), atol=1e-4)
    errors = [(flat - codec.decode(flat, bits)).square().mean().item() for bits in range(4)]
    assert errors == sorted(errors, reverse=True)


def test_yardsticks_cost_what_tells_them_apart():
    found = yardsticks(images_of([0, 0, 0, 0, 255, 255, 255, 255], [0] * 4 + [1] * 4, 2), [1, 9])
    assert [(each.name, each.bits) for each in found] == [
        ("mean image", 0.0),
        ("class mean", 1.0),
        ("nearest training image", 3.0),
        ("principal components", 1.0),
    ]
    image = torch.tensor([0.4, -0.2])[:, None, None, None].expand(2, 3, 1, 1)
    decoded = [each.decode(image, torch.tensor([1, 1]))[:, 0, 0, 0] for each in found]
    expected = [[0.0, 0.0], [1.0, 1.0], [1.0, -1.0], [1.0, -1.0]]
    assert torch.stack(decoded).allclose(torch.tensor(expected), atol=1e-5)


def test_without_classes_or_images_enough_there_are_fewer():
    names = [each.name for each in yardsticks(images_of([0, 9, 50]), [64])]
    assert names == ["mean image", "nearest training image"]
    unseen = images_of([0] * 8, [0] * 8, 2)
    assert "class mean" not in [each.name for each in yardsticks(unseen, [])]
    assert yardsticks(images_of([0, 9, 50]), [])[1].bits == math.log2(3)
