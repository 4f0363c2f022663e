"""Tests of `mergevq.demo.neighbours`."""

import pytest
import torch
from PIL import Image

from mergevq.data.images import open_images
from mergevq.data.prepare import load_picture, to_tensor
from mergevq.demo.neighbours import index, nearest


@pytest.fixture(scope="module")
def neighbours(tokenizer, folder):
    return index(tokenizer, open_images(str(folder / "pictures")))


def test_a_picture_is_its_own_nearest_neighbour(tokenizer, folder, neighbours):
    for name, label in (("cat/2.png", "cat"), ("dog/6.png", "dog")):
        picture = load_picture(folder / "pictures" / name)
        found = nearest(tokenizer, neighbours, picture, 3)
        assert len(found) == 3
        assert found[0][1] == f"{label} 1.000"
        first = to_tensor(found[0][0].resize((16, 16), Image.Resampling.NEAREST))
        assert torch.equal(first, to_tensor(picture))


def test_more_than_there_are_cannot_be_found(tokenizer, folder, neighbours):
    picture = load_picture(folder / "pictures" / "cat" / "0.png")
    with pytest.raises(ValueError, match=r"count \(9\) must be between 1 and the 8 images"):
        nearest(tokenizer, neighbours, picture, 9)
