"""An error is one line in the words of the command line, with the way out."""

import errno
import os

import pytest

from mergevq.cli.errors import RENAMED, file_problem, in_options, parameters
from mergevq.cli.main import COMMANDS, GROUPS, main

SAMPLE = ("sample", "--generator", "g", "--model", "t", "--out", "o")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["train", "digits32", "--train.num-steps", "0"],
            "--train.num-steps (0) must be between 1",
        ),
        (["train", "digits32", "--optim.lr", "0"], "--optim.lr (0.0) must be above 0"),
        (["train", "digits32", "--data.val-fraction", "2"], "--data.val-fraction (2.0) must be"),
        (
            [*SAMPLE, "--steps", "0"],
            "--steps (0) must be between 1 and",
        ),
        (
            [*SAMPLE, "--guidance", "-1"],
            "--guidance (-1.0) must be",
        ),
        (
            [*SAMPLE, "--draft", "left", "--num-drafted", "0"],
            "--num-drafted (0) must be between 1 and",
        ),
        ([*SAMPLE, "--num-drafted", "2"], "--num-drafted is of drafted tokens: give --draft too"),
        ([*SAMPLE, "--draft", "model"], "--draft model and --draft-generator DIR must be given"),
        ([*SAMPLE, "--draft-generator", "m"], "--draft model and --draft-generator DIR must be"),
        ([*SAMPLE, "--draft", "left", "--steps", "2"], "--draft is of one token after the other"),
        (
            ["probe", "knn", "--model", "m", "--data", "d", "--k", "0"],
            "--k (0,) must all be between 1 and",
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

    monkeypatch.setattr("mergevq.demo.quickstart.quickstart", fail)
    assert main(["quickstart", *given]) == 1
    assert capsys.readouterr().err == (
        f"mergevq: error: no space is left to write {place}: make room, or choose another place "
        "with --out\n"
    )


def test_the_folder_of_a_recipe_is_told_when_the_disk_is_full(monkeypatch, capsys):
    def fail(*_, **__):
        raise OSError(errno.ENOSPC, "full")

    monkeypatch.setattr("mergevq.training.train.train", fail)
    assert main(["train", "digits32"]) == 1
    assert "no space is left to write runs/digits32: make room" in capsys.readouterr().err


OPTIONS = {
    "val_path": "--data.val-path",
    "train.seed": "--train.seed",
    "seed": "--train.seed",
    "num_kept": "--model.num-kept",
}


@pytest.mark.parametrize(
    ("message", "said"),
    [
        ("give val_path its own images", "give --data.val-path its own images"),
        ("seed (-1) must be above 0", "--train.seed (-1) must be above 0"),
        ("a.png: seed (-1) must be above", "a.png: --train.seed (-1) must be above"),
        ("train.seed (-1) must be above", "--train.seed (-1) must be above"),
        (
            "num_kept (3) is too few for num_kept.",
            "--model.num-kept (3) is too few for --model.num-kept.",
        ),
        # A word of the language, paths, options and longer names stay.
        ("the seed is new, and of the seed (3)", "the seed is new, and of the seed (3)"),
        ("runs/val_path/x, val_path.png", "runs/val_path/x, val_path.png"),
        ("'val_path' and --val_path", "'val_path' and --val_path"),
        ("old_val_path and val_paths", "old_val_path and val_paths"),
    ],
)
def test_settings_are_called_as_on_the_command_line(message, said):
    assert in_options(message, OPTIONS) == said


def test_without_options_a_message_stays():
    assert in_options("num_kept (3) is too few", {}) == "num_kept (3) is too few"


@pytest.mark.parametrize(
    ("error", "out", "said"),
    [
        (OSError(errno.ENOSPC, "full"), "x", "no space is left to write x: make room, or choose"),
        (OSError(errno.ENOSPC, "full", "y"), "x", "no space is left to write y: make room, or"),
        (FileExistsError(errno.EEXIST, "there", "y"), "x", "y needs a folder where there is a"),
        (PermissionError(errno.EACCES, "no", "y"), None, "y may not be read or written by this"),
        (OSError(errno.EIO, "bad", "y"), None, f"y: {os.strerror(errno.EIO)}"),
        (OSError("the hub says no"), "x", "the hub says no"),
        (OSError(errno.ENOSPC, "full"), None, f"[Errno {errno.ENOSPC}] full"),
    ],
    ids=str,
)
def test_an_error_of_a_file_has_its_path_and_a_way_out(error, out, said):
    problem = file_problem(error, out)
    assert problem.startswith(said)
    assert ("--out" in problem) == (out is not None and error.errno is not None)
