"""Tests of `mergevq.demo.specimens`."""

import numpy as np
import pytest

from mergevq.data.images import open_images
from mergevq.demo.specimens import specimens


def test_pictures_are_drawn_alike_at_any_size():
    large, small = specimens(64), specimens(32)
    assert [picture.size for picture in large] == [(64, 64)] * 4
    for one, other in zip(large[:3], small[:3], strict=True):
        halved = np.asarray(one, dtype=float).reshape(32, 2, 32, 2, 3).mean((1, 3))
        assert np.abs(halved - np.asarray(other)).mean() < 6
    assert len({picture.tobytes() for picture in large}) == 4
    assert [each.tobytes() for each in specimens(64)] == [each.tobytes() for each in large]


def test_pictures_have_contrast_and_colour():
    for picture in specimens(32):
        pixels = np.asarray(picture, dtype=float)
        assert pixels.std((0, 1)).max() > 20
        assert np.ptp(pixels.mean((0, 1))) > 5


def test_the_first_of_the_data_come_before_any(folder):
    dataset = open_images(str(folder / "pictures"))
    found = specimens(16, dataset, are_digits=True)
    assert [each.tobytes() for each in found] == [dataset.read(k).tobytes() for k in range(4)]


def test_a_model_of_digits_has_digits(monkeypatch):
    pytest.importorskip("sklearn", reason="digits come from scikit-learn")
    first = open_images("digits").read(0)
    assert specimens(32, are_digits=True)[0].tobytes() == first.tobytes()
    monkeypatch.setattr("mergevq.demo.specimens.installed_version", lambda _: None)
    assert specimens(32, are_digits=True)[0].size == (32, 32)
