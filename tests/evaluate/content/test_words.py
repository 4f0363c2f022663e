"""Words are where their boxes say, and as the seed draws them."""

import json

import numpy as np
import pytest
from PIL import Image

from mergevq.evaluate.content.words import ALPHABET, HEIGHTS, Written, rendered, written


def test_words_are_drawn_by_the_seed_and_the_number_of_the_picture():
    few, more, other = (list(rendered(n, 64, seed)) for n, seed in ((2, 0), (3, 0), (2, 1)))
    for one, same in zip(few, more, strict=False):
        assert one.words == same.words
        assert one.image.tobytes() == same.image.tobytes()
    assert [each.words for each in few] != [each.words for each in other]


@pytest.mark.parametrize("side", [48, 64, 128])
def test_one_or_two_words_of_four_to_six_letters_lie_inside(side):
    found = list(rendered(40, side, 0))
    assert {len(each.words) for each in found} == {1, 2}
    words = [word for each in found for word in each.words]
    assert {len(word.text) for word in words} <= {4, 5, 6}
    assert set("".join(word.text for word in words)) <= set(ALPHABET)
    for word in words:
        left, top, right, bottom = word.box
        assert 0 <= left < right <= side
        assert 0 <= top < bottom <= side
        assert word.height < HEIGHTS[1] + 1
    assert len({round(word.height) for word in words}) > 5


def test_no_two_characters_look_alike():
    for twins in ("0OQD", "1Il", "5S", "8B", "2Z", "6G", "VW", "9gq"):
        assert len(set(ALPHABET) & set(twins)) <= 1
    assert len(set(ALPHABET)) == len(ALPHABET)


def test_ink_is_in_the_box_and_nowhere_else():
    one = next(each for each in rendered(30, 64, 0) if len(each.words) == 1 and is_flat(each))
    pixels = np.asarray(one.image)
    rows, along = np.nonzero((pixels != pixels[0, 0]).any(-1))
    left, top, right, bottom = one.words[0].box
    assert abs(rows.min() - top) <= 1
    assert abs(rows.max() + 1 - bottom) <= 1
    assert left - 1 <= along.min()
    assert along.max() + 1 <= right + 1


def is_flat(one: Written):
    """Whether the background is of one colour."""
    pixels = np.asarray(one.image)
    return (pixels[0] == pixels[0, 0]).all() and (pixels[:, 0] == pixels[0, 0]).all()


def test_small_pictures_are_refused():
    with pytest.raises(ValueError, match=r"image_size \(32\) must be at least 48"):
        next(rendered(1, 32, 0))


def lines(folder, *records):
    path = folder / "words.jsonl"
    path.write_text("\n".join(json.dumps(record) for record in records) + "\n\n")
    return path


def test_boxes_of_a_file_are_those_of_the_centre_square(tmp_path):
    # 200 x 100 pixels at 50 of the short side: half as large, and 25 pixels of either end go.
    Image.new("RGB", (200, 100)).save(tmp_path / "a.png")
    path = lines(
        tmp_path,
        {"image": "a.png", "box": [60, 20, 100, 40], "text": " HOUSE "},
        {"image": "a.png", "box": [40, 20, 100, 40], "text": "OUTSIDE"},
    )
    (found,) = written(path, 50, max_pixels=10**6)
    assert found.image.size == (50, 50)
    assert [(word.text, word.box) for word in found.words] == [("HOUSE", (5, 10, 25, 20))]
    assert found.words[0].height == 10
    assert found.num_outside == 1


def test_some_pictures_of_a_file_are_spread_over_it(tmp_path):
    records = []
    for number in range(6):
        Image.new("RGB", (64, 64), (number, 0, 0)).save(tmp_path / f"{number}.png")
        records.append({"image": f"{number}.png", "box": [0, 0, 9, 9], "text": str(number)})
    path = lines(tmp_path, *records)
    texts = [each.words[0].text for each in written(path, 64, max_images=2, max_pixels=10**6)]
    assert texts == ["0", "3"]
    assert len(list(written(path, 64, max_images=99, max_pixels=10**6))) == 6


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 1 must be"),
        ('{"image": "a.png", "box": [0, 0, 9], "text": "A"}', "line 1 must be"),
        ('{"image": "a.png", "box": [0, 0, 9, 9]}', "line 1 must be"),
        ('{"image": "a.png", "box": [0, 0, 9, 9], "text": " "}', "with a text that is not empty"),
        ('{"image": "a.png", "box": [9, 0, 9, 9], "text": "A"}', "left less than right"),
        ('{"image": "b.png", "box": [0, 0, 9, 9], "text": "A"}', "b.png"),
        ("", "has no line"),
    ],
)
def test_a_line_that_says_something_else_is_refused(tmp_path, line, message):
    path = tmp_path / "words.jsonl"
    path.write_text(line)
    with pytest.raises(ValueError, match=message):
        list(written(path, 64, max_pixels=10**6))


def test_a_file_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(ValueError, match="must be `rendered` or a file of JSON lines"):
        list(written(tmp_path / "none", 64, max_pixels=10**6))
