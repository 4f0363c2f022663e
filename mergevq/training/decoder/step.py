"""One step of training a flow decoder: tokens of a frozen tokenizer, noise and times, the loss.

Source: Bachmann et al. 2025, "FlexTok", section 3 (arXiv:2502.13967).

Everything that is random is drawn for the whole batch and cut to a rank's share or a part of it.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from mergevq.config.parts.flows import FlowConfig, PixelFlow, Times
from mergevq.config.tokenizer import KeptConfig, TokenizerConfig
from mergevq.config.training import DecoderRun
from mergevq.data.batches import Batch, eval_batches
from mergevq.data.images import ImageDataset
from mergevq.data.prepare import Loaded
from mergevq.nn.flow import flow_loss, logit_normal, mix, shift_time
from mergevq.runtime import distributed
from mergevq.runtime.device import autocast, resolve_precision, send
from mergevq.runtime.optim import (
    Budget,
    Ema,
    NonFiniteGuard,
    build_optimizer,
    check_coverage,
    clip,
    gradient_scaler,
    guard_on,
    learning_rate,
    set_learning_rate,
)
from mergevq.runtime.random import BatchNumbers, draw_num_kept
from mergevq.tokenizer.flows.decoder import FlowNetwork
from mergevq.tokenizer.flows.tokens import Shown
from mergevq.tokenizer.tokenizer import Tokenizer
from mergevq.training.fit import Number, cut, warn_of_skip

_NUM_SCALED = 256
"""Training images that the scale of the data is measured on."""
_LEAST_STD = 1e-2
"""Least deviation of a colour, so that images of one colour are data too."""


@dataclass(kw_only=True)
class State:
    """Everything that changes while training; all of it is in a checkpoint."""

    network: FlowNetwork
    optimizer: torch.optim.Optimizer
    ema: Ema
    guard: NonFiniteGuard
    scaler: torch.amp.GradScaler
    budget: Budget
    step: int = 0

    @property
    def guards(self) -> tuple[NonFiniteGuard, ...]:
        """The only guard."""
        return (self.guard,)


@dataclass(frozen=True, kw_only=True)
class DecoderLearner:
    """Everything that takes a step, and what stays the same in a run."""

    run: DecoderRun
    world: distributed.World
    state: State
    wrapped: nn.Module
    """The network, wrapped for several ranks."""
    tokenizer: Tokenizer
    """In evaluation mode, without gradients."""
    counts: tuple[int, ...]
    """Each K that is trained on."""
    dtype: torch.dtype | None
    """Type of autocast; None is float32."""

    def autocast(self) -> torch.autocast:
        """Context of the run's precision."""
        return autocast(self.world.device, self.dtype)

    def step(self, batch: Batch) -> dict[str, Number]:
        """One optimizer step; returns what is worth logging."""
        run, state = self.run, self.state
        num_kept = draw_num_kept(KeptConfig(candidates=self.counts), run.train.seed, state.step)
        rate = learning_rate(
            state.budget.place(state.step), run.optim, run.train.num_steps, run.train.batch_size
        )
        set_learning_rate(state.optimizer, rate)
        state.optimizer.zero_grad(set_to_none=True)
        parts = cut(batch, run.train.accumulation, self.world.device)
        total = torch.zeros((), device=self.world.device)
        for position, part in enumerate(parts):
            syncs = position == len(parts) - 1
            place, count = self.world.rank * len(parts) + position, len(part.image)
            numbers = BatchNumbers(
                seed=run.train.seed,
                step=state.step,
                num_rows=count * len(parts) * self.world.world_size,
                rows=slice(place * count, (place + 1) * count),
            )
            shown = self.shown(part.image, num_kept, numbers)
            with distributed.no_sync(self.wrapped, active=not syncs):
                loss = self.loss(self.wrapped, part.image, shown, numbers)
                state.scaler.scale(loss / len(parts)).backward()
            total += loss.detach() / len(parts)
        state.scaler.unscale_(state.optimizer)
        norm = clip(state.network.parameters(), run.optim.clip_norm)
        warn = functools.partial(warn_of_skip, [batch.index])
        verdict = state.guard.check(state.step, {"loss": total, "grad_norm": norm}, warn)
        verdict.step(state.optimizer)
        state.ema.update(verdict)
        state.scaler.update()
        return {
            "loss": total,
            "grad_norm": norm,
            "lr": rate,
            "num_kept": num_kept,
        }

    @torch.no_grad()
    def tokens(self, image: Float[Tensor, "b 3 h w"], num_kept: int) -> Shown:
        """All tokens of images of a loader, as a decoder is given them."""
        encoded = self.tokenizer.encode(Loaded(image), num_kept)
        codes = self.tokenizer.decoded(encoded.codes).float()
        return Shown(codes, encoded.layout, encoded.grid_shape)

    def shown(self, image: Float[Tensor, "b 3 h w"], num_kept: int, numbers: BatchNumbers) -> Shown:
        """Tokens of images, and by the numbers of a step how many each of them shows."""
        shown, decoder = self.tokens(image, num_kept), self.run.decoder
        choices = torch.tensor(decoder.lengths_of(num_kept))
        lengths = choices[(numbers.even("shown tokens") * len(choices)).long()]
        is_null = numbers.uniform("null") < decoder.null_share
        device = image.device
        return shown._replace(lengths=send(lengths, device), is_null=send(is_null, device))

    def loss(
        self,
        network: nn.Module,
        image: Float[Tensor, "b 3 h w"],
        shown: Shown,
        numbers: BatchNumbers,
    ) -> Float[Tensor, ""]:
        """Error of the velocities that a network gives at random times, one or several an image."""
        decoder = self.run.decoder
        count = decoder.num_draws if isinstance(decoder, PixelFlow) else 1
        data = self.state.network.scaled(image).repeat(count, 1, 1, 1)
        noises = [numbers.normal(f"noise {draw}", *image.shape[1:]) for draw in range(count)]
        times = [draw_times(self.run.times, numbers, draw) for draw in range(count)]
        noise = send(torch.cat(noises), image.device)
        time = send(torch.cat(times), image.device)
        with self.autocast():
            velocity = network(mix(data, noise, time), time, shown)
        return flow_loss(velocity, data, noise)


