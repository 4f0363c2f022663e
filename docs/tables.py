"""Write the tables of README.md and docs/results.md from the JSON in docs/results.

`python docs/tables.py` replaces the text between a line `<!-- table: KIND MODEL .. -->` and the
next `<!-- end -->`. A MODEL is a folder of docs/results with the files that commands wrote, copied:
`reconstruction.json` and `generation.json` are `evaluation.json` of `mergevq evaluate`,
`probe_linear.json` and `probe_knn.json` are `probe.json` of `mergevq probe`, and `generator.json`
is `config.json` of the generator. Every number and every condition comes from them, and a table
holds only what was measured alike.
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
_BASELINES = ("raw pixels", "PCA of pixels")
"""Beginnings of the names of features that are no model's."""
_USUAL = {"guidance_schedule": "constant", "guidance_power": 2.0, "guidance_interval": [0.0, 1.0]}
_USUAL |= {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "budget": True, "num_steps": None}
_USUAL |= {"passes": {"kind": "one", "budget": True}}
"""Settings of sampling that a row need not show; some are of records of format 1."""


class Column(NamedTuple):
    """A column of a table."""

    title: str
    value: Callable[[Record], str]
    """Text of a row's cell."""
    is_label: bool = False
    """Set to the left; numbers are set to the right."""


class Table(NamedTuple):
    """A kind of table."""

    files: Mapping[str, str]
    """Names of the files of a model, each with the kind of record that it must hold."""
    rows: Callable[[str, Mapping[str, Record]], list[Record]]
    """Rows of a model, from its name and its records by file."""
    columns: Callable[[Sequence[Record]], list[Column]]
    """Columns that the rows have."""
    alike: Sequence[str]
    """Places (`file:a.b`) in which all records must agree."""
    facts: Mapping[str, str]
    """Conditions that are shown below the table: words, and the place of the value."""


# ----------------------------------------------------------------------------------------- values


def at(record: Any, path: str) -> Any:  # noqa: ANN401 - JSON
    """The value at `a.b.c`; None where it or a value above it is not there."""
    for part in path.split("."):
        record = record.get(part) if isinstance(record, Mapping) else None
    return record


def number(path: str, digits: int) -> Callable[[Record], str]:
    """A cell with a number of fixed digits."""
    return lambda row: f"{at(row, path):.{digits}f}"


def percent(path: str) -> Callable[[Record], str]:
    """A cell with a share of all."""
    return lambda row: f"{100 * at(row, path):.1f} %"


def metric(name: str, digits: int, part: str = "") -> Callable[[Record], str]:
    """A cell with a metric; infinite ones are null in JSON.

    Raises:
        ValueError: a row does not have it.
    """

    def cell(row: Record) -> str:
        found = row[part] if part else row
        if name not in found["metrics"]:
            raise ValueError(f"{name} was measured for some rows only; measure it for all")
        return "inf" if name in found["infinite"] else f"{found['metrics'][name]:.{digits}f}"

    return cell


def metrics(
    rows: Sequence[Record], digits: Mapping[str, int], parts: Sequence[str]
) -> list[Column]:
    """Columns of the metrics whose names begin so, in this order, for each part of a row."""
    measured = [name for row in rows for name in (row[parts[0]] if parts[0] else row)["metrics"]]
    names = [name for name in dict.fromkeys(measured) if not name.endswith("_std")]
    titles = {"psnr": "PSNR (dB)", "ssim": "SSIM", "lpips": "LPIPS"}
    return [
        Column(
            ", ".join(filter(None, (titles.get(name, name), part))),
            metric(name, places, part),
        )
        for start, places in digits.items()
        for name in names
        if name == start or name.startswith(f"{start}_")
        for part in parts
    ]


# ----------------------------------------------------------------------------------------- tables

MODEL = Column("model", lambda row: row["model"], is_label=True)
SOURCES = ("given", "recovered")


def reconstruction_rows(name: str, records: Mapping[str, Record]) -> list[Record]:
    """A row for each K, all tokens first."""
    results = sorted(records["reconstruction"]["results"], key=lambda row: -row["num_kept"])
    return [{**result, "model": f"`{name}`"} for result in results]


def reconstruction_columns(rows: Sequence[Record]) -> list[Column]:
    """All that an evaluation has."""
    return [
        *(MODEL, Column("K", number("num_kept", 0))),
        *metrics(rows, {"psnr": 2, "ssim": 3, "lpips": 3, "frechet": 2, "fid": 2}, SOURCES),
        Column("cells recovered", percent("source_accuracy")),
        Column("bits of tokens", number("bits.tokens", 0)),
        Column("bits of source", number("bits.source", 1)),
        *_coded_source(rows),
        Column("bits, total", number("bits.total", 1)),
        Column("bits per pixel", number("bits.per_pixel", 3)),
        Column("codes in use", percent("codebook.usage")),
        # Few tokens cannot be of many codes: without this a small K looks worse than it is.
        Column("of those attainable", percent("codebook.attained")),
    ]


