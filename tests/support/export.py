"""Tracing in tests, where shape annotations are checked."""

import logging
from contextlib import contextmanager

import jaxtyping


@contextmanager
def without_shape_checks():
    """A block in which nothing is checked: sizes of traced tensors are symbols, and no `int`.

    Nor is anything logged: tracing writes far more than it computes where a handler takes it.
    """
    jaxtyping.config.update("jaxtyping_disable", True)
    logging.disable()
    try:
        yield
    finally:
        logging.disable(logging.NOTSET)
        jaxtyping.config.update("jaxtyping_disable", False)
