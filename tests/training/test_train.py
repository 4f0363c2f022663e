"""Training of either kind of model; its parts have test files of their own."""

from dataclasses import replace

import pytest

from mergevq.config.recipes import RECIPES, recipe
from mergevq.config.training import DecoderRun, GeneratorRun, TokenizerRun
from mergevq.runtime.run import RunDirectory
from mergevq.training import train as training


@pytest.mark.parametrize("name", RECIPES)
def test_a_run_is_trained_by_the_loop_of_its_kind(name, monkeypatch, tmp_path):
    calls = []
    for kind in ("tokenizer", "generator", "decoder"):
        monkeypatch.setattr(
            training,
            f"train_{kind}",
            lambda run, *, resume, kind=kind: calls.append((kind, run, resume)) or tmp_path,
        )
    run = replace(recipe(name), out="elsewhere")
    assert training.train(run) == training.train(run, resume=True) == tmp_path
    kinds = {DecoderRun: "decoder", GeneratorRun: "generator", TokenizerRun: "tokenizer"}
    kind = kinds[type(run)]
    assert calls == [(kind, run, False), (kind, run, True)]


@pytest.mark.parametrize("name", ["digits32", "digits32_ar"])
def test_only_what_is_left_of_a_run_is_trained(name, monkeypatch, tmp_path):
    run = replace(recipe(name), out=str(tmp_path))
    run = replace(run, train=replace(run.train, num_steps=5))
    directory, calls = RunDirectory(tmp_path), []

    def trained(_, *, resume, brief):
        calls.append((resume, brief))
        directory.model.mkdir(exist_ok=True)
        directory.record.touch()

    for kind in ("tokenizer", "generator"):
        monkeypatch.setattr(training, f"train_{kind}", trained)
    # The first time it is stopped after two steps.
    monkeypatch.setattr(
        training, "read_record", lambda _: {"extra": {"step": 5 if len(calls) > 1 else 2}}
    )
    assert not training.is_finished(run), "there is no model"
    with pytest.raises(RuntimeError, match="stopped at step 2 of 5; the same command goes on"):
        training.finish(run)
    assert training.finish(run, brief=True) == directory.model
    assert training.finish(run) == directory.model, "it is finished"
    assert calls == [(False, False), (True, True)]
