"""The commands of `mergevq probe`: options arrive, and mistakes are explained."""

import subprocess
import sys

import pytest
import torch
import tyro

from mergevq.cli.probe import COMMANDS
from tests.support.probes import tiny_tokenizer, write_colours


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    torch.manual_seed(0)
    root = tmp_path_factory.mktemp("cli_probe")
    tiny_tokenizer().save_pretrained(root / "model")
    write_colours(root / "data", 8)
    return root


def call(name, folder, out, *options):
    arguments = ["--model", str(folder / "model"), "--data", str(folder / "data")]
    arguments += ["--out", str(out), "--num-workers", "0", "--device", "cpu", *options]
    tyro.cli(COMMANDS[name], args=arguments, prog=f"mergevq probe {name}")


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("linear", ["--epochs", "2", "--rates", "0.01", "--num-kept", "9,20", "--pools", "mean"]),
        ("knn", ["--k", "1", "3", "--num-kept", "9", "20", "--pools", "mean"]),
        ("finetune", ["--epochs", "1", "--num-kept", "9,20", "--linear-epochs", "1"]),
    ],
)
def test_a_table_is_printed_for_every_number_of_tokens(folder, tmp_path, capsys, name, options):
    call(name, folder, tmp_path / "out", *options)
    printed = capsys.readouterr().out
    for text in ("9 tokens", "20 tokens", "64 tokens (no merging)", "raw pixels", "PCA of pixels"):
        assert text in printed
    assert str(tmp_path / "out") in printed
    assert (tmp_path / "out/probe.json").is_file()


def test_tokens_that_are_no_numbers_are_an_error(folder, tmp_path):
    with pytest.raises(ValueError, match=r"tokens \(9,many\) must be numbers, as in 36,144"):
        call("knn", folder, tmp_path / "out", "--num-kept", "9,many")


def test_help_does_not_wait_for_torch():
    code = "import sys, mergevq.cli.probe; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
