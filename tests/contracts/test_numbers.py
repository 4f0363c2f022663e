"""No run has a number that no record could keep, wherever in its settings it is."""

import dataclasses
import math
import types
import typing
from functools import partial

import pytest

from mergevq.config.evaluation import GenerationSettings, ReconstructionSettings, RobustnessSettings
from mergevq.config.generator import SampleRun, SamplingSettings
from mergevq.config.probing import ProbeRun
from mergevq.config.records import GuidanceSettings
from mergevq.config.training import GeneratorRun, SourceRun, TokenizerRun
from tests.contracts.test_settings import example

RUNS = [
    *(TokenizerRun, GeneratorRun, SampleRun, SamplingSettings, ProbeRun, SourceRun),
    *(ReconstructionSettings, RobustnessSettings, GenerationSettings, GuidanceSettings),
]
IMPOSSIBLE = {float: [math.inf, -math.inf, math.nan], int: [2**63, -(2**70)]}


def impossible(hint):
    """Values of an annotation that hold an impossible number."""
    arguments, origin = typing.get_args(hint), typing.get_origin(hint)
    if hint in IMPOSSIBLE:
        return IMPOSSIBLE[hint]
    if origin in (types.UnionType, typing.Union):
        return [value for member in arguments for value in impossible(member)]
    if origin is tuple:
        length = 1 if arguments[-1] is Ellipsis else len(arguments)
        return [(number,) * length for number in impossible(arguments[0])]
    return []


def with_impossible_numbers(settings):
    """A name and a function that sets it, for each number of settings and of those inside."""
    hints = typing.get_type_hints(type(settings))
    for field in dataclasses.fields(settings):
        name, inner = field.name, getattr(settings, field.name)
        change = partial(dataclasses.replace, settings)
        if dataclasses.is_dataclass(inner):
            for below, make in with_impossible_numbers(inner):
                yield f"{name}.{below}", lambda make=make, n=name, c=change: c(**{n: make()})
        for value in impossible(hints[name]):
            yield f"{name} = {value}", partial(change, **{name: value})


@pytest.mark.parametrize("cls", RUNS, ids=lambda cls: cls.__name__)
def test_every_number_is_finite_and_of_64_bits(cls):
    cases = list(with_impossible_numbers(example(cls)))
    assert cases
    accepted = []
    for name, make in cases:
        try:
            make()
        except ValueError:
            continue
        accepted.append(name)
    assert accepted == []


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("guidance_scale", 1e30),
        ("guidance_scale", 1001.0),
        ("guidance_power", 1e6),
        ("temperature", 1e300),
        ("temperature", 1e-9),
        ("temperature", (1.0, 1e300)),
        ("top_p", 1e-300),
        ("top_p", (1.0, 1e-9)),
    ],
)
def test_settings_of_sampling_that_float32_cannot_follow_are_refused(name, value):
    with pytest.raises(ValueError, match=rf"{name} \(.*\) must be "):
        SamplingSettings(**{name: value})
