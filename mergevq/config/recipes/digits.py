"""Recipes for handwritten digits, minutes on a CPU."""

from dataclasses import replace

from mergevq.config.generator import (
    GeneratorConfig,
    SamplingSettings,
    Several,
)
from mergevq.config.objective import (
    Labels,
    LossConfig,
    NoDistillation,
    NoTeacher,
    Preserve,
    Semantic,
    TrainedTokenizer,
)
from mergevq.config.parts import (
    Bernoulli,
    Bsq,
    CnnDecoder,
    CnnStem,
    Codebook,
    DivPrune,
    Fsq,
    GlobalMap,
    GroupedLfq,
    Kl,
    LearnedMerge,
    Lfq,
    MaskTokens,
    Merge,
    Perturb,
    Pool,
    Product,
    Quantizer,
    Queries,
    Reducer,
    Residual,
    Select,
    Shared,
    TailDrop,
    TwoBranches,
    Unmerge,
)
from mergevq.config.parts.heads import (
    Bits,
    Subindices,
)
from mergevq.config.parts.orders import (
    Anchored,
    Masked,
    Ordered,
    Raster,
    Stream,
)
from mergevq.config.parts.orders import (
    Merge as MergeOrder,
)
from mergevq.config.tokenizer import KeptConfig, TokenizerConfig
from mergevq.config.training import (
    DataConfig,
    GeneratorRun,
    OptimConfig,
    TokenizerRun,
    TokenizerTrainConfig,
    TokensConfig,
    TrainConfig,
)


def digits32() -> TokenizerRun:
    """Handwritten digits at 32 pixels, 12 to 32 of 64 tokens: the quickstart.

    Hardware and time: 2 CPU cores, 2.4 minutes at 293 images a second (measured). Expected: digits
    plainly legible, 21.4 dB with the given source and 18.7 dB with the recovered one (measured,
    docs/results.md).
    """
    return TokenizerRun(
        model=TokenizerConfig(
            image_size=32,
            stem=CnnStem(channels=16, num_res_blocks=1),
            reducer=Merge(num_layers=4, num_heads=2, layer_scale=0.1),
            quantizer=Lfq(num_bits=8),
            expander=Unmerge(dim=128, num_heads=4),
            decoder=CnnDecoder(
                channels=16, num_res_blocks=1, num_layers=2, num_heads=2, layer_scale=0.1
            ),
            num_kept=20,
        ),
        kept=KeptConfig(candidates=(12, 16, 20, 24, 32)),
        data=DataConfig(path="digits", val_fraction=0.2, num_workers=0),
        loss=LossConfig(
            perceptual_weight=0.0,
            adversarial_weight=0.0,
            alignment_weight=0.1,
            entropy_weight=0.05,
            source_weight=1.0,
            source_gradient=0.1,
            recovered_share=0.5,
        ),
        teacher=Labels(num_head_layers=2),
        optim=OptimConfig(
            lr=2e-3, betas=(0.9, 0.95), warmup_steps=50, schedule="cosine", ema_decay=0.99
        ),
        train=TokenizerTrainConfig(
            num_steps=640,
            batch_size=64,
            image_every=320,
            eval_every=160,
            num_eval_images=64,
            save_every=320,
            log_every=10,
            eval_num_kept=(12, 20, 32),
        ),
        out="runs/digits32",
    )


def digits32_gq32() -> TokenizerRun:
    """Digits as `digits32` has them, with tokens of 32 bits in four groups (WeTok).

    Source: WeTok (arXiv:2508.05599). The entropy term is a sum over groups, so its weight is that
    of `digits32` over their number. Hardware and time: not measured, 640 steps of 64 images.
    Expected: not measured.
    """
    quantizer = GroupedLfq(num_bits=32, group_bits=8)
    return _with_quantizer(quantizer, "digits32_gq32", entropy_weight=0.05 / 4)


def digits32_bsq() -> TokenizerRun:
    """Digits as `digits32` has them, with the bits of a vector on the sphere and no commitment.

    Source: BSQ (arXiv:2406.07548). Hardware and time: not measured, 640 steps of 64 images.
    Expected: not measured.
    """
    quantizer = Bsq(num_bits=8)
    return _with_quantizer(quantizer, "digits32_bsq", commitment_weight=0.0, entropy_weight=0.05)


def digits32_bernoulli() -> TokenizerRun:
    """Digits as `digits32` has them, with bits that are drawn in training.

    Source: Instella-T2I (arXiv:2506.21022). Hardware and time: not measured, 640 steps of 64
    images. Expected: not measured.
    """
    quantizer = Bernoulli(num_bits=8)
    return _with_quantizer(quantizer, "digits32_bernoulli", entropy_weight=0.0)


