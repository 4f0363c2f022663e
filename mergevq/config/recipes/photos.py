"""Recipes for a folder of pictures and a CPU."""

from dataclasses import replace

from mergevq.config.recipes.tiny64 import tiny64_gr, tiny64_mergear
from mergevq.config.tokenizer import KeptConfig
from mergevq.config.training import GeneratorRun, TokenizerRun, TokensConfig, TrainConfig


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
