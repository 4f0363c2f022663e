"""Order of ordered tokens: the K tokens one after the other, without places on the grid.

Source: Ge et al. 2023, "Planting a SEED of Vision in Large Language Model", section 3 (tokens in
the order of causal queries, arXiv:2307.08041); Bachmann et al. 2025, "FlexTok: Resampling Images
into 1D Token Sequences of Flexible Length", section 3 (arXiv:2502.13967).

    [class, M, x_1 .. x_K]

M is the merge instruction, an embedding of K. Token x_i is turned by row 0 and column i: no cell of
a grid has row 0, and the prefix has column 0.

Shape letters: B batch, R rows, T tokens of a sequence, P parts of a token.
"""

import torch
from jaxtyping import Float, Int64
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


class Ordered:
    """Ordered tokens from the first to the last (`seams.Order`)."""

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Do nothing: the order has no weights."""

    def draw(self, sequences: Sequences, numbers: Numbers) -> Sequences:  # noqa: ARG002
        """The same: nothing about the order is random."""
        return sequences

    def num_inputs(self, config: GeneratorConfig, num_kept: int) -> int:
        """The prefix and all tokens but the last."""
        return config.num_prefix + num_kept - 1

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
        return lay_out(network, sequences, parts, positions(sequences.num_kept, network.device))

    def cache(
        self,
        network: Network,
        *,
        batch: int,
        num_kept: int,
        settings: SamplingSettings,  # noqa: ARG002
    ) -> FullCache:
        """A slot for every input, and turns of tokens in the place of those of cells."""
        cache = full_cache(network, batch, num_kept - 1)
        cache.turns = network.turns(positions(num_kept, network.device))
        return cache

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
        """Turns of the token's number."""
        return turns_at(cache, token)

    def decoder(
        self,
        network: Network,
        labels: Int64[Tensor, "b"],
        num_kept: int,
        draws: Draws,
        settings: SamplingSettings,
    ) -> Decoder:
        """One token in each step."""
        return SequenceDecoder(network, self, labels, num_kept, draws, settings)

    def sampled(self, network: Network, decoder: Decoder) -> Sampled:
        """Tokens in their order."""
        indices = network.indices(decoder.parts())
        return Sampled(indices, None, None, decoder.num_steps, decoder.kv_bytes)


def positions(num_kept: int, device: torch.device) -> Float[Tensor, "1 t 2"]:
    """Row and column of each token: (0, 1) to (0, K)."""
    columns = torch.arange(1, num_kept + 1, dtype=torch.float32, device=device)
    return torch.stack([torch.zeros_like(columns), columns], dim=-1)[None]
