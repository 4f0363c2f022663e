"""The encoder: image to kept tokens.

With two branches the first channels of latents are read after the last block, and the others after
earlier ones: semantic and pixel channels.

Source: Li et al. 2025, "MergeVQ", section 3 and appendix A (arXiv:2504.00999); two branches as
DualToken (songweii/DualToken), written from its description.

Differs: semantic channels are those of the last block, DualToken's of the last but one; a teacher
is given the mean of their codes over the tokens, where DualToken lets quantized tokens go on
through the encoder and aligns its pooled output, and TokenFlow aligns features of each patch.

Shape letters: B batch, L grid tokens, K kept tokens, C channels, D channels of latents, H and W
pixels.
"""

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from mergevq.config.parts import Kl
from mergevq.config.tokenizer import TokenizerConfig
from mergevq.nn.blocks import NORM_EPS, initialize
from mergevq.nn.norm import GroupNorm, LayerNorm
from mergevq.nn.positions import sincos_2d, to_tokens
from mergevq.tokenizer.build import build_reducer, build_stem
from mergevq.tokenizer.conditions.tokens import ClassTokens, TextTokens, build_condition, told
from mergevq.tokenizer.conditions.values import unknown
from mergevq.tokenizer.reducers.queries import Queries
from mergevq.tokenizer.seams import Condition, TokenSet

_LOG_VARIANCE = -2.0
"""Log-variance of codes where training starts: a deviation of 0.37."""


class Embedded(NamedTuple):
    """Images after the stem: what their tokens at any K are made from."""

    tokens: Float[Tensor, "b l c"]
    """The L grid tokens before the first block, positions added."""
    grid_shape: tuple[int, int]
    """(height, width) in cells; their product is L."""


class Projection(nn.Module):
    """Channels of kept tokens as they were after some of the blocks: a norm and a map of each."""

    def __init__(self, config: TokenizerConfig, dim: int) -> None:
        """Make the layers, to `dim` channels."""
        super().__init__()
        self.gains = config.branches.gains
        self.norms = nn.ModuleList(_norm(config) for _ in self.gains)
        self.to_latents = nn.ModuleList(nn.Linear(config.dim, dim) for _ in self.gains)

    def forward(self, taps: tuple[Float[Tensor, "b k c"], ...]) -> Float[Tensor, "b k d"]:
        """Sum of the projections, each times its gain."""
        layers = zip(self.norms, self.to_latents, taps, self.gains, strict=True)
        return torch.stack(
            [gain * project(_activated(norm, tokens)) for norm, project, tokens, gain in layers]
        ).sum(0)


def _norm(config: TokenizerConfig) -> GroupNorm | LayerNorm:
    """The norm before a projection: over the image, or over each token where they are ordered."""
    if config.reducer.gives == "source":
        return GroupNorm(config.stem.num_groups, config.dim, eps=NORM_EPS)
    return LayerNorm(config.dim, eps=NORM_EPS)


def _activated(norm: nn.Module, tokens: Float[Tensor, "b k c"]) -> Float[Tensor, "b k c"]:
    """Norm and SiLU."""
    return functional.silu(norm(tokens.mT).mT if isinstance(norm, GroupNorm) else norm(tokens))


