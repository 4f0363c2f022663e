"""From gradients to weights: parameter groups, AdamW, schedules, clipping and weight averages."""

import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from mergevq.config.training import OptimConfig
from mergevq.runtime import distributed
from mergevq.runtime.artefacts import compare_states
from mergevq.runtime.device import has_fused_optimizers, steps_between_reads

_EACH = torch.ops.aten
"""Operators on many tensors at once, for which torch has no public names."""
_WHOLE = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
"""Whole numbers of a size in bytes."""

# ------------------------------------------------------------------------------------ optimizer


def parameter_groups(
    module: nn.Module, weight_decay: float, ratios: Mapping[nn.Module, float] | None = None
) -> list[dict[str, Any]]:
    """Trainable parameters as groups: matrices, which decay, and the rest.

    A matrix is a linear or convolution weight: two or more dimensions, not in an embedding layer.
    Gains and biases have one dimension.

    Args:
        module: all of them.
        weight_decay: of matrices.
        ratios: learning rate of some parts over that of the rest; such a part has groups of its
            own, whose `lr_ratio` says so.
    """
    groups: list[dict[str, Any]] = []
    slower = [(part, ratio) for part, ratio in (ratios or {}).items() if ratio != 1]
    apart = {parameter for part, _ in slower for parameter in part.parameters()}
    for part, ratio in slower:
        groups += [each | {"lr_ratio": ratio} for each in _decay_groups(part, weight_decay, set())]
    return _decay_groups(module, weight_decay, apart) + groups


def _decay_groups(
    module: nn.Module, weight_decay: float, apart: set[nn.Parameter]
) -> list[dict[str, Any]]:
    """At most two groups of the trainable parameters that are not elsewhere."""
    groups: dict[float, dict[nn.Parameter, None]] = {weight_decay: {}, 0.0: {}}
    for owner in module.modules():
        for parameter in owner.parameters(recurse=False):
            exempt = parameter.ndim < 2 or isinstance(owner, nn.Embedding)
            if parameter.requires_grad and parameter not in apart:
                groups[0.0 if exempt else weight_decay][parameter] = None
    return [
        {"params": list(parameters), "weight_decay": decay}
        for decay, parameters in groups.items()
        if parameters
    ]


def build_optimizer(
    modules: Sequence[nn.Module],
    config: OptimConfig,
    batch_size: int,
    ratios: Mapping[nn.Module, float] | None = None,
) -> torch.optim.AdamW:
    """AdamW over the trainable parameters of all modules, at the peak learning rate.

    Args:
        modules: unwrapped; a parameter in two of them is updated once.
        config: rate, moments and decay.
        batch_size: images per optimizer step over all ranks.
        ratios: learning rate of some parts over that of the rest.
    """
    groups = parameter_groups(nn.ModuleList(modules), config.weight_decay, ratios)
    devices = {parameter.device for group in groups for parameter in group["params"]}
    return torch.optim.AdamW(
        groups,
        lr=peak_learning_rate(config, batch_size),
        betas=config.betas,
        # Elsewhere torch picks between its foreach kernels and a loop.
        fused=True if all(map(has_fused_optimizers, devices)) else None,
    )


def check_coverage(
    modules: Sequence[nn.Module], optimizers: Sequence[torch.optim.Optimizer]
) -> None:
    """Check that every trainable parameter is in exactly one optimizer, and nothing else is.

    Raises:
        RuntimeError: lists parameters in none or in several, and counts those of other modules.
    """
    updates: dict[nn.Parameter, int] = {}
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                updates[parameter] = updates.get(parameter, 0) + 1
    names = {
        parameter: f"{type(module).__name__}.{name}"
        for module in modules
        for name, parameter in module.named_parameters()
        if parameter.requires_grad
    }
    none = [name for parameter, name in names.items() if parameter not in updates]
    several = [name for parameter, name in names.items() if updates.get(parameter, 0) > 1]
    num_foreign = len(updates.keys() - names.keys())
    if none or several or num_foreign:
        raise RuntimeError(
            "every trainable parameter must be in exactly one optimizer; "
            f"in none: {', '.join(none) or '-'}; in several: {', '.join(several) or '-'}; "
            f"of no given module or frozen: {num_foreign}"
        )


