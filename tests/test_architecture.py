"""Rules that hold for the package as a whole, read from its source."""

import ast
import re
import subprocess
import sys
import zipfile
from functools import cache
from pathlib import Path

import pytest
from hatchling.builders.wheel import WheelBuilder

from mergevq.demo.site.site import PAGE
from mergevq.runtime.environment import bundled_models

REPOSITORY = Path(__file__).resolve().parents[1]
PACKAGE = REPOSITORY / "mergevq"
MODULES = sorted(
    path.relative_to(PACKAGE).with_suffix("").as_posix() for path in PACKAGE.rglob("*.py")
)
PYTHON_FILES = sorted(
    path.relative_to(REPOSITORY).as_posix()
    for folder in ("mergevq", "tests", "benchmarks", "docs")
    for path in (REPOSITORY / folder).glob("**/*.py")
)

ROOMS = {
    "cli",
    "config",
    "data",
    "demo",
    "evaluate",
    "generator",
    "metrics",
    "nn",
    "report",
    "runtime",
    "tokenizer",
    "training",
}
MAX_FILES = 12

# What an image passes through; it also runs on devices that know neither float64 nor complex.
MODEL_PATH = {
    "config/generator",
    "config/parts",
    "config/tokenizer",
    "data/codes",
    "data/layouts",
    "generator/autoregressive",
    "generator/decoding",
    "generator/drafts",
    "generator/heads",
    "generator/nat",
    "generator/network",
    "generator/orders",
    "generator/sampling",
    "generator/static",
    "nn",
    "tokenizer/bits",
    "tokenizer/decoders",
    "tokenizer/encoder",
    "tokenizer/expanders",
    "tokenizer/flows",
    "tokenizer/quantizers",
    "tokenizer/reducers",
    "tokenizer/stems",
    "tokenizer/tokenizer",
}
METHOD = (MODEL_PATH - {"config/generator", "config/parts", "config/tokenizer", "nn"}) | {
    "evaluate/compare",
    "evaluate/probe/features",
    "evaluate/probe/finetune",
    "evaluate/probe/knn",
    "evaluate/probe/linear",
    "metrics/codes",
    "metrics/frechet",
    "metrics/image",
    "metrics/lpips",
    "metrics/sets",
    "nn/blocks",
    "nn/conv",
    "nn/llama",
    "nn/positions",
    "tokenizer/losses",
}
TORCH_FREE = {"__init__", "__main__", "cli", "config", "runtime/environment"}
UNPICKLERS = {"tokenizer/interop"}
# Modules whose tests are among those of another: pieces that only work inside it.
TESTED_WITH = {
    "cli/images": "cli/main",
    "cli/options": "cli/evaluate",
    "config/base": "config/training",
    "config/objective": "config/training",
    "config/recipes/conditions": "config/recipes",
    "config/recipes/decoders": "config/recipes",
    "config/recipes/digits": "config/recipes",
    "config/recipes/holistic": "config/recipes",
    "config/recipes/images128": "config/recipes",
    "config/recipes/photos": "config/recipes",
    "config/recipes/scales": "config/recipes",
    "config/recipes/tiny64": "config/recipes",
    "config/parts/branches": "config/parts",
    "config/parts/conditions": "config/parts",
    "config/parts/decoders": "config/parts",
    "config/parts/expanders": "config/parts",
    "config/parts/flows": "config/parts",
    "config/parts/heads": "config/generator",
    "config/parts/orders": "config/generator",
    "config/parts/quantizers": "config/parts",
    "config/parts/reducers": "config/parts",
    "config/parts/regularizers": "config/parts",
    "config/parts/stems": "config/parts",
    "config/records": "config/evaluation",
    "generator/drafts/reader": "generator/drafts/decoder",
    "generator/network": "generator/autoregressive",
    "generator/orders/anchored": "generator/autoregressive",
    "generator/orders/random": "generator/autoregressive",
    "generator/orders/raster": "generator/autoregressive",
    "generator/seams": "generator/build",
    "generator/writing": "generator/generation",
    "nn/rows": "tokenizer/reducers/matching",
    "tokenizer/build": "contracts/parts",
    "tokenizer/decoders/cnn": "tokenizer/tokenizer",
    "data/tokens/dataset": "data/tokens/files",
    "demo/draw_tabs": "demo/tabs",
    "data/tokens/writing": "data/tokens/files",
    "tokenizer/encoder": "tokenizer/tokenizer",
    "tokenizer/export/graphs": "tokenizer/export/files",
    "tokenizer/expanders/mask_tokens": "tokenizer/reducers/queries",
    "tokenizer/expanders/scale_sum": "tokenizer/quantizers/grids/scales",
    "tokenizer/reducers/stages": "tokenizer/reducers/pool",
    "tokenizer/seams": "contracts/parts",
    "training/decoder/step": "training/decoder/run",
    "training/generator_step": "training/generator",
    "training/objective": "training/tokenizer",
    "training/tokenizer_step": "training/tokenizer",
    "training/posthoc/part": "training/posthoc/source",
}
NO_NOUN = re.compile(r'^\s*r?"""(Of|What|Whatever|Whoever)\b', re.MULTILINE)
"""Beginnings of docstrings that leave their noun to the reader."""
MAX_LINES = 600
MAX_FUNCTION_LINES = 60
"""Without its docstring."""
SCRIPTS = sorted(
    path.relative_to(REPOSITORY).as_posix()
    for folder in ("mergevq", "benchmarks", "docs")
    for path in (REPOSITORY / folder).glob("**/*.py")
)


