"""Write the tables of README.md and docs/results.md from the JSON in docs/results.

`python docs/tables.py` replaces the text between a line `<!-- table: KIND MODEL .. -->` and the
next `<!-- end -->`. A MODEL is a folder of docs/results with the files that commands wrote, copied:
`reconstruction.json` and `generation.json` are `evaluation.json` of `mergevq evaluate`,
`probe_linear.json` and `probe_knn.json` are `probe.json` of `mergevq probe`, and `generator.json`
is `config.json` of the generator; `codecs.json` and `contest.json`
are written by `benchmarks/codecs.py` and `benchmarks/contest.py`. Every number
and every condition comes from them, and a table holds only what was measured alike.
"""

import hashlib
import json
import re
import sys
import textwrap
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

Record = Mapping[str, Any]
ROOT = Path(__file__).resolve().parents[1]
DOCUMENTS = ("README.md", "docs/results.md")
_MARKER = re.compile(r"(<!-- table:([^\n]*?)-->\n)(.*?)(<!-- end -->)", flags=re.DOTALL)
_USUAL = {"guidance_schedule": "constant", "guidance_power": 2.0, "guidance_interval": [0.0, 1.0]}
_USUAL |= {
    "temperature": 1.0,
    "top_k": 0,
    "top_p": 1.0,
    "budget": True,
    "num_steps": None,
    "candidates": 1,
}
_USUAL |= {"passes": {"kind": "one", "budget": True}}
"""Settings of sampling that a row need not show; some are of records of format 1."""
_WRITTEN = ("device environment.device", "torch environment.torch", "commit environment.git_commit")


class Table(NamedTuple):
    """A kind of table. A place is `a.b.c` in a record, with `FILE:` before it among several."""

    files: Mapping[str, str]
    """Names of the files of a model, each with the kind of record that it must hold."""
    rows: Callable[[Mapping[str, Record]], Sequence[Record]]
    """Rows of a model, from its records by file."""
    columns: Mapping[str, tuple[str, str]]
    """By title, a pattern of places in a row and the format of values; `{0}` is its first group."""
    alike: Sequence[str]
    """Places in which all records must agree."""
    facts: Sequence[str]
    """Conditions below the table: words, and after the last space a place."""


def at(record: Any, place: str) -> Any:  # noqa: ANN401 - JSON
    """The value at `a.b.c`; None where it or a value above it is not there."""
    for part in place.split("."):
        record = record.get(part) if isinstance(record, Mapping) else None
    return record


def flat(record: object, place: str = "") -> dict[str, Any]:
    """All values of a record by their places."""
    if not isinstance(record, Mapping):
        return {place: record}
    parts = [flat(part, f"{place}.{name}" if place else name) for name, part in record.items()]
    return {name: value for part in parts for name, value in part.items()}


# ------------------------------------------------------------------------------------------ rows


def reconstruction_rows(records: Mapping[str, Record]) -> list[Record]:
    """A row for each K, all tokens first."""
    return sorted(records["reconstruction"]["results"], key=lambda row: -row["num_kept"])


def probe_rows(records: Mapping[str, Record]) -> list[Record]:
    """A row for each feature, with both probes' accuracy; pixels are of no model.

    Raises:
        ValueError: the two probes are of other models, images or features.
    """
    linear, knn = records["probe_linear"], records["probe_knn"]
    places = ["model.sha256"]
    if not knn["run"]["method"]["leave_one_out"]:
        places += ["data.train.sha256", "data.val.sha256"]
    for place in places:
        require_equal(place, {name: at(record, place) for name, record in records.items()})
    names = {file: [row["name"] for row in record["rows"]] for file, record in records.items()}
    require_equal("features", names)
    return [
        {
            **one,
            "votes": {str(vote["k"]): vote["accuracy"] for vote in two["by_k"]},
            **({"model": "-"} if one["name"].startswith(("raw pixels", "PCA of pixels")) else {}),
        }
        for one, two in zip(linear["rows"], knn["rows"], strict=True)
    ]


def generation_rows(records: Mapping[str, Record]) -> list[Record]:
    """The row of a generator.

    Raises:
        ValueError: the samples are not of the generator whose settings are beside them.
    """
    record, generator = records["generation"], records["generator"]
    # As mergevq.runtime.artefacts.model_hash, which reads the weights too.
    identity = [generator["kind"], generator["config"], generator["weights_sha256"]]
    digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()
    require_equal("generator", {"generation": record["generator"], "generator": digest})
    run, config = record["settings"]["run"], generator["config"]
    shown = [item for item in run["settings"].items() if item not in _USUAL.items()]
    words = [
        f"{name.removesuffix('_scale').replace('_', ' ')} {value:g}"
        if isinstance(value, float)
        else f"{name.replace('_', ' ')} {value}"
        for name, value in shown
    ]
    # An order was a word in format 1.
    order = config["order"] if isinstance(config["order"], str) else config["order"]["kind"]
    kept = run["num_kept"] or config["num_kept"]
    return [{**record, "order": order, "sampling": ", ".join(words), "num_kept": kept}]


