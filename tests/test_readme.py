"""The README's code blocks run as they stand, on a folder of images made here."""

import importlib
import operator
import re
import shlex
import socket
import subprocess
import sys
import tomllib
import urllib.request
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mergevq.cli.main import main

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
# What makes the trainings of the README end in seconds; nothing else is changed.
SHORT = {
    "photos64": shlex.split(
        "--model.image-size 32 --model.stem.num-groups 8 --model.reducer.num-layers 3 "
        "--model.reducer.num-heads 2 --model.decoder.width 16 --model.decoder.blocks ca "
        "--model.expander.dim 16 --model.expander.num-heads 2 --model.num-kept 40 "
        "--kept.candidates 32 40 64 --train.eval-num-kept 40 "
        "--train.num-steps 2 --train.batch-size 2 "
        "--data.num-workers 0 --train.num-eval-images 2 --loss.perceptual-weight 0"
    ),
    "photos64_mergear": shlex.split(
        "--model.grid-size 8 8 --model.dim 16 --model.num-layers 1 --model.num-heads 2 "
        "--model.ffn-dim 16 --model.num-kept 40 --model.kept-candidates 40 --kept.candidates 40 "
        "--train.num-steps 2 --train.batch-size 2 --train.num-eval-images 2 "
        "--train.eval-num-kept 40"
    ),
}
# The short model has 64 tokens, so the README's K become K of its own.
TOKENS = {"64": "32", "144": "40", "196": "48", "256": "64"}


def blocks(language: str) -> list[str]:
    """Code blocks of one language."""
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


def commands() -> list[list[str]]:
    """Shell lines, without comments, as words."""
    lines = "\n".join(blocks("bash")).splitlines()
    return [words for line in lines if (words := shlex.split(line, comments=True))]


