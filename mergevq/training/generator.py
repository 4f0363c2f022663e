"""Training a generator on files of tokens: data, validation, pictures and the saved model.

Source: Li et al. 2025, "MergeVQ", section 3.4 and table A2 (arXiv:2504.00999).

Every random number of step n depends only on (seed, n), so a checkpoint needs no generator's state
to resume to the same bits: K and batch are drawn again from their numbers.
"""

import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor

from mergevq.config.training import GeneratorRun
from mergevq.data.tokens.batches import rows_in_order, split, token_batches
from mergevq.data.tokens.dataset import TokenBatch, TokenDataset, open_tokens
from mergevq.generator.build import AnyGenerator, build_generator
from mergevq.generator.generation import decode_sampled
from mergevq.generator.sampling import sample
from mergevq.report.lettering import shown_names
from mergevq.report.pictures import contact_sheet, to_pil
from mergevq.report.plots import Panel
from mergevq.runtime import distributed
from mergevq.runtime.artefacts import resolve, save_model
from mergevq.runtime.device import resolve_device
from mergevq.runtime.logs import describe_batch
from mergevq.runtime.random import BatchNumbers, draw_num_kept
from mergevq.runtime.run import RunDirectory
from mergevq.runtime.settings import to_json
from mergevq.tokenizer.tokenizer import Tokenizer
from mergevq.training.fit import Number, fit
from mergevq.training.generator_step import (
    GeneratorLearner,
    State,
    build,
    to_sequences,
)
from mergevq.training.panels import Log, generator_panels

logger = logging.getLogger("mergevq")

_NUM_PICTURED = 16
"""Images sampled for a picture."""
_PICTURE_COLUMNS = 8
_EVAL_BATCH = 64
"""Sequences validated at once."""


def train(run: GeneratorRun, *, resume: bool = False, brief: bool = False) -> Path:
    """Train a generator; returns the directory of the finished model.

    Args:
        run: all settings.
        resume: go on from the newest checkpoint in `run.out`; with none there, start.
        brief: show a bar and a short line for each validation, none for each logged interval.

    Raises:
        ValueError: settings, tokens, tokenizer or the run directory do not fit.
        RuntimeError: losses stayed non-finite, or a file of tokens is damaged.
    """
    world = distributed.init(resolve_device(run.train.device))
    try:
        return _train(run, world, resume=resume, brief=brief)
    finally:
        distributed.shutdown()


def _train(run: GeneratorRun, world: distributed.World, *, resume: bool, brief: bool) -> Path:
    """The whole run on one rank."""
    distributed.local_batch(run.train.batch_size, world, accumulation=run.train.accumulation)
    dataset = open_tokens(run.tokens.path)
    train_set, val_set = split(dataset, run.tokens.val_fraction)
    learner = build(run, world, dataset.record)
    tokenizer = Tokenizer.from_pretrained(resolve(run.tokens.tokenizer), device=world.device)
    task = GeneratorTask(
        learner=learner,
        train_set=train_set,
        val_set=val_set,
        tokenizer=tokenizer.requires_grad_(requires_grad=False),
    )
    with RunDirectory(run.out) as directory:
        directory.open(
            run,
            device=world.device,
            resume=resume,
            made_from=dataset.record.identity,
            learns_labels=True,
            fixed=("model", "kept.candidates"),
        )
        nominal = run.model.num_kept if brief else None
        fit(task, run.train, directory, world, resume=resume, brief=nominal)
    return directory.model


