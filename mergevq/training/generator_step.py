"""One step of a generator's training: its network, loss and optimizer.

Source: Li et al. 2025, "MergeVQ", section 3.4 and table A2 (arXiv:2504.00999); Pang et al. 2024,
"RandAR", section 3 (arXiv:2412.01827).

Dropped labels and orders are drawn for the whole batch and cut to a rank's share or a part of it,
and so is dropout, which starts anew in every step.

"""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from mergevq.config.base import LayoutKind
from mergevq.config.generator import (
    GeneratorConfig,
)
from mergevq.config.training import GeneratorRun
from mergevq.data.tokens.dataset import TokenBatch
from mergevq.data.tokens.files import TokenRecord, require_tokenizer
from mergevq.generator.autoregressive import Autoregressive
from mergevq.generator.build import AnyGenerator, build_generator
from mergevq.generator.orders.scale import Scale
from mergevq.generator.seams import GeneratorLoss, Sequences
from mergevq.nn.llama import set_share
from mergevq.runtime import distributed
from mergevq.runtime.artefacts import resolve, tokens_hash
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
from mergevq.runtime.random import BatchNumbers, step_generator
from mergevq.tokenizer.quantizers.grids.scales import Scales
from mergevq.tokenizer.tokenizer import Tokenizer
from mergevq.training.fit import Number
from mergevq.training.initial import initialize_generator_from

_LAYOUTS: dict[LayoutKind, str] = {
    "source": "have a source map",
    "ordered": "are ordered, without a place on the grid",
    "holistic": "are of the whole image and then of each cell",
    "scales": "are of a grid at several scales",
}
"""Layouts of tokens, in words."""
_ORDERS: dict[LayoutKind, str] = {
    "source": "merge or random",
    "ordered": "ordered",
    "holistic": "holistic",
    "scales": "scale",
}
"""Orders of a generator for tokens of a layout."""
_PARTS: dict[LayoutKind, str] = {
    "source": "reducer.kind is merge or pool",
    "ordered": "reducer.kind is queries",
    "holistic": "reducer.kind is holistic",
    "scales": "quantizer.kind is scales",
}
"""Parts of a tokenizer that leave tokens with a layout."""


@dataclass(kw_only=True)
class State:
    """Everything that changes while training; all of it is in a checkpoint."""

    generator: AnyGenerator
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
class GeneratorLearner:
    """Everything that takes a step: network and optimizer, and what stays the same in a run."""

    run: GeneratorRun
    world: distributed.World
    state: State
    wrapped: nn.Module
    """The generator, wrapped or sharded for several ranks."""
    dtype: torch.dtype | None
    """Type of autocast; None is float32."""

    def autocast(self) -> torch.autocast:
        """Context of the run's precision."""
        return autocast(self.world.device, self.dtype)

    def step(
        self, batch: TokenBatch, warn: Callable[[int], None] | None = None
    ) -> dict[str, Number]:
        """One optimizer step; returns what is worth logging.

        Args:
            batch: this rank's.
            warn: called with the step when the host reads that it was skipped.
        """
        run, state, sums = self.run, self.state, {}
        num_kept = batch.layout.num_kept
        rate = learning_rate(
            state.budget.place(state.step), run.optim, run.train.num_steps, run.train.batch_size
        )
        set_learning_rate(state.optimizer, rate)
        state.optimizer.zero_grad(set_to_none=True)
        parts = self._draw(batch).cut(run.train.accumulation)
        first, count = self.world.rank * len(parts), self.world.world_size * len(parts)
        for position, part in enumerate(parts):
            syncs = position == len(parts) - 1
            set_share(state.generator, first + position, count)
            with (
                self._dropout_numbers(),
                distributed.no_sync(self.wrapped, active=not syncs),
            ):
                with self.autocast():
                    loss = self.wrapped(part)
                # Inside, because activations may be computed again, with the same numbers.
                state.scaler.scale(loss.total / len(parts)).backward()
            for name, value in _terms(state.generator, loss).items():
                sums[name] = sums.get(name, 0) + value.detach() / len(parts)
        state.scaler.unscale_(state.optimizer)
        norm = distributed.whole(clip(state.generator.parameters(), run.optim.clip_norm))
        verdict = state.guard.check(state.step, sums | {"grad_norm": norm}, warn)
        verdict.step(state.optimizer)
        state.ema.update(verdict)
        state.scaler.update()
        return sums | {"grad_norm": norm, "lr": rate, "num_kept": num_kept}

    def _draw(self, batch: TokenBatch) -> Sequences:
        """This rank's sequences with all that is random drawn, as one process would for all."""
        state, world, share = self.state, self.world, len(batch.label)
        numbers = BatchNumbers(
            seed=self.run.train.seed,
            step=state.step,
            num_rows=share * world.world_size,
            rows=slice(world.rank * share, (world.rank + 1) * share),
            progress=state.budget.place(state.step) / self.run.train.num_steps,
        )
        return state.generator.draw(to_sequences(state.generator, batch), numbers)

    @contextlib.contextmanager
    def _dropout_numbers(self) -> Iterator[None]:
        """Inside, dropout's numbers start from seed and step alone: those of the whole batch."""
        device = self.world.device
        devices = [device] if device.type == "cuda" else []
        numbers = step_generator(self.run.train.seed, "dropout", 0, self.state.step)
        # Dropout has no generator argument: it draws from torch's own, which is put back after.
        with torch.random.fork_rng(devices=devices):
            torch.manual_seed(numbers.initial_seed())  # noqa: TID251
            yield