def _coded_source(rows: Sequence[Record]) -> list[Column]:
    """Bits of the source map as files have it; older evaluations know the bound alone."""
    if any(at(row, "bits.source_coded") is None for row in rows):
        return []
    return [Column("bits of source as coded", number("bits.source_coded", 1))]


def short_reconstruction_columns(rows: Sequence[Record]) -> list[Column]:
    """The columns that tell most, each with its price in bits."""
    return [
        *(MODEL, Column("K", number("num_kept", 0))),
        *metrics(rows, {"psnr": 2, "frechet": 2, "fid": 2}, SOURCES),
        Column("bits, given", number("bits.total", 0)),
        *_coded_source(rows),
        Column("bits, recovered", number("bits.tokens", 0)),
    ]


def probe_rows(name: str, records: Mapping[str, Record]) -> list[Record]:
    """A row for each feature; pixels are of no model.

    Raises:
        ValueError: the two probes are of other models, images or features.
    """
    linear, knn = records["probe_linear"], records["probe_knn"]
    places = ["model.sha256"]
    if not knn["run"]["method"]["leave_one_out"]:
        places += ["data.train.sha256", "data.val.sha256"]
    for place in places:
        _require_equal(place, {"probe_linear": at(linear, place), "probe_knn": at(knn, place)})
    names = {file: [row["name"] for row in record["rows"]] for file, record in records.items()}
    _require_equal("features", names)
    return [
        {**one, "by_k": two["by_k"], "model": "-" if _is_pixels(one) else f"`{name}`"}
        for one, two in zip(linear["rows"], knn["rows"], strict=True)
    ]


def _is_pixels(row: Record) -> bool:
    """Whether a feature is a baseline and none of a model."""
    return row["name"].startswith(_BASELINES)


def probe_columns(rows: Sequence[Record]) -> list[Column]:
    """Accuracy of the linear probe and of nearest neighbours."""

    def votes(place: int) -> Callable[[Record], str]:
        return lambda row: f"{100 * row['by_k'][place]['accuracy']:.1f} %"

    return [
        *(MODEL, Column("features", lambda row: row["name"], is_label=True)),
        *(Column("channels", number("dim", 0)), Column("linear", percent("accuracy"))),
        *(
            Column(f"{entry['k']} nearest neighbours", votes(place))
            for place, entry in enumerate(rows[0]["by_k"])
        ),
    ]


def generation_rows(name: str, records: Mapping[str, Record]) -> list[Record]:
    """The row of a generator.

    Raises:
        ValueError: the samples are not of the generator whose settings are beside them.
    """
    record, generator = records["generation"], records["generator"]
    # As mergevq.runtime.artefacts.model_hash, which reads the weights too.
    identity = [generator["kind"], generator["config"], generator["weights_sha256"]]
    digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()
    _require_equal("generator", {"generation": record["generator"], "generator": digest})
    run, config = record["settings"]["run"], generator["config"]
    words = [f"guidance {run['settings']['guidance_scale']:g}"]
    words += [
        f"{key.replace('_', ' ')} {_plain(value)}"
        for key, value in run["settings"].items()
        if key != "guidance_scale" and (key, value) not in _USUAL.items()
    ]
    # An order was a word in format 1.
    order = config["order"] if isinstance(config["order"], str) else config["order"]["kind"]
    own = {"model": f"`{name}`", "order": order, "sampling": ", ".join(words)}
    return [{**record, **own, "num_kept": run["num_kept"] or config["num_kept"]}]


def _plain(value: object) -> object:
    """A setting as a cell shows it; of a part its own settings."""
    if not isinstance(value, dict):
        return value
    return " ".join(f"{name} {part}" for name, part in value.items() if name != "kind")


def generation_columns(rows: Sequence[Record]) -> list[Column]:
    """Distances and scores of samples; a `class_score` is no Inception score."""
    digits = {"frechet": 2, "fid": 2, "class_score": 2, "inception_score": 2}
    digits |= {"precision": 3, "recall": 3, "class_accuracy": 3}
    return [
        Column("generator", MODEL.value, is_label=True),
        Column("order", lambda row: row["order"], is_label=True),
        Column("sampling", lambda row: row["sampling"], is_label=True),
        *(Column("K", number("num_kept", 0)), *metrics(rows, digits, [""])),
    ]


def _places(file: str, names: Sequence[str]) -> list[str]:
    """Places in one file."""
    return [f"{file}:{name}" for name in names]


