"""Every recipe is legal, matches what its docstring says, and trains when shrunk."""

from dataclasses import replace

import pytest

from mergevq.merge import merge_schedule
from mergevq.recipes import RECIPES, shrink
from mergevq.train_tokenizer import train

TOKENIZER_RECIPES = (
    "digits32",
    "tiny64_g",
    "tiny64_gr",
    "tiny64_r",
    "images128_gr",
    "imagenet256_g",
    "imagenet256_gr",
    "imagenet256_r",
)


def test_all_recipes_are_covered():
    assert tuple(name for name in RECIPES if name in TOKENIZER_RECIPES) == TOKENIZER_RECIPES


@pytest.mark.parametrize("name", TOKENIZER_RECIPES)
def test_a_recipe_says_hardware_and_expectation(name):
    text = RECIPES[name].__doc__ or ""
    assert "Hardware and time:" in text
    assert "Expected:" in text


@pytest.mark.parametrize("name", TOKENIZER_RECIPES)
def test_every_candidate_k_can_be_reached(name):
    run = RECIPES[name]()
    for num_kept in run.kept.candidates:
        counts = merge_schedule(run.model.num_tokens, num_kept, run.model.num_layers)
        assert run.model.num_tokens - sum(counts) == num_kept


@pytest.mark.parametrize(
    ("name", "num_tokens", "num_kept", "factor"),
    [
        ("imagenet256_g", 1024, 256, 8),
        ("imagenet256_gr", 256, 144, 16),
        ("imagenet256_r", 256, 36, 16),
        ("tiny64_gr", 256, 144, 4),
        ("images128_gr", 256, 144, 8),
    ],
)
def test_geometry_is_the_papers(name, num_tokens, num_kept, factor):
    model = RECIPES[name]().model
    assert (model.num_tokens, model.num_kept, model.patch_size) == (num_tokens, num_kept, factor)


@pytest.mark.parametrize("name", TOKENIZER_RECIPES)
def test_a_shrunk_recipe_trains(name, tmp_path):
    pytest.importorskip("sklearn")
    run = shrink(RECIPES[name]())
    teacher = "labels" if run.teacher.kind in ("labels", "dinov2") else run.teacher.kind
    run = replace(
        run,
        data=replace(run.data, path="digits", val_path=None, max_images=12, num_workers=0),
        loss=replace(run.loss, perceptual_weight=0.0),
        teacher=replace(run.teacher, kind=teacher),
        out=str(tmp_path / "run"),
    )
    model = train(run)
    assert (model / "model.safetensors").is_file()