def digits32_fsq() -> TokenizerRun:
    """Digits as `digits32` has them, with three channels of 8, 6 and 5 levels: 240 codes.

    Source: FSQ (arXiv:2309.15505). Hardware and time: not measured, 640 steps of 64 images.
    Expected: not measured.
    """
    return _with_quantizer(
        Fsq(levels=(8, 6, 5)), "digits32_fsq", commitment_weight=0.0, entropy_weight=0.0
    )


def digits32_vq() -> TokenizerRun:
    """Digits as `digits32` has them, with a learned codebook of 256 codes.

    Source: VQ-VAE (arXiv:1711.00937), with codes of length 1 as in LlamaGen (arXiv:2406.06525).
    Hardware and time: not measured, 640 steps of 64 images. Expected: not measured.
    """
    return _with_quantizer(Codebook(codebook_size=256), "digits32_vq", entropy_weight=0.0)


def digits32_product() -> TokenizerRun:
    """Digits as `digits32` has them, with two learned codebooks of 16 codes at right angles.

    Source: FQGAN (arXiv:2411.16681). Hardware and time: not measured, 640 steps of 64 images.
    Expected: not measured.
    """
    return _with_quantizer(Product(codebook_size=16), "digits32_product", entropy_weight=0.0)


def digits32_shared() -> TokenizerRun:
    """`digits32` with one index for a semantic code and a pixel code (TokenFlow).

    Labels teach the semantic codes, pixels are read after the first block. Source: TokenFlow
    (arXiv:2412.03069). Hardware and time: not measured, 640 steps of 64 images. Expected: not
    measured.
    """
    quantizer = Shared(codebook_size=256, branch_dims=(8, 8))
    run = _with_quantizer(quantizer, "digits32_shared", commitment_weight=1.0, entropy_weight=0.0)
    return replace(run, model=replace(run.model, branches=TwoBranches(semantic_dim=8)))


def digits32_dual() -> TokenizerRun:
    """`digits32` with residual codes of two branches, of which pixels see their own (DualToken).

    Labels teach the semantic codes, pixels are read after the first block;
    `--model.branches.decodes both` gives the decoder all codes, as ILLUME+. Hardware and time: not
    measured, 640 steps of 64 images. Expected: not measured.
    """
    quantizer = Residual(codebook_size=16, branch_dims=(8, 8))
    run = _with_quantizer(quantizer, "digits32_dual", entropy_weight=0.0)
    return replace(run, model=replace(run.model, branches=TwoBranches(semantic_dim=8)))


def digits32_kl() -> TokenizerRun:
    """Digits as `digits32` has them, with 4 real numbers a token, drawn in training (ViTok).

    Source: ViTok (philippe-eecs/vitok). There is no entropy term, and nothing is quantized:
    `mergevq encode`, compression and generators take no such tokens. Hardware and time: not
    measured, 640 steps of 64 images. Expected: not measured.
    """
    return _with_quantizer(Kl(dim=4), "digits32_kl", commitment_weight=0.0, entropy_weight=0.0)


def _with_quantizer(
    quantizer: Quantizer, name: str, *, commitment_weight: float = 0.25, entropy_weight: float
) -> TokenizerRun:
    """The run of `digits32` with another quantizer, and weights of the terms that it has."""
    run = digits32()
    return replace(
        run,
        model=replace(run.model, quantizer=quantizer),
        loss=replace(run.loss, commitment_weight=commitment_weight, entropy_weight=entropy_weight),
        train=replace(run.train, eval_num_kept=(12, 20, 32, run.model.num_tokens)),
        out=f"runs/{name}",
    )


def digits32_perturb() -> TokenizerRun:
    """`digits32` with wrong tokens in a tenth of the images that are decoded.

    Source: RobustTok (arXiv:2503.08354). Hardware and time: not measured, 640 steps of 64 images.
    Expected: not measured.
    """
    run = digits32()
    return replace(
        run,
        regularizer=Perturb(),
        train=replace(run.train, eval_num_kept=(12, 20, 32, run.model.num_tokens)),
        out="runs/digits32_perturb",
    )


