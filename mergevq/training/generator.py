"""Training a generator on files of tokens: the loop, its checkpoints, its pictures.

Source: Li et al. 2025, "MergeVQ", section 3.4 and table A2 (arXiv:2504.00999); Pang et al. 2024,
"RandAR", section 3 (arXiv:2412.01827).

Every random number of step n depends only on (seed, n), so a checkpoint needs no generator's state
to resume to the same bits: K, batch, dropped labels and orders are drawn for the whole batch and
cut to a rank's share or a part of it, and so is dropout, which starts anew in every step.

Shape letters: B sequences of a part of the batch, T tokens of a sequence, L grid cells.
"""

import contextlib
import logging
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Int64
from torch import Tensor, nn

from mergevq.config.generator import GeneratorConfig
from mergevq.config.identity import Identity
from mergevq.config.training import GeneratorRun
from mergevq.data.tokens.batches import rows_in_order, split, token_batches
from mergevq.data.tokens.dataset import TokenBatch, TokenDataset, open_tokens
from mergevq.data.tokens.files import TokenRecord, require_tokenizer
from mergevq.generator.autoregressive import Generator, GeneratorLoss, random_orders, uniform
from mergevq.generator.decoding import sample
from mergevq.generator.generation import class_names, decode_sampled
from mergevq.report.lettering import shown_names
from mergevq.report.pictures import contact_sheet, to_pil
from mergevq.report.plots import has_plots
from mergevq.runtime import distributed
from mergevq.runtime.artefacts import load_model, load_strict, resolve, save_model, tokens_hash
from mergevq.runtime.checkpoints import CheckpointManager, load_state, restoring, save_state
from mergevq.runtime.device import autocast, resolve_device, resolve_precision
from mergevq.runtime.files import some
from mergevq.runtime.logs import MetricsLog, Progress, describe_batch, read_metrics
from mergevq.runtime.optim import (
    Ema,
    NonFiniteGuard,
    build_optimizer,
    check_coverage,
    clip,
    gradient_scaler,
    learning_rate,
    set_learning_rate,
)
from mergevq.runtime.random import step_generator
from mergevq.runtime.run import RunDirectory, on_sigterm
from mergevq.runtime.settings import to_json
from mergevq.tokenizer.tokenizer import Tokenizer
from mergevq.training.panels import generator_panels, write_curves

logger = logging.getLogger("mergevq")

_NUM_PICTURED = 16
"""Images sampled for a picture."""
_PICTURE_COLUMNS = 8
_EVAL_BATCH = 64
"""Sequences validated at once."""
_CLASS_TABLE = "class_embedding.weight"


class Sequences(NamedTuple):
    """A batch as the generator's loss takes it."""

    indices: Int64[Tensor, "b t"]
    """All cells in raster order, or the kept tokens in canonical order."""
    class_label: Int64[Tensor, "b"]
    """In [0, num_classes]; the last is no class."""
    anchors: Int64[Tensor, "b t"] | None
    """In order `anchor` the cell at which each token opens."""
    source_index: Int64[Tensor, "b l"] | None
    """In order `merge` with groups of the source the source map."""
    order: Int64[Tensor, "b t"] | None
    """In order `random` slots in the order in which they are decoded."""


