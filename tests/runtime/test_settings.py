"""Tests of `mergevq.runtime.settings`."""

import json
from dataclasses import asdict, dataclass

import pytest

from mergevq.config.tokenizer import KeptConfig
from mergevq.config.training import DataConfig, OptimConfig, TokenizerRun, TokenizerTrainConfig
from mergevq.runtime.settings import changed_settings, from_json, to_json
from tests.support.parts import tokenizer_config

SMALL = tokenizer_config(image_size=32, num_kept=36, kept_range=(16, 64))


@dataclass(frozen=True, kw_only=True)
class NoDefault:
    """A field that must be given."""

    size: int


@dataclass(frozen=True, kw_only=True)
class Unkeepable:
    """A field that JSON cannot carry."""

    names: set


# ------------------------------------------------------------------------------------ settings


def test_a_run_survives_json():
    run = TokenizerRun(
        model=SMALL,
        kept=KeptConfig(candidates=(16, 36), distribution="gaussian"),
        data=DataConfig(val_path="elsewhere", max_images=7, flip=True),
        optim=OptimConfig(clip_norm=None, betas=(0.9, 0.95)),
    )
    assert from_json(TokenizerRun, json.loads(json.dumps(to_json(run)))) == run


def test_json_holds_lists_and_nested_objects():
    values = to_json(TokenizerRun(model=SMALL, kept=KeptConfig(candidates=(36,))))
    assert values["model"]["kept_range"] == [16, 64]
    assert values["train"] == asdict(TokenizerTrainConfig()) | {"eval_num_kept": []}


def test_a_whole_number_is_a_valid_float_and_becomes_one():
    assert repr(from_json(OptimConfig, {"lr": 1}).lr) == "1.0"


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"model": {"num_keptt": 3}}, r"model\.num_keptt is not a setting .* num_kept,"),
        ({"model": {"image_size": "8"}}, r"model\.image_size \('8'\) must be of type int"),
        ({"model": {"image_size": 8.0}}, r"model\.image_size \(8\.0\) must be of type int"),
        ({"model": {"image_size": True}}, r"model\.image_size \(True\) must be of type int"),
        ({"model": {"image_size": None}}, r"model\.image_size \(None\) must be of type int"),
        ({"model": {"stem": "vit"}}, r"model\.stem \('vit'\) must be of type CnnStem or PatchStem"),
        ({"model": {"stem": {"kind": "vit"}}}, r"model\.stem\.kind \('vit'\) .* one of cnn, patch"),
        ({"model": {"stem": {"channels": 8}}}, r"model\.stem\.kind is missing.* one of cnn, patch"),
        ({"model": {"stem": {"kind": "patch", "channels": 8}}}, r"model\.stem\.channels is not a"),
        ({"model": {"kept_range": [1, 2, 3]}}, r"kept_range \(.*\) must have 2 values, not 3"),
        ({"model": {"kept_range": 5}}, r"model\.kept_range \(5\) must be a list"),
        ({"kept": {"candidates": [36, "9"]}}, r"kept\.candidates\[1\] \('9'\) must be of type int"),
        (
            {"teacher": {"kind": "self", "num_head_layers": 4}},
            r"num_head_layers \(4\) must be one of 2, 3",
        ),
        (
            {"teacher": {"kind": "self", "num_head_layers": 2.0}},
            r"num_head_layers \(2\.0\) must be one of 2, 3",
        ),
        ({"data": 3}, r"data \(3\) must be an object with fields path,"),
        ({"optim": {"clip_norm": 0}}, r"clip_norm \(0\.0\) must be above 0"),
    ],
)
def test_a_wrong_setting_is_named_with_what_is_allowed(values, message):
    with pytest.raises(ValueError, match=message):
        from_json(TokenizerRun, values)


def test_a_field_without_default_must_be_there():
    with pytest.raises(ValueError, match="size is missing and has no default in NoDefault"):
        from_json(NoDefault, {})


def test_a_field_json_cannot_carry_is_a_mistake_in_the_class():
    with pytest.raises(TypeError, match="names has type"):
        from_json(Unkeepable, {"names": []})


def test_settings_that_came_or_went_are_changes():
    old, new = {"a": 1, "b": {"c": 2}}, {"b": {"c": 2, "d": 3}}
    assert changed_settings(old, new) == {"a": [1, None], "b.d": [None, 3]}
