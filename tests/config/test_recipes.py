"""Every recipe is legal, matches what its docstring says, and trains when shrunk."""

import math
import re
from dataclasses import replace

import pytest
import torch
from safetensors.torch import save_file

from mergevq.config.objective import Labels
from mergevq.config.recipes import DECODER_RECIPES, GENERATOR_RECIPES, RECIPES, recipe
from mergevq.config.recipes import TOKENIZER_RECIPES as TOKENIZER_RUNS
from mergevq.tokenizer.reducers.matching import merge_schedule
from mergevq.tokenizer.tokenizer import Tokenizer
from mergevq.training import fit
from mergevq.training.decoder.step import flow_config, kept_counts
from mergevq.training.tokenizer import train
from tests.support.small import shrink, shrink_generator

TOKENIZER_RECIPES = (
    "digits32",
    "digits32_gq32",
    "digits32_bsq",
    "digits32_bernoulli",
    "digits32_fsq",
    "digits32_vq",
    "digits32_product",
    "digits32_shared",
    "digits32_dual",
    "digits32_kl",
    "digits32_perturb",
    "digits32_semantic",
    "digits32_preserve",
    "digits32_posttrain",
    "digits32_pool",
    "digits32_global_map",
    "digits32_divprune",
    "digits32_learned_merge",
    "digits32_select",
    "digits32_queries",
    "digits32_causal",
    "digits32_tail_drop",
    "digits32_nested",
    "digits32_holistic",
    "digits32_class",
    "digits32_scales",
    "photos64",
    "photos64_wide",
    "tiny64_g",
    "tiny64_gr",
    "tiny64_r",
    "images128_gr",
    "imagenet128_g",
    "imagenet128_gr",
    "imagenet128_r",
    "imagenet256_g",
    "imagenet256_g_d32",
    "imagenet256_g_d96",
    "imagenet256_gr",
    "imagenet256_gr_d32",
    "imagenet256_gr_d96",
    "imagenet256_r",
)
# What they train apart, they train alike when shrunk: the widths of a version are one network then,
# and its sizes differ in patches alone. Digits with other quantizers train in tests/contracts.
SHRUNK_APART = [
    name
    for name in TOKENIZER_RECIPES
    if not name.endswith(("_d96", "_wide")) and not name.startswith(("imagenet128", "digits32_"))
]

# Each generator recipe, and the tokenizer recipe whose tokens it learns.
LEARNS_FROM = {
    "digits32_ar": "digits32",
    "digits32_maskgit": "digits32",
    "digits32_enat": "digits32",
    "digits32_rar": "digits32",
    "digits32_stream": "digits32",
    "digits32_bits": "digits32",
    "digits32_anchor_bits": "digits32",
    "digits32_ordered": "digits32_causal",
    "digits32_holistic_ar": "digits32_holistic",
    "digits32_next_scale": "digits32_scales",
    "photos64_mergear": "photos64",
    "photos64_wide_mergear": "photos64_wide",
    "photos64_wide_randar": "photos64_wide",
    "tiny64_mergear": "tiny64_gr",
    "tiny64_randar": "tiny64_gr",
    "tiny64_raster": "tiny64_gr",
    "tiny64_anchored": "tiny64_gr",
    "imagenet256_gr_mergear": "imagenet256_gr",
    "imagenet256_gr_randar": "imagenet256_gr",
    "imagenet256_gr_raster": "imagenet256_gr",
    "imagenet256_g_mergear": "imagenet256_g",
    "imagenet256_g_randar": "imagenet256_g",
    "imagenet256_g_raster": "imagenet256_g",
}


# Each recipe of a decoder, and the tokenizer recipe whose tokens it reads.
DECODES_FOR = dict.fromkeys(
    ("digits32_prefix_flow", "digits32_group_flow", "digits32_knot_flow"), "digits32_tail_drop"
) | {"digits32_pixel_flow": "digits32"}


