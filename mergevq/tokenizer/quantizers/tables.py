"""Codebooks that are tables: the nearest entry, ways to learn entries, gradients past them.

A quantizer is made of one table or of several.

Source: van den Oord et al. 2017, "Neural Discrete Representation Learning", section 3 and appendix
A.1 (arXiv:1711.00937); Fifty et al. 2024, "Restructuring Vector Quantization with the Rotation
Trick", section 4 (arXiv:2410.06424); Yu et al. 2021, "Vector-quantized Image Modeling with Improved
VQGAN", section 3.2, for codes of length 1 (arXiv:2110.04627).

Differs: running means change after a step that was taken, not in each forward pass; a code starts
again where its count is below a share of the mean count, where others have a number of tokens,
which is another share for each size of batch; the first codes are normal numbers on the scale of
the first latents, not latents of a batch.

Shape letters: V entries, D channels, N tokens.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn
from torch.nn import functional

from mergevq.config.parts import EmaUpdate, GradientUpdate, Update
from mergevq.runtime import distributed
from mergevq.runtime.device import send

_INITIAL_STD = 0.3
"""Deviation of the first codes, about that of the first latents."""
_MAX_SCORES = 2**24
"""Pairs of tokens and entries that are compared at once, 64 MiB."""
_SMOOTHING = 1e-5
"""Added to counts, so that none is 0."""
_MIN_LENGTH = 1e-6
"""Length below which a vector has no direction that it could be rotated from."""
_CODES = 4096
"""Entries of the codebook that numbers of near ones are counted in."""


class RunningMeans(nn.Module):
    """Codes that are means of their latents over the last steps."""

    counts: Float[Tensor, "v"]
    """Running count of each code's tokens in a step."""
    sums: Float[Tensor, "v d"]
    """Running sum of their latents."""

    def __init__(self, codebook_size: int, dim: int, config: EmaUpdate) -> None:
        """Draw the first codes, which count as means of one latent each."""
        super().__init__()
        self.config = config
        self.register_buffer("counts", torch.ones(codebook_size))
        self.register_buffer("sums", torch.empty(codebook_size, dim))
        nn.init.normal_(self.sums, std=_INITIAL_STD)

    def forward(self) -> Float[Tensor, "v d"]:
        """Codes in float32: sums over smoothed counts."""
        counts, total = self.counts.float(), self.counts.float().sum()
        smoothed = (counts + _SMOOTHING) / (total + len(counts) * _SMOOTHING) * total
        return self.sums.float() / smoothed[:, None]

    @torch.no_grad()
    def follow(self, statistics: Float[Tensor, "v c"]) -> None:
        """Move counts and sums to those of a step, and start codes again that are hardly used.

        Args:
            statistics: of all ranks, as `Table.statistics` has them.
        """
        counts, sums, fresh = statistics.split([1, *[self.sums.shape[1]] * 2], dim=1)
        self.counts.lerp_(counts[:, 0], 1 - self.config.decay)
        self.sums.lerp_(sums, 1 - self.config.decay)
        least = self.config.restart_below * self.counts.mean()
        is_dead = self.counts < least
        self.counts.copy_(torch.where(is_dead, least, self.counts))
        self.sums.copy_(torch.where(is_dead[:, None], fresh * least, self.sums))


class Table(nn.Module):
    """V codes of D channels, of which the nearest stands for a latent."""

    def __init__(
        self, codebook_size: int, dim: int, *, l2_norm: bool, rotates: bool, update: Update
    ) -> None:
        """Draw the first codes.

        Args:
            codebook_size: V.
            dim: D.
            l2_norm: whether latents and codes have length 1.
            rotates: whether gradients are rotated on their way from a code to its latent.
            update: how codes are learned.
        """
        super().__init__()
        self.l2_norm, self.rotates = l2_norm, rotates
        match update:
            case GradientUpdate():
                # An embedding, so that weight decay leaves it alone.
                self.entries = nn.Embedding(codebook_size, dim)
                nn.init.normal_(self.entries.weight, std=_INITIAL_STD)
            case EmaUpdate():
                self.entries = RunningMeans(codebook_size, dim, update)

    def codes(self) -> Float[Tensor, "v d"]:
        """All codes, in float32."""
        entries = self.entries
        rows = entries() if isinstance(entries, RunningMeans) else entries.weight.float()
        return self._scaled(rows)

    def forward(
        self, latents: Float[Tensor, "*b d"]
    ) -> tuple[Float[Tensor, "*b d"], Int64[Tensor, "*b"]]:
        """Nearest codes, whose gradient goes to the latents alone, and their numbers."""
        with torch.autocast(latents.device.type, enabled=False):
            latents, codes = self._scaled(latents.float()), self.codes().detach()
            chosen = nearest(latents.detach(), codes)
            found = codes[chosen]
            carried = rotate(latents, found) if self.rotates else latents
            # The added zero carries the gradient, and leaves the codes exact.
            return found + (carried - carried.detach()), chosen

    def losses(self, latents: Float[Tensor, "*b d"]) -> dict[str, Float[Tensor, ""]]:
        """Mean squared distance of latents to codes: once to move latents, once to move codes.

        The second is `codebook`, and there only where codes are weights.
        """
        with torch.autocast(latents.device.type, enabled=False):
            latents, codes = self._scaled(latents.float()), self.codes()
            found = functional.embedding(nearest(latents.detach(), codes.detach()), codes)
            losses = {"commitment": functional.mse_loss(latents, found.detach())}
            if isinstance(self.entries, nn.Embedding):
                losses["codebook"] = functional.mse_loss(found, latents.detach())
            return losses

    def statistics(
        self, latents: Float[Tensor, "n d"], chosen: Int64[Tensor, "n"], rows: Int64[Tensor, "v"]
    ) -> Float[Tensor, "v c"]:
        """Parts of running means that a step adds, to be summed over ranks: 1 + 2 D numbers a code.

        Args:
            latents: of this rank's tokens.
            chosen: their codes.
            rows: token that each code becomes if it starts again; not all are of this rank.

        Returns:
            Count of its tokens, the sum of their latents, and the latent that it may become.
        """
        latents = self._scaled(latents.float())
        sums = latents.new_zeros(len(rows), 1 + latents.shape[1])
        sums.index_add_(0, chosen, functional.pad(latents, (1, 0), value=1.0))
        is_here = (rows >= 0) & (rows < len(latents))
        fresh = latents[rows.clamp(0, len(latents) - 1)] * is_here[:, None]
        return torch.cat([sums, fresh], dim=1)

    def _scaled(self, vectors: Float[Tensor, "*b d"]) -> Float[Tensor, "*b d"]:
        """Vectors as they are compared: of length 1, or as they are."""
        return functional.normalize(vectors, dim=-1) if self.l2_norm else vectors


