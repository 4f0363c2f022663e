"""Recipes of the paper: ImageNet at 256 pixels, its short schedule, and source recovery."""

from dataclasses import replace

from mergevq.config.generator import (
    GeneratorConfig,
    SamplingSettings,
    Several,
    sized,
)
from mergevq.config.objective import DINOV2_BASE, HuggingFace, LossConfig
from mergevq.config.parts import CnnDecoder, CnnStem, PatchStem
from mergevq.config.parts.orders import (
    Merge as MergeOrder,
)
from mergevq.config.parts.orders import (
    Random,
    Raster,
)
from mergevq.config.tokenizer import KeptConfig, TokenizerConfig, with_cnn
from mergevq.config.training import (
    DataConfig,
    GeneratorRun,
    OptimConfig,
    SourceRun,
    TokenizerRun,
    TokenizerTrainConfig,
    TokensConfig,
    TrainConfig,
)

DINOV2_SMALL = "facebook/dinov2-small@ed25f3a31f01632728cabb09d1542f84ab7b0056"
"""Encoders start from DINOv2 by weight selection; d32 is as wide as its ViT-S."""


def imagenet256_gr_mergear() -> GeneratorRun:
    """MergeAR-L on the tokens of `imagenet256_gr`: 256 cells, 144 to 256 distinct tokens.

    Tokens: `mergevq encode --flip --num-kept 144 169 196 225 256 --out runs/imagenet256_gr/tokens
    ..`. Hardware and time: not stated in the paper; 300 epochs. Expected: gFID 3.25, IS 253.8
    (paper, Table 3), by its text without guidance.
    """
    candidates = (144, 169, 196, 225, 256)
    return GeneratorRun(
        model=sized(
            GeneratorConfig(
                order=MergeOrder(flex_attention=True),
                grid_size=(16, 16),
                num_kept=144,
                kept_candidates=candidates,
            ),
            "L",
        ),
        tokens=TokensConfig(
            path="runs/imagenet256_gr/tokens",
            tokenizer="runs/imagenet256_gr/model",
            val_fraction=0.01,
        ),
        kept=KeptConfig(distribution="exponential", candidates=candidates, floor=0.05),
        optim=OptimConfig(
            lr=4e-4,
            base_batch_size=1024,
            betas=(0.9, 0.99),
            weight_decay=0.05,
            schedule="step",
            ema_decay=0.9999,
        ),
        # 300 epochs of 1,281,167 images at batch 1,024.
        train=TrainConfig(
            num_steps=375_000,
            batch_size=1024,
            log_every=100,
            image_every=5000,
            eval_every=5000,
            num_eval_images=10_000,
            save_every=5000,
        ),
        sampling=SamplingSettings(guidance_scale=2.0),
        out="runs/imagenet256_gr_mergear",
    )


def imagenet256_gr_randar() -> GeneratorRun:
    """RandAR-L on the tokens of `imagenet256_gr`: 144 kept tokens in random order, 64 steps.

    Tokens: `mergevq encode --flip --num-kept 144 --out runs/imagenet256_gr/tokens ..`. Hardware and
    time: not stated in the paper; 300 epochs. Expected: gFID 2.63, IS 279.5 (paper, Table 3).
    """
    run = imagenet256_gr_mergear()
    return replace(
        run,
        model=replace(run.model, order=Random(), kept_candidates=(144,)),
        kept=KeptConfig(candidates=(144,)),
        optim=replace(run.optim, betas=(0.9, 0.95)),
        sampling=SamplingSettings(
            guidance_scale=3.4, guidance_schedule="linear", passes=Several(num_steps=64)
        ),
        out="runs/imagenet256_gr_randar",
    )


def imagenet256_g_mergear() -> GeneratorRun:
    """MergeAR-L on the tokens of `imagenet256_g`: 1,024 cells, 256 to 1,024 distinct tokens.

    Tokens: `mergevq encode --flip --num-kept 256 324 400 529 1024 --out runs/imagenet256_g/tokens
    ..`. Hardware and time: not stated in the paper; 300 epochs. Expected: gFID 3.05, IS 260.9
    (paper, Table 3), by its text without guidance.
    """
    run = imagenet256_gr_mergear()
    candidates = (256, 324, 400, 529, 1024)
    return replace(
        run,
        model=replace(run.model, grid_size=(32, 32), num_kept=256, kept_candidates=candidates),
        tokens=replace(
            run.tokens, path="runs/imagenet256_g/tokens", tokenizer="runs/imagenet256_g/model"
        ),
        kept=replace(run.kept, candidates=candidates),
        out="runs/imagenet256_g_mergear",
    )


