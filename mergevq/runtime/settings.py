"""Settings as JSON, and back, each value checked against its annotation."""

import dataclasses
import math
import types
import typing
from collections.abc import Mapping
from typing import Any, Literal, TypeVar

from mergevq.config.kinds import kind_of

Config = TypeVar("Config")

_TOO_LARGE = {bool: 2, int: 2**63 + 1, float: math.inf}
"""Bounds that the absolute value of a number must be below."""


def to_json(config: object) -> dict[str, Any]:
    """A dataclass as a JSON object: tuples become lists, nested dataclasses become objects."""
    return {
        field.name: _to_json_value(getattr(config, field.name))
        for field in dataclasses.fields(config)  # pyright: ignore[reportArgumentType]
    }


def _to_json_value(value: Any) -> Any:  # noqa: ANN401 - any field
    """One field as JSON."""
    if dataclasses.is_dataclass(value):
        return to_json(value)
    return [_to_json_value(item) for item in value] if isinstance(value, tuple) else value


def from_json(cls: type[Config], values: Mapping[str, Any], *, where: str = "") -> Config:
    """The dataclass that `to_json` wrote, every value checked against its field's type.

    Args:
        cls: dataclass of bool, int, float, str, Literal, None, and tuples, dataclasses and unions
            of these. In a union of dataclasses `kind` selects one; without kinds, its fields do.
        values: field values by name; a field with a default may be absent.
        where: dotted name of this object in messages; empty for the outermost.

    Raises:
        ValueError: a field is unknown, absent without a default, or of the wrong type.
    """
    fields = {field.name: field for field in dataclasses.fields(cls)}  # pyright: ignore[reportArgumentType]
    prefix = f"{where}." if where else ""
    for name in values:
        if name not in fields:
            raise ValueError(
                f"{prefix}{name} is not a setting of {cls.__name__}; choose one of "
                f"{', '.join(fields)}"
            )
    for name, field in fields.items():
        optional = (field.default, field.default_factory) != (dataclasses.MISSING,) * 2
        if name not in values and not optional:
            raise ValueError(f"{prefix}{name} is missing and has no default in {cls.__name__}")
    hints = typing.get_type_hints(cls)
    return cls(**{n: _from_json_value(hints[n], v, f"{prefix}{n}") for n, v in values.items()})


def _from_json_value(expected: Any, value: Any, where: str) -> Any:  # noqa: ANN401 - any field
    """One JSON value as the annotation says.

    Raises:
        ValueError: it is of another type.
        TypeError: a config class has an annotation that JSON cannot carry.
    """
    arguments = typing.get_args(expected)
    origin = typing.get_origin(expected)
    if origin in (types.UnionType, typing.Union):
        return _from_json_value(_member(arguments, value, where), value, where)
    if origin is Literal:
        if not any(value == choice and type(value) is type(choice) for choice in arguments):
            raise ValueError(
                f"{where} ({value!r}) must be one of {', '.join(map(repr, arguments))}"
            )
        return value
    if origin is tuple:
        return _from_json_tuple(arguments, value, where)
    if dataclasses.is_dataclass(expected):
        if not isinstance(value, Mapping):
            names = ", ".join(field.name for field in dataclasses.fields(expected))
            raise ValueError(f"{where} ({value!r}) must be an object with fields {names}")
        return from_json(typing.cast("type[Any]", expected), value, where=where)
    if expected is types.NoneType and value is None:
        return None
    return _from_json_plain(expected, value, where)


def _from_json_plain(expected: Any, value: Any, where: str) -> bool | int | float | str:  # noqa: ANN401
    """A truth value, a number or a text.

    Raises:
        ValueError: it is of another type, or a number is too large.
        TypeError: a config class has an annotation that JSON cannot carry.
    """
    if expected not in (bool, int, float, str):
        raise TypeError(f"{where} has type {expected}, which cannot be kept as JSON")
    # bool is a subclass of int, so isinstance would let `true` pass for a number.
    if type(value) is not expected and not (expected is float and type(value) is int):
        raise ValueError(f"{where} ({value!r}) must be of type {expected.__name__}")
    if isinstance(value, int | float) and not abs(value) < _TOO_LARGE[type(value)]:
        raise ValueError(f"{where} must be a finite number of at most 64 bits")
    return expected(value)


