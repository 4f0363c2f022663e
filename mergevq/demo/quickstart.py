"""The first thing a new user runs: train on handwritten digits, and look at what came out.

A quickstart is a directory: `tokenizer/` and `generator/` are training runs, `tokens/` lies between
them, and `report.html` and the pictures beside it are made from these and can be made again.
"""

import json
import logging
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from mergevq.config.recipes.digits import digits32, digits32_ar
from mergevq.config.training import GeneratorRun, TokenizerRun
from mergevq.demo.sections import (
    generator_sections,
    highlights,
    introduction,
    next_section,
    run_section,
    tokenizer_sections,
)
from mergevq.demo.trial import examine, examine_generator
from mergevq.report.page import Highlight, write_report
from mergevq.report.plots import has_plots
from mergevq.runtime.run import RunDirectory, read_run_record
from mergevq.runtime.settings import changed_settings, to_json
from mergevq.tokenizer.encode import encode
from mergevq.training.train import finish, is_finished

logger = logging.getLogger("mergevq")


class Finished(NamedTuple):
    """A finished quickstart."""

    report: Path
    """The page; pictures lie beside it."""
    tokenizer: Path
    """Directory of the model."""
    generator: Path
    """Directory of the model."""
    reached: list[Highlight]
    """Measurements, in few numbers."""


def quickstart(out: Path, num_steps: int | None = None) -> Finished:
    """Train `digits32` and `digits32_ar` and write a report on them.

    What is there is kept: a finished training is reported on again, one that was interrupted goes
    on, and one with other settings is refused.

    Args:
        out: directory of the training runs, the report and its pictures.
        num_steps: optimizer steps of the tokenizer, and the generator's in proportion; None is as
            many as the recipes have.

    Raises:
        ValueError: the directory holds something else.
        RuntimeError: a package is missing, or training was interrupted.
    """
    run, generator = digits32(), digits32_ar()
    if num_steps is not None:
        share = num_steps / run.train.num_steps
        generator_steps = max(1, round(share * generator.train.num_steps))
        run = replace(run, train=replace(run.train, num_steps=num_steps))
        generator = replace(generator, train=replace(generator.train, num_steps=generator_steps))
    return run_and_report(run, generator, out)


def run_and_report(run: TokenizerRun, generator: GeneratorRun, out: Path) -> Finished:
    """Train a tokenizer, encode its images, train a generator, and write `out/report.html`.

    What is finished is not done again.

    Args:
        run: its directory becomes `out/tokenizer`.
        generator: its directory becomes `out/generator`, and its tokens are those in `out/tokens`.
        out: where everything goes.

    Raises:
        ValueError: the directory holds something else.
        RuntimeError: a package is missing, or training was interrupted.
    """
    report = out / "report.html"
    plots = has_plots(f"the plots of {report}")
    run = replace(run, out=str(out / "tokenizer"))
    model = RunDirectory(run.out).model
    tokens = replace(generator.tokens, path=str(out / "tokens"), tokenizer=str(model))
    generator = replace(generator, tokens=tokens, out=str(out / "generator"))
    _check_directory(run, generator, out)
    if not is_finished(run) or not is_finished(generator):
        finish(run, brief=True)
        encode(
            model,
            run.data.path,
            tokens.path,
            num_kept=generator.kept.candidates,
            num_workers=run.data.num_workers,
            device=run.train.device,
        )
        finish(generator, brief=True)
    else:
        logger.warning(
            "%s and %s are trained already, so only the report is made again; delete %s to train "
            "anew",
            run.out,
            generator.out,
            out,
        )
    trial = examine(run)
    generator_trial = examine_generator(generator, run)
    reached = highlights(trial, generator_trial)
    write_report(
        report,
        [
            *tokenizer_sections(trial, plots=plots),
            *generator_sections(generator_trial, plots=plots),
            next_section(trial),
            run_section(trial, generator_trial),
        ],
        title="MergeVQ quickstart",
        text=introduction(trial),
        highlights=reached,
    )
    return Finished(report, model, RunDirectory(generator.out).model, reached)


def _check_directory(run: TokenizerRun, generator: GeneratorRun, out: Path) -> None:
    """Refuse a directory whose contents are not these runs'.

    Raises:
        ValueError: they are not.
    """
    if not RunDirectory(run.out).record.is_file():
        if out.exists() and any(out.iterdir()):
            raise ValueError(
                f"{out} is not empty and holds no quickstart; choose another directory with --out"
            )
        return
    changed = {}
    for each in (run, generator):
        record = RunDirectory(each.out).record
        if record.is_file():
            # The directory may have been moved.
            new = json.loads(json.dumps(to_json(each)))
            places = {name: new[name] for name in ("out", "tokens") if name in new}
            old = read_run_record(record)["run"]
            if "tokens" in places:
                places["tokens"] = old["tokens"] | {
                    name: new["tokens"][name] for name in ("path", "tokenizer")
                }
            changed |= changed_settings(old | places, new)
    if changed:
        named = ", ".join(f"{name} is {a} there and {b} here" for name, (a, b) in changed.items())
        raise ValueError(
            f"{out} holds a quickstart with other settings ({named}); choose another directory "
            f"with --out, or delete {out}"
        )
