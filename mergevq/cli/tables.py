"""Tables of results as text."""

import inspect
import shlex
from collections.abc import Callable, Sequence

from mergevq.config.generator import (
    Weights,
)
from mergevq.config.records import (
    BaselineRecord,
    BitsRecord,
    CodebookRecord,
    ContinuousRecord,
    CorrelationRecord,
    GuidanceRecord,
    MaskRecord,
    Numbers,
    ReconstructionRecord,
    RobustnessRecord,
    TextRecord,
)


def print_table(title: str, rows: dict[str, str]) -> None:
    """Print a title, and names and values in two columns."""
    print(title)
    for name, value in rows.items():
        print(f"  {name:<14} {value}")


def next_lines(*commands: Sequence[object]) -> str:
    """Commands of mergevq to go on with, a line for each; a word in capitals is to be filled in."""
    lines = [shlex.join(["mergevq", *map(str, command)]) for command in commands]
    return "\n  ".join(["next:", *lines])


def summary(function: Callable[..., object]) -> str:
    """First line of a docstring."""
    return (inspect.getdoc(function) or "").partition("\n")[0]


def reconstruction_table(record: ReconstructionRecord) -> str:
    """The numbers of an evaluation, a column for each K."""
    results = record["results"]
    rows = [["", *(f"K = {result['num_kept']}" for result in results)]]
    parts = {"given": [result["given"] for result in results]}
    recovered = [numbers for result in results if (numbers := result["recovered"]) is not None]
    has_maps = len(recovered) == len(results)
    parts |= {"recovered": recovered} if has_maps else {}
    names = [name for numbers in parts.values() for each in numbers for name in each["metrics"]]
    for name in dict.fromkeys(names):
        for source, numbers in parts.items():
            rows.append([f"{name}, {source}", *(_number(each, name) for each in numbers)])
    if has_maps:
        rows.append(["source accuracy", *(f"{r['source_accuracy']:.4f}" for r in results)])
    rows += _codebook_rows([each for result in results if (each := result["codebook"])])
    rows += _bits_rows([each for result in results if (each := result["bits"])], has_maps=has_maps)
    rows += _continuous_rows([each for result in results if (each := result.get("continuous"))])
    rows.append(["images per second", *(f"{r['images_per_second']:.3g}" for r in results)])
    data = record["data"]
    lines = [columns(rows), "", f"{data['num_images']} images of {data['image_size']} pixels"]
    if data["num_unreadable"]:
        lines[-1] += f"; {data['num_unreadable']} cannot be read"
    if record["baselines"]:
        lines += ["", columns(_baseline_rows(record["baselines"]))]
    return "\n".join(lines)


def _codebook_rows(codebooks: Sequence[CodebookRecord]) -> list[list[str]]:
    """Use of the codebook, a column for each K; no rows where tokens are real numbers."""
    if not codebooks:
        return []
    rows = [
        ["codebook usage", *(f"{each['usage']:.1%}" for each in codebooks)],
        ["codebook perplexity", *(f"{each['perplexity']:.4g}" for each in codebooks)],
    ]
    balance = [[min(p, 1 - p) for p in each["bit_probs"]] for each in codebooks]
    if all(balance):  # Codes that are not made of bits have none.
        rows.append(["rarer value of a bit, least", *(f"{min(p):.4f}" for p in balance)])
        rows.append(["rarer value of a bit, mean", *(f"{sum(p) / len(p):.4f}" for p in balance)])
    return rows


def _bits_rows(bits: Sequence[BitsRecord], *, has_maps: bool) -> list[list[str]]:
    """Bits of one image, a column for each K; no rows where tokens are real numbers."""
    if not bits:
        return []
    rows = [
        [f"bits, {name}", *(f"{each[name]:.1f}" for each in bits)]
        for name in ("tokens", "source", "total")
    ]
    told = [each.get("condition", 0.0) for each in bits]
    if any(told):
        rows.insert(2, ["bits, condition", *(f"{each:.2f}" for each in told)])
    # Evaluations of earlier versions have none.
    coded = [each.get("source_coded") for each in bits]
    if any(each is not None for each in coded):
        rows.append(["bits, source as coded", *("" if b is None else f"{b:.1f}" for b in coded)])
    prices = {"given": "per_pixel", "recovered": "per_pixel_recovered"}
    for source, name in prices.items() if has_maps else [("given", "per_pixel")]:
        rows.append([f"bits per pixel, {source}", *(f"{each[name]:.4f}" for each in bits)])
    return rows


def _continuous_rows(found: Sequence[ContinuousRecord]) -> list[list[str]]:
    """Real numbers of one image, a column for each K; no rows where tokens have indices."""
    if not found:
        return []
    return [
        ["bits", *("continuous" for _ in found)],
        ["real numbers", *(str(each["num_floats"]) for each in found)],
        ["channels in use", *(str(each["active_channels"]) for each in found)],
    ]


def _baseline_rows(baselines: Sequence[BaselineRecord]) -> list[list[str]]:
    """Files of other formats at the bytes of each K, and codes that learned nothing."""
    rows = [["whole files", "budget", "bytes", "psnr", "above budget"]]
    rows += [
        [
            baseline["file_format"],
            str(baseline["budget_bytes"]),
            f"{baseline['mean_bytes']:.1f}",
            _number(baseline, "psnr"),
            f"{baseline['num_above_budget']} of {baseline['num_images']}",
        ]
        for baseline in baselines
    ]
    return rows


