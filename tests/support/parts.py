"""Small tokenizers by a few numbers, which name the parts that have them."""

from dataclasses import replace

from mergevq.config.objective import Semantic, TrainedTokenizer
from mergevq.config.parts import (
    Bernoulli,
    Bsq,
    CnnDecoder,
    CnnStem,
    Codebook,
    Dimensions,
    DivPrune,
    Fuse,
    GlobalMap,
    Holistic,
    Kl,
    LearnedMerge,
    Lfq,
    MaskTokens,
    Merge,
    PatchDecoder,
    PatchStem,
    PixelFlow,
    Pool,
    PrefixFlow,
    Product,
    Queries,
    Residual,
    Scales,
    Select,
    Shared,
    TextCondition,
    Unmerge,
    Unquantized,
)
from mergevq.config.parts.heads import (
    Bits,
    Independent,
)
from mergevq.config.tokenizer import TokenizerConfig

_CNN = {"channels": 64, "channel_mult": (1, 2, 4), "num_res_blocks": 4}
_LFQ = ("num_bits", "entropy_temperature")
_DEFAULTS = {
    **_CNN,
    "image_size": 64,
    "stem": "cnn",
    "patch_dim": 768,
    "patch_norm": True,
    "patch_norm_eps": 1e-5,
    "position_embedding": False,
    "num_layers": 12,
    "num_heads": 8,
    "layer_scale": 1e-5,
    "transformer_norm_eps": 1e-6,
    "merge_shape": "linear",
    "num_bits": 18,
    "entropy_temperature": 0.01,
    "source_dim": 384,
    "num_source_layers": 2,
    "num_source_heads": 8,
    "decoder": "cnn",
    "decoder_width": 192,
    "decoder_blocks": "ccaccc",
    "bit_components": (),
    "num_decoder_layers": 12,
    "num_decoder_heads": 8,
    "num_kept": 144,
    "kept_range": None,
}

_SMALL = (
    CnnStem(channels=8, num_res_blocks=1),
    PixelFlow(dim=16, num_global_layers=1, num_heads=2, width=16, depth=2, num_draws=2),
    PrefixFlow(dim=16, num_layers=2, num_heads=2),
    PatchStem(width=32, patch_size=4, num_groups=8),
    Merge(num_layers=3, num_heads=2, layer_scale=0.1),
    LearnedMerge(num_layers=3, num_candidates=8, num_heads=2, layer_scale=0.1),
    Pool(num_layers=2, num_heads=2, layer_scale=0.1),
    GlobalMap(num_layers=2, num_heads=2, layer_scale=0.1),
    DivPrune(num_layers=2, num_heads=2, layer_scale=0.1),
    Select(num_layers=2, num_merger_layers=1, num_heads=2, layer_scale=0.1),
    Queries(num_queries=64, num_layers=2, num_heads=2),
    Holistic(num_holistic=4, num_layers=2, num_full_layers=1, num_heads=2),
    Lfq(num_bits=8),
    Bsq(num_bits=8),
    Bernoulli(num_bits=8),
    Codebook(codebook_size=64, dim=4),
    Product(codebook_size=16, book_dim=4),
    Shared(codebook_size=64, branch_dims=(4, 4)),
    Residual(codebook_size=16, branch_dims=(4,)),
    Scales(codebook_size=16, dim=4),
    Kl(dim=4),
    Unquantized(dim=4),
    Dimensions(dim=4, num_levels=4),
    TextCondition(dim=6, num_embeddings=3, num_bytes=20),
    Unmerge(dim=16, num_layers=1, num_heads=2),
    MaskTokens(dim=16, num_layers=1, num_heads=2),
    Fuse(dim=16, num_layers=1, num_heads=2),
    CnnDecoder(channels=8, num_res_blocks=1, num_layers=1, num_heads=2, layer_scale=0.1),
    PatchDecoder(width=16, num_heads=2, blocks="ca"),
    # Teachers that come with the package.
    Semantic(layer=1, teacher=TrainedTokenizer(path="digits32")),
    TrainedTokenizer(path="digits32"),
    Independent(sizes=(16, 16)),
    Bits(sizes=(2,) * 8, num_layers=1),
)


