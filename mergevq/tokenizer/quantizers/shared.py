"""One index into several codebooks: a token is the entry with the least sum of distances in all.

With two branches the tables are of semantic and of pixel channels, so that one index has two codes.
Latents and codes of each table have length 1. Bits are those of one table.

Source: Qu et al. 2024, "TokenFlow: Unified Image Tokenizer for Multimodal Understanding and
Generation", section 3.1 (arXiv:2412.03069); losses and weights as in its code.

Differs: one scale of tokens, where the authors have up to 9 with residuals; losses are means over
tables unless `means` is `channel`.

Shape letters: B batch, K tokens, V entries, C channels, D of them a table's, N tokens of a step.
"""

import math
from collections.abc import Sequence
from typing import ClassVar

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn
from torch.nn import functional

from mergevq.config import parts as settings
from mergevq.data.codes import CodeSpec
from mergevq.tokenizer.quantizers.tables import Table, follow, near_codes, nearest, statistics_of
from mergevq.tokenizer.seams import Quantized


class Shared(nn.Module):
    """The entry that is nearest in all tables together."""

    is_random: ClassVar[bool] = False

    def __init__(self, config: settings.Shared) -> None:
        """Draw the first codes."""
        super().__init__()
        self.config = config
        self.spec = CodeSpec(sizes=config.sizes, dim=config.dim)
        # Tables side by side: an entry is learned, and starts again, in all of them at once.
        self.table = Table(
            config.codebook_size, config.dim, l2_norm=False, rotates=False, update=config.update
        )

    def forward(
        self, latents: Float[Tensor, "*b c"], _uniforms: Float[Tensor, "*b c"] | None = None
    ) -> Quantized:
        """Replace each latent by the codes of the entry nearest to it."""
        with torch.autocast(latents.device.type, enabled=False):
            latents, codes = self._scaled(latents.float()), self._codes().detach()
            chosen = self._nearest(latents, codes)
            # The added zero carries the gradient, and leaves the codes exact.
            carried = codes[chosen] + (latents - latents.detach())
            return Quantized(carried, chosen[..., None])

    def decode(self, parts: Int64[Tensor, "*b 1"]) -> Float[Tensor, "*b c"]:
        """Codes of all tables, side by side."""
        self.spec.check(parts)
        return self._codes()[parts[..., 0]]

    def near(
        self,
        parts: Int64[Tensor, "*b 1"],
        uniforms: Float[Tensor, "*b n"],
        num_near: Float[Tensor, ""],
    ) -> Int64[Tensor, "*b 1"]:
        """Take one of the nearest other entries, `num_near` of 4,096 of them."""
        codes = self._weighted(self._codes())
        return near_codes(codes, parts[..., 0], uniforms[..., 0], num_near)[..., None]

    def losses(self, latents: Float[Tensor, "*b c"]) -> dict[str, Float[Tensor, ""]]:
        """Commitment of latents to codes; where codes are weights, their distance to latents."""
        with torch.autocast(latents.device.type, enabled=False):
            latents, codes = self._scaled(latents.float()), self._codes()
            chosen = self._nearest(latents, codes.detach())
            found = functional.embedding(chosen, codes)
            losses = {"commitment": self._distance(latents, found.detach())}
            if isinstance(self.table.entries, nn.Embedding):
                losses["codebook"] = self._distance(found, latents.detach())
            return losses

    def statistics(
        self, latents: Float[Tensor, "n c"], parts: Int64[Tensor, "n 1"], generator: torch.Generator
    ) -> list[Float[Tensor, "v d"]]:
        """Statistics of the latents of a step."""
        scaled = self._scaled(latents.float())
        return statistics_of([self.table], [scaled], [parts[:, 0]], generator)

    def follow(self, statistics: Sequence[Float[Tensor, "v d"]]) -> None:
        """Move running means to the latents of a step."""
        follow([self.table], statistics)

    def _codes(self) -> Float[Tensor, "v c"]:
        """All codes in float32."""
        return self._scaled(self.table.codes())

    def _nearest(
        self, latents: Float[Tensor, "*b c"], codes: Float[Tensor, "v c"]
    ) -> Int64[Tensor, "*b"]:
        """Entry with the least weighted sum of squared distances; of equal ones the first."""
        return nearest(self._weighted(latents.detach()), self._weighted(codes))

    def _weighted(self, vectors: Float[Tensor, "*b c"]) -> Float[Tensor, "*b c"]:
        """Vectors whose plain squared distances are the weighted sums."""
        cut = zip(self._cut(vectors), self.config.distance_weights, strict=True)
        return torch.cat([math.sqrt(weight) * each for each, weight in cut], dim=-1)

    def _distance(
        self, vectors: Float[Tensor, "*b c"], target: Float[Tensor, "*b c"]
    ) -> Float[Tensor, ""]:
        """Mean squared difference over channels, or of each table and then over tables."""
        squares = (vectors - target).square()
        if self.config.means == "channel":
            return squares.mean()
        return torch.stack([table.mean() for table in self._cut(squares)]).mean()

    def _scaled(self, vectors: Float[Tensor, "*b c"]) -> Float[Tensor, "*b c"]:
        """Vectors of length 1 in each table's channels."""
        return torch.cat([functional.normalize(each, dim=-1) for each in self._cut(vectors)], -1)

    def _cut(self, channels: Float[Tensor, "*b c"]) -> tuple[Float[Tensor, "*b d"], ...]:
        """Channels of each table."""
        return channels.split(self.config.branch_dims, dim=-1)
