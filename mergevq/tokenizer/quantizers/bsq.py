"""Binary spherical quantization: signs of a vector of length 1.

A latent z becomes u = z / |z| on the sphere, and its code there is sign(u) / sqrt(D). Nothing is
further from its code than sqrt(2 - 2 / sqrt(D)).

Codes are sign(u): those on the sphere times sqrt(D), so that decoders have the same scale from all
kinds of bits. A decoder's first layer takes up such a factor, and all else is the same: the
gradient goes straight through to sqrt(D) u, and the losses are of u and of codes on the sphere.

Source: Zhao et al. 2024, "Image and Video Tokenization with Binary Spherical Quantization",
section 4 (arXiv:2406.07548).

Differs: the codebook entropy is that of all 2**D codes up to 24 bits, where the authors' code sums
that of groups of bits; commitment is a mean over channels, not their sum; the lowest bit of an
index is the first channel, not the last.

Shape letters: B batch, K tokens, D bits per token. The codebook has 2**D entries and is never
stored.
"""

import math
from typing import ClassVar

from jaxtyping import Float, Int64
from torch import Tensor, nn

from mergevq.config import parts as settings
from mergevq.data.codes import CodeSpec
from mergevq.tokenizer.bits import (
    codebook_entropy,
    indices_to_codes,
    quantize,
    sign_distance,
    token_entropy,
)
from mergevq.tokenizer.near import near_bits
from mergevq.tokenizer.seams import Quantized


class Bsq(nn.Module):
    """Signs of D channels of a vector of length 1, as one index."""

    is_random: ClassVar[bool] = False

    def __init__(self, config: settings.Bsq) -> None:
        """Take the settings; there are no weights."""
        super().__init__()
        self.spec = CodeSpec(sizes=config.sizes, dim=config.dim, is_binary=True)
        self.entropy_temperature = config.entropy_temperature

    def forward(
        self, latents: Float[Tensor, "*b d"], _uniforms: Float[Tensor, "*b d"] | None = None
    ) -> Quantized:
        """Round each channel to its sign; a latent of zeros has no bit set."""
        signs = quantize(self._on_sphere(latents) * math.sqrt(self.spec.dim))
        return Quantized(signs.codes, signs.indices[..., None])

    def decode(self, parts: Int64[Tensor, "*b 1"]) -> Float[Tensor, "*b d"]:
        """Signs of indices."""
        return indices_to_codes(parts[..., 0], self.spec.dim)

    def near(
        self,
        parts: Int64[Tensor, "*b 1"],
        uniforms: Float[Tensor, "*b n"],
        num_near: Float[Tensor, ""],
    ) -> Int64[Tensor, "*b 1"]:
        """Change a few bits of each token, uniformly in the ball of `num_near`."""
        return near_bits(parts, self.spec.dim, uniforms, num_near)

    def losses(self, latents: Float[Tensor, "b k d"]) -> dict[str, Float[Tensor, ""]]:
        """Commitment on the sphere, and token entropy minus codebook entropy.

        The authors have no commitment (weight 0). At temperature 1 no bit of many is decided, and
        token entropy stays near D ln 2.
        """
        unit = self._on_sphere(latents)
        # Entropies are of codes +-1; those of +-1 / sqrt(D) are the same of u / sqrt(D).
        scaled = unit / math.sqrt(self.spec.dim)
        temperature = self.entropy_temperature
        tokens = token_entropy(scaled, temperature).mean()
        return {
            "commitment": sign_distance(unit * math.sqrt(self.spec.dim)) / self.spec.dim,
            "entropy": tokens - codebook_entropy(scaled, temperature),
        }

    def _on_sphere(self, latents: Float[Tensor, "*b d"]) -> Float[Tensor, "*b d"]:
        """Latents over their length, in float32; zeros stay zeros."""
        return nn.functional.normalize(latents.float(), dim=-1, eps=1e-12)
