"""An error is one line in the words of the command line, with the way out."""

import errno
import os

import pytest

from mergevq.cli import COMMANDS, GROUPS, main
from mergevq.cli_errors import RENAMED, parameters


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "digits32", "--train.num-steps", "0"], "--train.num-steps (0) must be at least"),
        (["train", "digits32", "--optim.lr", "0"], "--optim.lr (0.0) must be above 0"),
        (["train", "digits32", "--data.val-fraction", "2"], "--data.val-fraction (2.0) must be in"),
        (["train", "digits32", "--train.parallel", "fsdp"], "--train.parallel (fsdp) must be ddp"),
        (
            ["sample", "--generator", "g", "--tokenizer", "t", "--out", "o", "--steps", "0"],
            "--steps (0) must be at least 1",
        ),
        (
            ["sample", "--generator", "g", "--tokenizer", "t", "--out", "o", "--guidance", "-1"],
            "--guidance (-1.0) must be",
        ),
        (
            ["probe", "knn", "--model", "m", "--data", "d", "--k", "0"],
            "--k (0,) must be at least 1",
        ),
    ],
    ids=lambda item: item if isinstance(item, str) else "",
)
def test_an_error_names_the_option_as_it_is_typed(arguments, message, capsys):
    assert main(arguments) == 1
    printed = capsys.readouterr().err
    assert printed.startswith(f"mergevq: error: {message}")
    assert printed.count("\n") == 1


def test_every_renamed_setting_is_an_option_of_some_command():
    commands = [*COMMANDS.values(), *(c for group in GROUPS.values() for c in group.values())]
    assert set(RENAMED.values()) <= {name for command in commands for name in parameters(command)}


@pytest.mark.parametrize(
    ("given", "place"), [([], "runs/quickstart"), (["--out", "here"], "here"), (["--out=a"], "a")]
)
@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)),
        Exception("Error while serializing: I/O error: No space left on device (os error 28)"),
    ],
    ids=["python", "rust"],
)
def test_a_full_disk_is_told_with_the_path_and_a_way_out(given, place, error, monkeypatch, capsys):
    def fail(*_):
        raise error

    monkeypatch.setattr("mergevq.quickstart.quickstart", fail)
    assert main(["quickstart", *given]) == 1
    assert capsys.readouterr().err == (
        f"mergevq: error: no space is left to write {place}: make room, or choose another place "
        "with --out\n"
    )


def test_the_folder_of_a_recipe_is_told_when_the_disk_is_full(monkeypatch, capsys):
    def fail(*_, **__):
        raise OSError(errno.ENOSPC, "full")

    monkeypatch.setattr("mergevq.training.train", fail)
    assert main(["train", "digits32"]) == 1
    assert "no space is left to write runs/digits32: make room" in capsys.readouterr().err
