"""Checks of numbers in tensors.

On a CPU they are errors that show the numbers. Elsewhere the host would have to wait for the device
in every step: there the device itself stops, as it does where a row of a table does not exist.
"""

from collections.abc import Callable

import torch
from jaxtyping import Bool, Int64
from torch import Tensor

_assert = torch.ops.aten._assert_async.msg
"""Stop a device, with a message, unless a condition holds there; torch has no public name."""


def require_finite(name: str, values: Tensor) -> None:
    """Raise `RuntimeError` unless the values that a network gave are finite."""
    if torch.compiler.is_compiling():
        return
    is_finite = values.isfinite().all()
    message = f"{name} are not finite: the tokenizer's weights are broken"
    if values.device.type != "cpu":
        _assert(is_finite, message)
    elif not is_finite:
        raise RuntimeError(message)


def require_range(
    values: Int64[Tensor, "*shape"], highest: int, message: Callable[[int, int], str]
) -> None:
    """Check that whole numbers are in [0, highest]; compiled graphs do not check.

    Args:
        values: any number of them.
        highest: at most 2**63 - 1.
        message: of an error, from the lowest and the highest value.

    Raises:
        ValueError: one is not, on a CPU.
        RuntimeError: one is not, on another device; raised when it is next waited for.
    """
    if values.numel() == 0 or torch.compiler.is_compiling():
        return
    low, high = values.aminmax()
    if values.device.type != "cpu":
        _assert((low >= 0) & (high <= highest), message(0, highest))
        return
    least, most = torch.stack([low, high]).tolist()
    if least < 0 or most > highest:
        raise ValueError(message(least, most))


def require_all(is_right: Bool[Tensor, "*shape"], message: str) -> None:
    """Check a condition of every element; errors as of `require_range`."""
    if torch.compiler.is_compiling():
        return
    if is_right.device.type != "cpu":
        _assert(is_right.all(), message)
    elif not is_right.all():
        raise ValueError(message)
