"""Whether what was written is what a TypedDict declares, to the last key."""

import dataclasses
import types
import typing
from collections.abc import Sequence
from typing import Annotated, Any, Literal, get_args, get_origin


def assert_declared(record, declared):
    """A record has every key that is declared and no other, and this would tell if not."""
    assert problems(record, declared) == []
    for name in record:
        fewer = {other: value for other, value in record.items() if other != name}
        assert problems(fewer, declared) == [f"record.{name} is missing"]
    assert problems(record | {"more": 0}, declared) == ["record.more is not declared"]


def problems(value, declared, where="record"):
    """Differences: keys that are missing or are not declared, and values of another type.

    A dataclass stands for what `runtime.settings.to_json` makes of it.
    """
    origin, arguments = get_origin(declared), get_args(declared)
    if typing.is_typeddict(declared) or dataclasses.is_dataclass(declared):
        return _object_problems(value, declared, where)
    if origin is Annotated:
        return problems(value, arguments[1], where)
    if origin in {typing.Union, types.UnionType}:
        found = [problems(value, each, where) for each in arguments]
        return [] if [] in found else min(found, key=len)
    if origin in {list, tuple, Sequence} and isinstance(value, list):
        fixed = origin is tuple and Ellipsis not in arguments
        kinds = arguments if fixed else [arguments[0]] * len(value)
        pairs = enumerate(zip(value, kinds, strict=True))
        return [text for n, (v, kind) in pairs for text in problems(v, kind, f"{where}[{n}]")]
    if origin is dict and isinstance(value, dict):
        pairs = value.items()
        return [text for n, v in pairs for text in problems(v, arguments[1], f"{where}.{n}")]
    if origin is Literal:
        is_right = value in arguments
    elif origin is not None:
        is_right = False
    elif declared is float:
        is_right = isinstance(value, int | float) and not isinstance(value, bool)
    else:
        is_right = declared is Any or type(value) is declared
    return [] if is_right else [f"{where} is {value!r}"]


def _object_problems(value, declared, where):
    """Differences of an object with fixed keys."""
    if not isinstance(value, dict):
        return [f"{where} is {value!r}"]
    hints = {
        name: kind
        for name, kind in typing.get_type_hints(declared, include_extras=True).items()
        if get_origin(kind) is not typing.ClassVar
    }
    return [
        *(f"{where}.{name} is missing" for name in hints if name not in value),
        *(f"{where}.{name} is not declared" for name in value if name not in hints),
        *(
            text
            for name in hints
            if name in value
            for text in problems(value[name], hints[name], f"{where}.{name}")
        ),
    ]