def present(names):
    """Modules that are named, or lie in a folder that is; a folder's own docstring is not code."""
    return sorted(
        module
        for module in MODULES
        if module in names
        or (not module.endswith("/__init__") and names & {str(up) for up in Path(module).parents})
    )


def dotted(module):
    return ".".join(["mergevq", *(part for part in module.split("/") if part != "__init__")])


@cache
def nodes(module):
    source = (PACKAGE / f"{module}.py").read_text(encoding="utf-8")
    return tuple(ast.walk(ast.parse(source)))


def names_in(module):
    """Every name, attribute and keyword that the code mentions; prose does not count."""
    names = {node.id for node in nodes(module) if isinstance(node, ast.Name)}
    names |= {node.attr for node in nodes(module) if isinstance(node, ast.Attribute)}
    return names | {node.arg for node in nodes(module) if isinstance(node, ast.keyword)}


def methods_called(module):
    calls = [node.func for node in nodes(module) if isinstance(node, ast.Call)]
    return {call.attr for call in calls if isinstance(call, ast.Attribute)}


def imports_of(module):
    plain = [node.names for node in nodes(module) if isinstance(node, ast.Import)]
    sources = [node.module for node in nodes(module) if isinstance(node, ast.ImportFrom)]
    return {alias.name for names in plain for alias in names} | set(sources)


def torch_loads(module):
    return [
        node
        for node in nodes(module)
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "torch.load"
    ]


def test_the_package_has_twelve_rooms():
    # `bundled` holds models and no code.
    folders = {path.name for path in PACKAGE.iterdir() if path.is_dir()}
    folders -= {"__pycache__", "bundled"}
    assert folders == ROOMS


@pytest.mark.parametrize("room", sorted(ROOMS))
def test_a_room_has_at_most_twelve_files(room):
    for folder in [
        PACKAGE / room,
        *(path for path in (PACKAGE / room).rglob("*") if path.is_dir()),
    ]:
        files = {path.name for path in folder.glob("*.py")} - {"__init__.py"}
        assert len(files) <= MAX_FILES, folder


def has_tests(module):
    path = Path(TESTED_WITH.get(module, module))
    return (REPOSITORY / "tests" / path.parent / f"test_{path.name}.py").is_file()


def test_every_module_has_its_tests():
    assert [module for module in MODULES if "__" not in module and not has_tests(module)] == []


def test_a_docstring_begins_with_its_noun_or_a_verb():
    source = {path: (REPOSITORY / path).read_text(encoding="utf-8") for path in PYTHON_FILES}
    found = {path: NO_NOUN.findall(text) for path, text in source.items()}
    assert {path: words for path, words in found.items() if words} == {}


def test_a_docstring_without_its_noun_is_found_wherever_it_stands():
    source = '"""{} is here."""\nx = 1\n"""{}\nx."""\ndef f():\n    r"""{} f.\n\n    {} f."""\n'
    begun = ["What", "Of", "Whoever"]
    assert NO_NOUN.findall(source.format(*begun, "Of")) == begun
    assert NO_NOUN.findall(source.format("Whatnot", "Offers", "A", "Of")) == []


def test_source_is_ascii():
    assert [path for path in PYTHON_FILES if not (REPOSITORY / path).read_bytes().isascii()] == []


def test_a_module_can_be_read_in_one_sitting():
    lines = {
        module: len((PACKAGE / f"{module}.py").read_text(encoding="utf-8").splitlines())
        for module in MODULES
    }
    assert {module: count for module, count in lines.items() if count > MAX_LINES} == {}


def lines_without_docstring(function):
    count = function.end_lineno - function.lineno + 1
    if ast.get_docstring(function) is None:
        return count
    text = function.body[0]
    return count - (text.end_lineno - text.lineno + 1)


@pytest.mark.parametrize("path", SCRIPTS)
def test_a_function_fits_on_a_screen(path):
    tree = ast.parse((REPOSITORY / path).read_text(encoding="utf-8"))
    functions = [
        node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    ]
    counts = [(each.name, lines_without_docstring(each)) for each in functions]
    assert [(name, count) for name, count in counts if count > MAX_FUNCTION_LINES] == []


