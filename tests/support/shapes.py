"""Checks of shapes at the first calls of each test.

The plugin of jaxtyping checks every call of every function, which takes longer than the functions
do. Here it checks those that have an array among their annotations, and of each function the first
calls in each test: a wrong annotation is found there or nowhere. Other types are the type
checker's.
"""

import functools
from collections.abc import Callable
from typing import Any, ForwardRef, Literal, get_args, get_origin

import jaxtyping
import pytest

NUM_CHECKED = 10
"""Calls of a function that are checked in one test."""

_checked: dict[object, int] = {}
"""Calls so far, by function."""
_check_all = jaxtyping.jaxtyped


def has_array(annotation: object) -> bool:
    """Whether a shape is anywhere in an annotation; one that is still text may have any."""
    if isinstance(annotation, type) and issubclass(annotation, jaxtyping.AbstractArray):
        return True
    if get_origin(annotation) is Literal:
        return False
    return isinstance(annotation, str | ForwardRef) or any(map(has_array, get_args(annotation)))


def check_first(function: Any = None, *, typechecker: Any) -> Any:
    """As `jaxtyping.jaxtyped`, at the first calls of each test."""
    if function is None:
        return functools.partial(check_first, typechecker=typechecker)
    if isinstance(function, type):
        return _check_all(function, typechecker=typechecker)
    if not isinstance(function, Callable) or not any(
        map(has_array, getattr(function, "__annotations__", {}).values())
    ):
        return function
    checked = _check_all(function, typechecker=typechecker)

    @functools.wraps(function)
    def call(*args: object, **kwargs: object) -> object:
        count = _checked.get(call, 0)
        if count == NUM_CHECKED:
            return function(*args, **kwargs)
        _checked[call] = count + 1
        return checked(*args, **kwargs)

    return call


# The import hook of jaxtyping writes this name before every function.
jaxtyping.jaxtyped = check_first


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup() -> None:
    """Begin to count anew."""
    _checked.clear()
