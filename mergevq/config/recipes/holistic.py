"""Recipes of tokens of the whole image before those of the cells."""

from dataclasses import replace

from mergevq.config.parts import Fuse, Holistic, orders
from mergevq.config.recipes.digits import digits32, digits32_ar
from mergevq.config.tokenizer import KeptConfig
from mergevq.config.training import GeneratorRun, TokenizerRun, TokensConfig


def digits32_holistic() -> TokenizerRun:
    """`digits32` with four tokens of the whole image before those of all 64 cells, as Hita.

    Source: Hita (arXiv:2507.02358). Hardware and time: not measured, 1,500 steps of 64 images.
    Expected: not measured.
    """
    run = digits32()
    return replace(
        run,
        model=replace(
            run.model,
            reducer=Holistic(num_holistic=4, num_layers=4, num_full_layers=2, num_heads=2),
            expander=Fuse(dim=64, num_layers=2, num_heads=2),
            num_kept=68,
        ),
        kept=KeptConfig(candidates=(68,)),
        loss=replace(run.loss, recovered_share=0.0),
        train=replace(run.train, num_steps=1500, eval_num_kept=(68,)),
        out="runs/digits32_holistic",
    )


def digits32_holistic_ar() -> GeneratorRun:
    """The 68 tokens of `digits32_holistic`: four of the whole image, then all cells row by row.

    Tokens: `mergevq encode --model runs/digits32_holistic/model --data digits --num-kept 68
    --out runs/digits32_holistic/tokens`. Source: Hita (arXiv:2507.02358). Hardware and time: not
    measured, 600 steps of 64 sequences. Expected: not measured.
    """
    run = digits32_ar()
    order = orders.Holistic(num_holistic=4)
    return replace(
        run,
        model=replace(run.model, order=order, num_kept=68, kept_candidates=(68,)),
        tokens=TokensConfig(
            path="runs/digits32_holistic/tokens", tokenizer="runs/digits32_holistic/model"
        ),
        kept=KeptConfig(candidates=(68,)),
        out="runs/digits32_holistic_ar",
    )
