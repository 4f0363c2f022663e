"""Recipes of decoders for tokenizers that were trained before, minutes on a CPU."""

from dataclasses import replace

from mergevq.config.parts import PixelFlow, PrefixFlow
from mergevq.config.parts.flows import Groups, Knots, Solution, Times
from mergevq.config.training import DataConfig, DecoderRun, OptimConfig, TrainConfig


def digits32_prefix_flow() -> DecoderRun:
    """A flow decoder for the tokens of `digits32_tail_drop`, of any first ones (FlexTok).

    Source: FlexTok (arXiv:2502.13967). Hardware and time: not measured, 1,000 steps of 64 images.
    Expected: not measured.
    """
    return DecoderRun(
        decoder=PrefixFlow(patch_size=4, dim=96, num_layers=4, num_heads=4),
        # Pixels of digits are few frequencies: little is hidden but by noise near its end, and only
        # what is hidden is learned from the tokens.
        times=Times(shift=15.0),
        solution=Solution(num_steps=16),
        tokenizer="runs/digits32_tail_drop/model",
        num_kept=(64,),
        data=DataConfig(path="digits", val_fraction=0.2, num_workers=0),
        optim=OptimConfig(
            lr=3e-3, betas=(0.9, 0.95), warmup_steps=50, schedule="cosine", ema_decay=0.99
        ),
        train=TrainConfig(
            num_steps=1000,
            batch_size=64,
            image_every=500,
            eval_every=500,
            num_eval_images=64,
            save_every=500,
            log_every=10,
            eval_num_kept=(4, 16, 64),
        ),
        out="runs/digits32_prefix_flow",
    )


def digits32_group_flow() -> DecoderRun:
    """`digits32_prefix_flow` whose tokens are read in eight groups as noise falls (D-AR).

    Tokenizer: `digits32_tail_drop`. Source: D-AR (arXiv:2505.23660). Hardware and time: not
    measured, 1,000 steps of 64 images. Expected: not measured.
    """
    run = digits32_prefix_flow()
    decoder = replace(run.decoder, lengths="all", schedule=Groups(num_groups=8), num_token_layers=2)
    return replace(
        run,
        decoder=decoder,
        train=replace(run.train, eval_num_kept=(64,)),
        out="runs/digits32_group_flow",
    )


def digits32_knot_flow() -> DecoderRun:
    """`digits32_prefix_flow` with all tokens in noise and few near the image (Selftok).

    Tokenizer: `digits32_tail_drop`. Source: Selftok (arXiv:2505.07538). Hardware and time: not
    measured, 1,000 steps of 64 images. Expected: not measured.
    """
    run = digits32_prefix_flow()
    return replace(
        run,
        decoder=replace(run.decoder, lengths="all", schedule=Knots()),
        train=replace(run.train, eval_num_kept=(64,)),
        out="runs/digits32_knot_flow",
    )


def digits32_pixel_flow() -> DecoderRun:
    """A flow of each patch by itself for the tokens of `digits32` (UniFlow).

    Source: UniFlow (arXiv:2510.10575), which decodes in one step: that is a regression, and draws
    nothing. Hardware and time: not measured, 1,000 steps of 64 images. Expected: not measured.
    """
    run = digits32_prefix_flow()
    return replace(
        run,
        decoder=PixelFlow(dim=96, num_global_layers=2, width=128, depth=4),
        times=Times(law="uniform", shift=15.0),
        solution=Solution(num_steps=8),
        tokenizer="runs/digits32/model",
        num_kept=(12, 16, 20, 24, 32),
        train=replace(run.train, eval_num_kept=(20,)),
        out="runs/digits32_pixel_flow",
    )
