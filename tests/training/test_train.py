"""Training of either kind of model; its parts have test files of their own."""

from dataclasses import replace

import pytest

from mergevq.config.recipes import RECIPES, recipe
from mergevq.training import train as training


@pytest.mark.parametrize("name", RECIPES)
def test_a_run_is_trained_by_the_loop_of_its_kind(name, monkeypatch, tmp_path):
    calls = []
    for kind in ("tokenizer", "generator"):
        monkeypatch.setattr(
            training,
            f"train_{kind}",
            lambda run, *, resume, kind=kind: calls.append((kind, run, resume)) or tmp_path,
        )
    run = replace(recipe(name), out="elsewhere")
    assert training.train(run) == training.train(run, resume=True) == tmp_path
    kind = "generator" if hasattr(run, "tokens") else "tokenizer"
    assert calls == [(kind, run, False), (kind, run, True)]
