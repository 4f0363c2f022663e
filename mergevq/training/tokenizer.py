"""Training a tokenizer: data, validation, pictures and the saved model around its steps.

Source: Li et al. 2025, "MergeVQ", section 3 and appendix A.1 (arXiv:2504.00999).

Every random number of step n depends only on (seed, n), so a checkpoint needs no generator's state
to resume to the same bits: K, batch, crops and flips are drawn again from their numbers.
"""

import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch

from mergevq.config.identity import Identity
from mergevq.config.objective import Labels, View, view_sizes
from mergevq.config.parts import ClassCondition
from mergevq.config.training import DataConfig, TokenizerRun, TrainConfig
from mergevq.data.batches import Batch, eval_batches, open_train_val, train_batches
from mergevq.data.cached import cached_batches
from mergevq.data.images import ImageDataset
from mergevq.data.layouts import Source
from mergevq.evaluate.compare import measure
from mergevq.report.pictures import contact_sheet, merge_map, to_pil
from mergevq.report.plots import Panel
from mergevq.runtime import distributed
from mergevq.runtime.artefacts import save_model
from mergevq.runtime.device import resolve_device
from mergevq.runtime.logs import describe_batch
from mergevq.runtime.run import RunDirectory
from mergevq.runtime.settings import to_json
from mergevq.tokenizer.conditions.values import condition_of, require_classes
from mergevq.tokenizer.losses.teachers import require_labels
from mergevq.tokenizer.losses.terms import term_weights
from mergevq.training.fit import Number, fit
from mergevq.training.initial import Start, find_start
from mergevq.training.panels import Log, tokenizer_panels
from mergevq.training.tokenizer_step import State, TokenizerLearner, build

logger = logging.getLogger("mergevq")

_FIXED = (
    "model",
    "teacher.kind",
    "teacher.path",
    "teacher.num_head_layers",
    "teacher.num_prototypes",
    "distillation.kind",
    "distillation.layer",
    "distillation.teacher",
    "loss.discriminator_channels",
    "encoder_lr_ratio",
)
"""Settings that a resumed run has to have as they were."""
_EVAL_BATCH = 64
"""Images validated at once, over all ranks."""
_NUM_PICTURED = 8
"""Images in a reconstruction grid."""


def train(run: TokenizerRun, *, resume: bool = False, brief: bool = False) -> Path:
    """Train a tokenizer; returns the directory of the finished model.

    Args:
        run: all settings.
        resume: go on from the newest checkpoint in `run.out`; with none there, start.
        brief: show a bar and a short line for each validation, none for each logged interval.

    Raises:
        ValueError: settings, data or the run directory do not fit.
        RuntimeError: losses stayed non-finite.
    """
    world = distributed.init(resolve_device(run.train.device))
    try:
        return _train(run, world, resume=resume, brief=brief)
    finally:
        distributed.shutdown()


def _train(run: TokenizerRun, world: distributed.World, *, resume: bool, brief: bool) -> Path:
    """The whole run on one rank."""
    distributed.local_batch(run.train.batch_size, world, accumulation=run.train.accumulation)
    train_set, val_set = open_train_val(run.data)
    require_classes(run.model.condition, train_set.num_classes, "the data")
    start = find_start(run, train_set)
    learner = build(run, world, num_classes=train_set.num_classes, start=start)
    if isinstance(run.teacher, Labels):
        # Refused before a step meets an image without one.
        require_labels(train_set.num_unlabelled, len(train_set))
    with RunDirectory(run.out) as directory:
        made_from = train_set.identity()
        task = TokenizerTask(
            learner=learner, train_set=train_set, val_set=val_set, made_from=made_from, start=start
        )
        directory.open(
            run,
            device=world.device,
            resume=resume,
            made_from=made_from,
            learns_labels=isinstance(run.teacher, Labels)
            or isinstance(run.model.condition, ClassCondition),
            fixed=_FIXED,
        )
        nominal = run.model.num_kept if brief else None
        fit(task, run.train, directory, world, resume=resume, brief=nominal)
    return directory.model


def run_batches(
    run: TokenizerRun, world: distributed.World, dataset: ImageDataset, start_step: int
) -> Iterator[Batch]:
    """This rank's batches, with the views its teacher needs."""
    sizes = view_sizes(run.teacher, run.model.image_size)
    size = run.model.image_size
    return image_batches(
        run.data, run.train, world, dataset, start_step, image_size=size, views=sizes
    )


def image_batches(
    data: DataConfig,
    train: TrainConfig,
    world: distributed.World,
    dataset: ImageDataset,
    start_step: int,
    *,
    image_size: int,
    views: Mapping[View, int],
) -> Iterator[Batch]:
    """This rank's batches of images, from the cache that the data have or from their files.

    Args:
        data: how images are prepared.
        train: the loop.
        world: the ranks.
        dataset: the images.
        start_step: first step that is left.
        image_size: side in pixels.
        views: side of each further view of an image, by whom it is for.
    """
    if data.cache != "none":
        return cached_batches(
            dataset,
            data,
            image_size=image_size,
            batch_size=train.batch_size,
            num_steps=train.num_steps,
            start_step=start_step,
            seed=train.seed,
            rank=world.rank,
            world_size=world.world_size,
            num_workers=data.num_workers,
            device=world.device,
        )
    return train_batches(
        dataset,
        data,
        image_size=image_size,
        batch_size=train.batch_size,
        num_steps=train.num_steps,
        start_step=start_step,
        seed=train.seed,
        rank=world.rank,
        world_size=world.world_size,
        student_size=views.get("student"),
        teacher_size=views.get("teacher"),
        num_workers=data.num_workers,
        device=world.device,
    )


