import contextlib
import os
import subprocess
import sys
import typing
from dataclasses import replace
from pathlib import Path

import pytest
import tyro

from mergevq.cli.main import main
from mergevq.cli.train import COMMANDS, Recipe
from mergevq.config.parts import Fsq, PatchDecoder, PatchStem
from mergevq.config.recipes import RECIPES, SOURCE_RECIPES
from mergevq.config.training import SourceRun
from mergevq.training.contest import run as contest
from tests.training.posthoc.test_source import NUM_KEPT, material  # noqa: F401 - a fixture


def test_help_needs_no_torch():
    code = "import sys, mergevq.cli.train; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_the_command_passes_its_options_on_and_says_what_it_gained(material, capsys, monkeypatch):  # noqa: F811
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    seen = []
    from mergevq.training.posthoc import source as train_source

    whole = train_source.finetune_source
    monkeypatch.setattr(train_source, "finetune_source", lambda run: seen.append(run) or whole(run))
    places = {name: str(material / name) for name in ("tokenizer", "tokens", "generator", "new")}
    arguments = ["--model", places["tokenizer"], "--tokens", places["tokens"]]
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
    from mergevq.training.posthoc import source as train_source

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


# ------------------------------------------------------------------------------ kinds of parts


def run_of(monkeypatch, *arguments):
    """The run that training is given."""
    seen = []
    monkeypatch.setattr("mergevq.training.train.train", lambda run, **_: seen.append(run) or Path())
    assert main(["train", "digits32", *arguments]) == 0
    return seen[0]


@pytest.mark.parametrize(
    "kind", [["--model.stem.kind", "patch"], ["--model.stem.kind=patch"]], ids=" ".join
)
def test_a_part_of_another_kind_is_taken_with_settings_of_its_own(kind, monkeypatch):
    # Its options may come before it.
    sizes = ["--model.stem.width", "64", *kind, "--model.stem.patch-size", "4"]
    run, recipe = run_of(monkeypatch, *sizes), RECIPES["digits32"]()
    stem = PatchStem(width=64, patch_size=4)
    assert run == replace(recipe, model=replace(recipe.model, stem=stem))


def test_parts_have_to_fit_only_together(monkeypatch):
    """Neither kind goes with the recipe's own other part, nor the patch size of either."""
    run = run_of(
        monkeypatch,
        *("--model.stem.kind", "patch", "--model.decoder.kind", "patch"),
        *("--model.stem.patch-size", "8", "--model.decoder.width", "32"),
        *("--model.image-size", "64"),
    )
    assert run.model.stem == PatchStem(patch_size=8)
    assert run.model.decoder == PatchDecoder(width=32)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--model.stem.kind", "pach"],
            "--model.stem.kind (pach) must be one of cnn, patch; did you mean 'patch'?",
        ),
        (
            ["--model.stem.width", "64"],
            "--model.stem.width is for --model.stem.kind patch, and the kind is cnn",
        ),
        (
            ["--model.stem.kind", "patch", "--model.stem.channels=3"],
            "--model.stem.channels is for --model.stem.kind cnn, and the kind is patch",
        ),
        (
            ["--model.stem.kind", "patch", "--model.stem.norm-eps", "4"],
            "--model.stem.norm-eps (4.0) must be above 0 and below 1",
        ),
        (
            ["--model.reducer.num-heads", "7"],
            "encoder width (64) must be a multiple of --model.reducer.num-heads (7)",
        ),
        (
            ["--model.num-kept", "2"],
            "--model.num-kept (2) must be at least 4: each of --model.reducer.num-layers (4) can "
            "merge at most half of its tokens and the first has 64; keep more tokens or use more "
            "layers",
        ),
    ],
)
def test_what_a_part_refuses_is_one_line_in_options(arguments, message, capsys):
    assert main(["train", "digits32", *arguments]) == 1
    assert capsys.readouterr().err == f"mergevq: error: {message}\n"


@pytest.mark.parametrize("arguments", [["--help"], ["digits32", "--help"]])
def test_help_leads_to_the_kinds_of_parts(arguments, capsys):
    with contextlib.suppress(SystemExit):
        assert main(["train", *arguments]) == 0
    assert "`mergevq parts` lists the kinds" in " ".join(capsys.readouterr().out.split())


def test_help_shows_the_settings_of_the_chosen_kind(capsys):
    with pytest.raises(SystemExit):
        main(["train", "digits32", "--model.stem.kind", "patch", "--help"])
    printed = capsys.readouterr().out
    assert "--model.stem.kind KIND" in printed
    assert "(default: patch)" in printed
    assert "--model.stem.width INT" in printed
    assert "--model.stem.channels" not in printed


# ----------------------------------------------------------------------------------- comparing


def compared(monkeypatch, *arguments):
    """Settings that comparing is called with."""
    seen = []
    monkeypatch.setattr(contest, "compare", seen.append)
    monkeypatch.setattr("mergevq.training.contest.table.table", str)
    assert main(["compare", *arguments]) == 0
    return seen[0]


def test_an_arm_is_a_recipe_with_options_of_its_own_and_those_of_all(monkeypatch):
    settings = compared(
        monkeypatch,
        *("digits32", "digits32 --model.quantizer.kind fsq", "few=digits32_pool --optim.lr 1e-4"),
        *("--settings", "train.num-steps=7", "kept.candidates=16 32", "optim.lr=5e-4"),
    )
    merge, fsq, few = settings.arms
    assert [arm.name for arm in settings.arms] == [
        "digits32",
        "digits32_model.quantizer.kind_fsq",
        "few",
    ]
    start = RECIPES["digits32"]()
    assert merge.run == replace(
        start,
        kept=replace(start.kept, candidates=(16, 32)),
        optim=replace(start.optim, lr=5e-4),
        train=replace(start.train, num_steps=7),
    )
    assert fsq.run == replace(merge.run, model=replace(start.model, quantizer=Fsq()))
    # Its own option counts more.
    assert (few.run.train.num_steps, few.run.optim.lr) == (7, 1e-4)
    assert few.run.model == RECIPES["digits32_pool"]().model


@pytest.mark.parametrize(
    ("arm", "message"),
    [
        ("digits32_ar", "arms (digits32_ar) must each begin with a recipe for a tokenizer: "),
        ("x=digits3", "did you mean 'digits32'?"),
        ("", "must each begin with a recipe"),
        ("digits32 --out 'a", "must be a recipe and options, with quotes closed"),
        ("digits32 --train.seed 3", "must leave seed and out to the comparison"),
        ("digits32 --out elsewhere", "must leave seed and out to the comparison"),
        ("../x=digits32", "arm (../x) must have a name of letters"),
    ],
)
def test_what_is_no_arm_is_refused_in_one_line(arm, message, capsys):
    assert main(["compare", arm]) == 1
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
