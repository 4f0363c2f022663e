"""Training a tokenizer: the loop, its checkpoints and what it writes while it runs.

Source: Li et al. 2025, "MergeVQ", section 3 and appendix A.1 (arXiv:2504.00999).

Every random number of step n depends only on (seed, n), so a checkpoint needs no generator's state
to resume to the same bits: K, batch, crops and flips are drawn again from their numbers.
"""

import contextlib
import copy
import logging
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from mergevq.config.identity import Identity
from mergevq.config.training import TokenizerRun
from mergevq.data.batches import Batch, eval_batches, open_train_val, train_batches
from mergevq.data.images import ImageDataset
from mergevq.evaluate.compare import measure
from mergevq.metrics.codes import CodebookUsage, CollapseMonitor
from mergevq.metrics.lpips import Perceptual, load_perceptual, missing_weights
from mergevq.report.pictures import contact_sheet, merge_map, to_pil
from mergevq.report.plots import has_plots
from mergevq.runtime import distributed
from mergevq.runtime.artefacts import save_model
from mergevq.runtime.checkpoints import CheckpointManager, load_state, restoring, save_state
from mergevq.runtime.device import autocast, resolve_device, resolve_precision
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
from mergevq.tokenizer.losses.adversarial import (
    Discriminator,
    LeCam,
    adversarial_weight,
    discriminator_active,
    discriminator_loss,
    fitting_num_layers,
    generator_loss,
)
from mergevq.tokenizer.losses.teachers import SelfTeacher, Teacher, build_teacher, require_labels
from mergevq.tokenizer.losses.terms import TokenizerLosses, reconstruction_loss, source_loss
from mergevq.tokenizer.quantizers.lfq import quantize_losses
from mergevq.tokenizer.tokenizer import Tokenizer, TokenizerOutput
from mergevq.training.initial import Start, find_start, initial_tokenizer
from mergevq.training.panels import tokenizer_panels, write_curves

logger = logging.getLogger("mergevq")

_FIXED = (
    "model",
    "teacher.kind",
    "teacher.path",
    "teacher.num_head_layers",
    "teacher.num_prototypes",
    "loss.discriminator_channels",
    "encoder_lr_ratio",
)
"""Settings that a resumed run has to have as they were."""
_USAGE_WINDOW_BITS = 18
"""Codebook usage is counted over this power of two of tokens, or all codes when they are fewer."""
_COLLAPSE_REPORTS = 20
"""Bad reports of codebook usage in a row before the run warns of a collapse."""
_EVAL_BATCH = 64
"""Images validated at once, over all ranks."""
_NUM_PICTURED = 8
"""Images in a reconstruction grid."""


class Pass(NamedTuple):
    """Results of one forward pass of the tokenizer's side."""

    output: TokenizerOutput
    """Reconstruction, tokens, source logits."""
    alignment: Float[Tensor, ""]
    """Class token against the teacher; 0 without one."""


class Objective(nn.Module):
    """Tokenizer and alignment head as one module, so that data parallelism wraps them once."""

    def __init__(self, tokenizer: Tokenizer, teacher: Teacher | None) -> None:
        """Hold both."""
        super().__init__()
        self.tokenizer = tokenizer
        self.teacher = teacher

    def forward(
        self,
        batch: Batch,
        num_kept: int,
        target: Float[Tensor, "b f"] | None,
        *,
        quantized: bool,
        source_gradient: float,
        recovers: Bool[Tensor, "b"] | None,
    ) -> Pass:
        """Run the tokenizer on the image, and its encoder on the student's view if there is one.

        `target` is that of `SelfTeacher.target`.
        """
        output = self.tokenizer(
            batch.image,
            num_kept,
            batch.student_view,
            quantized=quantized,
            source_gradient=source_gradient,
            recovers=recovers,
        )
        if self.teacher is None:
            return Pass(output, output.reconstruction.new_zeros((), dtype=torch.float32))
        token = output.view_class_token
        token = output.encoded.class_token if token is None else token
        loss = self.teacher.loss(token, batch.label, batch.teacher_view, target)
        return Pass(output, loss)