def draw_times(times: Times, numbers: BatchNumbers, draw: int = 0) -> Float[Tensor, "b"]:
    """Noise levels of images in one of several draws, spread evenly over the law of a batch."""
    # Never 0: its logit has no end.
    uniforms = numbers.even(f"times {draw}").clamp(min=2**-24)
    drawn = uniforms if times.law == "uniform" else logit_normal(uniforms)
    return shift_time(drawn, times.shift)


def flow_config(run: DecoderRun, tokenizer: TokenizerConfig) -> FlowConfig:
    """The decoder of a run for a tokenizer.

    Raises:
        ValueError: they do not fit, or the tokenizer does not give a K that is asked for.
    """
    ordered = tokenizer.kept_by.gives != "source"
    return FlowConfig(
        decoder=run.decoder,
        times=run.times,
        solution=run.solution,
        code_dim=tokenizer.decoded_dim,
        num_slots=max(kept_counts(run, tokenizer)) if ordered else None,
        cell_size=tokenizer.patch_size,
    )


def kept_counts(run: DecoderRun, tokenizer: TokenizerConfig) -> tuple[int, ...]:
    """Each K of a run; a ValueError where the tokenizer does not give one."""
    counts = run.num_kept or (tokenizer.num_kept,)
    for num_kept in (*counts, *run.train.eval_num_kept):
        tokenizer.kept_by.check_kept((tokenizer.grid_size, tokenizer.grid_size), num_kept)
    return counts


def measure_scale(
    dataset: ImageDataset, image_size: int
) -> tuple[Float[Tensor, "3"], Float[Tensor, "3"]]:
    """Mean and deviation of each colour over some training images, evenly spaced."""
    batches = eval_batches(
        dataset,
        image_size=image_size,
        batch_size=_NUM_SCALED,
        max_images=_NUM_SCALED,
        num_workers=0,
    )
    pixels = torch.cat([batch.image for batch in batches]).transpose(0, 1).flatten(1).double()
    return pixels.mean(1).float(), pixels.std(1).clamp_min(_LEAST_STD).float()


def build(
    run: DecoderRun,
    world: distributed.World,
    tokenizer: Tokenizer,
    scale: Sequence[Float[Tensor, "3"]],
) -> DecoderLearner:
    """Make everything a run needs, the same on every rank.

    Args:
        run: all settings.
        world: the ranks.
        tokenizer: in evaluation mode, on its device; its gradients are turned off.
        scale: of `measure_scale`.

    Raises:
        ValueError: the decoder does not fit the tokenizer.
    """
    config = flow_config(run, tokenizer.config)
    # The only use of the global generator: it fills fresh weights, and is put back after.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(run.train.seed)  # noqa: TID251 - layers fill themselves from it
        network = FlowNetwork(config)
    network.mean.copy_(scale[0])
    network.std.copy_(scale[1])
    network.flow.checkpointing = run.train.checkpointing
    network.to(world.device).train()
    dtype = resolve_precision(run.train.precision, world.device)
    optimizer = build_optimizer([network], run.optim, run.train.batch_size)
    check_coverage([network], [optimizer])
    state = State(
        network=network,
        optimizer=optimizer,
        ema=Ema(network, run.optim.ema_decay),
        guard=guard_on(world.device, run.train.max_nonfinite),
        scaler=gradient_scaler(world.device, dtype),
        budget=Budget(num_steps=run.train.num_steps, max_minutes=run.train.max_minutes),
    )
    return DecoderLearner(
        run=run,
        world=world,
        state=state,
        wrapped=distributed.wrap(network),
        tokenizer=tokenizer.eval().requires_grad_(requires_grad=False),
        counts=kept_counts(run, tokenizer.config),
        dtype=dtype,
    )
