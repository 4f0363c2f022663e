"""The convolutional decoder: grid tokens to an image.

Source: Li et al. 2025, "MergeVQ", appendix A (arXiv:2504.00999); Yu et al. 2024, "Language Model
Beats Diffusion", appendix A (arXiv:2310.05737).

Shape letters: B batch, L grid tokens, E channels of the blocks, D bits, H and W pixels or cells.
"""

import itertools

from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from mergevq.config import parts as settings
from mergevq.nn.blocks import NORM_EPS, GridBlock, initialize
from mergevq.nn.conv import AdaptiveGroupNorm, ResBlock, Upsample
from mergevq.nn.norm import GroupNorm
from mergevq.nn.positions import to_grid, to_tokens
from mergevq.tokenizer.seams import Given


class CnnDecoder(nn.Module):
    """Embeddings on the full grid, transformer blocks, upsampling CNN."""

    def __init__(self, config: settings.CnnDecoder, in_dim: int, style_dim: int | None) -> None:
        """Build for settings; the width is the CNN's coarsest level.

        Args:
            config: settings.
            in_dim: channels of the input.
            style_dim: channels of the style; None where there is none.
        """
        super().__init__()
        dim, groups = config.width, config.num_groups
        self.conv_in = nn.Conv2d(in_dim, dim, 3, padding=1)
        self.position = nn.Conv2d(dim, dim, 3, padding=1, groups=dim)
        self.blocks = nn.ModuleList(
            GridBlock(dim, config.num_heads, config.layer_scale, config.norm_eps)
            for _ in range(config.num_layers)
        )
        self.levels = nn.ModuleList()
        width = dim
        for level, mult in reversed(list(enumerate(config.channel_mult))):
            channels = config.channels * mult
            num_blocks = config.num_res_blocks + (level > 0)
            widths = [width, *[channels] * num_blocks]
            self.levels.append(
                nn.ModuleDict(
                    {
                        "norm": AdaptiveGroupNorm(style_dim, width, groups),
                        "blocks": nn.Sequential(
                            *(ResBlock(a, b, groups) for a, b in itertools.pairwise(widths))
                        ),
                        "upsample": Upsample(channels) if level > 0 else nn.Identity(),
                    }
                )
            )
            width = channels
        self.norm_out = GroupNorm(groups, width, eps=NORM_EPS)
        self.conv_out = nn.Conv2d(width, 3, 3, padding=1)
        self.checkpointing = False
        """Recompute blocks and levels in the backward pass."""
        initialize(self.blocks)

    def forward(
        self, given: Given, outputs: dict[int, Tensor] | None = None
    ) -> Float[Tensor, "b 3 h w"]:
        """Decode an embedding per cell to an image in about [-1, 1]."""
        grid_shape, outputs = given.grid_shape, {} if outputs is None else outputs
        hidden = self.conv_in(to_grid(given.tokens.to(self.conv_in.weight.dtype), grid_shape))
        dtype = hidden.dtype
        x = to_tokens(hidden + self.position(hidden))
        if 0 in outputs:
            outputs[0] = x
        for number, block in enumerate(self.blocks, 1):
            x = self._run(block, x, grid_shape)
            if number in outputs:
                outputs[number] = x
        # The blocks' sums are float32 under autocast; levels are as convolutions are.
        hidden = to_grid(x.to(dtype), grid_shape)
        for level in self.levels:
            hidden = self._run(_run_level, level, hidden, given.style)
        return self.conv_out(functional.silu(self.norm_out(hidden)))

    def _run(self, function, *arguments):  # noqa: ANN001, ANN002, ANN202 - passes through
        """Call, or call with recomputation in the backward pass."""
        if self.checkpointing and self.training:
            return checkpoint(function, *arguments, use_reentrant=False)
        return function(*arguments)


def _run_level(
    level: nn.ModuleDict, x: Float[Tensor, "b c h w"], style: Float[Tensor, "b n d"] | None
) -> Float[Tensor, "b c2 h2 w2"]:
    """One level: norm in the style of the codes, residual blocks, twice the side."""
    return level["upsample"](level["blocks"](level["norm"](x, style)))
