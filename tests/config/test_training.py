"""Settings: what is derived from them, and what they refuse."""

import ast
import dataclasses
import inspect
import itertools
import sys

import pytest

from mergevq.config import generator, objective, tokenizer, training
from mergevq.config.generator import GeneratorConfig
from mergevq.config.objective import LossConfig, TeacherConfig
from mergevq.config.tokenizer import KeptConfig
from mergevq.config.training import (
    DataConfig,
    GeneratorRun,
    OptimConfig,
    SourceRun,
    TokenizerRun,
    TrainConfig,
)
from tests.support.config import refused

CLASSES = sorted(
    {
        value
        for module in (generator, objective, tokenizer, training)
        for _, value in inspect.getmembers(module, dataclasses.is_dataclass)
    },
    key=lambda value: value.__name__,
)


# -------------------------------------------------------------------------------- all of them


@pytest.mark.parametrize("settings", CLASSES)
def test_every_setting_has_a_default_that_is_accepted(settings):
    assert settings() == settings()


@pytest.mark.parametrize("settings", CLASSES)
def test_settings_cannot_be_changed_or_given_by_position(settings):
    first = dataclasses.fields(settings)[0]
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(settings(), first.name, first.default)
    with pytest.raises(TypeError, match="positional argument"):
        settings(1)


@pytest.mark.parametrize("settings", CLASSES)
def test_every_setting_says_what_it_is(settings):
    # The command line shows these texts.
    (body,) = [
        node.body
        for node in ast.parse(inspect.getsource(sys.modules[settings.__module__])).body
        if isinstance(node, ast.ClassDef) and node.name == settings.__name__
    ]
    documented = [
        field.target.id
        for field, text in itertools.pairwise(body)
        if isinstance(field, ast.AnnAssign)
        and isinstance(text, ast.Expr)
        and isinstance(text.value, ast.Constant)
    ]
    assert documented == [field.name for field in dataclasses.fields(settings)]


@pytest.mark.parametrize("settings", CLASSES)
def test_a_misspelt_setting_is_an_error(settings):
    with pytest.raises(TypeError, match="unexpected keyword argument"):
        settings(imagesize=64)


@pytest.mark.parametrize(
    "run",
    [{"kept": KeptConfig(candidates=(64, 300))}, {"train": TrainConfig(eval_num_kept=(300,))}],
)
def test_a_run_refuses_a_number_of_tokens_that_its_images_have_not(run):
    assert "num_kept (300) must be between 1 and the 256 tokens" in refused(TokenizerRun, **run)


# ----------------------------------------------------------------------- everything in training


@pytest.mark.parametrize(
    ("settings", "values", "message"),
    [
        (DataConfig, {"val_fraction": 0.0}, "val_fraction (0.0) must be in (0, 1)"),
        (DataConfig, {"max_pixels": 0}, "max_pixels (0) must be between 1 and 178956970"),
        (DataConfig, {"max_pixels": 10**9}, "max_pixels (1000000000) must be between 1 and"),
        (DataConfig, {"num_workers": -1}, "num_workers (-1) must be at least 0"),
        (LossConfig, {"entropy_weight": -0.1}, "entropy_weight (-0.1) must be at least 0"),
        (LossConfig, {"source_weight": float("nan")}, "source_weight (nan) must be at least 0"),
        (LossConfig, {"entropy_temperature": 0.0}, "entropy_temperature (0.0) must be above 0"),
        (
            LossConfig,
            {"discriminator_start_step": 9, "adversarial_start_step": 8},
            "discriminator_start_step (9) must not be after adversarial_start_step (8)",
        ),
        (TeacherConfig, {"kind": "huggingface"}, "teacher kind 'huggingface' needs path"),
        (TeacherConfig, {"temperature": 0.0}, "temperature (0.0) must be above 0"),
        (TeacherConfig, {"teacher_temperature": -1.0}, "teacher_temperature (-1.0) must be above"),
        (OptimConfig, {"lr": 0.0}, "lr (0.0) must be above 0"),
        (OptimConfig, {"ema_decay": 1.0}, "ema_decay (1.0) must be in [0, 1)"),
        (OptimConfig, {"clip_norm": 0.0}, "clip_norm (0.0) must be above 0, or None for no"),
        (TrainConfig, {"num_steps": 0}, "num_steps (0) must be at least 1"),
        (TrainConfig, {"keep_last": 0}, "keep_last (0) must be at least 1"),
        (
            TrainConfig,
            {"batch_size": 10, "accumulation": 4},
            "batch_size (10) must be a multiple of accumulation (4)",
        ),
    ],
)
def test_what_cannot_train_is_refused(settings, values, message):
    assert refused(settings, **values).startswith(message)


# ---------------------------------------------------------------------------------- generator


def test_shards_are_for_generators_in_bf16_or_float32():
    cut = TrainConfig(parallel="fsdp")
    assert refused(TokenizerRun, train=cut).startswith("train.parallel (fsdp) must be ddp")
    half = TrainConfig(parallel="fsdp", precision="float16")
    fits = {"kept": KeptConfig(), "model": GeneratorConfig()}
    assert "(float16) must be bf16 or float32" in refused(GeneratorRun, train=half, **fits)
    assert GeneratorRun(train=cut, **fits).train.parallel == "fsdp"


def test_a_tokenizer_starts_from_one_thing_only():
    with pytest.raises(ValueError, match=r"init_from \(a\) would replace init_vit \(b\)"):
        TokenizerRun(init_from="a", init_vit="b")


def test_the_optimizer_is_the_papers():
    optim = SourceRun().optim
    assert (optim.lr, optim.betas, optim.weight_decay) == (1e-4, (0.9, 0.95), 1e-2)
    assert (optim.schedule, optim.clip_norm, SourceRun().batch_size) == ("step", None, 256)


@pytest.mark.parametrize(
    ("name", "value"),
    [("max_replaced", 1.0), ("max_replaced", -0.1), ("val_fraction", 0.0), ("num_passes", 0)],
)
def test_impossible_settings_are_refused(name, value):
    with pytest.raises(ValueError, match=rf"{name} \({value}\) must be"):
        SourceRun(**{name: value})
