"""Anchored order: the kept tokens in canonical order, each with the cell at which it opens.

    [class, M, (a_1, x_1) .. (a_K, x_K)]

M is the merge instruction, an embedding of K; a_i is the cell at which kept token x_i opens. The
head predicts it as the gap from the anchor before, restricted to gaps after which the tokens left
still fit; with `gap_in_bits` as the bits of that gap less 1, from the highest to the lowest, each
restricted to those after which a legal gap is left. The anchor is then implied, one legal value
that costs nothing, and enters the transformer beside the bits.

Source: this project's own; the canonical order is that of the source map (`data/layouts.py`) of Li
et al. 2025, "MergeVQ", section 3.2 (arXiv:2504.00999).

Shape letters: B batch, R rows, L grid cells, T kept tokens, P parts of a token, C channels, V
values of a part, G bits of a gap.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Int64
from torch import Tensor
from torch.nn import functional

from mergevq.config.generator import (
    GeneratorConfig,
    SamplingSettings,
)
from mergevq.generator.cache import FullCache
from mergevq.generator.decoding import full_cache, lay_out
from mergevq.generator.network import Cache, Network, check_range
from mergevq.generator.seams import Decoder, Draws, Layout, Numbers, Sampled, Sequences
from mergevq.generator.static.caches import StaticCache, static_cache
from mergevq.generator.static.decoder import token_decoder
from mergevq.nn.checks import require_all
from mergevq.nn.llama import Rotation


@dataclass(frozen=True)
class Anchored:
    """Kept tokens in canonical order with their anchors (`seams.Order`)."""

    config: GeneratorConfig

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Do nothing: the order has no weights."""

    def draw(self, sequences: Sequences, numbers: Numbers) -> Sequences:  # noqa: ARG002
        """The same: nothing about the order is random."""
        return sequences

    def num_inputs(self, config: GeneratorConfig, num_kept: int) -> int:
        """The prefix and all kept tokens but the last."""
        return config.num_prefix + num_kept - 1

    def parts(
        self, codes: Int64[Tensor, "b t f"], sequences: Sequences, config: GeneratorConfig
    ) -> Int64[Tensor, "b t p"]:
        """Bits of the gap, if they are predicted, the anchor, then the sub-indices.

        Raises:
            ValueError: anchors are missing, no cells, or out of order.
        """
        anchors = sequences.anchors
        if anchors is None:
            raise ValueError("order 'anchor' needs anchors: the cell at which each token opens")
        check_range("anchors", anchors, config.num_tokens - 1, "the last cell of the grid")
        # The first one is 0, and each further one above the one before it.
        increases = functional.pad(anchors, (1, 0), value=-1).diff(dim=1) >= 1
        require_all(
            increases & (anchors[:, :1] == 0),
            "anchors must start at cell 0 and increase: tokens in canonical order",
        )
        bits = to_bits(functional.pad(anchors.diff(dim=1) - 1, (1, 0)), config.num_gap_bits)
        return torch.cat([bits, anchors[..., None], codes], dim=-1)

    def layout(
        self, network: Network, parts: Int64[Tensor, "b t p"], sequences: Sequences
    ) -> Layout:
        """Each token is at its anchor, and sees all up to itself."""
        num_bits = self.config.num_gap_bits
        bits, cells, codes = parts[..., :num_bits], parts[..., num_bits], parts[..., num_bits + 1 :]
        layout = lay_out(network, sequences, parts, network.cell_positions()[cells])
        previous = functional.pad(cells[:, :-1], (1, 0))
        tokens = torch.arange(cells.shape[1], device=cells.device)
        legal = legal_gaps(previous, tokens, sequences.num_kept, self.config.num_tokens)
        if not self.config.order.gap_in_bits:
            targets = torch.cat([(cells - previous)[..., None], codes], dim=-1)
            return layout._replace(targets=targets, allowed={0: legal})
        most = legal.sum(-1) - 1
        allowed = {
            number: legal_bits(from_bits(bits[..., :number]), number, num_bits, most)
            for number in range(num_bits)
        }
        # The cell is implied: it is predicted as 0, the one value that is legal.
        allowed[num_bits] = implied(cells, self.config.num_tokens)
        targets = torch.cat([bits, torch.zeros_like(cells)[..., None], codes], dim=-1)
        return layout._replace(targets=targets, allowed=allowed)

    def cache(
        self,
        network: Network,
        *,
        batch: int,
        num_kept: int,
        settings: SamplingSettings,  # noqa: ARG002
    ) -> FullCache:
        """A slot for every input."""
        return full_cache(network, batch, num_kept - 1)

    def rules(
        self,
        network: Network,
        cache: Cache,  # noqa: ARG002
        *,
        batch: int,
        num_kept: int,
        settings: SamplingSettings,  # noqa: ARG002
    ) -> "Gaps":
        """Only gaps after which the tokens left still fit."""
        start = torch.zeros(batch, dtype=torch.int64, device=network.device)
        return Gaps(start, num_kept, self.config)

    def turns(
        self,
        cache: Cache,
        parts: Int64[Tensor, "r p"],
        token: int,  # noqa: ARG002
    ) -> Rotation:
        """Turns of the token's anchor."""
        return self._turns(cache, parts)

    def _turns(self, cache: Cache, parts: Int64[Tensor, "r p"]) -> Rotation:
        """Turns of the cells at which tokens open."""
        anchor = parts[:, self.config.num_gap_bits, None, None]
        return Rotation(*(table[0, 0, anchor] for table in cache.turns))

    def static_cache(
        self,
        network: Network,
        *,
        batch: int,
        num_kept: int,
        settings: SamplingSettings,  # noqa: ARG002
    ) -> StaticCache:
        """A slot for every input, and for the last token."""
        return static_cache(network, batch, num_kept)

    def static_rules(
        self,
        network: Network,
        cache: Cache,
        *,
        batch: int,
        num_kept: int,
        settings: SamplingSettings,
    ) -> "Gaps":
        """The same rules."""
        return self.rules(network, cache, batch=batch, num_kept=num_kept, settings=settings)

    def static_turns(
        self,
        cache: Cache,
        parts: Int64[Tensor, "r p"],
        token: Int64[Tensor, "1"],  # noqa: ARG002
    ) -> Rotation:
        """Turns of the token's anchor."""
        return self._turns(cache, parts)

    def decoder(
        self,
        network: Network,
        labels: Int64[Tensor, "b"],
        num_kept: int,
        draws: Draws,
        settings: SamplingSettings,
    ) -> Decoder:
        """One kept token in each step."""
        return token_decoder(network, self, labels, num_kept, draws, settings)

    def sampled(self, network: Network, decoder: Decoder) -> Sampled:
        """Kept tokens in canonical order and their anchors."""
        parts = decoder.parts()
        indices = network.indices(parts)
        anchors = parts[..., self.config.num_gap_bits]
        return Sampled(indices, None, anchors, decoder.num_steps, decoder.kv_bytes)


