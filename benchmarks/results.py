"""Measure again what the documents say of the models that come with the package.

    python -m benchmarks.results FOLDER

Each evaluation in docs/results of a model of `mergevq models` is run by its own command, in FOLDER,
where its data and weights lie by the names that the command has (`imagenette64-val.parquet`,
`weights/lpips_alex.safetensors`, ..). Rows of tables made of both are compared as they are printed,
and the exit status is 1 where a digit differs.
"""

import importlib.util
import json
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

from mergevq.runtime.environment import bundled_model

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "docs" / "results"
KINDS = {"reconstruction": "reconstruction", "generation": "generation"}
"""Kind of table by the name of the file that it is made of."""


class Evaluation(NamedTuple):
    """Measurement that is repeated."""

    model: str
    """Folder of docs/results."""
    file: str
    """Name of the JSON, without its ending."""
    command: list[str]
    """Words of the command that wrote it, without the place that it wrote to."""


def evaluations(results: Path) -> Iterator[Evaluation]:
    """Evaluations of models of the package."""
    for path in sorted(results.glob("*/*.json")):
        if path.stem not in KINDS:
            continue
        words = shlex.split(json.loads(path.read_text(encoding="utf-8"))["command"])
        out = words.index("--out")
        subject = words[words.index("--generator" if "--generator" in words else "--model") + 1]
        if bundled_model(subject) is not None:
            yield Evaluation(path.parent.name, path.stem, words[:out] + words[out + 2 :])


def load_tables() -> ModuleType:
    """docs/tables.py, which is a script and no module of a package."""
    spec = importlib.util.spec_from_file_location("tables", ROOT / "docs" / "tables.py")
    if spec is None or spec.loader is None:
        raise ImportError("docs/tables.py cannot be loaded")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def rows(tables: ModuleType, evaluation: Evaluation, results: Path) -> list[str]:
    """Lines of the table of one evaluation, without its conditions."""
    text = tables.table(KINDS[evaluation.file], [evaluation.model], results)
    return [line for line in text.splitlines() if line.startswith("|")]


def differences(
    tables: ModuleType, evaluation: Evaluation, written: Path, again: Path
) -> Iterator[str]:
    """Lines that are printed otherwise, the old one before the new one."""
    pairs = zip(rows(tables, evaluation, written), rows(tables, evaluation, again), strict=True)
    for old, new in pairs:
        if old != new:
            yield f"{evaluation.model}:\n- {old}\n+ {new}"


def main(arguments: list[str]) -> int:
    """Run every evaluation again and print what differs."""
    (folder,) = arguments
    tables, found = load_tables(), []
    with tempfile.TemporaryDirectory() as temporary:
        for evaluation in evaluations(RESULTS):
            place = Path(temporary, evaluation.model)
            place.mkdir(exist_ok=True)
            command = [*evaluation.command, "--out", str(place / "run")]
            print(shlex.join(command), flush=True)
            subprocess.run([sys.executable, "-m", *command], cwd=folder, check=True)
            (place / "run" / "evaluation.json").rename(place / f"{evaluation.file}.json")
            for other in (RESULTS / evaluation.model).glob("*.json"):
                if not (place / other.name).exists():
                    (place / other.name).write_bytes(other.read_bytes())
            found += differences(tables, evaluation, RESULTS, Path(temporary))
    print("\n".join(found) or "every printed digit is the same")
    return bool(found)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
