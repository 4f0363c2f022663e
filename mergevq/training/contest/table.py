"""Results of measurements: verdicts against a control, a table in Markdown, and curves."""

import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

from mergevq.config.contest import (
    ArmRecord,
    ContestRecord,
    PointRecord,
    VerdictRecord,
    YardstickRecord,
)
from mergevq.report.plots import Curve

_UNSHOWN = ("l1", "num_exact", "psnr_finite", "perplexity")
"""Beginnings of the names of numbers that are in the record alone."""
_UNJUDGED = ("num_exact", "psnr_finite")
"""Those of numbers that are counts, not qualities."""


class Verdict(NamedTuple):
    """A number of an arm beside that of the control."""

    gap: float
    """Mean over seeds of the arm minus the control."""
    spread: float
    """Largest minus smallest value of the control over seeds."""
    is_shown: bool
    """Whether every seed agrees in sign and the gap is wider than the spread."""


def judge(arm: Sequence[float], control: Sequence[float]) -> Verdict:
    """Compare two arms seed by seed; one seed has no spread, so nothing is shown by it.

    Args:
        arm: a number with each seed.
        control: the same with the same seeds.
    """
    gaps = [ours - theirs for ours, theirs in zip(arm, control, strict=True)]
    gap, spread = statistics.fmean(gaps), max(control) - min(control)
    agree = all(each > 0 for each in gaps) or all(each < 0 for each in gaps)
    return Verdict(gap, spread, len(gaps) > 1 and agree and abs(gap) > spread)


def verdicts(arms: Sequence[ArmRecord], against: str | None) -> list[VerdictRecord]:
    """Every number of every other arm beside the control's, where both were asked for the same."""
    control = next((arm for arm in arms if arm["name"] == against), None)
    if control is None:
        return []
    return [
        {
            "arm": arm["name"],
            "label": label,
            "metric": name,
            "gap": found.gap,
            "spread": found.spread,
            "verdict": "shown" if found.is_shown else "not shown",
        }
        for arm in arms
        if arm is not control
        for label in labels([arm])
        if label in labels([control])
        for name in names([arm], label)
        if not name.startswith(_UNJUDGED) and name in names([control], label)
        for ours, theirs in [(values(arm, label, name), values(control, label, name))]
        # An infinite PSNR has no gap.
        if all(map(math.isfinite, [*ours, *theirs]))
        for found in [judge(ours, theirs)]
    ]


# --------------------------------------------------------------------------- what is looked up


def labels(arms: Sequence[ArmRecord]) -> list[str]:
    """Labels of all points, in the order of the arms."""
    return list(dict.fromkeys(point["label"] for arm in arms for _, point in _points(arm)))


def names(arms: Sequence[ArmRecord], label: str) -> list[str]:
    """Names of all numbers at a label."""
    return list(dict.fromkeys(n for arm in arms for p in _at(arm, label) for n in p["metrics"]))


def values(arm: ArmRecord, label: str, name: str) -> list[float]:
    """A number at a label with each seed; an infinite one as it is."""
    return [_number(point, name) for point in _at(arm, label) if name in point["metrics"]]


def _points(arm: ArmRecord) -> Iterator[tuple[int, PointRecord]]:
    """Every point with its seed."""
    for seed in arm["seeds"]:
        for point in seed["points"]:
            yield seed["seed"], point


def _at(arm: ArmRecord, label: str) -> list[PointRecord]:
    """Points at a label, one for each seed."""
    return [point for _, point in _points(arm) if point["label"] == label]


def _number(record: PointRecord | YardstickRecord, name: str) -> float:
    """A number, which is infinite where JSON has null."""
    value = record["metrics"][name]
    return math.inf if value is None else value


# ----------------------------------------------------------------------------- what is written


def table(record: ContestRecord) -> str:
    """The whole comparison in Markdown: a table for each label, yardsticks and verdicts."""
    train = record["settings"]["arms"][0]["run"]["train"]
    side = record["settings"]["arms"][0]["run"]["model"]["image_size"]
    seeds = ", ".join(map(str, record["settings"]["seeds"]))
    lines = [
        "# Tokenizers at equal training",
        "",
        f"{train['num_steps']} steps of {train['batch_size']} images, of "
        f"{record['num_train_images']}; seeds {seeds}. Numbers are of {record['num_images']} "
        f"held-out images of {side} x {side} pixels, with the given source, or the recovered one "
        "where it says so. A cell has the mean over seeds, and each seed in brackets.",
    ]
    starts = [arm for arm in record["arms"] if arm["init_from"] is not None]
    lines += [
        f"\n{arm['name']} begins at {arm['init_from']}, whose training comes on top."
        for arm in starts
    ]
    for label in labels(record["arms"]):
        lines += ["", f"## {label}", "", *_arm_rows(record["arms"], label)]
    if record["yardsticks"]:
        lines += ["", "## Yardsticks, which take no training by gradients", ""]
        lines += _yardstick_rows(record["yardsticks"])
    if record["verdicts"]:
        lines += ["", f"## Against {record['settings']['against']}", ""]
        lines += _verdict_rows(record["verdicts"])
    if record["left_out"]:
        lines += ["", "## Left out", "", *(f"- {each}" for each in record["left_out"])]
    return "\n".join(lines) + "\n"


