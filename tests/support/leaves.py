"""Settings one by one: the leaves of nested dataclasses, and values that each may have instead.

A leaf is called by its dotted name. Where parts may be of several kinds the name has the kind in
brackets, as `model.stem[patch].width`, so that the settings of every kind are leaves.
"""

import dataclasses
import types
import typing
from dataclasses import replace
from pathlib import Path

from mergevq.config.kinds import kind_of, members_of
from tests.support.parts import small_part

ABSENT = "<of another kind>"
"""In place of a setting that a part of another kind would have."""


def bare(kind):
    """A type without what is annotated to it."""
    while typing.get_origin(kind) is typing.Annotated:
        kind = typing.get_args(kind)[0]
    return kind


def parts_of(kind):
    """Classes by kind of a part that may be of several; none for any other setting."""
    return {name: cls for cls in members_of(bare(kind)) if (name := kind_of(cls))}


def leaf_kinds(cls, skip=()):
    """Type by dotted name of each setting of a dataclass and of those inside it."""
    found = {}
    for name, kind in typing.get_type_hints(cls, include_extras=True).items():
        if name in skip or typing.get_origin(bare(kind)) is typing.ClassVar:
            continue
        if members := parts_of(kind):
            found |= {f"{name}.kind": typing.Literal[tuple(members)]} if len(members) > 1 else {}
            for of, member in members.items():
                inside = leaf_kinds(member, skip=("kind",))
                found |= {f"{name}[{of}].{leaf}": inner for leaf, inner in inside.items()}
        elif dataclasses.is_dataclass(bare(kind)):
            inside = leaf_kinds(bare(kind))
            found |= {f"{name}.{leaf}": inner for leaf, inner in inside.items()}
        else:
            found[name] = kind
    return found


def fields_of(cls):
    """Names of a dataclass's settings."""
    return {field.name for field in dataclasses.fields(cls)}


def value_at(instance, path):
    """The setting of that dotted name; `ABSENT` where the part is of another kind."""
    for step in path.split("."):
        name, _, kind = step.rstrip("]").partition("[")
        instance = getattr(instance, name)
        if kind and instance.kind != kind:
            return ABSENT
    return instance


COMPANIONS = {
    ("condition", "class"): {"reducer.kind": "queries"},
    ("condition", "text"): {"reducer.kind": "queries"},
    ("reducer", "queries"): {"expander.kind": "mask_tokens"},
    ("reducer", "holistic"): {"expander.kind": "fuse"},
    ("expander", "fuse"): {"reducer.kind": "holistic"},
    ("expander", "mask_tokens"): {"reducer.kind": "queries"},
    ("quantizer", "scales"): {"expander.kind": "scale_sum"},
    ("expander", "scale_sum"): {"quantizer.kind": "scales"},
    ("regularizer", "tail_drop"): {"model.reducer.kind": "queries", "model.reducer.nested": True},
    ("distillation", "preserve"): {"init_from": "digits32"},
}
"""Changes that a kind of a part cannot do without."""


def _with_companions(instance, changes):
    """The changes, and before them those that they cannot do without."""
    named = {path.partition(".")[0] for path in changes}
    for (name, kind), needed in COMPANIONS.items():
        is_of_kind = changes.get(f"{name}.kind") == kind or f"{name}[{kind}]" in named
        if is_of_kind and hasattr(instance, name):
            # A file that is named already stays.
            lacking = {p: v for p, v in needed.items() if "." in p or value_at(instance, p) is None}
            changes = {**lacking, **changes}
    return changes


def replaced(instance, changes):
    """A copy with settings changed by dotted name, all at once.

    Another kind is a small part, and brings the kind that it cannot do without, or that it is
    inside of.
    """
    changes = _with_companions(instance, changes)
    inside, own, kinds = {}, {}, {}
    for path, value in changes.items():
        first, _, rest = path.partition(".")
        name, _, kind = first.rstrip("]").partition("[")
        if rest == "kind" and parts_of(typing.get_type_hints(type(instance))[name]):
            kinds[name] = value
        elif rest:
            inside.setdefault(name, {})[rest] = value
        else:
            own[name] = value
        if kind:
            kinds[name] = kind
    for name in {*inside, *kinds}:
        part = getattr(instance, name)
        members = parts_of(typing.get_type_hints(type(instance))[name])
        needed = {path.partition(".")[0].partition("[")[0] for path in inside.get(name, {})}
        if name in kinds and part.kind != kinds[name]:
            part = small_part(members[kinds[name]])
        elif name not in kinds and members and not needed <= fields_of(type(part)):
            part = small_part(next(each for each in members.values() if needed <= fields_of(each)))
        own[name] = replaced(part, inside.get(name, {}))
    return replace(instance, **own)


def with_parts_of(instance, path):
    """A copy that has parts of the kinds in a leaf's name."""
    steps = path.split(".")
    kinds = {}
    for number, step in enumerate(steps):
        _, _, kind = step.rstrip("]").partition("[")
        if kind:
            # Kinds of the parts around it stay in the name.
            above = ".".join([*steps[:number], step.partition("[")[0]])
            kinds[f"{above}.kind"] = kind
    return replaced(instance, kinds)


def others(kind, value, name="a"):
    """Values of a type other than the given one, likely ones first.

    Numbers are odd ones, so that settings that were mixed up differ.
    """
    found = [other for other in _values(kind, value, name) if other != value]
    assert found, f"{name} ({value}) has no other value of type {kind}"
    return found


def _values(kind, value, name):
    """Candidates, among them perhaps the value itself."""
    kind = bare(kind)
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if kind is types.NoneType:
        return [None]
    if origin in (types.UnionType, typing.Union):
        members = [member for member in arguments if member is not types.NoneType]
        given = [other for member in members for other in _values(member, value, name)]
        return given + [None] * (len(members) < len(arguments))
    if origin is typing.Literal:
        return list(arguments)
    if origin is tuple:
        return _tuples(arguments, value if isinstance(value, tuple) else (), name)
    if kind in (int, float):
        return _numbers(kind, value if isinstance(value, int | float) else 0, name)
    if kind is bool:
        return [True, False]
    if kind is str:
        return [f"other-{name.replace('.', '-')}"]
    if kind is Path:
        return [Path(f"other-{name}")]
    raise AssertionError(f"{name} is of type {kind}, for which tests have no values")


def _tuples(kinds, old, name):
    """With another last part, with other parts, and shorter where any length will do."""
    any_length = kinds[-1] is Ellipsis
    if any_length:
        kinds = kinds[:1] * (len(old) or 2)
    parts = [
        _values(kind, part, f"{name}-{number}")
        for number, (kind, part) in enumerate(zip(kinds, old or (None,) * len(kinds), strict=True))
    ]
    one = [(*old[:-1], last) for last in parts[-1]] if old else []
    shorter = [old[:-1]] if any_length and len(old) > 1 else []
    return [*one, *zip(*parts, strict=False), *shorter]


def _numbers(kind, old, name):
    """Near the old one; of counts a distance that depends on the name."""
    if kind is int:
        return [old + 1 + sum(map(ord, name)) % 7, 2 * old, old // 2, old + 1, max(old - 1, 0)]
    return [old * 0.5 if old else 0.375, old + 0.25, 0.5]


def changed(instance, path, kind, *, among=None):
    """The instance with one setting changed to the first other value that it accepts."""
    for value in among or others(kind, value_at(instance, path), path):
        try:
            return replaced(instance, {path: value})
        except ValueError:
            continue
    raise AssertionError(f"{path} has no other value that goes with the rest: name what it needs")
