"""Tokens of signs: their integers, and entropies of their soft assignments.

Several quantizers are made of these functions.

Source: Yu et al. 2024, "Language Model Beats Diffusion: Tokenizer is Key to Visual Generation",
section 3 (arXiv:2310.05737); Li et al. 2025, "MergeVQ", section 3 (arXiv:2504.00999).

Differs: both entropies are exact and no tensor of tokens x 2**D is ever made; the authors' 1e-5
inside the logarithm, which caps the codebook entropy at 11.2 nats of 12.5, is gone; the codebook
entropy is of the batch over all ranks, not of one rank's share.

Shape letters: D bits per token, G groups of bits, N all tokens of a batch. The codebook has 2**D
entries and is never stored.
"""

import math
from typing import NamedTuple

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from mergevq.data.codes import check_range
from mergevq.runtime import distributed

MAX_EXACT_BITS = 24
"""Up to here the codebook entropy is exact: its table of 2**D cells takes 64 MiB at most."""


class Signs(NamedTuple):
    """Discrete tokens in both of their forms."""

    codes: Float[Tensor, "*shape d"]
    """Signs in {-1, +1}; gradients pass straight through to the latents."""
    indices: Int64[Tensor, "*shape"]
    """The same tokens as integers in [0, 2**D); channel 0 is the lowest bit."""


def quantize(latents: Float[Tensor, "*shape d"]) -> Signs:
    """Round each channel to its sign, with a straight-through gradient.

    Args:
        latents: encoder output, any real values; zero counts as negative.
    """
    codes = signs_of(latents)
    return Signs(codes=codes, indices=codes_to_indices(codes))


def signs_of(latents: Float[Tensor, "*shape d"]) -> Float[Tensor, "*shape d"]:
    """Signs as `quantize` has them, without the indices."""
    signs = torch.where(latents > 0, 1.0, -1.0).to(latents.dtype)
    # The added zero carries the gradient; `latents + (signs - latents).detach()` would round, so
    # that codes of large latents in bf16 would not be +-1.
    return signs + (latents - latents.detach())


def sign_distance(latents: Float[Tensor, "*shape d"]) -> Float[Tensor, ""]:
    """Mean squared distance of latents to their signs, which have no gradient, in float32."""
    return (latents.float() - signs_of(latents.detach()).float()).square().mean()


def codes_to_indices(codes: Float[Tensor, "*shape d"]) -> Int64[Tensor, "*shape"]:
    """Read signs as the bits of an integer, channel 0 lowest; D is at most 63."""
    places = torch.arange(codes.shape[-1], device=codes.device)
    return ((codes > 0).long() << places).sum(-1)


def indices_to_codes(
    indices: Int64[Tensor, "*shape"], num_bits: int, dtype: torch.dtype = torch.float32
) -> Float[Tensor, "*shape d"]:
    """Inverse of `codes_to_indices`.

    Args:
        indices: in [0, 2**num_bits).
        num_bits: D, from 1 to 63.
        dtype: of the codes, which are exactly -1 and +1 in every one.

    Raises:
        ValueError: an index is outside the codebook.
    """
    check_range(indices, num_bits)
    places = torch.arange(num_bits, device=indices.device)
    return (2 * ((indices[..., None] >> places) & 1) - 1).to(dtype)


def token_entropy(
    latents: Float[Tensor, "*shape d"], temperature: float = 0.01
) -> Float[Tensor, "*shape"]:
    """Entropy of each token's soft assignment to the whole codebook, in nats.

    The softmax over all 2**D codes of -|z - c|**2 / temperature is a product of one independent
    bit per channel, so its entropy is a sum of D bit entropies: exact, and D work instead of 2**D.

    Returns:
        Between 0 and D ln 2 per token, float32 under any autocast.
    """
    log_odds = _log_odds(latents, temperature)
    # H(p) = softplus(-|x|) + |x| sigmoid(-|x|): no difference of large numbers anywhere.
    size = log_odds.abs()
    bits = torch.nn.functional.softplus(-size) + size * torch.sigmoid(-size)
    return bits.sum(-1)