@dataclass(frozen=True, kw_only=True)
class GeneratorTask:
    """Training of a generator, as `fit` sees it."""

    unit: ClassVar[str] = "sequence"
    learner: GeneratorLearner
    train_set: TokenDataset
    val_set: TokenDataset
    tokenizer: Tokenizer
    """Decodes pictures."""

    @property
    def state(self) -> State:
        """Everything that changes."""
        return self.learner.state

    def batches(self, start_step: int) -> Iterator[TokenBatch]:
        """This rank's batches."""
        run, world = self.learner.run, self.learner.world
        return token_batches(
            self.train_set,
            batch_size=run.train.batch_size,
            num_steps=run.train.num_steps,
            start_step=start_step,
            seed=run.train.seed,
            rank=world.rank,
            world_size=world.world_size,
            num_kept=lambda step: draw_num_kept(run.kept, run.train.seed, step),
        )

    def step(self, batch: TokenBatch) -> dict[str, Number]:
        """One optimizer step; names the rows of one that is skipped."""
        return self.learner.step(batch, self._warn_of_skip)

    def _warn_of_skip(self, step: int) -> None:
        """Show which rows this rank's batch of a step had."""
        settings, world = self.learner.run.train, self.learner.world
        share = settings.batch_size // world.world_size
        first = step * settings.batch_size + world.rank * share
        # Found again rather than kept: a step is hardly ever skipped.
        batches = iter([range(first, first + share)])
        (rows,) = rows_in_order(len(self.train_set), settings.seed, batches)
        logger.warning(
            "step %d is not finite and is skipped; rows %s of the training set, images %s of the "
            "data",
            step,
            rows,
            self.train_set.origin(rows).position.tolist(),
        )

    def introduction(self, *, resumed: bool) -> list[str]:  # noqa: ARG002 - of the protocol
        """Content of a step."""
        run, world = self.learner.run, self.learner.world
        return [
            describe_batch(run.train, run.optim, world, unit="sequences"),
            f"tokens encoded in {self.train_set.record.precision}",
        ]

    def interval_numbers(self) -> dict[str, int | float]:
        """None beside those of every step."""
        return {}

    @torch.no_grad()
    def validate(self) -> dict[str, float]:
        """Nats per token of held-out images, at every stated K, with the averaged weights."""
        run, world, generator = self.learner.run, self.learner.world, self.state.generator
        rows = range(min(run.train.num_eval_images, len(self.val_set)))
        # Whole batches, each drawn for by its place, so that the number is that of any ranks.
        starts = rows[::_EVAL_BATCH]
        numbers = {}
        generator.eval()
        with self.state.ema.swap(), self.learner.autocast():
            for num_kept in run.train.eval_num_kept or (run.model.num_kept,):
                sums = torch.zeros(2, device=generator.device)
                for position in range(world.rank, len(starts) + world.rank, world.world_size):
                    # Sharded ranks must take part equally often: one without a batch repeats the
                    # last.
                    start = starts[min(position, len(starts) - 1)]
                    own = rows[start : start + _EVAL_BATCH]
                    sequences = to_sequences(generator, self.val_set.batch(own, num_kept))
                    drawn = BatchNumbers(
                        seed=0,
                        step=start,
                        num_rows=len(own),
                        rows=slice(None),
                        prefix="validation ",
                    )
                    nll = generator(generator.draw(sequences, drawn)).nll
                    num_counted = len(own) if position < len(starts) else 0
                    sums += torch.stack([nll * num_counted, torch.tensor(num_counted).to(nll)])
                total, count = distributed.sum(sums).tolist()
                numbers[f"val_nll@{num_kept}"] = total / count
        generator.train()
        return numbers

    @torch.no_grad()
    def picture(self, path: Path) -> None:
        """Sample with the averaged weights, and draw the images as one picture."""
        generator = averaged(self.state, self.learner.world.device)
        if generator is None:
            return
        run, config = self.learner.run, generator.config
        ids = range(_NUM_PICTURED)
        labels = torch.arange(_NUM_PICTURED) % max(1, config.num_classes)
        settings = run.sampling
        if config.num_classes == 0:
            settings = replace(settings, guidance_scale=1.0, candidates=1)
        sampled = sample(
            generator,
            labels=labels,
            num_kept=config.num_kept,
            seed=run.train.seed,
            image_ids=ids,
            settings=settings,
        )
        images = decode_sampled(self.tokenizer, sampled, config.grid_size, labels=labels)
        pictures = [to_pil(image) for image in images]
        names = shown_names(self.train_set.record.class_names) or [""]
        rows = [
            pictures[i : i + _PICTURE_COLUMNS] for i in range(0, _NUM_PICTURED, _PICTURE_COLUMNS)
        ]
        captions = [
            [names[k % len(names)] for k in ids[i : i + _PICTURE_COLUMNS]]
            for i in range(0, _NUM_PICTURED, _PICTURE_COLUMNS)
        ]
        path.parent.mkdir(parents=True, exist_ok=True)
        contact_sheet(rows, captions=captions).save(path)

    def save(self, model: Path) -> None:
        """Write the averaged model."""
        generator, record = averaged(self.state, self.learner.world.device), self.train_set.record
        if generator is None:
            return
        save_model(
            model,
            generator.state_dict(),
            generator.config,
            kind="generator",
            extra={
                "step": self.state.step,
                "tokenizer": record.tokenizer,
                "tokenizer_path": self.learner.run.tokens.tokenizer,
                "class_names": list(record.class_names),
                "made_from": to_json(record.identity),
            },
        )

    def shown(self, numbers: Mapping[str, int | float]) -> set[str]:
        """Negative log-likelihood, of held-out sequences too."""
        return {"nll", *(name for name in numbers if name.startswith("val_"))}

    def panels(self, log: Log) -> list[Panel]:
        """Everything there is to see of a generator's training."""
        return generator_panels(log)


def averaged(state: State, device: torch.device) -> AnyGenerator | None:
    """The generator with the averaged weights, whole; on the main process, None on the others."""
    weights: dict[str, Tensor] = {}
    for name, shadow in state.ema.shadow.items():
        tensor = distributed.whole(shadow)
        if distributed.is_main():
            weights[name] = tensor
    if not distributed.is_main():
        return None
    with torch.device("meta"):
        generator = build_generator(state.generator.config)
    # Assigned, so that without shards it shares the memory of the averages.
    generator.load_state_dict(weights, assign=True)
    return generator.to(device).eval()
