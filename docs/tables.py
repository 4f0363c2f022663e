"""Write the tables of README.md and docs/results.md from the JSON in docs/results.

`python docs/tables.py` replaces what stands between a line `<!-- table: KIND MODEL .. -->` and the
next `<!-- end -->`. A MODEL is a folder of docs/results that holds what the commands wrote:

- `reconstruction`, `reconstruction-short`: `reconstruction.json`, which is `evaluation.json` of
  `mergevq evaluate reconstruction`;
- `probe`: `probe_linear.json` and `probe_knn.json`, each `probe.json` of `mergevq probe`;
- `generation`: `generation.json`, which is `evaluation.json` of `mergevq evaluate generation`, and
  `generator.json`, which is `config.json` of that generator.

Every number, the names of the metrics and the conditions under a table come from these files, so
that no table says what was not measured. A table holds only what was measured alike.
"""

import hashlib
import json
import re
import sys
import textwrap
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

Record = Mapping[str, Any]
Columns = dict[str, Sequence[str]]

ROOT = Path(__file__).resolve().parents[1]
DOCUMENTS = ("README.md", "docs/results.md")
SOURCES = ("given", "recovered")

_MARKER = re.compile(r"(<!-- table:([^\n]*?)-->\n)(.*?)(<!-- end -->)", flags=re.DOTALL)
_OPENING = "<!-- table:"
_CLOSING = "<!-- end -->"
_BASELINES = ("raw pixels", "PCA of pixels")
"""How the rows of a probe begin that are no feature of the model."""
_USUAL_SAMPLING = {
    "guidance_schedule": "constant",
    "guidance_power": 2.0,
    "guidance_interval": [0.0, 1.0],
    "temperature": 1.0,
    "top_k": 0,
    "top_p": 1.0,
    # Of records of format 1, and of later ones.
    "budget": True,
    "num_steps": None,
    "passes": {"kind": "one", "budget": True},
}
"""Settings of sampling that a row need not tell."""


# -------------------------------------------------------------------------------- reconstruction


def reconstruction_table(records: Mapping[str, Record]) -> str:
    """Everything about reconstructions: a row for each model and K.

    Args:
        records: of `mergevq evaluate reconstruction`, by model.
    """
    rows = _reconstructions(records)
    results = [result for _, result in rows]
    bits = [result["bits"] for result in results]
    numbers = {"K": [str(result["num_kept"]) for result in results]}
    for kinds, digits in ((("psnr",), 2), (("ssim",), 3), (("lpips",), 3)):
        numbers |= _both_sources(results, kinds, digits)
    numbers |= _both_sources(results, ("frechet", "fid"), 2)
    numbers |= {
        "cells recovered": [_percent(result["source_accuracy"]) for result in results],
        "bits of tokens": [f"{each['tokens']:.0f}" for each in bits],
        "bits of source": [f"{each['source']:.1f}" for each in bits],
        "bits, total": [f"{each['total']:.1f}" for each in bits],
        "bits per pixel": [f"{each['per_pixel']:.3f}" for each in bits],
        "codes in use": [_percent(result["codebook"]["usage"]) for result in results],
        # Few tokens cannot be of many codes: without this a small K looks worse than it is.
        "of those attainable": [_percent(result["codebook"]["attained"]) for result in results],
    }
    table = _markdown({"model": [name for name, _ in rows]}, numbers)
    trunks = [[f"LPIPS: {each['lpips']['trunk']}"] for each in records.values() if each["lpips"]]
    return _captioned(table, [*_reconstruction_conditions(records), *_distinct(trunks)])


