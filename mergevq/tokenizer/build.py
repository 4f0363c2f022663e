"""Parts of a tokenizer by their settings: the one list of all there are."""

from typing import assert_never

from torch import nn

from mergevq.config import parts as settings
from mergevq.config.objective import LossConfig
from mergevq.config.tokenizer import TokenizerConfig
from mergevq.metrics.lpips import Perceptual
from mergevq.tokenizer.conditions.tokens import build_condition
from mergevq.tokenizer.decoders.cnn import CnnDecoder
from mergevq.tokenizer.decoders.patch import PatchDecoder
from mergevq.tokenizer.expanders.fuse import Fuse
from mergevq.tokenizer.expanders.mask_tokens import MaskTokens
from mergevq.tokenizer.expanders.scale_sum import ScaleSum
from mergevq.tokenizer.expanders.unmerge import Unmerge
from mergevq.tokenizer.losses.gram import Gram
from mergevq.tokenizer.quantizers.bernoulli import Bernoulli
from mergevq.tokenizer.quantizers.bsq import Bsq
from mergevq.tokenizer.quantizers.codebook import Codebook
from mergevq.tokenizer.quantizers.continuous import Kl, Unquantized
from mergevq.tokenizer.quantizers.dimensions import Dimensions
from mergevq.tokenizer.quantizers.fsq import Fsq
from mergevq.tokenizer.quantizers.grids.scales import Scales
from mergevq.tokenizer.quantizers.grouped_lfq import GroupedLfq
from mergevq.tokenizer.quantizers.lfq import Lfq
from mergevq.tokenizer.quantizers.product import Product
from mergevq.tokenizer.quantizers.residual import Residual
from mergevq.tokenizer.quantizers.shared import Shared
from mergevq.tokenizer.reducers.divprune import DivPrune
from mergevq.tokenizer.reducers.global_map import GlobalMap
from mergevq.tokenizer.reducers.holistic import Holistic
from mergevq.tokenizer.reducers.learned_merge import LearnedMerge
from mergevq.tokenizer.reducers.merge import Merge
from mergevq.tokenizer.reducers.pool import Pool
from mergevq.tokenizer.reducers.queries import Queries
from mergevq.tokenizer.reducers.select import Select
from mergevq.tokenizer.regularizers.perturb import Perturb
from mergevq.tokenizer.regularizers.tail_drop import TailDrop
from mergevq.tokenizer.seams import Quantizer, Term
from mergevq.tokenizer.stems import cnn_stem, patch_stem

_LAYERS = (
    *("num_layers", "num_res_blocks", "channel_mult", "blocks"),
    *("taps", "branch_dims", "depth", "num_filters"),
)
"""Settings that say how many modules a part has."""


def build_stem(config: settings.Stem) -> nn.Module:
    """Stem of a kind; it satisfies `seams.Stem`."""
    match config:
        case settings.CnnStem():
            return cnn_stem(config)
        case settings.PatchStem():
            return patch_stem(config)
        case _:
            assert_never(config)


def build_reducer(  # noqa: PLR0911 - one case for each kind
    config: settings.Reducer, dim: int, grid_size: int
) -> Merge | LearnedMerge | Pool | GlobalMap | DivPrune | Select | Queries | Holistic:
    """Reducer of a kind.

    Args:
        config: settings.
        dim: channels.
        grid_size: cells on each side of the trained grid.
    """
    match config:
        case settings.Merge():
            return Merge(config, dim)
        case settings.LearnedMerge():
            return LearnedMerge(config, dim)
        case settings.Pool():
            return Pool(config, dim)
        case settings.GlobalMap():
            return GlobalMap(config, dim, grid_size)
        case settings.DivPrune():
            return DivPrune(config, dim)
        case settings.Select():
            return Select(config, dim)
        case settings.Queries():
            return Queries(config, dim)
        case settings.Holistic():
            return Holistic(config, dim)
        case _:
            assert_never(config)