def statement(name, heading):
    """Text of a recipe's docstring after a heading, up to the next one."""
    text = " ".join((RECIPES[name].__doc__ or "").split())
    said = re.search(rf"{heading}: (.*?)(?= Expected: |$)", text)
    assert said, f"{name} does not say {heading!r}"
    return said[1]


def test_all_recipes_are_covered():
    assert tuple(RECIPES) == (*TOKENIZER_RECIPES, *LEARNS_FROM, *DECODES_FOR)
    assert tuple(GENERATOR_RECIPES) == tuple(LEARNS_FROM)
    assert tuple(DECODER_RECIPES) == tuple(DECODES_FOR)


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_writes_where_its_name_says(name):
    assert RECIPES[name]().out == f"runs/{name}"


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_says_which_number_to_expect_and_whose_it_is(name):
    said = statement(name, "Expected")
    is_known = re.search(r"\b(measured|paper|README)\b", said) and re.search(r"\d", said)
    assert "not measured" in said or is_known


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_says_hardware_and_time_or_how_much_there_is_to_do(name):
    said, run = statement(name, "Hardware and time"), RECIPES[name]()
    if "not measured" in said:
        assert f"{run.train.num_steps:,} steps of {run.train.batch_size} " in said
    else:
        assert re.search(r"\b(measured|paper|README)\b", said)
        assert not re.search("minute|hour", said) or "(measured" in said


@pytest.mark.parametrize("name", TOKENIZER_RECIPES)
def test_every_candidate_k_can_be_reached(name):
    run = TOKENIZER_RUNS[name]()
    for num_kept in run.kept.candidates:
        run.model.kept_by.check_kept((run.model.grid_size,) * 2, num_kept)
        if run.model.kept_by.gives != "source":
            continue
        counts = merge_schedule(run.model.num_tokens, num_kept, run.model.reducer.num_layers)
        assert run.model.num_tokens - sum(counts) == num_kept


@pytest.mark.parametrize(
    ("name", "num_tokens", "num_kept", "factor"),
    [
        ("imagenet256_g", 1024, 256, 8),
        ("imagenet256_gr", 256, 144, 16),
        ("imagenet256_r", 256, 36, 16),
        ("imagenet256_g_d32", 1024, 256, 8),
        ("imagenet256_gr_d96", 256, 144, 16),
        ("tiny64_gr", 256, 144, 4),
        ("images128_gr", 256, 144, 8),
    ],
)
def test_geometry_is_the_papers(name, num_tokens, num_kept, factor):
    model = TOKENIZER_RUNS[name]().model
    assert (model.num_tokens, model.num_kept, model.patch_size) == (num_tokens, num_kept, factor)


@pytest.mark.parametrize(
    ("name", "encoder", "decoder"),
    [
        ("imagenet256_g", 62.3, 82.8),
        ("imagenet256_gr", 62.7, 83.4),
        ("imagenet256_r", 85.7, 83.4),
        ("imagenet256_g_d32", 38.2, 51.4),
        ("imagenet256_gr_d32", 38.6, 52.0),
        ("imagenet256_gr_d96", 140.9, 187.2),
    ],
)
def test_widths_have_as_many_parameters_as_the_authors(name, encoder, decoder):
    with torch.device("meta"):
        model = Tokenizer(TOKENIZER_RUNS[name]().model)
    counts = [
        sum(parameter.numel() for parameter in part.parameters()) / 1e6
        for part in (model.encoder, model.decoder)
    ]
    assert counts == pytest.approx([encoder, decoder], abs=0.0501)