def short_reconstruction_table(records: Mapping[str, Record]) -> str:
    """The few numbers that tell most, each with its price in bits: a row for each model and K.

    Args:
        records: of `mergevq evaluate reconstruction`, by model.
    """
    rows = _reconstructions(records)
    results = [result for _, result in rows]
    numbers = {"K": [str(result["num_kept"]) for result in results]}
    numbers |= _both_sources(results, ("psnr",), 2)
    numbers |= _both_sources(results, ("frechet", "fid"), 2)
    numbers |= {
        "bits, given": [f"{result['bits']['total']:.0f}" for result in results],
        "bits, recovered": [f"{result['bits']['tokens']:.0f}" for result in results],
    }
    table = _markdown({"model": [name for name, _ in rows]}, numbers)
    return _captioned(table, _reconstruction_conditions(records))


def _reconstructions(records: Mapping[str, Record]) -> list[tuple[str, Record]]:
    """Each model and result, all tokens first.

    Raises:
        ValueError: the models were not measured alike.
    """
    alike = ("data.num_images", "data.pixels_sha256", "lpips", "extractor.sha256", "precision")
    _require_alike(records, alike)
    return [
        (f"`{name}`", result)
        for name, record in records.items()
        for result in sorted(record["results"], key=_num_kept, reverse=True)
    ]


def _num_kept(result: Record) -> int:
    """K."""
    return result["num_kept"]


def _both_sources(results: Sequence[Record], kinds: Sequence[str], digits: int) -> Columns:
    """A metric with the given and with the recovered source, where it was measured."""
    name = _metric([result[source] for result in results for source in SOURCES], kinds)
    if name is None:
        return {}
    title = {"psnr": "PSNR (dB)", "ssim": "SSIM", "lpips": "LPIPS"}.get(name, f"`{name}`")
    return {
        f"{title}, {source}": [_decimal(result[source], name, digits) for result in results]
        for source in SOURCES
    }


def _reconstruction_conditions(records: Mapping[str, Record]) -> list[str]:
    """What was measured, by what, as sentences."""
    first = next(iter(records.values()))
    data = first["data"]
    sentences = [
        f"{data['num_images']:,} images of {_file(data['path'])} at {data['image_size']} pixels, "
        f"{data['crop']}"
    ]
    if data["num_unreadable"]:
        sentences.append(f"{data['num_unreadable']:,} more cannot be read")
    if first["extractor"] is not None:
        sentences.append(f"Features: {_network(first['extractor'])}")
    sentences += [
        "Given: decoded with the encoder's source map, which has bits of its own",
        "Recovered: with the one inferred from the tokens alone, which needs no more bits",
    ]
    for name, record in records.items():
        model, config = record["model"], record["model"]["config"]
        sentences.append(
            f"`{name}`: model {model['hash'][:12]}, made for K = {config['num_kept']}, "
            f"{_bits(config)} bits a token, {2 ** _bits(config):,} codes"
        )
    return [*sentences, f"Model in {first['precision']}", _environments(records.values())]


def _bits(config: Mapping[str, Any]) -> int:
    """Bits of a token; settings of format 1 have no part of their own for the quantizer."""
    return config.get("quantizer", config)["num_bits"]


# ----------------------------------------------------------------------------------------- probe


def probe_table(linear: Mapping[str, Record], knn: Mapping[str, Record]) -> str:
    """What features know of classes, beside pixels: a row for each model and feature.

    Args:
        linear: records of `mergevq probe linear`, by model.
        knn: records of `mergevq probe knn`, of the same models and features.

    Raises:
        ValueError: they are of other models or features, or were not measured alike.
    """
    for records in (linear, knn):
        alike = ("data.train.sha256", "data.val.sha256", "run.method", "run.features.pixel_side")
        _require_alike(records, alike)
    features: list[tuple[str, ...]] = []
    baselines: list[tuple[str, ...]] = []
    for name, record in linear.items():
        _require_partners(name, record, knn[name])
        for one, other in zip(record["rows"], knn[name]["rows"], strict=True):
            shares = [one["accuracy"], *(entry["accuracy"] for entry in other["by_k"])]
            row = (one["name"], f"{one['dim']:,}", *map(_percent, shares))
            if one["name"].startswith(_BASELINES):
                baselines.append(("-", *row))
            else:
                features.append((f"`{name}`", *row))
    # Pixels are the same for every model: one row will do where the numbers are the same too.
    columns = list(zip(*features, *dict.fromkeys(baselines), strict=True))
    neighbours = [entry["k"] for entry in next(iter(knn.values()))["rows"][0]["by_k"]]
    titles = ["channels", "linear", *(f"{k} nearest neighbours" for k in neighbours)]
    table = _markdown(
        dict(zip(("model", "features"), columns[:2], strict=True)),
        dict(zip(titles, columns[2:], strict=True)),
    )
    return _captioned(table, _probe_conditions(linear, knn))


