"""A trained model as others get it: its two files, and a card made from the run.

The card has only what was written down by training and evaluation: recipe and settings that differ
from it, data by name, numbers with their conditions. Places on this machine stay out of it.
"""

import json
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any

from mergevq.config.recipes import RECIPES
from mergevq.runtime.artefacts import CONFIG, WEIGHTS, hub_id, load_model, model_hash, resolve
from mergevq.runtime.environment import bundled_model, needing
from mergevq.runtime.files import atomic_directory, read_json, write_json
from mergevq.runtime.run import read_run_record
from mergevq.runtime.settings import changed_settings, to_json

_PLACES = ("out", "path", "val_path", "tokenizer", "tokens", "generator", "perceptual_path")
_PLACES += ("init_from", "init_vit")
"""Last names of settings that are places on a machine."""
_LOADING = {
    "tokenizer": "tokenizer = mergevq.Tokenizer.from_pretrained(\n"
    '    "{name}", revision="main"\n)\ntokens = tokenizer.encode(image)',
    "generator": "from mergevq.generator.build import load_generator\n\n"
    'generator = load_generator("{name}", revision="main")',
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Facts:
    """Everything that a card is made from, beside the model."""

    licence: str
    """Licence of the weights, as the hub names licences: `apache-2.0`."""
    run: Path | None = None
    """Directory of the training, or its `run.json`; None is the one around the model, if any."""
    evaluation: Path | None = None
    """`evaluation.json` of this model."""
    pictures: Sequence[Path] = ()
    """Shown on the card, and copied beside it."""


def write_publication(model: str | Path, name: str, facts: Facts, out: Path) -> Path:
    """Write what is published of a model into a folder: weights, settings, `README.md`, pictures.

    Args:
        model: directory, or name in the package.
        name: `owner/name` on the hub.
        facts: what the card says.
        out: the folder, which is replaced if it is there.

    Raises:
        ValueError: no such model, no such name or licence, or an evaluation of another model.
    """
    check_name(name)
    if not re.fullmatch(r"[a-z0-9][a-z0-9.-]*", facts.licence):
        raise ValueError(
            f"licence ({facts.licence!r}) must be a name as the hub has them, such as apache-2.0, "
            "cc-by-nc-4.0, or other"
        )
    directory = resolve(model)
    kind = read_json(directory / CONFIG).get("kind", "tokenizer")
    record = load_model(directory, kind=kind).record
    names = [path.name for path in facts.pictures]
    if len(set(names)) < len(names) or {WEIGHTS, CONFIG, "README.md"} & set(names):
        raise ValueError(f"pictures ({', '.join(names)}) must have names of their own")
    text = card(directory, record, name, facts)
    with atomic_directory(out) as partial:
        shutil.copyfile(directory / WEIGHTS, partial / WEIGHTS)
        raw = read_json(directory / CONFIG)
        write_json(partial / CONFIG, raw | {"extra": _elsewhere(raw["extra"])})
        for path in facts.pictures:
            shutil.copyfile(path, partial / path.name)
        (partial / "README.md").write_text(text, encoding="utf-8")
    return out


def upload(folder: Path, name: str) -> str:
    """Put a folder on the hub as a model, which is created if it is not there.

    Args:
        folder: from `write_publication`.
        name: `owner/name`.

    Returns:
        `owner/name@commit`, which `from_pretrained` takes.

    Raises:
        RuntimeError: the `hub` extra is not installed.
    """
    with needing("hub", f"publishing {name}"):
        from huggingface_hub import HfApi
    api = HfApi()
    api.create_repo(name, exist_ok=True)
    commit = api.upload_folder(
        repo_id=name, folder_path=folder, commit_message="Model and card, by mergevq"
    )
    return f"{name}@{commit.oid}"


def check_name(name: str) -> None:
    """Check the name of a model on the hub.

    Raises:
        ValueError: it is not `owner/name`.
    """
    if hub_id(f"{name}@main") is None:
        raise ValueError(f"name ({name}) must be owner/name, without a revision")


# ------------------------------------------------------------------------------------- the card


def card(directory: Path, record: Mapping[str, Any], name: str, facts: Facts) -> str:
    """Text of a model's card, in Markdown.

    Args:
        directory: of the model.
        record: its `config.json`, in today's format.
        name: `owner/name`.
        facts: see `Facts`.

    Raises:
        ValueError: the evaluation is of another model.
    """
    run = _run_of(directory, facts.run)
    kind = record["kind"]
    parts = [
        f"---\nlicense: {facts.licence}\nlibrary_name: mergevq\ntags:\n- mergevq\n- {kind}\n---",
        f"# {name.partition('/')[2]}",
        f"A {kind} of [MergeVQ](https://arxiv.org/abs/2504.00999): images as a few discrete tokens "
        "with a source map.",
        _table(["", ""], _rows(directory, record)),
        f"```python\nimport mergevq\n\n{_LOADING[kind].format(name=name)}\n```",
        f"**Licence.** The weights: {facts.licence}. The data have terms of their own.",
        f"**Data.** {_data(record, run)}",
        f"**Recipe.** {_recipe(run)}",
    ]
    if facts.evaluation is not None:
        parts.append(_numbers(directory, read_json(facts.evaluation), where=facts.evaluation))
    parts += [f"![{path.stem}]({path.name})" for path in facts.pictures]
    return "\n\n".join(parts) + "\n"


def _run_of(directory: Path, given: Path | None) -> dict[str, Any] | None:
    """The record of the training, which is beside the model where training wrote both."""
    path = directory.parent if given is None else given
    path = path / "run.json" if path.is_dir() else path
    return None if given is None and not path.is_file() else read_run_record(path)


def _rows(directory: Path, record: Mapping[str, Any]) -> list[list[str]]:
    """Size, tokens and hashes."""
    state = load_model(directory, kind=record["kind"]).state
    config = record["config"]
    grid = config.get("image_size") or config.get("grid_size")
    shape = " x ".join(map(str, grid)) + " cells" if isinstance(grid, list) else f"{grid} pixels"
    return [
        ["size", shape],
        ["tokens kept", f"{config['num_kept']}"],
        ["parameters", f"{sum(each.numel() for each in state.values()):,}"],
        ["steps", f"{record['extra'].get('step', 'not recorded')}"],
        ["SHA-256 of the weights", f"`{record['weights_sha256']}`"],
        ["model", f"`{model_hash(directory)}`"],
        ["made with", f"mergevq {record['versions']['mergevq']}, commit {record['git_commit']}"],
    ]


def _data(record: Mapping[str, Any], run: Mapping[str, Any] | None) -> str:
    """Data of the training, by name and never by place."""
    settings = {} if run is None else run["run"]
    place = settings.get("data", {}).get("path") or settings.get("tokens", {}).get("path")
    text = "Not recorded." if place is None else f"`{PurePath(place).name}`."
    made_from = record["extra"].get("made_from") or (run or {}).get("made_from") or {}
    if made_from.get("num_images"):
        text += f" {made_from['num_images']:,} images."
    if names := made_from.get("class_names"):
        text += f" {len(names)} classes: {', '.join(names[:10])}{', ..' * (len(names) > 10)}."
    return text


def _recipe(run: Mapping[str, Any] | None) -> str:
    """The recipe and the settings that differ from it; all of them where none is known."""
    if run is None:
        return "Not recorded: there is no `run.json`."
    words = str(run.get("command", "")).split()
    named = words[words.index("train") + 1] if "train" in words[:-1] else ""
    if named not in RECIPES:
        return f"None by name.\n\n```json\n{json.dumps(_elsewhere(run['run']), indent=1)}\n```"
    changed = changed_settings(to_json(RECIPES[named]()), run["run"])
    changed.pop("out", None)
    rows = []
    for setting, values in changed.items():
        name = setting.rpartition(".")[2]
        rows.append([f"`{setting}`", *(str(_elsewhere({name: each})[name]) for each in values)])
    if not rows:
        return f"`{named}`, as it is."
    return f"`{named}`, with these changes:\n\n{_table(['setting', 'recipe', 'here'], rows)}"


def _numbers(directory: Path, record: Mapping[str, Any], *, where: Path) -> str:
    """Numbers of an evaluation, with what they were measured on.

    Raises:
        ValueError: no evaluation of a model, or of another one.
    """
    model = record.get("model")
    measured = model["hash"] if isinstance(model, dict) else record.get("generator")
    if measured != model_hash(directory):
        raise ValueError(
            f"{where} has the numbers of model {measured} and this is {model_hash(directory)}; "
            "evaluate this one, or leave it out"
        )
    if "results" in record:
        columns = {
            f"K {result['num_kept']}, {source}": result[source]["metrics"]
            for result in record["results"]
            for source in ("given", "recovered")
            if result[source] is not None
        }
        data = record["data"]
        about = f"{data['num_images']:,} images of `{PurePath(data['path']).name}`, {data['crop']}."
    else:
        columns = {"samples": record["metrics"]}
        about = "Samples against the reference of the evaluation."
    names = list(dict.fromkeys(metric for each in columns.values() for metric in each))
    rows = [
        [column, *(_number(metrics.get(metric)) for metric in names)]
        for column, metrics in columns.items()
    ]
    return f"**Numbers.** {about}\n\n{_table(['', *names], rows)}"


def _number(value: float | None) -> str:
    """A number of a table; infinite ones are null in the record."""
    return "infinite" if value is None else f"{value:.4g}"


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table in Markdown."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _elsewhere(value: Any) -> Any:  # noqa: ANN401 - anything JSON can hold
    """A record without places on this machine: of each, only its last name."""
    if isinstance(value, dict):
        kept = {
            key: each for key, each in value.items() if key != "tokenizer_path" or _is_name(each)
        }
        return {
            key: PurePath(each).name if key in _PLACES and _is_place(each) else _elsewhere(each)
            for key, each in kept.items()
        }
    if isinstance(value, list):
        return [_elsewhere(each) for each in value]
    return PurePath(value).name if _is_place(value) and PurePath(value).is_absolute() else value


def _is_place(value: object) -> bool:
    """Whether a text has folders in it and is no name on the hub."""
    return isinstance(value, str) and len(PurePath(value).parts) > 1 and hub_id(value) is None


def _is_name(value: object) -> bool:
    """Whether a tokenizer is found by this name anywhere."""
    return isinstance(value, str) and (hub_id(value) or bundled_model(value)) is not None
