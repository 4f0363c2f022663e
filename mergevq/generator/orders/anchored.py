"""Anchored order: the kept tokens in canonical order, each with the cell at which it opens.

    [class, M, (a_1, x_1) .. (a_K, x_K)]

M is the merge instruction, an embedding of K; a_i is the cell at which kept token x_i opens. The
head predicts it as the gap from the anchor before, restricted to gaps after which the tokens left
still fit.

Source: this project's own; the canonical order is that of the source map (`data/layouts.py`) of Li
et al. 2025, "MergeVQ", section 3.2 (arXiv:2504.00999).

Shape letters: B batch, R rows, L grid cells, T kept tokens, P parts of a token, C channels, V
values of a part.
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
from mergevq.generator.decoding import SequenceDecoder, full_cache, lay_out
from mergevq.generator.network import Cache, Network, check_range
from mergevq.generator.seams import Decoder, Draws, Layout, Numbers, Sampled, Sequences
from mergevq.nn.llama import Rotation


class Anchored:
    """Kept tokens in canonical order with their anchors (`seams.Order`)."""

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
        """The anchor, then the sub-indices.

        Raises:
            ValueError: anchors are missing, no cells, or out of order.
        """
        anchors = sequences.anchors
        if anchors is None:
            raise ValueError("order 'anchor' needs anchors: the cell at which each token opens")
        check_range("anchors", anchors, config.num_tokens - 1, "the last cell of the grid")
        if not torch.compiler.is_compiling() and (
            anchors[:, 0].any() or (anchors.diff(dim=1) < 1).any()
        ):
            raise ValueError("anchors must start at cell 0 and increase: tokens in canonical order")
        return torch.cat([anchors[..., None], codes], dim=-1)

    def layout(
        self, network: Network, parts: Int64[Tensor, "b t p"], sequences: Sequences
    ) -> Layout:
        """Each token is at its anchor, and sees all up to itself."""
        cells = parts[..., 0]
        layout = lay_out(network, sequences, parts, network.cell_positions()[cells])
        previous = functional.pad(cells[:, :-1], (1, 0))
        targets = torch.cat([(cells - previous)[..., None], parts[..., 1:]], dim=-1)
        tokens = torch.arange(cells.shape[1], device=cells.device)
        num_tokens = network.config.num_tokens
        legal = legal_gaps(previous, tokens, sequences.num_kept, num_tokens)
        return layout._replace(targets=targets, allowed={0: legal})

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
        return Gaps(start, num_kept, network.config.num_tokens)

    def turns(
        self,
        cache: Cache,
        parts: Int64[Tensor, "r p"],
        token: int,  # noqa: ARG002
    ) -> Rotation:
        """Turns of the token's anchor."""
        return Rotation(*(table[0, 0, parts[:, None, :1]] for table in cache.turns))

    def decoder(
        self,
        network: Network,
        labels: Int64[Tensor, "b"],
        num_kept: int,
        draws: Draws,
        settings: SamplingSettings,
    ) -> Decoder:
        """One kept token in each step."""
        return SequenceDecoder(network, self, labels, num_kept, draws, settings)

    def sampled(self, network: Network, decoder: Decoder) -> Sampled:
        """Kept tokens in canonical order and their anchors."""
        parts = decoder.parts()
        indices = network.indices(parts)
        return Sampled(indices, None, parts[..., 0], decoder.num_steps, decoder.kv_bytes)


@dataclass(frozen=True)
class Gaps:
    """The rule that the tokens left must fit behind the next anchor (`decoding.Rules`)."""

    start: Int64[Tensor, "b"]
    """Zeros: where the first gap is counted from."""
    num_kept: int
    """K."""
    num_tokens: int
    """L."""

    def next(self, before: Sequence[Int64[Tensor, "b p"]]) -> "Gap":
        """Gaps from the anchors of the tokens before."""
        previous = before[-1][:, 0] if before else self.start
        token = torch.tensor([len(before)], device=previous.device)
        legal = legal_gaps(previous[:, None], token, self.num_kept, self.num_tokens)
        return Gap(previous, legal[:, 0])


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
