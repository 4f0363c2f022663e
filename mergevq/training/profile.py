"""Where the time of a step goes: every moment of it is charged to one part of the model."""

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.profiler import record_function

_USER_SCOPE = 7
"""Kind of event that `record_function` makes, in torch's numbers."""


class Part(NamedTuple):
    """A part of a step."""

    name: str
    seconds: float
    """Mean per step, forward and backward."""
    share: float
    """Share of the whole step."""


def named_parts(module: nn.Module) -> dict[str, list[nn.Module]]:
    """Modules of at most two names, such as `encoder.stem`; of a list inside, items and layers.

    What an item does between its layers, such as merging, is a part of its own.
    """
    found: dict[str, list[nn.Module]] = {}
    for name, part in module.named_modules():
        if isinstance(part, nn.ModuleList) and name.count(".") in {1, 2}:
            found[f"{name}, between layers"] = list(part)
            found[name] = [layer for item in part for layer in item.children()]
        elif name and name.count(".") < 2:
            found[name] = [part]
    return found


def profile_parts(
    step: Callable[[], object],
    modules: Mapping[str, Sequence[nn.Module]],
    device: torch.device,
    *,
    num_repeats: int,
) -> list[Part]:
    """Share of a step that each module takes, forward and backward; the longest first.

    Every moment of a step is charged to one part, so shares sum to 1: to the innermost module or
    `record_function`, and the backward pass of an operation to the part of its forward pass. What
    is in none, and adding up gradients, is `other`.

    Args:
        step: forward and backward pass of the modules.
        modules: by the name of their part.
        device: where they compute; on a GPU its time is charged, elsewhere the processor's.
        num_repeats: steps to take the mean of, after one to warm up.
    """
    step()
    kinds = [torch.profiler.ProfilerActivity.CPU]
    if device.type == "cuda":
        kinds.append(torch.profiler.ProfilerActivity.CUDA)
    with labelled(modules), torch.profiler.profile(activities=kinds) as profiler:
        for _ in range(num_repeats):
            with record_function("other"):
                step()
    seconds: dict[str, float] = {}
    for event, part in by_part(profiler.events() or ()):
        on_gpu = device.type == "cuda"
        spent = event.self_device_time_total if on_gpu else event.self_cpu_time_total
        seconds[part] = seconds.get(part, 0.0) + 1e-6 * spent
    total = sum(seconds.values())
    parts = [Part(name, spent / num_repeats, spent / total) for name, spent in seconds.items()]
    return sorted(parts, key=lambda part: -part.seconds)


@contextlib.contextmanager
def labelled(modules: Mapping[str, Sequence[nn.Module]]) -> Iterator[None]:
    """Inside, calls of modules are recorded under the names of their parts."""
    calls: list[record_function] = []

    def enter(name: str) -> None:
        calls.append(record_function(name))
        calls[-1].__enter__()

    def leave() -> None:
        calls.pop().__exit__(None, None, None)

    hooks = []
    for name, items in modules.items():
        for module in items:
            hooks.append(module.register_forward_pre_hook(lambda *_, name=name: enter(name)))
            # Also after an exception, by which checkpointing ends a second forward pass.
            hooks.append(module.register_forward_hook(lambda *_: leave(), always_call=True))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def by_part(events: Iterable[Any]) -> Iterator[tuple[Any, str]]:
    """Each operation of a profile with the part that it belongs to, in order of time.

    Args:
        events: of `torch.profiler`, made inside `labelled`.
    """
    parts: dict[int, str] = {}
    by_number: dict[int, str] = {}
    for event in sorted(events, key=lambda event: event.time_range.start):
        if event.device_type.name != "CPU":
            continue  # A kernel, whose time is that of the operation that started it too.
        part = parts.get(event.cpu_parent.id, "other") if event.cpu_parent else "other"
        if event.scope == _USER_SCOPE:
            part = event.name.partition("#")[0]
        elif event.name.startswith("autograd::engine::evaluate_function"):
            part = by_number.get(event.sequence_nr, "other")
        elif event.sequence_nr >= 0:
            # An operation and its backward pass have the same number.
            by_number[event.sequence_nr] = part
        parts[event.id] = part
        yield event, part
