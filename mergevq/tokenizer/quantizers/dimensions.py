"""Channels rounded after training: standardised, each to the nearest of B levels.

Level k of B is the mean of a standard normal between its quantiles k / B and (k + 1) / B, which is
B (phi(a) - phi(b)) for those quantiles a and b and the density phi; of normal channels that is the
least squared error of a constant for so many equally frequent intervals. A channel is standardised
by a stored mean and deviation, and its level is the nearest one, not that of its interval.

Source: Wang et al. 2025, "Bridging Continuous and Discrete Tokens for Autoregressive Visual
Generation" (TokenBridge, arXiv:2503.16430); code YuqingWang1029/TokenBridge.

Differs: mean and deviation of each channel are measured, where the authors' code has one fixed map
of [-5, 5] to [-3, 3] for all channels and cuts intervals off at 3, so that levels are not in even
use; the mean of what an encoder gives is rounded, theirs is drawn; the order of channels is
measured, theirs is written down for 16.

Shape letters: B batch, K tokens, D channels, each of them a part of a token, E channels of latents.
"""

import itertools
from statistics import NormalDist
from typing import ClassVar

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn
from torch.nn import functional

from mergevq.config import parts as settings
from mergevq.data.codes import CodeSpec
from mergevq.tokenizer.near import near_level
from mergevq.tokenizer.seams import Quantized


class Dimensions(nn.Module):
    """Channels of B levels by stored statistics; no weight is trained."""

    is_random: ClassVar[bool] = False
    mean: Tensor
    """(D,) of the channels."""
    deviation: Tensor
    """(D,) of the channels, above 0."""
    levels: Tensor
    """(B,) ascending, of a channel of mean 0 and deviation 1. Stored, so that tokens mean the same
    wherever they are decoded."""

    def __init__(self, config: settings.Dimensions) -> None:
        """Begin with means of 0 and deviations of 1."""
        super().__init__()
        self.spec = CodeSpec(sizes=config.sizes, dim=config.dim)
        self.normalized = config.normalized
        self.order = config.channel_order or tuple(range(config.dim))
        self.register_buffer("mean", torch.zeros(config.dim))
        self.register_buffer("deviation", torch.ones(config.dim))
        self.register_buffer("levels", torch.tensor(normal_levels(config.num_levels)))

    def forward(
        self, latents: Float[Tensor, "*b d"], _uniforms: Float[Tensor, "*b d"] | None = None
    ) -> Quantized:
        """Round each channel to its nearest level; the gradient goes straight through."""
        latents = latents.float()
        if self.normalized:
            latents = functional.layer_norm(latents, (self.spec.dim,))
        levels = self.levels.float()
        standard = (latents.detach() - self.mean.float()) / self.deviation.float()
        chosen = torch.bucketize(standard, (levels[1:] + levels[:-1]) / 2)
        # The added zero carries the gradient, and leaves codes as `decode` has them.
        codes = self._codes(chosen) + (latents - latents.detach())
        return Quantized(codes, chosen[..., self.order])

    def decode(self, parts: Int64[Tensor, "*b d"]) -> Float[Tensor, "*b d"]:
        """Codes of levels, which are numbered from the lowest."""
        self.spec.check(parts)
        places = sorted(range(len(self.order)), key=self.order.__getitem__)
        return self._codes(parts[..., places])

    def _codes(self, chosen: Int64[Tensor, "*b d"]) -> Float[Tensor, "*b d"]:
        """Codes of a level of each channel."""
        return self.mean.float() + self.deviation.float() * self.levels.float()[chosen]

    def near(
        self,
        parts: Int64[Tensor, "*b d"],
        uniforms: Float[Tensor, "*b n"],
        _num_near: Float[Tensor, ""],
    ) -> Int64[Tensor, "*b d"]:
        """Move one channel of each token by one level, however many codes are to be near."""
        return near_level(parts, uniforms[..., 0], self.spec.sizes)

    def losses(self, _latents: Float[Tensor, "b k d"]) -> dict[str, Float[Tensor, ""]]:
        """None: levels are measured, not learned."""
        return {}


def normal_levels(num_levels: int) -> list[float]:
    """Means of a standard normal between neighbouring quantiles k / B, ascending.

    Args:
        num_levels: B, at least 2.

    Examples:
        >>> [round(level, 4) for level in normal_levels(4)]
        [-1.2711, -0.3247, 0.3247, 1.2711]
    """
    normal = NormalDist()
    inner = [normal.pdf(normal.inv_cdf(k / num_levels)) for k in range(1, num_levels)]
    densities = [0.0, *inner, 0.0]
    return [num_levels * (low - high) for low, high in itertools.pairwise(densities)]
