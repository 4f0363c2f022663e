"""Helpers that the tests of `mergevq.config.training` share."""

import pytest


def refused(settings, **values):
    """The message with which a class of settings refuses the values."""
    with pytest.raises(ValueError, match=r" must | needs ") as caught:
        settings(**values)
    return str(caught.value)
