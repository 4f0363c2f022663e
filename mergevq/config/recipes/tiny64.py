"""Recipes for 64-pixel images."""

from dataclasses import replace

from mergevq.config.generator import (
    GeneratorConfig,
    SamplingSettings,
    Several,
    sized,
)
from mergevq.config.objective import LossConfig, SelfDistillation
from mergevq.config.parts import CnnDecoder, CnnStem, Merge, PatchStem, Unmerge
from mergevq.config.parts.orders import (
    Anchored,
    Random,
    Raster,
)
from mergevq.config.parts.orders import (
    Merge as MergeOrder,
)
from mergevq.config.tokenizer import KeptConfig, TokenizerConfig, with_cnn
from mergevq.config.training import (
    DataConfig,
    GeneratorRun,
    OptimConfig,
    TokenizerRun,
    TokenizerTrainConfig,
    TokensConfig,
    TrainConfig,
)


def tiny64_gr() -> TokenizerRun:
    """64-pixel images, version G+R: a CNN of f=4, 144 of 256 tokens, the paper's own geometry.

    Hardware and time: 1 CPU core, 17 images a second at batches of 16 without the discriminator
    (measured, docs/results.md). Expected: 20.6 dB at 144 tokens with the given source, 13.5 with
    the recovered one, after an hour on 9,469 images (measured there).
    """
    return TokenizerRun(
        model=TokenizerConfig(
            image_size=64,
            stem=CnnStem(channels=16, channel_mult=(1, 3, 6), num_res_blocks=1),
            reducer=Merge(num_layers=6, num_heads=2, layer_scale=0.1),
            expander=Unmerge(dim=96, num_heads=2),
            decoder=CnnDecoder(
                channels=16,
                channel_mult=(1, 3, 6),
                num_res_blocks=1,
                num_layers=3,
                num_heads=2,
                layer_scale=0.1,
            ),
            num_kept=144,
        ),
        kept=KeptConfig(
            distribution="gaussian", candidates=(121, 144, 169, 196, 225, 256), floor=0.05
        ),
        data=DataConfig(flip=True, crop="random"),
        loss=LossConfig(
            perceptual_trunk="squeeze",
            discriminator_channels=32,
            discriminator_start_step=2000,
            adversarial_start_step=3000,
        ),
        teacher=SelfDistillation(view_size=32, num_prototypes=256),
        optim=OptimConfig(
            lr=5e-4, betas=(0.9, 0.95), warmup_steps=200, schedule="cosine", ema_decay=0.995
        ),
        train=TokenizerTrainConfig(num_steps=10_000, batch_size=64, eval_num_kept=(121, 144, 256)),
        out="runs/tiny64_gr",
    )


def tiny64_g() -> TokenizerRun:
    """64-pixel images, version G: a CNN of f=2, 256 of 1,024 tokens, for generation.

    Hardware and time: not measured, 10,000 steps of 64 images. Expected: not measured.
    """
    run = tiny64_gr()
    return replace(
        run,
        model=replace(
            with_cnn(run.model, channels=32, channel_mult=(1, 4)),
            num_kept=256,
        ),
        kept=KeptConfig(
            distribution="exponential", candidates=(256, 289, 324, 361, 400), floor=0.05
        ),
        loss=replace(run.loss, alignment_weight=0.1),
        teacher=replace(run.teacher, num_head_layers=2),
        train=replace(run.train, eval_num_kept=(256, 400, 1024)),
        out="runs/tiny64_g",
    )


def tiny64_r() -> TokenizerRun:
    """64-pixel images, version R: patches of 4 pixels, 36 of 256 tokens, for representation.

    Hardware and time: not measured, 10,000 steps of 64 images. Expected: not measured.
    """
    run = tiny64_gr()
    return replace(
        run,
        model=replace(
            run.model,
            stem=PatchStem(width=192, patch_size=4, position_embedding=True, num_groups=16),
            reducer=replace(run.model.reducer, num_layers=8),
            num_kept=36,
        ),
        kept=KeptConfig(distribution="exponential", candidates=(36, 49, 64, 81, 100), floor=0.05),
        loss=replace(run.loss, source_weight=1.0),
        train=replace(run.train, eval_num_kept=(36, 64, 144, 256)),
        out="runs/tiny64_r",
    )


def tiny64_mergear() -> GeneratorRun:
    """MergeAR on the tokens of `tiny64_gr`: 256 cells in raster order, 144 to 256 distinct tokens.

    Tokens: `mergevq encode --num-kept 144 169 196 225 256 --out runs/tiny64_gr/tokens ..`. Hardware
    and time: not measured, 20,000 steps of 64 sequences. Expected: not measured at this size; a
    narrower one, 19 minutes of one CPU core, is in docs/results.md.
    """
    candidates = (144, 169, 196, 225, 256)
    return GeneratorRun(
        model=sized(
            GeneratorConfig(
                order=MergeOrder(), grid_size=(16, 16), num_kept=144, kept_candidates=candidates
            ),
            "small",
        ),
        tokens=TokensConfig(path="runs/tiny64_gr/tokens", tokenizer="runs/tiny64_gr/model"),
        kept=KeptConfig(distribution="exponential", candidates=candidates, floor=0.05),
        optim=OptimConfig(
            lr=4e-4,
            betas=(0.9, 0.95),
            weight_decay=0.05,
            warmup_steps=500,
            schedule="cosine",
            ema_decay=0.999,
        ),
        train=TrainConfig(
            num_steps=20_000, batch_size=64, image_every=2000, eval_every=1000, num_eval_images=1024
        ),
        sampling=SamplingSettings(guidance_scale=2.0),
        out="runs/tiny64_mergear",
    )


def tiny64_randar() -> GeneratorRun:
    """RandAR on the tokens of `tiny64_gr`: 144 kept tokens in random order, then their source.

    Tokens: `mergevq encode --num-kept 144 --out runs/tiny64_gr/tokens ..`. Hardware and time: not
    measured, 20,000 steps of 64 sequences. Expected: not measured.
    """
    run = tiny64_mergear()
    return replace(
        run,
        model=replace(run.model, order=Random(), kept_candidates=(144,)),
        kept=KeptConfig(candidates=(144,)),
        sampling=SamplingSettings(
            guidance_scale=2.0, guidance_schedule="linear", passes=Several(num_steps=64)
        ),
        out="runs/tiny64_randar",
    )


def tiny64_raster() -> GeneratorRun:
    """Plain raster order on all 256 tokens of `tiny64_gr`: the baseline, as LlamaGen.

    Tokens: `mergevq encode --num-kept 256 --out runs/tiny64_gr/tokens ..`. Hardware and time: not
    measured, 20,000 steps of 64 sequences. Expected: not measured at this size; a narrower one is
    in docs/results.md.
    """
    run = tiny64_mergear()
    return replace(
        run,
        model=replace(run.model, order=Raster(), num_kept=256, kept_candidates=()),
        kept=KeptConfig(candidates=(256,)),
        out="runs/tiny64_raster",
    )


def tiny64_anchored() -> GeneratorRun:
    """Anchored order on the tokens of `tiny64_gr`: 144 kept tokens and the cells they open at.

    Tokens: `mergevq encode --num-kept 144 --out runs/tiny64_gr/tokens ..`. Hardware and time: not
    measured, 20,000 steps of 64 sequences. Expected: not measured at this size; a narrower one is
    in docs/results.md.
    """
    run = tiny64_randar()
    return replace(
        run,
        model=replace(run.model, order=Anchored()),
        sampling=SamplingSettings(guidance_scale=2.0),
        out="runs/tiny64_anchored",
    )