@dataclass(kw_only=True)
class State:
    """Everything that changes while training; all of it is in a checkpoint."""

    generator: Generator
    optimizer: torch.optim.Optimizer
    ema: Ema
    guard: NonFiniteGuard
    scaler: torch.amp.GradScaler
    step: int = 0

    @property
    def is_finite(self) -> bool:
        """Whether the last step was taken."""
        return self.guard.num_in_a_row == 0

    def _parts(self) -> dict[str, Any]:
        """Everything with a state of its own, by the name it has in a checkpoint."""
        return {
            "generator": self.generator,
            "optimizer": self.optimizer,
            "ema": self.ema,
            "guard": self.guard,
            "scaler": self.scaler,
        }

    def state_dict(self) -> dict[str, Any]:
        """Nested dict of tensors and plain values."""
        state = {name: part.state_dict() for name, part in self._parts().items()}
        return state | {"step": self.step}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Inverse of `state_dict`."""
        for name, part in self._parts().items():
            part.load_state_dict(state[name])
        self.step = state["step"]


@dataclass(frozen=True, kw_only=True)
class Setting:
    """Things that stay the same through a run."""

    run: GeneratorRun
    world: distributed.World
    wrapped: nn.Module
    """The generator, wrapped or sharded for several ranks."""
    tokenizer: Tokenizer
    """Decodes pictures."""
    record: TokenRecord
    """Record of the tokens."""
    dtype: torch.dtype | None
    """Type of autocast; None is float32."""

    def autocast(self) -> torch.autocast:
        """Context of the run's precision."""
        return autocast(self.world.device, self.dtype)


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
    settings = run.train
    distributed.local_batch(settings.batch_size, world, accumulation=settings.accumulation)
    dataset = open_tokens(run.tokens.path)
    train_set, val_set = split(dataset, run.tokens.val_fraction)
    state, setting = build(run, world, dataset.record)
    with RunDirectory(run.out) as directory:
        directory.open(
            run,
            device=world.device,
            resume=resume,
            made_from=dataset.record.identity,
            learns_labels=True,
            fixed=("model", "kept.candidates"),
        )
        _run_steps(state, setting, directory, train_set, val_set, resume=resume, brief=brief)
    return directory.model


def _run_steps(
    state: State,
    setting: Setting,
    directory: RunDirectory,
    train_set: TokenDataset,
    val_set: TokenDataset,
    *,
    resume: bool,
    brief: bool,
) -> None:
    """Every step that is left, and what is written along the way."""
    run, world, settings = setting.run, setting.world, setting.run.train
    manager = CheckpointManager(directory.checkpoints, keep_last=settings.keep_last)
    latest = distributed.broadcast_object(manager.latest()) if resume else None
    if latest is not None:
        with restoring(latest):
            restore(state, latest / "state")
    log = MetricsLog(
        directory.metrics,
        first_step=state.step,
        tensorboard=settings.tensorboard,
        brief=run.model.num_kept if brief else None,
    )
    bar = Progress(
        settings.num_steps * settings.batch_size,
        done=state.step * settings.batch_size,
        unit="sequence",
    )
    log.note(describe_batch(settings, run.optim, world, unit="sequences"))
    plotting = distributed.is_main() and has_plots(directory.curves)
    logged_at, logged_step = time.monotonic(), state.step
    with (
        on_sigterm(settings.max_minutes) as signal,
        contextlib.closing(bar),
        contextlib.closing(log),
    ):
        for batch in run_batches(run, world, train_set, state.step):
            step = state.step
            with distributed.located(world, step):
                numbers = train_step(state, setting, batch)
                _warn_of_skip(state, setting, train_set)
            manager.settle(finite=state.is_finite)
            state.step += 1
            bar.update(settings.batch_size)
            last = state.step == settings.num_steps
            logging_due = step % settings.log_every == 0 or last
            if logging_due:
                seconds, logged_at = time.monotonic() - logged_at, time.monotonic()
                num_sequences = (state.step - logged_step) * settings.batch_size
                numbers["sequences_per_second"] = num_sequences / seconds
                logged_step = state.step
            if validating := state.step % settings.eval_every == 0 or last:
                numbers |= validate(state, setting, val_set)
            if logging_due or validating:
                log.write(step, numbers, shown=_shown(numbers))
            if state.step % settings.image_every == 0 or last:
                _picture(state, setting, directory.images)
            # Every rank learns of a signal to any of them, so all stop after the same step.
            stopping = bool(distributed.sum(torch.tensor(int(signal.is_due))) > 0)
            if state.step % settings.save_every == 0 or last or stopping:
                _save(state, setting, manager, directory.model)
            if plotting and (validating or stopping):
                panels = generator_panels(read_metrics(directory.metrics))
                write_curves(directory.curves, panels)
            if stopping and not last:
                logger.warning("stopped after %d steps; go on with --resume", state.step)
                break


# -------------------------------------------------------------------------------------- making


