"""Indices and their sub-indices: one number in several parts, and back.

Source: Luo et al. 2024, "Open-MAGVIT2", section 3.2 (arXiv:2409.04410).

Shape letters: F sub-indices.
"""

import torch
from jaxtyping import Int64
from torch import Tensor


def indices_to_subindices(
    indices: Int64[Tensor, "*shape"], layout: tuple[int, ...]
) -> Int64[Tensor, "*shape f"]:
    """Cut each index into smaller ones: the first takes the lowest `layout[0]` bits, and so on.

    Raises:
        ValueError: an index has more bits than the layout.
    """
    check_range(indices, sum(layout))
    parts, shift = [], 0
    for bits in layout:
        parts.append((indices >> shift) & (2**bits - 1))
        shift += bits
    return torch.stack(parts, dim=-1)


def subindices_to_indices(
    subindices: Int64[Tensor, "*shape f"], layout: tuple[int, ...]
) -> Int64[Tensor, "*shape"]:
    """Inverse of `indices_to_subindices`."""
    starts = [sum(layout[:part]) for part in range(len(layout))]
    return (subindices << torch.tensor(starts, device=subindices.device)).sum(-1)


def check_range(indices: Int64[Tensor, "*shape"], num_bits: int) -> None:
    """Raise `ValueError` when an index is outside a codebook of 2**num_bits entries."""
    if indices.numel() == 0 or torch.compiler.is_compiling():
        return
    low, high = indices.aminmax()
    # Not `high >= 2**num_bits`: at 63 bits that number does not fit the tensor's type.
    if low < 0 or high > 2**num_bits - 1:
        raise ValueError(
            f"indices ({int(low)} to {int(high)}) must be between 0 and {2**num_bits - 1}, the "
            f"last code of {num_bits} bits; these are tokens of another tokenizer"
        )
