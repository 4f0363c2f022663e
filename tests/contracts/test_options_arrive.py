"""Every option of a command that makes a run is in the run: none is replaced by its default."""

import inspect
import typing
from dataclasses import fields, is_dataclass, replace
from pathlib import Path

import pytest

from mergevq import cli_probe, cli_source, train_source
from mergevq.cli_probe import FeatureOptions, SubjectOptions

PROBES = ("linear", "knn", "finetune")


def another(kind: object, value: object) -> object:
    """Another value of an option of this type."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin is typing.Annotated:
        return another(arguments[0], value)
    if origin is typing.Literal:
        return next(choice for choice in arguments if choice != value)
    if origin is tuple:
        members = typing.get_args(arguments[0]) or {int: (3,), float: (0.25,), str: ("7",)}.get(
            arguments[0]
        )
        return (next(item for item in members if (item,) != value),)
    if kind is bool or isinstance(value, bool):
        return not value
    if isinstance(value, float):
        return value / 2 if value else 0.25
    if kind is int or isinstance(value, int) or int in arguments:
        return (value or 1) + 1
    return Path("elsewhere") if isinstance(value, Path) else "elsewhere"


def varied(function) -> list[tuple[str, dict]]:
    """Arguments of a command, one of them changed each time, by its name."""
    groups = {"subject": SubjectOptions(model="m", data="d"), "features": FeatureOptions()}
    hints = typing.get_type_hints(function, include_extras=True)
    cases = []
    for name, parameter in inspect.signature(function).parameters.items():
        if name in groups:
            group = groups[name]
            assert is_dataclass(group)
            kinds = typing.get_type_hints(type(group))
            for field in fields(group):
                value = another(kinds[field.name], getattr(group, field.name))
                cases.append(
                    (f"{name}.{field.name}", {name: replace(group, **{field.name: value})})
                )
        else:
            given = "" if parameter.default is parameter.empty else parameter.default
            cases.append((name, {name: another(hints[name], given)}))
    return cases


def given(function) -> dict:
    """The arguments that a command needs."""
    groups = {"subject": SubjectOptions(model="m", data="d"), "features": FeatureOptions()}
    return {
        name: groups.get(name, "needed")
        for name, parameter in inspect.signature(function).parameters.items()
        if parameter.default is parameter.empty
    }


@pytest.mark.parametrize("name", PROBES)
def test_every_option_of_a_probe_is_in_its_run(monkeypatch, name):
    function, seen = cli_probe.COMMANDS[name], []
    monkeypatch.setattr(cli_probe, "_run", seen.append)
    function(**given(function))
    for option, changed in varied(function):
        function(**given(function) | changed)
        assert seen[-1] != seen[0], f"{option} is not in the run"


def test_every_option_of_fine_tuning_the_source_is_in_its_run(monkeypatch):
    seen = []

    class Seen(Exception):  # noqa: N818 - ends the command
        pass

    def look(run):
        seen.append(run)
        raise Seen

    monkeypatch.setattr(train_source, "finetune_source", look)
    monkeypatch.setattr(cli_source, "prepare_to_compute", lambda: None)
    (function,) = cli_source.COMMANDS.values()
    for option, changed in [("", {}), *varied(function)]:
        with pytest.raises(Seen):
            function(**given(function) | changed)
        assert not option or seen[-1] != seen[0], f"{option} is not in the run"