@dataclass(kw_only=True)
class State:
    """Everything that changes while training; all of it is in a checkpoint."""

    tokenizer: Tokenizer
    teacher: Teacher | None
    teacher_encoder: nn.Module | None
    """Average of the encoder that teaches in self-distillation."""
    discriminator: Discriminator
    lecam: LeCam
    optimizer: torch.optim.Optimizer
    discriminator_optimizer: torch.optim.Optimizer
    ema: Ema
    usage: CodebookUsage
    monitor: CollapseMonitor
    guard: NonFiniteGuard
    discriminator_guard: NonFiniteGuard
    scaler: torch.amp.GradScaler
    discriminator_scaler: torch.amp.GradScaler
    """Its own: a loss scale that suits one side may overflow the other."""
    step: int = 0

    @property
    def is_finite(self) -> bool:
        """Whether the last step was taken."""
        return self.guard.num_in_a_row == self.discriminator_guard.num_in_a_row == 0

    def _parts(self) -> dict[str, Any]:
        """Everything with a state of its own, by the name it has in a checkpoint."""
        parts = {
            "tokenizer": self.tokenizer,
            "teacher": self.teacher,
            "teacher_encoder": self.teacher_encoder,
            "discriminator": self.discriminator,
            "lecam": self.lecam,
            "optimizer": self.optimizer,
            "discriminator_optimizer": self.discriminator_optimizer,
            "ema": self.ema,
            "monitor": self.monitor,
            "guard": self.guard,
            "discriminator_guard": self.discriminator_guard,
            "scaler": self.scaler,
            "discriminator_scaler": self.discriminator_scaler,
        }
        return {name: part for name, part in parts.items() if part is not None}

    def state_dict(self) -> dict[str, Any]:
        """Nested dict of tensors and plain values, the same on every rank; every rank must call."""
        state = {name: part.state_dict() for name, part in self._parts().items()}
        return state | {"step": self.step, "usage": self.usage.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Inverse of `state_dict`, on any number of ranks.

        Raises:
            ValueError: it lacks a part of this run, or has one that this run has not.
        """
        parts = self._parts()
        expected = {*parts, "step", "usage"}
        if state.keys() != expected:
            missing, unexpected = sorted(expected - state.keys()), sorted(state.keys() - expected)
            raise ValueError(
                f"the checkpoint does not fit this run: it lacks {missing} and has {unexpected} "
                "besides; resume with the settings and the version of mergevq that wrote it"
            )
        for name, part in parts.items():
            part.load_state_dict(state[name])
        self.step = state["step"]
        # One window, of the main process, so that it is of as many tokens on any number of ranks.
        tokens = state["usage"]["tokens"]
        self.usage.load_state_dict({"tokens": tokens if distributed.is_main() else tokens[:0]})


@dataclass(frozen=True, kw_only=True)
class Setting:
    """Things that stay the same through a run."""

    run: TokenizerRun
    world: distributed.World
    objective: nn.Module
    """The tokenizer's side, wrapped for several ranks."""
    judge: nn.Module
    """The discriminator, wrapped for several ranks."""
    perceptual: Perceptual | None
    dtype: torch.dtype | None
    """Type of autocast; None is float32."""
    made_from: Identity | None = None
    """The training images; None where none were opened."""
    start: Start | None = None
    """Components that the weights started from."""

    @property
    def has_adversary(self) -> bool:
        """Whether a discriminator takes part."""
        return self.run.loss.adversarial_weight > 0

    def autocast(self) -> torch.autocast:
        """Context of the run's precision."""
        return autocast(self.world.device, self.dtype)


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
    settings = run.train
    distributed.local_batch(settings.batch_size, world, accumulation=settings.accumulation)
    train_set, val_set = open_train_val(run.data)
    start = find_start(run, train_set)
    state, setting = build(run, world, num_classes=train_set.num_classes, start=start)
    _check_labels(run, train_set)
    with RunDirectory(run.out) as directory:
        setting = replace(setting, made_from=train_set.identity())
        directory.open(
            run,
            device=world.device,
            resume=resume,
            made_from=setting.made_from,
            learns_labels=run.teacher.kind == "labels",
            fixed=_FIXED,
        )
        _run_steps(state, setting, directory, train_set, val_set, resume=resume, brief=brief)
    return directory.model


def _run_steps(
    state: State,
    setting: Setting,
    directory: RunDirectory,
    train_set: ImageDataset,
    val_set: ImageDataset,
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
            state.load_state_dict(load_state(latest / "state"))
    log = MetricsLog(
        directory.metrics,
        first_step=state.step,
        tensorboard=settings.tensorboard,
        brief=run.model.num_kept if brief else None,
    )
    bar = Progress(
        settings.num_steps * settings.batch_size,
        done=state.step * settings.batch_size,
        unit="image",
    )
    _introduce(log, setting, resumed=latest is not None)
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
            manager.settle(finite=state.is_finite)
            state.step += 1
            bar.update(settings.batch_size)
            last = state.step == settings.num_steps
            logging_due = step % settings.log_every == 0 or last
            if logging_due:
                seconds, logged_at = time.monotonic() - logged_at, time.monotonic()
                num_images = (state.step - logged_step) * settings.batch_size
                numbers["images_per_second"] = num_images / seconds
                logged_step = state.step
                numbers |= _usage_numbers(state)
            if validating := state.step % settings.eval_every == 0 or last:
                numbers |= _validate(state, setting, val_set)
            if logging_due or validating:
                log.write(step, numbers, shown=_shown(numbers))
            if state.step % settings.image_every == 0 or last:
                _picture(state, setting, val_set, directory.images)
            # Every rank learns of a signal to any of them, so all stop after the same step.
            stopping = bool(distributed.sum(torch.tensor(int(signal.is_due))) > 0)
            if state.step % settings.save_every == 0 or last or stopping:
                _save(state, setting, manager, directory.model)
            if plotting and (validating or stopping):
                panels = tokenizer_panels(run, read_metrics(directory.metrics))
                write_curves(directory.curves, panels)
            if stopping and not last:
                logger.warning("stopped after %d steps; go on with --resume", state.step)
                break


def _introduce(log: MetricsLog, setting: Setting, *, resumed: bool) -> None:
    """Show what a step is, and what a fresh run's weights are."""
    log.note(describe_batch(setting.run.train, setting.run.optim, setting.world, unit="images"))
    if setting.start is not None and not resumed:
        log.note(setting.start.describe())


def _check_labels(run: TokenizerRun, dataset: ImageDataset) -> None:
    """Where labels teach, refuse images without one before a step meets them."""
    if run.teacher.kind == "labels":
        require_labels(dataset.num_unlabelled, len(dataset))


def build(
    run: TokenizerRun, world: distributed.World, *, num_classes: int, start: Start | None = None
) -> tuple[State, Setting]:
    """Make everything a run needs, the same on every rank; `start` is that of `find_start`."""
    # The only use of the global generator: it fills fresh weights, and is put back after.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(run.train.seed)  # noqa: TID251 - layers fill themselves from it
        tokenizer = initial_tokenizer(run, start)
        teacher = build_teacher(run.teacher, dim=run.model.dim, num_classes=num_classes)
        discriminator = Discriminator(
            channels=run.loss.discriminator_channels,
            num_layers=fitting_num_layers(run.model.image_size, num_layers=3),
        )
    device = world.device
    # On CPUs the backward pass of group norm is many times slower in channels_last.
    layout = torch.channels_last if device.type == "cuda" else torch.contiguous_format
    for module in (tokenizer, discriminator):
        module.to(device).to(memory_format=layout)  # pyright: ignore[reportCallIssue]
        module.train()
    tokenizer.set_checkpointing(enabled=run.train.checkpointing)
    teacher_encoder = None
    if teacher is not None:
        teacher = teacher.to(device).train()
    if isinstance(teacher, SelfTeacher):
        teacher_encoder = copy.deepcopy(tokenizer.encoder).requires_grad_(requires_grad=False)
    objective = Objective(tokenizer, teacher)
    ratios: dict[nn.Module, float] = {tokenizer.encoder: run.encoder_lr_ratio}
    optimizer = build_optimizer([objective], run.optim, run.train.batch_size, ratios)
    discriminator_optimizer = build_optimizer([discriminator], run.optim, run.train.batch_size)
    check_coverage([objective, discriminator], [optimizer, discriminator_optimizer])
    dtype = resolve_precision(run.train.precision, device)
    window = 2 ** min(run.model.num_bits, _USAGE_WINDOW_BITS)
    state = State(
        tokenizer=tokenizer,
        teacher=teacher,
        teacher_encoder=teacher_encoder,
        discriminator=discriminator,
        lecam=LeCam().to(device),
        optimizer=optimizer,
        discriminator_optimizer=discriminator_optimizer,
        ema=Ema(tokenizer, run.optim.ema_decay),
        usage=CodebookUsage(run.model.num_bits, window=window, device=device),
        monitor=CollapseMonitor(_COLLAPSE_REPORTS),
        guard=NonFiniteGuard(run.train.max_nonfinite),
        discriminator_guard=NonFiniteGuard(run.train.max_nonfinite),
        scaler=gradient_scaler(device, dtype),
        discriminator_scaler=gradient_scaler(device, dtype),
    )
    setting = Setting(
        run=run,
        world=world,
        objective=distributed.wrap(objective),
        judge=distributed.wrap(discriminator),
        perceptual=_perceptual(run, device),
        dtype=dtype,
        start=start,
    )
    return state, setting


def _perceptual(run: TokenizerRun, device: torch.device) -> Perceptual | None:
    """The LPIPS network, or None and a notice."""
    if run.loss.perceptual_weight == 0:
        return None
    network = load_perceptual(run.loss.perceptual_trunk, run.loss.perceptual_path)
    if network is None:
        logger.warning(
            "training WITHOUT perceptual loss: %s", missing_weights(run.loss.perceptual_trunk)
        )
        return None
    return network.to(device)


def run_batches(
    run: TokenizerRun, world: distributed.World, dataset: ImageDataset, start_step: int
) -> Iterator[Batch]:
    """This rank's batches, with the views its teacher needs."""
    learns_from_view = run.teacher.kind in ("self", "dinov2", "huggingface")
    frozen = run.teacher.kind in ("dinov2", "huggingface")
    return train_batches(
        dataset,
        run.data,
        image_size=run.model.image_size,
        batch_size=run.train.batch_size,
        num_steps=run.train.num_steps,
        start_step=start_step,
        seed=run.train.seed,
        rank=world.rank,
        world_size=world.world_size,
        student_size=(run.teacher.view_size or run.model.image_size) if learns_from_view else None,
        teacher_size=run.teacher.teacher_size if frozen else None,
        num_workers=run.data.num_workers,
    )


def draw_num_kept(run: TokenizerRun, step: int) -> int:
    """K of a step: the same on every rank, and again after a resume."""
    probabilities = torch.tensor(run.kept.probabilities, dtype=torch.float64)
    chosen = torch.multinomial(
        probabilities, 1, generator=step_generator(run.train.seed, "kept", step)
    )
    return run.kept.candidates[int(chosen)]


def train_step(state: State, setting: Setting, batch: Batch) -> dict[str, float]:
    """One optimizer step of both sides; returns what is worth logging."""
    run = setting.run
    num_kept = draw_num_kept(run, state.step)
    rate = learning_rate(state.step, run.optim, run.train.num_steps, run.train.batch_size)
    set_learning_rate(state.optimizer, rate)
    set_learning_rate(state.discriminator_optimizer, rate)
    parts = _cut(batch, run.train.accumulation, setting.world.device)
    numbers, reconstructions = update_tokenizer(state, setting, parts, num_kept)
    if discriminator_active(state.step, run.loss):
        numbers |= update_discriminator(state, setting, parts, reconstructions)
    return numbers | {"lr": rate, "num_kept": num_kept}


def update_tokenizer(
    state: State, setting: Setting, parts: list[Batch], num_kept: int
) -> tuple[dict[str, float], list[Float[Tensor, "b 3 h w"]]]:
    """One step of the tokenizer's side, over accumulated parts, with the discriminator frozen.

    Returns:
        Numbers for the log, and the reconstruction of each part for the discriminator.
    """
    run, sums, reconstructions, indices = setting.run, {}, [], []
    state.discriminator.requires_grad_(requires_grad=False)
    state.optimizer.zero_grad(set_to_none=True)
    targets = self_targets(state, setting, parts, num_kept)
    for position, (part, target) in enumerate(zip(parts, targets, strict=True)):
        syncs = position == len(parts) - 1
        place = setting.world.rank * len(parts) + position
        recovers = recovering(run.loss.recovered_share_at(state.step), place, part.image)
        with distributed.no_sync(setting.objective, active=not syncs):
            with setting.autocast():
                losses, output = tokenizer_losses(
                    state, setting, part, num_kept, recovers=recovers, target=target
                )
            total = losses.total(run.loss, adversarial_weight(state.step, run.loss))
            state.scaler.scale(total / len(parts)).backward()
        reconstructions.append(output.reconstruction.detach())
        indices.append(output.encoded.indices)
        for name, value in [("loss", total), *losses._asdict().items()]:
            sums[name] = sums.get(name, 0) + value.detach() / len(parts)
    tokens = distributed.gather(torch.cat(indices))
    state.usage.update(tokens if distributed.is_main() else tokens[:0])
    state.discriminator.requires_grad_(requires_grad=True)
    state.scaler.unscale_(state.optimizer)
    numbers = {
        f"grad_norm_{name}": _norm(module) for name, module in state.tokenizer.named_children()
    }
    norm = clip(setting.objective.parameters(), run.optim.clip_norm)
    if state.guard.check(state.step, sums | {"grad_norm": norm}):
        state.scaler.step(state.optimizer)
        state.ema.update()
        _update_teacher(state, run.teacher.momentum)
    else:
        images = [part.index.tolist() for part in parts]
        logger.warning("step %d is not finite and is skipped; images %s", state.step, images)
    state.scaler.update()
    numbers = {name: float(distributed.mean(value)) for name, value in sums.items()} | numbers
    return numbers | {"grad_norm": float(norm), "num_skipped": state.guard.num_skipped}, (
        reconstructions
    )


def recovering(
    share: float, place: int, image: Float[Tensor, "b 3 h w"]
) -> Bool[Tensor, "b"] | None:
    """Which images of one part of a batch are decoded with the recovered source; None is none.

    They are spread evenly over the whole batch, however it is cut.

    Args:
        share: of the whole batch.
        place: parts before this one, those of ranks before included.
        image: of this part; all parts have as many.
    """
    if share == 0:
        return None
    count = image.shape[0]
    borders = torch.arange(place * count, (place + 1) * count + 1, dtype=torch.float64) * share
    return (borders.floor().diff() > 0).to(image.device)


@torch.no_grad()
def self_targets(
    state: State, setting: Setting, parts: list[Batch], num_kept: int
) -> list[Float[Tensor, "b f"] | None]:
    """Target of the self-teacher for each part of a step; None for other teachers.

    An image is compared with all others of the step, however it is cut into parts.
    """
    if state.teacher_encoder is None or not isinstance(state.teacher, SelfTeacher):
        return [None for _ in parts]
    with setting.autocast():
        tokens = [state.teacher_encoder(part.image, num_kept).class_token for part in parts]
        target = state.teacher.target(torch.cat(tokens))
    return list(target.split([len(part.image) for part in parts]))


def tokenizer_losses(
    state: State,
    setting: Setting,
    batch: Batch,
    num_kept: int,
    *,
    recovers: Bool[Tensor, "b"] | None = None,
    target: Float[Tensor, "b f"] | None = None,
) -> tuple[TokenizerLosses, TokenizerOutput]:
    """Every term for one part of a batch.

    Args:
        state: networks.
        setting: weights of the terms.
        batch: the part.
        num_kept: K.
        recovers: which images are decoded with the recovered source; None is none.
        target: of the self-teacher for this part (`self_targets`); None makes it of the part alone.
    """
    run = setting.run
    if target is None:
        (target,) = self_targets(state, setting, [batch], num_kept)
    output, alignment = setting.objective(
        batch,
        num_kept,
        target,
        quantized=state.step >= run.train.quantize_start_step,
        source_gradient=run.loss.source_gradient,
        recovers=recovers,
    )
    zero = torch.zeros((), device=batch.image.device)
    quantizer = quantize_losses(output.encoded.latents, run.loss.entropy_temperature)
    perceptual, adversarial = zero, zero
    if setting.perceptual is not None:
        perceptual = setting.perceptual(output.reconstruction, batch.image).mean()
    if adversarial_weight(state.step, run.loss) > 0:
        adversarial = generator_loss(state.discriminator(output.reconstruction))
    losses = TokenizerLosses(
        reconstruction=reconstruction_loss(batch.image, output.reconstruction),
        perceptual=perceptual,
        adversarial=adversarial,
        commitment=quantizer.commitment,
        entropy=quantizer.entropy,
        source=source_loss(output.source_logits, output.encoded.source),
        alignment=alignment,
    )
    return losses, output


def update_discriminator(
    state: State,
    setting: Setting,
    parts: list[Batch],
    reconstructions: list[Float[Tensor, "b 3 h w"]],
) -> dict[str, float]:
    """One step of the discriminator on images and detached reconstructions."""
    run, sums, reals, fakes = setting.run, {}, [], []
    state.discriminator_optimizer.zero_grad(set_to_none=True)
    for position, (part, fake) in enumerate(zip(parts, reconstructions, strict=True)):
        syncs = position == len(parts) - 1
        with distributed.no_sync(setting.judge, active=not syncs):
            with setting.autocast():
                logits = setting.judge(torch.cat([part.image, fake.to(part.image.dtype)]))
            real_logits, fake_logits = logits.chunk(2)
            loss = discriminator_loss(real_logits, fake_logits)
            lecam = state.lecam(real_logits, fake_logits)
            total = loss + run.loss.lecam_weight * lecam
            state.discriminator_scaler.scale(total / len(parts)).backward()
        reals.append(real_logits.detach())
        fakes.append(fake_logits.detach())
        values = {
            "discriminator_loss": loss,
            "lecam": lecam,
            "logits_real": real_logits.mean(),
            "logits_fake": fake_logits.mean(),
        }
        for name, value in values.items():
            sums[name] = sums.get(name, 0) + value.detach().float() / len(parts)
    state.discriminator_scaler.unscale_(state.discriminator_optimizer)
    norm = clip(state.discriminator.parameters(), run.optim.clip_norm)
    if state.discriminator_guard.check(state.step, sums | {"grad_norm_discriminator": norm}):
        state.discriminator_scaler.step(state.discriminator_optimizer)
        # Only of a step that is taken: averages that have seen a NaN stay NaN.
        state.lecam.update(torch.cat(reals), torch.cat(fakes))
    else:
        logger.warning("step %d of the discriminator is not finite and is skipped", state.step)
    state.discriminator_scaler.update()
    numbers = {name: float(distributed.mean(value)) for name, value in sums.items()}
    numbers["adversarial_weight"] = adversarial_weight(state.step, run.loss)
    return numbers | {"grad_norm_discriminator": float(norm)}


def _cut(batch: Batch, num_parts: int, device: torch.device) -> list[Batch]:
    """Move a batch to the device and cut it for accumulation."""
    columns = [
        [None] * num_parts
        if column is None
        else column.to(device, non_blocking=True).chunk(num_parts)
        for column in batch
    ]
    return [Batch(*part) for part in zip(*columns, strict=True)]


def _shown(numbers: dict[str, float]) -> set[str]:
    """Names that the log line shows: every term that is not 0, and what tells a bad run."""
    wanted = {"loss", "lr", "num_kept", "grad_norm", "codebook_usage", "images_per_second"}
    wanted |= {name for name in TokenizerLosses._fields if numbers.get(name)}
    return wanted | {name for name in numbers if name.startswith(("psnr", "num_skipped"))}


@torch.no_grad()
def _update_teacher(state: State, momentum: float) -> None:
    """In self-distillation, move the averaged encoder and head after the student's."""
    if state.teacher_encoder is None or not isinstance(state.teacher, SelfTeacher):
        return
    pairs = zip(
        state.teacher_encoder.parameters(), state.tokenizer.encoder.parameters(), strict=True
    )
    for average, parameter in pairs:
        average.lerp_(parameter, 1 - momentum)
    state.teacher.update(momentum)


def _norm(module: nn.Module) -> float:
    """Gradient norm of a part of the model."""
    gradients = [p.grad for p in module.parameters() if p.grad is not None]
    return float(torch.nn.utils.get_total_norm(gradients))


def _usage_numbers(state: State) -> dict[str, float]:
    """Codebook use over the window, and a warning when it collapses."""
    statistics = state.usage.compute()
    warning = state.monitor.update(statistics)
    if warning is not None:
        logger.warning(warning)
    return {
        "codebook_usage": statistics.usage,
        "perplexity": statistics.perplexity,
        "num_dead_bits": statistics.num_dead_bits,
        "min_bit_entropy": float(statistics.bit_entropies.min()),
        "min_bit_prob": float(statistics.bit_probs.min()),
        "max_bit_prob": float(statistics.bit_probs.max()),
    }


def _validate(state: State, setting: Setting, dataset: ImageDataset) -> dict[str, float]:
    """Reconstruct validation images with the averaged weights at every stated K."""
    run, num_ranks = setting.run, setting.world.world_size
    # Up to the next number that the ranks can share evenly; the last batch may be short.
    batch_size = -(-min(_EVAL_BATCH, run.train.num_eval_images) // num_ranks) * num_ranks
    numbers = {}
    state.tokenizer.eval()
    with state.ema.swap():
        for num_kept in run.train.eval_num_kept or (run.model.num_kept,):
            batches = eval_batches(
                dataset,
                image_size=run.model.image_size,
                batch_size=batch_size,
                max_images=run.train.num_eval_images,
                rank=setting.world.rank,
                world_size=num_ranks,
                num_workers=0,
            )
            measured = measure(
                state.tokenizer,
                batches,
                num_kept,
                perceptual=setting.perceptual,
                autocast=setting.autocast(),
            )
            numbers |= {f"{name}@{num_kept}": value for name, value in measured}
    state.tokenizer.train()
    return numbers


@torch.no_grad()
def _picture(state: State, setting: Setting, dataset: ImageDataset, folder: Path) -> None:
    """Write a grid: original, merge map, given source, recovered source."""
    if not distributed.is_main():
        return
    run, device = setting.run, setting.world.device
    batch = next(
        eval_batches(
            dataset,
            image_size=run.model.image_size,
            batch_size=_NUM_PICTURED,
            max_images=_NUM_PICTURED,
            num_workers=0,
        )
    )
    state.tokenizer.eval()
    with state.ema.swap(), setting.autocast():
        image = batch.image.to(device)
        given = state.tokenizer.reconstruct(image)
        recovered = state.tokenizer.reconstruct(image, source="recovered")
    state.tokenizer.train()
    shape = given.encoded.grid_shape
    rows = [
        [
            to_pil(image[i]),
            merge_map(image[i], given.source.index[i], shape),
            to_pil(given.image[i].float()),
            to_pil(recovered.image[i].float()),
        ]
        for i in range(len(image))
    ]
    titles = ["original", f"{run.model.num_kept} tokens", "given source", "recovered source"]
    folder.mkdir(parents=True, exist_ok=True)
    contact_sheet(rows, titles).save(folder / f"step-{state.step:08d}.png")


def _save(state: State, setting: Setting, manager: CheckpointManager, model: Path) -> None:
    """Write a checkpoint to resume from, and the averaged model to use.

    Raises:
        RuntimeError: a weight or an average is not finite; what was saved before stays.
    """
    # Every rank takes part in the state, though one writes it.
    everything = state.state_dict()
    manager.require_finite(everything)
    if distributed.is_main():
        with state.ema.swap():
            save_model(
                model,
                state.tokenizer.state_dict(),
                state.tokenizer.config,
                kind="tokenizer",
                extra={
                    "step": state.step,
                    "made_from": None if setting.made_from is None else to_json(setting.made_from),
                },
            )
    if distributed.is_main():
        # Last, so that whoever resumes from it finds a model at least as new.
        manager.save(
            state.step,
            lambda path: save_state(path / "state", everything),
            prune=state.is_finite,
        )
    distributed.barrier()
