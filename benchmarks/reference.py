"""The paper's definitions written down as they stand, to be timed.

Source: Li et al. 2025, "MergeVQ", sections 3.2 and 3.3, equations 5, 6 and 11 (arXiv:2504.00999);
Bolya et al. 2023, "Token Merging", section 3 (arXiv:2210.09461).

The source map is a dense matrix that every merging step reduces, the codebook is a table of 2**D
codes that every token is compared with. Needs torch alone: nothing here is the package's.

Shape letters: B batch, L grid tokens, N tokens at some layer, M of them joining others, K kept
tokens, C channels, D bits.
"""

import itertools
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor


class Merged(NamedTuple):
    tokens: Tensor
    """Kept tokens, (B, K, C): means over their groups."""
    source: Tensor
    """(B, K, L): 1 where a grid token went into a kept token."""


def merge(tokens: Tensor, keys: list[Tensor]) -> Merged:
    """Merge grid tokens (B, L, C) layer by layer.

    Args:
        tokens: of the grid.
        keys: what each layer compares, (B, N, D); one tensor more than layers, whose N is K.
    """
    batch, num_tokens, _ = tokens.shape
    source = torch.eye(num_tokens, device=tokens.device).expand(batch, -1, -1)
    sizes = torch.ones(batch, num_tokens, 1, device=tokens.device)
    for key, after in itertools.pairwise(keys):
        join = matching(key, key.shape[1] - after.shape[1])
        tokens, sizes = join(tokens * sizes, "sum"), join(sizes, "sum")
        tokens = tokens / sizes
        source = join(source, "amax")
    return Merged(tokens, source)


def unmerge(tokens: Tensor, source: Tensor) -> Tensor:
    """Copy kept tokens (B, K, C) to the grid, (B, L, C): the transposed matrix times the tokens."""
    return source.mT @ tokens


def matching(keys: Tensor, num_merged: int) -> Callable[[Tensor, str], Tensor]:
    """Pair odd tokens with even ones by the cosine of their keys, and join the closest pairs.

    Returns:
        A function that reduces rows (B, N, C) of whatever belongs to the tokens: odd rows that
        stay, then even rows together with those that join them.
    """
    unit = keys / keys.norm(dim=-1, keepdim=True)
    best, partner = (unit[:, 1::2] @ unit[:, ::2].mT).max(-1)
    ranked = best.argsort(dim=-1, descending=True, stable=True)
    joining, staying = ranked[:, :num_merged, None], ranked[:, num_merged:].sort(-1).values
    partner = partner[..., None].gather(1, joining)

    def join(rows: Tensor, reduce: str) -> Tensor:
        odd, even = rows[:, 1::2], rows[:, ::2]
        width = rows.shape[2]
        moved = odd.gather(1, joining.expand(-1, -1, width))
        reduced = even.scatter_reduce(1, partner.expand(-1, -1, width), moved, reduce)
        return torch.cat([odd.gather(1, staying[..., None].expand(-1, -1, width)), reduced], dim=1)

    return join


class Losses(NamedTuple):
    commitment: Tensor
    """Mean squared distance to the nearest code."""
    token_entropy: Tensor
    """Mean entropy of a token's soft assignment, in nats."""
    codebook_entropy: Tensor
    """Entropy of the mean assignment, in nats."""


def lfq_losses(latents: Tensor, temperature: float) -> Losses:
    """Losses of the lookup-free quantizer for latents (.., D), over all 2**D codes.

    Written for float32: under autocast the matrix product rounds the logits to 8 bits.
    """
    latents = latents.flatten(0, -2)
    num_bits = latents.shape[1]
    indices = torch.arange(2**num_bits, device=latents.device)[:, None]
    places = torch.arange(num_bits, device=latents.device)
    codebook = (2 * ((indices >> places) & 1) - 1).to(latents.dtype)
    # -|z - c|**2 is 2 z.c and what all codes share, which the softmax does not see.
    log_assignment = (2 * latents @ codebook.mT / temperature).log_softmax(-1)
    assignment = log_assignment.exp()
    mean = assignment.mean(0)
    tiny = torch.finfo(mean.dtype).tiny
    return Losses(
        commitment=(latents - latents.detach().sign()).square().mean(),
        token_entropy=-(assignment * log_assignment).sum(-1).mean(),
        codebook_entropy=-(mean * mean.clamp_min(tiny).log()).sum(),
    )
