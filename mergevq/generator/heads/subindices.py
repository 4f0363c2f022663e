"""The head that predicts a token's parts, each from those before it.

Source: Luo et al. 2024, "Open-MAGVIT2", section 3.2 (sub-indices, arXiv:2409.04410).

Shape letters: N tokens, B images, P parts of a token, C channels, H heads, G heads of keys and
values, D channels of a head, R is B, or 2B with guidance.
"""

import functools
from collections.abc import Sequence

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from mergevq.config.generator import (
    GeneratorConfig,
    SamplingSettings,
)
from mergevq.generator.network import Chosen, Embed, Restriction, make_block
from mergevq.generator.sampling import choose_parts
from mergevq.nn.attention import attend
from mergevq.nn.llama import Projection, RmsNorm


class Subindices(nn.Module):
    """Predicts the parts of one token in turn, each from the state and the parts before it."""

    def __init__(self, config: GeneratorConfig) -> None:
        """Build the blocks over parts and one output layer for each."""
        super().__init__()
        self.blocks = nn.ModuleList(make_block(config) for _ in range(config.head.num_layers))
        self.norm = RmsNorm(config.dim)
        self.outputs = nn.ModuleList(Projection(config.dim, size) for size in config.part_sizes)

    @property
    def layers(self) -> list[nn.ModuleList]:
        """Blocks and projections, which decoding may replace by faster ones."""
        return [self.blocks, self.outputs]

    @torch.no_grad()
    def reset_outputs(self) -> None:
        """Make all values equally likely, as training starts."""
        for output in self.outputs:
            nn.init.zeros_(output.get_parameter("weight"))

    def forward(
        self, states: Float[Tensor, "n c"], parts: Int64[Tensor, "n p"], embed: Embed
    ) -> list[Float[Tensor, "n _"]]:
        """Logits, float32, of each part given the true parts before it.

        Args:
            states: of the transformer, one for each token.
            parts: of the tokens.
            embed: embeddings of one part.
        """
        known = [embed(part, parts[:, part]) for part in range(parts.shape[1] - 1)]
        x = torch.stack([states, *known], dim=1)
        for block in self.blocks:
            x = block(x)
        x = self.norm(x)
        return [output(x[:, part]).float() for part, output in enumerate(self.outputs)]

    def choose(
        self,
        states: Float[Tensor, "r c"],
        uniforms: Float[Tensor, "b p"],
        scale: float | Float[Tensor, "b 1"],
        settings: SamplingSettings,
        embed: Embed,
        restriction: Restriction | None = None,
        *,
        scored: bool = False,
    ) -> Chosen:
        """Choose the parts of one token for each image, in turn; see `network.Head.choose`."""
        repeats = len(states) // len(uniforms)
        memory: list[tuple[Tensor, Tensor]] = []

        def logits_of(part: int, chosen: Sequence[Tensor]) -> Tensor:
            before = embed(part - 1, chosen[-1].repeat(repeats)) if chosen else states
            return self.step(before, memory, part)

        return choose_parts(logits_of, uniforms, scale, settings, restriction, scored=scored)

    def step(
        self, x: Float[Tensor, "n c"], memory: list[tuple[Tensor, Tensor]], part: int
    ) -> Float[Tensor, "n _"]:
        """Logits, float32, of one part, after those before it in turn.

        Args:
            x: the state for part 0, then the embedding of the part before.
            memory: an empty list for part 0; keys and values of each block are left in it.
            part: number of the part.
        """
        x = x[:, None]
        for layer, block in enumerate(self.blocks):
            x = block(x, recall=functools.partial(_recall, memory, layer))
        return self.outputs[part](self.norm(x)[:, 0]).float()


def _recall(
    memory: list[tuple[Tensor, Tensor]],
    layer: int,
    query: Float[Tensor, "n h 1 d"],
    key: Float[Tensor, "n g 1 d"],
    value: Float[Tensor, "n g 1 d"],
) -> Float[Tensor, "n h 1 d"]:
    """Put a part's key and value after those of a layer, which are few, and attend to all."""
    if layer == len(memory):
        memory.append((key, value))
        # A lone key has all the weight.
        times = query.shape[1] // value.shape[1]
        return value if times == 1 else value.repeat_interleave(times, dim=1)
    keys, values = memory[layer]
    memory[layer] = torch.cat([keys, key], 2), torch.cat([values, value], 2)
    return attend(query, *memory[layer], None)