def robustness_table(record: RobustnessRecord) -> str:
    """The numbers of a curve, a row for each kind of mistakes."""
    results = record["results"]
    names = list(results[0]["metrics"])
    rows = [["fraction", "bits", "tokens", *names]]
    # Evaluations of earlier versions have no wrong maps.
    has_maps = any(r.get("groups") or r.get("source", "given") != "given" for r in results)
    if has_maps:
        rows[0][3:3] = ["map", "groups", "cells"]
    for result in results:
        row = [
            f"{result['fraction']:g}",
            "-" if result["radius"] is None else str(result["radius"]),
            str(result["num_replaced"]),
        ]
        if has_maps:
            row += [result["source"], result["groups"] or "-", f"{result['num_moved']:.1f}"]
        rows.append([*row, *(_number(result, name) for name in names)])
    lines = [columns(rows), ""]
    for ball in record["balls"]:
        stands = f", for {' and '.join(map(str, ball['neighbours']))} of 4096"
        lines.append(
            f"replaced by codes of at most {ball['radius']} other bits, {ball['share']:.3%} of the "
            f"codebook{stands if ball['neighbours'] else ''}"
        )
    if record["metrics"]:
        lines += ["", numbers_table(record)]
    return "\n".join(lines)


def text_table(record: TextRecord) -> str:
    """How much text is read, a row for each kind of images, a column for each range of heights."""
    buckets = record["rows"][0]["buckets"]
    heads = [f"{each['low']:g}-{each['high']:g} px" for each in buckets]
    reader = f"{record['reader']['name']} {record['reader']['version']}"
    lines = []
    measures = {"text_exact": "mean_exact", "text_1_minus_ned": "mean_1_minus_ned"}
    for name, mean in measures.items():
        rows = [[name, *heads, "mean", *(f"refined {head}" for head in heads)]]
        for row in record["rows"]:
            way = "" if row["num_kept"] is None else f" K = {row['num_kept']}, {row['source']}"
            cells = [
                bucket[part][name] for part in ("scores", "refined") for bucket in row["buckets"]
            ]
            cells.insert(len(buckets), row[mean])
            rows.append([row["name"] + way, *("-" if c is None else f"{c:.3f}" for c in cells)])
        lines += [columns(rows), ""]
    counts = [each[part]["num_words"] for part in ("scores", "refined") for each in buckets]
    lines.append(
        f"words: {', '.join(map(str, counts[: len(buckets)]))}; refined, read to the letter in the "
        f"original: {', '.join(map(str, counts[len(buckets) :]))}"
    )
    data = record["data"]
    lines.append(
        f"{data['num_images']} images of {data['image_size']} pixels ({data['path']}), {reader}"
    )
    return "\n".join(lines)


def mask_table(record: MaskRecord) -> str:
    """How well masks come back, a row for each kind."""
    names = ("iou", "ciou", "dice", "boundary_f")
    rows = [["masks", "bits", *names, "above budget"]]
    for row in record["rows"]:
        parts = [row["name"]]
        parts += [] if row["num_kept"] is None else [f"K = {row['num_kept']}"]
        parts += [] if row["source"] is None else [row["source"]]
        bits = "-" if row["bits"] is None else f"{row['bits']:.1f}"
        above = str(row["num_above_budget"])
        rows.append([", ".join(parts), bits, *(_number(row, name) for name in names), above])
    data = record["data"]
    lines = [columns(rows), "", f"{data['num_images']} masks of {data['image_size']} pixels"]
    lines[-1] += f", {record['num_empty']} of them empty: two empty masks agree wholly"
    if data["num_unreadable"]:
        lines[-1] += f"; {data['num_unreadable']} cannot be read"
    return "\n".join(lines)


def correlation_table(record: CorrelationRecord) -> str:
    """The distances of each tokenizer, and how far they order tokenizers alike."""
    rows = [["tokenizer", "reconstruction", "perturbed", "generation"]]
    rows += [
        [each["tokenizer"][:12]]
        + [f"{each[name]:.4f}" for name in ("reconstruction", "perturbed", "generation")]
        for each in record["tokenizers"]
    ]
    found, least = len(record["tokenizers"]), record["smallest_significant"]
    words = "no rho is significant" if least is None else f"significant from |rho| {least:.3f}"
    lines = [columns(rows), "", numbers_table(record)]
    return "\n".join([*lines, f"{found} tokenizers: {words} (p < 0.05, two-sided)"])


def guidance_table(record: GuidanceRecord) -> str:
    """The numbers of a sweep, a row for each scale, and which scale is the best."""
    results = record["results"]
    names = [name for name in results[0]["metrics"] if not name.startswith("num_")]
    rows = [["guidance", *names]]
    rows += [[f"{each['scale']}", *(_number(each, name) for name in names)] for each in results]
    lines = [columns(rows), ""]
    lines += [
        f"best {best['metric']}: {best['value']:.4f} at guidance {best['scale']}"
        for best in record["best"]
    ]
    return "\n".join(lines)


def numbers_table(record: Numbers) -> str:
    """The numbers of an evaluation as a whole, a row each."""
    return columns([[name, _number(record, name)] for name in record["metrics"]])


def _number(part: Numbers, name: str) -> str:
    """A number as text; infinite ones say so."""
    if name in part["infinite"]:
        return "inf"
    value = part["metrics"].get(name)
    if value is None:
        return "-"
    return f"{value:.0f}" if name.startswith("num_") else f"{value:.4f}"


def columns(rows: Sequence[Sequence[str]]) -> str:
    """Rows of text in columns, the first to the left, the others to the right."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join(
        "  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]).rstrip()
        for row in rows
    )


def logit_error_line(weights: Weights, error: float) -> str:
    """Cost of weights of fewer bits, in words."""
    return f"{weights} weights: logits are off by {error:.2%} of their spread"