def _require_partners(name: str, linear: Record, knn: Record) -> None:
    """Check that two probes are of one model, the same images, and the same features.

    Raises:
        ValueError: they are not.
    """
    both = {f"{name}, linear": linear, f"{name}, knn": knn}
    _require_alike(both, ("model.sha256",))
    if not knn["run"]["method"]["leave_one_out"]:
        _require_alike(both, ("data.train.sha256", "data.val.sha256"))
    names = [[row["name"] for row in record["rows"]] for record in both.values()]
    if names[0] != names[1]:
        missing = sorted(set(names[0]) ^ set(names[1]))
        raise ValueError(
            f"the linear probe of {name} has {len(names[0])} features and the k-NN probe "
            f"{len(names[1])}; give both the same --num-kept, --stages, --pools and --layers: only "
            f"one has {'; '.join(missing) or 'this order'}"
        )


def _probe_conditions(linear: Mapping[str, Record], knn: Mapping[str, Record]) -> list[str]:
    """What was probed, on what, as sentences."""
    first, other = next(iter(linear.values())), next(iter(knn.values()))
    sentences = [_tested(first)]
    if other["run"]["method"]["leave_one_out"]:
        sentences.append(f"Neighbours: {_tested(other)}")
    chance = first["data"]["most_frequent_class_accuracy"]
    errors = [
        row["standard_error"]
        for record in (*linear.values(), *knn.values())
        for row in record["rows"]
    ]
    sentences += [
        f"{len(first['data']['class_names'])} classes",
        f"Always the most frequent class: {_percent(chance)}",
        f"Standard errors are at most {_percent(max(errors))}",
        f"Linear: {first['run']['method']['num_epochs']} epochs, rates chosen on held-out "
        "training images",
        f"Neighbours: votes at temperature {other['run']['method']['temperature']:g} of cosines",
    ]
    for name, record in linear.items():
        sentences.append(f"`{name}`: model {record['model']['sha256'][:12]}")
        if record["model"]["teacher"] is not None:
            sentences[-1] += f", class token aligned with: {record['model']['teacher']}"
        at_edge = sum(row["rate_at_edge"] for row in record["rows"])
        if at_edge:
            sentences[-1] += (
                f"; for {at_edge} of {len(record['rows'])} rows the lowest or highest rate tried "
                "was the best"
            )
    return [*sentences, _environments([*linear.values(), *knn.values()])]


def _tested(record: Record) -> str:
    """Which images a probe learned from and was tested on."""
    counts = [f"{record['data'][part]['num_images']:,}" for part in ("train", "val")]
    images, method = record["run"]["data"], record["run"]["method"]
    if method.get("leave_one_out"):
        return f"each of {counts[1]} images of {_file(images['path'])} by all others"
    if images["val_path"] is None:
        parts = f"{counts[0]} training and {counts[1]} test images of {_file(images['path'])}"
        return f"{parts}, held out by a hash of their names"
    return (
        f"{counts[0]} training images of {_file(images['path'])}, {counts[1]} test images of "
        f"{_file(images['val_path'])}"
    )


# ------------------------------------------------------------------------------------ generation


