"""Tests of `mergevq.demo.widgets`, as far as they need no page; `test_app.py` has the page."""

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mergevq.demo.widgets import opened, painted_mask, saved_bytes


def layer(*painted, colour=(214, 0, 110, 255), size=(4, 3)):
    """A transparent picture with some pixels painted, as the content of a file."""
    picture = Image.new("RGBA", size, (0, 0, 0, 0))
    for place in painted:
        picture.putpixel(place, colour)
    content = io.BytesIO()
    picture.save(content, format="PNG")
    return content.getvalue()


def test_what_is_painted_in_any_layer_is_white():
    mask = painted_mask([layer((0, 0)), layer((2, 1), colour=(214, 0, 110, 40)), layer()])
    wanted = np.zeros((3, 4), dtype=np.uint8)
    wanted[0, 0] = wanted[1, 2] = 255
    assert np.array_equal(np.asarray(mask), wanted)
    assert painted_mask([]) is None


def test_a_layer_must_be_a_picture_and_not_too_large(monkeypatch):
    with pytest.raises(ValueError, match="no image format"):
        painted_mask([b"words"])
    monkeypatch.setattr("mergevq.demo.widgets._MAX_MASK_PIXELS", 11)
    with pytest.raises(ValueError, match="12 pixels"):
        painted_mask([layer()])


def test_a_file_has_its_name_and_stays_in_its_folder(tmp_path):
    names = {"picture_7.mvq": "picture_7.mvq", "../../a b": "....ab", "/": "file"}
    for name, wanted in names.items():
        path = Path(saved_bytes(b"content", tmp_path, name))
        assert path.parent.parent == tmp_path
        assert path.name == wanted
        assert path.read_bytes() == b"content"


def test_a_reader_of_the_page_sees_no_path(tmp_path):
    (tmp_path / "words.png").write_text("no picture", encoding="utf-8")
    with pytest.raises(ValueError, match=r"^image words\.png cannot be read: no image format"):
        opened(str(tmp_path / "words.png"))
    with pytest.raises(ValueError, match="no picture was given"):
        opened(None)