# ------------------------------------------------------------------------------------- schedule


def peak_learning_rate(config: OptimConfig, batch_size: int) -> float:
    """The rate after warm-up: `lr`, scaled linearly from the batch size it was chosen for."""
    return config.lr * batch_size / (config.base_batch_size or batch_size)


def learning_rate(step: int, config: OptimConfig, num_steps: int, batch_size: int) -> float:
    """The rate of one optimizer step.

    Warm-up is the line from 0 just before the first step to the peak at step `warmup_steps`. What
    follows ends, at the last step, on `final_lr_ratio` times the peak (cosine and linear).

    Args:
        step: from 0.
        config: rate and schedule.
        num_steps: of the whole run; later steps keep the last rate.
        batch_size: images per optimizer step over all ranks.
    """
    peak = peak_learning_rate(config, batch_size)
    if step < config.warmup_steps:
        return peak * (step + 1) / (config.warmup_steps + 1)
    if config.schedule == "constant":
        return peak
    if config.schedule == "step":
        return peak * 0.1 ** sum(step >= share * num_steps for share in config.milestones)
    num_decay_steps = max(1, num_steps - 1 - config.warmup_steps)
    progress = min(1.0, (step - config.warmup_steps) / num_decay_steps)
    remaining = 1 - progress
    if config.schedule == "cosine":
        remaining = 0.5 * (1 + math.cos(math.pi * progress))
    return peak * (config.final_lr_ratio + (1 - config.final_lr_ratio) * remaining)


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Give every group this rate, or its own share of it."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group.get("lr_ratio", 1.0)


# ------------------------------------------------------------------------------------ gradients


def clip(parameters: Iterable[nn.Parameter], max_norm: float | None) -> Float[Tensor, ""]:
    """Scale all gradients together so that their joint L2 norm is at most `max_norm`.

    Args:
        parameters: those without a gradient do not count.
        max_norm: None only measures.

    Returns:
        The norm before scaling, on the gradients' device. If it is not finite no gradient is fit
        for use: the caller must skip the step (`NonFiniteGuard`).
    """
    with_gradient = [parameter for parameter in parameters if parameter.grad is not None]
    gradients = [parameter.grad for parameter in with_gradient if parameter.grad is not None]
    norm = torch.nn.utils.get_total_norm(gradients)
    if max_norm is not None:
        torch.nn.utils.clip_grads_with_norm_(with_gradient, max_norm, norm)
    return norm


def gradient_scaler(device: torch.device, dtype: torch.dtype | None) -> torch.amp.GradScaler:
    """Loss scaling for float16, whose range is too small for gradients; does nothing otherwise."""
    return torch.amp.GradScaler(device.type, enabled=dtype is torch.float16)


@dataclass(kw_only=True, eq=False)
class Verdict:
    """The decision whether a step is taken, which the host may not have read yet.

    Where it has, nothing is done in a step that is skipped. Where it has not, everything is done
    and undone on the device, to the same bits, and nothing waits.
    """

    skip: Float[Tensor, ""]
    """1 if the step is to be skipped and 0 if not, in float32 on the device."""
    is_skipped: bool | None = None
    """The decision on the host; None until the guard has read it."""

    def step(self, optimizer: torch.optim.Optimizer) -> None:
        """Take the step of an optimizer, or leave weights and moments as they are.

        Raises:
            ValueError: the decision is on the device, and the optimizer is not a fused one.
        """
        if self.is_skipped is not None:
            if not self.is_skipped:
                optimizer.step()
            return
        if not optimizer.defaults.get("fused"):
            raise ValueError(
                f"{type(optimizer).__name__} must be fused to skip a step on the device; make it "
                "with fused=True, or a guard with read_every=1"
            )
        # As GradScaler does: fused kernels look at it themselves.
        undone: Any = optimizer
        undone.grad_scale, undone.found_inf = None, self.skip
        try:
            optimizer.step()
        finally:
            del undone.grad_scale, undone.found_inf

    def change(self, tensors: Iterable[Tensor], change: Callable[[], object]) -> None:
        """Call `change`, unless the step is skipped; on the device, put the tensors back.

        Args:
            tensors: everything that `change` writes to, in place.
            change: has no other effect.
        """
        if self.is_skipped is not None:
            if not self.is_skipped:
                change()
            return
        changed = [distributed.own_part(tensor.detach()) for tensor in tensors]
        before = [tensor.clone() for tensor in changed]
        change()
        _put_back(changed, before, self.skip)