def generation_table(records: Mapping[str, Record], generators: Mapping[str, Record]) -> str:
    """What samples are worth: a row for each generator.

    Args:
        records: of `mergevq evaluate generation`, by generator.
        generators: what their `config.json` holds: an evaluation has no more than their hash.

    Raises:
        ValueError: a record is of another generator or of none, or they were not measured alike.
    """
    _require_alike(
        records,
        (
            "samples.num_images",
            "samples.size",
            "extractor.sha256",
            "reference.sha256",
            "classifier.sha256",
        ),
    )
    for name, record in records.items():
        _require_generator(name, record, generators[name])
    configs = [generators[name]["config"] for name in records]
    runs = [record["settings"]["run"] for record in records.values()]
    kept = [
        run["num_kept"] or config["num_kept"] for run, config in zip(runs, configs, strict=True)
    ]
    numbers: Columns = {"K": [str(count) for count in kept]}
    for kinds, digits in (
        (("frechet", "fid"), 2),
        (("class_score", "inception_score"), 2),
        (("precision",), 3),
        (("recall",), 3),
    ):
        name = _metric(records.values(), kinds)
        if name is not None:
            numbers[f"`{name}`"] = [_decimal(each, name, digits) for each in records.values()]
    if _metric(records.values(), ("class_accuracy",)) is not None:
        shares = [record["metrics"]["class_accuracy"] for record in records.values()]
        numbers["class accuracy"] = [_percent(share) for share in shares]
    labels = {
        "generator": [f"`{name}`" for name in records],
        "order": [_order(config["order"]) for config in configs],
        "sampling": [_sampling(run) for run in runs],
    }
    return _captioned(_markdown(labels, numbers), _generation_conditions(records))


def _require_generator(name: str, record: Record, generator: Record) -> None:
    """Check that samples are of a generator, and that its settings are beside them.

    Raises:
        ValueError: they are of another, or of none.
    """
    # As mergevq.runtime.artefacts.model_hash, which reads the weights too.
    identity = [generator["kind"], generator["config"], generator["weights_sha256"]]
    found = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()
    if record["generator"] != found:
        raise ValueError(
            f"generation.json of {name} is of generator {str(record['generator'])[:12]} and "
            f"generator.json beside it is of {found[:12]}; copy config.json of the generator that "
            "was evaluated there"
        )


def _order(order: str | Record) -> str:
    """Kind of an order, which was a word in format 1."""
    return order if isinstance(order, str) else order["kind"]


def _value(setting: object) -> object:
    """A setting as a cell shows it; of a part its own settings."""
    if not isinstance(setting, dict):
        return setting
    return " ".join(f"{name} {value}" for name, value in setting.items() if name != "kind")


def _sampling(run: Record) -> str:
    """How samples were drawn: guidance, and what else is not as usual."""
    settings = run["settings"]
    words = [f"guidance {settings['guidance_scale']:g}"]
    words += [
        f"{name.replace('_', ' ')} {_value(value)}"
        for name, value in settings.items()
        if name != "guidance_scale" and (name, value) not in _USUAL_SAMPLING.items()
    ]
    return ", ".join(words)


def _generation_conditions(records: Mapping[str, Record]) -> list[str]:
    """What was compared with what, as sentences."""
    first = next(iter(records.values()))
    reference, samples = first["reference"], first["samples"]
    # Files of other tools say nothing about themselves.
    count = f"{reference['num_images']:,} images" if "num_images" in reference else "statistics"
    height, width = samples["size"]
    sentences = [
        f"{samples['num_images']:,} samples of {width} x {height} pixels each, compared with "
        f"{count} of {_file(reference.get('data', reference['path']))}",
        f"Features: {_network(first['extractor'])}",
    ]
    if _metric([first], ("class_score",)) is not None:
        sentences.append(
            "The class score is the formula of the Inception score over the classes of this "
            "network, and no Inception score"
        )
    if first["classifier"] is not None:
        sentences.append(f"Class accuracy: {_network(first['classifier'])}")
    sentences += [f"Without {text}" for text in _distinct(r["left_out"] for r in records.values())]
    for name, record in records.items():
        run = record["settings"]["run"]
        sentences.append(
            f"`{name}`: generator {record['generator'][:12]}, tokenizer "
            f"{record['tokenizer'][:12]}, seed {run['seed']}, {run['weights']} weights"
        )
    return [*sentences, _environments(records.values())]


