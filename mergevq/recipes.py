"""Named runs: what `mergevq train RECIPE` trains.

Each is a function that returns a complete run, most of them another one with a few fields changed.
The docstring says on what hardware, for how long, and which number to expect; "measured" numbers
are in docs/results.md with their command, all others are the paper's or the authors' README. Where
nobody has measured, it says how many steps of how many images there are, and no hours.
"""

from collections.abc import Callable
from dataclasses import replace

from mergevq.choices import nearest
from mergevq.config import (
    DataConfig,
    KeptConfig,
    LossConfig,
    OptimConfig,
    TeacherConfig,
    TokenizerConfig,
    TokenizerRun,
    TrainConfig,
)
from mergevq.config_generator import (
    GENERATOR_SIZES,
    GeneratorConfig,
    GeneratorRun,
    SamplingSettings,
    TokensConfig,
)
from mergevq.config_source import SourceRun
from mergevq.recipes_imagenet import (
    imagenet128_g,
    imagenet128_gr,
    imagenet128_r,
    imagenet256_g,
    imagenet256_g_d32,
    imagenet256_g_d96,
    imagenet256_g_source,
    imagenet256_gr,
    imagenet256_gr_d32,
    imagenet256_gr_d96,
    imagenet256_gr_source,
    imagenet256_r,
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
            channels=16,
            channel_mult=(1, 2, 4),
            num_res_blocks=1,
            num_layers=4,
            num_heads=2,
            layer_scale=0.1,
            num_kept=20,
            num_bits=8,
            num_decoder_layers=2,
            num_decoder_heads=2,
            source_dim=128,
            num_source_heads=4,
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
        teacher=TeacherConfig(kind="labels", num_head_layers=2),
        optim=OptimConfig(
            lr=2e-3, betas=(0.9, 0.95), warmup_steps=50, schedule="cosine", ema_decay=0.99
        ),
        train=TrainConfig(
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


def tiny64_gr() -> TokenizerRun:
    """64-pixel images, version G+R: a CNN of f=4, 144 of 256 tokens, the paper's own geometry.

    Hardware and time: 1 CPU core, 17 images a second at batches of 16 without the discriminator
    (measured, docs/results.md). Expected: 20.6 dB at 144 tokens with the given source, 13.5 with
    the recovered one, after an hour on 9,469 images (measured there).
    """
    return TokenizerRun(
        model=TokenizerConfig(
            image_size=64,
            channels=16,
            channel_mult=(1, 3, 6),
            num_res_blocks=1,
            num_layers=6,
            num_heads=2,
            layer_scale=0.1,
            num_kept=144,
            num_decoder_layers=3,
            num_decoder_heads=2,
            source_dim=96,
            num_source_heads=2,
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
        teacher=TeacherConfig(kind="self", view_size=32, num_prototypes=256),
        optim=OptimConfig(
            lr=5e-4, betas=(0.9, 0.95), warmup_steps=200, schedule="cosine", ema_decay=0.995
        ),
        train=TrainConfig(num_steps=10_000, batch_size=64, eval_num_kept=(121, 144, 256)),
        out="runs/tiny64_gr",
    )


def photos64() -> TokenizerRun:
    """Your own pictures at 64 pixels on a CPU: `tiny64_gr` without the discriminator.

    Half of the images are decoded from recovered sources in training, so that a generator's tokens
    can be decoded. Hardware and time: not measured, 1,000 steps of 16 images. Expected: not
    measured; the same for 3,200 steps is `tiny64_recovered` in docs/results.md.
    """
    run = tiny64_gr()
    candidates = (36, 64, 100, 144, 196, 256)
    return replace(
        run,
        kept=KeptConfig(distribution="gaussian", candidates=candidates, mean=3.0, std=1.5),
        loss=replace(
            run.loss,
            adversarial_weight=0.0,
            entropy_weight=0.05,
            recovered_share=0.5,
            source_gradient=0.3,
        ),
        optim=replace(run.optim, lr=1.5e-3, warmup_steps=100),
        train=TrainConfig(
            num_steps=1000,
            batch_size=16,
            log_every=10,
            image_every=250,
            eval_every=250,
            save_every=250,
            num_eval_images=64,
            eval_num_kept=(64, 144, 256),
        ),
        out="runs/photos64",
    )


def tiny64_g() -> TokenizerRun:
    """64-pixel images, version G: a CNN of f=2, 256 of 1,024 tokens, for generation.

    Hardware and time: not measured, 10,000 steps of 64 images. Expected: not measured.
    """
    run = tiny64_gr()
    return replace(
        run,
        model=replace(run.model, channels=32, channel_mult=(1, 4), num_kept=256),
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
            stem="patch",
            patch_dim=192,
            position_embedding=True,
            num_layers=8,
            num_kept=36,
        ),
        kept=KeptConfig(distribution="exponential", candidates=(36, 49, 64, 81, 100), floor=0.05),
        loss=replace(run.loss, source_weight=1.0),
        train=replace(run.train, eval_num_kept=(36, 64, 144, 256)),
        out="runs/tiny64_r",
    )


def images128_gr() -> TokenizerRun:
    """Your own images at 128 pixels, version G+R: f=8, 144 of 256 tokens.

    Hardware and time: not measured, 100,000 steps of 64 images. Expected: not measured.
    """
    run = tiny64_gr()
    return replace(
        run,
        model=TokenizerConfig(
            image_size=128,
            channels=64,
            channel_mult=(1, 2, 4, 4),
            num_res_blocks=2,
            num_layers=8,
            num_heads=4,
            layer_scale=0.1,
            num_kept=144,
            num_decoder_layers=8,
            num_decoder_heads=4,
            source_dim=256,
        ),
        teacher=replace(run.teacher, view_size=96, num_prototypes=1024),
        optim=replace(run.optim, lr=2e-4, warmup_steps=1000),
        loss=replace(
            run.loss,
            perceptual_trunk="vgg",
            discriminator_channels=64,
            discriminator_start_step=0,
            adversarial_start_step=5000,
            adversarial_ramp_steps=5000,
        ),
        train=replace(run.train, num_steps=100_000),
        out="runs/images128_gr",
    )


# ---------------------------------------------------------------------------------- generators


def digits32_ar() -> GeneratorRun:
    """MergeAR on the tokens of `digits32`, 16 to 24 distinct ones on a grid of 64: the quickstart.

    Tokens: `mergevq encode --model runs/digits32/model --data digits --num-kept 16 20 24
    --out runs/digits32/tokens`. Hardware and time: 2 CPU cores, 45 seconds at 879 sequences a
    second (measured). Expected: 96.5 % of 200 samples at guidance 2 are taken for the class that
    was asked for (measured, docs/results.md).
    """
    return GeneratorRun(
        model=GeneratorConfig(
            order="merge",
            dim=96,
            num_layers=4,
            num_heads=2,
            ffn_dim=192,
            grid_size=(8, 8),
            num_kept=20,
            kept_candidates=(16, 20, 24),
            num_bits=8,
            factor_bits=(4, 4),
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


def tiny64_mergear() -> GeneratorRun:
    """MergeAR on the tokens of `tiny64_gr`: 256 cells in raster order, 144 to 256 distinct tokens.

    Tokens: `mergevq encode --num-kept 144 169 196 225 256 --out runs/tiny64_gr/tokens ..`. Hardware
    and time: not measured, 20,000 steps of 64 sequences. Expected: not measured at this size; a
    narrower one, 19 minutes of one CPU core, is in docs/results.md.
    """
    candidates = (144, 169, 196, 225, 256)
    return GeneratorRun(
        model=replace(
            GeneratorConfig(
                order="merge",
                grid_size=(16, 16),
                num_kept=144,
                kept_candidates=candidates,
            ),
            **GENERATOR_SIZES["small"],
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


def photos64_mergear() -> GeneratorRun:
    """MergeAR on the tokens of `photos64`, narrow enough for a CPU.

    Tokens: `mergevq encode --num-kept 144 196 256 --out runs/photos64/tokens ..`. Hardware and
    time: not measured, 1,000 steps of 16 sequences. Expected: not measured.
    """
    run = tiny64_mergear()
    candidates = (144, 196, 256)
    return replace(
        run,
        model=replace(
            run.model, dim=192, num_layers=4, num_heads=3, ffn_dim=512, kept_candidates=candidates
        ),
        tokens=TokensConfig(path="runs/photos64/tokens", tokenizer="runs/photos64/model"),
        kept=replace(run.kept, candidates=candidates),
        optim=replace(run.optim, lr=1e-3, warmup_steps=100, ema_decay=0.995),
        train=TrainConfig(
            num_steps=1000,
            batch_size=16,
            log_every=10,
            image_every=500,
            eval_every=250,
            save_every=250,
            num_eval_images=64,
        ),
        out="runs/photos64_mergear",
    )


def tiny64_randar() -> GeneratorRun:
    """RandAR on the tokens of `tiny64_gr`: 144 kept tokens in random order, then their source.

    Tokens: `mergevq encode --num-kept 144 --out runs/tiny64_gr/tokens ..`. Hardware and time: not
    measured, 20,000 steps of 64 sequences. Expected: not measured.
    """
    run = tiny64_mergear()
    return replace(
        run,
        model=replace(run.model, order="random", kept_candidates=(144,)),
        kept=KeptConfig(candidates=(144,)),
        sampling=SamplingSettings(guidance_scale=2.0, guidance_schedule="linear", num_steps=64),
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
        model=replace(run.model, order="raster", num_kept=256, kept_candidates=()),
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
        model=replace(run.model, order="anchor"),
        sampling=SamplingSettings(guidance_scale=2.0),
        out="runs/tiny64_anchored",
    )


def imagenet256_gr_mergear() -> GeneratorRun:
    """MergeAR-L on the tokens of `imagenet256_gr`: 256 cells, 144 to 256 distinct tokens.

    Tokens: `mergevq encode --flip --num-kept 144 169 196 225 256 --out runs/imagenet256_gr/tokens
    ..`. Hardware and time: not stated in the paper; 300 epochs. Expected: gFID 3.25, IS 253.8
    (paper, Table 3), by its text without guidance.
    """
    candidates = (144, 169, 196, 225, 256)
    return GeneratorRun(
        model=replace(
            GeneratorConfig(
                order="merge",
                grid_size=(16, 16),
                num_kept=144,
                kept_candidates=candidates,
                flex_attention=True,
            ),
            **GENERATOR_SIZES["L"],
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
        model=replace(run.model, order="random", kept_candidates=(144,), flex_attention=False),
        kept=KeptConfig(candidates=(144,)),
        optim=replace(run.optim, betas=(0.9, 0.95)),
        sampling=SamplingSettings(guidance_scale=3.4, guidance_schedule="linear", num_steps=64),
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
        sampling=replace(run.sampling, num_steps=88),
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
        model=replace(
            run.model, order="raster", num_kept=256, kept_candidates=(), flex_attention=False
        ),
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


GENERATOR_RECIPES: dict[str, Callable[[], GeneratorRun]] = {
    recipe.__name__: recipe
    for recipe in (
        digits32_ar,
        photos64_mergear,
        tiny64_mergear,
        tiny64_randar,
        tiny64_raster,
        tiny64_anchored,
        imagenet256_gr_mergear,
        imagenet256_gr_randar,
        imagenet256_gr_raster,
        imagenet256_g_mergear,
        imagenet256_g_randar,
        imagenet256_g_raster,
    )
}
"""Every recipe of a generator by name."""

TOKENIZER_RECIPES: dict[str, Callable[[], TokenizerRun]] = {
    recipe.__name__: recipe
    for recipe in (
        digits32,
        photos64,
        tiny64_g,
        tiny64_gr,
        tiny64_r,
        images128_gr,
        imagenet128_g,
        imagenet128_gr,
        imagenet128_r,
        imagenet256_g,
        imagenet256_g_d32,
        imagenet256_g_d96,
        imagenet256_gr,
        imagenet256_gr_d32,
        imagenet256_gr_d96,
        imagenet256_r,
    )
}
"""Every recipe of a tokenizer by name."""

SOURCE_RECIPES: dict[str, Callable[[], SourceRun]] = {
    recipe.__name__: recipe for recipe in (imagenet256_g_source, imagenet256_gr_source)
}
"""Every recipe of `mergevq finetune-source` by name."""

RECIPES: dict[str, Callable[[], TokenizerRun | GeneratorRun]] = {
    **TOKENIZER_RECIPES,
    **GENERATOR_RECIPES,
}
"""Every recipe of `mergevq train` by name."""


def recipe(name: str) -> TokenizerRun | GeneratorRun:
    """The run of a recipe.

    Raises:
        ValueError: there is no recipe of this name.
    """
    if name not in RECIPES:
        raise ValueError(
            f"no recipe {name!r}{nearest(name, RECIPES)}; there are {', '.join(RECIPES)}"
        )
    return RECIPES[name]()


def shrink(run: TokenizerRun) -> TokenizerRun:
    """Cut a run down to seconds on a CPU, keeping its structure: for tests and first tries."""
    model = run.model
    side = 8 * model.patch_size
    return replace(
        run,
        model=replace(
            model,
            image_size=side,
            channels=8,
            patch_dim=32,
            num_res_blocks=1,
            num_layers=3,
            num_heads=2,
            num_kept=16,
            num_decoder_layers=1,
            num_decoder_heads=2,
            source_dim=16,
            num_source_layers=1,
            num_source_heads=2,
        ),
        kept=replace(run.kept, candidates=(16, 24, 32)),
        teacher=replace(run.teacher, view_size=6 * model.patch_size, num_prototypes=16),
        train=replace(
            run.train,
            num_steps=2,
            batch_size=4,
            log_every=1,
            image_every=2,
            eval_every=2,
            num_eval_images=4,
            save_every=2,
            eval_num_kept=(16, 24),
        ),
    )


def shrink_generator(run: GeneratorRun) -> GeneratorRun:
    """Cut a generator's run down likewise; its grid is 8 x 8, as of what `shrink` makes."""
    everything = run.model.order == "raster"
    candidates = (64,) if everything else (16, 24)[: len(run.kept.candidates)]
    return replace(
        run,
        model=replace(
            run.model,
            dim=16,
            num_layers=2,
            num_heads=2,
            num_head_layers=1,
            ffn_dim=32,
            grid_size=(8, 8),
            num_kept=candidates[0],
            kept_candidates=candidates if run.model.kept_candidates else (),
        ),
        kept=replace(run.kept, candidates=candidates),
        train=replace(
            run.train,
            num_steps=2,
            batch_size=4,
            log_every=1,
            image_every=2,
            eval_every=2,
            num_eval_images=4,
            save_every=2,
            eval_num_kept=(),
        ),
        sampling=replace(run.sampling, num_steps=None if run.sampling.num_steps is None else 4),
    )