def test_a_docstring_is_not_counted_as_a_part_of_its_function():
    (bare, told) = ast.parse(
        'def bare():\n    pass\n\ndef told():\n    """One.\n\n    Two.\n    """\n    pass\n'
    ).body
    assert (lines_without_docstring(bare), lines_without_docstring(told)) == (2, 2)


def test_no_function_swallows_misspelt_arguments():
    functions = [
        (module, node.lineno)
        for module in MODULES
        for node in nodes(module)
        if isinstance(node, ast.FunctionDef | ast.Lambda) and node.args.kwarg
    ]
    assert functions == []


def test_modules_are_called_not_their_forward():
    assert [module for module in MODULES if "forward" in methods_called(module)] == []


def test_the_device_is_always_the_callers_choice():
    assert [module for module in MODULES if "cuda" in methods_called(module)] == []


def test_every_parameter_takes_part_in_every_step():
    assert [module for module in MODULES if "find_unused_parameters" in names_in(module)] == []


def test_the_model_path_stays_within_single_precision():
    wide = {"float64", "double", "complex64", "complex128", "polar", "view_as_complex"}
    assert [module for module in present(MODEL_PATH) if names_in(module) & wide] == []


def test_method_code_cites_its_source():
    docstrings = {module: ast.get_docstring(nodes(module)[0]) for module in present(METHOD)}
    assert [name for name, text in docstrings.items() if "Source: " not in (text or "")] == []


def test_nothing_else_unpickles():
    picklers = {"pickle", "cloudpickle", "dill", "joblib"}
    others = sorted(set(MODULES) - UNPICKLERS)
    assert [module for module in others if torch_loads(module)] == []
    assert [module for module in others if imports_of(module) & picklers] == []


@pytest.mark.parametrize("module", present(UNPICKLERS))
def test_unpickling_yields_only_tensors(module):
    for call in torch_loads(module):
        assert "weights_only=True" in [ast.unparse(keyword) for keyword in call.keywords]


def test_one_module_talks_to_other_processes():
    talking = [
        module
        for module in MODULES
        if any(name.startswith("torch.distributed") for name in imports_of(module))
    ]
    assert talking == ["runtime/distributed"]


def test_help_does_not_wait_for_torch():
    # One process for all: the first module after which torch is there is the one that imports it.
    code = (
        "import importlib, sys\n"
        f"for module in {[dotted(module) for module in present(TORCH_FREE)]}:\n"
        " importlib.import_module(module)\n"
        " if 'torch' in sys.modules: sys.exit('torch for ' + module)"
    )
    finished = subprocess.run(
        [sys.executable, "-c", code], cwd=REPOSITORY, check=False, capture_output=True, text=True
    )
    assert finished.returncode == 0, finished.stderr


def test_imports_go_downwards_through_the_layers():
    # In a process of its own: importing the linter switches off every logger there is.
    code = (
        "from importlinter.cli import lint_imports as lint; raise SystemExit(lint(no_cache=True))"
    )
    command = [sys.executable, "-c", code]
    finished = subprocess.run(command, cwd=REPOSITORY, check=False, capture_output=True, text=True)
    assert "0 broken" in finished.stdout
    assert finished.returncode == 0, finished.stdout


def test_the_wheel_contains_every_module_and_nothing_else(tmp_path):
    (wheel,) = WheelBuilder(str(REPOSITORY)).build(directory=str(tmp_path), versions=["standard"])
    with zipfile.ZipFile(wheel) as archive:
        files = {Path(name) for name in archive.namelist()}
    modules = {file for file in files if ".dist-info" not in file.parts[0]}
    models = {
        Path("mergevq", "bundled", each.name, name)
        for each in bundled_models()
        for name in ("config.json", "model.safetensors", "README.md")
    }
    assert modules == {Path("mergevq", f"{module}.py") for module in MODULES} | models | {
        Path("mergevq", "py.typed"),
        Path("mergevq", "report", "page.html"),
        *(Path("mergevq", "demo", "site", name) for name in PAGE),
    }
    assert {"LICENSE", "THIRD_PARTY.md"} <= {file.name for file in files - modules}


@pytest.mark.slow
def test_every_module_of_the_wheel_imports_alone(tmp_path):
    (wheel,) = WheelBuilder(str(REPOSITORY)).build(directory=str(tmp_path), versions=["standard"])
    imports = "; ".join(
        f"import {dotted(module)}" for module in MODULES if "__main__" not in module
    )
    code = f"import sys; sys.path.insert(0, {str(wheel)!r}); {imports}"
    finished = subprocess.run(
        [sys.executable, "-I", "-c", code],
        cwd=tmp_path,
        check=False,
        capture_output=True,
        text=True,
    )
    assert finished.returncode == 0, finished.stderr
    assert finished.stderr == ""
