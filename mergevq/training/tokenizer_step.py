"""One step of a tokenizer's training: its networks, losses and optimizers.

Source: Li et al. 2025, "MergeVQ", section 3 and appendix A.1 (arXiv:2504.00999).
"""

import copy
import functools
import logging
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn
from torch.profiler import record_function

from mergevq.config.objective import SelfDistillation
from mergevq.config.training import TokenizerRun
from mergevq.data.batches import Batch
from mergevq.data.codes import CodeSpec
from mergevq.metrics.codes import CollapseMonitor, SharedUsage
from mergevq.metrics.lpips import Perceptual, load_perceptual, missing_weights
from mergevq.runtime import distributed
from mergevq.runtime.device import autocast, compile_in_place, lay_out, resolve_precision, send
from mergevq.runtime.optim import (
    Budget,
    Ema,
    NonFiniteGuard,
    Proposal,
    Verdict,
    build_optimizer,
    check_coverage,
    clip,
    gradient_scaler,
    guard_on,
    learning_rate,
    set_learning_rate,
    take_steps,
)
from mergevq.runtime.random import BatchNumbers, draw_num_kept, step_generator
from mergevq.tokenizer.build import build_regularizer, build_terms
from mergevq.tokenizer.conditions.values import condition_of, left_out, unknown
from mergevq.tokenizer.encoder import Encoder
from mergevq.tokenizer.losses.adversarial import (
    Discriminator,
    LeCam,
    adversarial_weight,
    discriminator_active,
    discriminator_loss,
    fitting_num_layers,
    generator_loss,
)
from mergevq.tokenizer.losses.distillation import Distillation, build_distillation
from mergevq.tokenizer.losses.teachers import SelfTeacher, Teacher, build_teacher
from mergevq.tokenizer.losses.terms import (
    TokenizerLosses,
    reconstruction_loss,
    term_weights,
    total,
)
from mergevq.tokenizer.seams import (
    Condition,
    Follower,
    Regularizer,
    StepDraws,
    Term,
    TokenizerOutput,
)
from mergevq.tokenizer.tokenizer import Tokenizer
from mergevq.training.fit import Number, cut, warn_of_skip
from mergevq.training.initial import Start, initial_tokenizer
from mergevq.training.objective import Objective

logger = logging.getLogger("mergevq")

_JUDGE_SKIPPED = "step %d of the discriminator is not finite and is skipped"
_COLLAPSE_REPORTS = 20
"""Bad reports of codebook usage in a row before the run warns of a collapse."""


@dataclass(kw_only=True)
class State:
    """Everything that changes while training; all of it is in a checkpoint."""

    tokenizer: Tokenizer
    teacher: Teacher | None
    teacher_encoder: Encoder | None
    """Average of the encoder that teaches in self-distillation."""
    distillation: Distillation | None
    discriminator: Discriminator
    lecam: LeCam
    optimizer: torch.optim.Optimizer
    discriminator_optimizer: torch.optim.Optimizer
    ema: Ema
    usage: SharedUsage | None
    """None of tokens that are real numbers."""
    monitor: CollapseMonitor
    guard: NonFiniteGuard
    discriminator_guard: NonFiniteGuard
    scaler: torch.amp.GradScaler
    discriminator_scaler: torch.amp.GradScaler
    """Its own: a loss scale that suits one side may overflow the other."""
    budget: Budget
    step: int = 0

    @property
    def place(self) -> int:
        """Step of the schedules."""
        return self.budget.place(self.step)

    @property
    def guards(self) -> tuple[NonFiniteGuard, ...]:
        """Both; the log counts the skipped steps of the first."""
        return self.guard, self.discriminator_guard


