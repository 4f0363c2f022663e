"""Check of arguments that are one of a few words."""

import difflib
from collections.abc import Iterable
from typing import Any, Literal, get_args

RecoverySource = Literal["given", "recovered"]
"""Source map that a decoder is given: the encoder's, or the one inferred from the tokens."""


def check_choice(name: str, value: object, choices: Any) -> None:  # noqa: ANN401 - a Literal
    """Raise `ValueError` unless a value is one of a `Literal`'s; a near one is suggested."""
    allowed = get_args(choices)
    if value in allowed:
        return
    hint = nearest(str(value), allowed)
    raise ValueError(f"{name} ({value!r}) must be one of {', '.join(map(repr, allowed))}{hint}")


def nearest(word: str, known: Iterable[str]) -> str:
    """End of a message about a mistyped word: the nearest known one, if any is near."""
    near = difflib.get_close_matches(word, list(known), 1)
    return f"; did you mean {near[0]!r}?" if near else ""
