"""A merge map as a drawing that can be pointed at: which cells became one token, and how many.

The drawing is SVG inside HTML; a script of a few lines highlights a group under the pointer or by
the arrow keys, and a list of sizes says the same in words. Nothing is fetched for it.
"""

from collections import Counter

import numpy as np
from jaxtyping import Float, Int64
from numpy.typing import NDArray
from torch import Tensor

from mergevq.report.pictures import coloured_groups

STYLE = """
.merge-map { margin: 0; padding: 0; }
.merge-map svg { display: block; width: 100%; height: auto; cursor: crosshair; }
.merge-map svg:focus-visible { outline: 3px solid #3b82f6; outline-offset: 2px; }
.merge-map .group { shape-rendering: crispEdges; transition: opacity 80ms; }
.merge-map svg.chosen .group { opacity: 0.25; }
.merge-map svg.chosen .group.on { opacity: 1; }
.merge-map .lines { fill: none; pointer-events: none; }
.merge-map output, .merge-map summary, .merge-map li {
  color: var(--body-text-color); font-size: 14px; line-height: 1.4;
}
.merge-map output, .merge-map details { padding: 0 8px; }
.merge-map output { display: block; min-height: 2.8em; margin-top: 6px; }
.merge-map summary { cursor: pointer; }
.merge-map ul { margin: 4px 0 0 1.2em; list-style: disc; }
"""

SCRIPT = """
const show = (svg, group) => {
  if (!svg) return;
  svg.querySelectorAll('.on').forEach((each) => each.classList.remove('on'));
  svg.classList.toggle('chosen', Boolean(group));
  const output = element.querySelector('output');
  if (group) group.classList.add('on');
  svg.dataset.at = group ? group.dataset.number : '';
  output.textContent = group ? group.dataset.text : output.dataset.text;
};
const drawing = () => element.querySelector('.merge-map svg');
const pointed = (event) => {
  const group = event.target.closest('.group');
  if (group) show(drawing(), group);
};
element.addEventListener('pointerover', pointed);
element.addEventListener('pointerdown', pointed);
element.addEventListener('pointerout', (event) => {
  const svg = drawing();
  if (svg && event.pointerType === 'mouse' && !svg.contains(event.relatedTarget)) show(svg, null);
});
element.addEventListener('keydown', (event) => {
  const svg = drawing();
  if (!svg || !svg.contains(event.target)) return;
  const groups = [...svg.querySelectorAll('.group')];
  const steps = {ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1};
  if (event.key === 'Escape') return show(svg, null);
  if (!(event.key in steps)) return;
  event.preventDefault();
  const at = svg.dataset.at ? Number(svg.dataset.at) - 1 : steps[event.key] > 0 ? -1 : 0;
  show(svg, groups[(at + steps[event.key] + groups.length) % groups.length]);
});
"""


def merge_drawing(
    image: Float[Tensor, "3 h w"], index: Int64[Tensor, " l"], grid_shape: tuple[int, int]
) -> str:
    """Draw every group of merged cells in its mean colour, as HTML.

    Args:
        image: in [-1, 1].
        index: group of each cell in raster order, any integers.
        grid_shape: (height, width) in cells.

    Raises:
        ValueError: the grid does not have the cells of the index, or does not divide the image.
    """
    groups, colours = coloured_groups(image, index, grid_shape)
    sizes = np.bincount(groups.ravel())
    # Groups are told apart by number in the order in which they begin.
    first = np.unique(groups.ravel(), return_index=True)[1]
    drawn = [
        _group(groups == group, colours[group], number, len(sizes))
        for number, group in enumerate(first.argsort(), start=1)
    ]
    rows, columns = grid_shape
    sizes_in_words = _sizes(sizes)
    about = f"{len(sizes)} groups of {rows * columns} cells; the largest has {sizes.max()}."
    lines = _lines(groups)
    return (
        '<figure class="merge-map">'
        f'<svg viewBox="0 0 {columns} {rows}" role="img" tabindex="0" '
        f'aria-label="Merge map: {about} Arrow keys go from group to group.">'
        f"{''.join(drawn)}"
        f'<path class="lines" d="{lines}" stroke="#000" stroke-width="0.11"/>'
        f'<path class="lines" d="{lines}" stroke="#fff" stroke-width="0.04"/>'
        "</svg>"
        f'<output aria-live="polite" data-text="{about}">{about}</output>'
        f"<details><summary>Sizes of all groups</summary><ul>{sizes_in_words}</ul></details>"
        "</figure>"
    )


def _group(
    cells: NDArray[np.bool_], colour: NDArray[np.float64], number: int, num_groups: int
) -> str:
    """The cells of one group as one path."""
    squares = "".join(f"M{column} {row}h1v1h-1z" for row, column in np.argwhere(cells))
    red, green, blue = colour.round().astype(int)
    text = f"Group {number} of {num_groups}: {_cells(int(cells.sum()))} became one token."
    return (
        f'<path class="group" data-number="{number}" data-text="{text}" d="{squares}" '
        f'fill="rgb({red},{green},{blue})"/>'
    )


def _lines(groups: NDArray[np.int64]) -> str:
    """The borders between groups, as the data of a path."""
    right = np.argwhere(groups[:, :-1] != groups[:, 1:])
    below = np.argwhere(groups[:-1] != groups[1:])
    return "".join(
        [f"M{column + 1} {row}v1" for row, column in right]
        + [f"M{column} {row + 1}h1" for row, column in below]
    )


def _sizes(sizes: NDArray[np.int64]) -> str:
    """How many groups there are of each size, the largest first."""
    counts = sorted(Counter(sizes.tolist()).items(), reverse=True)
    return "".join(
        f"<li>{count} {'group' if count == 1 else 'groups'} of {_cells(size)}</li>"
        for size, count in counts
    )


def _cells(count: int) -> str:
    """A number of cells in words."""
    return "1 cell" if count == 1 else f"{count} cells"