@dataclass(frozen=True, kw_only=True)
class TokenizerTask:
    """Training of a tokenizer, as `fit` sees it."""

    unit: ClassVar[str] = "image"
    learner: TokenizerLearner
    train_set: ImageDataset
    val_set: ImageDataset
    made_from: Identity
    """The training images."""
    start: Start | None = None
    """Components that the weights started from."""

    @property
    def state(self) -> State:
        """Everything that changes."""
        return self.learner.state

    def batches(self, start_step: int) -> Iterator[Batch]:
        """This rank's batches, with the views its teacher needs."""
        learner = self.learner
        return run_batches(learner.run, learner.world, self.train_set, start_step)

    def step(self, batch: Batch) -> dict[str, Number]:
        """One optimizer step of both sides."""
        return self.learner.step(batch)

    def introduction(self, *, resumed: bool) -> list[str]:
        """Content of a step, and the first weights of a fresh run."""
        run, world = self.learner.run, self.learner.world
        lines = [describe_batch(run.train, run.optim, world, unit="images")]
        return lines if resumed or self.start is None else [*lines, self.start.describe()]

    def interval_numbers(self) -> dict[str, int | float]:
        """Codebook use over the window, and a warning when it collapses; none of real numbers."""
        if self.state.usage is None:
            return {}
        statistics = self.state.usage.compute()
        warning = self.state.monitor.update(statistics)
        if warning is not None:
            logger.warning(warning)
        numbers = {"codebook_usage": statistics.usage, "perplexity": statistics.perplexity}
        if len(statistics.bit_probs) == 0:
            return numbers  # Codes that are not made of bits.
        return numbers | {
            "num_dead_bits": statistics.num_dead_bits,
            "min_bit_entropy": float(statistics.bit_entropies.min()),
            "min_bit_prob": float(statistics.bit_probs.min()),
            "max_bit_prob": float(statistics.bit_probs.max()),
        }

    def validate(self) -> dict[str, float]:
        """Reconstruct validation images with the averaged weights at every stated K."""
        tokenizer = self.state.tokenizer
        run, num_ranks = self.learner.run, self.learner.world.world_size
        # Up to the next number that the ranks can share evenly; the last batch may be short.
        batch_size = -(-min(_EVAL_BATCH, run.train.num_eval_images) // num_ranks) * num_ranks
        tokenizer.eval()
        with self.state.ema.swap():
            batches = eval_batches(
                self.val_set,
                image_size=run.model.image_size,
                batch_size=batch_size,
                max_images=run.train.num_eval_images,
                rank=self.learner.world.rank,
                world_size=num_ranks,
                num_workers=0,
            )
            measured = measure(
                tokenizer,
                batches,
                run.train.eval_num_kept or (run.model.num_kept,),
                perceptual=self.learner.perceptual,
                autocast=self.learner.autocast(),
            )
        tokenizer.train()
        return {
            f"{name}@{num_kept}": value
            for num_kept, outcome in measured.items()
            for name, value in outcome.numbers().items()
        }

    @torch.no_grad()
    def picture(self, path: Path) -> None:
        """Draw a grid: original, merge map, given source, recovered source, as far as there are."""
        if not distributed.is_main():
            return
        run, device = self.learner.run, self.learner.world.device
        batch = next(
            eval_batches(
                self.val_set,
                image_size=run.model.image_size,
                batch_size=_NUM_PICTURED,
                max_images=_NUM_PICTURED,
                num_workers=0,
            )
        )
        tokenizer = self.state.tokenizer.eval()
        with self.state.ema.swap(), self.learner.autocast():
            image = batch.image.to(device)
            condition = condition_of(run.model.condition, batch.label, "training")
            given = tokenizer.reconstruct(image, condition=condition)
            columns = {"original": image, "given source": given.image}
            if tokenizer.has_maps:
                again = tokenizer.reconstruct(image, source="recovered")
                columns["recovered source"] = again.image
        tokenizer.train()
        rows = [
            [to_pil(images[i].float()) for images in columns.values()] for i in range(len(image))
        ]
        titles, layout = list(columns), given.encoded.layout
        if isinstance(layout, Source):
            titles.insert(1, f"{run.model.num_kept} tokens")
            for i, row in enumerate(rows):
                row.insert(1, merge_map(image[i], layout.index[i], given.encoded.grid_shape))
        path.parent.mkdir(parents=True, exist_ok=True)
        contact_sheet(rows, titles).save(path)

    def save(self, model: Path) -> None:
        """Write the averaged model."""
        if not distributed.is_main():
            return
        state = self.state
        with state.ema.swap():
            save_model(
                model,
                state.tokenizer.state_dict(),
                state.tokenizer.config,
                kind="tokenizer",
                extra={"step": state.step, "made_from": to_json(self.made_from)},
            )

    def shown(self, numbers: Mapping[str, int | float]) -> set[str]:
        """Every term that is not 0, codebook usage and PSNR."""
        run = self.learner.run
        weights = term_weights(run.loss, run.own_weights, run.loss.adversarial_weight)
        terms = {name for name in weights if numbers.get(name)}
        return {"codebook_usage", *terms, *(name for name in numbers if name.startswith("psnr"))}

    def panels(self, log: Log) -> list[Panel]:
        """Everything there is to see of a tokenizer's training."""
        return tokenizer_panels(self.learner.run, log)
