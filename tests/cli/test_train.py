import os
import subprocess
import sys
import typing
from dataclasses import replace

import pytest
import tyro

from mergevq.cli.train import COMMANDS, Recipe
from mergevq.config.recipes import SOURCE_RECIPES
from mergevq.config.training import SourceRun
from tests.training.test_source import NUM_KEPT, material  # noqa: F401 - a fixture


def test_help_needs_no_torch():
    code = "import sys, mergevq.cli.train; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_the_command_passes_its_options_on_and_says_what_it_gained(material, capsys, monkeypatch):  # noqa: F811
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    seen = []
    from mergevq.training import source as train_source

    whole = train_source.finetune_source
    monkeypatch.setattr(train_source, "finetune_source", lambda run: seen.append(run) or whole(run))
    places = {name: str(material / name) for name in ("tokenizer", "tokens", "generator", "new")}
    arguments = ["--tokenizer", places["tokenizer"], "--tokens", places["tokens"]]
    arguments += ["--generator", places["generator"], "--out", places["new"]]
    arguments += ["--num-steps", "2", "--batch-size", "4", "--lr", "0.01", "--passes", "3"]
    arguments += ["--max-replaced", "0.25", "--val-images", "3", "--val-fraction", "0.2"]
    arguments += ["--seed", "5", "--device", "cpu", "--precision", "float32"]
    tyro.cli(COMMANDS["finetune-source"], args=[*arguments, "--num-kept", str(NUM_KEPT)])
    wanted = SourceRun(
        tokenizer=places["tokenizer"],
        tokens=places["tokens"],
        generator=places["generator"],
        out=places["new"],
        num_kept=(NUM_KEPT,),
        max_replaced=0.25,
        num_passes=3,
        num_steps=2,
        batch_size=4,
        num_eval_images=3,
        val_fraction=0.2,
        precision="float32",
        device="cpu",
        seed=5,
    )
    (run,) = seen
    assert os.environ["OMP_WAIT_POLICY"] == "PASSIVE"
    assert run.optim.lr == 0.01
    assert {name: getattr(run, name) for name in SourceRun.__slots__ if name != "optim"} == {
        name: getattr(wanted, name) for name in SourceRun.__slots__ if name != "optim"
    }
    printed = capsys.readouterr().out
    for name in (f"clean@{NUM_KEPT}", f"new@{NUM_KEPT}", "25% of them", places["new"]):
        assert name in printed


def test_a_recipe_fills_in_what_the_options_leave_out(monkeypatch):
    seen = []
    from mergevq.training import source as train_source

    def stop(run):
        seen.append(run)
        raise InterruptedError

    monkeypatch.setattr(train_source, "finetune_source", stop)
    for more in (
        [],
        ["--num-steps", "9", "--generator", "mine", "--out", "here", "--num-kept", "36"],
    ):
        with pytest.raises(InterruptedError):
            tyro.cli(COMMANDS["finetune-source"], args=["imagenet256_gr_source", *more])
    plain, changed = seen
    recipe = SOURCE_RECIPES["imagenet256_gr_source"]()
    assert plain == recipe
    assert changed == replace(recipe, num_steps=9, generator="mine", out="here", num_kept=(36,))


def test_the_command_offers_every_recipe():
    assert typing.get_args(Recipe) == ("none", *SOURCE_RECIPES)
