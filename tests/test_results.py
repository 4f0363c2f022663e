"""The tables of the documents are made of the JSON in docs/results, which commands wrote."""

import ast
import json
import shutil
import sys
from pathlib import Path

import pytest

from tests.support.tables import cells, tables

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "docs" / "results"


@pytest.fixture
def results(tmp_path):
    """A copy of the results, which a test may spoil."""
    return Path(shutil.copytree(RESULTS, tmp_path / "docs" / "results"))


def change(file, place, value):
    """Write one value of a record anew."""
    record = json.loads(file.read_text(encoding="utf-8"))
    *parents, last = place.split(".")
    part = record
    for parent in parents:
        part = part[int(parent) if isinstance(part, list) else parent]
    part[last] = value
    file.write_text(json.dumps(record), encoding="utf-8")


@pytest.mark.parametrize("name", tables.DOCUMENTS)
def test_tables_say_what_the_json_says(name):
    text = (ROOT / name).read_text(encoding="utf-8")
    assert tables.rewritten(text, RESULTS) == text, "run: python docs/tables.py"


def test_the_script_needs_python_alone():
    tree = ast.parse((ROOT / "docs" / "tables.py").read_text(encoding="ascii"))
    plain = [node.names for node in ast.walk(tree) if isinstance(node, ast.Import)]
    imported = {alias.name for names in plain for alias in names}
    imported |= {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert {name.split(".")[0] for name in imported} <= sys.stdlib_module_names


def test_a_changed_value_is_seen_in_its_cell_alone(results):
    before = tables.table("reconstruction", ["photos64"], results)
    change(results / "photos64" / "reconstruction.json", "results.0.bits.source", 7.25)
    head, _, row, *_ = cells(tables.table("reconstruction", ["photos64"], results))
    changed = [i for i, cell in enumerate(cells(before)[2]) if cell != row[i]]
    assert [(head[i], row[i]) for i in changed] == [("bits of source", "7.2")]


def test_cells_have_the_digits_and_words_of_their_columns(results):
    file = results / "photos64" / "reconstruction.json"
    change(file, "results.0.given.metrics.psnr", None)
    change(file, "results.0.recovered.metrics.ssim", 0.12345)
    change(file, "results.0.source_accuracy", 0.6254)
    change(file, "results.0.bits.tokens", 2592.4)
    head, _, row, *_ = cells(tables.table("reconstruction", ["photos64"], results))
    shown = dict(zip(head, row, strict=True))
    assert shown["PSNR (dB), given"] == "inf"
    assert shown["SSIM, recovered"] == "0.123"
    assert shown["cells recovered"] == "62.5 %"
    assert shown["bits of tokens"] == "2592"


def test_a_value_that_one_model_alone_has_is_a_dash_for_the_other(results):
    for place in ("data", "lpips", "extractor", "precision"):
        record = json.loads((results / "tiny64_gr" / "reconstruction.json").read_text("utf-8"))
        change(results / "photos64" / "reconstruction.json", place, record.get(place))
    text = tables.table("reconstruction-short", ["photos64", "tiny64_gr"], results)
    head, _, *rows = cells(text)
    coded = [row[head.index("bits of source as coded")] for row in rows]
    assert "-" not in coded[:4]
    assert set(coded[4:]) == {"-"}
    assert "\nConditions: images 3925; of `imagenette64-val.parquet`; side in pixels 64;" in text


def test_pixels_have_one_row_for_all_models(results):
    for name in ("probe_linear.json", "probe_knn.json"):
        shutil.copy(results / "tiny64_gr" / name, results / "photos64" / name)
    rows = cells(tables.table("probe", ["tiny64_gr", "photos64"], results))
    assert [row[:2] for row in rows].count(["-", "raw pixels"]) == 1
    assert rows[-1][0] == "-"
    assert {row[0] for row in rows[2:]} == {"`tiny64_gr`", "`photos64`", "-"}


def test_writing_twice_changes_nothing_and_an_error_leaves_all_alone(results):
    root = results.parents[1]
    body = "Before.\n<!-- table: probe tiny64_gr -->\nold\n<!-- end -->\nAfter.\n"
    document, other = root / "docs" / "results.md", root / "README.md"
    document.write_text(body, encoding="utf-8")
    other.write_text("<!-- table: probe nobody -->\n<!-- end -->\n", encoding="utf-8")
    with pytest.raises(ValueError, match=r"no .*nobody"):
        tables.main(root)
    assert document.read_text(encoding="utf-8") == body
    other.write_text("No table.\n", encoding="utf-8")
    tables.main(root)
    first = document.read_text(encoding="utf-8")
    tables.main(root)
    assert document.read_text(encoding="utf-8") == first
    assert first.startswith("Before.\n<!-- table")
    assert first.endswith("<!-- end -->\nAfter.\n")
    assert "old" not in first


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("<!-- table: nonsense a -->\n<!-- end -->", "needs one of reconstruction, "),
        ("<!-- table: probe -->\n<!-- end -->", "needs one of"),
        ("<!-- table: probe tiny64_gr -->\n", r"1 tables begin .* and 0 end"),
        (
            "<!-- table: probe a -->\n<!-- table: probe a -->\n<!-- end -->\n<!-- end -->",
            "2 tables begin",
        ),
        ("<!-- table: probe photos64 -->\n<!-- end -->", r"no .*probe_linear.json; copy the JSON"),
    ],
)
def test_a_marker_that_cannot_be_filled_is_an_error(text, message):
    with pytest.raises(ValueError, match=message):
        tables.rewritten(text, RESULTS)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{}", "is the JSON of a  and must"),
        ('{"kind": "probe", "method": "linear"}', "of a linear probe and must be that of a recon"),
        ("{", "is not the JSON of a reconstruction evaluation"),
    ],
)
def test_json_of_something_else_is_an_error(results, content, message):
    (results / "photos64" / "reconstruction.json").write_text(content, "utf-8")
    with pytest.raises(ValueError, match=message):
        tables.table("reconstruction", ["photos64"], results)


@pytest.mark.parametrize(
    ("words", "file", "place", "value"),
    [
        ("reconstruction tiny64_gr tiny64_recovered", "reconstruction", "data.num_images", 1),
        ("reconstruction-short tiny64_gr tiny64_recovered", "reconstruction", "extractor", None),
        ("probe tiny64_gr", "probe_knn", "model.sha256", "1"),
        ("probe tiny64_gr", "probe_knn", "data.val.sha256", "1"),
        ("probe tiny64_gr", "probe_knn", "rows", []),
        ("generation tiny64_mergear tiny64_raster", "generation", "classifier", {"sha256": "1"}),
        ("generation tiny64_mergear", "generator", "weights_sha256", "1"),
    ],
)
def test_what_was_not_measured_alike_is_not_put_together(results, words, file, place, value):
    kind, *models = words.split()
    change(results / models[0] / f"{file}.json", place, value)
    with pytest.raises(ValueError, match=r"must be that of .* measured alike"):
        tables.table(kind, models, results)