@dataclass(frozen=True)
class Gaps:
    """The rule that the tokens left must fit behind the next anchor (`decoding.Rules`)."""

    start: Int64[Tensor, "b"]
    """Zeros: where the first gap is counted from."""
    num_kept: int
    """K."""
    config: GeneratorConfig

    def next(self, before: Sequence[Int64[Tensor, "b p"]]) -> "Gap | GapBits":
        """Gaps from the anchors of the tokens before."""
        previous = before[-1][:, self.config.num_gap_bits] if before else self.start
        return self._after(torch.tensor([len(before)], device=previous.device), previous)

    def at(self, token: Int64[Tensor, "1"], previous: Int64[Tensor, "b p"]) -> "Gap | GapBits":
        """The same for a token after another (`static.decoder.StaticRules`)."""
        return self._after(token, previous[:, self.config.num_gap_bits])

    def _after(self, token: Int64[Tensor, "1"], previous: Int64[Tensor, "b"]) -> "Gap | GapBits":
        """Gaps of a token from the anchors of those before."""
        legal = legal_gaps(previous[:, None], token, self.num_kept, self.config.num_tokens)[:, 0]
        if not self.config.order.gap_in_bits:
            return Gap(previous, legal)
        return GapBits(previous, legal.sum(-1) - 1, self.config, is_first=token == 0)


