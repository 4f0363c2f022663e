"""Tests of `mergevq.report.plots`."""

import sys

import numpy as np
import pytest

from mergevq.report.plots import Curve, Panel, bar_plot, has_plots, line_plot
from mergevq.training.panels import write_curves


def curve_pixels(plot, colour):
    """Pixels of about that colour."""
    return (np.abs(np.asarray(plot).astype(int) - colour).sum(-1) < 30).sum()


BLUE = (0x24, 0x57, 0xD6)
ORANGE = (0xD9, 0x73, 0x0D)


# --------------------------------------------------------------------------------------- plots


def test_a_missing_value_leaves_a_gap():
    def drawn(middle):
        curve = Curve(x=range(5), y=[0.0, 1.0, middle, 1.0, 0.0])
        return curve_pixels(line_plot([Panel(title="t", curves=[curve])], x_label="x"), BLUE)

    assert 0 < drawn(None) < 0.8 * drawn(1.0)


def test_curves_have_their_own_colours():
    curves = [Curve(x=[0, 1], y=[i, i], colour=i, label=str(i)) for i in (0, 1)]
    plot = line_plot([Panel(title="t", curves=curves)], x_label="x")
    assert curve_pixels(plot, BLUE) > 100
    assert curve_pixels(plot, ORANGE) > 100


def test_an_eleventh_curve_is_no_second_first():
    def drawn(colour):
        curve = Curve(x=[0, 1], y=[0, 1], colour=colour)
        return curve_pixels(line_plot([Panel(title="t", curves=[curve])], x_label="x"), BLUE)

    assert 0 < drawn(10) < drawn(0)


def test_many_labels_are_beside_the_curves():
    def end(count):
        curves = [Curve(x=[0, 1], y=[n, n], label="n", colour=n) for n in range(count)]
        plot = np.asarray(line_plot([Panel(title="t", curves=curves)], x_label="x")).astype(int)
        orange = np.abs(plot - ORANGE).sum(-1) < 30
        return orange[orange.sum(1).argmax()].nonzero()[0][-1]

    # A line over the whole width of the axes.
    assert end(9) < 0.9 * end(8)


def test_panels_fill_rows():
    panel = Panel(title="t", curves=[Curve(x=[0, 1], y=[0, 1])])
    one, three = (line_plot([panel] * num, x_label="x") for num in (1, 3))
    assert three.size == (2 * one.width, 2 * one.height)


def test_bars_are_as_high_as_their_values():
    full, half = (
        curve_pixels(bar_plot([p] * 4, title="t", x_label="x", y_range=(0.0, 1.0)), BLUE)
        for p in (1.0, 0.5)
    )
    assert half == pytest.approx(full / 2, rel=0.03)


def test_the_reference_is_drawn_only_when_there_is_one():
    plots = [
        bar_plot([0.2], title="t", x_label="x", y_range=(0.0, 1.0), reference=reference)
        for reference in (None, 0.5)
    ]
    counts = [curve_pixels(plot, ORANGE) for plot in plots]
    assert counts[0] == 0
    assert counts[1] > 100


def test_a_curve_of_nothing_finite_is_drawn_as_an_empty_panel(tmp_path):
    curve = Curve(x=[1, 2], y=[None, float("nan")])
    write_curves(tmp_path / "curves.png", [Panel(title="t", curves=[curve])])
    assert (tmp_path / "curves.png").is_file()


def test_what_cannot_be_drawn_is_said_with_what_to_install(tmp_path, monkeypatch, caplog):
    assert has_plots(tmp_path / "curves.png")
    assert caplog.text == ""
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert not has_plots(tmp_path / "curves.png")
    assert f"{tmp_path}/curves.png is written: drawing plots needs matplotlib" in caplog.text
