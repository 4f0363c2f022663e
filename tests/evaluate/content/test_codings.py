"""Masks in few bits come back, whole where there are enough bits."""

import zlib

import numpy as np
import pytest

from mergevq.evaluate.content.codings import CODINGS, code_within, plain, resized, run_lengths


def disc(side, radius):
    """A disc in the middle."""
    places = np.arange(side) - (side - 1) / 2
    return places[:, None] ** 2 + places[None] ** 2 < radius**2


def runs_of(data, side):
    """A mask from its coded run lengths, by their definition."""
    numbers, value, shift = [], 0, 0
    for byte in zlib.decompress(data[1:], wbits=-15):
        value |= (byte & 127) << shift
        shift += 7
        if byte < 128:
            numbers.append(value)
            value, shift = 0, 0
    pixels = [number % 2 == 1 for number, length in enumerate(numbers) for _ in range(length)]
    return np.array(pixels).reshape(side, side)


@pytest.mark.parametrize(
    "mask", [disc(32, 9), disc(32, 99), np.zeros((32, 32), dtype=bool), ~disc(32, 9)]
)
def test_run_lengths_come_back(mask):
    assert (runs_of(run_lengths(mask), 32) == mask).all()


@pytest.mark.parametrize("name", CODINGS)
def test_with_enough_bytes_a_mask_is_whole_and_with_fewer_it_is_smaller(name):
    mask = disc(32, 9)
    size = len(CODINGS[name](mask))
    whole, small = (code_within(mask, CODINGS[name], most) for most in (size, size - 1))
    assert (whole.side, whole.num_bytes) == (32, size)
    assert (whole.mask == mask).all()
    assert small.side < 32
    assert small.mask.shape == (32, 32)
    none = code_within(mask, CODINGS[name], 0)
    assert none.side == 2
    assert none.num_bytes > 0


def test_a_plain_mask_has_a_bit_for_each_pixel_and_a_byte_for_its_side():
    assert len(plain(disc(32, 9))) == 1 + 32 * 32 // 8


def test_a_smaller_mask_has_what_is_covered_by_more_than_half():
    mask = np.array([[1, 1, 1, 0], [1, 0, 0, 0], [1, 1, 0, 0], [0, 0, 0, 0]], dtype=bool)
    assert resized(mask, 2).tolist() == [[True, False], [False, False]]
    assert (resized(mask, 4) == mask).all()
    assert resized(disc(16, 5), 32).sum() == pytest.approx(4 * disc(16, 5).sum(), rel=0.1)