def imagenet256_g_randar() -> GeneratorRun:
    """RandAR-L on the tokens of `imagenet256_g`: 256 kept tokens in random order, 88 steps.

    Tokens: `mergevq encode --flip --num-kept 256 --out runs/imagenet256_g/tokens ..`. Hardware and
    time: not stated in the paper; 300 epochs. Expected: gFID 2.24, IS 320.4 (paper, Table 3).
    """
    run = imagenet256_gr_randar()
    return replace(
        run,
        model=replace(run.model, grid_size=(32, 32), num_kept=256, kept_candidates=(256,)),
        tokens=replace(
            run.tokens, path="runs/imagenet256_g/tokens", tokenizer="runs/imagenet256_g/model"
        ),
        kept=KeptConfig(candidates=(256,)),
        sampling=replace(run.sampling, passes=Several(num_steps=88)),
        out="runs/imagenet256_g_randar",
    )


def imagenet256_gr_raster() -> GeneratorRun:
    """Plain raster order (LlamaGen-L) on all 256 tokens of `imagenet256_gr`: the baseline.

    Tokens: `mergevq encode --flip --num-kept 256 --out runs/imagenet256_gr/tokens ..`. Hardware and
    time: not stated in the paper; 300 epochs. Expected: gFID 3.28, IS 251.6 (paper, Table 3).
    """
    run = imagenet256_gr_mergear()
    return replace(
        run,
        model=replace(run.model, order=Raster(), num_kept=256, kept_candidates=()),
        kept=KeptConfig(candidates=(256,)),
        out="runs/imagenet256_gr_raster",
    )


def imagenet256_g_raster() -> GeneratorRun:
    """Plain raster order (LlamaGen-L) on all 1,024 tokens of `imagenet256_g`: the baseline.

    Tokens: `mergevq encode --flip --num-kept 1024 --out runs/imagenet256_g/tokens ..`. Hardware and
    time: not stated in the paper; 300 epochs. Expected: gFID 3.14 (paper, Table 5).
    """
    run, merged = imagenet256_gr_raster(), imagenet256_g_mergear()
    return replace(
        run,
        model=replace(run.model, grid_size=(32, 32), num_kept=1024),
        tokens=merged.tokens,
        kept=KeptConfig(candidates=(1024,)),
        out="runs/imagenet256_g_raster",
    )


def imagenet256_gr() -> TokenizerRun:
    """ImageNet at 256 pixels, version G+R (d64): f=16, 144 of 256 tokens, aligned with DINOv2.

    Hardware and time: 8 x A100 80 GB (authors' README), 270 epochs. Expected: rFID 1.48 at 144
    tokens, 1.12 at 256, linear probe 77.9 (paper, Tables 1 and 2), with given source.
    """
    return TokenizerRun(
        model=TokenizerConfig(
            image_size=256,
            stem=CnnStem(channel_mult=(1, 1, 2, 4, 8)),
            decoder=CnnDecoder(channel_mult=(1, 1, 2, 4, 8)),
        ),
        kept=KeptConfig(
            distribution="gaussian", candidates=(121, 144, 169, 196, 225, 256), floor=0.05
        ),
        data=DataConfig(path="imagenet/train", val_path="imagenet/val", crop="random"),
        loss=LossConfig(adversarial_start_step=5000, adversarial_ramp_steps=5000),
        teacher=HuggingFace(view_size=224),
        init_vit=DINOV2_BASE,
        optim=OptimConfig(lr=1e-4, schedule="step", milestones=(0.85, 0.95)),
        # 270 epochs of 1,281,167 images at batch 256.
        train=TokenizerTrainConfig(
            num_steps=1_351_000,
            batch_size=256,
            log_every=100,
            image_every=5000,
            eval_every=5000,
            num_eval_images=5000,
            save_every=5000,
            eval_num_kept=(64, 144, 256),
        ),
        out="runs/imagenet256_gr",
    )


def imagenet256_g() -> TokenizerRun:
    """ImageNet at 256 pixels, version G (d64): f=8, 256 of 1,024 tokens, for generation.

    Hardware and time: 8 x A100 80 GB (authors' README), 270 epochs. Expected: rFID 1.06 at 256
    tokens, 0.54 at 1,024 (paper, Table 2), with given source.
    """
    run = imagenet256_gr()
    return replace(
        run,
        model=replace(with_cnn(run.model, channel_mult=(1, 2, 4, 8)), num_kept=256),
        kept=KeptConfig(
            distribution="gaussian",
            candidates=(225, 256, 289, 324, 361, 400, 441, 484, 529),
            floor=0.05,
        ),
        loss=replace(run.loss, alignment_weight=0.1),
        teacher=replace(run.teacher, num_head_layers=2),
        train=replace(run.train, eval_num_kept=(256, 400, 1024)),
        out="runs/imagenet256_g",
    )


def imagenet256_r() -> TokenizerRun:
    """ImageNet at 256 pixels, version R: ViT-B/16 encoder, 36 of 256 tokens, for representation.

    Hardware and time: 8 x A100 80 GB (authors' README), 300 epochs. Expected: linear probe 79.8
    (paper, Table 1), rFID 4.67 at 144 tokens (Table 2), with given source; worse at all 256, which
    linear probe and fine-tuning see (appendix A.4).
    """
    run = imagenet256_gr()
    return replace(
        run,
        model=replace(
            run.model,
            stem=PatchStem(position_embedding=True),
            reducer=replace(run.model.reducer, num_heads=12),
            num_kept=36,
        ),
        kept=KeptConfig(distribution="exponential", candidates=(36, 49, 64, 81, 100), floor=0.05),
        loss=replace(run.loss, source_weight=1.0),
        init_vit=None,
        optim=replace(run.optim, schedule="cosine", clip_norm=5.0),
        train=replace(run.train, num_steps=1_501_000, eval_num_kept=(36, 64, 144, 256)),
        out="runs/imagenet256_r",
    )


