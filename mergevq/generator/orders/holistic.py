"""Order of tokens of the whole image, then all cells of the grid row by row.

Source: Zheng et al. 2025, "Hita: Holistic Tokenizer for Autoregressive Image Generation", section 3
(arXiv:2507.02358).

    [class, M, g_1 .. g_H, x_1 .. x_L]

M is the merge instruction, an embedding of K, g are tokens of the whole image and x_i that of cell
i. Both kinds have the same codes; the input before each token has a vector of the kind of token
that comes next added. A g_i is turned by row 0 and column i, where no cell is, and x_i as in order
`raster`, which this order is with H = 0. A smaller K ends the sequence early.

Differs: both kinds have one vocabulary, as they have one quantizer; the authors' have one each.

Shape letters: B batch, R rows, T tokens of a sequence, P parts of a token, C channels.
"""

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from mergevq.config.generator import (
    GeneratorConfig,
    SamplingSettings,
)
from mergevq.config.parts import orders as config
from mergevq.generator.cache import FullCache
from mergevq.generator.decoding import (
    SequenceDecoder,
    add_targets,
    full_cache,
    lay_out,
    turns_at,
)
from mergevq.generator.network import INITIAL_STD, Cache, Network
from mergevq.generator.seams import Decoder, Draws, Layout, Numbers, Sampled, Sequences
from mergevq.nn.llama import Rotation


class Holistic(nn.Module):
    """Tokens of the whole image, then those of the cells (`seams.Order`)."""

    def __init__(self, order: config.Holistic, sizes: GeneratorConfig) -> None:
        """Make a vector for each kind of token, where there are two."""
        super().__init__()
        self.config = order
        self.kinds: nn.Parameter | None = None
        if order.num_holistic > 0:
            self.kinds = nn.Parameter(torch.empty(2, sizes.dim))

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Draw the vectors anew."""
        if self.kinds is not None:
            nn.init.normal_(self.kinds, std=INITIAL_STD, generator=generator)

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
        """Each input sees all up to itself, and has the kind of token that comes next."""
        num_kept = sequences.num_kept
        layout = lay_out(network, sequences, parts, self.positions(network, num_kept))
        targets = self._targets(num_kept)
        if targets is None:
            return layout
        return layout._replace(inputs=add_targets(layout.inputs, targets))

    def cache(
        self,
        network: Network,
        *,
        batch: int,
        num_kept: int,
        settings: SamplingSettings,  # noqa: ARG002
    ) -> FullCache:
        """A slot for every input, and turns of all tokens in the place of those of cells."""
        cache = full_cache(network, batch, num_kept - 1)
        cache.turns = network.turns(self.positions(network, num_kept))
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
        """Turns of the token's number or cell."""
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
        return SequenceDecoder(
            network, self, labels, num_kept, draws, settings, self._targets(num_kept)
        )

    def sampled(self, network: Network, decoder: Decoder) -> Sampled:
        """Tokens of the whole image, then those of cells in raster order."""
        indices = network.indices(decoder.parts())
        return Sampled(indices, None, None, decoder.num_steps, decoder.kv_bytes)

    def positions(self, network: Network, num_kept: int) -> Float[Tensor, "1 t 2"]:
        """Row and column of the first K tokens: (0, 1) to (0, H), then the cells from (1, 1)."""
        count = self.config.num_holistic
        columns = torch.arange(1, count + 1, dtype=torch.float32, device=network.device)
        before = torch.stack([torch.zeros_like(columns), columns], dim=-1)
        return torch.cat([before, network.cell_positions()])[None, :num_kept]

    def _targets(self, num_kept: int) -> Float[Tensor, "t c"] | None:
        """Vector of the kind of each of the first K tokens; None where all are of one kind."""
        if self.kinds is None:
            return None
        tokens = torch.arange(num_kept, device=self.kinds.device)
        return self.kinds[(tokens >= self.config.num_holistic).long()]
