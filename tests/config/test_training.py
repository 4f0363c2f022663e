"""Settings: what is derived from them, and what they refuse."""

import ast
import dataclasses
import inspect
import itertools
import sys
from dataclasses import replace

import pytest

from mergevq.config import generator, objective, parts, tokenizer, training
from mergevq.config.generator import (
    Drafted,
    GeneratorConfig,
    SamplingSettings,
)
from mergevq.config.kinds import kind_of
from mergevq.config.objective import Dino, Kl, LossConfig
from mergevq.config.parts import Codebook, Fsq, GroupedLfq, Pool
from mergevq.config.parts.orders import Merge
from mergevq.config.tokenizer import KeptConfig
from mergevq.config.training import (
    DataConfig,
    GeneratorRun,
    OptimConfig,
    SourceRun,
    TokenizerRun,
    TokenizerTrainConfig,
    TrainConfig,
)
from tests.support.config import refused
from tests.support.parts import tokenizer_config

CLASSES = sorted(
    {
        value
        for module in (generator, objective, parts, tokenizer, training)
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
    # The kind of a part is said by the docstring of its class, which `mergevq parts` shows.
    known = ["kind"] if kind_of(settings) else []
    own = inspect.get_annotations(settings)
    names = [field.name for field in dataclasses.fields(settings) if field.name in own]
    # Class variables that all kinds of a part have are said by the first of them.
    assert known + [name for name in documented if name in names] == names
    assert settings.__doc__


@pytest.mark.parametrize("settings", CLASSES)
def test_a_misspelt_setting_is_an_error(settings):
    with pytest.raises(TypeError, match="unexpected keyword argument"):
        settings(imagesize=64)


@pytest.mark.parametrize(
    "run",
    [
        {"kept": KeptConfig(candidates=(64, 300))},
        {"train": TokenizerTrainConfig(eval_num_kept=(300,))},
    ],
)
def test_a_run_refuses_a_number_of_tokens_that_its_images_have_not(run):
    assert "num_kept (300) must be between 1 and the 256 tokens" in refused(TokenizerRun, **run)


# ----------------------------------------------------------------------- everything in training


@pytest.mark.parametrize(
    ("settings", "values", "message"),
    [
        (DataConfig, {"val_fraction": 0.0}, "val_fraction (0.0) must be above 0 and below 1"),
        (DataConfig, {"max_pixels": 0}, "max_pixels (0) must be between 1 and 178956970"),
        (DataConfig, {"max_pixels": 10**9}, "max_pixels (1000000000) must be between 1 and"),
        (DataConfig, {"num_workers": -1}, "num_workers (-1) must be between 0 and"),
        (LossConfig, {"entropy_weight": -0.1}, "entropy_weight (-0.1) must be between 0 and"),
        (LossConfig, {"source_weight": float("nan")}, "source_weight (nan) must be between 0 and"),
        (
            LossConfig,
            {"discriminator_start_step": 9, "adversarial_start_step": 8},
            "discriminator_start_step (9) must not be after adversarial_start_step (8)",
        ),
        (Kl, {"temperature": 0.0}, "temperature (0.0) must be above 0"),
        (Dino, {"teacher_temperature": -1.0}, "teacher_temperature (-1.0) must be above"),
        (OptimConfig, {"lr": 0.0}, "lr (0.0) must be above 0"),
        (OptimConfig, {"ema_decay": 1.0}, "ema_decay (1.0) must be at least 0 and below 1"),
        (OptimConfig, {"clip_norm": 0.0}, "clip_norm (0.0) must be above 0 and at most"),
        (TrainConfig, {"num_steps": 0}, "num_steps (0) must be between 1 and"),
        (TrainConfig, {"keep_last": 0}, "keep_last (0) must be between 1 and"),
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
    half = TrainConfig(precision="float16")
    fits = {"kept": KeptConfig(), "model": GeneratorConfig(), "parallel": "fsdp"}
    assert "(float16) must be bf16 or float32" in refused(GeneratorRun, train=half, **fits)
    assert GeneratorRun(**fits).parallel == "fsdp"


def test_no_second_generator_drafts_in_training():
    model, kept = GeneratorConfig(order=Merge()), KeptConfig(candidates=(256,))
    sampling = SamplingSettings(passes=Drafted(draft="model"))
    with pytest.raises(ValueError, match=r"sampling.passes.draft \(model\) must be another one"):
        GeneratorRun(model=model, kept=kept, sampling=sampling)


def test_a_tokenizer_starts_from_one_thing_only():
    with pytest.raises(ValueError, match=r"init_from \(a\) would replace init_vit \(b\)"):
        TokenizerRun(init_from="a", init_vit="b")


PLAIN = {"stem": "patch", "patch_dim": 128, "patch_norm": False, "num_heads": 2}


def components_run(**values):
    """A run that starts from components, with settings of its model or of its own."""
    own = {name: values.pop(name) for name in ("init_from", "init_vit") if name in values}
    return {"model": tokenizer_config(**PLAIN | values), "init_codes": "components", **own}


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"init_from": "a"}, "init_codes (components) must be random with init_from (a), which"),
        ({"init_vit": "b"}, "init_codes (components) must be random with init_vit (b), which"),
        (
            {"stem": "cnn", "patch_norm": True},
            "init_codes (components) needs model.stem.kind patch with model.stem.norm False, not "
            "cnn; change it, or set init_codes to random",
        ),
        (
            {"patch_norm": True},
            "init_codes (components) needs model.stem.kind patch with model.stem.norm False, not "
            "patch with norm True; change it, or set",
        ),
        (
            {"patch_dim": 96, "channels": 32, "channel_mult": (1, 1, 1)},
            "init_codes (components) needs an even number of channels in each of the 32 normalisat"
            "ion groups, not 3; change model.stem.width (96) or model.stem.num_groups, or set",
        ),
        (
            {"num_heads": 16},
            "init_codes (components) needs more than 8 channels in a head, not 8; lower "
            "model.reducer.num_heads (16) or widen model.stem.width (128), or set init_codes to",
        ),
        (
            {"num_bits": 36},
            "init_codes (components) needs channels for 8 components, and beside 36 bits and 20 "
            "positions, each a pair, there are those of 7; widen model.stem.width (128), or set",
        ),
    ],
)
def test_what_cannot_start_from_components_is_refused_with_a_way_out(values, message):
    assert refused(TokenizerRun, **components_run(**values)).startswith(message)


