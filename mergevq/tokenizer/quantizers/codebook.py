"""A learned codebook: a token is the nearest entry of a table.

Source: van den Oord et al. 2017, "Neural Discrete Representation Learning", section 3
(arXiv:1711.00937); with codes of length 1 as in Sun et al. 2024, "Autoregressive Model Beats
Diffusion" (LlamaGen), section 3.1 (arXiv:2406.06525). Ways to learn it are those of a table:
`mergevq.tokenizer.quantizers.tables`.

Shape letters: B batch, K tokens, D channels, N tokens of a step.
"""

from collections.abc import Sequence
from typing import ClassVar

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from mergevq.config import parts as settings
from mergevq.data.codes import CodeSpec
from mergevq.tokenizer.quantizers.tables import Table, follow, near_codes, statistics_of
from mergevq.tokenizer.seams import Quantized


class Codebook(nn.Module):
    """The nearest entry of one table."""

    is_random: ClassVar[bool] = False

    def __init__(self, config: settings.Codebook) -> None:
        """Draw the first codes."""
        super().__init__()
        self.spec = CodeSpec(sizes=config.sizes, dim=config.dim)
        self.table = Table(
            config.codebook_size,
            config.dim,
            l2_norm=config.l2_norm,
            rotates=config.gradient == "rotation",
            update=config.update,
        )

    def forward(
        self, latents: Float[Tensor, "*b d"], _uniforms: Float[Tensor, "*b d"] | None = None
    ) -> Quantized:
        """Replace each latent by the nearest code."""
        codes, chosen = self.table(latents)
        return Quantized(codes, chosen[..., None])

    def decode(self, parts: Int64[Tensor, "*b 1"]) -> Float[Tensor, "*b d"]:
        """Codes by their numbers."""
        self.spec.check(parts)
        return self.table.codes()[parts[..., 0]]

    def near(
        self,
        parts: Int64[Tensor, "*b 1"],
        uniforms: Float[Tensor, "*b n"],
        num_near: Float[Tensor, ""],
    ) -> Int64[Tensor, "*b 1"]:
        """Take one of the nearest other codes, `num_near` of 4,096 of the table."""
        codes = self.table.codes()
        return near_codes(codes, parts[..., 0], uniforms[..., 0], num_near)[..., None]

    def losses(self, latents: Float[Tensor, "b k d"]) -> dict[str, Float[Tensor, ""]]:
        """Commitment of latents to codes; where codes are weights, their distance to latents."""
        return self.table.losses(latents)

    def statistics(
        self, latents: Float[Tensor, "n d"], parts: Int64[Tensor, "n 1"], generator: torch.Generator
    ) -> list[Float[Tensor, "v c"]]:
        """Statistics of the latents of a step."""
        return statistics_of([self.table], [latents], [parts[:, 0]], generator)

    def follow(self, statistics: Sequence[Float[Tensor, "v c"]]) -> None:
        """Move running means to the latents of a step."""
        follow([self.table], statistics)