def _put_back(changed: Sequence[Tensor], before: Sequence[Tensor], skip: Float[Tensor, ""]) -> None:
    """Give tensors their earlier bits where `skip` is 1, for few launches on a GPU.

    Bits are whole numbers, which wrap around: now + 1 (before - now) is before, and not NaN where
    one of both is.
    """
    groups: dict[torch.dtype, list[tuple[Tensor, Tensor]]] = {}
    for now, old in zip(changed, before, strict=True):
        dtype = _WHOLE[now.element_size()]
        groups.setdefault(dtype, []).append((now.view(dtype), old.view(dtype)))
    for dtype, pairs in groups.items():
        present = [now for now, _ in pairs]
        back = _EACH._foreach_sub.List([old for _, old in pairs], present)
        _EACH._foreach_mul_.Tensor(back, skip.to(dtype))
        _EACH._foreach_add_.List(present, back)


class _Pending(NamedTuple):
    """A step whose verdict the host has not read."""

    step: int
    names: list[str]
    values: Float[Tensor, "t"]
    """Value of each term on this rank."""
    num_ranks: Int64[Tensor, "t"]
    """Number of ranks on which each is not finite."""
    verdict: Verdict
    warn: Callable[[int], None] | None


class NonFiniteGuard:
    """Decides whether a step may be taken, the same on every rank, and gives up in the end.

    The decision is made on the device. The host reads it every `read_every` steps, and before that
    when asked; only then it counts, warns and gives up.
    """

    def __init__(self, limit: int, *, read_every: int = 1) -> None:
        """Start without a step.

        Args:
            limit: steps skipped in a row after which reading raises.
            read_every: steps after which the host waits for the device.
        """
        self.limit = limit
        self.read_every = read_every
        self.num_skipped = 0
        """Steps skipped since the run began, of those that were read."""
        self.num_in_a_row = 0
        """Steps skipped since the last one that was taken, of those that were read."""
        self._pending: list[_Pending] = []

    def check(
        self,
        step: int,
        terms: Mapping[str, Float[Tensor, ""]],
        warn: Callable[[int], None] | None = None,
        num_ranks: Int64[Tensor, "t"] | None = None,
    ) -> Verdict:
        """Decide: a step is taken if every term is finite on every rank.

        Args:
            step: for messages.
            terms: losses and gradient norms by name; the same names on every rank.
            warn: called with the step when the host reads that it was skipped.
            num_ranks: the sum over ranks of `non_finite`; None sums here.

        Raises:
            RuntimeError: as `read`.
        """
        values = _values(terms)
        if num_ranks is None:
            num_ranks = distributed.sum(non_finite(terms))
        verdict = Verdict(skip=num_ranks.any().float())
        self._pending.append(_Pending(step, list(terms), values, num_ranks, verdict, warn))
        if len(self._pending) >= self.read_every:
            self.read()
        return verdict

    def read(self) -> None:
        """Read all verdicts that are not read yet; waits for the device if there are any.

        Raises:
            RuntimeError: one was the last of `limit` steps in a row that had to be skipped.
        """
        pending, self._pending = self._pending, []
        if not pending:
            return
        num_ranks = torch.cat([each.num_ranks for each in pending]).tolist()
        for each in pending:
            found, num_ranks = num_ranks[: len(each.names)], num_ranks[len(each.names) :]
            self._count(each, found)

    def _count(self, pending: _Pending, num_ranks: list[int]) -> None:
        """Count a step; the RuntimeError of `read` if it is one too many."""
        pending.verdict.is_skipped = any(num_ranks)
        if not any(num_ranks):
            self.num_in_a_row = 0
            return
        self.num_skipped += 1
        self.num_in_a_row += 1
        if self.num_in_a_row >= self.limit:
            found = [
                f"{name} ({value:g} on this rank)"
                for name, value, count in zip(
                    pending.names, pending.values.tolist(), num_ranks, strict=True
                )
                if count
            ]
            raise RuntimeError(
                f"{self.num_in_a_row} steps in a row were not finite, up to step {pending.step}: "
                f"{', '.join(found)}; lower optim.lr, or set train.precision to float32"
            )
        if pending.warn is not None:
            pending.warn(pending.step)

    def state_dict(self) -> dict[str, int]:
        """Both counts."""
        self.read()
        return {"num_skipped": self.num_skipped, "num_in_a_row": self.num_in_a_row}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Continue counting."""
        self.num_skipped, self.num_in_a_row = state["num_skipped"], state["num_in_a_row"]
        self._pending = []


def non_finite(terms: Mapping[str, Float[Tensor, ""]]) -> Int64[Tensor, "t"]:
    """1 of each term that is not finite on this rank, and 0 of others."""
    return (~_values(terms).isfinite()).long()


def _values(terms: Mapping[str, Float[Tensor, ""]]) -> Float[Tensor, "t"]:
    """Terms side by side, in float32."""
    return torch.stack([term.detach().float() for term in terms.values()])


@dataclass(frozen=True, kw_only=True)
class Proposal:
    """A step of one optimizer that has its gradients, and is decided with others."""

    guard: NonFiniteGuard
    terms: Mapping[str, Float[Tensor, ""]]
    """Losses and gradient norms that have to be finite, by name."""
    warn: Callable[[int], None]
    """Called with the step when the host reads that it was skipped."""
    statistics: Sequence[Tensor]
    """Numbers of this rank that the step takes the sums over ranks of."""
    take: Callable[[Verdict, list[Tensor]], None]
    """Take the step, as the verdict allows, given the sums."""


def take_steps(step: int, proposals: Sequence[Proposal]) -> None:
    """Decide on steps of several optimizers, and take them, in one collective; every rank calls.

    Raises:
        RuntimeError: as of `NonFiniteGuard.read`.
    """
    own = [[non_finite(each.terms), *each.statistics] for each in proposals]
    summed = iter(distributed.sums([tensor for tensors in own for tensor in tensors]))
    for each in proposals:
        num_ranks = next(summed)
        sums = [next(summed) for _ in each.statistics]
        each.take(each.guard.check(step, each.terms, each.warn, num_ranks), sums)


def guard_on(device: torch.device, limit: int) -> NonFiniteGuard:
    """A guard of `limit` that is read as often as the device bears."""
    return NonFiniteGuard(limit, read_every=steps_between_reads(device))


# ------------------------------------------------------------------------------ weight averages


class Ema:
    """Exponential moving average of a module's weights, in float32 whatever the module's dtype.

    Parameters and floating point buffers are averaged; other buffers are used as they are.
    """

    def __init__(self, module: nn.Module, decay: float) -> None:
        """Start from the module's present weights.

        Args:
            module: unwrapped and without frozen networks, on its final device.
            decay: share of the old average kept in each update, approached from below: update n,
                from 0, keeps at most (1 + n) / (10 + n), else the random start would outlast a
                short run.
        """
        self.module = module
        self.decay = decay
        self.num_updates = 0
        self._open: list[Verdict] = []
        """Verdicts on updates that may turn out not to count."""
        self.shadow = {name: t.float().clone() for name, t in self._current().items()}

    def update(self, verdict: Verdict | None = None) -> None:
        """Move the average towards the present weights, once per optimizer step that is taken.

        Args:
            verdict: on the step; None takes it. One that the host has not read counts as an update
                until it has, so that the weight of the next ones stays a number of the host.
        """
        self._settle()
        verdict = verdict or Verdict(skip=torch.zeros(()), is_skipped=False)
        decay = min(self.decay, (1 + self.num_updates) / (10 + self.num_updates))
        shadow = list(self.shadow.values())

        def move() -> None:
            current = [tensor.float() for tensor in self._current().values()]
            get_ema_multi_avg_fn(decay)(shadow, current, None)

        verdict.change(shadow, move)
        self.num_updates += 1
        self._open.append(verdict)
        self._settle()

    def _settle(self) -> None:
        """Take back the count of steps that are now known to have been skipped."""
        self.num_updates -= [verdict.is_skipped for verdict in self._open].count(True)
        self._open = [verdict for verdict in self._open if verdict.is_skipped is None]

    @contextmanager
    def swap(self) -> Iterator[None]:
        """The module has the averaged weights inside, and its own again after."""
        current = self._current()
        own = {name: tensor.clone() for name, tensor in current.items()}
        try:
            for name, tensor in current.items():
                tensor.copy_(self.shadow[name])
            yield
        finally:
            for name, tensor in current.items():
                tensor.copy_(own[name])

    def state_dict(self) -> dict[str, Any]:
        """The averages and the number of updates; tensors share memory with this object.

        The guard of the steps is read before.
        """
        self._settle()
        return {"num_updates": self.num_updates, "shadow": dict(self.shadow)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Copy averages in; a ValueError lists names and shapes that do not fit."""
        compare_states(self.shadow, state["shadow"], name="the averaged weights")
        for name, tensor in self.shadow.items():
            tensor.copy_(state["shadow"][name])
        self.num_updates, self._open = state["num_updates"], []

    def _current(self) -> dict[str, Tensor]:
        """The module's own tensors, looked up anew because buffers may have been replaced."""
        state = self.module.state_dict()
        return {name: tensor for name, tensor in state.items() if tensor.is_floating_point()}


