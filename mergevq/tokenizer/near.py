"""Codes near a code: other signs in a ball of few differing bits, or a level to either side.

Training and evaluation replace tokens by near ones, as a generator's mistakes do.

Source: Qiu et al. 2025, "Robust Latent Matters: Boosting Image Generation with Sampling Error
Synthesis", section 3 (arXiv:2503.08354).

Differs: the authors draw from the nearest entries of a codebook, the code itself among them. There
is none here: a ball is the smallest that holds as large a share of all codes as theirs of 4,096,
without its centre; of channels with levels it is one channel by one level, whatever the share.

Shape letters: D bits of a token, P parts of a token, N numbers of a token.
"""

import math
from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from mergevq.tokenizer.bits import codes_to_indices

_CODES = 4096
"""Entries of the authors' codebook, of which numbers of near codes are a share."""


def ball_share(num_bits: int, radius: int) -> float:
    """Share of the codebook that lies within a radius of a code, without the code itself.

    Raises:
        ValueError: the radius is below 1 or above the number of bits.
    """
    if not 1 <= radius <= num_bits:
        raise ValueError(f"radius ({radius}) must be between 1 and the {num_bits} bits of a token")
    return sum(math.comb(num_bits, d) for d in range(1, radius + 1)) / 2**num_bits


def radius_of(num_bits: int, num_near: int) -> int:
    """The smallest radius whose ball is at least so many of 4,096 codes, as a share.

    It is D where no ball is as large.

    Examples:
        >>> radius_of(18, 200), radius_of(12, 200)
        (6, 3)
    """
    radii = range(1, num_bits)
    return next((r for r in radii if ball_share(num_bits, r) >= num_near / _CODES), num_bits)


def choose_bits(
    numbers: Float[Tensor, "*b d"], counts: Int64[Tensor, "*b"]
) -> Bool[Tensor, "*b d"]:
    """Choose so many bits of each token, those of the lowest numbers."""
    return numbers.argsort(-1).argsort(-1) < counts[..., None]


def near_bits(
    parts: Int64[Tensor, "*b p"],
    num_bits: int,
    uniforms: Float[Tensor, "*b n"],
    num_near: Float[Tensor, ""],
) -> Int64[Tensor, "*b p"]:
    """Another token for each, uniformly from the ball around it without its centre.

    Args:
        parts: of equally many bits each.
        num_bits: D.
        uniforms: D + 1 numbers in [0, 1) for each token: one for how many bits change, and an
            order of the bits.
        num_near: codes of 4,096 that the ball is at least as large a share as, as in `radius_of`;
            a tensor, so that a compiled graph serves all of its values.
    """
    device = parts.device
    shares = torch.tensor([ball_share(num_bits, r) for r in range(1, num_bits + 1)]).to(
        device, non_blocking=True
    )
    radius = 1 + (shares[:-1] < num_near / _CODES).sum()
    # Not `shares[radius - 1]`: an index waits for its value, which breaks a compiled graph.
    drawn = uniforms[..., 0] * shares.gather(0, radius[None] - 1)
    # A product that rounds up must not leave the ball.
    counts = (1 + torch.bucketize(drawn, shares, right=True)).minimum(radius)
    changed = choose_bits(uniforms[..., 1:], counts).unflatten(-1, (parts.shape[-1], -1))
    return parts ^ codes_to_indices(changed.float())


def near_level(
    parts: Int64[Tensor, "*b p"], uniforms: Float[Tensor, "*b"], sizes: Sequence[int]
) -> Int64[Tensor, "*b p"]:
    """Another token for each, of which one channel is a level higher or lower.

    Channel and direction are drawn uniformly; beyond an end the other direction is taken.

    Args:
        parts: a level of each channel.
        uniforms: a number in [0, 1) for each token.
        sizes: levels of each channel, at least 2.
    """
    moves = (uniforms * (2 * len(sizes))).long().clamp(max=2 * len(sizes) - 1)
    is_moved = torch.arange(len(sizes), device=parts.device) == (moves // 2)[..., None]
    step = (2 * (moves % 2) - 1)[..., None]
    there = parts + step
    last = torch.tensor(sizes).to(parts.device, non_blocking=True) - 1
    there = torch.where((there < 0) | (there > last), parts - step, there)
    return torch.where(is_moved, there, parts)
