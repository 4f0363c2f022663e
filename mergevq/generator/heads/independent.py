"""The head that predicts a token's parts from the state alone, all at once.

Source: ELM (github.com/Pepper-lll/LMforImageGeneration): tokens split into sub-codes, each with an
output layer of its own.

Differs: blocks may come before the outputs, so that heads are compared at equal parameters.

Shape letters: N tokens, B images, P parts of a token, C channels, R is B, or 2B with guidance.
"""

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
from mergevq.nn.llama import Projection, RmsNorm


class Independent(nn.Module):
    """Predicts the parts of one token from the state, none from another."""

    def __init__(self, config: GeneratorConfig) -> None:
        """Build the blocks over states and one output layer for each part."""
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
        self,
        states: Float[Tensor, "n c"],
        parts: Int64[Tensor, "n p"],  # noqa: ARG002 - no part depends on another
        embed: Embed,  # noqa: ARG002
    ) -> list[Float[Tensor, "n _"]]:
        """Logits, float32, of each part."""
        return self._logits(states)

    def _logits(self, states: Float[Tensor, "n c"]) -> list[Float[Tensor, "n _"]]:
        """The same, of which the parts themselves are no input."""
        x = states[:, None]
        for block in self.blocks:
            x = block(x)
        x = self.norm(x)[:, 0]
        return [output(x).float() for output in self.outputs]

    def choose(
        self,
        states: Float[Tensor, "r c"],
        uniforms: Float[Tensor, "b p"],
        scale: float | Float[Tensor, "b 1"],
        settings: SamplingSettings,
        embed: Embed,  # noqa: ARG002
        restriction: Restriction | None = None,
        *,
        scored: bool = False,
    ) -> Chosen:
        """Choose the parts of one token for each image; see `network.Head.choose`."""
        logits = self._logits(states)

        def logits_of(part: int, chosen: Sequence[Tensor]) -> Tensor:  # noqa: ARG001
            return logits[part]

        return choose_parts(logits_of, uniforms, scale, settings, restriction, scored=scored)
