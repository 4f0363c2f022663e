"""Recipes of tokenizers that decode by what is known of an image, minutes on a CPU."""

from dataclasses import replace

from mergevq.config.objective import NoTeacher
from mergevq.config.parts import ClassCondition
from mergevq.config.recipes.digits import digits32_queries
from mergevq.config.tokenizer import KeptConfig
from mergevq.config.training import TokenizerRun


def digits32_class() -> TokenizerRun:
    """`digits32_queries` of 4, 16 or 64 tokens beside the digit, in encoder and decoder (TexTok).

    Beside it, --model.condition.kind none is the same without digits, and --model.condition.sees
    decoder shows them to the decoder alone (TA-TiTok). There is no teacher, which would learn the
    digits that the encoder sees. Source: TexTok (arXiv:2412.05796), with a class for a caption.
    Hardware and time: not measured, 1,500 steps of 64 images. Expected: not measured.
    """
    run = digits32_queries()
    return replace(
        run,
        model=replace(run.model, condition=ClassCondition(), num_kept=4),
        kept=KeptConfig(candidates=(4, 16, 64)),
        teacher=NoTeacher(),
        loss=replace(run.loss, alignment_weight=0.0),
        train=replace(run.train, eval_num_kept=(4, 16, 64)),
        out="runs/digits32_class",
    )
