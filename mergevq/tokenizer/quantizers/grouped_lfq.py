"""Lookup-free quantization in groups of bits, for tokens of many bits.

Signs are those of `lfq`. Each group of bits is a part of the token, the lowest bits first, and the
entropies are those of the groups: a sum of small tables in place of one of 2**D codes.

Source: Zhuang et al. 2025, "WeTok: Powerful Discrete Tokenization for High-Fidelity Visual
Reconstruction", section 3.1 (arXiv:2508.05599).

Differs: the codebook entropy is the sum over groups, as the paper has it, where the authors' code
pools the groups first (`codebook_entropy` pooled), after which groups that are constant and unlike
count as diverse; and ours has no 1e-5 inside the logarithm.

Shape letters: B batch, K tokens, D bits per token, G groups.
"""

from typing import ClassVar

from jaxtyping import Float, Int64
from torch import Tensor, nn

from mergevq.config import parts as settings
from mergevq.data.codes import CodeSpec
from mergevq.tokenizer.bits import (
    codes_to_indices,
    grouped_codebook_entropy,
    indices_to_codes,
    pooled_codebook_entropy,
    sign_distance,
    signs_of,
    token_entropy,
)
from mergevq.tokenizer.near import near_bits
from mergevq.tokenizer.seams import Quantized


class GroupedLfq(nn.Module):
    """Signs of D channels, a part of the token for each group of them."""

    is_random: ClassVar[bool] = False

    def __init__(self, config: settings.GroupedLfq) -> None:
        """Take the settings; there are no weights."""
        super().__init__()
        self.config = config
        self.spec = CodeSpec(sizes=config.sizes, dim=config.dim, is_binary=True)

    def forward(
        self, latents: Float[Tensor, "*b d"], _uniforms: Float[Tensor, "*b d"] | None = None
    ) -> Quantized:
        """Round each channel to its sign."""
        codes = signs_of(latents)
        groups = codes.unflatten(-1, (len(self.spec.sizes), self.config.group_bits))
        return Quantized(codes, codes_to_indices(groups))

    def decode(self, parts: Int64[Tensor, "*b g"]) -> Float[Tensor, "*b d"]:
        """Signs of the groups' indices."""
        return indices_to_codes(parts, self.config.group_bits).flatten(-2)

    def near(
        self,
        parts: Int64[Tensor, "*b g"],
        uniforms: Float[Tensor, "*b n"],
        num_near: Float[Tensor, ""],
    ) -> Int64[Tensor, "*b g"]:
        """Change a few bits of each token, uniformly in the ball of `num_near` over all groups."""
        return near_bits(parts, self.spec.dim, uniforms, num_near)

    def losses(self, latents: Float[Tensor, "b k d"]) -> dict[str, Float[Tensor, ""]]:
        """Commitment, and token entropy minus codebook entropy."""
        group_bits, temperature = self.config.group_bits, self.config.entropy_temperature
        # Bits are independent in a token: the sum over groups is that over bits, in any grouping.
        tokens = token_entropy(latents, temperature).mean()
        if self.config.codebook_entropy == "pooled":
            codebook = pooled_codebook_entropy(latents, group_bits, temperature)
            tokens = tokens / len(self.spec.sizes)
        else:
            codebook = grouped_codebook_entropy(latents, group_bits, temperature)
        return {"commitment": sign_distance(latents), "entropy": tokens - codebook}
