"""Lookup-free quantization: a token becomes the signs of its channels.

Source: Yu et al. 2024, "Language Model Beats Diffusion: Tokenizer is Key to Visual Generation",
section 3 (arXiv:2310.05737); Li et al. 2025, "MergeVQ", section 3 (arXiv:2504.00999).

Signs, integers and entropies are in `mergevq.tokenizer.bits`, with what differs.

Shape letters: B batch, K tokens, D bits per token. The codebook has 2**D entries and is never
stored.
"""

from typing import ClassVar, NamedTuple

from jaxtyping import Bool, Float, Int64
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


class QuantizeLosses(NamedTuple):
    """The quantizer's own losses, unweighted scalars."""

    commitment: Float[Tensor, ""]
    """Mean squared distance of latents to their codes."""
    token_entropy: Float[Tensor, ""]
    """Mean entropy of a token's soft assignment, in nats: low means decided tokens."""
    codebook_entropy: Float[Tensor, ""]
    """Entropy of the mean assignment over all ranks, in nats: high means all codes are used."""

    @property
    def entropy(self) -> Float[Tensor, ""]:
        """`token_entropy - codebook_entropy`: negative in a healthy run, down to -D ln 2."""
        return self.token_entropy - self.codebook_entropy


class Lfq(nn.Module):
    """Signs of D channels, as one index."""

    is_random: ClassVar[bool] = False

    def __init__(self, config: settings.Lfq) -> None:
        """Take the settings; there are no weights."""
        super().__init__()
        self.spec = CodeSpec(sizes=config.sizes, dim=config.dim, is_binary=True)
        self.entropy_temperature = config.entropy_temperature

    def forward(
        self, latents: Float[Tensor, "*b d"], _uniforms: Float[Tensor, "*b d"] | None = None
    ) -> Quantized:
        """Round each channel to its sign."""
        signs = quantize(latents)
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
        """Commitment, and token entropy minus codebook entropy."""
        losses = quantize_losses(latents, self.entropy_temperature)
        return {"commitment": losses.commitment, "entropy": losses.entropy}


def quantize_losses(
    latents: Float[Tensor, "b k d"],
    temperature: float = 0.01,
    mask: Bool[Tensor, "b k"] | None = None,
) -> QuantizeLosses:
    """Commitment and entropies of a batch (weights 0.25 and 0.1 in the paper).

    Args:
        latents: encoder output before `quantize`.
        temperature: of the soft assignment.
        mask: tokens that count; the losses equal those of the selected tokens alone. None is all.
    """
    chosen = latents.flatten(0, 1) if mask is None else latents[mask]
    return QuantizeLosses(
        commitment=sign_distance(chosen),
        token_entropy=token_entropy(chosen, temperature).mean(),
        codebook_entropy=codebook_entropy(chosen, temperature),
    )
