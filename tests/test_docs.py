"""The documents name what is there: functions of equations, modules of deviations, commands."""

import ast
import importlib
import re
import shlex
import textwrap
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from mergevq.cli.main import COMMANDS, GROUPS
from mergevq.config.generator import (
    GENERATOR_SIZES,
)
from mergevq.config.kinds import unions
from mergevq.config.parts import quantizers
from mergevq.config.recipes import RECIPES
from mergevq.config.training import DecoderRun, GeneratorRun, TokenizerRun
from mergevq.data.codes import check_values
from mergevq.tokenizer.near import near_level
from mergevq.tokenizer.quantizers import lfq
from tests.support.commands import unknown_options

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "mergevq"
MODULES = {
    ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__"): path
    for path in PACKAGE.rglob("*.py")
}


def read(name):
    return (ROOT / "docs" / name).read_text(encoding="utf-8")


def tables(name):
    """Each table of a document: its rows, as cells by the heading of their column."""
    found = re.findall(r"(?m)(?:^\|.*\n)+", read(name) + "\n")
    for table in found:
        heading, _, *rows = [
            [cell.strip() for cell in line.strip("|\n").split("|")] for line in table.splitlines()
        ]
        yield [dict(zip(heading, row, strict=True)) for row in rows]


def cells(name, column):
    """All cells of one column, of those tables that have it."""
    return [row[column] for table in tables(name) for row in table if column in row]


def quoted(text):
    return re.findall(r"`([^`]+)`", text)


def module_of(dotted):
    """The module that a dotted name begins with, and the names after it; "" if there is none."""
    names = dotted.split(".")
    for length in range(len(names), 0, -1):
        if ".".join(names[:length]) in MODULES:
            return ".".join(names[:length]), names[length:]
    return "", names


def is_there(dotted):
    """Whether `module.name` or `module.Class.name` leads to something, a field included."""
    module, names = module_of(dotted)
    place = importlib.import_module(f"mergevq.{module}") if module else None
    for name in names:
        fields = getattr(place, "__annotations__", {})
        if not hasattr(place, name) and name not in fields:
            return False
        place = getattr(place, name, None)
    return bool(module and names)


def kinds():
    """Kinds of each seam, by its name."""
    found = {}
    for union in (each for run in (TokenizerRun, GeneratorRun, DecoderRun) for each in unions(run)):
        found.setdefault(union.name.rpartition(".")[2], set()).update(union.members)
    return found


def neighbours():
    """Rows of the 57 systems."""
    return [row for table in tables("neighbours.md") for row in table if "#" in row]


def modules_that_differ():
    """Modules whose docstring says what they do otherwise than the paper or the authors' code."""
    for module in sorted(MODULES):
        tree = ast.parse(MODULES[module].read_text(encoding="utf-8"))
        if "\nDiffers: " in (ast.get_docstring(tree) or ""):
            yield module


def test_every_equation_leads_to_functions_that_exist():
    here = cells("method.md", "here")
    assert len(here) > 30
    for cell in here:
        assert quoted(cell), f"{cell!r} names no function"
        assert [name for name in quoted(cell) if not is_there(name)] == []


@pytest.mark.parametrize(
    "document", ["method.md", "deviations.md", "which.md", "adding-a-part.md", "neighbours.md"]
)
def test_a_document_names_nothing_of_a_module_that_is_not_there(document):
    rooms = {module.partition(".")[0] for module in MODULES}
    names = re.findall(r"`(?:mergevq\.)?((\w+)(?:\.\w+)+)[(`]", read(document))
    named = [name for name, first in names if first in rooms and name not in MODULES]
    assert [name for name in named if not is_there(name)] == []


def test_every_module_that_differs_has_a_deviation():
    assert set(modules_that_differ()) <= {
        name for cell in cells("deviations.md", "in") for name in quoted(cell)
    }


def test_every_deviation_has_a_reason_and_modules_that_exist():
    rows = [row for table in tables("deviations.md") for row in table]
    assert len(rows) > 60
    for row in rows:
        assert row["here"] not in {"", "-"}, row["what"]
        assert row["why"] not in {"", "-"}, row["what"]
        assert set(quoted(row["in"])) <= MODULES.keys(), row["what"]
        assert quoted(row["in"]), row["what"]


def test_generation_is_in_both_documents():
    for document in ("method.md", "deviations.md"):
        assert "\n## Generation\n" in read(document)


def test_sizes_are_those_of_the_config():
    rows = [row for table in tables("method.md") for row in table if "LlamaGen's" in row]
    assert [row["`config.generator.GENERATOR_SIZES`"] for row in rows] == ["B", "L", "XL", "XXL"]
    for row in rows:
        size = GENERATOR_SIZES[row["`config.generator.GENERATOR_SIZES`"]]
        blocks = row["blocks + blocks of the head"]
        assert blocks == f"{size.num_layers} + {size.num_head_layers} of width {size.dim:,}"


