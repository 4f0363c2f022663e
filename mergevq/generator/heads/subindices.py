"""The head that predicts a token's parts, each from those before it.

Source: Luo et al. 2024, "Open-MAGVIT2", section 3.2 (sub-indices, arXiv:2409.04410).

Shape letters: N tokens, P parts of a token, C channels, H heads, G heads of keys and values, D
channels of a head.
"""

import functools
from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn

from mergevq.config.generator import GeneratorConfig
from mergevq.nn.attention import attend
from mergevq.nn.llama import Block, Projection, RmsNorm

INITIAL_STD = 0.02
"""Spread of every matrix at the start but the outputs, which start at zero, as in LlamaGen."""


class Head(nn.Module):
    """Predicts the parts of one token in turn, each from the state and the parts before it."""

    def __init__(self, config: GeneratorConfig) -> None:
        """Build the blocks over parts and one output layer for each."""
        super().__init__()
        self.blocks = nn.ModuleList(make_block(config) for _ in range(config.num_head_layers))
        self.norm = RmsNorm(config.dim)
        self.outputs = nn.ModuleList(Projection(config.dim, size) for size in config.part_sizes)

    def forward(
        self, state: Float[Tensor, "n c"], known: Sequence[Float[Tensor, "n c"]], first: int = 0
    ) -> list[Float[Tensor, "n _"]]:
        """Logits, float32, of parts `first` to `len(known)`.

        Args:
            state: of the transformer, one for each token.
            known: embeddings of the parts already known.
            first: part to begin with.
        """
        x = torch.stack([state, *known], dim=1)
        for block in self.blocks:
            x = block(x)
        x = self.norm(x)
        return [self.outputs[part](x[:, part]).float() for part in range(first, x.shape[1])]

    def step(
        self, x: Float[Tensor, "n c"], memory: list[tuple[Tensor, Tensor]], part: int
    ) -> Float[Tensor, "n _"]:
        """Logits, float32, of one part, where those before it have been asked for in turn.

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


def make_block(config: GeneratorConfig) -> Block:
    """One block, of the trunk or of the head."""
    return Block(
        dim=config.dim,
        hidden_dim=config.hidden_dim,
        num_heads=config.num_heads,
        key_heads=config.key_heads,
        qk_norm=config.qk_norm,
        dropout=config.dropout,
    )
