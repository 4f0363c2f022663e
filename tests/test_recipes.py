"""Every recipe is legal, matches what its docstring says, and trains when shrunk."""

from dataclasses import replace

import pytest

from mergevq.merge import merge_schedule
from mergevq.recipes import GENERATOR_RECIPES, RECIPES, shrink, shrink_generator
from mergevq.recipes import TOKENIZER_RECIPES as TOKENIZER_RUNS
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

# Each generator recipe, and the tokenizer recipe whose tokens it learns.
LEARNS_FROM = {
    "digits32_ar": "digits32",
    "tiny64_mergear": "tiny64_gr",
    "tiny64_randar": "tiny64_gr",
    "tiny64_raster": "tiny64_gr",
    "tiny64_anchored": "tiny64_gr",
    "imagenet256_gr_mergear": "imagenet256_gr",
    "imagenet256_gr_randar": "imagenet256_gr",
    "imagenet256_g_mergear": "imagenet256_g",
    "imagenet256_g_randar": "imagenet256_g",
}


def test_all_recipes_are_covered():
    assert tuple(RECIPES) == (*TOKENIZER_RECIPES, *LEARNS_FROM)
    assert tuple(GENERATOR_RECIPES) == tuple(LEARNS_FROM)


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_writes_where_its_name_says(name):
    assert RECIPES[name]().out == f"runs/{name}"


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_says_hardware_and_expectation(name):
    text = " ".join((RECIPES[name].__doc__ or "").split())
    assert "Hardware and time:" in text
    assert "Expected:" in text


@pytest.mark.parametrize("name", TOKENIZER_RECIPES)
def test_every_candidate_k_can_be_reached(name):
    run = TOKENIZER_RUNS[name]()
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
    model = TOKENIZER_RUNS[name]().model
    assert (model.num_tokens, model.num_kept, model.patch_size) == (num_tokens, num_kept, factor)


@pytest.mark.parametrize("name", TOKENIZER_RECIPES)
def test_a_shrunk_recipe_trains(name, tmp_path):
    pytest.importorskip("sklearn")
    run = shrink(TOKENIZER_RUNS[name]())
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


@pytest.mark.parametrize(("name", "tokenizer"), LEARNS_FROM.items())
def test_a_generator_fits_the_tokens_of_its_tokenizer(name, tokenizer):
    run, source = GENERATOR_RECIPES[name](), TOKENIZER_RUNS[tokenizer]()
    assert run.model.grid_size == (source.model.grid_size, source.model.grid_size)
    assert run.model.num_bits == source.model.num_bits
    assert run.tokens.tokenizer == f"{source.out}/model"
    assert run.tokens.path == f"{source.out}/tokens"
    for num_kept in run.kept.candidates:
        counts = merge_schedule(source.model.num_tokens, num_kept, source.model.num_layers)
        assert source.model.num_tokens - sum(counts) == num_kept


@pytest.mark.parametrize(("name", "tokenizer"), LEARNS_FROM.items())
def test_the_docstring_names_every_k_to_encode(name, tokenizer):
    run = GENERATOR_RECIPES[name]()
    text = " ".join((GENERATOR_RECIPES[name].__doc__ or "").split())
    assert f"--tokens {' '.join(map(str, run.kept.candidates))} --out {run.tokens.path}" in text
    assert tokenizer in text


@pytest.mark.parametrize(
    ("name", "num_steps", "betas"),
    [
        ("imagenet256_gr_mergear", None, (0.9, 0.99)),
        ("imagenet256_g_mergear", None, (0.9, 0.99)),
        ("imagenet256_gr_randar", 64, (0.9, 0.95)),
        ("imagenet256_g_randar", 88, (0.9, 0.95)),
    ],
)
def test_imagenet_generators_are_the_papers(name, num_steps, betas):
    run = GENERATOR_RECIPES[name]()
    assert (run.model.dim, run.model.num_layers, run.model.num_heads) == (1024, 24, 16)
    assert (run.model.dropout, run.model.label_smoothing) == (0.1, 0.1)
    assert (run.optim.lr, run.optim.weight_decay, run.train.batch_size) == (4e-4, 0.05, 1024)
    assert (run.optim.schedule, run.optim.clip_norm) == ("step", 1.0)
    assert run.optim.betas == betas
    assert run.sampling.num_steps == num_steps
    # 300 epochs.
    assert run.train.num_steps * 1024 / 1_281_167 == pytest.approx(300, rel=2e-3)


@pytest.mark.parametrize("name", LEARNS_FROM)
def test_shrinking_keeps_what_a_generator_is(name):
    run = GENERATOR_RECIPES[name]()
    small = shrink_generator(run)
    assert small.model.order == run.model.order
    assert small.model.num_prefix == run.model.num_prefix
    assert small.model.num_tokens == 64
    assert small.train.num_steps == 2
