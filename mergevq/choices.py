"""Check of arguments that are one of a few words."""

import difflib
from typing import Any, Literal, get_args

RecoverySource = Literal["given", "recovered"]
"""Source map that a decoder is given: the encoder's, or the one inferred from the tokens."""


def check_choice(name: str, value: object, choices: Any) -> None:  # noqa: ANN401 - a Literal
    """Raise `ValueError` unless a value is one of a `Literal`'s; a near one is suggested."""
    allowed = get_args(choices)
    if value in allowed:
        return
    near = difflib.get_close_matches(str(value), allowed, 1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    raise ValueError(f"{name} ({value!r}) must be one of {', '.join(map(repr, allowed))}{hint}")