def digits32_semantic() -> TokenizerRun:
    """Digits as `digits32` has them, the decoder's tokens near features of another tokenizer.

    The teacher is the tokenizer `digits32` of the package, which labels have taught, so that no
    probe of this one is free of labels. Source: GigaTok (arXiv:2504.08736). Hardware and time: not
    measured, 640 steps of 64 images. Expected: not measured.
    """
    run = digits32()
    teacher = TrainedTokenizer(path="digits32")
    return replace(
        run,
        teacher=NoTeacher(),
        distillation=Semantic(layer=1, teacher=teacher),
        train=replace(run.train, eval_num_kept=(12, 20, 32, run.model.num_tokens)),
        out="runs/digits32_semantic",
    )


def digits32_preserve() -> TokenizerRun:
    """The tokenizer `digits32` of the package trained on for pixels, its encoder near its start.

    Labels have taught its start, so that a probe tells what is lost of that, and nothing else.
    Source: UniFlow (arXiv:2510.10575). Hardware and time: not measured, 160 steps of 64 images.
    Expected: not measured.
    """
    run = digits32()
    return replace(
        run,
        init_from="digits32",
        teacher=NoTeacher(),
        distillation=Preserve(),
        optim=replace(run.optim, lr=5e-4, warmup_steps=20),
        train=replace(
            run.train,
            num_steps=160,
            eval_num_kept=(12, 20, 32, run.model.num_tokens),
        ),
        out="runs/digits32_preserve",
    )


def digits32_posttrain() -> TokenizerRun:
    """The decoder of the package's `digits32` trained on, with near codes for 3 tokens of 10.

    Encoder and codes stay as they are, so that tokens and generators of before remain valid.
    Source: RobusTok's post-training (arXiv:2509.12474), whose other tokens are sampled from a
    generator. Hardware and time: not measured, 160 steps of 64 images. Expected: not measured.
    """
    run = digits32_preserve()
    return replace(
        run,
        distillation=NoDistillation(),
        encoder_lr_ratio=0.0,
        regularizer=Perturb(image_share=1.0, token_share=0.3, final_ratio=1.0),
        out="runs/digits32_posttrain",
    )


def digits32_pool() -> TokenizerRun:
    """`digits32` with means of blocks of cells in the place of merged tokens, which need no map.

    Hardware and time: not measured, 640 steps of 64 images. Expected: not measured.
    """
    run = digits32()
    return replace(
        run,
        model=replace(
            run.model, reducer=Pool(num_layers=4, num_heads=2, layer_scale=0.1), num_kept=16
        ),
        kept=KeptConfig(candidates=(4, 16, 64)),
        loss=replace(run.loss, recovered_share=0.0),
        train=replace(run.train, eval_num_kept=(4, 16, 64)),
        out="runs/digits32_pool",
    )


def digits32_global_map() -> TokenizerRun:
    """`digits32_pool` with groups of cells that are learned, the same for all images.

    Source: LGM (arXiv:2606.20076). Hardware and time: not measured, 640 steps of 64 images.
    Expected: not measured.
    """
    run = digits32_pool()
    reducer = GlobalMap(num_layers=4, num_heads=2, layer_scale=0.1)
    return replace(run, model=replace(run.model, reducer=reducer), out="runs/digits32_global_map")


def digits32_divprune() -> TokenizerRun:
    """`digits32` whose tokens are the cells farthest from each other, which others join.

    Source: DivPrune (arXiv:2503.02175), without training there. Hardware and time: not measured,
    640 steps of 64 images. Expected: not measured.
    """
    reducer = DivPrune(num_layers=4, num_heads=2, layer_scale=0.1)
    return _with_reducer(reducer, "digits32_divprune")


def digits32_learned_merge() -> TokenizerRun:
    """`digits32` with merging at the same cost, spread over blocks as training finds it best.

    Source: DiffRate (arXiv:2305.17997). Hardware and time: not measured, 640 steps of 64 images.
    Expected: not measured.
    """
    reducer = LearnedMerge(num_layers=4, num_heads=2, layer_scale=0.1)
    return _with_reducer(reducer, "digits32_learned_merge")


def digits32_select() -> TokenizerRun:
    """`digits32` whose tokens are cells that a network chooses, and that attend to the others.

    Source: LaVIT (arXiv:2309.04669), with as many cells as are asked for. Hardware and time: not
    measured, 640 steps of 64 images. Expected: not measured.
    """
    reducer = Select(num_layers=4, num_heads=2, layer_scale=0.1)
    return _with_reducer(reducer, "digits32_select")


def _with_reducer(reducer: Reducer, name: str) -> TokenizerRun:
    """The run of `digits32` with another reducer that gives a source map."""
    run = digits32()
    return replace(
        run,
        model=replace(run.model, reducer=reducer),
        train=replace(run.train, eval_num_kept=(12, 20, 32, run.model.num_tokens)),
        out=f"runs/{name}",
    )


