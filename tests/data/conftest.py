"""Fixtures that several test files of this folder share."""

import pytest

from mergevq.data.images import open_images
from tests.support.data import noise
from tests.support.tokens import write_all


@pytest.fixture
def folder(tmp_path, generator):
    """Seven noisy images in two classes, each of its own shape."""
    for number in range(7):
        path = tmp_path / "images" / ("cat", "dog")[number % 2] / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        noise(generator, 8 + number, 14 - number).save(path)
    return tmp_path / "images"


@pytest.fixture
def dataset(folder):
    return open_images(str(folder))


@pytest.fixture
def tokens(tmp_path):
    return write_all(tmp_path / "tokens")