def test_the_part_that_is_added_as_an_example_works():
    of_settings, of_module = map(
        textwrap.dedent, re.findall(r"(?s)```python\n(.*?)```", read("adding-a-part.md"))
    )
    settings = dict(vars(quantizers))
    exec(of_settings, settings)
    names = {**vars(lfq), "settings": SimpleNamespace(**settings)}
    names |= {"check_values": check_values, "near_level": near_level}
    exec(of_module, names)
    with pytest.raises(ValueError, match=r"dim \(0\) must be"):
        settings["Ternary"](dim=0)
    quantizer = names["Ternary"](settings["Ternary"](dim=5))
    assert settings["Quantizer"] == quantizers.Quantizer | settings["Ternary"]
    latents = torch.tensor([[-2.0, -0.1, 0.0, 0.3, 3.0]], requires_grad=True)
    codes, of_token = quantizer(latents)
    assert codes.tolist() == [[-1, 0, 0, 0, 1]]
    assert of_token.tolist() == [[0, 1, 1, 1, 2]]
    assert torch.equal(quantizer.decode(of_token), codes)
    moved = quantizer.near(of_token, torch.full((1, 6), 0.95), torch.tensor(1.0))
    assert moved.tolist() == [[0, 1, 1, 1, 1]]
    quantizer.losses(latents[None])["commitment"].backward()
    assert latents.grad.count_nonzero() == 4


def test_adding_a_part_is_short_and_leads_to_the_neighbours():
    assert len(read("adding-a-part.md").splitlines()) <= 80
    assert "`docs/neighbours.md`" in read("adding-a-part.md")


def test_files_that_a_new_part_needs_are_there():
    paths = re.findall(r"`((?:mergevq|tests)/[\w/]+\.py)`", read("adding-a-part.md"))
    there = [path for path in paths if "ternary" not in path]
    assert len(there) > 3
    assert all((ROOT / path).is_file() for path in there)
    assert re.search(r"^_SMALL = ", (ROOT / "tests/support/parts.py").read_text(), re.MULTILINE)


def test_neighbours_have_the_numbers_1_to_57_once_each():
    assert sorted(int(row["#"]) for row in neighbours()) == list(range(1, 58))


def test_every_neighbour_is_a_part_that_is_here_or_not():
    others = {"loss", "teacher", "sampling", "training", "metric", "data", "none"}
    for row in neighbours():
        assert all(row.values()), row
        assert set(row["part"].split(", ")) <= kinds().keys() | others, row["system"]
        is_here = bool(quoted(row["here"]))
        assert is_here or row["here"] in {"not here yet", "no counterpart"}, row["system"]
        assert (row["here"] == "no counterpart") == (row["part"] == "none"), row["system"]


def test_kinds_recipes_commands_and_files_of_neighbours_exist():
    text, there = read("neighbours.md"), kinds()
    pairs = re.findall(rf"\b({'|'.join(there)}) `(\w+)`", text)
    assert len(pairs) > 10
    assert [(seam, kind) for seam, kind in pairs if kind not in there[seam]] == []
    names = {*RECIPES, *(kind for of_seam in there.values() for kind in of_seam)}
    for name in quoted(text):
        command, *words = name.split()
        if command == "mergevq":
            assert words[0] in COMMANDS or words[1] in GROUPS[words[0]], name
        else:
            assert name in names or (ROOT / name).is_file(), name


def test_commands_for_jobs_exist():
    commands = [text for cell in cells("which.md", "command") for text in quoted(cell)]
    words = [text.split() for text in commands if text.startswith("mergevq ")]
    assert len(words) > 10
    for _, name, *rest in words:
        assert name in COMMANDS or rest[0] in GROUPS[name], name
        if name == "train":
            assert rest[0] in {*RECIPES, "RECIPE"}


# ------------------------------------------------------------------- pages, links and code blocks


PAGES = sorted(
    path.relative_to(ROOT).as_posix()
    for path in (*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), *PACKAGE.rglob("*.md"))
)


def anchors(path):
    """Names of the headings of a page, as links have them."""
    text = re.sub(r"(?s)```.*?```", "", path.read_text(encoding="utf-8"))
    headings = re.findall(r"(?m)^#+ (.+)$", text)
    return {re.sub(r"[^\w\- ]", "", each).strip().lower().replace(" ", "-") for each in headings}


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_to_files_and_headings_that_are_there(page):
    text = re.sub(r"(?s)```.*?```|`[^`]*`", "", (ROOT / page).read_text(encoding="utf-8"))
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if target.startswith(("http://", "https://")):
            continue
        name, _, heading = target.partition("#")
        path = (ROOT / page).parent / name if name else ROOT / page
        assert path.exists(), target
        assert not heading or heading in anchors(path), target


@pytest.mark.parametrize("page", PAGES)
def test_blocks_of_python_parse(page):
    for block in re.findall(r"(?s)```python\n(.*?)```", (ROOT / page).read_text(encoding="utf-8")):
        ast.parse(textwrap.dedent(block))


def commands(page):
    """Command lines of a page, in blocks and in tables, as words after `mergevq`."""
    text = (ROOT / page).read_text(encoding="utf-8")
    blocks = "\n".join(re.findall(r"(?s)```bash\n(.*?)```", text))
    lines = re.sub(r"\\\n", " ", blocks).splitlines()
    lines += re.findall(r"`(mergevq [^`]+? --[^`]+)`", re.sub(r"(?s)```.*?```", "", text))
    for line in lines:
        words = shlex.split(line, comments=True)
        if "mergevq" in words:
            yield words[words.index("mergevq") + 1 :]


@pytest.mark.parametrize("page", PAGES)
def test_commands_have_options_that_are_there(page):
    for words in commands(page):
        assert words[0] in COMMANDS or words[1] in GROUPS[words[0]], words
        # Of the guide, `ternary` is the part that a reader adds.
        if (words[0] == "train" and words[1] not in RECIPES) or "ternary" in words:
            continue
        assert unknown_options(words) == [], page