def imagenet256_g_d32() -> TokenizerRun:
    """ImageNet at 256 pixels, version G at half the width (d32): 256 of 1,024 tokens.

    Hardware and time: 8 x A100 80 GB, 200 epochs (authors' README). Expected: rFID 0.80 at 256
    tokens, 0.48 at 1,024 (authors' README; the paper has d64 only), with given source.
    """
    run = imagenet256_g()
    return replace(
        run,
        model=with_cnn(run.model, channels=32, channel_mult=(2, 4, 8, 12)),
        kept=replace(run.kept, candidates=(225, 256, 289, 324, 361, 400, 441, 484)),
        init_vit=DINOV2_SMALL,
        # 200 epochs of 1,281,167 images at batch 256.
        train=replace(run.train, num_steps=1_001_000),
        out="runs/imagenet256_g_d32",
    )


def imagenet256_g_d96() -> TokenizerRun:
    """ImageNet at 256 pixels, version G at one and a half times the width (d96).

    Neither the paper nor the authors' code has this width of version G; it is to
    `imagenet256_g` what `imagenet256_gr_d96` is to `imagenet256_gr`. Hardware and time: not
    measured, 1,001,000 steps of 256 images. Expected: not measured.
    """
    run, wide = imagenet256_g(), imagenet256_gr_d96()
    return replace(
        run,
        model=_wide(run.model),
        optim=wide.optim,
        train=replace(run.train, num_steps=wide.train.num_steps),
        out="runs/imagenet256_g_d96",
    )


def imagenet256_gr_d32() -> TokenizerRun:
    """ImageNet at 256 pixels, version G+R at half the width (d32): 144 of 256 tokens.

    Hardware and time: 8 x A100 80 GB, 270 epochs (authors' README). Expected: rFID 1.74 at 144
    tokens, 1.27 at 256 (authors' README; the paper has d64 only), with given source.
    """
    run = imagenet256_gr()
    return replace(
        run,
        model=with_cnn(run.model, channels=32, channel_mult=(2, 2, 4, 8, 12)),
        init_vit=DINOV2_SMALL,
        out="runs/imagenet256_gr_d32",
    )


def imagenet256_gr_d96() -> TokenizerRun:
    """ImageNet at 256 pixels, version G+R at one and a half times the width (d96).

    Hardware and time: 8 x A100 80 GB, 200 epochs (authors' README). Expected: rFID 1.33 at 144
    tokens, 1.03 at 256 (authors' README; the paper has d64 only), with given source.
    """
    run = imagenet256_gr()
    return replace(
        run,
        model=_wide(run.model),
        optim=replace(run.optim, clip_norm=5.0),
        # 200 epochs of 1,281,167 images at batch 256.
        train=replace(run.train, num_steps=1_001_000),
        out="runs/imagenet256_gr_d96",
    )


def _wide(model: TokenizerConfig) -> TokenizerConfig:
    """A model at the width d96, whose heads have 64 channels as those of the others."""
    model = with_cnn(model, channels=96)
    return replace(
        model,
        reducer=replace(model.reducer, num_heads=12),
        decoder=replace(model.decoder, num_heads=12),
    )


def imagenet256_gr_source() -> SourceRun:
    """The source predictor of `imagenet256_gr`, on tokens of which a generator made a part.

    Tokens: those of `imagenet256_gr_randar`, which is the generator. Hardware and time: not
    measured, 25,000 steps of 256 images: the paper's 5 epochs. Expected: rFID 1.71 at 144 tokens
    with the recovered source, where the given one has 1.48 (paper, Table 5).
    """
    return SourceRun(
        tokenizer="runs/imagenet256_gr/model",
        tokens="runs/imagenet256_gr/tokens",
        generator="runs/imagenet256_gr_randar/model",
        num_kept=(144,),
        num_steps=25_000,
        out="runs/imagenet256_gr_source",
    )


def imagenet256_g_source() -> SourceRun:
    """The source predictor of `imagenet256_g`, on tokens of which a generator made a part.

    Tokens: those of `imagenet256_g_randar`, which is the generator. Hardware and time: not
    measured, 25,000 steps of 256 images. Expected: not measured, and not in the paper.
    """
    return SourceRun(
        tokenizer="runs/imagenet256_g/model",
        tokens="runs/imagenet256_g/tokens",
        generator="runs/imagenet256_g_randar/model",
        num_kept=(256,),
        num_steps=25_000,
        out="runs/imagenet256_g_source",
    )
