"""Tests of `mergevq parts`."""

import dataclasses
import itertools
import subprocess
import sys

import pytest

from mergevq.cli.main import main
from mergevq.config.kinds import unions
from mergevq.config.parts import PatchStem
from mergevq.config.training import DecoderRun, GeneratorRun, TokenizerRun

UNIONS = [union for run in (TokenizerRun, GeneratorRun, DecoderRun) for union in unions(run)]
MEMBERS = [(union.name, kind) for union in UNIONS for kind in union.members]


def printed(capsys, *arguments):
    assert main(["parts", *arguments]) == 0
    return capsys.readouterr().out


def test_every_kind_of_every_part_is_a_line(capsys):
    lines = printed(capsys).splitlines()
    assert lines[0] == "parts of a tokenizer:"
    rows = [line.split(maxsplit=2) for line in lines if line.startswith("  ")]
    assert rows == [
        [union.name.rpartition(".")[2], kind, about]
        for union in UNIONS
        for kind, about in union.describe()
    ]
    assert lines[-1] == "`mergevq parts SEAM` shows the settings of each kind."


def test_a_model_without_a_choice_of_parts_is_left_out(capsys, monkeypatch):
    monkeypatch.setattr("mergevq.cli.about._RUNS", {"a": TokenizerRun, "b": PatchStem})
    assert "parts of a b" not in printed(capsys)


@pytest.mark.parametrize(("name", "kind"), MEMBERS)
def test_a_kind_is_shown_with_its_settings_as_options(name, kind, capsys):
    (member,) = {union.members[kind] for union in UNIONS if union.name == name}
    lines = printed(capsys, name, kind).splitlines()
    assert lines[0] == f"--{name.replace('_', '-')}.kind {kind}"
    options = [line.split()[0].rstrip(",") for line in lines if line.startswith("  --")]
    settings = [field.name for field in dataclasses.fields(member) if field.name != "kind"]
    stems = [option.removesuffix(".kind").rpartition(".")[2] for option in options]
    assert stems == [setting.replace("_", "-") for setting in settings]
    assert max(map(len, lines)) <= 100
    # Under each option is its text.
    for line, below in itertools.pairwise(lines):
        assert not line.startswith("  --") or below.startswith(" " * 8)


def test_a_part_is_called_by_its_last_name_and_shows_all_its_kinds(capsys):
    short, whole = printed(capsys, "stem"), printed(capsys, "model.stem")
    assert short == whole
    assert "--model.stem.kind cnn\n" in short
    assert "\n\n--model.stem.kind patch\n" in short
    assert "--model.stem.norm, --model.stem.no-norm (default: True)\n" in short
    assert "--model.stem.channel-mult (default: 1 2 4)\n" in short


def test_choices_and_empty_defaults_are_named(capsys):
    text = " ".join(printed(capsys, "reducer", "merge").split())
    assert "--model.reducer.shape (default: linear)" in text
    assert "One of linear, square, constant." in text
    assert "bit-components (default: none)\n" in printed(capsys, "decoder", "patch")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["quantiser"], "no part 'quantiser'; did you mean 'quantizer'?; there are stem, reducer,"),
        (["stem", "path"], "no stem of kind 'path'; did you mean 'patch'?; there are cnn, patch"),
    ],
)
def test_a_mistyped_part_is_told_the_nearest_and_all_there_are(arguments, message, capsys):
    assert main(["parts", *arguments]) == 1
    assert capsys.readouterr().err.startswith(f"mergevq: error: {message}")


@pytest.mark.parametrize("arguments", [[], ["quantizer", "lfq"]])
def test_no_torch_is_needed(arguments):
    code = (
        "import sys\nfrom mergevq.cli.main import main\n"
        f"main(['parts', *{arguments}])\nsys.exit('torch' in sys.modules)"
    )
    finished = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True)
    assert finished.returncode == 0