@pytest.mark.parametrize(
    ("name", "width", "num_heads", "num_epochs", "clip_norm", "most"),
    [
        ("imagenet256_g", 512, 8, 270, 1.0, 529),
        ("imagenet256_g_d32", 384, 8, 200, 1.0, 484),
        ("imagenet256_g_d96", 768, 12, 200, 5.0, 529),
        ("imagenet256_gr", 512, 8, 270, 1.0, 256),
        ("imagenet256_gr_d32", 384, 8, 270, 1.0, 256),
        ("imagenet256_gr_d96", 768, 12, 200, 5.0, 256),
        ("imagenet256_r", 768, 12, 300, 5.0, 100),
    ],
)
def test_imagenet_tokenizers_are_the_authors(name, width, num_heads, num_epochs, clip_norm, most):
    run = TOKENIZER_RUNS[name]()
    reducer = run.model.reducer
    assert (run.model.dim, reducer.num_heads, reducer.num_layers) == (width, num_heads, 12)
    assert (run.optim.clip_norm, max(run.kept.candidates)) == (clip_norm, most)
    assert (run.optim.lr, run.optim.betas, run.train.batch_size) == (1e-4, (0.5, 0.9), 256)
    num_images = run.train.num_steps * run.train.batch_size
    assert num_images / 1_281_167 == pytest.approx(num_epochs, rel=1e-3)


@pytest.mark.parametrize(
    ("name", "vit"),
    [
        ("imagenet256_g", "facebook/dinov2-base"),
        ("imagenet256_g_d32", "facebook/dinov2-small"),
        ("imagenet256_g_d96", "facebook/dinov2-base"),
        ("imagenet256_gr", "facebook/dinov2-base"),
        ("imagenet256_gr_d32", "facebook/dinov2-small"),
        ("imagenet256_gr_d96", "facebook/dinov2-base"),
        ("imagenet256_r", None),
        ("tiny64_gr", None),
    ],
)
def test_versions_that_generate_start_from_a_dinov2_that_is_wide_enough(name, vit):
    run = TOKENIZER_RUNS[name]()
    assert (run.init_vit or "None").partition("@")[0] == str(vit)
    assert run.model.dim <= {"facebook/dinov2-base": 768, "facebook/dinov2-small": 384}.get(
        vit, 999
    )


def short(run, tmp_path):
    """A shrunk run on a few digits that needs nothing from outside."""
    teacher = Labels() if "teacher" in run.teacher.views else run.teacher
    run = shrink(run)
    return replace(
        run,
        data=replace(run.data, path="digits", val_path=None, max_images=12, num_workers=0),
        loss=replace(run.loss, perceptual_weight=0.0),
        teacher=teacher,
        init_vit=None,
        out=str(tmp_path / "run"),
    )


@pytest.mark.parametrize("name", SHRUNK_APART)
@pytest.mark.slow  # .ci/run trains them for the ledger.
def test_a_shrunk_recipe_trains(name, tmp_path, monkeypatch):
    pytest.importorskip("sklearn")
    # Curves are alike for all, and take longer than the steps.
    monkeypatch.setattr(fit, "has_plots", lambda _: False)
    model = train(short(TOKENIZER_RUNS[name](), tmp_path))
    assert (model / "model.safetensors").is_file()


@pytest.mark.slow
def test_training_starts_from_the_weights_of_the_vit(tmp_path):
    pytest.importorskip("sklearn")
    run = short(TOKENIZER_RUNS["tiny64_gr"](), tmp_path)
    state = Tokenizer(run.model).encoder.reducer.state_dict()
    vit = {name: torch.randn_like(value) for name, value in state.items()}
    vit["cls_token"] = torch.randn(1, 1, run.model.dim)
    save_file(vit, tmp_path / "model.safetensors")
    # Too slow to leave where it starts.
    still = replace(run.optim, lr=1e-12, ema_decay=0.0)
    model = train(replace(run, init_vit=str(tmp_path), optim=still))
    encoder = Tokenizer.from_pretrained(model).encoder
    torch.testing.assert_close(encoder.class_token, vit["cls_token"].flatten())
    torch.testing.assert_close(encoder.reducer.blocks[2].ls1.gamma, vit["blocks.2.ls1.gamma"])


