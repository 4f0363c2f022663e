"""Settings of generators and of sampling: what they refuse."""

import dataclasses

import pytest

from mergevq.config.generator import GENERATOR_SIZES, GeneratorConfig, SamplingSettings


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
        ({"factor_bits": (9, 8)}, "factor_bits (9, 8) must sum to num_bits (18)"),
        ({"factor_bits": ()}, "factor_bits () must sum"),
        ({"factor_bits": (0, 18)}, "factor_bits (0, 18) must all be between 1 and 63"),
        ({"num_kept": 100}, "num_kept (100) must be one of kept_candidates (144,)"),
        ({"grid_size": (8, 8)}, "num_kept (144) must be between 1 and the 64 cells of the 8 x 8"),
        ({"num_layers": 0}, "num_layers (0) must be between 1 and"),
        ({"window": -1}, "window (-1) must be between 0 and"),
        ({"dropout": 1.0}, "dropout (1.0) must be at least 0 and below 1"),
    ],
)
def test_a_generator_that_cannot_be_built_is_refused(values, message):
    assert refused(GeneratorConfig, **values).startswith(message)


@pytest.mark.parametrize("name", GENERATOR_SIZES)
def test_every_named_size_is_accepted(name):
    size = GENERATOR_SIZES[name]
    assert dataclasses.asdict(GeneratorConfig(**size)).items() >= size.items()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"guidance_scale": -1.0}, "guidance_scale (-1.0) must be between 0 and 1000"),
        ({"guidance_interval": (0.5, 0.2)}, "guidance_interval (0.5, 0.2) must be two shares"),
        ({"temperature": (1.0, -1.0)}, "temperature (1.0, -1.0) must all be between 0 and"),
        ({"top_k": -1}, "top_k (-1) must be between 0 and"),
        ({"top_p": 0.0}, "top_p (0.0) must be between 1e-06 and 1"),
        ({"num_steps": 0}, "num_steps (0) must be between 1 and"),
    ],
)
def test_sampling_that_is_no_distribution_is_refused(values, message):
    assert refused(SamplingSettings, **values).startswith(message)
