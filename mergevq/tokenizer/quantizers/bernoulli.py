"""Bits that are drawn: each channel of a latent is the log-odds of one.

In training a bit is 1 with probability sigmoid(z / T), drawn from the numbers of the step; in
evaluation it is 1 where z is above 0. Codes are -1 and 1, and the gradient is that of 2 sigmoid(z).

Source: Wang et al. 2025, "Instella-T2I: Pushing the Limits of 1D Discrete Latent Space Image
Generation", section 3 (arXiv:2506.21022); written from its description.

Differs: codes are -1 and 1 where the authors add up rows of a table for the bits that are 1, which
the first layer of a decoder does too; the weight of the loss of confidence is ours; entropies are
there for `LossConfig.entropy_weight`, which the authors do not have (0).

Shape letters: B batch, K tokens, D bits per token. The codebook has 2**D entries and is never
stored.
"""

from typing import ClassVar

from jaxtyping import Float, Int64
from torch import Tensor, nn

from mergevq.config import parts as settings
from mergevq.data.codes import CodeSpec
from mergevq.tokenizer.bits import (
    codebook_entropy,
    codes_to_indices,
    indices_to_codes,
    signs_of,
    token_entropy,
)
from mergevq.tokenizer.near import near_bits
from mergevq.tokenizer.seams import Quantized

_OWN_TEMPERATURE = 4.0
"""Temperature at which log-odds of an assignment to signs, 4 z / temperature, are z itself."""


class Bernoulli(nn.Module):
    """D bits drawn in training, as one index."""

    is_random: ClassVar[bool] = True

    def __init__(self, config: settings.Bernoulli) -> None:
        """Take the settings; there are no weights."""
        super().__init__()
        self.spec = CodeSpec(sizes=config.sizes, dim=config.dim, is_binary=True)
        self.sample_temperature = config.sample_temperature

    def forward(
        self, latents: Float[Tensor, "*b d"], uniforms: Float[Tensor, "*b d"] | None = None
    ) -> Quantized:
        """Draw each bit by its number, or without numbers round it.

        Bits of training are noisier than those of evaluation: use of the codebook is to be read
        from evaluations.
        """
        latents = latents.float()
        probabilities = latents.sigmoid()
        if uniforms is None:
            signs = signs_of(latents.detach())
        else:
            signs = signs_of((latents.detach() / self.sample_temperature).sigmoid() - uniforms)
        # The added zero carries the gradient, and leaves the signs exact.
        codes = signs + 2 * (probabilities - probabilities.detach())
        return Quantized(codes, codes_to_indices(signs)[..., None])

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
        """Token entropy minus codebook entropy, of the drawn bits at T = 1, and confidence."""
        probabilities = latents.float().sigmoid()
        tokens = token_entropy(latents, _OWN_TEMPERATURE).mean()
        return {
            "entropy": tokens - codebook_entropy(latents, _OWN_TEMPERATURE),
            "confidence": (probabilities * (1 - probabilities)).mean(),
        }
