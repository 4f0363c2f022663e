"""The encoder: image to kept tokens with a source map.

Source: Li et al. 2025, "MergeVQ", section 3 and appendix A (arXiv:2504.00999).

Shape letters: B batch, L grid tokens, K kept tokens, C channels, D bits, H and W pixels or cells.
"""

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from mergevq.config.tokenizer import TokenizerConfig
from mergevq.data.layouts import Source
from mergevq.nn.blocks import NORM_EPS, initialize
from mergevq.nn.positions import sincos_2d, to_tokens
from mergevq.tokenizer.reducers.matching import merge_schedule
from mergevq.tokenizer.reducers.merge import MergeBlock, MergeState
from mergevq.tokenizer.stems import cnn_stem, patch_stem


class EncoderOutput(NamedTuple):
    """Tokens after some of the encoder's blocks."""

    tokens: Float[Tensor, "b n c"]
    """Remaining tokens, in the order of the matching."""
    class_token: Float[Tensor, "b c"]
    """The class token."""
    source: Source
    """Which of them each grid cell is in; not yet in canonical order."""


class Encoder(nn.Module):
    """CNN or patch stem, then transformer blocks that merge."""

    def __init__(self, config: TokenizerConfig) -> None:
        """Build for a configuration; see `TokenizerConfig` for the three versions of the paper."""
        super().__init__()
        self.config = config
        self.stem: nn.Module = cnn_stem(config) if config.stem == "cnn" else patch_stem(config)
        self.class_token = nn.Parameter(torch.randn(config.dim) * 1e-6)
        self.blocks = nn.ModuleList(
            MergeBlock(
                config.dim, config.num_heads, config.layer_scale, config.transformer_norm_eps
            )
            for _ in range(config.num_layers)
        )
        self.norm = nn.GroupNorm(config.num_groups, config.dim, eps=NORM_EPS)
        self.to_latents = nn.Linear(config.dim, config.num_bits)
        self.checkpointing = False
        """Recompute the blocks in the backward pass."""
        initialize(self.blocks)
        initialize(self.to_latents)

    def forward(
        self, image: Float[Tensor, "b 3 h w"], num_kept: int, num_layers: int | None = None
    ) -> EncoderOutput:
        """Run the stem and the first `num_layers` blocks (None: all) on the way to `num_kept`."""
        grid = self.stem(image.to(self.class_token.dtype))
        grid_shape = (grid.shape[2], grid.shape[3])
        tokens = to_tokens(grid)
        if self.config.position_embedding:
            tokens = tokens + sincos_2d(grid_shape, self.config.dim, tokens.device).to(tokens.dtype)
        batch, num_tokens, _ = tokens.shape
        class_token = self.class_token.to(tokens.dtype).expand(batch, 1, -1)
        x = torch.cat([class_token, tokens], dim=1)
        cells = torch.arange(num_tokens, device=image.device).expand(batch, -1)
        state = MergeState(index=cells, sizes=None)
        counts = merge_schedule(
            num_tokens, num_kept, self.config.num_layers, self.config.merge_shape
        )
        for block, count in list(zip(self.blocks, counts, strict=True))[:num_layers]:
            if self.checkpointing and self.training:
                x, state = checkpoint(block, x, state, count, use_reentrant=False)
            else:
                x, state = block(x, state, count)
        return EncoderOutput(x[:, 1:], x[:, 0], Source(state.index, x.shape[1] - 1))

    def latents(self, tokens: Float[Tensor, "b k c"]) -> Float[Tensor, "b k d"]:
        """Project kept tokens to D real channels: norm over the image, SiLU, linear."""
        return self.to_latents(functional.silu(self.norm(tokens.mT).mT))


def require_finite(name: str, values: Tensor) -> None:
    """Raise `RuntimeError` unless what a network gave is finite."""
    if not torch.compiler.is_compiling() and not values.isfinite().all():
        raise RuntimeError(f"{name} are not finite: the tokenizer's weights are broken")