# ------------------------------------------------------------------------------ words and numbers


def _metric(parts: Iterable[Record], kinds: Sequence[str]) -> str | None:
    """What a metric is called that was measured: `psnr`, or `frechet_NAME` of an extractor."""
    for part in parts:
        for name in part["metrics"]:
            if not name.endswith("_std") and any(
                name == kind or name.startswith(f"{kind}_") for kind in kinds
            ):
                return name
    return None


def _decimal(part: Record, name: str, digits: int) -> str:
    """A number with fixed digits; infinite ones say so.

    Raises:
        ValueError: it was not measured.
    """
    if name in part["infinite"]:
        return "inf"
    if name not in part["metrics"]:
        raise ValueError(f"{name} was measured for some rows of a table only; measure it for all")
    return f"{part['metrics'][name]:.{digits}f}"


def _percent(share: float) -> str:
    """A share of all."""
    return f"{100 * share:.1f} %"


def _file(path: str) -> str:
    """Data by the name of the file or folder: where it lay on a machine tells readers nothing."""
    return f"`{Path(path).name}`"


def _network(network: Record) -> str:
    """A network by its name and file."""
    return f"`{network['name']}` ({network['sha256'][:12]})"


def _environments(records: Iterable[Record]) -> str:
    """On what, with which versions."""
    parts = []
    for record in records:
        there = record["environment"]
        commit = str(there["git_commit"])
        # The mark that files differed from the commit stays.
        code = commit[:12] + "-dirty" * commit.endswith("-dirty")
        parts.append([f"{there['device']}, torch {there['torch']}, commit {code}"])
    return f"Measured on: {'; '.join(_distinct(parts))}"


def _distinct(texts: Iterable[Iterable[str]]) -> list[str]:
    """Every text once, in order."""
    return list(dict.fromkeys(text for some in texts for text in some))


def _markdown(labels: Columns, numbers: Columns) -> str:
    """Columns as a table: labels to the left, numbers to the right."""
    columns = labels | numbers
    rules = ["---"] * len(labels) + ["---:"] * len(numbers)
    rows = zip(*columns.values(), strict=True)
    lines = [f"| {' | '.join(columns)} |", f"|{'|'.join(rules)}|"]
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in rows)])


def _captioned(table: str, sentences: Sequence[str]) -> str:
    """A table and its conditions below it."""
    # No sentence ends in a number: at the start of a line `1.` would begin a list.
    text = " ".join(f"{sentence[:1].upper()}{sentence[1:]}." for sentence in sentences)
    words = textwrap.fill(text, 100, break_long_words=False, break_on_hyphens=False)
    return f"{table}\n\n{words}"


def _require_alike(records: Mapping[str, Record], paths: Sequence[str]) -> None:
    """Check that records agree in what makes their numbers comparable.

    Raises:
        ValueError: they do not.
    """
    first, *others = records
    for path in paths:
        for other in others:
            one, two = _at(records[first], path), _at(records[other], path)
            if one != two:
                raise ValueError(
                    f"{path} of {other} ({two}) must be that of {first} ({one}): a table compares "
                    "only what was measured alike; measure both the same, or make two tables"
                )


def _at(record: Record, path: str) -> object:
    """The value at `a.b.c`; None where something above it is null."""
    value: Any = record
    for part in path.split("."):
        value = None if value is None else value[part]
    return value


# ------------------------------------------------------------------------------ files and markers