def digits32_queries() -> TokenizerRun:
    """`digits32` with learned queries and mask tokens, as TiTok; slow to start.

    Hardware and time: not measured, 1,500 steps of 64 images. Expected: not measured.
    """
    run = digits32()
    return replace(
        run,
        model=replace(
            run.model,
            reducer=Queries(num_queries=64, num_layers=4, num_heads=2),
            expander=MaskTokens(dim=64, num_layers=2, num_heads=2),
            num_kept=16,
        ),
        kept=KeptConfig(candidates=(16, 64)),
        loss=replace(run.loss, recovered_share=0.0),
        train=replace(run.train, num_steps=1500, eval_num_kept=(16, 64)),
        out="runs/digits32_queries",
    )


def digits32_causal() -> TokenizerRun:
    """`digits32_queries` whose queries see only those before them, as SEED.

    Source: SEED (arXiv:2307.08041). Hardware and time: not measured, 1,500 steps of 64 images.
    Expected: not measured.
    """
    run = digits32_queries()
    reducer = Queries(num_queries=64, num_layers=4, num_heads=2, causal=True)
    return replace(run, model=replace(run.model, reducer=reducer), out="runs/digits32_causal")


def digits32_tail_drop() -> TokenizerRun:
    """`digits32_queries` with 64 tokens of which any first ones decode, as One-D-Piece.

    Source: One-D-Piece (arXiv:2501.10064). Hardware and time: not measured, 1,500 steps of 64
    images. Expected: not measured.
    """
    run = digits32_queries()
    reducer = Queries(num_queries=64, num_layers=4, num_heads=2, nested=True)
    return replace(
        run,
        model=replace(run.model, reducer=reducer),
        kept=KeptConfig(candidates=(64,)),
        regularizer=TailDrop(),
        train=replace(run.train, eval_num_kept=(1, 4, 16, 64)),
        out="runs/digits32_tail_drop",
    )


def digits32_nested() -> TokenizerRun:
    """`digits32_tail_drop` with powers of two, and a learned token for dropped ones, as FlexTok.

    Source: FlexTok (arXiv:2502.13967). Hardware and time: not measured, 1,500 steps of 64 images.
    Expected: not measured.
    """
    run = digits32_tail_drop()
    return replace(
        run,
        model=replace(
            run.model, expander=MaskTokens(dim=64, num_layers=2, num_heads=2, absent="token")
        ),
        regularizer=TailDrop(lengths="powers"),
        out="runs/digits32_nested",
    )


def digits32_ar() -> GeneratorRun:
    """MergeAR on the tokens of `digits32`, 16 to 24 distinct ones on a grid of 64: the quickstart.

    Tokens: `mergevq encode --model runs/digits32/model --data digits --num-kept 16 20 24
    --out runs/digits32/tokens`. Hardware and time: 2 CPU cores, 45 seconds at 879 sequences a
    second (measured). Expected: 96.5 % of 200 samples at guidance 2 are taken for the class that
    was asked for (measured, docs/results.md).
    """
    return GeneratorRun(
        model=GeneratorConfig(
            order=MergeOrder(),
            head=Subindices(sizes=(16, 16)),
            dim=96,
            num_layers=4,
            num_heads=2,
            ffn_dim=192,
            grid_size=(8, 8),
            num_kept=20,
            kept_candidates=(16, 20, 24),
            dropout=0.0,
            label_smoothing=0.0,
        ),
        tokens=TokensConfig(path="runs/digits32/tokens", tokenizer="runs/digits32/model"),
        kept=KeptConfig(distribution="gaussian", candidates=(16, 20, 24)),
        optim=OptimConfig(
            lr=3e-3,
            betas=(0.9, 0.95),
            weight_decay=0.05,
            warmup_steps=50,
            schedule="cosine",
            ema_decay=0.99,
        ),
        train=TrainConfig(
            num_steps=600,
            batch_size=64,
            image_every=300,
            eval_every=300,
            save_every=300,
            log_every=10,
        ),
        sampling=SamplingSettings(guidance_scale=2.0),
        out="runs/digits32_ar",
    )


def digits32_maskgit() -> GeneratorRun:
    """MaskGIT on the tokens of `digits32`: all 64 cells in eight passes, the surest first.

    Tokens: `mergevq encode --model runs/digits32/model --data digits --num-kept 16 20 24
    --out runs/digits32/tokens`. Source: MaskGIT (arXiv:2202.04200), as in TiTok
    (arXiv:2406.07550). Hardware and time: not measured, 600 steps of 64 sequences. Expected: not
    measured.
    """
    run = digits32_ar()
    return replace(
        run,
        model=replace(run.model, order=Masked(), num_layers=5),
        sampling=SamplingSettings(
            guidance_scale=2.0, guidance_schedule="linear", passes=Several(num_steps=8)
        ),
        out="runs/digits32_maskgit",
    )


