"""Named runs on ImageNet: the tokenizers of the paper, its short schedule, and source recovery.

As in `mergevq.recipes`, which has them under their names.
"""

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
from mergevq.config_source import SourceRun

_DINOV2_BASE = "facebook/dinov2-base@f9e44c814b77203eaa57a6bdbbd535f21ede1415"
_DINOV2_SMALL = "facebook/dinov2-small@ed25f3a31f01632728cabb09d1542f84ab7b0056"
"""Encoders of versions G and G+R start from these by weight selection; d32 is as wide as ViT-S."""


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
        init_vit=_DINOV2_BASE,
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
    (paper, Table 1), rFID 4.67 at 144 tokens (Table 2), with given source; worse at all 256, which
    linear probe and fine-tuning see (appendix A.4).
    """
    run = imagenet256_gr()
    return replace(
        run,
        model=replace(run.model, stem="patch", num_heads=12, position_embedding=True, num_kept=36),
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
        model=replace(run.model, channels=32, channel_mult=(2, 4, 8, 12)),
        kept=replace(run.kept, candidates=(225, 256, 289, 324, 361, 400, 441, 484)),
        init_vit=_DINOV2_SMALL,
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
        model=replace(
            run.model,
            channels=wide.model.channels,
            num_heads=wide.model.num_heads,
            num_decoder_heads=wide.model.num_decoder_heads,
        ),
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
        model=replace(run.model, channels=32, channel_mult=(2, 2, 4, 8, 12)),
        init_vit=_DINOV2_SMALL,
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
        model=replace(run.model, channels=96, num_heads=12, num_decoder_heads=12),
        optim=replace(run.optim, clip_norm=5.0),
        # 200 epochs of 1,281,167 images at batch 256.
        train=replace(run.train, num_steps=1_001_000),
        out="runs/imagenet256_gr_d96",
    )


# ------------------------------------------------------------------------------ the short schedule


def imagenet128_gr() -> TokenizerRun:
    """ImageNet at 128 pixels for 30 epochs, version G+R: f=8, 144 of 256 tokens.

    The paper's short schedule, of which Table 4 is by the size of its numbers. Each of its rows
    trains on one K (256, 196, 144, 100, 64, 36): `--kept.candidates K --model.num-kept K`.
    Hardware and time: not measured, 150,000 steps of 256 images. Expected: rFID 3.07, linear probe
    51.0 at 144 tokens; 8.94 and 52.1 at 36 (paper, Table 4).
    """
    run = imagenet256_gr()
    return replace(
        run,
        model=replace(run.model, image_size=128, channel_mult=(1, 2, 4, 8)),
        kept=KeptConfig(candidates=(144,)),
        # As many cells in the view as 224 pixels have where a cell is 16 wide.
        teacher=replace(run.teacher, view_size=112),
        # 30 epochs of 1,281,167 images at batch 256.
        train=replace(run.train, num_steps=150_000, eval_num_kept=(36, 64, 100, 144, 196, 256)),
        out="runs/imagenet128_gr",
    )


def imagenet128_g() -> TokenizerRun:
    """ImageNet at 128 pixels for 30 epochs, version G: f=8, 144 of 256 tokens.

    As `imagenet128_gr`, in the alignment of version G. Hardware and time: not measured, 150,000
    steps of 256 images. Expected: rFID 2.03 at 144 tokens, 4.74 at 64 (paper, Table 4).
    """
    run, full = imagenet128_gr(), imagenet256_g()
    return replace(
        run,
        loss=full.loss,
        teacher=replace(run.teacher, num_head_layers=full.teacher.num_head_layers),
        out="runs/imagenet128_g",
    )


def imagenet128_r() -> TokenizerRun:
    """ImageNet at 128 pixels for 30 epochs, version R: patches of 8 pixels, 36 of 256 tokens.

    As `imagenet128_gr`. Hardware and time: not measured, 150,000 steps of 256 images. Expected:
    linear probe 54.3 at 36 tokens, 52.5 at 144 (paper, Table 4).
    """
    run, full = imagenet128_gr(), imagenet256_r()
    return replace(
        run,
        model=replace(full.model, image_size=128, channel_mult=(1, 2, 4, 8)),
        kept=KeptConfig(candidates=(36,)),
        loss=full.loss,
        init_vit=full.init_vit,
        optim=full.optim,
        out="runs/imagenet128_r",
    )


# --------------------------------------------------------------------------------- source recovery


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
