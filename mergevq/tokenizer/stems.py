"""Stems: image to grid tokens.

Source: Li et al. 2025, "MergeVQ", appendix A (arXiv:2504.00999).

Differs: a patch stem has fixed positions where the authors' code has none.
"""

from torch import Tensor, nn

from mergevq.config.tokenizer import TokenizerConfig
from mergevq.nn.conv import ResBlock


def cnn_stem(config: TokenizerConfig) -> nn.Sequential:
    """Residual levels; every level but the last ends in a convolution of stride 2."""
    stem: list[nn.Module] = [nn.Conv2d(3, config.channels, 3, padding=1, bias=False)]
    width = config.channels
    for level, mult in enumerate(config.channel_mult):
        channels = config.channels * mult
        for block in range(config.num_res_blocks):
            stem.append(ResBlock(channels if block else width, channels, config.num_groups))
        if level + 1 < len(config.channel_mult):
            stem.append(nn.Conv2d(channels, channels, 3, stride=2, padding=1))
        width = channels
    return nn.Sequential(*stem)


def patch_stem(config: TokenizerConfig) -> nn.Sequential:
    """One convolution per patch, each channel normalised over the image."""
    return nn.Sequential(
        nn.Conv2d(3, config.patch_dim, config.patch_size, stride=config.patch_size),
        nn.GroupNorm(config.patch_dim, config.patch_dim, eps=config.patch_norm_eps),
    )


def make_level(level: nn.ModuleDict, x: Tensor, codes: Tensor) -> Tensor:
    """One level of the decoder."""
    return level["upsample"](level["blocks"](level["norm"](x, codes)))