@pytest.mark.parametrize(("name", "tokenizer"), LEARNS_FROM.items())
def test_a_generator_fits_the_tokens_of_its_tokenizer(name, tokenizer):
    run, source = GENERATOR_RECIPES[name](), TOKENIZER_RUNS[tokenizer]()
    assert run.model.grid_size == (source.model.grid_size, source.model.grid_size)
    assert math.prod(run.model.head.sizes) == math.prod(source.model.quantizer.sizes)
    assert run.tokens.tokenizer == f"{source.out}/model"
    assert run.tokens.path == f"{source.out}/tokens"
    for num_kept in run.kept.candidates:
        source.model.kept_by.check_kept(run.model.grid_size, num_kept)
        if source.model.kept_by.gives != "source":
            continue
        counts = merge_schedule(source.model.num_tokens, num_kept, source.model.reducer.num_layers)
        assert source.model.num_tokens - sum(counts) == num_kept


@pytest.mark.parametrize(("name", "tokenizer"), DECODES_FOR.items())
def test_a_decoder_fits_its_tokenizer(name, tokenizer):
    run, source = DECODER_RECIPES[name](), TOKENIZER_RUNS[tokenizer]()
    assert run.tokenizer == f"{source.out}/model"
    assert run.data == source.data
    assert set(kept_counts(run, source.model)) <= set(source.kept.candidates)
    assert flow_config(run, source.model).code_dim == source.model.quantizer.dim
    assert tokenizer in (DECODER_RECIPES[name].__doc__ or "")


@pytest.mark.parametrize(("name", "tokenizer"), LEARNS_FROM.items())
def test_the_docstring_names_every_k_to_encode(name, tokenizer):
    run = GENERATOR_RECIPES[name]()
    text = " ".join((GENERATOR_RECIPES[name].__doc__ or "").split())
    assert f"--num-kept {' '.join(map(str, run.kept.candidates))} --out {run.tokens.path}" in text
    assert tokenizer in text


@pytest.mark.parametrize(
    ("name", "num_steps", "betas"),
    [
        ("imagenet256_gr_mergear", None, (0.9, 0.99)),
        ("imagenet256_g_mergear", None, (0.9, 0.99)),
        ("imagenet256_gr_randar", 64, (0.9, 0.95)),
        ("imagenet256_g_randar", 88, (0.9, 0.95)),
        ("imagenet256_gr_raster", None, (0.9, 0.99)),
        ("imagenet256_g_raster", None, (0.9, 0.99)),
    ],
)
def test_imagenet_generators_are_the_papers(name, num_steps, betas):
    run = GENERATOR_RECIPES[name]()
    assert (run.model.dim, run.model.num_layers, run.model.num_heads) == (1024, 24, 16)
    assert (run.model.dropout, run.model.label_smoothing) == (0.1, 0.1)
    assert (run.optim.lr, run.optim.weight_decay, run.train.batch_size) == (4e-4, 0.05, 1024)
    assert (run.optim.schedule, run.optim.clip_norm) == ("step", 1.0)
    assert run.optim.betas == betas
    assert getattr(run.sampling.passes, "num_steps", None) == num_steps
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


def test_a_mistyped_recipe_is_told_the_nearest_and_all_there_are():
    with pytest.raises(ValueError, match=r"no recipe 'digit32'; did you mean 'digits32'\?; there"):
        recipe("digit32")
    with pytest.raises(ValueError, match=r"no recipe 'x'; there are digits32, "):
        recipe("x")
    assert recipe("digits32") == RECIPES["digits32"]()


@pytest.mark.parametrize("name", [name for name in TOKENIZER_RECIPES if name != "digits32"])
def test_images_are_reconstructed_from_all_tokens_too_and_from_the_model_s_own_k(name):
    run = TOKENIZER_RUNS[name]()
    most = run.model.most_kept((run.model.grid_size,) * 2)
    assert {run.model.num_kept, most} <= set(run.train.eval_num_kept)