def codebook_entropy(
    latents: Float[Tensor, "*shape d"], temperature: float = 0.01
) -> Float[Tensor, ""]:
    """Entropy of the mean soft assignment over all tokens and ranks, in nats.

    Exact for D up to `MAX_EXACT_BITS`: a token's assignment is the outer product of those of its
    two halves, so the mean over N tokens is one product of two (N, 2**(D/2)) matrices. Memory is
    O(N 2**(D/2) + 2**D), and no logarithm of zero has a gradient. Above that, the sum of the exact
    entropies of groups of bits, which is an upper bound (equal when the groups are independent).

    Returns:
        Between 0 and D ln 2, float32 under any autocast. Every rank must hold as many tokens.
    """
    log_odds = _log_odds(latents, temperature)
    num_groups = math.ceil(latents.shape[-1] / MAX_EXACT_BITS)
    groups = log_odds.tensor_split(num_groups, dim=-1)
    entropies = [_entropy(_mean_assignments(group, group.shape[-1])) for group in groups]
    return torch.stack(entropies).sum()


def grouped_codebook_entropy(
    latents: Float[Tensor, "*shape d"], group_bits: int, temperature: float = 0.01
) -> Float[Tensor, ""]:
    """Sum over groups of bits of the entropy of each group's mean soft assignment, in nats.

    An upper bound of `codebook_entropy`, which it equals with one group and where groups are
    independent. Memory is O(N 2**(group_bits / 2) + G 2**group_bits).

    Args:
        latents: of all tokens; the first group is that of the first channels.
        group_bits: divides D, and is at most `MAX_EXACT_BITS`.
        temperature: of the soft assignment.

    Returns:
        Between 0 and D ln 2, float32 under any autocast. Every rank must hold as many tokens.
    """
    return _entropy(_mean_assignments(_log_odds(latents, temperature), group_bits))


def pooled_codebook_entropy(
    latents: Float[Tensor, "*shape d"], group_bits: int, temperature: float = 0.01
) -> Float[Tensor, ""]:
    """Entropy of the mean soft assignment over all groups of all tokens, in nats.

    Groups of which each has one code, and another than the next, have an entropy here.

    Returns:
        Between 0 and `group_bits` ln 2; see `grouped_codebook_entropy`.
    """
    return _entropy(_mean_assignments(_log_odds(latents, temperature), group_bits).mean(0))


def _log_odds(latents: Float[Tensor, "*shape d"], temperature: float) -> Float[Tensor, "*shape d"]:
    """Log-odds of each bit being +1, in float32."""
    # -|z - c|^2 / t is 2 z.c / t plus a constant, so +1 beats -1 by 4 z / t.
    return latents.float() * (4 / temperature)


def _mean_assignments(
    log_odds: Float[Tensor, "*shape d"], group_bits: int
) -> Float[Tensor, "g low high"]:
    """Mean over tokens and ranks of the assignment of each group of bits to its codes."""
    with torch.autocast(log_odds.device.type, enabled=False):
        groups = log_odds.reshape(-1, log_odds.shape[-1]).split(group_bits, dim=-1)
        halves = [group.tensor_split([(group_bits + 1) // 2], dim=-1) for group in groups]
        means = [_assignments(low).mT @ (_assignments(high) / low.shape[0]) for low, high in halves]
        # One alone may be large: it is not copied.
        return distributed.joint_mean(means[0][None] if len(means) == 1 else torch.stack(means))


def _entropy(probabilities: Float[Tensor, "*cells"]) -> Float[Tensor, ""]:
    """Entropy of a distribution, or the sum of those of several."""
    # A cell that underflows to 0 contributes 0, and the clamp keeps its gradient finite.
    tiny = torch.finfo(probabilities.dtype).tiny
    return -(probabilities * probabilities.clamp_min(tiny).log()).sum()


def _assignments(log_odds: Float[Tensor, "n h"]) -> Float[Tensor, "n cells"]:
    """Probability of each of the 2**H codes of a group of bits, per token."""
    num_bits = log_odds.shape[1]
    indices = torch.arange(2**num_bits, device=log_odds.device)
    bits = ((indices[:, None] >> torch.arange(num_bits, device=log_odds.device)) & 1).float()
    log_one = torch.nn.functional.logsigmoid(log_odds)
    log_zero = torch.nn.functional.logsigmoid(-log_odds)
    log_probs = log_one @ bits.mT + log_zero @ (1 - bits).mT
    # Below 1e-19 a product of two is a denormal number, which CPUs handle some 20 times slower; as
    # zeros they change no entropy by more than 1e-12.
    return log_probs.masked_fill(log_probs < math.log(1e-19), -math.inf).exp()
