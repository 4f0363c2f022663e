"""Residual codebooks: a latent is a sum of codes, each nearest to what those before it leave.

Channels may be cut into branches, which have codebooks of their own: with two of them, semantic and
pixel channels of a token are quantized side by side.

Source: Lee et al. 2022, "Autoregressive Image Generation using Residual Quantization", section 3.1
(arXiv:2203.01941); Song et al. 2025, "DualToken: Towards Unifying Visual Understanding and
Generation with Dual Visual Vocabularies" (two branches, songweii/DualToken); written from its
description.

Differs: restarts draw any residual of the step; the semantic tokens that leave the quantizer do not
go on through blocks of the encoder.

Shape letters: B batch, K tokens, C channels, D of them a branch's, R depth, P parts, N tokens.
"""

from collections.abc import Iterator, Sequence
from typing import ClassVar, NamedTuple

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn
from torch.nn import functional

from mergevq.config import parts as settings
from mergevq.data.codes import CodeSpec
from mergevq.tokenizer.quantizers.tables import Table, follow, near_codes, nearest, statistics_of
from mergevq.tokenizer.seams import Quantized


class Step(NamedTuple):
    """One code of a sum."""

    table: Table
    """Its codebook."""
    residuals: Float[Tensor, "*b d"]
    """The rest of the latents that the codes before it leave, without gradient."""
    chosen: Int64[Tensor, "*b"]
    """Numbers of the codes."""
    sums: Float[Tensor, "*b d"]
    """Sums up to this code, without gradient."""


class Stack(nn.Module):
    """R codes of one branch."""

    def __init__(self, config: settings.Residual, dim: int) -> None:
        """Draw the first codes."""
        super().__init__()
        count = 1 if config.share_codebook else config.depth
        self.depth = config.depth
        self.tables = nn.ModuleList(
            Table(config.codebook_size, dim, l2_norm=False, rotates=False, update=config.update)
            for _ in range(count)
        )

    @property
    def own_tables(self) -> list[Table]:
        """Each table once."""
        return [table for table in self.tables if isinstance(table, Table)]

    @property
    def levels(self) -> list[Table]:
        """Table of each code."""
        tables = self.own_tables
        return tables * self.depth if len(tables) == 1 else tables

    def steps(self, latents: Float[Tensor, "*b d"]) -> Iterator[Step]:
        """Choose code after code, each the nearest to what is left."""
        residuals = latents.detach().float()
        sums = torch.zeros_like(residuals)
        for table in self.levels:
            codes = table.codes().detach()
            chosen = nearest(residuals, codes)
            sums = sums + codes[chosen]
            yield Step(table, residuals, chosen, sums)
            residuals = residuals - codes[chosen]

    def decode(self, parts: Int64[Tensor, "*b r"]) -> Float[Tensor, "*b d"]:
        """Sums of codes, added in the order of `steps`."""
        pairs = zip(self.levels, parts.unbind(-1), strict=True)
        found = [table.codes()[part] for table, part in pairs]
        return sum(found, torch.zeros_like(found[0]))

    def losses(self, latents: Float[Tensor, "*b d"]) -> dict[str, Float[Tensor, ""]]:
        """Means over the codes of a sum.

        `commitment` is of latents to the sum so far; where codes are weights, `codebook` is of a
        code to what it was chosen for.
        """
        latents = latents.float()
        commitments, codebooks = [], []
        for step in self.steps(latents):
            commitments.append(functional.mse_loss(latents, step.sums))
            if isinstance(step.table.entries, nn.Embedding):
                found = functional.embedding(step.chosen, step.table.codes())
                codebooks.append(functional.mse_loss(found, step.residuals))
        losses = {"commitment": torch.stack(commitments).mean()}
        return losses | ({"codebook": torch.stack(codebooks).mean()} if codebooks else {})

    def statistics(
        self, latents: Float[Tensor, "n d"], generator: torch.Generator
    ) -> list[Float[Tensor, "v c"]]:
        """Statistics of the residuals of a step, of each table."""
        steps = list(self.steps(latents))
        found = []
        for table in self.own_tables:
            own = [step for step in steps if step.table is table]
            residuals = torch.cat([step.residuals for step in own])
            chosen = torch.cat([step.chosen for step in own])
            found += statistics_of([table], [residuals], [chosen], generator)
        return found


