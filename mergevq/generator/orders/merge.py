"""MergeAR's visibility: later duplicates of a token are hidden.

Source: Li et al. 2025, "MergeVQ", equation 12 and figure 6 (arXiv:2504.00999).

Shape letters: B batch, T tokens of a sequence, N inputs, M keys.
"""

import torch
from jaxtyping import Bool, Int64
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask


def leaders(groups: Int64[Tensor, "b t"]) -> Int64[Tensor, "b t"]:
    """For each position the first one of its row with the same value; a leader is its own."""
    ordered, order = groups.sort(dim=1, stable=True)
    index = torch.arange(groups.shape[1], device=groups.device).expand_as(groups)
    starts = torch.zeros_like(ordered)
    starts[:, 1:] = torch.where(ordered[:, 1:] != ordered[:, :-1], index[:, 1:], 0)
    # Sorting is stable, so a run of equal values starts with the earliest of them.
    return torch.zeros_like(order).scatter(1, order, order.gather(1, starts.cummax(1).values))


def first_occurrence(groups: Int64[Tensor, "b t"]) -> Bool[Tensor, "b t"]:
    """Whether each position is the first of its row with that value."""
    return leaders(groups) == torch.arange(groups.shape[1], device=groups.device)


def merge_mask(first: Bool[Tensor, "b n"], window: int) -> Bool[Tensor, "b n n"]:
    """Visibility of MergeAR: input j to query i iff j <= i and (i - j <= window or first[j]).

    Args:
        first: inputs that stay visible: the prefix, and first occurrences.
        window: w of figure 6; earlier duplicates within it are visible too.
    """
    index = torch.arange(first.shape[1], device=first.device)
    distance = index[:, None] - index[None, :]
    return (distance >= 0) & ((distance <= window) | first[:, None, :])


def merge_block_mask(first: Bool[Tensor, "b n"], window: int) -> BlockMask:
    """`merge_mask` for flex attention, which skips blocks in which nothing is visible."""
    batch, length = first.shape
    return create_block_mask(
        lambda row, _, query, key: (key <= query) & ((query - key <= window) | first[row, key]),
        B=batch,
        H=None,
        Q_LEN=length,
        KV_LEN=length,
        device=str(first.device),
    )
