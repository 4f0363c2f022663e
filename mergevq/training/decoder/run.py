"""Training a decoder for a frozen tokenizer: data, validation, pictures and the saved model.

Source: Bachmann et al. 2025, "FlexTok", section 3 (arXiv:2502.13967).

The artefact names the tokenizer whose tokens it reads, so any generator of that tokenizer can be
decoded by it. Every random number of step n depends only on (seed, n).
"""

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

import torch

from mergevq.config.identity import Identity
from mergevq.config.parts import require_no_condition
from mergevq.config.training import DecoderRun
from mergevq.data.batches import Batch, eval_batches, open_train_val
from mergevq.data.images import ImageDataset
from mergevq.evaluate.compare import measure
from mergevq.report.pictures import contact_sheet, to_pil
from mergevq.report.plots import Panel
from mergevq.runtime import distributed
from mergevq.runtime.artefacts import resolve, save_model, tokens_hash
from mergevq.runtime.device import resolve_device
from mergevq.runtime.logs import describe_batch
from mergevq.runtime.random import BatchNumbers
from mergevq.runtime.run import RunDirectory
from mergevq.runtime.settings import to_json
from mergevq.tokenizer.flows.decoder import KIND, FlowDecoder, Noise
from mergevq.tokenizer.tokenizer import Tokenizer
from mergevq.training.decoder.step import DecoderLearner, State, build, measure_scale
from mergevq.training.fit import Number, fit
from mergevq.training.panels import Log, decoder_panels
from mergevq.training.tokenizer import image_batches

_EVAL_BATCH = 64
"""Images validated at once, over all ranks."""
_NUM_PICTURED = 8
"""Images in a grid."""
_SEEDS = (0, 1)
"""Seeds of the noise of a picture's columns."""


def train(run: DecoderRun, *, resume: bool = False, brief: bool = False) -> Path:
    """Train a decoder; returns the directory of the finished model.

    Args:
        run: all settings.
        resume: go on from the newest checkpoint in `run.out`; with none there, start.
        brief: show a bar and a short line for each validation, none for each logged interval.

    Raises:
        ValueError: settings, data, tokenizer or the run directory do not fit.
        RuntimeError: losses stayed non-finite.
    """
    world = distributed.init(resolve_device(run.train.device))
    try:
        return _train(run, world, resume=resume, brief=brief)
    finally:
        distributed.shutdown()


def _train(run: DecoderRun, world: distributed.World, *, resume: bool, brief: bool) -> Path:
    """The whole run on one rank."""
    distributed.local_batch(run.train.batch_size, world, accumulation=run.train.accumulation)
    train_set, val_set = open_train_val(run.data)
    path = resolve(run.tokenizer)
    tokenizer = Tokenizer.from_pretrained(path, precision=run.train.precision, device=world.device)
    require_no_condition(tokenizer.config.condition, "a decoder of its own")
    scale = measure_scale(train_set, tokenizer.config.image_size)
    made_from = replace(train_set.identity(), tokenizer=tokens_hash(path))
    task = DecoderTask(
        learner=build(run, world, tokenizer, scale),
        train_set=train_set,
        val_set=val_set,
        made_from=made_from,
    )
    with RunDirectory(run.out) as directory:
        directory.open(
            run,
            device=world.device,
            resume=resume,
            made_from=made_from,
            fixed=("decoder", "num_kept"),
        )
        nominal = task.eval_counts[0] if brief else None
        fit(task, run.train, directory, world, resume=resume, brief=nominal)
    return directory.model


