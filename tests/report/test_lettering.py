"""Text in pictures has its letters, or says that it does not."""

import warnings

import numpy as np
import pytest
from PIL import Image, ImageFont

from mergevq.report import lettering
from mergevq.report.lettering import drawable, font_for, shown_names
from mergevq.report.pictures import contact_sheet

UNASSIGNED = "\u0378"
"""A letter that no font has."""


def drawn(font, letter):
    mask = font.getmask(letter)
    return mask.size, bytes(mask)


def test_plain_names_are_drawn_in_the_font_that_comes_with_pillow():
    assert font_for("tench, 42", 13).getname() == ImageFont.load_default(13).getname()
    assert shown_names(["cat", "dog"]) == ["cat", "dog"]


@pytest.mark.skipif(font_for("\u00e9", 13) is None, reason="this machine has no font with it")
def test_a_name_outside_ascii_is_no_box():
    name = "caf\u00e9"
    font = font_for(name, 13)
    boxes = [drawn(font, letter) for letter in (UNASSIGNED, "\U0010fffe")]
    assert drawn(font, "\u00e9") not in boxes
    assert drawable(name, 13)[0] == name
    assert shown_names([name]) == [name]
    sheets = [
        np.asarray(contact_sheet([[Image.new("RGB", (128, 128))]], row_titles=[text]))
        for text in (name, "caf\u00e8")
    ]
    assert not np.array_equal(*sheets)


def test_names_that_cannot_be_drawn_are_numbers_with_one_warning():
    with pytest.warns(UserWarning, match=r"no font .* has the letters of 'b\\u0378'") as caught:
        assert shown_names(["a", f"b{UNASSIGNED}", UNASSIGNED]) == ["class 0", "class 1", "class 2"]
    assert len(caught) == 1
    text, font = drawable(f"1{UNASSIGNED}2\n3", 13)
    assert text == "1?2\n3"
    assert font is not None


def test_without_any_other_font_ascii_remains(monkeypatch):
    monkeypatch.setattr(lettering, "_FILES", ("nowhere.ttf",))
    monkeypatch.setattr(lettering, "_bundled", lambda: ())
    with warnings.catch_warnings(action="error"):
        assert shown_names(["cat"]) == ["cat"]
    with pytest.warns(UserWarning, match="pictures show the numbers"):
        assert shown_names(["\u00e9"]) == ["class 0"]
    assert drawable("caf\u00e9", 13)[0] == "caf?"
