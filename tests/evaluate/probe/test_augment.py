"""RandAugment and random erasing: each operation by definition, on pixels worked out by hand."""

from unittest import mock

import numpy as np
import pytest
import torch
from PIL import Image

from mergevq.evaluate.probe import augment
from mergevq.evaluate.probe.augment import OPERATIONS, SIGNED, RandAugment, erase

GREY = (124, 116, 104)


def picture(values) -> Image.Image:
    """An RGB picture of these grey values."""
    return Image.fromarray(np.repeat(np.array(values, dtype=np.uint8)[..., None], 3, axis=2))


def greys(image) -> list:
    """The first channel."""
    return np.asarray(image)[..., 0].tolist()


def noise(seed=0, size=(12, 16)) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


RAMP = [[0, 50, 100, 127, 128, 200, 255]]


@pytest.mark.parametrize(
    ("operation", "strength", "expected"),
    [
        (augment.invert, 0.9, [255, 205, 155, 128, 127, 55, 0]),
        # 4, 3, 2 and 1 bits, and never none.
        (augment.posterize, 0.0, [0, 48, 96, 112, 128, 192, 240]),
        (augment.posterize, 0.5, [0, 0, 64, 64, 128, 192, 192]),
        (augment.posterize, 0.9, [0, 0, 0, 0, 128, 128, 128]),
        (augment.posterize, 1.0, [0, 0, 0, 0, 128, 128, 128]),
        # From a threshold of 128 on, of none, and of 0.
        (augment.solarize, 0.5, [0, 50, 100, 127, 127, 55, 0]),
        (augment.solarize, 0.0, [0, 50, 100, 127, 128, 200, 255]),
        (augment.solarize, 1.0, [255, 205, 155, 128, 127, 55, 0]),
        # 55 more below 128.
        (augment.solarize_add, 0.5, [55, 105, 155, 182, 128, 200, 255]),
        (augment.brightness, -1.0, [0, 5, 10, 13, 13, 20, 26]),
        (augment.brightness, 1.0, [0, 95, 190, 241, 243, 255, 255]),
    ],
)
def test_values_change_as_defined(operation, strength, expected):
    found = greys(operation(picture(RAMP), strength))[0]
    assert found == pytest.approx(expected, abs=1)


def test_histograms_are_stretched_and_evened_out():
    assert greys(augment.autocontrast(picture([[50, 100, 150]]), 0.0)) == [[0, 127, 255]]
    evened = np.asarray(augment.equalize(picture(np.arange(4096).reshape(64, 64) % 64), 0.0))
    assert (evened.min(), evened.max()) == (0, 255)


def test_contrast_moves_values_from_or_to_the_mean():
    values = picture([[100, 140]])
    assert greys(augment.contrast(values, -1.0))[0] == pytest.approx([118, 122], abs=1)
    assert greys(augment.contrast(values, 1.0))[0] == pytest.approx([82, 158], abs=1)


def test_colour_fades_to_grey_and_sharpness_blurs():
    faded = np.asarray(augment.color(Image.new("RGB", (2, 2), (200, 100, 50)), -1.0), dtype=int)
    assert np.ptp(faded[0, 0]) == pytest.approx(15, abs=1)
    edge = picture([[0] * 3 + [255] * 3] * 6)
    assert np.asarray(augment.sharpness(edge, -1.0), dtype=int)[3, 2, 0] > 20


def test_pictures_move_by_up_to_their_share_and_leave_the_fill_colour():
    image = noise(size=(20, 20))
    pixels = np.asarray(image)
    left = np.asarray(augment.translate_x(image, 1.0))
    np.testing.assert_array_equal(left[2:-2, 2:9], pixels[2:-2, 11:18])
    assert tuple(left[5, 15]) == GREY
    down = np.asarray(augment.translate_y(image, -1.0))
    np.testing.assert_array_equal(down[11:18, 2:-2], pixels[2:9, 2:-2])
    assert tuple(down[3, 5]) == GREY


