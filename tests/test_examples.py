"""The examples run on a CPU, print one line, and draw what they say."""

import ast
import re
import runpy
from pathlib import Path

import pytest
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
# Others are of people who have an export and not this package.
EXAMPLES = sorted(
    path.stem
    for path in (ROOT / "examples").glob("*.py")
    if path.read_text(encoding="utf-8").startswith("# %%")
)
QUICK = "frozen_tokenizer_in_a_plain_loop"


def run(name, tmp_path, monkeypatch, capsys):
    """Run an example in an empty folder; the last line it prints."""
    pytest.importorskip("sklearn", reason="the digits need the quickstart extra")
    monkeypatch.chdir(tmp_path)
    runpy.run_path(str(ROOT / "examples" / f"{name}.py"), run_name="__main__")
    return capsys.readouterr().out.splitlines()[-1]


@pytest.mark.parametrize("name", EXAMPLES)
def test_an_example_is_a_short_notebook(name):
    text = (ROOT / "examples" / f"{name}.py").read_text(encoding="utf-8")
    assert len(text.splitlines()) < 80
    cells = re.split(r"(?m)^# %%", text)
    assert cells[0] == ""
    assert cells[1].startswith(" [markdown]\n# # ")
    for cell in cells[1:]:
        kind, _, body = cell.partition("\n")
        ast.parse(body)
        if kind == " [markdown]":
            assert not re.search(r"(?m)^[^#\n]", body), body


@pytest.mark.parametrize("name", EXAMPLES)
def test_an_example_opens_as_a_notebook_with_the_same_code(name):
    jupytext = pytest.importorskip("jupytext", reason="notebooks are read with jupytext")
    text = (ROOT / "examples" / f"{name}.py").read_text(encoding="utf-8")
    notebook = jupytext.read(ROOT / "examples" / f"{name}.py")
    kinds = [cell.cell_type for cell in notebook.cells]
    assert len(kinds) == len(re.findall(r"(?m)^# %%", text))
    assert kinds[0] == "markdown"
    assert kinds.count("code") >= 2
    assert notebook.cells[0].source.startswith("# ")
    code = [cell.source for cell in notebook.cells if cell.cell_type == "code"]
    assert all(code)
    assert ast.dump(ast.parse("\n".join(code))) == ast.dump(ast.parse(text))


def test_the_readme_has_a_line_for_each_example():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    section = readme.partition("## Examples\n")[2].partition("\n## ")[0]
    assert sorted(re.findall(r"\(examples/(\w+)\.py\)", section)) == EXAMPLES


def test_a_frozen_tokenizer_serves_a_plain_loop(tmp_path, monkeypatch, capsys):
    assert int(run(QUICK, tmp_path, monkeypatch, capsys).partition("%")[0]) > 50


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in EXAMPLES if name != QUICK])
def test_an_example_runs(name, tmp_path, monkeypatch, capsys):
    said = run(name, tmp_path, monkeypatch, capsys)
    if share := re.search(r"(\d+)%", said):
        assert int(share[1]) > 70
    place = tmp_path / "runs" / "examples" / name
    pictures = list(place.glob("*.png"))
    assert len(pictures) == (name != "tokens_for_a_classifier")
    for path in pictures:
        with Image.open(path) as picture:
            assert min(picture.size) > 128
            assert len(picture.convert("L").getcolors()) > 2