def test_a_start_from_components_needs_a_last_block_that_sees_tokens():
    values = components_run()
    pool = Pool(num_layers=4, num_heads=2)
    message = refused(TokenizerRun, **values | {"model": replace(values["model"], reducer=pool)})
    assert message.startswith(
        "init_codes (components) needs model.reducer.kind merge, or pool, global_map or divprune "
        "with fewer model.reducer.num_grid_layers than the 4 blocks, not pool whose last block "
        "sees all cells"
    )
    pool = replace(pool, num_grid_layers=3)
    TokenizerRun(**values | {"model": replace(values["model"], reducer=pool)})


@pytest.mark.parametrize("ratio", [-0.1, 1.5])
def test_an_encoder_learns_at_a_share_of_the_rate(ratio):
    message = f"encoder_lr_ratio ({ratio}) must be between 0 and 1"
    assert refused(TokenizerRun, encoder_lr_ratio=ratio) == message


def test_what_can_start_from_components_is_accepted():
    TokenizerRun(**components_run())
    # 128 channels in pairs: 20 positions, 35 bits, a constant and 8 components.
    TokenizerRun(**components_run(num_bits=35))


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


def test_images_are_decoded_from_recovered_sources_from_a_step_on():
    loss = LossConfig(recovered_share=0.3, recovered_start_step=5)
    assert [loss.recovered_share_at(step) for step in (0, 4, 5, 9)] == [0.0, 0.0, 0.3, 0.3]
    assert LossConfig(recovered_share=0.3).recovered_share_at(0) == 0.3


def test_components_start_only_codes_of_which_each_channel_is_a_bit():
    # As many bits as 9 signs, in three channels.
    values = components_run()
    model = dataclasses.replace(values["model"], quantizer=Fsq(levels=(8, 8, 8)))
    with pytest.raises(ValueError, match=r"needs codes of bits, not model\.quantizer\.kind fsq"):
        TokenizerRun(**values | {"model": model})
    # 512 entries of 9 channels are no bits either.
    model = dataclasses.replace(values["model"], quantizer=Codebook(codebook_size=512, dim=9))
    with pytest.raises(ValueError, match=r"needs codes of bits, not model\.quantizer\.kind codeb"):
        TokenizerRun(**values | {"model": model})
    grouped = GroupedLfq(num_bits=8, group_bits=4)
    TokenizerRun(**values | {"model": dataclasses.replace(values["model"], quantizer=grouped)})