def build(
    run: GeneratorRun, world: distributed.World, record: TokenRecord
) -> tuple[State, Setting]:
    """Make everything a run needs, the same on every rank.

    Raises:
        ValueError: the tokens, their tokenizer or the weights to start from do not fit the run.
    """
    config = fitted_config(run, record)
    directory = resolve(run.tokens.tokenizer)
    require_tokenizer(record, tokens_hash(directory))
    # The only use of the global generator: it fills fresh weights, and is put back after.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(run.train.seed)  # noqa: TID251 - layers fill themselves from it
        generator = Generator(config)
    if run.init_from is not None:
        initialize_from(generator, run.init_from, record.identity)
    device = world.device
    dtype = resolve_precision(run.train.precision, device)
    generator.train()
    generator.set_checkpointing(enabled=run.train.checkpointing)
    if run.train.parallel == "fsdp":
        units = [*generator.blocks, generator.head]
        wrapped = distributed.shard(generator, units, device=device, dtype=dtype)
    else:
        wrapped = distributed.wrap(generator.to(device))
    optimizer = build_optimizer([generator], run.optim, run.train.batch_size)
    check_coverage([generator], [optimizer])
    state = State(
        generator=generator,
        optimizer=optimizer,
        ema=Ema(generator, run.optim.ema_decay),
        guard=NonFiniteGuard(run.train.max_nonfinite),
        scaler=gradient_scaler(device, dtype),
    )
    setting = Setting(
        run=run,
        world=world,
        wrapped=wrapped,
        tokenizer=Tokenizer.from_pretrained(directory).to(device).requires_grad_(False),
        record=record,
        dtype=dtype,
    )
    return state, setting


def fitted_config(run: GeneratorRun, record: TokenRecord) -> GeneratorConfig:
    """The run's architecture with the classes of the tokens.

    Raises:
        ValueError: the tokens have another grid, number of bits, K or number of classes.
    """
    model = run.resolved_model
    for name, wanted, found in (
        ("model.grid_size", model.grid_size, record.grid_shape),
        ("model.num_bits", model.num_bits, record.num_bits),
        ("model.num_classes", model.num_classes or record.num_classes, record.num_classes),
    ):
        if wanted != found:
            raise ValueError(
                f"{name} ({wanted}) must be {found}, as in the tokens of {run.tokens.path}"
            )
    missing = sorted(set(run.kept.candidates) - set(record.num_kept))
    if missing:
        there = ", ".join(map(str, record.num_kept))
        raise ValueError(
            f"kept.candidates {missing} must be among the K of the tokens in {run.tokens.path} "
            f"({there}); encode the images with --num-kept {','.join(map(str, missing))} too, into "
            "another folder"
        )
    return replace(model, num_classes=record.num_classes)


def initialize_from(
    generator: Generator, path: str | Path, made_from: Identity | None = None
) -> None:
    """Copy a trained generator's weights; of the table of classes, those of the same names.

    Args:
        generator: gets the weights.
        path: directory of the trained one, or owner/name@revision on Hugging Face.
        made_from: what `generator` will be trained on; None compares numbers of classes alone.

    Raises:
        ValueError: it is not there, or is another architecture or order.
    """
    saved = load_model(resolve(path), kind="generator")
    other = Generator.from_saved(saved).config
    mine = generator.config
    for name in ("order", "kept_candidates", "factor_bits", "num_heads", "num_kv_heads"):
        # The shapes of weights do not tell these apart.
        if getattr(other, name) != getattr(mine, name):
            raise ValueError(
                f"model.{name} ({getattr(mine, name)}) must be {getattr(other, name)}, as in the "
                f"generator of init_from, {path}"
            )
    extra = saved.record["extra"]
    names = made_from.class_names if made_from is not None else ()
    known = class_names(extra, other.num_classes, where=Path(path))
    weights = dict(saved.state)
    if other.num_classes != mine.num_classes or (names and known and names != known):
        fresh = [name for name in names if name not in known] or list(names)
        logger.warning(
            "starting from %s with a fresh class embedding for %s: it was trained on %d classes "
            "(%s) and these tokens have %d (%s); all other weights are kept",
            path,
            some(fresh, 5) or "every class",
            other.num_classes,
            some(list(known), 5) or "unnamed",
            mine.num_classes,
            some(list(names), 5) or "unnamed",
        )
        table = generator.state_dict()[_CLASS_TABLE].clone()
        for number, name in enumerate(names):
            if name in known:
                table[number] = saved.state[_CLASS_TABLE][known.index(name)]
        weights[_CLASS_TABLE] = table
    if made_from is not None and extra.get("tokenizer") != made_from.tokenizer:
        logger.warning(
            "starting from %s, which was trained on tokens of tokenizer %s; these are of %s, and "
            "every code means something else",
            path,
            extra.get("tokenizer"),
            made_from.tokenizer,
        )
    load_strict(generator, weights)


