"""Recipes on ImageNet: the paper's short schedule, its source fine-tuning, the authors' heads."""

from dataclasses import replace

import pytest

from mergevq.config.recipes import GENERATOR_RECIPES, SOURCE_RECIPES, TOKENIZER_RECIPES


@pytest.mark.parametrize(
    ("name", "full", "num_kept"),
    [
        ("imagenet128_g", "imagenet256_g", 144),
        ("imagenet128_gr", "imagenet256_gr", 144),
        ("imagenet128_r", "imagenet256_r", 36),
    ],
)
def test_the_short_schedule_is_30_epochs_at_128_pixels_of_one_k(name, full, num_kept):
    run, full = TOKENIZER_RECIPES[name](), TOKENIZER_RECIPES[full]()
    assert (run.model.image_size, run.model.patch_size, run.model.num_tokens) == (128, 8, 256)
    assert run.train.num_steps * run.train.batch_size / 1_281_167 == pytest.approx(30, rel=2e-3)
    assert (run.kept.candidates, run.model.num_kept) == ((num_kept,), num_kept)
    assert (run.loss, run.optim, run.init_vit) == (full.loss, full.optim, full.init_vit)
    assert run.teacher == replace(full.teacher, view_size=112)
    for num_kept in (256, 196, 144, 100, 64, 36):
        replace(run.model, num_kept=num_kept)


@pytest.mark.parametrize("name", SOURCE_RECIPES)
def test_source_recovery_is_tuned_for_the_papers_five_epochs(name):
    run = SOURCE_RECIPES[name]()
    assert run.num_steps * run.batch_size / 1_281_167 == pytest.approx(5, rel=2e-3)
    assert (run.optim.lr, run.optim.betas, run.optim.weight_decay) == (1e-4, (0.9, 0.95), 1e-2)
    assert run.out == f"runs/{name}"
    assert run.optim.clip_norm is None
    generator = GENERATOR_RECIPES[run.generator.removeprefix("runs/").removesuffix("/model")]()
    assert (run.tokens, run.tokenizer) == (generator.tokens.path, generator.tokens.tokenizer)
    assert set(run.num_kept) <= set(generator.model.kept_candidates)
    assert generator.model.order.kind == "random"


@pytest.mark.parametrize("name", [name for name in TOKENIZER_RECIPES if "imagenet" in name])
def test_a_decoder_768_wide_has_12_heads_and_others_8(name):
    decoder = TOKENIZER_RECIPES[name]().model.decoder
    assert decoder.num_heads == (12 if decoder.width == 768 else 8)
