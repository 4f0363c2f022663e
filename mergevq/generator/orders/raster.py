"""Raster order: all cells of the grid, row by row.

Source: Sun et al. 2024, "Autoregressive Model Beats Diffusion: Llama for Scalable Image
Generation", section 2 (LlamaGen, arXiv:2406.06525); Yu et al. 2024, "Randomized Autoregressive
Visual Generation", section 3 (RAR, arXiv:2411.00776).

    [class, (M), x_1 .. x_L]

M is the merge instruction, an embedding of K, and x_i is the token of cell i.

Differs: the prefix is rotated by the cell (0, 0) and image cells count from (1, 1), where LlamaGen
zeroes the prefix's queries and keys.

With annealing (RAR), training permutes sequences with a probability that falls to 0. Each input,
the last of the prefix among them, then has a vector of the cell of the token after it added, by
which random orders are defined; validation, likelihoods and samples are in raster order.

Differs: positions are rotations by row and column, which go with the tokens, where RAR learns a
vector for each.

Shape letters: B batch, R rows, T tokens of a sequence, M tokens and drafts, P parts
of a token, N inputs, E inputs looked at.
"""

import torch
from jaxtyping import Bool, Int64
from torch import Tensor, nn

from mergevq.config.generator import (
    GeneratorConfig,
    SamplingSettings,
)
from mergevq.config.parts import orders as config
from mergevq.generator.cache import FullCache
from mergevq.generator.decoding import (
    add_targets,
    full_cache,
    lay_out,
    seen_before,
    turns_at,
)
from mergevq.generator.network import INITIAL_STD, Cache, Network
from mergevq.generator.seams import Decoder, Draws, Layout, Numbers, Sampled, Sequences
from mergevq.generator.static.caches import StaticCache, static_cache, static_turns_at
from mergevq.generator.static.decoder import token_decoder
from mergevq.nn.llama import Rotation
from mergevq.runtime.device import send


class Raster(nn.Module):
    """All cells in raster order, in training in random orders too (`seams.Order`)."""

    def __init__(self, order: config.Raster, sizes: GeneratorConfig) -> None:
        """Make a vector for each cell to be predicted, if there is annealing."""
        super().__init__()
        self.config = order
        self.targets: nn.Parameter | None = None
        if order.annealing is not None:
            self.targets = nn.Parameter(torch.empty(sizes.num_tokens, sizes.dim))

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Draw the vectors anew."""
        if self.targets is not None:
            nn.init.normal_(self.targets, std=INITIAL_STD, generator=generator)

    def draw(self, sequences: Sequences, numbers: Numbers) -> Sequences:
        """In training with annealing, a random permutation of the cells of some sequences."""
        if not self.training or self.config.annealing is None:
            return sequences
        length = sequences.indices.shape[1]
        share = self.config.permuted_share(numbers.progress)
        is_permuted = numbers.uniform("permuted sequences")[:, None] < share
        orders = numbers.uniform("orders", length).argsort(-1)
        slots = torch.where(is_permuted, orders, torch.arange(length))
        return sequences._replace(slots=send(slots, sequences.indices.device))

    def num_inputs(self, config: GeneratorConfig, num_kept: int) -> int:  # noqa: ARG002
        """The prefix and all cells but the last."""
        return config.num_prefix + config.num_tokens - 1

    def parts(
        self,
        codes: Int64[Tensor, "b t f"],
        sequences: Sequences,  # noqa: ARG002
        config: GeneratorConfig,  # noqa: ARG002
    ) -> Int64[Tensor, "b t p"]:
        """The sub-indices alone."""
        return codes

    def layout(
        self, network: Network, parts: Int64[Tensor, "b t p"], sequences: Sequences
    ) -> Layout:
        """Each input sees all up to itself; with annealing it has the cell that comes next."""
        positions = network.cell_positions()[None]
        if self.targets is None:
            return lay_out(network, sequences, parts, positions)
        targets, slots = self.targets, sequences.slots
        if slots is not None:
            parts = parts.gather(1, slots[..., None].expand_as(parts))
            positions, targets = positions[0, slots], targets[slots]
        layout = lay_out(network, sequences, parts, positions)
        return layout._replace(inputs=add_targets(layout.inputs, targets), slots=slots)

    def cache(
        self,
        network: Network,
        *,
        batch: int,
        num_kept: int,  # noqa: ARG002
        settings: SamplingSettings,  # noqa: ARG002
    ) -> FullCache:
        """A slot for every input."""
        return full_cache(network, batch, network.config.num_tokens - 1)

    def rules(
        self,
        network: Network,
        cache: Cache,
        *,
        batch: int,
        num_kept: int,
        settings: SamplingSettings,
    ) -> None:
        """No rules: every token may have every value."""

    def turns(
        self,
        cache: Cache,
        parts: Int64[Tensor, "r p"],  # noqa: ARG002
        token: int,
    ) -> Rotation:
        """Turns of the cell that the token is."""
        return turns_at(cache, token)

    def static_cache(
        self,
        network: Network,
        *,
        batch: int,
        num_kept: int,  # noqa: ARG002
        settings: SamplingSettings,  # noqa: ARG002
    ) -> StaticCache:
        """A slot for every input, and for the last token."""
        return static_cache(network, batch, network.config.num_tokens)

    def static_rules(
        self,
        network: Network,
        cache: Cache,
        *,
        batch: int,
        num_kept: int,
        settings: SamplingSettings,
    ) -> None:
        """No rules: every token may have every value."""

    def static_turns(
        self,
        cache: Cache,
        parts: Int64[Tensor, "r p"],  # noqa: ARG002
        token: Int64[Tensor, "1"],
    ) -> Rotation:
        """Turns of the cell that the token is."""
        return static_turns_at(cache, token)

    def seen(
        self,
        network: Network,  # noqa: ARG002
        tokens: Int64[Tensor, "b m p"],  # noqa: ARG002
        slots: Int64[Tensor, "b n"],
        end: int,
    ) -> Bool[Tensor, "b n e"]:
        """All inputs up to each (`drafts.reader.CellByCell`)."""
        return seen_before(slots, end)

    def restriction(
        self,
        network: Network,
        tokens: Int64[Tensor, "b m p"],
        cells: Int64[Tensor, "b n"],
        num_kept: int,
        settings: SamplingSettings,
    ) -> None:
        """No rules: every token may have every value."""

    def decoder(
        self,
        network: Network,
        labels: Int64[Tensor, "b"],
        num_kept: int,
        draws: Draws,
        settings: SamplingSettings,
    ) -> Decoder:
        """One cell in each step."""
        return token_decoder(network, self, labels, num_kept, draws, settings, self.targets)

    def sampled(self, network: Network, decoder: Decoder) -> Sampled:
        """Cells in raster order."""
        indices = network.indices(decoder.parts())
        return Sampled(indices, None, None, decoder.num_steps, decoder.kv_bytes)