def restore(state: State, directory: Path) -> None:
    """Go on from a checkpoint, of any number of ranks, sharded or not.

    Raises:
        ValueError: it is another run's.
    """
    like = None
    if distributed.is_sharded(state.generator):
        # What is read is cut as what is there, so the optimizer has to have its moments: a step
        # with neither gradients nor a rate makes them, and changes no weight.
        set_learning_rate(state.optimizer, 0.0)
        for parameter in state.generator.parameters():
            parameter.grad = torch.zeros_like(parameter)
        state.optimizer.step()
        state.optimizer.zero_grad(set_to_none=True)
        like = state.state_dict()
    state.load_state_dict(load_state(directory, like))


def run_batches(
    run: GeneratorRun, world: distributed.World, dataset: TokenDataset, start_step: int
) -> Iterator[TokenBatch]:
    """This rank's batches."""
    return token_batches(
        dataset,
        batch_size=run.train.batch_size,
        num_steps=run.train.num_steps,
        start_step=start_step,
        seed=run.train.seed,
        rank=world.rank,
        world_size=world.world_size,
        num_kept=lambda step: draw_num_kept(run, step),
    )


def draw_num_kept(run: GeneratorRun, step: int) -> int:
    """K of a step: the same on every rank, and again after a resume."""
    probabilities = torch.tensor(run.kept.probabilities, dtype=torch.float64)
    chosen = torch.multinomial(
        probabilities, 1, generator=step_generator(run.train.seed, "kept", step)
    )
    return run.kept.candidates[int(chosen)]


def to_sequences(generator: Generator, batch: TokenBatch) -> Sequences:
    """Turn a batch of files into what the generator's order learns from, on its device."""
    config, device = generator.config, generator.device
    label = torch.where(batch.label < 0, config.null_class, batch.label).to(device)
    indices, source = batch.indices, batch.source
    anchors = source_index = None
    if config.order == "anchor":
        anchors = source.anchors().to(device)
    elif config.order in {"raster", "merge"}:
        indices = indices.gather(1, source.index)
    if config.order == "merge" and config.merge_groups == "source":
        source_index = source.index.to(device)
    return Sequences(indices.to(device), label, anchors, source_index, None)


# ------------------------------------------------------------------------------------ learning


def train_step(state: State, setting: Setting, batch: TokenBatch) -> dict[str, float]:
    """One optimizer step; returns what is worth logging."""
    run, sums = setting.run, {}
    num_kept = batch.source.num_kept
    rate = learning_rate(state.step, run.optim, run.train.num_steps, run.train.batch_size)
    set_learning_rate(state.optimizer, rate)
    state.optimizer.zero_grad(set_to_none=True)
    parts = _cut(_draw(state, setting, batch), run.train.accumulation)
    first, count = setting.world.rank * len(parts), setting.world.world_size * len(parts)
    for position, part in enumerate(parts):
        syncs = position == len(parts) - 1
        state.generator.set_share(first + position, count)
        with (
            _dropout_numbers(setting, state.step),
            distributed.no_sync(setting.wrapped, active=not syncs),
        ):
            with setting.autocast():
                loss = _loss(setting.wrapped, part, num_kept)
            # Inside, because activations may be computed again, with the same numbers.
            state.scaler.scale(loss.total / len(parts)).backward()
        for name, value in _terms(state.generator, loss).items():
            sums[name] = sums.get(name, 0) + value.detach() / len(parts)
    state.scaler.unscale_(state.optimizer)
    norm = distributed.whole(clip(state.generator.parameters(), run.optim.clip_norm))
    if state.guard.check(state.step, sums | {"grad_norm": norm}):
        state.scaler.step(state.optimizer)
        state.ema.update()
    state.scaler.update()
    numbers = {name: float(distributed.mean(value)) for name, value in sums.items()}
    return numbers | {
        "grad_norm": float(norm),
        "num_skipped": state.guard.num_skipped,
        "lr": rate,
        "num_kept": num_kept,
    }