def small_part(cls):
    """A part of this class that is quick and fits small tokenizers with patches of 4 pixels.

    Heads of generators fit tokens of 8 bits.
    """
    return {type(part): part for part in _SMALL}.get(cls) or cls()


def tokenizer_config(**values):
    """A tokenizer that merges, quantizes to bits and unmerges, of these numbers."""
    if unknown := set(values) - set(_DEFAULTS):
        raise TypeError(f"unknown: {unknown}")
    v = {**_DEFAULTS, **values}
    cnn = {name: v[name] for name in _CNN}
    block = {"layer_scale": v["layer_scale"], "norm_eps": v["transformer_norm_eps"]}
    stem = CnnStem(**cnn, position_embedding=v["position_embedding"])
    if v["stem"] == "patch":
        stem = PatchStem(
            width=v["patch_dim"],
            patch_size=stem.patch_size,
            norm=v["patch_norm"],
            norm_eps=v["patch_norm_eps"],
            num_groups=stem.num_groups,
            position_embedding=v["position_embedding"],
        )
    heads = v["num_decoder_heads"]
    if v["decoder"] == "patch":
        decoder = PatchDecoder(
            width=v["decoder_width"],
            num_heads=heads,
            blocks=v["decoder_blocks"],
            bit_components=v["bit_components"],
        )
    else:
        decoder = CnnDecoder(**cnn, **block, num_layers=v["num_decoder_layers"], num_heads=heads)
    return TokenizerConfig(
        image_size=v["image_size"],
        stem=stem,
        reducer=Merge(
            num_layers=v["num_layers"], num_heads=v["num_heads"], shape=v["merge_shape"], **block
        ),
        quantizer=Lfq(num_bits=v["num_bits"], entropy_temperature=v["entropy_temperature"]),
        expander=Unmerge(
            dim=v["source_dim"],
            num_layers=v["num_source_layers"],
            num_heads=v["num_source_heads"],
        ),
        decoder=decoder,
        num_kept=v["num_kept"],
        kept_range=v["kept_range"],
    )


def changed(config, **values):
    """The same tokenizer with some of its numbers, or its stem or decoder, changed."""
    stem, reducer, decoder = config.stem, config.reducer, config.decoder
    is_cnn = isinstance(decoder, CnnDecoder)
    cnn = stem if isinstance(stem, CnnStem) else decoder if is_cnn else None
    levels = (1,) * (config.patch_size.bit_length())
    old = {"channel_mult": levels} if cnn is None else {n: getattr(cnn, n) for n in _CNN}
    if isinstance(stem, PatchStem):
        old |= {
            "stem": "patch",
            "patch_dim": stem.width,
            "patch_norm": stem.norm,
            "patch_norm_eps": stem.norm_eps,
        }
        old.setdefault("channels", stem.num_groups)
    if is_cnn:
        old |= {"num_decoder_layers": decoder.num_layers}
    else:
        old |= {
            "decoder": "patch",
            "decoder_width": decoder.width,
            "decoder_blocks": decoder.blocks,
            "bit_components": decoder.bit_components,
        }
    old |= {
        "image_size": config.image_size,
        "position_embedding": stem.position_embedding,
        "num_layers": reducer.num_layers,
        "num_heads": reducer.num_heads,
        "layer_scale": reducer.layer_scale,
        "transformer_norm_eps": reducer.norm_eps,
        "merge_shape": reducer.shape,
        "source_dim": config.expander.dim,
        "num_source_layers": config.expander.num_layers,
        "num_source_heads": config.expander.num_heads,
        "num_decoder_heads": decoder.num_heads,
        "num_kept": config.num_kept,
        "kept_range": config.kept_range,
    }
    if isinstance(config.quantizer, Lfq):
        old |= {name: getattr(config.quantizer, name) for name in _LFQ}
        return tokenizer_config(**{**old, **values})
    return replace(tokenizer_config(**{**old, **values}), quantizer=config.quantizer)