@dataclass(frozen=True, kw_only=True)
class DecoderTask:
    """Training of a decoder, as `fit` sees it."""

    unit: ClassVar[str] = "image"
    learner: DecoderLearner
    train_set: ImageDataset
    val_set: ImageDataset
    made_from: Identity
    """The training images, and the tokenizer of their tokens."""

    @property
    def state(self) -> State:
        """Everything that changes."""
        return self.learner.state

    @property
    def eval_counts(self) -> tuple[int, ...]:
        """Each K of a validation."""
        return self.learner.run.train.eval_num_kept or self.learner.counts

    def batches(self, start_step: int) -> Iterator[Batch]:
        """This rank's batches."""
        run, size = self.learner.run, self.learner.tokenizer.config.image_size
        world = self.learner.world
        return image_batches(
            run.data, run.train, world, self.train_set, start_step, image_size=size, views={}
        )

    def step(self, batch: Batch) -> dict[str, Number]:
        """One optimizer step."""
        return self.learner.step(batch)

    def introduction(self, *, resumed: bool) -> list[str]:  # noqa: ARG002 - of the protocol
        """Content of a step."""
        run, world = self.learner.run, self.learner.world
        return [describe_batch(run.train, run.optim, world, unit="images")]

    def interval_numbers(self) -> dict[str, int | float]:
        """None beside those of every step."""
        return {}

    def validate(self) -> dict[str, float]:
        """Loss and reconstructions of held-out images with the averaged weights, at every K."""
        numbers: dict[str, float] = {}
        with self._averaged() as tokenizer:
            for num_kept in self.eval_counts:
                numbers[f"val_loss@{num_kept}"] = self._loss(num_kept)
            measured = measure(
                tokenizer,
                self._eval_batches(),
                self.eval_counts,
                perceptual=None,
                autocast=self.learner.autocast(),
            )
        return numbers | {
            f"{name}@{num_kept}": value
            for num_kept, outcome in measured.items()
            for name, value in outcome.numbers().items()
        }

    @torch.no_grad()
    def _loss(self, num_kept: int) -> float:
        """Loss of held-out images with all their tokens, at the same noise each time."""
        learner = self.learner
        sums = torch.zeros(2, device=learner.world.device)
        for batch in self._eval_batches():
            image, count = batch.image.to(learner.world.device), len(batch.image)
            numbers = BatchNumbers(
                seed=0,
                step=int(batch.index[0]),
                num_rows=count,
                rows=slice(None),
                prefix="validation ",
            )
            shown = learner.tokens(image, num_kept)
            loss = learner.loss(self.state.network, image, shown, numbers)
            sums += torch.stack([loss * count, torch.tensor(count).to(loss)])
        total, count = distributed.sum(sums).tolist()
        return total / count

    def _eval_batches(self) -> Iterator[Batch]:
        """This rank's held-out images."""
        learner = self.learner
        num_ranks, most = learner.world.world_size, learner.run.train.num_eval_images
        return eval_batches(
            self.val_set,
            image_size=learner.tokenizer.config.image_size,
            # Up to the next number that the ranks can share evenly; the last batch may be short.
            batch_size=-(-min(_EVAL_BATCH, most) // num_ranks) * num_ranks,
            max_images=most,
            rank=learner.world.rank,
            world_size=num_ranks,
            num_workers=0,
        )

    @contextlib.contextmanager
    def _averaged(self) -> Iterator[Tokenizer]:
        """The tokenizer, which decodes by the averaged weights inside."""
        tokenizer, network = self.learner.tokenizer, self.state.network
        network.eval()
        tokenizer.flow = FlowDecoder(network)
        try:
            with self.state.ema.swap():
                yield tokenizer
        finally:
            tokenizer.flow = None
            network.train()

    @torch.no_grad()
    def picture(self, path: Path) -> None:
        """Draw a grid: original, the tokenizer's own decoder, and this one from two noises."""
        if not distributed.is_main():
            return
        learner = self.learner
        batches = eval_batches(
            self.val_set,
            image_size=learner.tokenizer.config.image_size,
            batch_size=_NUM_PICTURED,
            max_images=_NUM_PICTURED,
            num_workers=0,
        )
        image, num_kept = next(batches).image.to(learner.world.device), self.eval_counts[0]
        columns = {
            "original": image,
            "own decoder": learner.tokenizer.reconstruct(image, num_kept).image,
        }
        with self._averaged() as tokenizer, learner.autocast():
            for seed in _SEEDS:
                noise = Noise(seed, range(len(image)))
                drawn = tokenizer.reconstruct(image, num_kept, noise=noise)
                columns[f"flow, noise {seed}"] = drawn.image
        rows = [
            [to_pil(images[i].float().clamp(-1, 1)) for images in columns.values()]
            for i in range(len(image))
        ]
        path.parent.mkdir(parents=True, exist_ok=True)
        contact_sheet(rows, list(columns)).save(path)

    def save(self, model: Path) -> None:
        """Write the averaged model."""
        if not distributed.is_main():
            return
        state, run = self.state, self.learner.run
        with state.ema.swap():
            save_model(
                model,
                state.network.state_dict(),
                state.network.config,
                kind=KIND,
                extra={
                    "step": state.step,
                    "tokenizer": self.made_from.tokenizer,
                    "tokenizer_path": run.tokenizer,
                    "made_from": to_json(self.made_from),
                },
            )

    def shown(self, numbers: Mapping[str, int | float]) -> set[str]:
        """Loss of held-out images, and PSNR."""
        return {name for name in numbers if name.startswith(("val_", "psnr"))}

    def panels(self, log: Log) -> list[Panel]:
        """Everything there is to see of a decoder's training."""
        return decoder_panels(log)
