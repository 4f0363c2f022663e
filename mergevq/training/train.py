"""Training of any kind of model."""

from pathlib import Path

from mergevq.config.training import DecoderRun, GeneratorRun, TokenizerRun
from mergevq.runtime.artefacts import read_record
from mergevq.runtime.run import RunDirectory
from mergevq.training.decoder.run import train as train_decoder
from mergevq.training.generator import train as train_generator
from mergevq.training.tokenizer import train as train_tokenizer


def train(run: TokenizerRun | GeneratorRun | DecoderRun, *, resume: bool = False) -> Path:
    """Train the tokenizer, the generator or the decoder that a run describes.

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
    if isinstance(run, DecoderRun):
        return train_decoder(run, resume=resume)
    return train_tokenizer(run, resume=resume)


def finish(run: TokenizerRun | GeneratorRun, *, brief: bool = False) -> Path:
    """Train what is left of a run, from where it was stopped; nothing of one that is finished.

    Args:
        run: its directory holds nothing, or this run.
        brief: show a bar and a short line for each validation, none for each logged interval.

    Returns:
        The directory of the model.

    Raises:
        ValueError: settings, data or checkpoint do not fit each other.
        RuntimeError: training was interrupted, or ended with an error.
    """
    directory = RunDirectory(run.out)
    if not is_finished(run):
        resume = directory.record.is_file()
        if isinstance(run, GeneratorRun):
            train_generator(run, resume=resume, brief=brief)
        else:
            train_tokenizer(run, resume=resume, brief=brief)
        if not is_finished(run):
            raise RuntimeError(
                f"training stopped at step {_steps_done(run)} of {run.train.num_steps}; the same "
                "command goes on from there"
            )
    return directory.model


def is_finished(run: TokenizerRun | GeneratorRun) -> bool:
    """Whether the saved model is that of the last step."""
    return _steps_done(run) >= run.train.num_steps


def _steps_done(run: TokenizerRun | GeneratorRun) -> int:
    """Steps behind the saved model; 0 where there is none."""
    model = RunDirectory(run.out).model
    if not model.is_dir():
        return 0
    return read_record(model)["extra"]["step"]
