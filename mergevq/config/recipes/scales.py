"""Recipes of tokens at several scales and of what generates them, minutes on a CPU."""

from dataclasses import replace

from mergevq.config.parts import Scales, ScaleSum
from mergevq.config.parts.heads import Subindices
from mergevq.config.parts.orders import Scale
from mergevq.config.recipes.digits import digits32, digits32_ar
from mergevq.config.tokenizer import KeptConfig
from mergevq.config.training import GeneratorRun, TokenizerRun, TokensConfig


def digits32_scales() -> TokenizerRun:
    """`digits32` with tokens at scales of 1, 2, 4 and 8, each of what those before it leave (VAR).

    In half of the steps only 21 tokens are kept, those of the first three scales, so that they
    decode as well. Source: VAR (arXiv:2404.02905). Hardware and time: not measured, 640 steps of 64
    images. Expected: not measured.
    """
    run = digits32()
    return replace(
        run,
        model=replace(run.model, quantizer=Scales(), expander=ScaleSum(), num_kept=85),
        kept=KeptConfig(candidates=(21, 85)),
        loss=replace(run.loss, entropy_weight=0.0, recovered_share=0.0),
        train=replace(run.train, eval_num_kept=(5, 21, 85)),
        out="runs/digits32_scales",
    )


def digits32_next_scale() -> GeneratorRun:
    """The 85 tokens of `digits32_scales`, those of a scale at once: four passes an image (VAR).

    Tokens: `mergevq encode --model runs/digits32_scales/model --data digits --num-kept 85
    --out runs/digits32_scales/tokens`. Source: VAR (arXiv:2404.02905). Hardware and time: not
    measured, 600 steps of 64 sequences. Expected: not measured.
    """
    run = digits32_ar()
    return replace(
        run,
        model=replace(
            run.model,
            order=Scale(),
            head=Subindices(sizes=(256,)),
            num_kept=85,
            kept_candidates=(85,),
        ),
        tokens=TokensConfig(
            path="runs/digits32_scales/tokens", tokenizer="runs/digits32_scales/model"
        ),
        kept=KeptConfig(candidates=(85,)),
        out="runs/digits32_next_scale",
    )