def _warn_of_skip(state: State, setting: Setting, dataset: TokenDataset) -> None:
    """Say which rows this rank's batch of the present step had, if the step was skipped."""
    if state.guard.num_in_a_row == 0:
        return
    settings, world = setting.run.train, setting.world
    share = settings.batch_size // world.world_size
    first = state.step * settings.batch_size + world.rank * share
    # Found again rather than kept: a step is hardly ever skipped.
    (rows,) = rows_in_order(len(dataset), settings.seed, iter([range(first, first + share)]))
    logger.warning(
        "step %d is not finite and is skipped; rows %s of the training set, images %s of the data",
        state.step,
        rows,
        dataset.origin(rows).position.tolist(),
    )


def _draw(state: State, setting: Setting, batch: TokenBatch) -> Sequences:
    """Drop labels and draw orders, as one process would for the whole batch."""
    generator, world, seed = state.generator, setting.world, setting.run.train.seed
    sequences = to_sequences(generator, batch)
    share, length = sequences.indices.shape
    own = slice(world.rank * share, (world.rank + 1) * share)
    whole, device = share * world.world_size, generator.device
    numbers = uniform((whole,), step_generator(seed, "dropped classes", state.step), device)
    label = generator.drop_classes(sequences.class_label, numbers[own])
    order = None
    if generator.config.order == "random":
        drawn = step_generator(seed, "orders", state.step)
        order = random_orders((whole, length), drawn, device)[own]
    return sequences._replace(class_label=label, order=order)


def _loss(module: nn.Module, sequences: Sequences, num_kept: int) -> GeneratorLoss:
    """Cross-entropy of sequences for which everything is drawn."""
    return module(
        sequences.indices,
        sequences.class_label,
        num_kept,
        None,
        anchors=sequences.anchors,
        source_index=sequences.source_index,
        order=sequences.order,
    )


@contextlib.contextmanager
def _dropout_numbers(setting: Setting, step: int) -> Iterator[None]:
    """Inside, dropout's numbers start from seed and step alone: those of the whole batch."""
    device = setting.world.device
    devices = [device] if device.type == "cuda" else []
    numbers = step_generator(setting.run.train.seed, "dropout", 0, step)
    # Dropout has no generator argument: it draws from torch's own, which is put back after.
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(numbers.initial_seed())  # noqa: TID251
        yield


def _cut(sequences: Sequences, num_parts: int) -> list[Sequences]:
    """Cut a batch for accumulation."""
    columns = [
        [None] * num_parts if column is None else column.chunk(num_parts) for column in sequences
    ]
    return [Sequences(*part) for part in zip(*columns, strict=True)]


def _terms(generator: Generator, loss: GeneratorLoss) -> dict[str, Tensor]:
    """Everything in a loss by name."""
    parts = zip(generator.config.part_names, loss.parts, strict=True)
    return {"loss": loss.total, "nll": loss.nll} | {f"loss_{name}": term for name, term in parts}


def _shown(numbers: dict[str, float]) -> set[str]:
    """Names that the log line shows."""
    wanted = {"loss", "nll", "lr", "num_kept", "grad_norm", "sequences_per_second"}
    return wanted | {name for name in numbers if name.startswith(("val_", "num_skipped"))}


# ------------------------------------------------------------------------------------- looking


