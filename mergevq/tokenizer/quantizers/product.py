"""A product of codebooks: each has channels of its own, and a part of the token.

The penalty `orthogonality` draws the codes of a token to right angles: the mean, over pairs of
books, of the squared cosine of their codes. Of random directions it is 1 / D.

Source: Bai et al. 2024, "Factorized Visual Tokenization and Generation" (FQGAN), section 3
(arXiv:2411.16681); written from its description.

Differs: books have no adapters of their own before them, and no features of a teacher to predict,
so that no book has a role; losses are means over books.

Shape letters: B batch, K tokens, F books, C channels, D of them a book, N tokens.
"""

import itertools
from collections.abc import Sequence
from typing import ClassVar

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn
from torch.nn import functional

from mergevq.config import parts as settings
from mergevq.data.codes import CodeSpec
from mergevq.tokenizer.quantizers.tables import Table, follow, near_codes, statistics_of
from mergevq.tokenizer.seams import Quantized


class Product(nn.Module):
    """The nearest entry of each of several tables, side by side."""

    is_random: ClassVar[bool] = False

    def __init__(self, config: settings.Product) -> None:
        """Draw the first codes of each book."""
        super().__init__()
        self.spec = CodeSpec(sizes=config.sizes, dim=config.dim)
        self.tables = nn.ModuleList(
            Table(
                config.codebook_size,
                config.book_dim,
                l2_norm=config.l2_norm,
                rotates=config.gradient == "rotation",
                update=config.update,
            )
            for _ in config.sizes
        )

    @property
    def _books(self) -> list[Table]:
        """The tables, by their class."""
        return [table for table in self.tables if isinstance(table, Table)]

    def forward(
        self, latents: Float[Tensor, "*b c"], _uniforms: Float[Tensor, "*b c"] | None = None
    ) -> Quantized:
        """Replace each book's channels by its nearest code."""
        found = [table(each) for table, each in zip(self._books, self._cut(latents), strict=True)]
        codes, chosen = zip(*found, strict=True)
        return Quantized(torch.cat(codes, dim=-1), torch.stack(chosen, dim=-1))

    def decode(self, parts: Int64[Tensor, "*b f"]) -> Float[Tensor, "*b c"]:
        """Codes of all books, side by side."""
        self.spec.check(parts)
        chosen = zip(self._books, parts.unbind(-1), strict=True)
        return torch.cat([table.codes()[part] for table, part in chosen], dim=-1)

    def near(
        self,
        parts: Int64[Tensor, "*b f"],
        uniforms: Float[Tensor, "*b n"],
        num_near: Float[Tensor, ""],
    ) -> Int64[Tensor, "*b f"]:
        """Take another code in one book, of the nearest `num_near` of 4,096 of its table."""
        count = len(self._books)
        moved = (uniforms[..., 0] * count).long().clamp(max=count - 1)
        others = [
            near_codes(table.codes(), part, uniforms[..., 1], num_near)
            for table, part in zip(self._books, parts.unbind(-1), strict=True)
        ]
        is_moved = torch.arange(count, device=parts.device) == moved[..., None]
        return torch.where(is_moved, torch.stack(others, dim=-1), parts)

    def losses(self, latents: Float[Tensor, "*b c"]) -> dict[str, Float[Tensor, ""]]:
        """Losses of the tables, a mean over books, and the orthogonality of their codes."""
        cut = self._cut(latents)
        each = [table.losses(z) for table, z in zip(self._books, cut, strict=True)]
        losses = {name: torch.stack([found[name] for found in each]).mean() for name in each[0]}
        return {**losses, "orthogonality": self._orthogonality(latents)}

    def statistics(
        self, latents: Float[Tensor, "n c"], parts: Int64[Tensor, "n f"], generator: torch.Generator
    ) -> list[Float[Tensor, "v d"]]:
        """Statistics of the latents of a step, of each book."""
        return statistics_of(self._books, self._cut(latents), parts.unbind(-1), generator)

    def follow(self, statistics: Sequence[Float[Tensor, "v d"]]) -> None:
        """Move running means to the latents of a step."""
        follow(self._books, statistics)

    def _orthogonality(self, latents: Float[Tensor, "*b c"]) -> Float[Tensor, ""]:
        """Mean squared cosine of two books' codes, whose gradient goes to the latents alone."""
        units = [functional.normalize(each, dim=-1) for each in self._cut(self(latents).codes)]
        pairs = list(itertools.combinations(units, 2))
        if not pairs:
            return latents.new_zeros((), dtype=torch.float32)
        return torch.stack([(a * b).sum(-1).square().mean() for a, b in pairs]).mean()

    def _cut(self, channels: Float[Tensor, "*b c"]) -> tuple[Float[Tensor, "*b d"], ...]:
        """Channels of each book."""
        return channels.chunk(len(self.spec.sizes), dim=-1)
