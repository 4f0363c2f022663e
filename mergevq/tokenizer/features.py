"""Features of images for probes, retrieval and other people's heads.

Shape letters: B batch, L grid tokens, K kept tokens, C channels, D channels of latents.
"""

from jaxtyping import Float
from torch import Tensor

from mergevq.config.base import Pool, Stage
from mergevq.data.layouts import require_source, unmerge
from mergevq.tokenizer.encoder import Encoder
from mergevq.tokenizer.seams import Quantizer, TokenSet

_LAST = frozenset({"latents", "quantized"})
"""Stages after the last block."""


def require_stage(stage: Stage, layer: int, num_layers: int) -> None:
    """Check that a stage can be had of the tokens after so many blocks.

    Raises:
        ValueError: it comes after the last block, and this is another.
    """
    if stage in _LAST and layer != num_layers:
        raise ValueError(
            f"layer ({layer}) must be {num_layers} or None for stage {stage!r}: only the last "
            "block's tokens are quantized"
        )


def pool_features(
    encoder: Encoder, quantizer: Quantizer, out: TokenSet, stage: Stage, pool: Pool
) -> Float[Tensor, "b *n c"]:
    """Features of the encoder's tokens; several stages and pools need one pass of the encoder.

    Args:
        encoder: gave `out`.
        quantizer: that of the same tokenizer.
        out: tokens as `Tokenizer.run_layers` gives them; those after the last block for `latents`
            and `quantized`.
        stage: `pre_merge` and `merged` are the tokens as they are, `unmerged` those copied back to
            all L cells, `latents` K tokens before quantization, `quantized` the K
            codes.
        pool: `none` keeps the tokens, `class` is the class token, `mean` the mean over tokens,
            `size_weighted_mean` the mean over grid cells.

    Raises:
        ValueError: cells are asked of tokens without a source map.
    """
    if pool == "class":
        return out.class_token
    tokens = encoder.latents(out) if stage in _LAST else out.tokens
    if stage == "quantized":
        tokens = quantizer(tokens).codes
        if pool == "size_weighted_mean" and tokens.shape[1] != out.layout.num_kept:
            raise ValueError(
                f"pool ({pool}) weighs tokens by their cells, and the {tokens.shape[1]} quantized "
                "ones are of several scales: take the pool mean"
            )
    if stage == "unmerged" or pool == "size_weighted_mean":
        tokens = unmerge(tokens, require_source(out.layout, f"{stage} features"))
    return tokens if pool == "none" else tokens.mean(1)