class Encoder(nn.Module):
    """A stem, then transformer blocks that leave K tokens of the grid's."""

    def __init__(self, config: TokenizerConfig) -> None:
        """Build for a configuration; see the recipes for the three versions of the paper."""
        super().__init__()
        self.config = config
        self.stem = build_stem(config.stem)
        self.class_token = nn.Parameter(torch.randn(config.dim) * 1e-6)
        self.reducer = build_reducer(config.reducer, config.dim, config.grid_size)
        self.norm = _norm(config)
        semantic_dim, dim = config.branches.semantic_dim, config.latent_dim
        self.to_latents = nn.Linear(config.dim, semantic_dim or dim)
        # Drawn after the projection was made, so that a seed gives the weights it always gave.
        initialize(self.reducer)
        initialize(self.to_latents)
        if isinstance(config.quantizer, Kl):
            # Codes start with little noise beside what they have to say.
            nn.init.constant_(self.to_latents.bias[config.quantizer.dim :], _LOG_VARIANCE)
        self.tapped: Projection | None = None
        if semantic_dim > 0:
            self.tapped = Projection(config, dim - semantic_dim)
            initialize(self.tapped)
        self.condition: ClassTokens | TextTokens | None = None
        if config.condition.sees == "both":
            self.condition = build_condition(config.condition, config.dim)

    def forward(
        self,
        image: Float[Tensor, "b 3 h w"],
        num_kept: int,
        num_layers: int | None = None,
        condition: Condition | None = None,
    ) -> TokenSet:
        """Run the stem and the first `num_layers` blocks (None: all) on the way to `num_kept`."""
        return self.reduce(self.embed(image), num_kept, num_layers, condition=condition)

    def embed(self, image: Float[Tensor, "b 3 h w"]) -> Embedded:
        """Run the stem, in which no K has a part."""
        grid = self.stem(image.to(self.class_token.dtype))
        grid_shape = (grid.shape[2], grid.shape[3])
        tokens = to_tokens(grid)
        if self.config.stem.position_embedding:
            tokens = tokens + sincos_2d(grid_shape, self.config.dim, tokens.device).to(tokens.dtype)
        return Embedded(tokens, grid_shape)

    def reduce(
        self,
        embedded: Embedded,
        num_kept: int,
        num_layers: int | None = None,
        taps: tuple[int, ...] | None = None,
        condition: Condition | None = None,
    ) -> TokenSet:
        """Run the first `num_layers` blocks (None: all) on what `embed` gave.

        `taps` are those of the reducer; None is those of the branches. A condition that encoders do
        not see is left out.

        Raises:
            ValueError: the encoder sees a condition, and there is none.
        """
        tokens, grid_shape = embedded
        class_token = self.class_token.to(tokens.dtype).expand(tokens.shape[0], 1, -1)
        runs_all = num_layers in (None, len(self.reducer.blocks))
        taps = (self.config.branches.taps if taps is None else taps) if runs_all else ()
        num_kept = self.config.num_reduced(grid_shape, num_kept)
        given = (tokens, class_token, grid_shape, num_kept)
        seen = told(self.condition, condition)
        if seen is not None and isinstance(self.reducer, Queries):
            return self.reducer(*given, num_layers=num_layers, taps=taps, told=seen)
        return self.reducer(*given, num_layers=num_layers, taps=taps)

    def layers(self, image: Float[Tensor, "b 3 h w"]) -> tuple[Float[Tensor, "b n c"], ...]:
        """Tokens after each block, as many as there can be: with merging off, or all queries.

        A condition is left out.
        """
        embedded, config = self.embed(image), self.config
        shape = embedded.grid_shape
        most = config.reducer.nearest_kept(shape, config.most_kept(shape))
        numbers = tuple(range(1, len(self.reducer.blocks) + 1))
        told = unknown(config.condition, len(embedded.tokens), embedded.tokens)
        return self.reduce(embedded, most, taps=numbers, condition=told).taps

    def latents(self, out: TokenSet) -> Float[Tensor, "b k d"]:
        """Project kept tokens after the last block to D real channels: norm, SiLU, linear.

        The norm is over the image; over each token where tokens are ordered, so that none depends
        on those behind it. Of two branches the last channels are of the taps.
        """
        latents = self.to_latents(_activated(self.norm, out.tokens))
        return latents if self.tapped is None else torch.cat([latents, self.tapped(out.taps)], -1)

    def summary(
        self, out: TokenSet, values: Float[Tensor, "b k d"] | None = None
    ) -> Float[Tensor, "b c"]:
        """Summary of the image for a teacher.

        Args:
            out: tokens after the last block.
            values: codes of the tokens; None takes their latents.

        Returns:
            The class token; of two branches the mean of the semantic channels over the tokens.
        """
        if self.tapped is None:
            return out.class_token
        values = self.latents(out) if values is None else values
        return values[..., : self.config.branches.semantic_dim].mean(1)

    @property
    def projections(self) -> list[nn.Module]:
        """Modules between the blocks and the latents."""
        found = [self.norm, self.to_latents]
        return found if self.tapped is None else [*found, self.tapped]
