"""Results of the models of the package are measured again by their own commands."""

import json
import shutil
import subprocess
from pathlib import Path

import pytest

from benchmarks import results
from tests.support.commands import unknown_options


@pytest.fixture
def run(monkeypatch):
    """Commands that were run, in the place of running them: each writes what docs/results has."""
    ran = []

    def pretend(command, *, cwd, check):
        assert check
        ran.append((command[2:], cwd))
        out = Path(command[command.index("--out") + 1])
        out.mkdir(parents=True)
        name = "generation" if "generation" in command else "reconstruction"
        shutil.copy(results.RESULTS / out.parent.name / f"{name}.json", out / "evaluation.json")
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(subprocess, "run", pretend)
    return ran


def test_models_of_the_package_alone_are_measured():
    found = list(results.evaluations(results.RESULTS))
    assert ("photos64", "reconstruction") in [(each.model, each.file) for each in found]
    assert not any(each.model.startswith("tiny64") for each in found)
    assert not any("--out" in each.command for each in found)


def test_recorded_commands_have_options_that_are_there_and_say_their_precision():
    for evaluation in results.evaluations(results.RESULTS):
        assert unknown_options(evaluation.command[1:]) == [], evaluation.model
        # Else machines with bf16 and without it would give other digits.
        assert "--precision" in evaluation.command, evaluation.model


def test_equal_numbers_are_no_difference(run, capsys):
    assert results.main(["somewhere"]) == 0
    assert all(command[0] == "mergevq" and folder == "somewhere" for command, folder in run)
    assert capsys.readouterr().out.endswith("every printed digit is the same\n")


def test_a_printed_digit_that_differs_is_shown_before_and_after(tmp_path):
    again = Path(shutil.copytree(results.RESULTS, tmp_path / "results"))
    file = again / "photos64" / "reconstruction.json"
    record = json.loads(file.read_text(encoding="utf-8"))
    record["results"][0]["given"]["metrics"]["psnr"] += 1
    file.write_text(json.dumps(record), encoding="utf-8")
    evaluation = next(each for each in results.evaluations(again) if each.model == "photos64")
    tables = results.load_tables()
    (found,) = results.differences(tables, evaluation, results.RESULTS, again)
    assert found.startswith("photos64:\n- | `photos64` |")