def read(results: Path, model: str, file: str, kind: str) -> Record:
    """Read what a command wrote about a model.

    Args:
        results: folder of all results.
        model: folder of one.
        file: name of the file.
        kind: what the file must be, such as `linear probe`.

    Raises:
        ValueError: it is not there, is no JSON, or is something else.
    """
    path = results / model / file
    if not path.is_file():
        raise ValueError(f"no {path}; copy the JSON of a {kind} there, or take the marker out")
    try:
        record = json.loads(path.read_text(encoding="utf-8"), parse_constant=_refuse)
    except ValueError as error:
        raise ValueError(f"{path} is not the JSON of a {kind}: {error}") from error
    found = " ".join(record[name] for name in ("method", "kind") if name in record)
    if found != kind:
        raise ValueError(f"{path} is the JSON of a {found} and must be that of a {kind}")
    return record


def _refuse(constant: str) -> float:
    """No number of a table is NaN.

    Raises:
        ValueError: always.
    """
    raise ValueError(f"{constant} is no number")


def _reconstruction(results: Path, models: Sequence[str]) -> str:
    """The table `reconstruction`."""
    return reconstruction_table(_read_reconstructions(results, models))


def _short_reconstruction(results: Path, models: Sequence[str]) -> str:
    """The table `reconstruction-short`."""
    return short_reconstruction_table(_read_reconstructions(results, models))


def _read_reconstructions(results: Path, models: Sequence[str]) -> dict[str, Record]:
    """Evaluations by model."""
    kind = "reconstruction evaluation"
    return {model: read(results, model, "reconstruction.json", kind) for model in models}


def _probe(results: Path, models: Sequence[str]) -> str:
    """The table `probe`."""
    return probe_table(
        {model: read(results, model, "probe_linear.json", "linear probe") for model in models},
        {model: read(results, model, "probe_knn.json", "knn probe") for model in models},
    )


def _generation(results: Path, models: Sequence[str]) -> str:
    """The table `generation`."""
    kind = "generation evaluation"
    return generation_table(
        {model: read(results, model, "generation.json", kind) for model in models},
        {model: read(results, model, "generator.json", "generator") for model in models},
    )


TABLES: Mapping[str, Callable[[Path, Sequence[str]], str]] = {
    "reconstruction": _reconstruction,
    "reconstruction-short": _short_reconstruction,
    "probe": _probe,
    "generation": _generation,
}


def rewritten(text: str, results: Path) -> str:
    """A document with its tables made again; the same text if they say what the JSON says.

    Args:
        text: of the document.
        results: folder of all results.

    Raises:
        ValueError: a marker is unknown, names no model or has no end, or its JSON is missing.
    """
    parts = [match.group(0) for match in _MARKER.finditer(text)]
    if not (text.count(_OPENING) == text.count(_CLOSING) == len(parts)) or any(
        part.count(_OPENING) > 1 for part in parts
    ):
        raise ValueError(
            f"{text.count(_OPENING)} tables begin ({_OPENING} ..) and {text.count(_CLOSING)} end "
            f"({_CLOSING}); each needs a line of its own before and after it"
        )
    return _MARKER.sub(lambda match: f"{match[1]}\n{_table(match[2], results)}\n\n{match[4]}", text)


def _table(words: str, results: Path) -> str:
    """What a marker asks for.

    Raises:
        ValueError: there is no such table, or it is of no model.
    """
    kind, *models = words.split() or [""]
    if kind not in TABLES:
        raise ValueError(f"no table '{kind}'; choose one of {', '.join(TABLES)}")
    if not models:
        raise ValueError(f"table '{kind}' needs models: <!-- table: {kind} MODEL .. -->")
    return TABLES[kind](results, models)


def main(root: Path = ROOT) -> None:
    """Write the tables of every document; all of them, or none if there is an error.

    Args:
        root: of the repository.
    """
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
