"""A check that networks give numbers."""

import torch
from torch import Tensor


def require_finite(name: str, values: Tensor) -> None:
    """Raise `RuntimeError` unless the values that a network gave are finite."""
    if not torch.compiler.is_compiling() and not values.isfinite().all():
        raise RuntimeError(f"{name} are not finite: the tokenizer's weights are broken")