@torch.no_grad()
def statistics_of(
    tables: Sequence[Table],
    latents: Sequence[Float[Tensor, "n d"]],
    chosen: Sequence[Int64[Tensor, "n"]],
    generator: torch.Generator,
) -> list[Float[Tensor, "v c"]]:
    """Parts of running means that the tokens of a step add to each table; none of weights.

    Args:
        tables: equally large ones, all learned in one way.
        latents: for each table those of this rank's tokens, as many on every rank.
        chosen: their codes.
        generator: draws the tokens that codes start again from, the same ones on every rank.
    """
    means = _running_means(tables)
    if not means:
        return []
    rank, num_ranks = distributed.place()
    num_tokens, device = len(latents[0]), latents[0].device
    shape = (len(tables), len(means[0].counts))
    drawn = send(torch.randint(num_tokens * num_ranks, shape, generator=generator), device)
    return list(map(Table.statistics, tables, latents, chosen, drawn - rank * num_tokens))


def follow(tables: Sequence[Table], statistics: Sequence[Float[Tensor, "v c"]]) -> None:
    """Let running means follow the sums over ranks of `statistics_of`; weights stay."""
    for means, summed in zip(_running_means(tables), statistics, strict=True):
        means.follow(summed)


def _running_means(tables: Sequence[Table]) -> list[RunningMeans]:
    """Those of tables whose codes are no weights."""
    return [table.entries for table in tables if isinstance(table.entries, RunningMeans)]


def nearest(latents: Float[Tensor, "*b d"], codes: Float[Tensor, "v d"]) -> Int64[Tensor, "*b"]:
    """Number of the code nearest to each latent; of equally near ones the first."""
    flat = latents.reshape(-1, latents.shape[-1])
    half_norms = codes.square().sum(-1) / 2
    # A graph of any number of images cannot have as many pieces as these make.
    is_graph = torch.compiler.is_compiling()
    pieces = [flat] if is_graph else flat.split(max(1, _MAX_SCORES // len(codes)))
    found = [(piece @ codes.T - half_norms).argmax(-1) for piece in pieces]
    return torch.cat(found).view(latents.shape[:-1])


def near_codes(
    codes: Float[Tensor, "v d"],
    chosen: Int64[Tensor, "*b"],
    uniforms: Float[Tensor, "*b"],
    num_near: Float[Tensor, ""],
) -> Int64[Tensor, "*b"]:
    """Another code for each, drawn uniformly from the nearest ones.

    Args:
        codes: of the table.
        chosen: numbers of codes.
        uniforms: a number in [0, 1) for each.
        num_near: codes of 4,096 that these are as large a share of, to the nearest number of codes
            from 1 to all others.
    """
    count = (num_near / _CODES * len(codes)).round().clamp(1, len(codes) - 1)
    rank = (uniforms * count).floor().minimum(count - 1).long()
    distances = torch.cdist(codes[chosen].flatten(0, -2), codes)
    # Behind all others, whatever codes are equal to it.
    distances.scatter_(1, chosen.flatten()[:, None], torch.inf)
    order = distances.argsort(dim=1, stable=True)
    return order.gather(1, rank.flatten()[:, None]).view(chosen.shape)


def rotate(latents: Float[Tensor, "*b d"], codes: Float[Tensor, "*b d"]) -> Float[Tensor, "*b d"]:
    """Latents rotated and scaled to their codes, by a map that is constant to gradients.

    Where latent or code is 0, or they are opposite to each other, it is the latent as it is.
    """
    lengths = torch.linalg.vector_norm(latents.detach(), dim=-1, keepdim=True)
    start = functional.normalize(latents.detach(), dim=-1)
    end = functional.normalize(codes, dim=-1)
    middle = start + end
    is_regular = torch.linalg.vector_norm(middle, dim=-1, keepdim=True) >= _MIN_LENGTH
    is_regular &= (lengths >= _MIN_LENGTH) & end.any(-1, keepdim=True)
    middle = functional.normalize(middle, dim=-1)
    along_middle = (latents * middle).sum(-1, keepdim=True) * middle
    along_start = (latents * start).sum(-1, keepdim=True) * end
    ratio = torch.linalg.vector_norm(codes, dim=-1, keepdim=True) / lengths.clamp_min(_MIN_LENGTH)
    rotated = ratio * (latents - 2 * along_middle + 2 * along_start)
    return torch.where(is_regular, rotated, latents)