class Residual(nn.Module):
    """Sums of nearest codes, of each branch."""

    is_random: ClassVar[bool] = False

    def __init__(self, config: settings.Residual) -> None:
        """Draw the first codes of each branch."""
        super().__init__()
        self.config = config
        self.spec = CodeSpec(sizes=config.sizes, dim=config.dim)
        self.stacks = nn.ModuleList(Stack(config, dim) for dim in config.branch_dims)

    @property
    def _branches(self) -> list[Stack]:
        """The stacks, by their class."""
        return [stack for stack in self.stacks if isinstance(stack, Stack)]

    def forward(
        self, latents: Float[Tensor, "*b c"], _uniforms: Float[Tensor, "*b c"] | None = None
    ) -> Quantized:
        """Replace each branch's channels by its sum of codes."""
        with torch.autocast(latents.device.type, enabled=False):
            latents = latents.float()
            sums, parts = [], []
            for stack, own in zip(self._branches, self._cut(latents), strict=True):
                steps = list(stack.steps(own))
                sums.append(steps[-1].sums)
                parts += [step.chosen for step in steps]
            # The added zero carries the gradient, and leaves the codes exact.
            codes = torch.cat(sums, dim=-1) + (latents - latents.detach())
            return Quantized(codes, torch.stack(parts, dim=-1))

    def decode(self, parts: Int64[Tensor, "*b p"]) -> Float[Tensor, "*b c"]:
        """Sums of all branches, side by side."""
        self.spec.check(parts)
        own = parts.split(self.config.depth, dim=-1)
        sums = [stack.decode(each) for stack, each in zip(self._branches, own, strict=True)]
        return torch.cat(sums, dim=-1)

    def near(
        self,
        parts: Int64[Tensor, "*b p"],
        uniforms: Float[Tensor, "*b n"],
        num_near: Float[Tensor, ""],
    ) -> Int64[Tensor, "*b p"]:
        """Take another code in one place, of the nearest `num_near` of 4,096 of its table."""
        tables = [table for stack in self._branches for table in stack.levels]
        moved = (uniforms[..., 0] * len(tables)).long().clamp(max=len(tables) - 1)
        others = [
            near_codes(table.codes(), part, uniforms[..., 1], num_near)
            for table, part in zip(tables, parts.unbind(-1), strict=True)
        ]
        is_moved = torch.arange(len(tables), device=parts.device) == moved[..., None]
        return torch.where(is_moved, torch.stack(others, dim=-1), parts)

    def losses(self, latents: Float[Tensor, "*b c"]) -> dict[str, Float[Tensor, ""]]:
        """Losses of the branches, a mean over them."""
        with torch.autocast(latents.device.type, enabled=False):
            cut = zip(self._branches, self._cut(latents), strict=True)
            each = [stack.losses(own) for stack, own in cut]
            return {name: torch.stack([found[name] for found in each]).mean() for name in each[0]}

    def statistics(
        self,
        latents: Float[Tensor, "n c"],
        parts: Int64[Tensor, "n p"],  # noqa: ARG002 - residuals need the codes again
        generator: torch.Generator,
    ) -> list[Float[Tensor, "v _"]]:
        """Statistics of the residuals of a step, of each table of each branch."""
        pairs = zip(self._branches, self._cut(latents), strict=True)
        return [each for stack, own in pairs for each in stack.statistics(own, generator)]

    def follow(self, statistics: Sequence[Float[Tensor, "v _"]]) -> None:
        """Move running means to the residuals of a step."""
        follow([table for stack in self._branches for table in stack.own_tables], statistics)

    def _cut(self, channels: Float[Tensor, "*b c"]) -> tuple[Float[Tensor, "*b d"], ...]:
        """Channels of each branch."""
        return channels.split(self.config.branch_dims, dim=-1)