def codec_rows(records: Mapping[str, Record]) -> list[Record]:
    """A row for the `.mvq` files of each K, and one for each format beside them."""
    found = []
    for result in records["codecs"]["results"]:
        own = {"file_format": f"`.mvq`, K = {result['num_kept']}", **result["mvq"]}
        found += [own, *result["files"]]
    return found


def contest_rows(records: Mapping[str, Record]) -> list[Record]:
    """A row for each arm: what all seeds share, and of each number its mean and every seed's."""
    found = []
    for arm, seeds in records["contest"]["arms"].items():
        each = list(seeds.values())
        for one in each:
            one["bits"] = one["code_bits"] + one["map_bits"] + one.get("inferred_bits", 0)
        numbers = {name: [one[name] for one in each] for name in each[0]}
        found.append({"arm": f"`{arm}`", **numbers})
    return found


def map_rows(records: Mapping[str, Record]) -> list[Record]:
    """A row for each tokenizer's tokens of real images and each map that they are decoded with."""
    return [
        {"tokens": name.removeprefix("tokens_"), "map": which, **numbers}
        for name, ways in records["contest"]["maps"].items()
        for which, numbers in ways.items()
    ]


def compare_rows(records: Mapping[str, Record]) -> list[Record]:
    """A row for each arm and number of tokens or bits, numbers of all seeds in it; yardsticks."""
    record, found = records["compare"], list[Record]()
    judged = {(v["arm"], v["label"]): v for v in record["verdicts"] if v["metric"] == "psnr"}
    for arm in record["arms"]:
        points = [point for seed in arm["seeds"] for point in seed["points"]]
        for label in dict.fromkeys(point["label"] for point in points):
            each = [point for point in points if point["label"] == label]
            numbers = {name: [p["metrics"][name] for p in each] for name in each[0]["metrics"]}
            row = {**each[0], "model": f"`{arm['name']}`", "metrics": numbers}
            row["bits_layout_coded"] = [p["bits_layout_coded"] or 0 for p in each]
            row["bits"] = each[0]["bits_tokens"] + each[0]["bits_layout"]
            row["images_per_second"] = [seed["images_per_second"] for seed in arm["seeds"]]
            if gap := judged.get((arm["name"], label)):
                row["gap"] = f"{gap['gap']:+.2f}, {gap['verdict']}"
            found.append({**row, "num_parameters": arm["num_parameters"]})
    # Of so many bits as an arm has there are many; those asked for are enough.
    asked = {str(bits) for bits in record["settings"]["bits"]}
    return found + [
        {"model": each["name"], "label": "-", **each}
        for each in record["yardsticks"]
        if each["name"] != "principal components" or f"{each['bits']:.0f}" in asked
    ]


# ---------------------------------------------------------------------------------------- tables