def _facts(file: str, facts: Mapping[str, str]) -> dict[str, str]:
    """Conditions in one file, and where it was written."""
    where = {name: f"environment.{name}" for name in ("device", "torch")}
    where |= {"commit": "environment.git_commit"}
    return {words: f"{file}:{place}" for words, place in (facts | where).items()}


_RECONSTRUCTION = Table(
    files={"reconstruction": "reconstruction evaluation"},
    rows=reconstruction_rows,
    columns=reconstruction_columns,
    alike=_places(
        "reconstruction",
        ("data.num_images", "data.pixels_sha256", "lpips", "extractor.sha256", "precision"),
    ),
    facts=_facts(
        "reconstruction",
        {
            "images": "data.num_images",
            "of": "data.path",
            "side in pixels": "data.image_size",
            "prepared": "data.crop",
            "features of": "extractor.name",
            "its file": "extractor.sha256",
            "LPIPS": "lpips.trunk",
            "model": "model.hash",
            "made for K": "model.config.num_kept",
            "precision": "precision",
        },
    ),
)
TABLES: Mapping[str, Table] = {
    "reconstruction": _RECONSTRUCTION,
    "reconstruction-short": _RECONSTRUCTION._replace(columns=short_reconstruction_columns),
    "probe": Table(
        files={"probe_linear": "linear probe", "probe_knn": "knn probe"},
        rows=probe_rows,
        columns=probe_columns,
        alike=[
            *_places("probe_linear", ("data.train.sha256", "data.val.sha256", "run.method")),
            *_places("probe_knn", ("data.train.sha256", "data.val.sha256", "run.method")),
        ],
        facts=_facts(
            "probe_linear",
            {
                "training images": "data.train.num_images",
                "of": "run.data.path",
                "test images": "data.val.num_images",
                "their file": "run.data.val_path",
                "share of the most frequent class": "data.most_frequent_class_accuracy",
                "epochs of the linear probe": "run.method.num_epochs",
                "model": "model.sha256",
                "class token aligned with": "model.teacher",
            },
        )
        | {
            "temperature of the neighbours' votes": "probe_knn:run.method.temperature",
            "neighbours leave one out": "probe_knn:run.method.leave_one_out",
        },
    ),
    "generation": Table(
        files={"generation": "generation evaluation", "generator": "generator"},
        rows=generation_rows,
        columns=generation_columns,
        alike=_places(
            "generation",
            (
                *("samples.num_images", "samples.size", "extractor.sha256", "reference.sha256"),
                "classifier.sha256",
            ),
        ),
        facts=_facts(
            "generation",
            {
                "samples": "samples.num_images",
                "height and width": "samples.size",
                "compared with images": "reference.num_images",
                "of": "reference.data",
                "features of": "extractor.name",
                "its file": "extractor.sha256",
                "classifier": "classifier.name",
                "left out": "left_out",
                "generator": "generator",
                "tokenizer": "tokenizer",
                "seed": "settings.run.seed",
                "weights": "settings.run.weights",
            },
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
        model: {
            file: read(results / model / f"{file}.json", made.files[file]) for file in made.files
        }
        for model in models
    }
    places = {place: _everywhere(records, place) for place in (*made.alike, *made.facts.values())}
    for place in made.alike:
        _require_equal(place, places[place])
    rows = [row for model in models for row in made.rows(model, records[model])]
    columns = made.columns(rows)
    lines = [f"| {' | '.join(column.value(row) for column in columns)} |" for row in rows]
    # Pixels are the same for every model: they come once, last.
    lines = sorted(dict.fromkeys(lines), key=lambda line: line.startswith("| - |"))
    head = f"| {' | '.join(column.title for column in columns)} |"
    rule = f"|{'|'.join('---' if column.is_label else '---:' for column in columns)}|"
    facts = [_fact(words, places[place]) for words, place in made.facts.items()]
    text = f"Conditions: {'; '.join(filter(None, facts))}."
    wrapped = textwrap.fill(text, 100, break_long_words=False, break_on_hyphens=False)
    return "\n".join([head, rule, *lines, "", wrapped])


def _everywhere(records: Mapping[str, Mapping[str, Record]], place: str) -> dict[str, Any]:
    """The value at `file:a.b` for each model."""
    file, _, path = place.partition(":")
    return {model: at(records[model][file], path) for model in records}


def _require_equal(place: str, values: Mapping[str, Any]) -> None:
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


def _fact(words: str, values: Mapping[str, Any]) -> str:
    """A condition: one value for all models, or one for each; empty where there is none."""
    shown = {model: _shown(value) for model, value in values.items()}
    if not any(shown.values()):
        return ""
    if len(set(shown.values())) == 1:
        return f"{words} {next(iter(shown.values()))}"
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
    if not path.is_file():
        raise ValueError(f"no {path}; copy the JSON of a {kind} there, or take the marker out")
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
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