def build_quantizer(  # noqa: C901, PLR0911, PLR0912 - one case for each kind
    config: settings.Quantizer,
) -> (
    Lfq
    | GroupedLfq
    | Bsq
    | Bernoulli
    | Fsq
    | Codebook
    | Product
    | Shared
    | Residual
    | Scales
    | Kl
    | Unquantized
    | Dimensions
):
    """Quantizer of a kind."""
    match config:
        case settings.Lfq():
            return Lfq(config)
        case settings.GroupedLfq():
            return GroupedLfq(config)
        case settings.Bsq():
            return Bsq(config)
        case settings.Bernoulli():
            return Bernoulli(config)
        case settings.Fsq():
            return Fsq(config)
        case settings.Codebook():
            return Codebook(config)
        case settings.Product():
            return Product(config)
        case settings.Shared():
            return Shared(config)
        case settings.Residual():
            return Residual(config)
        case settings.Scales():
            return Scales(config)
        case settings.Kl():
            return Kl(config)
        case settings.Unquantized():
            return Unquantized(config)
        case settings.Dimensions():
            return Dimensions(config)
        case _:
            assert_never(config)


def build_regularizer(config: settings.Regularizer) -> Perturb | TailDrop | None:
    """Regularizer of a kind, which training uses; None leaves codes as they are."""
    match config:
        case settings.NoRegularizer():
            return None
        case settings.Perturb():
            return Perturb(config)
        case settings.TailDrop():
            return TailDrop(config)
        case _:
            assert_never(config)


def build_expander(
    config: TokenizerConfig, quantizer: Quantizer
) -> Unmerge | MaskTokens | Fuse | ScaleSum:
    """Expander of a kind, for codes of the configuration's quantizer, which is built already."""
    match config.expander:
        case settings.Unmerge():
            return Unmerge(config.expander, config.decoded_dim)
        case settings.MaskTokens():
            reducer, most = config.reducer, config.num_tokens
            num_slots = reducer.num_queries if isinstance(reducer, settings.Queries) else most
            seen = build_condition(config.condition, config.expander.dim)
            return MaskTokens(config.expander, config.decoded_dim, num_slots, seen)
        case settings.Fuse():
            most = config.most_kept((config.grid_size, config.grid_size))
            return Fuse(config.expander, config.decoded_dim, most - config.num_tokens)
        case settings.ScaleSum():
            if not isinstance(quantizer, Scales):
                raise TypeError(f"quantizer ({config.quantizer.kind}) must be scales")
            return ScaleSum(quantizer)
        case _:
            assert_never(config.expander)


def build_decoder(
    config: TokenizerConfig, dim: int, style_dim: int | None
) -> CnnDecoder | PatchDecoder:
    """Decoder of a kind.

    Args:
        config: its `decoder`, for cells of its patch size.
        dim: channels of the input.
        style_dim: channels of the style; None where there is none.
    """
    match config.decoder:
        case settings.CnnDecoder():
            return CnnDecoder(config.decoder, dim, style_dim)
        case settings.PatchDecoder():
            return PatchDecoder(config.decoder, dim, config.patch_size)
        case _:
            assert_never(config.decoder)


def build_terms(config: LossConfig, perceptual: Perceptual | None) -> tuple[Term, ...]:
    """Further terms of the loss whose weight is above 0, in the order of their settings.

    Args:
        config: of the loss.
        perceptual: the network of the perceptual loss; None leaves out what is made of its
            features.
    """
    terms: list[Term] = []
    if config.gram.weight > 0 and perceptual is not None:
        terms.append(Gram(config.gram, perceptual))
    return tuple(terms)


def count_layers(config: TokenizerConfig) -> dict[str, int]:
    """Settings that say how many modules a tokenizer has, by their names."""
    counts: dict[str, int] = {}
    for part in ("stem", "reducer", "branches", "quantizer", "expander", "decoder"):
        for name in _LAYERS:
            value = getattr(getattr(config, part), name, 0)
            number = value if isinstance(value, int) else len(value)
            counts[f"{part}.{name}"] = number
    return counts
