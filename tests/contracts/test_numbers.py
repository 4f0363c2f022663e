"""No setting has a number outside its range, wherever in a run it is: ranges are in one table."""

import dataclasses
import math
import types
import typing
from functools import partial

import pytest

from mergevq.config.contest import ContestSettings
from mergevq.config.evaluation import (
    GenerationSettings,
    Quality,
    ReconstructionSettings,
    RobustnessSettings,
)
from mergevq.config.generator import (
    SampleRun,
    SamplingSettings,
)
from mergevq.config.kinds import unions
from mergevq.config.parts.flows import FlowConfig
from mergevq.config.probing import FinetuneConfig, KnnConfig, LinearConfig, ProbeRun
from mergevq.config.ranges import RANGES
from mergevq.config.records import GuidanceSettings
from mergevq.config.training import (
    DecoderRun,
    GeneratorRun,
    PostTraining,
    SourceRun,
    TokenizerRun,
)
from tests.contracts.test_settings import example

RUNS = [
    *(TokenizerRun, GeneratorRun, SampleRun, SamplingSettings, ProbeRun, SourceRun),
    *(PostTraining, DecoderRun, FlowConfig),
    *(ReconstructionSettings, RobustnessSettings, GenerationSettings, GuidanceSettings),
    *(LinearConfig, KnnConfig, FinetuneConfig, Quality, ContestSettings),
]
MEMBERS = sorted(
    {
        member
        for run in (TokenizerRun, GeneratorRun, DecoderRun)
        for union in unions(run)
        for member in union.members.values()
    },
    key=lambda cls: (cls.__module__, cls.__name__),
)
"""Every kind of every part."""


def key(cls, name):
    """The setting's entry in the table."""
    return f"{cls.__name__}.{name}" if f"{cls.__name__}.{name}" in RANGES else name


def outside(allowed, kind):
    """The nearest numbers of a kind on both sides of a range, and those that no record keeps."""
    if kind is int:
        return [
            allowed.low if allowed.above else allowed.low - 1,
            allowed.high if allowed.below else allowed.high + 1,
            *(2**63, -(2**70)),
        ]
    return [
        float(allowed.low) if allowed.above else math.nextafter(allowed.low, -math.inf),
        float(allowed.high) if allowed.below else math.nextafter(allowed.high, math.inf),
        *(math.inf, -math.inf, math.nan),
    ]


def impossible(hint, allowed):
    """Values of an annotation that hold a number outside a range."""
    arguments, origin = typing.get_args(hint), typing.get_origin(hint)
    if hint in (int, float):
        return outside(allowed, hint)
    if origin in (types.UnionType, typing.Union):
        return [value for member in arguments for value in impossible(member, allowed)]
    if origin is tuple:
        length = 1 if arguments[-1] is Ellipsis else len(arguments)
        return [(number,) * length for number in impossible(arguments[0], allowed)]
    return []


def numbers_in(hint):
    """Whether a setting of this annotation may hold a number."""
    return hint in (int, float) or any(map(numbers_in, typing.get_args(hint)))


def with_impossible_numbers(settings):
    """Name, range and a function that sets a number outside it, for each number of settings."""
    hints = typing.get_type_hints(type(settings))
    for field in dataclasses.fields(settings):
        name, inner = field.name, getattr(settings, field.name)
        change = partial(dataclasses.replace, settings)
        if dataclasses.is_dataclass(inner):
            for below, allowed, make in with_impossible_numbers(inner):
                yield (
                    f"{name}.{below}",
                    allowed,
                    lambda make=make, n=name, c=change: c(**{n: make()}),
                )
        elif numbers_in(hints[name]):
            allowed = RANGES.get(key(type(settings), name))
            assert allowed is not None, f"{name} needs a range in mergevq/config/ranges.py"
            for value in impossible(hints[name], allowed):
                yield f"{name} = {value}", allowed, partial(change, **{name: value})


@pytest.mark.parametrize("cls", RUNS, ids=lambda cls: cls.__name__)
def test_every_number_is_in_its_range(cls):
    cases = list(with_impossible_numbers(example(cls)))
    assert cases
    wrong = []
    for name, allowed, make in cases:
        try:
            make()
            said = "nothing"
        except ValueError as error:
            said = str(error)
        if name.rpartition(" = ")[2] not in said or not said.endswith(str(allowed)):
            wrong.append(f"{name} must be {allowed}, and {said} is said")
    assert wrong == []


def test_every_range_is_of_a_setting():
    classes = {cls for run in RUNS for cls in within(example(run))} | set(MEMBERS)
    used = {key(cls, field.name) for cls in classes for field in dataclasses.fields(cls)}
    assert set(RANGES) <= used


def within(settings):
    """Classes of settings and of those inside them."""
    yield type(settings)
    for field in dataclasses.fields(settings):
        if dataclasses.is_dataclass(inner := getattr(settings, field.name)):
            yield from within(inner)


@pytest.mark.parametrize("member", MEMBERS, ids=lambda cls: cls.__name__)
def test_every_number_of_every_kind_of_part_has_a_range(member):
    wrong = []
    for name, allowed, make in with_impossible_numbers(member()):
        try:
            make()
            said = "nothing is said: call check_numbers in __post_init__"
        except ValueError as error:
            said = str(error)
        if " must " not in said or not said.endswith(str(allowed)):
            wrong.append(f"{member.__name__}.{name} must be {allowed}: {said}")
    assert wrong == []


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
    with pytest.raises(ValueError, match=rf"{name} \(.*\) must (all )?be "):
        SamplingSettings(**{name: value})