def test_shearing_moves_a_line_by_up_to_three_tenths_of_its_place():
    column = np.zeros((40, 40), dtype=np.uint8)
    column[:, 30:32] = 255
    slanted = np.asarray(augment.shear_x(picture(column), 1.0))[..., 0].astype(int)
    # At row y the line at x is taken from x + 0.3 y.
    assert slanted[1, 28:34].argmax() + 28 in (29, 30, 31)
    assert slanted[31, 15:28].argmax() + 15 in (20, 21, 22)
    rows = np.asarray(augment.shear_y(picture(column.T), 1.0))[..., 0].astype(int)
    np.testing.assert_allclose(rows, slanted.T, atol=1)


def test_rotation_is_by_up_to_30_degrees():
    image = noise(size=(16, 16))
    expected = image.rotate(30, Image.Resampling.BICUBIC, fillcolor=GREY)
    assert augment.rotate(image, 1.0).tobytes() == expected.tobytes()
    assert augment.rotate(image, 0.0).tobytes() == image.tobytes()


@pytest.mark.parametrize("operation", OPERATIONS, ids=lambda each: each.__name__)
def test_every_operation_keeps_size_and_mode(operation):
    for strength in (0.0, 0.4, 1.0, *((-0.3, -1.0) if operation in SIGNED else ())):
        changed = operation(noise(), strength)
        assert (changed.size, changed.mode) == ((16, 12), "RGB")


def test_two_of_fifteen_operations_are_drawn_and_done_half_of_the_time(generator):
    assert len(OPERATIONS) == 15
    done = []
    spies = tuple(
        mock.Mock(side_effect=lambda image, share, own=own: done.append((own, share)) or image)
        for own in range(15)
    )
    image = noise()
    with mock.patch.multiple(augment, OPERATIONS=spies, SIGNED=spies[:9]):
        for _ in range(2000):
            assert RandAugment(5.0)(image, generator) is image
    assert len(done) / 2000 == pytest.approx(1, abs=0.07)
    counts = np.bincount([own for own, _ in done], minlength=15)
    assert counts.min() > 80
    signed = np.array([share for own, share in done if own < 9])
    assert (signed > 0).mean() == pytest.approx(0.5, abs=0.05)
    plain = np.array([share for own, share in done if own >= 9])
    for shares in (np.abs(signed), plain):
        assert shares.mean() == pytest.approx(0.5, abs=0.01)
        assert shares.std() == pytest.approx(0.05, abs=0.01)


def test_the_same_numbers_change_a_picture_alike():
    first, again = (
        RandAugment(9.0)(noise(), torch.Generator().manual_seed(3)).tobytes() for _ in range(2)
    )
    assert first == again


# ---------------------------------------------------------------------------------- erasing


def test_erasing_replaces_one_rectangle_of_the_share_of_images(generator):
    image = torch.full((400, 3, 32, 32), 2.0)
    erased = erase(image, 0.25, generator)
    changed = (erased != image).any(1)
    touched = changed.flatten(1).any(1)
    assert touched.float().mean() == pytest.approx(0.25, abs=0.07)
    for mask in changed[touched]:
        rows, columns = mask.any(1).nonzero()[:, 0], mask.any(0).nonzero()[:, 0]
        height, width = len(rows), len(columns)
        # A full rectangle, of 2 % to a third of the area, up to rounding, and of legal shape.
        assert int(mask.sum()) == height * width
        assert 0.013 < height * width / 1024 < 0.36
        assert 0.25 < height / width < 4
    values = erased[erased != image]
    assert values.abs().max() <= 1
    assert values.mean() == pytest.approx(-0.1, abs=0.02)
    assert (image == 2).all()


def test_erasing_with_probability_0_and_1(generator):
    image = torch.rand(8, 3, 16, 16)
    assert torch.equal(erase(image, 0.0, generator), image)
    assert (erase(image, 1.0, generator) != image).flatten(1).any(1).all()
