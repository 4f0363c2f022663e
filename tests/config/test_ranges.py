"""Ranges of numbers; tests/contracts/test_numbers.py tries that of every setting."""

import math

import pytest

from mergevq.config.ranges import Range, check_number


@pytest.mark.parametrize(
    ("allowed", "inside", "words"),
    [
        (Range(1, 64), (1, 64), "between 1 and 64"),
        (Range(0, 1, below=True), (0, 0.999), "at least 0 and below 1"),
        (Range(0, 1000, above=True), (1e-9, 1000), "above 0 and at most 1000"),
        (Range(0, 1, above=True, below=True), (1e-9, 0.999), "above 0 and below 1"),
        (Range(1e-6, 1), (1e-6, 1), "between 1e-06 and 1"),
        (Range(0, 2**63 - 1), (0, 2**63 - 1), "between 0 and 9223372036854775807"),
    ],
)
def test_a_range_holds_its_ends_unless_they_are_left_out(allowed, inside, words):
    assert all(number in allowed for number in inside)
    low, high = (
        math.nextafter(float(end), way)
        for end, way in ((allowed.low, -1), (allowed.high, math.inf))
    )
    outside = [allowed.low if allowed.above else low, allowed.high if allowed.below else high]
    assert not any(number in allowed for number in [*outside, math.nan, math.inf, -math.inf])
    assert str(allowed) == words


def test_a_number_is_compared_with_the_range_of_its_class_where_that_has_one():
    check_number("SamplingSettings", "temperature", 0.0)
    with pytest.raises(ValueError, match=r"^temperature \(0.0\) must be above 0 and at most 1000$"):
        check_number("KnnConfig", "temperature", 0.0)


def test_each_of_several_numbers_is_looked_at_and_what_is_no_number_is_not():
    check_number("", "rates", (0.5, 1000))
    with pytest.raises(
        ValueError, match=r"^rates \(0.5, 1001\) must all be above 0 and at most 1000"
    ):
        check_number("", "rates", (0.5, 1001))
    for value in (None, "many", True, ()):
        check_number("", "num_steps", value)
