"""Features of images for probes, retrieval and other people's heads.

Shape letters: B batch, L grid tokens, K kept tokens, C channels, D channels of latents.
"""

from typing import TYPE_CHECKING

from jaxtyping import Float
from torch import Tensor

from mergevq.config.base import Pool, Stage, check_choice
from mergevq.data.layouts import require_source, unmerge
from mergevq.data.prepare import Pictures
from mergevq.tokenizer.conditions.values import unknown
from mergevq.tokenizer.encoder import Encoder
from mergevq.tokenizer.seams import Quantizer, TokenSet

if TYPE_CHECKING:
    from mergevq.tokenizer.tokenizer import Tokenizer

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


def features(
    tokenizer: "Tokenizer",
    image: Pictures,
    num_kept: int | None,
    layer: int | None,
    stage: Stage,
    pool: Pool,
) -> Float[Tensor, "b *n c"]:
    """Representation of an image; see `Tokenizer.features`."""
    check_choice("stage", stage, Stage)
    check_choice("pool", pool, Pool)
    num_layers = tokenizer.num_layers if layer is None else layer
    require_stage(stage, num_layers, tokenizer.num_layers)
    image = tokenizer.batch(image)
    if stage == "pre_merge":
        num_kept = tokenizer.config.most_kept(tokenizer.grid_shape(image))
    out = run_layers(tokenizer, image, num_kept, num_layers)
    return pool_features(tokenizer.encoder, tokenizer.quantizer, out, stage, pool)


def run_layers(
    tokenizer: "Tokenizer", image: Pictures, num_kept: int | None = None, layer: int | None = None
) -> TokenSet:
    """The encoder's tokens, of which `pool_features` makes several kinds of features.

    Nothing but the image is known: a condition is left out.

    Args:
        tokenizer: has the encoder.
        image: as `Tokenizer.encode` takes it.
        num_kept: K; None is the nominal one and L turns merging off.
        layer: blocks to run, from 0 (the stem) to all; None is all.

    Raises:
        ValueError: wrong type, range, size or K, or the layer does not exist.
    """
    image = tokenizer.batch(image)
    num_layers = tokenizer.num_layers if layer is None else layer
    if not 0 <= num_layers <= tokenizer.num_layers:
        raise ValueError(
            f"layer ({num_layers}) must be between 0 and the {tokenizer.num_layers} blocks"
        )
    grid_shape = tokenizer.grid_shape(image)
    merges = num_kept != (most := tokenizer.config.most_kept(grid_shape))
    count = tokenizer.resolve_num_kept(grid_shape, num_kept) if merges else most
    with tokenizer.computing():
        condition = unknown(tokenizer.config.condition, len(image), image)
        out = tokenizer.encoder(image, count, num_layers, condition)
    return out._replace(
        tokens=tokenizer.finished(out.tokens),
        class_token=tokenizer.finished(out.class_token),
        taps=tuple(map(tokenizer.finished, out.taps)),
    )


def pool_features(
    encoder: Encoder, quantizer: Quantizer, out: TokenSet, stage: Stage, pool: Pool
) -> Float[Tensor, "b *n c"]:
    """Features of the encoder's tokens; several stages and pools need one pass of the encoder.

    Args:
        encoder: gave `out`.
        quantizer: that of the same tokenizer.
        out: tokens as `run_layers` gives them; those after the last block for `latents`
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