def build(run: GeneratorRun, world: distributed.World, record: TokenRecord) -> GeneratorLearner:
    """Make everything a run needs, the same on every rank.

    Raises:
        ValueError: the tokens, their tokenizer or the weights to start from do not fit the run.
    """
    config = fitted_config(run, record)
    require_tokenizer(record, tokens_hash(resolve(run.tokens.tokenizer)))
    # The only use of the global generator: it fills fresh weights, and is put back after.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(run.train.seed)  # noqa: TID251 - layers fill themselves from it
        generator = build_generator(config)
    if run.init_from is not None:
        initialize_generator_from(generator, run.init_from, record.identity)
    if isinstance(generator, Autoregressive) and isinstance(generator.order, Scale):
        _take_codes(generator.order, run)
    device = world.device
    dtype = resolve_precision(run.train.precision, device)
    generator.train()
    generator.network.checkpointing = run.train.checkpointing
    if run.parallel == "fsdp":
        units = [*generator.blocks, generator.network.get_submodule("head")]
        wrapped = distributed.shard(generator, units, device=device, dtype=dtype)
    else:
        wrapped = distributed.wrap(generator.to(device))
    optimizer = build_optimizer([generator], run.optim, run.train.batch_size)
    check_coverage([generator], [optimizer])
    state = State(
        generator=generator,
        optimizer=optimizer,
        ema=Ema(generator, run.optim.ema_decay),
        guard=guard_on(device, run.train.max_nonfinite),
        scaler=gradient_scaler(device, dtype),
        budget=Budget(num_steps=run.train.num_steps, max_minutes=run.train.max_minutes),
    )
    return GeneratorLearner(run=run, world=world, state=state, wrapped=wrapped, dtype=dtype)


def _take_codes(order: Scale, run: GeneratorRun) -> None:
    """Copy codes and filters of the tokens' tokenizer, of whose sums the inputs are made."""
    quantizer = Tokenizer.from_pretrained(resolve(run.tokens.tokenizer)).quantizer
    if isinstance(quantizer, Scales):
        scales, table = quantizer.config.scales, quantizer.table
        order.take_codes(scales, table.codes(), quantizer.kernels())


def fitted_config(run: GeneratorRun, record: TokenRecord) -> GeneratorConfig:
    """The run's architecture with the classes of the tokens.

    Raises:
        ValueError: the tokens have another grid, number of bits, K or number of classes.
    """
    model = run.resolved_model
    if record.layout != model.order.layout:
        raise ValueError(
            f"the tokens of {run.tokens.path} {_LAYOUTS[record.layout]}, and model.order.kind "
            f"{model.order.kind} makes tokens that {_LAYOUTS[model.order.layout]}: set "
            f"model.order.kind to {_ORDERS[record.layout]}, or take a tokenizer whose "
            f"model.{_PARTS[model.order.layout]}"
        )
    if not record.has_index:
        raise ValueError(
            f"the tokens of {run.tokens.path} have {record.bits:.5g} bits, and a generator takes "
            "tokens of at most 63: take a tokenizer of fewer bits"
        )
    for name, wanted, found in (
        ("model.grid_size", model.grid_size, record.grid_shape),
        ("model.order.num_holistic", model.num_holistic, record.num_holistic),
        ("the product of model.head.sizes", model.num_codes, record.num_values),
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


def to_sequences(generator: AnyGenerator, batch: TokenBatch) -> Sequences:
    """Turn a batch of files into sequences of a generator, on its device."""
    config, device = generator.config, generator.device
    label = send(torch.where(batch.label < 0, config.null_class, batch.label), device)
    indices = send(batch.indices, device)
    if config.order.layout != "source":
        return Sequences(indices=indices, class_label=label, num_kept=batch.layout.num_kept)
    source = batch.source
    if config.order.reads == "cells":
        cells = send(source.index, device)
        return Sequences(
            indices=indices.gather(1, cells),
            class_label=label,
            num_kept=source.num_kept,
            source_index=cells,
        )
    return Sequences(
        indices=indices,
        class_label=label,
        num_kept=source.num_kept,
        anchors=send(source.anchors(), device),
    )


def _terms(generator: AnyGenerator, loss: GeneratorLoss) -> dict[str, Tensor]:
    """Everything in a loss by name."""
    parts = zip(generator.config.part_names, loss.parts, strict=True)
    return {"loss": loss.total, "nll": loss.nll} | {f"loss_{name}": term for name, term in parts}
