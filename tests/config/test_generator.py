"""Settings of generators and of sampling: what they refuse."""

import re
from typing import get_args

import pytest

from mergevq.config.generator import (
    GENERATOR_SIZES,
    Drafted,
    GeneratorConfig,
    SampleRun,
    SamplingSettings,
    Several,
    check_sampling,
    sized,
)
from mergevq.config.parts.heads import (
    Bits,
    Subindices,
)
from mergevq.config.parts.orders import (
    Masked,
    Merge,
    Order,
    Random,
)


def refused(settings, **values):
    """The message with which a class of settings refuses the values."""
    with pytest.raises(ValueError, match=" must ") as caught:
        settings(**values)
    return str(caught.value)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"dim": 100}, "dim (100) must be a multiple of 4 times num_heads (6)"),
        ({"num_kv_heads": 4}, "num_heads (6) must be a multiple of num_kv_heads (4)"),
        ({"num_kept": 100}, "num_kept (100) must be one of kept_candidates (144,)"),
        ({"grid_size": (8, 8)}, "num_kept (144) must be between 1 and the 64 cells of the 8 x 8"),
        ({"num_layers": 0}, "num_layers (0) must be between 1 and"),
        (
            {"order": Masked(), "head": Bits(masking="mixed")},
            "head.masking (mixed) must be 'schedule' in order 'masked'",
        ),
        ({"dropout": 1.0}, "dropout (1.0) must be at least 0 and below 1"),
    ],
)
def test_a_generator_that_cannot_be_built_is_refused(values, message):
    assert refused(GeneratorConfig, **values).startswith(message)


@pytest.mark.parametrize("name", GENERATOR_SIZES)
def test_every_named_size_is_accepted(name):
    config = sized(GeneratorConfig(), name)
    shape = (config.dim, config.num_layers, config.num_heads, config.head.num_layers)
    assert shape == GENERATOR_SIZES[name]


def test_an_unknown_size_is_refused():
    with pytest.raises(ValueError, match=r"size \(huge\) must be one of tiny, small, B"):
        sized(GeneratorConfig(), "huge")


@pytest.mark.parametrize(
    ("part", "values", "message"),
    [
        (Merge, {"window": -1}, "window (-1) must be between 0 and"),
        (Subindices, {"sizes": ()}, "sizes () must be numbers of values from 2"),
        (Subindices, {"sizes": (1, 8)}, "sizes (1, 8) must all be between 2 and"),
        (Subindices, {"sizes": (2**40, 2**24)}, f"sizes {(2**40, 2**24)} must be numbers"),
        (Subindices, {"num_layers": 0}, "num_layers (0) must be between 1 and"),
        (Bits, {"sizes": ()}, "sizes () must be numbers of values from 2"),
        (
            Bits,
            {"sizes": (2,) * 8, "schedule": (2, 2, 3)},
            "schedule (2, 2, 3) has 7 sub-indices in its blocks and must have all 8 of sizes",
        ),
        (Bits, {"schedule": (0, 18)}, "schedule (0, 18) must all be between 1 and 63"),
        (Bits, {"width": 0}, "width (0) must be between 1 and"),
        (Bits, {"visible_weight": 1.0}, "visible_weight (1.0) must be at least 0 and below 1"),
        (Masked, {"reuse": True}, "reuse (True) needs disentangle (False)"),
        (Masked, {"disentangle": True}, "visible_weight (0.1) must be 0 with disentangle"),
        (Masked, {"visible_weight": -0.1}, "visible_weight (-0.1) must be between 0 and 1"),
        (Masked, {"num_decoder_layers": 0}, "num_decoder_layers (0) must be between 1 and"),
        (Several, {"num_steps": 0}, "num_steps (0) must be between 1 and"),
        (Several, {"confidence_temperature": -1.0}, "confidence_temperature (-1.0) must be"),
    ],
)
def test_a_part_that_cannot_be_built_is_refused(part, values, message):
    with pytest.raises(ValueError, match="^" + re.escape(message)):
        part(**values)


def test_an_order_that_decodes_one_token_a_pass_is_not_asked_for_several():
    several = SamplingSettings(passes=Several(num_steps=4))
    for order in get_args(Order):
        config = GeneratorConfig(order=order())
        if order in (Random, Masked):
            check_sampling(config, several)
            continue
        with pytest.raises(ValueError, match=rf"must be 'one' in order '{order().kind}'"):
            check_sampling(config, several)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"guidance_scale": -1.0}, "guidance_scale (-1.0) must be between 0 and 1000"),
        ({"guidance_interval": (0.5, 0.2)}, "guidance_interval (0.5, 0.2) must be two shares"),
        ({"temperature": (1.0, -1.0)}, "temperature (1.0, -1.0) must all be between 0 and"),
        ({"top_k": -1}, "top_k (-1) must be between 0 and"),
        ({"top_p": 0.0}, "top_p (0.0) must be between 1e-06 and 1"),
    ],
)
def test_sampling_that_is_no_distribution_is_refused(values, message):
    assert refused(SamplingSettings, **values).startswith(message)


def test_a_model_drafts_where_one_is_named_and_nowhere_else():
    drafted = SamplingSettings(passes=Drafted(draft="model"))
    assert SampleRun(draft_generator="small", settings=drafted).settings.passes == drafted.passes
    for changes in (
        {"settings": drafted},
        {"draft_generator": "small"},
        {"draft_generator": "small", "settings": SamplingSettings(passes=Drafted())},
    ):
        with pytest.raises(ValueError, match=r"draft_generator .* must be given with the draft"):
            SampleRun(**changes)