@dataclass(frozen=True, kw_only=True)
class TokenizerLearner:
    """Everything that takes a step: networks and optimizers, and what stays the same in a run."""

    run: TokenizerRun
    world: distributed.World
    state: State
    objective: nn.Module
    """The tokenizer's side, wrapped for several ranks."""
    regularizer: Regularizer | None
    """The one of the objective; None leaves codes as they are."""
    judge: nn.Module
    """The discriminator, wrapped for several ranks."""
    perceptual: Perceptual | None
    terms: tuple[Term, ...]
    """Further terms of the loss, in the order in which they are added."""
    dtype: torch.dtype | None
    """Type of autocast; None is float32."""

    @property
    def has_adversary(self) -> bool:
        """Whether a discriminator takes part."""
        return self.run.loss.adversarial_weight > 0

    def autocast(self) -> torch.autocast:
        """Context of the run's precision."""
        return autocast(self.world.device, self.dtype)

    def step(self, batch: Batch) -> dict[str, Number]:
        """One optimizer step of both sides; returns what is worth logging."""
        run, state = self.run, self.state
        num_kept = draw_num_kept(run.kept, run.train.seed, state.step)
        rate = learning_rate(state.place, run.optim, run.train.num_steps, run.train.batch_size)
        set_learning_rate(state.optimizer, rate)
        set_learning_rate(state.discriminator_optimizer, rate)
        parts = cut(batch, run.train.accumulation, self.world.device)
        numbers, proposal, reconstructions = self.propose_tokenizer(parts, num_kept)
        proposals = [proposal]
        if discriminator_active(state.place, run.loss):
            more, proposal = self.propose_discriminator(parts, reconstructions)
            numbers, proposals = numbers | more, [*proposals, proposal]
        take_steps(state.step, proposals)
        return numbers | {"lr": rate, "num_kept": num_kept}

    def propose_tokenizer(
        self, parts: list[Batch], num_kept: int
    ) -> tuple[dict[str, Number], Proposal, list[Float[Tensor, "b 3 h w"]]]:
        """A step of the tokenizer's side, over accumulated parts, with the discriminator frozen.

        Returns:
            Numbers for the log, the step, and the reconstruction of each part for the
            discriminator.
        """
        run, state = self.run, self.state
        sums, reconstructions, tokens, latents = {}, [], [], []
        state.discriminator.requires_grad_(requires_grad=False)
        state.optimizer.zero_grad(set_to_none=True)
        targets = self.self_targets(parts, num_kept)
        for position, (part, target) in enumerate(zip(parts, targets, strict=True)):
            syncs = position == len(parts) - 1
            place = self.world.rank * len(parts) + position
            recovers = recovering(run.loss.recovered_share_at(state.place), place, part.image)
            uniforms = self._uniforms(place, len(parts), part, num_kept)
            draws = self._draws(place, len(parts), part, num_kept)
            with distributed.no_sync(self.objective, active=not syncs):
                with self.autocast():
                    losses, output = self.losses(
                        part,
                        num_kept,
                        recovers=recovers,
                        target=target,
                        uniforms=uniforms,
                        draws=draws,
                        condition=self._condition(place, len(parts), part),
                    )
                loss = total(losses, self._weights())
                state.scaler.scale(loss / len(parts)).backward()
            reconstructions.append(output.reconstruction.detach())
            tokens.append(output.encoded.parts)
            latents.append(output.encoded.latents.detach())
            for name, value in [("loss", loss), *losses.items()]:
                sums[name] = sums.get(name, 0) + value.detach() / len(parts)
        if state.usage is not None:
            state.usage.update(torch.cat(tokens))
        state.discriminator.requires_grad_(requires_grad=True)
        state.scaler.unscale_(state.optimizer)
        norms = {
            f"grad_norm_{name}": _norm(module)
            for name, module in state.tokenizer.named_children()
            if any(True for _ in module.parameters())
        }
        norm = clip(self.objective.parameters(), run.optim.clip_norm)
        proposal = Proposal(
            guard=state.guard,
            terms=sums | {"grad_norm": norm},
            warn=functools.partial(warn_of_skip, [part.index for part in parts]),
            statistics=self._statistics(torch.cat(latents), torch.cat(tokens)),
            take=self._take_tokenizer,
        )
        return sums | norms | {"grad_norm": norm}, proposal, reconstructions

    @torch.no_grad()
    def _statistics(
        self, latents: Float[Tensor, "b n d"], parts: Int64[Tensor, "b k p"]
    ) -> list[Tensor]:
        """Numbers of this rank that codes which are no weights follow, unless the encoder stays."""
        quantizer = self.state.tokenizer.quantizer
        if not isinstance(quantizer, Follower) or self.run.encoder_lr_ratio == 0:
            return []
        generator = step_generator(self.run.train.seed, "codebook", self.state.step)
        return quantizer.statistics(latents.flatten(0, 1), parts.flatten(0, 1), generator)

    def _take_tokenizer(self, verdict: Verdict, statistics: list[Tensor]) -> None:
        """Take a step of the tokenizer's side, and let averages and codes follow."""
        state, teacher = self.state, self.run.teacher
        verdict.step(state.optimizer)
        quantizer = state.tokenizer.quantizer
        if statistics and isinstance(quantizer, Follower):
            codes = quantizer.state_dict().values()
            verdict.change(codes, lambda: quantizer.follow(statistics))
        state.ema.update(verdict)
        if isinstance(teacher, SelfDistillation):
            _update_teacher(state, teacher.momentum, verdict)
        state.scaler.update()

    def _uniforms(
        self, place: int, num_parts: int, part: Batch, num_kept: int
    ) -> Float[Tensor, "b k d"] | None:
        """Numbers that a quantizer draws a part's tokens by; None where it does not draw.

        They are those that one process would draw for the whole batch.

        Args:
            place: parts before this one, those of ranks before included.
            num_parts: of this rank; all parts have as many images.
            part: the part.
            num_kept: K.
        """
        quantizer = self.state.tokenizer.quantizer
        if not quantizer.is_random:
            return None
        numbers = self._numbers(place, num_parts, part)
        return send(numbers.uniform("quantizer", num_kept, quantizer.spec.dim), part.image.device)

    def _draws(self, place: int, num_parts: int, part: Batch, num_kept: int) -> StepDraws | None:
        """Numbers that the regularizer goes by; None without one. Arguments as `_uniforms`."""
        if self.regularizer is None:
            return None
        numbers = self._numbers(place, num_parts, part)
        num_draws = self.regularizer.num_draws(self.state.tokenizer.quantizer.spec)
        device = part.image.device
        return StepDraws(
            images=send(numbers.even("regularizer images"), device),
            tokens=send(numbers.uniform("regularizer", num_kept, num_draws), device),
            progress=send(torch.tensor(self.state.place / self.run.train.num_steps), device),
        )

    def _condition(self, place: int, num_parts: int, part: Batch) -> Condition | None:
        """Condition of a part's images, left out of some; None without one.

        Arguments as `_uniforms`.
        """
        config, device = self.run.model.condition, part.image.device
        condition = condition_of(config, part.label, "training")
        if condition is None:
            return None
        dropped = self._numbers(place, num_parts, part).even("condition") < config.dropout
        return left_out(send(condition, device), send(dropped, device))

    def _numbers(self, place: int, num_parts: int, part: Batch) -> BatchNumbers:
        """Random numbers of a part's images; arguments as `_uniforms`."""
        count = len(part.image)
        return BatchNumbers(
            seed=self.run.train.seed,
            step=self.state.step,
            num_rows=count * num_parts * self.world.world_size,
            rows=slice(place * count, (place + 1) * count),
        )

    def _weights(self) -> dict[str, float]:
        """Weight of every term at this step."""
        run = self.run
        adversarial = adversarial_weight(self.state.place, run.loss)
        return term_weights(run.loss, run.own_weights, adversarial)

    @torch.no_grad()
    def self_targets(self, parts: list[Batch], num_kept: int) -> list[Float[Tensor, "b f"] | None]:
        """Target of the self-teacher for each part of a step; None for other teachers.

        An image is compared with all others of the step, however it is cut into parts.
        """
        teacher, encoder = self.state.teacher, self.state.teacher_encoder
        if encoder is None or not isinstance(teacher, SelfTeacher):
            return [None for _ in parts]
        with self.autocast():
            config = self.run.model.condition
            tokens = [
                encoder.summary(
                    encoder(image, num_kept, condition=unknown(config, len(image), image))
                )
                for image in (part.image for part in parts)
            ]
            target = teacher.target(torch.cat(tokens))
        return list(target.split([len(part.image) for part in parts]))

    @record_function("losses")
    def losses(
        self,
        batch: Batch,
        num_kept: int,
        *,
        recovers: Bool[Tensor, "b"] | None = None,
        target: Float[Tensor, "b f"] | None = None,
        uniforms: Float[Tensor, "b k d"] | None = None,
        draws: StepDraws | None = None,
        condition: Condition | None = None,
    ) -> tuple[TokenizerLosses, TokenizerOutput]:
        """Every term for one part of a batch.

        Args:
            batch: the part.
            num_kept: K.
            recovers: which images are decoded with the recovered source; None is none.
            target: of the self-teacher for this part (`self_targets`); None makes it of this part
                alone.
            uniforms: numbers that the part's tokens are drawn by; None draws nothing.
            draws: numbers of the regularizer; None leaves it out.
            condition: of the images, where the tokenizer has one.
        """
        run, state = self.run, self.state
        if target is None:
            (target,) = self.self_targets([batch], num_kept)
        output, alignment, distilled = self.objective(
            batch,
            num_kept,
            target,
            quantized=state.place >= run.quantize_start_step,
            source_gradient=run.loss.source_gradient,
            recovers=recovers,
            uniforms=uniforms,
            draws=draws,
            condition=condition,
        )
        zero = torch.zeros((), device=batch.image.device)
        perceptual, adversarial = zero, zero
        if self.perceptual is not None:
            perceptual = self.perceptual(output.reconstruction, batch.image).mean()
        if adversarial_weight(state.place, run.loss) > 0:
            adversarial = generator_loss(state.discriminator(output.reconstruction))
        losses = {
            "reconstruction": reconstruction_loss(batch.image, output.reconstruction),
            "perceptual": perceptual,
            "adversarial": adversarial,
            "commitment": zero,
            "entropy": zero,
            "source": zero,
            "alignment": alignment,
        }
        further = {term.name: term(output, batch) for term in self.terms}
        # In place of the zeros, and after these those that one kind of part has.
        return {**losses, **output.losses, **distilled, **further}, output

    def propose_discriminator(
        self,
        parts: list[Batch],
        reconstructions: list[Float[Tensor, "b 3 h w"]],
    ) -> tuple[dict[str, Number], Proposal]:
        """A step of the discriminator on images and detached reconstructions, and its numbers."""
        run, state = self.run, self.state
        sums, reals, fakes = {}, [], []
        state.discriminator_optimizer.zero_grad(set_to_none=True)
        for position, (part, fake) in enumerate(zip(parts, reconstructions, strict=True)):
            syncs = position == len(parts) - 1
            with distributed.no_sync(self.judge, active=not syncs):
                with self.autocast():
                    logits = self.judge(torch.cat([part.image, fake.to(part.image.dtype)]))
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
        proposal = Proposal(
            guard=state.discriminator_guard,
            terms=sums | {"grad_norm_discriminator": norm},
            warn=functools.partial(logger.warning, _JUDGE_SKIPPED),
            statistics=[torch.cat(logits).float().mean() for logits in (reals, fakes)],
            take=self._take_discriminator,
        )
        weight = adversarial_weight(state.place, run.loss)
        return sums | {"adversarial_weight": weight, "grad_norm_discriminator": norm}, proposal

    def _take_discriminator(self, verdict: Verdict, logits: list[Tensor]) -> None:
        """Take a step of the discriminator, and let the averages of its logits follow."""
        state = self.state
        verdict.step(state.discriminator_optimizer)
        real, fake = (each / distributed.place()[1] for each in logits)
        # Only of a step that is taken: averages that have seen a NaN stay NaN.
        verdict.change(state.lecam.state_dict().values(), lambda: state.lecam.update(real, fake))
        state.discriminator_scaler.update()


