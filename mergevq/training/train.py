"""Training of either kind of model."""

from pathlib import Path

from mergevq.config.training import GeneratorRun, TokenizerRun
from mergevq.training.generator import train as train_generator
from mergevq.training.tokenizer import train as train_tokenizer


def train(run: TokenizerRun | GeneratorRun, *, resume: bool = False) -> Path:
    """Train the tokenizer or the generator that a run describes.

    Args:
        run: one of the recipes, or one with fields of its own.
        resume: go on from the newest checkpoint in `run.out`.

    Returns:
        The directory of the model.

    Raises:
        ValueError: settings, data or checkpoint do not fit each other.
        RuntimeError: a loss or a weight is not finite, or a package is missing.
    """
    if isinstance(run, GeneratorRun):
        return train_generator(run, resume=resume)
    return train_tokenizer(run, resume=resume)
