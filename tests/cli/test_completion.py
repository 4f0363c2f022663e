"""Tests of the words that shells complete."""

import os
import shutil
import subprocess
import sys

import pytest

from mergevq.cli.about import candidates
from mergevq.cli.main import COMMANDS, GROUPS, main
from mergevq.config.recipes import RECIPES


def after(line):
    return candidates(line.split(" "), COMMANDS, GROUPS)


def test_nothing_is_followed_by_every_command():
    assert after("") == [*COMMANDS, *GROUPS]
    assert after("comp") == ["compress", "completion", "compare"]


def test_a_group_is_followed_by_its_commands():
    assert after("probe ") == list(GROUPS["probe"])
    assert "--num-kept" in after("evaluate reconstruction --num")


def test_training_is_followed_by_recipes_and_then_by_their_settings():
    assert after("train ") == list(RECIPES)
    assert after("train photos64 --optim.l") == ["--optim.lr"]
    assert "--resume" in after("train photos64 --")


def test_a_kind_is_followed_by_the_kinds_there_are_and_changes_the_settings():
    assert after("train digits32 --model.quantizer.kind fs") == ["fsq"]
    chosen = "train digits32 --model.quantizer.kind"
    assert "--model.quantizer.levels" in after(f"{chosen} fsq --model.q")
    assert after(f"{chosen} nothing --") == []


def test_a_model_is_one_of_the_package_or_a_file():
    assert after("reconstruct a.png --model digits") == ["digits32", "digits32_ar"]
    assert after("reconstruct a.png --model ./") == []


@pytest.mark.parametrize("line", ["nothing ", "train nothing ", "evaluate nothing --"])
def test_a_mistake_is_followed_by_nothing(line):
    assert after(line) == []


def test_it_waits_for_no_torch(capsys):
    code = (
        "import sys; from mergevq.cli.main import main; main(['--complete', 'train', 'dig']);"
        "assert 'torch' not in sys.modules"
    )
    found = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert found.stdout.split() == [name for name in RECIPES if name.startswith("dig")]


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_each_shell_has_its_lines(shell, capsys):
    assert main(["completion", shell]) == 0
    assert "mergevq --complete" in capsys.readouterr().out


@pytest.mark.skipif(shutil.which("bash") is None, reason="there is no bash")
def test_bash_completes_a_recipe(tmp_path):
    command = tmp_path / "mergevq"
    command.write_text(f'#!/bin/sh\nexec {sys.executable} -m mergevq "$@"\n', encoding="utf-8")
    command.chmod(0o755)
    script = """eval "$(mergevq completion bash)"
COMP_WORDS=(mergevq train photos64_wide_r) COMP_CWORD=2
_mergevq
echo "${COMPREPLY[@]}"
"""
    environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    found = subprocess.run(
        ["bash", "-c", script], env=environment, check=True, capture_output=True, text=True
    )
    assert found.stdout.split() == ["photos64_wide_randar"]