@dataclass(frozen=True)
class Gap:
    """The rule for one token: its first part is a legal gap (`network.Restriction`)."""

    previous: Int64[Tensor, "b"]
    """Anchors of the tokens before."""
    legal: Bool[Tensor, "b l"]
    """Gaps that may follow."""

    def allowed(self, part: int, chosen: Sequence[Tensor]) -> Bool[Tensor, "b v"] | None:  # noqa: ARG002
        """Legal gaps for the first part; sub-indices are free."""
        return self.legal if part == 0 else None

    def part(
        self,
        part: int,
        choice: Int64[Tensor, "b"],
        chosen: Sequence[Tensor],  # noqa: ARG002
    ) -> Int64[Tensor, "b"]:
        """The cell that a gap leads to; a sub-index itself."""
        return self.previous + choice if part == 0 else choice


@dataclass(frozen=True)
class GapBits:
    """The rule for one token whose gap is in bits (`network.Restriction`)."""

    previous: Int64[Tensor, "b"]
    """Anchors of the tokens before."""
    most: Int64[Tensor, "b"]
    """Largest legal gap, less 1."""
    config: GeneratorConfig
    is_first: Bool[Tensor, "1"]
    """Whether the token is the first, at cell 0."""

    @property
    def num_bits(self) -> int:
        """G."""
        return self.config.num_gap_bits

    def allowed(self, part: int, chosen: Sequence[Tensor]) -> Bool[Tensor, "b v"] | None:
        """Bits after which a legal gap is left; the anchor is implied, sub-indices are free."""
        if part < self.num_bits:
            bits = torch.stack([self.most.new_zeros(len(self.most)), *chosen], dim=-1)
            return legal_bits(from_bits(bits), part, self.num_bits, self.most)
        return implied(self.previous, self.config.num_tokens) if part == self.num_bits else None

    def part(
        self, part: int, choice: Int64[Tensor, "b"], chosen: Sequence[Tensor]
    ) -> Int64[Tensor, "b"]:
        """The cell that the bits lead to; a bit or a sub-index itself."""
        if part != self.num_bits:
            return choice
        bits = torch.stack([torch.zeros_like(self.previous), *chosen], dim=-1)
        return torch.where(self.is_first, self.previous, self.previous + 1 + from_bits(bits))


def to_bits(numbers: Int64[Tensor, "b t"], count: int) -> Int64[Tensor, "b t g"]:
    """The lowest bits of numbers from 0, the highest of them first."""
    places = torch.arange(count - 1, -1, -1, device=numbers.device)
    return (numbers[..., None] >> places) & 1


def from_bits(bits: Int64[Tensor, "*b _"]) -> Int64[Tensor, "*b"]:
    """Numbers of these bits, the highest first."""
    places = torch.arange(bits.shape[-1] - 1, -1, -1, device=bits.device)
    return (bits << places).sum(-1)


def legal_bits(
    prefix: Int64[Tensor, "*b"], number: int, num_bits: int, most: Int64[Tensor, "*b"]
) -> Bool[Tensor, "*b 2"]:
    """Values of a bit after which a number of at most `most` is left.

    Args:
        prefix: number that the bits before it make.
        number: of the bit, 0 for the highest.
        num_bits: G.
        most: from 0.
    """
    smallest = (2 * prefix + 1) << (num_bits - 1 - number)
    return torch.stack([torch.ones_like(prefix, dtype=torch.bool), smallest <= most], dim=-1)


def implied(like: Int64[Tensor, "*b"], size: int) -> Bool[Tensor, "*b v"]:
    """Value 0 alone of a part of some size."""
    return (torch.arange(size, device=like.device) == 0).expand(*like.shape, size)


def legal_gaps(
    previous: Int64[Tensor, "b t"], tokens: Int64[Tensor, "t"], num_kept: int, num_tokens: int
) -> Bool[Tensor, "b t l"]:
    """Gaps that lead from the previous anchor to a cell from which the tokens left still fit.

    Args:
        previous: anchor of the token before; 0 for the first.
        tokens: positions in the sequence, from 0. The first token opens at cell 0, by a gap of 0.
        num_kept: K.
        num_tokens: L.
    """
    gaps = torch.arange(num_tokens, device=previous.device)
    largest = num_tokens - num_kept + tokens - previous
    later = (gaps >= 1) & (gaps <= largest[..., None])
    return torch.where((tokens == 0)[:, None], gaps == 0, later)
