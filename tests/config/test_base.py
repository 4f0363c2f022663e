from typing import Literal

import pytest

from mergevq.config.base import check_choice

Colour = Literal["red", "green"]


@pytest.mark.parametrize("value", ["red", "green"])
def test_a_value_of_the_literal_passes(value):
    check_choice("colour", value, Colour)


@pytest.mark.parametrize("value", ["reed", "blue", None, 3, ["red"], float("nan")])
def test_anything_else_is_refused_with_the_words_there_are(value):
    with pytest.raises(ValueError, match=r"^colour \(.*\) must be one of 'red', 'green'"):
        check_choice("colour", value, Colour)


def test_a_near_word_is_suggested_and_a_far_one_is_not():
    with pytest.raises(ValueError, match=r"; did you mean 'green'\?$"):
        check_choice("colour", "grene", Colour)
    with pytest.raises(ValueError, match=r"must be one of 'red', 'green'$"):
        check_choice("colour", "ultramarine", Colour)
