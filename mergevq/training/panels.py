"""Panels of plots that show how a training run goes, from its log."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mergevq.config.parts import weights_of
from mergevq.config.training import TokenizerRun
from mergevq.report.plots import Curve, Panel, line_plot

Log = Sequence[Mapping[str, Any]]
"""Lines of a training's `metrics.jsonl`, as `runtime.logs.read_metrics` gives them."""
_NUM_COLUMNS = 3
"""Panels side by side in the curves of a training."""


def write_curves(path: Path, panels: Sequence[Panel]) -> None:
    """Draw how a training went so far, in place of the picture that was there.

    Args:
        path: of the PNG file.
        panels: over the step; those without a point are left out.
    """
    shown = [panel for panel in panels if any(curve.x for curve in panel.curves)]
    if shown:
        line_plot(shown, x_label="step", num_columns=_NUM_COLUMNS).save(path)


def tokenizer_panels(run: TokenizerRun, log: Log) -> list[Panel]:
    """Everything there is to see of a tokenizer's training."""
    shares = [
        log_curve(log, "max_bit_prob", label="most"),
        log_curve(log, "min_bit_prob", label="fewest", colour=1),
    ]
    return [
        *loss_panels(run, log),
        Panel(title="Discriminator loss", curves=[log_curve(log, "discriminator_loss")]),
        *psnr_panels(log),
        *codebook_panels(log),
        Panel(title="Share of ones, by bit", curves=shares),
        Panel(title="Learning rate", curves=[log_curve(log, "lr")]),
    ]


def generator_panels(log: Log) -> list[Panel]:
    """Everything there is to see of a generator's training."""
    names = sorted({name for line in log for name in line if name.startswith("loss_")})
    return [
        *(Panel(title=_words(name), curves=[log_curve(log, name)]) for name in ["loss", *names]),
        *likelihood_panels(log),
        Panel(title="Learning rate", curves=[log_curve(log, "lr")]),
    ]


def decoder_panels(log: Log) -> list[Panel]:
    """Everything there is to see of the training of a decoder for a frozen tokenizer."""
    return [
        Panel(title="Loss, training", curves=[log_curve(log, "loss")]),
        Panel(title="Loss, held out", curves=curves_by_kept(log, "val_loss")),
        *psnr_panels(log),
        Panel(title="Learning rate", curves=[log_curve(log, "lr")]),
    ]


def loss_panels(run: TokenizerRun, log: Log) -> list[Panel]:
    """The tokenizer's loss, and each term that has a weight and was ever not 0."""
    weights = weights_of(run.loss) | run.own_weights | run.loss.further_weights
    weighted = [name for name, weight in weights.items() if weight > 0]
    terms = [name for name in weighted if any(line.get(name) for line in log)]
    return [Panel(title=_words(name), curves=[log_curve(log, name)]) for name in ["loss", *terms]]


def psnr_panels(log: Log) -> list[Panel]:
    """PSNR of held-out images at every K that was looked at, with either source."""
    return [
        Panel(title=f"PSNR, {words} source (dB)", curves=curves_by_kept(log, name))
        for name, words in (("psnr", "given"), ("psnr_recovered", "recovered"))
    ]


def codebook_panels(log: Log) -> list[Panel]:
    """How many codes the latest tokens take."""
    return [
        Panel(title="Share of codes in use", curves=[log_curve(log, "codebook_usage")]),
        Panel(title="Perplexity", curves=[log_curve(log, "perplexity")]),
    ]


def likelihood_panels(log: Log) -> list[Panel]:
    """The generator's negative log-likelihood, in training and at every K that was held out."""
    return [
        Panel(title="Nats a token, training", curves=[log_curve(log, "nll")]),
        Panel(title="Nats a token, held out", curves=curves_by_kept(log, "val_nll")),
    ]


def log_curve(log: Log, name: str, *, label: str = "", colour: int = 0) -> Curve:
    """One number over the steps that were done when it was logged.

    Args:
        log: lines of the log.
        name: of the number.
        label: as in `Curve`.
        colour: as in `Curve`.
    """
    lines = [line for line in log if name in line]
    steps, values = [line["step"] + 1 for line in lines], [line[name] for line in lines]
    return Curve(x=steps, y=values, label=label, colour=colour)


def curves_by_kept(log: Log, name: str) -> list[Curve]:
    """Curves of what is logged as `name@K`, one for each K, the smallest first."""
    names = {found for line in log for found in line if found.startswith(f"{name}@")}
    kept = sorted(int(found.removeprefix(f"{name}@")) for found in names)
    return [
        log_curve(log, f"{name}@{num_kept}", label=f"K = {num_kept}", colour=colour)
        for colour, num_kept in enumerate(kept)
    ]


def _words(name: str) -> str:
    """A field's name as a title."""
    return name.replace("_", " ").capitalize()