@pytest.fixture
def photos(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("cats", "dogs"):
        folder = tmp_path / "photos" / name
        folder.mkdir(parents=True)
        for number in range(12):
            picture = Image.effect_noise((40, 36), 40 + number).convert("RGB")
            picture.save(folder / f"{number}.jpg")


def test_the_readme_has_the_blocks_that_are_tested():
    assert [words[0] for words in commands()] == ["make"] * 2 + ["pip"] + ["mergevq"] * 10
    assert len(blocks("python")) == 1


def test_make_targets_exist():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for words in commands():
        if words[0] == "make":
            assert re.search(rf"^{words[1]}:", makefile, flags=re.MULTILINE), words


def test_extras_exist():
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    for words in commands():
        if words[0] == "pip":
            extra = re.fullmatch(r"\.\[(\w+)\]", words[-1])
            assert extra is not None
            assert re.search(rf"^{extra[1]} = \[", project, flags=re.MULTILINE)


@pytest.mark.slow
@pytest.mark.usefixtures("photos")
def test_commands_and_python_run_one_after_the_other(monkeypatch):
    monkeypatch.setenv("OMP_WAIT_POLICY", "PASSIVE")
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    for _, *words in [words for words in commands() if words[0] == "mergevq"]:
        # The page is served until it is stopped; test_app.py asks it.
        if words[0] != "demo":
            recipe = words[1] if words[0] == "train" else ""
            assert main([*(TOKENS.get(word, word) for word in words), *SHORT.get(recipe, [])]) == 0
    exec(compile(blocks("python")[0].replace("144", "40"), "README.md", "exec"), {})
    for name in ("again.png", "from_tokens_alone.png"):
        with Image.open(name) as image:
            # The nearest size to the trained one that is a multiple of the patch.
            assert image.size == (32, 32)
    with Image.open("reconstructions/0.png") as image:
        assert image.width > 4 * 40
    with Image.open("again/0.png") as again, Image.open("photos/cats/0.jpg") as given:
        assert again.size == given.size
    assert len(list(Path("samples").glob("0*.png"))) == 16
    assert Path("runs/photos/evaluation/rate_distortion.png").is_file()


def draw_photo(number):
    """A smooth picture of some size: two colours that blend, and a disc."""
    numbers = np.random.default_rng(number)
    width, height = numbers.integers(80, 160, 2)
    x, y = np.meshgrid(np.linspace(0, 1, width), np.linspace(0, 1, height))
    first, second, third = numbers.integers(0, 256, (3, 3))
    angle = numbers.uniform(0, 2 * np.pi)
    share = (0.5 + 0.5 * np.sin(4 * (x * np.cos(angle) + y * np.sin(angle))))[..., None]
    pixels = share * first + (1 - share) * second
    centre = numbers.uniform(0.3, 0.7, 2)
    pixels[np.hypot(x - centre[0], y - centre[1]) < numbers.uniform(0.1, 0.3)] = third
    return Image.fromarray(pixels.astype(np.uint8))


def run_as_written(words, *more):
    """A command of the README in a process of its own; fails with what it printed."""
    done = subprocess.run(
        [sys.executable, "-m", *words, *more], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, f"{shlex.join(words)}: {done.stderr}"
    return done.stdout


def fetch_page(words):
    """The page that a command serves, once."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    command = [sys.executable, "-u", "-m", *words, "--port", str(port)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as page:
        try:
            address = re.search(
                r"http://\S+", next(line for line in page.stdout if "page:" in line)
            )
            with urllib.request.urlopen(address[0], timeout=60) as answer:
                return answer.read().decode()
        finally:
            page.terminate()


@pytest.mark.slow
def test_commands_run_as_they_stand_on_500_pictures(tmp_path, monkeypatch):
    pytest.importorskip("gradio", reason="the web page needs the demo extra")
    monkeypatch.chdir(tmp_path)
    for number in range(500):
        place = tmp_path / "photos" / ("cats", "dogs")[number % 2]
        place.mkdir(parents=True, exist_ok=True)
        draw_photo(number).save(place / f"{number // 2}.jpg")
    for words in commands():
        if words[0] != "mergevq":
            continue
        if words[1] == "train":
            # The schedules end when the time does, so nothing but the length is different.
            run_as_written(words, "--train.max-minutes", "0.5")
        elif words[1] == "demo":
            assert "MergeVQ" in fetch_page(words)
        else:
            run_as_written(words)
    runs = tmp_path / "runs"
    assert (runs / "photos/evaluation/rate_distortion.png").is_file()
    assert (runs / "photos/knn/probe.json").is_file()
    assert len(list((tmp_path / "samples").glob("0*.png"))) == 16


def tree():
    """The tree of folders and files."""
    return README[README.index("```\nmergevq/\n") :].split("```")[1]


def test_the_tree_names_every_room():
    rooms = {path.parent.name for path in (ROOT / "mergevq").rglob("__init__.py")}
    assert rooms <= set(re.findall(r"(\w+)/", tree()))


def test_the_tree_has_the_rooms_in_the_order_of_their_imports_with_a_line_each():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    contracts = project["tool"]["importlinter"]["contracts"]
    layers = next(contract["layers"] for contract in contracts if contract["type"] == "layers")
    package = tree().split("tests/")[0].splitlines()[2:]
    rooms = [re.match(r"  (\w+)/ +\S", line) for line in package if line]
    assert None not in rooms
    assert ["__main__", *(room[1] for room in rooms)] == layers


def test_files_of_the_tree_exist():
    folder = ROOT
    for indent, name in re.findall(r"(?m)^(  )?([\w./-]+)", tree()):
        folder = folder if indent else ROOT / name
        assert (folder / name if indent else folder).exists(), name


def test_two_hours_of_reading_lead_to_files_and_names_that_exist():
    rows = re.findall(r"(?m)^\| (\d+) \| `mergevq/(\S+)\.py` \| (.+) \|$", README)
    assert len(rows) > 9
    assert sum(int(minutes) for minutes, _, _ in rows) <= 120
    for _, path, text in rows:
        module = importlib.import_module(f"mergevq.{path.replace('/', '.')}")
        assert re.findall(r"`(.+?)`", text)
        for name in re.findall(r"`(.+?)`", text):
            assert operator.attrgetter(name)(module), (path, name)