def _arm_rows(arms: Sequence[ArmRecord], label: str) -> list[str]:
    """A row for each arm that has the label."""
    shown = [name for name in names(arms, label) if not name.startswith(_UNSHOWN)]
    head = ["arm", "K", "bits: tokens + layout", "layout as coded", *map(_title, shown)]
    rows = [[*head, "images/s in training", "parameters"]]
    for arm in arms:
        points = _at(arm, label)
        if not points:
            continue
        tokens, layout = points[0]["bits_tokens"], points[0]["bits_layout"]
        coded = [bits for point in points if (bits := point["bits_layout_coded"]) is not None]
        speeds = [s["images_per_second"] for s in arm["seeds"] if s["images_per_second"]]
        rows.append(
            [
                arm["name"],
                str(points[0]["num_kept"]),
                f"{tokens:.1f} + {layout:.1f} = {tokens + layout:.1f}",
                _cell(coded),
                *(_cell(values(arm, label, name)) for name in shown),
                _cell(speeds),
                f"{arm['num_parameters']:,}",
            ]
        )
    return _markdown(rows)


def _yardstick_rows(yardsticks: Sequence[YardstickRecord]) -> list[str]:
    """A row for each yardstick at each price."""
    every = dict.fromkeys(name for each in yardsticks for name in each["metrics"])
    shown = [name for name in every if not name.startswith(_UNSHOWN)]
    rows = [["yardstick", "bits", *map(_title, shown)]]
    for each in yardsticks:
        cells = [_cell([_number(each, n)] if n in each["metrics"] else []) for n in shown]
        rows.append([each["name"], f"{each['bits']:.1f}", *cells])
    return _markdown(rows)


def _verdict_rows(found: Sequence[VerdictRecord]) -> list[str]:
    """The rule, and a row for each number."""
    rows = [["arm", "at", "number", "gap", "spread of the control", "verdict"]]
    rows += [
        [
            each["arm"],
            each["label"],
            _title(each["metric"]),
            f"{each['gap']:+.4g}",
            f"{each['spread']:.4g}",
            each["verdict"],
        ]
        for each in found
        if not each["metric"].startswith(_UNSHOWN)
    ]
    return [
        "Shown is a gap that has the same sign with every seed and is wider than the spread of the "
        "control over seeds; all else is not shown at this scale.",
        "",
        *_markdown(rows),
    ]


def _title(name: str) -> str:
    """A number's name as the heading of a column."""
    text = name.removesuffix("_recovered").replace("_", " ")
    text = {"psnr": "PSNR", "ssim": "SSIM", "lpips": "LPIPS"}.get(text, text)
    return f"{text}, recovered" if name.endswith("_recovered") else text


def _cell(numbers: Sequence[float]) -> str:
    """Mean and each value; one value alone, and a dash for none."""
    if not numbers:
        return "-"
    each = ", ".join(f"{value:.4g}" for value in numbers)
    return f"{statistics.fmean(numbers):.4g} ({each})" if len(numbers) > 1 else each


def _markdown(rows: Sequence[Sequence[str]]) -> list[str]:
    """Rows as a table, the first one its heading."""
    head, *body = [f"| {' | '.join(row)} |" for row in rows]
    return [head, f"|---|{'---:|' * (len(rows[0]) - 1)}", *body]


def rate_distortion(
    arms: Sequence[ArmRecord], yardsticks: Sequence[YardstickRecord]
) -> list[Curve]:
    """PSNR over total bits of an image: a curve for each arm, mean over seeds, and yardsticks."""
    found: dict[str, dict[float, list[float]]] = {}
    for arm in arms:
        # Two labels may have led to one K.
        once: Mapping[tuple[int, int], PointRecord] = {
            (seed, point["num_kept"]): point for seed, point in _points(arm)
        }
        for point in once.values():
            bits = point["bits_tokens"] + point["bits_layout"]
            found.setdefault(arm["name"], {}).setdefault(bits, []).append(_number(point, "psnr"))
    for each in yardsticks:
        found.setdefault(each["name"], {})[each["bits"]] = [_number(each, "psnr")]
    return [
        Curve(
            x=sorted(points),
            y=[statistics.fmean(points[bits]) for bits in sorted(points)],
            label=name,
            colour=number,
        )
        for number, (name, points) in enumerate(found.items())
    ]