_RECONSTRUCTION = Table(
    files={"reconstruction": "reconstruction evaluation"},
    rows=reconstruction_rows,
    columns={
        "K": ("num_kept", "d"),
        "PSNR (dB), {0}": (r"(\w+)\.metrics\.psnr", ".2f"),
        "SSIM, {0}": (r"(\w+)\.metrics\.ssim", ".3f"),
        "LPIPS, {0}": (r"(\w+)\.metrics\.lpips", ".3f"),
        "{1}, {0}": (r"(\w+)\.metrics\.((?:frechet|fid)\w*)", ".2f"),
        "cells recovered": ("source_accuracy", ".1%"),
        "bits of tokens": ("bits.tokens", ".0f"),
        "bits of source": ("bits.source", ".1f"),
        "bits of source as coded": ("bits.source_coded", ".1f"),
        "bits, total": ("bits.total", ".1f"),
        "bits per pixel": ("bits.per_pixel", ".3f"),
        "codes in use": ("codebook.usage", ".1%"),
        # Few tokens cannot be of many codes: without this a small K looks worse than it is.
        "of those attainable": ("codebook.attained", ".1%"),
    },
    alike=("data.num_images", "data.pixels_sha256", "lpips", "extractor.sha256", "precision"),
    facts=(
        *("images data.num_images", "of data.path", "side in pixels data.image_size"),
        *("prepared data.crop", "features of extractor.name", "its file extractor.sha256"),
        *("LPIPS lpips.trunk", "model model.hash", "made for K model.config.num_kept"),
        *("precision precision", *_WRITTEN),
    ),
)
_SHORT = ("K", "PSNR (dB), {0}", "LPIPS, {0}", "{1}, {0}")
_PROBED = ("data.train.sha256", "data.val.sha256", "run.method")
TABLES: Mapping[str, Table] = {
    "reconstruction": _RECONSTRUCTION,
    # Models whose weights are gone: what their maps cost as coded cannot be measured any more.
    "reconstruction-quality": _RECONSTRUCTION._replace(
        columns={title: c for title, c in _RECONSTRUCTION.columns.items() if "bits" not in title}
    ),
    "reconstruction-short": _RECONSTRUCTION._replace(
        columns={title: _RECONSTRUCTION.columns[title] for title in _SHORT}
        | {"bits, given": ("bits.total", ".0f")}
        | {"bits of source as coded": ("bits.source_coded", ".0f")}
        | {"bits, recovered": ("bits.tokens", ".0f")}
    ),
    "contest": Table(
        files={"contest": "contest"},
        rows=contest_rows,
        columns={
            "arm": ("arm", "s"),
            "parameters": ("parameters", ",.0f"),
            "passes": ("passes", ".0f"),
            "bits of codes": ("code_bits", ".1f"),
            "bits of the map": ("map_bits", ".1f"),
            "bits inferred": ("inferred_bits", ".1f"),
            "bits, total": ("bits", ".1f"),
            "class accuracy": ("class_accuracy", ".1%"),
            "{0}": (r"(frechet_\w+)", ".0f"),
            "CPU seconds of training": ("training_cpu_seconds", ".0f"),
            "of a sample": ("sampling_cpu_seconds", ".3f"),
        },
        alike=("settings.data", "settings.num_kept", "settings.recipe"),
        facts=(
            *("data settings.data", "tokenizer settings.tokenizer", "K settings.num_kept"),
            *("recipe settings.recipe", "seeds settings.seeds", "samples settings.num_samples"),
            *("class accuracy of real images real_accuracy", *_WRITTEN),
        ),
    ),
    "maps": Table(
        files={"contest": "contest"},
        rows=map_rows,
        columns={
            "map": ("map", "s"),
            "K": ("num_kept", "d"),
            "bits of tokens": ("code_bits", ".0f"),
            "bits of the map": ("map_bits", ".0f"),
            "PSNR (dB)": ("psnr", ".2f"),
            "SSIM": ("ssim", ".3f"),
            "LPIPS": ("lpips", ".3f"),
            "{0}": (r"(frechet_\w+)", ".0f"),
            "pairs of cells judged alike": ("agreement", ".1%"),
        },
        alike=(),
        facts=(
            *("tokenizer settings.tokenizer", "data settings.data", "K settings.num_kept"),
            *_WRITTEN,
        ),
    ),
    "compare": Table(
        files={"compare": "comparison"},
        rows=compare_rows,
        columns={
            "at": ("label", "s"),
            "K": ("num_kept", "d"),
            "bits of tokens": ("bits_tokens", ".0f"),
            "bits of layout": ("bits_layout", ".0f"),
            "as coded": ("bits_layout_coded", ".0f"),
            "bits, total": ("bits", ".0f"),
            "PSNR (dB)": (r"metrics\.psnr", ".2f"),
            "gap": ("gap", "s"),
            "PSNR, recovered": (r"metrics\.psnr_recovered", ".2f"),
            "SSIM": (r"metrics\.ssim", ".3f"),
            "LPIPS": (r"metrics\.lpips", ".3f"),
            "{0}": (r"metrics\.((?:frechet|fid)\w*(?<!_recovered))", ".1f"),
            "codes in use": (r"metrics\.codebook_usage", ".1%"),
            "images/s in training": ("images_per_second", ".0f"),
            "parameters": ("num_parameters", ",d"),
        },
        alike=("pixels_sha256", "settings.seeds"),
        facts=(
            *("training images num_train_images", "held-out images num_images"),
            *("seeds settings.seeds", "gap to settings.against", *_WRITTEN),
        ),
    ),
    "codecs": Table(
        files={"codecs": "codec comparison"},
        rows=codec_rows,
        columns={
            "files": ("file_format", "s"),
            "bytes": ("mean_bytes", ".0f"),
            "bits per pixel": ("bits_per_pixel", ".3f"),
            "PSNR (dB)": ("psnr", ".2f"),
            "LPIPS": ("lpips", ".3f"),
            "pictures with more dB": (r"num_better\.psnr", "d"),
            "with less LPIPS": (r"num_better\.lpips", "d"),
            "above its size": ("num_above_budget", "d"),
        },
        alike=("data.pixels_sha256", "lpips", "precision"),
        facts=(
            *("photographs data.num_images", "short side in pixels data.short_side"),
            *("LPIPS lpips", "model model.hash", "precision precision", *_WRITTEN),
        ),
    ),
    "probe": Table(
        files={"probe_linear": "linear probe", "probe_knn": "knn probe"},
        rows=probe_rows,
        columns={
            "features": ("name", "s"),
            "channels": ("dim", "d"),
            "linear": ("accuracy", ".1%"),
            "{0} nearest neighbours": (r"votes\.(\d+)", ".1%"),
        },
        alike=[f"{file}:{place}" for file in ("probe_linear", "probe_knn") for place in _PROBED],
        facts=(
            "training images data.train.num_images",
            *("of run.data.path", "test images data.val.num_images"),
            *("their file run.data.val_path", "epochs of the linear probe run.method.num_epochs"),
            "share of the most frequent class data.most_frequent_class_accuracy",
            *("model model.sha256", "class token aligned with model.teacher", *_WRITTEN),
            "temperature of the neighbours' votes probe_knn:run.method.temperature",
            "neighbours leave one out probe_knn:run.method.leave_one_out",
        ),
    ),
    "generation": Table(
        files={"generation": "generation evaluation", "generator": "generator"},
        rows=generation_rows,
        columns={
            "order": ("order", "s"),
            "sampling": ("sampling", "s"),
            "K": ("num_kept", "d"),
            # A class_score is no Inception score.
            "{0}": (r"metrics\.((?:frechet|fid|class_score|inception_score)\w*(?<!_std))", ".2f"),
            "{0} ": (r"metrics\.((?:precision|recall|class_accuracy)\w*)", ".3f"),
        },
        alike=(
            *("samples.num_images", "samples.size", "extractor.sha256", "reference.sha256"),
            "classifier.sha256",
        ),
        facts=(
            *("samples samples.num_images", "height and width samples.size"),
            *("compared with images reference.num_images", "of reference.data"),
            *("features of extractor.name", "its file extractor.sha256"),
            *("classifier classifier.name", "left out left_out", "generator generator"),
            *("tokenizer tokenizer", "seed settings.run.seed", "weights settings.run.weights"),
            *_WRITTEN,
        ),
    ),
}


