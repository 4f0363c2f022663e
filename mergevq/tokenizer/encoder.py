"""The encoder: image to kept tokens.

Source: Li et al. 2025, "MergeVQ", section 3 and appendix A (arXiv:2504.00999).

Shape letters: B batch, L grid tokens, K kept tokens, C channels, D channels of latents, H and W
pixels.
"""

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from mergevq.config.tokenizer import TokenizerConfig
from mergevq.nn.blocks import NORM_EPS, initialize
from mergevq.nn.norm import GroupNorm, LayerNorm
from mergevq.nn.positions import sincos_2d, to_tokens
from mergevq.tokenizer.build import build_reducer, build_stem
from mergevq.tokenizer.seams import TokenSet


class Embedded(NamedTuple):
    """Images after the stem: what their tokens at any K are made from."""

    tokens: Float[Tensor, "b l c"]
    """The L grid tokens before the first block, positions added."""
    grid_shape: tuple[int, int]
    """(height, width) in cells; their product is L."""


class Encoder(nn.Module):
    """A stem, then transformer blocks that leave K tokens of the grid's."""

    def __init__(self, config: TokenizerConfig) -> None:
        """Build for a configuration; see the recipes for the three versions of the paper."""
        super().__init__()
        self.config = config
        self.stem = build_stem(config.stem)
        self.class_token = nn.Parameter(torch.randn(config.dim) * 1e-6)
        self.reducer = build_reducer(config.reducer, config.dim)
        self.norm = (
            GroupNorm(config.stem.num_groups, config.dim, eps=NORM_EPS)
            if config.reducer.gives == "source"
            else LayerNorm(config.dim, eps=NORM_EPS)
        )
        self.to_latents = nn.Linear(config.dim, config.quantizer.dim)
        # Drawn after the projection was made, so that a seed gives the weights it always gave.
        initialize(self.reducer)
        initialize(self.to_latents)

    def forward(
        self, image: Float[Tensor, "b 3 h w"], num_kept: int, num_layers: int | None = None
    ) -> TokenSet:
        """Run the stem and the first `num_layers` blocks (None: all) on the way to `num_kept`."""
        return self.reduce(self.embed(image), num_kept, num_layers)

    def embed(self, image: Float[Tensor, "b 3 h w"]) -> Embedded:
        """Run the stem, in which no K has a part."""
        grid = self.stem(image.to(self.class_token.dtype))
        grid_shape = (grid.shape[2], grid.shape[3])
        tokens = to_tokens(grid)
        if self.config.stem.position_embedding:
            tokens = tokens + sincos_2d(grid_shape, self.config.dim, tokens.device).to(tokens.dtype)
        return Embedded(tokens, grid_shape)

    def reduce(self, embedded: Embedded, num_kept: int, num_layers: int | None = None) -> TokenSet:
        """Run the first `num_layers` blocks (None: all) on what `embed` gave."""
        tokens, grid_shape = embedded
        class_token = self.class_token.to(tokens.dtype).expand(tokens.shape[0], 1, -1)
        return self.reducer(tokens, class_token, grid_shape, num_kept, num_layers=num_layers)

    def latents(self, tokens: Float[Tensor, "b k c"]) -> Float[Tensor, "b k d"]:
        """Project kept tokens to D real channels: norm, SiLU, linear.

        The norm is over the image; over each token where tokens are ordered, so that none depends
        on those behind it.
        """
        over_image = isinstance(self.norm, GroupNorm)
        normed = self.norm(tokens.mT).mT if over_image else self.norm(tokens)
        return self.to_latents(functional.silu(normed))
