"""Recipes for a folder of pictures and a CPU."""

from dataclasses import replace

from mergevq.config.generator import (
    Several,
)
from mergevq.config.objective import NoTeacher
from mergevq.config.parts import PatchDecoder, PatchStem, Unmerge
from mergevq.config.parts.orders import (
    Random,
)
from mergevq.config.recipes.tiny64 import tiny64_gr, tiny64_mergear
from mergevq.config.tokenizer import KeptConfig
from mergevq.config.training import (
    GeneratorRun,
    TokenizerRun,
    TokenizerTrainConfig,
    TokensConfig,
    TrainConfig,
)


def photos64() -> TokenizerRun:
    """Your own pictures at 64 pixels on a CPU: patches of 4 that start as principal components.

    The geometry of `tiny64_gr`, 144 of 256 tokens, without its CNNs, discriminator and teacher, so
    that training has something to show after minutes. In its second half, half of the images are
    decoded from recovered sources, so that a generator's tokens can be decoded. Hardware and time:
    2 CPU cores, 5.8 minutes at 46 images a second (measured, docs/results.md). Expected: on 500
    pictures and without LPIPS 23.0 dB at 144 tokens with the given source, 13.4 with the recovered
    one (measured there).
    """
    run = tiny64_gr()
    candidates = (36, 49, 64, 81, 100, 121, 144, 169, 196, 225, 256)
    return replace(
        run,
        model=replace(
            run.model,
            stem=PatchStem(width=128, patch_size=4, norm=False, num_groups=16),
            decoder=PatchDecoder(width=192, num_heads=2, blocks="ccaccc"),
            expander=Unmerge(dim=64, num_heads=2),
        ),
        init_codes="components",
        encoder_lr_ratio=0.01,
        kept=KeptConfig(candidates=candidates),
        loss=replace(
            run.loss,
            adversarial_weight=0.0,
            recovered_share=0.5,
            recovered_start_step=500,
            source_gradient=0.1,
        ),
        teacher=NoTeacher(),
        optim=replace(run.optim, lr=1e-3, warmup_steps=100, schedule="step", ema_decay=0.999),
        train=TokenizerTrainConfig(
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


def photos64_mergear() -> GeneratorRun:
    """MergeAR on the tokens of `photos64`, narrow enough for a CPU.

    Tokens: `mergevq encode --num-kept 144 196 256 --out runs/photos64/tokens ..`. Hardware and
    time: 2 CPU cores, 5.1 minutes at 55 sequences a second (measured, docs/results.md). Expected:
    7.35 nats a token on 500 pictures (measured there), far from samples that show anything.
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


def photos64_wide() -> TokenizerRun:
    """`photos64` for a GPU: the same geometry, twice the width, kept on the device.

    Hardware and time: not measured, 100,000 steps of 256 images, or the minutes that it is given
    (`--train.max-minutes`). Expected: not measured.
    """
    run = photos64()
    model = run.model
    return replace(
        run,
        model=replace(
            model,
            stem=replace(model.stem, width=192),
            reducer=replace(model.reducer, num_heads=4),
            decoder=PatchDecoder(width=224, num_heads=4, blocks="ccaccaccc"),
            expander=Unmerge(dim=96, num_heads=4),
        ),
        data=replace(run.data, cache="device"),
        loss=replace(run.loss, recovered_start_step=50_000),
        optim=replace(run.optim, warmup_steps=2000, ema_decay=0.9995),
        train=replace(
            run.train,
            num_steps=100_000,
            batch_size=256,
            log_every=100,
            image_every=2000,
            eval_every=2000,
            save_every=2000,
            num_eval_images=512,
        ),
        out="runs/photos64_wide",
    )


def photos64_wide_mergear() -> GeneratorRun:
    """MergeAR on 144 tokens of `photos64_wide`, for a GPU.

    Tokens: `mergevq encode --flip --num-kept 144 --out runs/photos64_wide/tokens ..`. Hardware and
    time: not measured, 100,000 steps of 256 sequences, or the minutes that it is given. Expected:
    not measured.
    """
    run = photos64_mergear()
    return replace(
        run,
        model=replace(
            run.model,
            dim=208,
            num_layers=5,
            num_heads=4,
            ffn_dim=576,
            num_kept=144,
            kept_candidates=(144,),
        ),
        tokens=TokensConfig(path="runs/photos64_wide/tokens", tokenizer="runs/photos64_wide/model"),
        kept=KeptConfig(candidates=(144,)),
        optim=replace(run.optim, warmup_steps=2000, ema_decay=0.999),
        train=replace(
            run.train,
            num_steps=100_000,
            batch_size=256,
            log_every=100,
            image_every=5000,
            eval_every=2000,
            save_every=2000,
            num_eval_images=1024,
        ),
        out="runs/photos64_wide_mergear",
    )


def photos64_wide_randar() -> GeneratorRun:
    """RandAR beside `photos64_wide_mergear`: 144 kept tokens in random order, several at once.

    Tokens: `mergevq encode --flip --num-kept 144 --out runs/photos64_wide/tokens ..`. Hardware and
    time: not measured, 100,000 steps of 256 sequences, or the minutes that it is given. Expected:
    not measured.
    """
    run = photos64_wide_mergear()
    return replace(
        run,
        model=replace(run.model, order=Random()),
        sampling=replace(run.sampling, guidance_schedule="linear", passes=Several(num_steps=36)),
        out="runs/photos64_wide_randar",
    )
