"""Tests of `mergevq.demo.merge_svg`."""

import re
from xml.etree import ElementTree

import torch

from mergevq.demo.merge_svg import SCRIPT, STYLE, merge_drawing
from mergevq.report.pictures import coloured_groups

# Two rows of three cells: group 7 opens first, though its number is the larger.
INDEX = torch.tensor([7, 7, 2, 7, 2, 2])


def image():
    """Cells of 2 x 2 pixels; red is the number of the cell, 0 to 5, times 40."""
    cells = torch.arange(6.0).reshape(2, 3).repeat_interleave(2, 0).repeat_interleave(2, 1)
    red = cells * 40 / 127.5 - 1
    return torch.stack([red, torch.full_like(red, -1), torch.ones_like(red)])


def drawing():
    return ElementTree.fromstring(merge_drawing(image(), INDEX, (2, 3)))


def test_a_group_is_its_cells_in_its_mean_colour_with_its_size_in_words():
    first, second = drawing().findall(".//path[@class='group']")
    assert first.get("d") == "M0 0h1v1h-1zM1 0h1v1h-1zM0 1h1v1h-1z"
    assert second.get("d") == "M2 0h1v1h-1zM1 1h1v1h-1zM2 1h1v1h-1z"
    # Cells 0, 1 and 3, and 2, 4 and 5.
    assert first.get("fill") == "rgb(53,0,255)"
    assert second.get("fill") == "rgb(147,0,255)"
    assert first.get("data-text") == "Group 1 of 2: 3 cells became one token."
    assert [each.get("data-number") for each in (first, second)] == ["1", "2"]


def test_lines_are_between_groups_and_nowhere_else():
    black, white = drawing().findall(".//path[@class='lines']")
    assert black.get("d") == white.get("d")
    lines = set(re.findall(r"M\d+ \d+[vh]1", black.get("d")))
    assert lines == {"M2 0v1", "M1 1v1", "M1 1h1"}


def test_it_is_said_in_words_too():
    found = drawing()
    svg = found.find("svg")
    assert (svg.get("role"), svg.get("tabindex"), svg.get("viewBox")) == ("img", "0", "0 0 3 2")
    assert svg.get("aria-label").startswith("Merge map: 2 groups of 6 cells; the largest has 3.")
    assert found.find("output").get("aria-live") == "polite"
    assert [item.text for item in found.iter("li")] == ["2 groups of 3 cells"]


def test_a_group_of_one_cell_is_no_plural():
    html = merge_drawing(image(), torch.tensor([0, 1, 1, 1, 1, 1]), (2, 3))
    assert "Group 1 of 2: 1 cell became one token." in html
    assert "<li>1 group of 5 cells</li><li>1 group of 1 cell</li>" in html


def test_nothing_is_fetched():
    for text in (merge_drawing(image(), INDEX, (2, 3)), SCRIPT, STYLE):
        assert "//" not in text
        assert "url(" not in text


def test_groups_are_numbered_without_gaps():
    groups, colours = coloured_groups(image(), INDEX, (2, 3))
    assert groups.tolist() == [[1, 1, 0], [1, 0, 0]]
    assert colours.round(1).tolist() == [[146.7, 0, 255], [53.3, 0, 255]]
