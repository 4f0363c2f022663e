"""Pictures of probes: what is dark, what is marked, and that nothing overlaps by size."""

import numpy as np
import pytest
import torch
from PIL import Image

from mergevq.report.confusion import Example, confusion_picture, neighbours_picture


def is_full(picture):
    """How many pixels have the colour of a cell with all images of its class."""
    return int((np.asarray(picture) == (16, 60, 120)).all(-1).sum())


def test_a_perfect_matrix_is_dark_on_the_diagonal_only():
    perfect = confusion_picture(torch.eye(4, dtype=torch.int64) * 7, list("abcd"), "title")
    even = confusion_picture(torch.full((4, 4), 7), list("abcd"), "title")
    assert is_full(perfect) > 4 * 20 * 20
    assert is_full(even) == 0
    assert perfect.size == even.size


@pytest.mark.parametrize("num_classes", [2, 20, 21, 64, 65, 1000])
def test_any_number_of_classes_fits_on_a_screen(num_classes):
    names = [f"class number {number} of many" for number in range(num_classes)]
    picture = confusion_picture(torch.eye(num_classes, dtype=torch.int64), names, "title")
    assert max(picture.size) < 1500
    # One cell is at least a pixel.
    assert is_full(picture) >= num_classes


def test_a_class_without_images_is_white():
    matrix = torch.tensor([[0, 0], [0, 3]])
    picture = confusion_picture(matrix, ["a", "b"], "t")
    assert 0 < is_full(picture) < 31 * 31


def test_names_must_be_one_per_class():
    with pytest.raises(ValueError, match=r"class_names \(1\) must be one per class \(2\)"):
        confusion_picture(torch.eye(2, dtype=torch.int64), ["a"], "t")


def test_neighbours_stand_beside_their_query_and_wrong_ones_are_marked():
    red, blue = (Image.new("RGB", (8, 8), colour) for colour in ("red", "blue"))
    query = Example(red, "cat")
    right = neighbours_picture([(query, [Example(blue, "cat", 0.5)])])
    wrong = neighbours_picture([(query, [Example(blue, "dog", 0.5)])])
    pixels = np.asarray(right)
    columns = [
        (pixels == colour).all(-1).any(0).nonzero()[0] for colour in ((255, 0, 0), (0, 0, 255))
    ]
    assert columns[0].max() < columns[1].min()
    assert not np.array_equal(pixels, np.asarray(wrong.resize(right.size)))
