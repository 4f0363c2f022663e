"""docs/tables.py, which is a script and no module of the package."""

import importlib.util
import shutil
from pathlib import Path

_SPEC = importlib.util.spec_from_file_location(
    "tables", Path(__file__).resolve().parents[2] / "docs" / "tables.py"
)
assert _SPEC is not None
assert _SPEC.loader is not None
tables = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(tables)


def cells(text):
    """Lines of a table, each as its cells."""
    return [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("|")]


def table_of(folder, kind, **files):
    """Rows of a table of what commands wrote, by title, and the text below it."""
    (folder / "results" / "real").mkdir(parents=True)
    for name, path in files.items():
        shutil.copy(path, folder / "results" / "real" / f"{name}.json")
    text = tables.table(kind, ["real"], folder / "results")
    head, _, *rows = cells(text)
    below = " ".join(text.partition("\nConditions: ")[2].split())
    return [dict(zip(head, row, strict=True)) for row in rows], below
