"""Finite scalar quantization: each channel rounds to one of a few levels.

A channel of L levels is y = h tanh(z + s) - o with h = 1.001 (L - 1) / 2, o = 1/2 where L is even
and else 0, and s such that y is 0 where z is. Its code is round(y) over L // 2, from -1 to at most
1; an even L has one level more below 0 than above. The gradient goes straight through to y.

Source: Mentzer et al. 2023, "Finite Scalar Quantization: VQ-VAE Made Simple", section 3
(arXiv:2309.15505).

Shape letters: B batch, K tokens, D channels, each of them a part of a token.
"""

from typing import ClassVar

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from mergevq.config import parts as settings
from mergevq.data.codes import CodeSpec
from mergevq.tokenizer.near import near_level
from mergevq.tokenizer.seams import Quantized

_MARGIN = 1e-3
"""Share by which a channel's bound lies beyond its outer levels, so that these are reached."""


class Fsq(nn.Module):
    """Channels of a few levels, each a part of the token."""

    is_random: ClassVar[bool] = False

    def __init__(self, config: settings.Fsq) -> None:
        """Take the settings; there are no weights."""
        super().__init__()
        self.spec = CodeSpec(sizes=config.sizes, dim=config.dim)

    def forward(
        self, latents: Float[Tensor, "*b d"], _uniforms: Float[Tensor, "*b d"] | None = None
    ) -> Quantized:
        """Round each channel to a level."""
        with torch.autocast(latents.device.type, enabled=False):
            latents = latents.float()
            levels = latents.new_tensor(self.spec.sizes)
            bound = (levels - 1) * (1 + _MARGIN) / 2
            offset = 0.5 * (1 - levels % 2)
            bounded = bound * torch.tanh(latents + torch.atanh(offset / bound)) - offset
            half = levels.div(2, rounding_mode="floor")
            rounded = bounded.detach().round()
            # The added zero carries the gradient, and leaves codes as `decode` has them.
            codes = rounded / half + (bounded - bounded.detach()) / half
            return Quantized(codes, (rounded + half).long())

    def decode(self, parts: Int64[Tensor, "*b d"]) -> Float[Tensor, "*b d"]:
        """Codes of levels, which are numbered from the lowest."""
        self.spec.check(parts)
        half = torch.tensor(self.spec.sizes).to(parts.device, non_blocking=True) // 2
        return (parts - half).float() / half

    def near(
        self,
        parts: Int64[Tensor, "*b d"],
        uniforms: Float[Tensor, "*b n"],
        _num_near: Float[Tensor, ""],
    ) -> Int64[Tensor, "*b d"]:
        """Move one channel of each token by one level, however many codes are to be near."""
        return near_level(parts, uniforms[..., 0], self.spec.sizes)

    def losses(self, _latents: Float[Tensor, "b k d"]) -> dict[str, Float[Tensor, ""]]:
        """None: levels are all used without one."""
        return {}
