"""Line and bar plots."""

import importlib
import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from mergevq.runtime.environment import needing

logger = logging.getLogger("mergevq")


_DPI = 160
PLOT_SCALE = 0.6
"""`Picture.scale` that shows a plot at the size its letters are made for, sharp on fine screens."""
_COLOURS = (
    *("#2457d6", "#d9730d", "#0f8a5f", "#8b3fd1", "#c42b4f"),
    *("#12879c", "#7a5b21", "#5f6b7a", "#d44fa0", "#8aa60a"),
)
_STYLES = (("-", "o"), ("--", "s"), (":", "^"), ("-.", "D"))
"""Line and marker of the first curves of all colours, of the next, and so on."""
_MANY = 8
"""Labels above which the legend is beside the curves and not on them."""
_INK = "#33383f"
_GRID = "#e6e8ec"


@dataclass(frozen=True, kw_only=True)
class Curve:
    """One line of a plot."""

    x: Sequence[int | float]
    y: Sequence[int | float | None]
    """None and non-finite values leave a gap."""
    label: str = ""
    """For the legend; empty is not in it."""
    colour: int = 0
    """Number of the colour, and where there are no more, of the style of line too: the same in two
    panels for what belongs together."""


@dataclass(frozen=True, kw_only=True)
class Panel:
    """One pair of axes of a plot."""

    title: str
    curves: Sequence[Curve]


def has_plots(left_out: Path | str) -> bool:
    """Whether plots can be drawn; if not, one warning says what is left out, and why."""
    try:
        with needing("eval", "drawing plots"):
            importlib.import_module("matplotlib")
    except RuntimeError as error:
        logger.warning("everything but %s is written: %s", left_out, error)
        return False
    return True


def line_plot(
    panels: Sequence[Panel],
    *,
    x_label: str,
    num_columns: int = 2,
    share_y: bool = False,
    size: tuple[float, float] = (3.6, 2.7),
) -> Image.Image:
    """Draw curves over a common kind of x.

    Args:
        panels: at least one.
        x_label: of all panels.
        num_columns: panels side by side.
        share_y: one range of y for all panels, so that they can be compared.
        size: width and height of a panel, in inches.
    """
    from matplotlib.figure import Figure

    num_columns = min(num_columns, len(panels))
    num_rows = math.ceil(len(panels) / num_columns)
    figsize = (size[0] * num_columns, size[1] * num_rows)
    figure = Figure(figsize=figsize, dpi=_DPI, layout="constrained")
    axes = None
    for number, panel in enumerate(panels):
        neighbour = axes if share_y else None
        axes = figure.add_subplot(num_rows, num_columns, number + 1, sharey=neighbour)
        for curve in panel.curves:
            values = [math.nan if value is None else value for value in curve.y]
            again, colour = divmod(curve.colour, len(_COLOURS))
            line, marker = _STYLES[again % len(_STYLES)]
            axes.plot(
                curve.x,
                values,
                color=_COLOURS[colour],
                linestyle=line,
                # A few points are measurements to be seen, many are a line.
                marker=marker if len(values) <= 20 else None,
                markersize=3,
                linewidth=1.4,
                label=curve.label or "_",
            )
        if count := sum(bool(curve.label) for curve in panel.curves):
            beside = {"loc": "upper left", "bbox_to_anchor": (1.02, 1)} if count > _MANY else {}
            axes.legend(fontsize=8, labelcolor=_INK, edgecolor=_GRID, **beside)
        if number + num_columns >= len(panels):
            axes.set_xlabel(x_label, fontsize=9, color=_INK)
        _dress(axes, panel.title)
    return _to_image(figure)


def bar_plot(
    values: Sequence[int | float],
    *,
    title: str,
    x_label: str,
    y_range: tuple[float, float],
    reference: float | None = None,
) -> Image.Image:
    """Draw one bar per value, numbered from 0.

    Args:
        values: heights.
        title: of the plot.
        x_label: what the numbers count.
        y_range: lowest and highest y.
        reference: height of a line to compare with; None for none.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.4, 2.7), dpi=_DPI, layout="constrained")
    axes = figure.add_subplot()
    axes.bar(range(len(values)), values, width=0.7, color=_COLOURS[0])
    axes.set_ylim(*y_range)
    if len(values) <= 24:
        axes.set_xticks(range(len(values)))
    if reference is not None:
        axes.axhline(reference, color=_COLOURS[1], linewidth=1.2, linestyle="--")
    axes.set_xlabel(x_label, fontsize=9, color=_INK)
    _dress(axes, title)
    return _to_image(figure)


def _dress(axes, title: str) -> None:  # noqa: ANN001 - of an optional extra
    """Quiet axes: a title, horizontal lines, no box."""
    axes.set_title(title, fontsize=10, color=_INK, loc="left")
    axes.tick_params(labelsize=8, length=0, colors=_INK)
    axes.set_axisbelow(True)
    axes.grid(axis="y", color=_GRID)
    axes.spines[:].set_visible(False)
    axes.spines["bottom"].set_visible(True)
    axes.spines["bottom"].set_color(_GRID)


def _to_image(figure) -> Image.Image:  # noqa: ANN001 - of an optional extra
    """Pixels of a figure, on white."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return Image.frombytes("RGBA", canvas.get_width_height(), bytes(canvas.buffer_rgba())).convert(
        "RGB"
    )
