"""The README's code blocks run as they stand, on a folder of images made here."""

import re
import shlex
from pathlib import Path

import pytest
from PIL import Image

from mergevq.cli.main import main

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
# What makes the trainings of the README end in seconds; nothing else is changed.
SHORT = {
    "photos64": shlex.split(
        "--model.image-size 32 --model.channels 8 --model.num-layers 3 --model.num-heads 2 "
        "--model.patch-decoder.width 16 --model.patch-decoder.blocks ca "
        "--model.source-dim 16 --model.num-source-heads 2 --model.num-kept 40 "
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
TOKENS = {"144": "40", "196": "48", "256": "64"}


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
    assert [words[0] for words in commands()] == ["make"] * 2 + ["pip"] + ["mergevq"] * 8
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
    assert len(list(Path("samples").glob("0*.png"))) == 16
    assert Path("runs/photos/evaluation/rate_distortion.png").is_file()


def test_the_tree_names_every_room():
    tree = README[README.index("```\nmergevq/\n") :].split("```")[1]
    rooms = {path.parent.name for path in (ROOT / "mergevq").rglob("__init__.py")}
    assert rooms <= set(re.findall(r"(\w+)/", tree))