def table(kind: str, models: Sequence[str], results: Path) -> str:
    """A table and its conditions, in Markdown.

    Args:
        kind: one of `TABLES`.
        models: folders of `results`.
        results: folder of all results.

    Raises:
        ValueError: a file is not there, or two models were not measured alike.
    """
    made = TABLES[kind]
    records = {
        model: {file: read(results / model / f"{file}.json", of) for file, of in made.files.items()}
        for model in models
    }

    def everywhere(place: str) -> dict[str, Any]:
        file, _, path = place.rpartition(":")
        return {
            model: at(found[file or next(iter(found))], path) for model, found in records.items()
        }

    for place in made.alike:
        require_equal(place, everywhere(place))
    rows = [
        flat({"model": f"`{model}`", **row})
        for model in models
        for row in made.rows(records[model])
    ]
    columns = {"model": ("model", "s"), **_columns(made.columns, rows)}
    lines = [[_cell(row, place, form) for place, form in columns.values()] for row in rows]
    rules = ["---" if form == "s" else "---:" for _, form in columns.values()]
    # Pixels are the same for every model: they come once, last.
    lines = [list(line) for line in dict.fromkeys(map(tuple, lines))]
    lines.sort(key=lambda line: line[0] == "-")
    text = "\n".join(f"| {' | '.join(line)} |" for line in [list(columns), rules, *lines])
    facts = [_fact(words, everywhere(place)) for words, place in map(_split, made.facts)]
    below = f"Conditions: {'; '.join(filter(None, facts))}."
    return f"{text}\n\n{textwrap.fill(below, 100, break_long_words=False, break_on_hyphens=False)}"


def _columns(
    patterns: Mapping[str, tuple[str, str]], rows: Sequence[Mapping[str, Any]]
) -> dict[str, tuple[str, str]]:
    """Place and format of each column that a row has, by its title."""
    places = list(dict.fromkeys(place for row in rows for place in row))
    return {
        title.format(*match.groups()).strip(): (place, form)
        for title, (pattern, form) in patterns.items()
        for place in places
        if (match := re.fullmatch(pattern, place))
    }