def _member(members: tuple[Any, ...], value: Any, where: str) -> Any:  # noqa: ANN401 - any field
    """The member of a union that a JSON value is of.

    Raises:
        ValueError: it is of none.
    """
    given = [member for member in members if member is not types.NoneType]
    if value is not None and len(given) == 1:
        return given[0]
    if isinstance(value, Mapping):
        return _class_of(members, value, where)
    for member in members:
        if _is_of(member, value):
            return member
    shown = " or ".join(map(_name, members))
    raise ValueError(f"{where} ({value!r}) must be of type {shown}")


def _class_of(members: tuple[Any, ...], value: Mapping[str, Any], where: str) -> Any:  # noqa: ANN401
    """The dataclass of a union that a JSON object is of: by its `kind`, else by its fields.

    Raises:
        ValueError: it is of none, or could be of several.
    """
    classes = [member for member in members if dataclasses.is_dataclass(member)]
    if kinds := {kind: item for item in classes if (kind := kind_of(item))}:
        kind = value.get("kind")
        if not isinstance(kind, str) or kind not in kinds:
            given = "is missing" if kind is None else f"({kind!r}) is not known"
            raise ValueError(f"{where}.kind {given}; it must be one of {', '.join(kinds)}")
        return kinds[kind]
    fields = {item: {field.name for field in dataclasses.fields(item)} for item in classes}
    # Records have all fields; by hand some may be left out, if one class has the rest.
    fitting = [item for item in classes if fields[item] == value.keys()]
    fitting = fitting or [item for item in classes if fields[item] >= value.keys()]
    if len(fitting) != 1:
        names = "; ".join(f"{_name(item)}: {', '.join(fields[item])}" for item in classes)
        raise ValueError(
            f"{where} has the fields {', '.join(map(str, value))} and must have those of one "
            f"class alone ({names})"
        )
    return fitting[0]


def _name(kind: Any) -> str:  # noqa: ANN401 - any annotation
    """A type for a message."""
    return getattr(kind, "__name__", str(kind))


def _is_of(member: Any, value: Any) -> bool:  # noqa: ANN401 - any field
    """Whether a JSON value can be of a member of a union, by its kind alone."""
    if value is None:
        return member is types.NoneType
    origin = typing.get_origin(member)
    if isinstance(value, (list, tuple)):
        return origin is tuple
    if origin is Literal:
        return any(type(value) is type(choice) for choice in typing.get_args(member))
    return type(value) is member or (member is float and type(value) is int)


def _from_json_tuple(items: tuple[Any, ...], value: Any, where: str) -> tuple[Any, ...]:  # noqa: ANN401
    """A JSON list as `tuple[X, ...]` or as a tuple of fixed length.

    Raises:
        ValueError: not a list, or of another length.
    """
    if not isinstance(value, (list, tuple)):
        raise ValueError(f"{where} ({value!r}) must be a list")
    if items[-1] is Ellipsis:
        items = items[:1] * len(value)
    if len(items) != len(value):
        raise ValueError(f"{where} ({value!r}) must have {len(items)} values, not {len(value)}")
    pairs = zip(items, value, strict=True)
    return tuple(_from_json_value(item, v, f"{where}[{i}]") for i, (item, v) in enumerate(pairs))


def changed_settings(
    old: Mapping[str, Any], new: Mapping[str, Any], where: str = ""
) -> dict[str, list[Any]]:
    """Settings that differ between two runs as JSON: `section.field` to `[old, new]`."""
    changed: dict[str, list[Any]] = {}
    for name in {**old, **new}:
        before, after = old.get(name), new.get(name)
        if isinstance(before, Mapping) and isinstance(after, Mapping):
            changed |= changed_settings(before, after, where=f"{where}{name}.")
        elif before != after:
            changed[f"{where}{name}"] = [before, after]
    return changed