def build(
    run: TokenizerRun, world: distributed.World, *, num_classes: int, start: Start | None = None
) -> TokenizerLearner:
    """Make everything a run needs, the same on every rank; `start` is that of `find_start`."""
    # The only use of the global generator: it fills fresh weights, and is put back after.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(run.train.seed)  # noqa: TID251 - layers fill themselves from it
        tokenizer = initial_tokenizer(run, start)
        teacher = build_teacher(run.teacher, dim=run.model.summary_dim, num_classes=num_classes)
        discriminator = Discriminator(
            channels=run.loss.discriminator_channels,
            num_layers=fitting_num_layers(run.model.image_size, num_layers=3),
        )
        distillation = build_distillation(run.distillation, run.model, tokenizer.encoder)
    device, dtype = world.device, resolve_precision(run.train.precision, world.device)
    for module in filter(None, (tokenizer, discriminator, distillation)):
        lay_out(module.train(), device, dtype)
    tokenizer.set_checkpointing(enabled=run.train.checkpointing)
    teacher_encoder, teacher = None, None if teacher is None else teacher.to(device).train()
    if isinstance(teacher, SelfTeacher):
        teacher_encoder = copy.deepcopy(tokenizer.encoder).requires_grad_(requires_grad=False)
    if run.encoder_lr_ratio == 0:
        nn.ModuleList([tokenizer.encoder, tokenizer.quantizer]).requires_grad_(requires_grad=False)
    objective = Objective(tokenizer, teacher, build_regularizer(run.regularizer), distillation)
    ratios: dict[nn.Module, float] = {tokenizer.encoder: run.encoder_lr_ratio}
    optimizer = build_optimizer([objective], run.optim, run.train.batch_size, ratios)
    discriminator_optimizer = build_optimizer([discriminator], run.optim, run.train.batch_size)
    check_coverage([objective, discriminator], [optimizer, discriminator_optimizer])
    perceptual = _perceptual(run, device)
    if run.train.compile:
        parts = (objective, discriminator, perceptual, teacher_encoder)
        compile_in_place(parts, num_graphs=2 * len(run.kept.candidates) + 2)
    state = State(
        tokenizer=tokenizer,
        teacher=teacher,
        teacher_encoder=teacher_encoder,
        distillation=distillation,
        discriminator=discriminator,
        lecam=LeCam().to(device),
        optimizer=optimizer,
        discriminator_optimizer=discriminator_optimizer,
        ema=Ema(tokenizer, run.optim.ema_decay),
        usage=_usage(tokenizer.quantizer.spec, device),
        monitor=CollapseMonitor(_COLLAPSE_REPORTS),
        guard=guard_on(device, run.train.max_nonfinite),
        discriminator_guard=guard_on(device, run.train.max_nonfinite),
        scaler=gradient_scaler(device, dtype),
        discriminator_scaler=gradient_scaler(device, dtype),
        budget=Budget(num_steps=run.train.num_steps, max_minutes=run.train.max_minutes),
    )
    return TokenizerLearner(
        run=run,
        world=world,
        state=state,
        objective=distributed.wrap(objective),
        regularizer=objective.regularizer,
        judge=distributed.wrap(discriminator),
        perceptual=perceptual,
        terms=build_terms(run.loss, perceptual),
        dtype=dtype,
    )