def _cell(row: Mapping[str, Any], place: str, form: str) -> str:
    """A value as it is shown: a dash where it was not measured, of several their mean and each."""
    if place not in row:
        return "-"
    value = row[place]
    if isinstance(value, list):
        mean, *each = (_text(one, form) for one in (sum(value) / len(value), *value))
        return mean if set(each) == {mean} else f"{mean} ({', '.join(each)})"
    return _text(value, form)


def _text(value: object, form: str) -> str:
    """A value in a format; infinite ones are null in JSON."""
    return "inf" if value is None else format(value, form).replace("%", " %")


def require_equal(place: str, values: Mapping[str, Any]) -> None:
    """Check that numbers are comparable.

    Raises:
        ValueError: the values differ.
    """
    (first, wanted), *others = values.items()
    for other, found in others:
        if found != wanted:
            raise ValueError(
                f"{place} of {other} ({found}) must be that of {first} ({wanted}): a table holds "
                "only what was measured alike; measure both the same, or make two tables"
            )


def _split(fact: str) -> tuple[str, str]:
    """Words of a condition and its place."""
    words, _, place = fact.rpartition(" ")
    return words, place


def _fact(words: str, values: Mapping[str, Any]) -> str:
    """A condition: one value for all models, or one for each; empty where there is none."""
    shown = {model: _shown(value) for model, value in values.items()}
    different = list(dict.fromkeys(shown.values()))
    if different == [""]:
        return ""
    if len(different) == 1:
        return f"{words} {different[0]}"
    return f"{words} {', '.join(f'{value} (`{model}`)' for model, value in shown.items())}"


def _shown(value: object) -> str:
    """A value in a few letters: files by name, hashes by their beginning; empty for nothing."""
    if value is None or value == []:
        return ""
    if isinstance(value, float):
        return f"{value:.4g}"
    text = " and ".join(map(str, value)) if isinstance(value, list) else str(value)
    if re.fullmatch(r"[0-9a-f]{13,}(-dirty)?", text):
        return text[:12] + "-dirty" * text.endswith("-dirty")
    # Where data lay on a machine tells readers nothing.
    return f"`{Path(text).name}`" if "/" in text or text.endswith(".parquet") else text


# ------------------------------------------------------------------------------ files and markers


def read(path: Path, kind: str) -> Record:
    """Read the JSON that a command wrote.

    Raises:
        ValueError: it is not there, is no JSON, or is something else.
    """
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ValueError(f"no {path}; copy the JSON of a {kind}, or remove the marker") from error
    except ValueError as error:
        raise ValueError(f"{path} is not the JSON of a {kind}: {error}") from error
    found = " ".join(record[name] for name in ("method", "kind") if name in record)
    if found != kind:
        raise ValueError(f"{path} is the JSON of a {found} and must be that of a {kind}")
    return record


def rewritten(text: str, results: Path) -> str:
    """A document with its tables made again.

    Raises:
        ValueError: a marker is unknown, names no model or has no end, or its JSON is missing.
    """
    begun, ended = text.count("<!-- table:"), text.count("<!-- end -->")
    parts = [match[0] for match in _MARKER.finditer(text)]
    if not begun == ended == len(parts) or any(part.count("<!-- table:") > 1 for part in parts):
        raise ValueError(
            f"{begun} tables begin (<!-- table: ..) and {ended} end (<!-- end -->); each needs a "
            "line of its own before and after it"
        )

    def made(match: re.Match[str]) -> str:
        kind, *models = match[2].split() or [""]
        if kind not in TABLES or not models:
            raise ValueError(f"<!-- table: KIND MODEL .. --> needs one of {', '.join(TABLES)}")
        return f"{match[1]}\n{table(kind, models, results)}\n\n{match[4]}"

    return _MARKER.sub(made, text)


def main(root: Path = ROOT) -> None:
    """Write the tables of every document; all of them, or none if there is an error."""
    texts = {root / name: (root / name).read_text(encoding="utf-8") for name in DOCUMENTS}
    changed = {path: rewritten(text, root / "docs" / "results") for path, text in texts.items()}
    for path, text in changed.items():
        if text != texts[path]:
            path.write_text(text, encoding="utf-8", newline="\n")


if __name__ == "__main__":
    try:
        main()
    except ValueError as error:
        sys.exit(f"docs/tables.py: {error}")
