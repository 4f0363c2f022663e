"""Raster order: all cells of the grid, row by row.

Source: Sun et al. 2024, "Autoregressive Model Beats Diffusion: Llama for Scalable Image
Generation", section 2 (LlamaGen, arXiv:2406.06525).

    [class, (M), x_1 .. x_L]

M is the merge instruction, an embedding of K, and x_i is the token of cell i.

Differs: the prefix is rotated by the cell (0, 0) and image cells count from (1, 1), where LlamaGen
zeroes the prefix's queries and keys.

Shape letters: B batch, R rows, T tokens of a sequence, P parts of a token.
"""

import torch
from jaxtyping import Int64
from torch import Tensor

from mergevq.config.generator import (
    GeneratorConfig,
    SamplingSettings,
)
from mergevq.generator.cache import FullCache
from mergevq.generator.decoding import SequenceDecoder, full_cache, lay_out, turns_at
from mergevq.generator.network import Cache, Network
from mergevq.generator.seams import Decoder, Draws, Layout, Numbers, Sampled, Sequences
from mergevq.nn.llama import Rotation


class Raster:
    """All cells in raster order (`seams.Order`)."""

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Do nothing: the order has no weights."""

    def draw(self, sequences: Sequences, numbers: Numbers) -> Sequences:  # noqa: ARG002
        """The same: nothing about the order is random."""
        return sequences

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
        """Each input sees all up to itself."""
        return lay_out(network, sequences, parts, network.cell_positions()[None])

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

    def decoder(
        self,
        network: Network,
        labels: Int64[Tensor, "b"],
        num_kept: int,
        draws: Draws,
        settings: SamplingSettings,
    ) -> Decoder:
        """One cell in each step."""
        return SequenceDecoder(network, self, labels, num_kept, draws, settings)

    def sampled(self, network: Network, decoder: Decoder) -> Sampled:
        """Cells in raster order."""
        indices = network.indices(decoder.parts())
        return Sampled(indices, None, None, decoder.num_steps, decoder.kv_bytes)