def _usage(spec: CodeSpec, device: torch.device) -> SharedUsage | None:
    """A window of tokens; None where they are real numbers."""
    return None if spec.is_continuous else SharedUsage(spec, device=device)


def _perceptual(run: TokenizerRun, device: torch.device) -> Perceptual | None:
    """The LPIPS network, or None and a notice."""
    if run.loss.perceptual_weight == 0:
        return None
    network = load_perceptual(run.loss.perceptual_trunk, run.loss.perceptual_path)
    if network is None:
        logger.warning(
            "training WITHOUT perceptual loss%s: %s",
            " and Gram loss" if run.loss.gram.weight > 0 else "",
            missing_weights(run.loss.perceptual_trunk),
        )
        return None
    return network.to(device)


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
    return send(borders.floor().diff() > 0, image.device)


@torch.no_grad()
def _update_teacher(state: State, momentum: float, verdict: Verdict) -> None:
    """In self-distillation, move the averaged encoder and head after the student's."""
    teacher = state.teacher
    if state.teacher_encoder is None or not isinstance(teacher, SelfTeacher):
        return
    averages: list[Tensor] = [*state.teacher_encoder.parameters()]
    weights: list[Tensor] = [*state.tokenizer.encoder.parameters()]
    verdict.change(averages, lambda: get_ema_multi_avg_fn(momentum)(averages, weights, None))
    verdict.change(teacher.state_dict().values(), lambda: teacher.update(momentum))


def _norm(module: nn.Module) -> Float[Tensor, ""]:
    """Gradient norm of a part of the model."""
    gradients = [p.grad for p in module.parameters() if p.grad is not None]
    return torch.nn.utils.get_total_norm(gradients)
