"""Tokens as numbers: an index, or the parts that it is made of.

Source: Luo et al. 2024, "Open-MAGVIT2", section 3.2 (arXiv:2409.04410).

Shape letters: F sub-indices, P parts of a token, D channels.
"""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Int64
from torch import Tensor

from mergevq.config.parts import bits_of
from mergevq.nn.checks import require_range

_MAX_VALUES = 2**63
"""Values of a token whose index fits a signed integer of 64 bits."""


@dataclass(frozen=True, kw_only=True, slots=True)
class CodeSpec:
    """Form of a quantizer's tokens.

    A token has P parts, each one of `sizes[p]` values. Where all of them together are below 2**63
    they are also one index, whose lowest digit is part 0.

    Examples:
        >>> spec = CodeSpec(sizes=(8, 5), dim=2)
        >>> spec.join(torch.tensor([[3, 4]])), spec.split(torch.tensor([35]))
        (tensor([35]), tensor([[3, 4]]))
    """

    sizes: tuple[int, ...]
    """Values of each part; () of real numbers, which have none."""
    dim: int
    """Channels of codes, D; latents have as many, twice as many where each has a deviation."""
    is_binary: bool = False
    """Whether each channel of a code is a bit of the token."""

    @property
    def num_values(self) -> int:
        """Tokens that exist."""
        return math.prod(self.sizes)

    @property
    def bits(self) -> float:
        """Bits of a token; NaN of a continuous one."""
        return bits_of(self.sizes)

    @property
    def is_continuous(self) -> bool:
        """Whether tokens are real numbers, without parts and indices."""
        return not self.sizes

    @property
    def has_index(self) -> bool:
        """Whether a token's parts are also one index: their values are at most 2**63."""
        return has_index(self.sizes)

    def join(self, parts: Int64[Tensor, "*b p"]) -> Int64[Tensor, "*b"]:
        """Index of each token.

        Raises:
            ValueError: there are more tokens than indices.
        """
        return join(parts, self.sizes)

    def split(self, indices: Int64[Tensor, "*b"]) -> Int64[Tensor, "*b p"]:
        """Parts of each index; inverse of `join`.

        Raises:
            ValueError: an index is outside the codebook, or there are more tokens than indices.
        """
        return split(indices, self.sizes)

    def check(self, parts: Int64[Tensor, "*b p"]) -> None:
        """Raise `ValueError` where there are other parts, or a part has no such value."""
        if parts.shape[-1] != len(self.sizes):
            raise ValueError(
                f"tokens of {parts.shape[-1]} parts must have {len(self.sizes)}; these are tokens "
                "of another tokenizer"
            )
        for part, size in zip(parts.unbind(-1), self.sizes, strict=True):
            check_values(part, size)


def has_index(sizes: tuple[int, ...]) -> bool:
    """Whether the parts of a token are also one index: their values are at most 2**63."""
    return len(sizes) > 0 and math.prod(sizes) <= _MAX_VALUES


def require_parts(sizes: tuple[int, ...], what: str) -> None:
    """Check that tokens have parts.

    Args:
        sizes: values of each part.
        what: needs parts or indices.

    Raises:
        ValueError: tokens are real numbers.
    """
    if not sizes:
        raise ValueError(no_indices(what))


def no_indices(what: str) -> str:
    """Message where something needs indices, and tokens are real numbers."""
    return (
        f"{what} needs tokens with indices, and this tokenizer's are real numbers: make one with "
        "indices of it by `mergevq quantize`"
    )


def join(parts: Int64[Tensor, "*b p"], sizes: tuple[int, ...]) -> Int64[Tensor, "*b"]:
    """Index of each token, of whose parts the first is the lowest digit.

    Args:
        parts: of the tokens.
        sizes: values of each part.

    Raises:
        ValueError: there are more tokens than indices.
    """
    _require_index(sizes)
    if len(sizes) == 1:
        return parts[..., 0]
    # Digit by digit, without a table that would go to the device.
    index = parts[..., -1]
    for part in reversed(range(len(sizes) - 1)):
        index = index * sizes[part] + parts[..., part]
    return index


def split(indices: Int64[Tensor, "*b"], sizes: tuple[int, ...]) -> Int64[Tensor, "*b p"]:
    """Parts of each index; inverse of `join`.

    Raises:
        ValueError: an index is outside the codebook, or there are more tokens than indices.
    """
    _require_index(sizes)
    check_values(indices, math.prod(sizes))
    parts = []
    for size in sizes[:-1]:
        parts.append(indices % size)
        indices = indices // size
    return torch.stack([*parts, indices], -1)


def _require_index(sizes: tuple[int, ...]) -> None:
    """Raise `ValueError` where tokens have no index."""
    require_parts(sizes, "an index")
    if not has_index(sizes):
        raise ValueError(
            f"a token has {bits_of(sizes):.5g} bits, and an index has 63: use `parts`, "
            f"{len(sizes)} numbers for each token"
        )


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
    return (subindices << torch.tensor(starts).to(subindices.device, non_blocking=True)).sum(-1)


def check_range(indices: Int64[Tensor, "*shape"], num_bits: int) -> None:
    """Raise `ValueError` when an index is outside a codebook of 2**num_bits entries."""
    check_values(indices, 2**num_bits)


def check_values(indices: Int64[Tensor, "*shape"], num_values: int) -> None:
    """Raise `ValueError` when an index is outside a codebook of so many entries."""
    require_range(
        indices,
        num_values - 1,
        lambda low, high: (
            f"indices ({low} to {high}) must be between 0 and {num_values - 1}, the "
            f"last of {num_values} codes; these are tokens of another tokenizer"
        ),
    )
