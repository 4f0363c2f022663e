"""Tagged unions of settings: dataclasses whose first field is `kind: Literal["name"] = "name"`.

A part of a model is selected by naming its kind: in JSON by `kind`, on the command line by
`--section.part.kind NAME`, in Python by the class itself. No torch.
"""

import dataclasses
import functools
import inspect
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

from mergevq.config.base import nearest

Settings = TypeVar("Settings")


class Union(NamedTuple):
    """A field that holds one member of a tagged union."""

    name: str
    """Dotted name of the field, such as `model.quantizer`."""
    members: dict[str, type]
    """Members by kind."""

    def describe(self) -> list[tuple[str, str]]:
        """Each kind and the first line of its docstring."""
        found = {kind: inspect.getdoc(member) or "" for kind, member in self.members.items()}
        return [(kind, text.partition("\n")[0]) for kind, text in found.items()]


def kind_of(cls: Any) -> str | None:  # noqa: ANN401 - any annotation
    """The tag of a dataclass; None where it has none."""
    for field in dataclasses.fields(cls) if dataclasses.is_dataclass(cls) else ():
        if field.name == "kind" and isinstance(field.default, str):
            choices = typing.get_args(typing.get_type_hints(cls)["kind"])
            return field.default if choices == (field.default,) else None
    return None


def unions(cls: type, where: str = "") -> Iterator[Union]:
    """Fields of a dataclass, and of those inside it, that hold a member of a tagged union.

    Args:
        cls: a class of settings.
        where: dotted name of this class in a larger one, with a dot at its end.
    """
    for name, expected in typing.get_type_hints(cls).items():
        members = members_of(expected)
        if len(members) == 1 and kind_of(members[0]) is None:
            yield from unions(members[0], f"{where}{name}.")
        elif kinds := {kind: item for item in members if (kind := kind_of(item))}:
            yield Union(f"{where}{name}", kinds)
            # Several members may have a part of one name.
            inside: dict[str, dict[str, type]] = {}
            for union in (each for item in members for each in unions(item, f"{where}{name}.")):
                inside[union.name] = inside.get(union.name, {}) | union.members
            yield from (Union(*item) for item in inside.items())


def members_of(expected: Any) -> list[type]:  # noqa: ANN401 - any annotation
    """Dataclasses that an annotation allows."""
    is_union = typing.get_origin(expected) in (types.UnionType, typing.Union)
    arguments = typing.get_args(expected) if is_union else (expected,)
    return [typing.cast("type", item) for item in arguments if dataclasses.is_dataclass(item)]


def with_kinds(settings: Settings, arguments: Sequence[str]) -> tuple[Settings, list[str]]:
    """Take `--part.kind NAME` out of a command line, and put the parts' defaults into settings.

    Args:
        settings: a dataclass.
        arguments: options, as a user wrote them; of several for one part the last one counts.

    Returns:
        The settings, in which each part of another kind has that kind's defaults, and the
        arguments that are left. Parts are not compared with each other yet: options that are still
        to be read may make them fit.

    Raises:
        ValueError: a kind does not exist, or an option is of another kind than the one chosen.
    """
    known = {union.name: union.members for union in unions(type(settings))}
    chosen: dict[str, str] = {}
    left: list[str] = []
    given = iter(arguments)
    for argument in given:
        name, equals, value = argument.partition("=")
        path = _path(name).removesuffix(".kind")
        if not _path(name).endswith(".kind") or path not in known:
            left.append(argument)
            continue
        value = value if equals else next(given, "")
        if value not in known[path]:
            raise ValueError(
                f"{name} ({value}) must be one of {', '.join(known[path])}"
                f"{nearest(value, known[path])}"
            )
        chosen[path] = value
    # A part comes before the parts inside it.
    for path in sorted(chosen, key=lambda path: path.count(".")):
        *above, name = path.split(".")
        if not hasattr(_part(settings, above), name):
            raise ValueError(f"{path}.kind ({chosen[path]}) is of a part that is not there")
        settings = _replaced(settings, path.split("."), known[path][chosen[path]])
    for argument in left:
        _check_kind(settings, argument.partition("=")[0], known)
    return settings, left


def _path(option: str) -> str:
    """Dotted name of the setting that an option is for; empty for any other word."""
    return option.removeprefix("--").replace("-", "_") if option.startswith("--") else ""


def _check_kind(settings: object, option: str, known: Mapping[str, Mapping[str, type]]) -> None:
    """Raise `ValueError` where an option is for a part of another kind than the one that is set."""
    where, _, name = _path(option).rpartition(".")
    if where not in known:
        return
    kind = getattr(_part(settings, where.split(".")), "kind", None)
    names = {name, name.removeprefix("no_")}
    having = [
        kind
        for kind, member in known[where].items()
        if names & {field.name for field in dataclasses.fields(member)}
    ]
    if having and kind is not None and kind not in having:
        section = option.rpartition(".")[0]
        raise ValueError(
            f"{option} is for {section}.kind {' or '.join(having)}, and the kind is {kind}"
        )


def _part(settings: object, path: Sequence[str]) -> object:
    """The part of that name; None where there is none."""
    return functools.reduce(lambda part, name: getattr(part, name, None), path, settings)


def _replaced(settings: Any, path: list[str], member: type) -> Any:  # noqa: ANN401 - any settings
    """The settings, unchecked, with a part of another kind; one that is of this kind stays."""
    name, *rest = path
    part = getattr(settings, name)
    if not rest and isinstance(part, member):
        return settings
    copy = object.__new__(type(settings))
    for field in dataclasses.fields(settings):
        object.__setattr__(copy, field.name, getattr(settings, field.name))
    object.__setattr__(copy, name, _replaced(part, rest, member) if rest else member())
    return copy