@torch.no_grad()
def validate(state: State, setting: Setting, dataset: TokenDataset) -> dict[str, float]:
    """Negative log-likelihood in nats per token of held-out images, with the averaged weights."""
    run, world, generator = setting.run, setting.world, state.generator
    rows = range(min(run.train.num_eval_images, len(dataset)))
    # Whole batches, each drawn for by its place, so that the number does not depend on the ranks.
    starts = rows[::_EVAL_BATCH]
    numbers = {}
    generator.eval()
    with state.ema.swap(), setting.autocast():
        for num_kept in run.train.eval_num_kept or (run.model.num_kept,):
            sums = torch.zeros(2, device=generator.device)
            for position in range(world.rank, len(starts) + world.rank, world.world_size):
                # Sharded ranks must take part equally often: those without a batch repeat the last.
                start = starts[min(position, len(starts) - 1)]
                own = rows[start : start + _EVAL_BATCH]
                sequences = to_sequences(generator, dataset.batch(own, num_kept))
                if generator.config.order == "random":
                    drawn = step_generator(0, "validation orders", start)
                    order = random_orders(sequences.indices.shape, drawn, generator.device)
                    sequences = sequences._replace(order=order)
                nll = _loss(generator, sequences, num_kept).nll
                num_counted = len(own) if position < len(starts) else 0
                sums += torch.stack([nll * num_counted, torch.tensor(num_counted).to(nll)])
            total, count = distributed.sum(sums).tolist()
            numbers[f"val_nll@{num_kept}"] = total / count
    generator.train()
    return numbers


def averaged(state: State, device: torch.device) -> Generator | None:
    """The generator with the averaged weights, whole; on the main process, None on the others."""
    weights: dict[str, Tensor] = {}
    for name, shadow in state.ema.shadow.items():
        tensor = distributed.whole(shadow)
        if distributed.is_main():
            weights[name] = tensor
    if not distributed.is_main():
        return None
    with torch.device("meta"):
        generator = Generator(state.generator.config)
    # Assigned, so that without shards it shares the memory of the averages.
    generator.load_state_dict(weights, assign=True)
    return generator.to(device).eval()


@torch.no_grad()
def _picture(state: State, setting: Setting, folder: Path) -> None:
    """Sample with the averaged weights, and write the images as one picture."""
    generator = averaged(state, setting.world.device)
    if generator is None:
        return
    run, config = setting.run, generator.config
    ids = range(_NUM_PICTURED)
    labels = torch.arange(_NUM_PICTURED) % max(1, config.num_classes)
    settings = run.sampling
    if config.num_classes == 0:
        settings = replace(settings, guidance_scale=1.0)
    sampled = sample(
        generator,
        labels=labels,
        num_kept=config.num_kept,
        seed=run.train.seed,
        image_ids=ids,
        settings=settings,
    )
    pictures = [
        to_pil(image) for image in decode_sampled(setting.tokenizer, sampled, config.grid_size)
    ]
    names = shown_names(setting.record.class_names) or [""]
    rows = [pictures[i : i + _PICTURE_COLUMNS] for i in range(0, _NUM_PICTURED, _PICTURE_COLUMNS)]
    captions = [
        [names[k % len(names)] for k in ids[i : i + _PICTURE_COLUMNS]]
        for i in range(0, _NUM_PICTURED, _PICTURE_COLUMNS)
    ]
    folder.mkdir(parents=True, exist_ok=True)
    contact_sheet(rows, captions=captions).save(folder / f"step-{state.step:08d}.png")


def _save(state: State, setting: Setting, manager: CheckpointManager, model: Path) -> None:
    """Write a checkpoint to resume from, and the averaged model to use.

    Raises:
        RuntimeError: a weight or an average is not finite; what was saved before stays.
    """
    manager.require_finite(state.state_dict())
    generator, record = averaged(state, setting.world.device), setting.record
    if generator is not None:
        save_model(
            model,
            generator.state_dict(),
            generator.config,
            kind="generator",
            extra={
                "step": state.step,
                "tokenizer": record.tokenizer,
                "tokenizer_path": setting.run.tokens.tokenizer,
                "class_names": list(record.class_names),
                "made_from": to_json(record.identity),
            },
        )
    # Last, so that whoever resumes from it finds a model at least as new.
    if distributed.is_sharded(state.generator):
        manager.save_sharded(state.step, state.state_dict(), prune=state.is_finite)
    elif distributed.is_main():
        manager.save(
            state.step,
            lambda path: save_state(path / "state", state.state_dict()),
            prune=state.is_finite,
        )
    distributed.barrier()
