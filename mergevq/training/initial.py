"""Weights that the training of a tokenizer starts from."""

import logging
from dataclasses import replace
from pathlib import Path

from mergevq.config.tokenizer import TokenizerConfig
from mergevq.config.training import TokenizerRun
from mergevq.runtime.artefacts import load_model, load_strict, resolve
from mergevq.runtime.settings import from_json
from mergevq.tokenizer.interop import initialize_from_dinov2, read_vit
from mergevq.tokenizer.tokenizer import Tokenizer

logger = logging.getLogger("mergevq")


def initial_tokenizer(run: TokenizerRun) -> Tokenizer:
    """Make the tokenizer of a run: random, filled from a ViT, or with another's weights.

    Raises:
        ValueError: the weights to start from are missing, or are another architecture's.
    """
    candidates = run.kept.candidates
    # The saved model remembers which K it was trained on.
    tokenizer = Tokenizer(replace(run.model, kept_range=(min(candidates), max(candidates))))
    if run.init_vit is not None:
        initialize_from_dinov2(tokenizer, read_vit(run.init_vit))
    if run.init_from is not None:
        initialize_from(tokenizer, run.init_from)
        if run.loss.adversarial_weight > 0:
            logger.warning(
                "starting from %s with a fresh discriminator: it is trained from step %d, and its "
                "verdict counts from step %d",
                run.init_from,
                run.loss.discriminator_start_step,
                run.loss.adversarial_start_step,
            )
    return tokenizer


def initialize_from(tokenizer: Tokenizer, path: str | Path) -> None:
    """Copy a trained tokenizer's weights; image size and K may be others.

    Raises:
        ValueError: it is not there, or is another architecture.
    """
    saved = load_model(resolve(path), kind="tokenizer")
    other = from_json(TokenizerConfig, saved.record["config"])
    mine = tokenizer.config
    for name in (
        "num_heads",
        "num_decoder_heads",
        "num_source_heads",
        "merge_shape",
        "position_embedding",
        "transformer_norm_eps",
        "patch_norm_eps",
    ):
        # The shapes of weights do not tell these apart.
        if getattr(other, name) != getattr(mine, name):
            raise ValueError(
                f"model.{name} ({getattr(mine, name)}) must be {getattr(other, name)}, as in the "
                f"tokenizer of init_from, {path}"
            )
    load_strict(tokenizer, saved.state)