@dataclass(kw_only=True)
class Budget:
    """Steps and minutes that a run may take, and the time that it has used; part of its state.

    A recipe's schedules are written for a number of steps. A run that also has a limit on its time
    goes through all of them in that time, however many steps it manages: rates fall to their last
    value, an adversary enters, in the share of the run that the recipe gives them.
    """

    num_steps: int
    """Steps of the whole run, at most."""
    max_minutes: float | None = None
    """Minutes of the whole run, at most; None is no limit."""
    seconds: float = 0.0
    """Time used so far, before earlier stops too; the same on every rank."""
    _started_at: float = field(default=0.0, repr=False)

    @property
    def share(self) -> float:
        """Share of the time that is used; 0 where there is no limit."""
        return 0.0 if self.max_minutes is None else self.seconds / (60 * self.max_minutes)

    def start(self) -> None:
        """Begin to count, where an earlier sitting ended."""
        self._started_at = time.monotonic() - self.seconds

    def update(self) -> None:
        """Look at the main rank's clock; every rank calls it, and all find the same time."""
        if self.max_minutes is not None:
            seconds = time.monotonic() - self._started_at if distributed.is_main() else 0.0
            self.seconds = float(distributed.sum(torch.tensor(seconds, dtype=torch.float64)))

    def place(self, step: int) -> int:
        """Step of the schedules at a step of the run: the same, or later where time is shorter.

        Of a run that has used the share s of its time it is at least s times `num_steps`.
        """
        return max(step, min(int(self.share * self.num_steps), self.num_steps - 1))

    def is_used(self, step: int) -> bool:
        """Whether no more is to be done after so many steps."""
        return step >= self.num_steps or self.share >= 1

    def numbers(self) -> dict[str, float]:
        """The share used, for the log; nothing where there is no limit."""
        return {} if self.max_minutes is None else {"time_used": self.share}

    def state_dict(self) -> dict[str, float]:
        """The time used."""
        return {"seconds": self.seconds}

    def load_state_dict(self, state: Mapping[str, float]) -> None:
        """Go on from that time; limits are those of this run."""
        self.seconds = state["seconds"]