def digits32_enat() -> GeneratorRun:
    """ENAT on the tokens of `digits32`: visible tokens are encoded once, hidden ones look at them.

    As many blocks as `digits32_maskgit`. Tokens: `mergevq encode --model runs/digits32/model
    --data digits --num-kept 16 20 24 --out runs/digits32/tokens`. Source: ENAT (arXiv:2411.06959).
    Hardware and time: not measured, 600 steps of 64 sequences.
    Expected: not measured.
    """
    run = digits32_maskgit()
    order = Masked(masking="beta", visible_weight=0.0, disentangle=True, reuse=True)
    return replace(
        run,
        model=replace(run.model, order=order, num_layers=4),
        sampling=replace(run.sampling, passes=Several(num_steps=8, confidence_temperature=1.5)),
        out="runs/digits32_enat",
    )


def digits32_rar() -> GeneratorRun:
    """RAR on all 64 cells of `digits32`: in random orders for half of the steps, then row by row.

    Beside it, --model.order.annealing 0 0 is raster order, and 1 1 random orders to the end.
    Tokens: `mergevq encode --model runs/digits32/model --data digits --num-kept 64
    --out runs/digits32/tokens`. Source: RAR (arXiv:2411.00776). Hardware and time: not measured,
    600 steps of 64 sequences. Expected: not measured.
    """
    run = digits32_ar()
    order = Raster(annealing=(0.5, 0.75))
    return replace(
        run,
        model=replace(run.model, order=order, num_kept=64, kept_candidates=()),
        kept=KeptConfig(candidates=(64,)),
        out="runs/digits32_rar",
    )


def digits32_stream() -> GeneratorRun:
    """Codes and source map of `digits32` in one stream: 64 cells, each new or a copy it names.

    Tokens: `mergevq encode --model runs/digits32/model --data digits --num-kept 16 20 24
    --out runs/digits32/tokens`. Hardware and time: not measured, 600 steps of 64 sequences.
    Expected: 239 bits a
    held-out image for codes and map at K = 20 alone (measured, docs/results.md).
    """
    run = digits32_ar()
    return replace(run, model=replace(run.model, order=Stream()), out="runs/digits32_stream")


def digits32_bits() -> GeneratorRun:
    """MergeAR on the eight bits of each token of `digits32`, two at a time.

    Tokens: `mergevq encode --model runs/digits32/model --data digits --num-kept 16 20 24
    --out runs/digits32/tokens`. Source: BAR (github.com/noctrog/BAR), without its order by
    confidence. Hardware and time: not measured, 600 steps of 64 sequences. Expected: not measured.
    """
    run = digits32_ar()
    head = Bits(sizes=(2,) * 8, schedule=(2, 2, 2, 2), num_layers=1)
    return replace(run, model=replace(run.model, head=head), out="runs/digits32_bits")


def digits32_anchor_bits() -> GeneratorRun:
    """Kept tokens of `digits32` and the gaps between the cells they open at, all of it in bits.

    Tokens: `mergevq encode --model runs/digits32/model --data digits --num-kept 16 20 24
    --out runs/digits32/tokens`. Source: this project's own, on BAR's head
    (github.com/noctrog/BAR). Hardware and time: not measured, 600 steps of 64 sequences. Expected:
    not measured.
    """
    run = digits32_bits()
    return replace(
        run,
        model=replace(run.model, order=Anchored(gap_in_bits=True)),
        out="runs/digits32_anchor_bits",
    )


def digits32_ordered() -> GeneratorRun:
    """The 16 first tokens of `digits32_causal` one after the other, without a map.

    Tokens: `mergevq encode --model runs/digits32_causal/model --data digits --num-kept 16
    --out runs/digits32_causal/tokens`. Source: SEED (arXiv:2307.08041). Hardware and time: not
    measured, 600 steps of 64 sequences. Expected: not measured.
    """
    run = digits32_ar()
    return replace(
        run,
        model=replace(run.model, order=Ordered(), num_kept=16, kept_candidates=(16,)),
        tokens=TokensConfig(
            path="runs/digits32_causal/tokens", tokenizer="runs/digits32_causal/model"
        ),
        kept=KeptConfig(candidates=(16,)),
        out="runs/digits32_ordered",
    )
