"""Named runs: what `mergevq train RECIPE` trains.

Each is a function that returns a complete run, most of them another one with a few fields changed.
The docstring says on what hardware, for how long, and which number to expect; "measured" numbers
are in docs/results.md with their command, all others are the paper's or the authors' README.
"""

from collections.abc import Callable
from dataclasses import replace

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


def digits32() -> TokenizerRun:
    """Handwritten digits at 32 pixels, 12 to 32 of 64 tokens: the quickstart.

    Hardware and time: 2 CPU cores, under 5 minutes. Expected: digits plainly legible.
    """
    return TokenizerRun(
        model=TokenizerConfig(
            image_size=32,
            channels=16,
            channel_mult=(1, 2, 4),
            num_res_blocks=1,
            num_layers=4,
            num_heads=4,
            layer_scale=0.1,
            num_kept=20,
            num_bits=12,
            num_decoder_layers=2,
            num_decoder_heads=4,
            source_dim=96,
            num_source_heads=4,
        ),
        kept=KeptConfig(candidates=(12, 16, 20, 24, 32)),
        data=DataConfig(path="digits", val_fraction=0.2, num_workers=0),
        loss=LossConfig(
            perceptual_weight=0.0, adversarial_weight=0.0, alignment_weight=0.1, entropy_weight=0.05
        ),
        teacher=TeacherConfig(kind="labels", num_head_layers=2),
        optim=OptimConfig(
            lr=1e-3, betas=(0.9, 0.95), warmup_steps=50, schedule="cosine", ema_decay=0.99
        ),
        train=TrainConfig(
            num_steps=700,
            batch_size=64,
            image_every=100,
            eval_every=350,
            num_eval_images=128,
            save_every=350,
            log_every=10,
            eval_num_kept=(12, 20, 32),
        ),
        out="runs/digits32",
    )


def tiny64_gr() -> TokenizerRun:
    """64-pixel images, version G+R: a CNN of f=4, 144 of 256 tokens, the paper's own geometry.

    Hardware and time: 2 CPU cores, hours; one GPU, minutes. Expected: see docs/results.md.
    """
    return TokenizerRun(
        model=TokenizerConfig(
            image_size=64,
            channels=16,
            channel_mult=(1, 3, 6),
            num_res_blocks=1,
            num_layers=6,
            num_heads=4,
            layer_scale=0.1,
            num_kept=144,
            num_decoder_layers=3,
            num_decoder_heads=4,
            source_dim=96,
            num_source_heads=4,
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


def tiny64_g() -> TokenizerRun:
    """64-pixel images, version G: a CNN of f=2, 256 of 1,024 tokens, for generation.

    Hardware and time: one GPU, under an hour. Expected: not measured.
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

    Hardware and time: 2 CPU cores, hours; one GPU, minutes. Expected: not measured.
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
        train=replace(run.train, eval_num_kept=(36, 64, 144)),
        out="runs/tiny64_r",
    )


def images128_gr() -> TokenizerRun:
    """Your own images at 128 pixels, version G+R: f=8, 144 of 256 tokens.

    Hardware and time: one 24 GB GPU, hours. Expected: not measured.
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


def imagenet256_gr() -> TokenizerRun:
    """ImageNet at 256 pixels, version G+R (d64): f=16, 144 of 256 tokens, aligned with DINOv2.

    Hardware and time: 8 x A100 80 GB (authors' README), 270 epochs. Expected: rFID 1.48 at 144
    tokens, 1.12 at 256, linear probe 77.9 (paper, Tables 1 and 2), with given source.
    """
    return TokenizerRun(
        model=TokenizerConfig(image_size=256, channels=64, channel_mult=(1, 1, 2, 4, 8)),
        kept=KeptConfig(
            distribution="gaussian", candidates=(121, 144, 169, 196, 225, 256), floor=0.05
        ),
        data=DataConfig(path="imagenet/train", val_path="imagenet/val", crop="random"),
        loss=LossConfig(adversarial_start_step=5000, adversarial_ramp_steps=5000),
        teacher=TeacherConfig(kind="dinov2", view_size=224),
        optim=OptimConfig(lr=1e-4, schedule="step", milestones=(0.85, 0.95)),
        # 270 epochs of 1,281,167 images at batch 256.
        train=TrainConfig(
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
        model=replace(run.model, channel_mult=(1, 2, 4, 8), num_kept=256),
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
    (paper, Table 1), rFID 4.67 at 144 tokens (Table 2), with given source.
    """
    run = imagenet256_gr()
    return replace(
        run,
        model=replace(run.model, stem="patch", num_heads=12, position_embedding=True, num_kept=36),
        kept=KeptConfig(distribution="exponential", candidates=(36, 49, 64, 81, 100), floor=0.05),
        loss=replace(run.loss, source_weight=1.0),
        optim=replace(run.optim, schedule="cosine", clip_norm=5.0),
        train=replace(run.train, num_steps=1_501_000, eval_num_kept=(36, 64, 144)),
        out="runs/imagenet256_r",
    )


RECIPES: dict[str, Callable[[], TokenizerRun]] = {
    recipe.__name__: recipe
    for recipe in (
        digits32,
        tiny64_g,
        tiny64_gr,
        tiny64_r,
        images128_gr,
        imagenet256_g,
        imagenet256_gr,
        imagenet256_r,
    )
}
"""Every recipe by name."""


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
