"""How fast the tokenizer is and what memory it takes, beside plain definitions of the same.

Ways that are compared take turns, so that what else the machine does falls on all of them alike; a
time is the median after one call to warm up. The plain definitions are in `benchmarks/reference.py`
of the repository: they are no part of the package, and without that file nothing is compared.
"""

import functools
import importlib.util
import itertools
import math
import multiprocessing
import os
import statistics
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from mergevq.config.objective import LossConfig, view_sizes
from mergevq.config.parts import Lfq
from mergevq.config.tokenizer import KeptConfig
from mergevq.config.training import TokenizerRun
from mergevq.data.batches import Batch
from mergevq.data.layouts import Source, canonicalize, unmerge
from mergevq.nn.rows import take_rows
from mergevq.runtime import distributed
from mergevq.runtime.device import resolve_device
from mergevq.runtime.environment import give_back_freed_memory
from mergevq.runtime.optim import Ema
from mergevq.runtime.run import environment
from mergevq.tokenizer.conditions.values import condition_of
from mergevq.tokenizer.quantizers.lfq import quantize_losses
from mergevq.tokenizer.reducers.matching import match, merge_schedule, merge_step
from mergevq.tokenizer.seams import Encoded
from mergevq.training.profile import Part, named_parts, profile_parts
from mergevq.training.tokenizer_step import TokenizerLearner, build

MAX_DENSE_CELLS = 2**28
"""Largest table of tokens x codes that the plain definition is asked to fill: 1 GiB, 6 times."""
_LONG_LOSS = 5.0
"""Seconds from which a loss of the quantizer is not computed again for a better estimate."""
_TOLERANCE = 1e-3
"""Relative difference up to which two ways compute the same."""
_KEY_DIM = 64
"""Channels of an attention head, which is what keys have that are averaged over heads."""


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """One way to do one thing."""

    what: str
    """The thing: `encode`, `train step`, .."""
    way: str
    """Precision and memory layout, or whose code."""
    seconds: float
    """Median."""
    shortest: float
    """Seconds of the fastest repetition: on a busy machine the better estimate."""
    num_repeats: int
    num_images: int | None = None
    """Images per call; None for what is not done to images."""
    extra_bytes: int | None = None
    """Most memory in use during a call beyond what was before; None where it is not measured."""
    against: str | None = None
    """The way it is compared with; None for that way itself."""
    speedup: float | None = None
    """Median seconds of that way over these."""
    memory_ratio: float | None = None
    """Extra bytes of that way over these."""


class MergeSize(NamedTuple):
    """A merging task as the encoder has it."""

    num_tokens: int = 1024
    num_kept: int = 256
    num_layers: int = 12
    dim: int = 512
    num_images: int = 8


class LfqSize(NamedTuple):
    """A loss of the quantizer."""

    num_bits: int
    num_tokens: int
    temperature: float = Lfq().entropy_temperature


MERGE_SIZES = tuple(MergeSize(num_images=count) for count in (1, 8, 64))
"""One image, where small operators count, a small batch, and that of `tiny64_g`."""
LFQ_SIZES = tuple(LfqSize(bits, tokens) for bits in (10, 14, 18) for tokens in (1024, 4096))
"""Codebooks of 1,024, 16,384 and 262,144 codes; tokens of a small and of a usual batch."""


def conditions(run: TokenizerRun) -> dict[str, Any]:
    """Conditions that the numbers depend on besides the code."""
    device = resolve_device(run.train.device)
    load = {"load_average": os.getloadavg()[0]} if hasattr(os, "getloadavg") else {}
    return {
        **environment(device),
        **load,
        "num_images": run.train.batch_size,
        "image_size": run.model.image_size,
        "num_kept": run.model.num_kept,
    }


def record(
    found: Mapping[str, Any], measurements: Sequence[Measurement], parts: Sequence[Part]
) -> dict[str, Any]:
    """Everything, for a JSON file; `found` is what `conditions` found before."""
    return {
        "conditions": dict(found),
        "measurements": [asdict(measurement) for measurement in measurements],
        "parts": [part._asdict() for part in parts],
    }


def line(measurement: Measurement) -> str:
    """A measurement as a line of fixed columns."""
    columns = [
        f"{measurement.what:<42} {measurement.way:<22} {1e3 * measurement.seconds:>9.1f} ms",
        f"(best {1e3 * measurement.shortest:.1f} of {measurement.num_repeats})",
    ]
    if measurement.num_images is not None:
        columns.append(f"{measurement.num_images / measurement.seconds:.3g} images/s")
    if measurement.extra_bytes is not None:
        columns.append(f"{measurement.extra_bytes / 1e6:.1f} MB")
    if measurement.speedup is not None:
        columns.append(f"{measurement.speedup:.3g} x as fast as {measurement.against}")
    if measurement.memory_ratio is not None:
        columns.append(f"in 1/{measurement.memory_ratio:.3g} of its memory")
    return "  ".join(columns)


Subject = Literal["merge", "lfq", "images"]
"""Subjects of measurement: merging, the quantizer's loss, and encode, decode and train step."""


def bench_tokenizer(
    run: TokenizerRun,
    *,
    num_repeats: int,
    reference: Path | None,
    subjects: Collection[Subject] = ("merge", "lfq", "images"),
) -> Iterator[Measurement]:
    """Measure everything, one thing after the other.

    Args:
        run: model, batch and losses of the train step, and the device; needs no data.
        num_repeats: timed calls of each way.
        reference: file of the plain definitions; None measures without.
        subjects: what is measured.

    Raises:
        ValueError: nothing is to be timed.
        RuntimeError: our code and the plain definition disagree.
    """
    if num_repeats < 1:
        raise ValueError(f"num_repeats ({num_repeats}) must be at least 1")
    device = resolve_device(run.train.device)
    plain = None if reference is None else load_reference(reference)
    for merge_size in MERGE_SIZES if "merge" in subjects else ():
        yield from measure_merge(merge_size, device, num_repeats=num_repeats, plain=plain)
    for size in LFQ_SIZES if "lfq" in subjects else ():
        yield from measure_lfq(size, run.loss, device, num_repeats=num_repeats, reference=reference)
    if "images" in subjects:
        yield from measure_images(run, device, num_repeats=num_repeats)


def load_reference(path: Path) -> ModuleType:
    """Import the plain definitions from their file.

    Raises:
        ValueError: there is no such file.
    """
    spec = importlib.util.spec_from_file_location("reference", path)
    if spec is None or spec.loader is None or not path.is_file():
        raise ValueError(f"reference ({path}) must be a Python file, benchmarks/reference.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# ------------------------------------------------------------------------- whole tokenizer


def measure_images(
    run: TokenizerRun, device: torch.device, *, num_repeats: int
) -> Iterator[Measurement]:
    """Encode, decode and train in float32 and bf16, in both memory layouts."""
    layouts = {"": torch.contiguous_format, ", channels_last": torch.channels_last}
    dtypes = {"float32": None, "bf16": torch.bfloat16}
    calls: dict[str, dict[str, Callable[[], object]]] = {}
    for layout_name, layout in layouts.items():
        learner, batch = _training(run, device, layout)
        for dtype_name, dtype in dtypes.items():
            way = f"{dtype_name}{layout_name}"
            for what, call in _image_calls(replace(learner, dtype=dtype), batch).items():
                calls.setdefault(what, {})[way] = call
    for what, ways in calls.items():
        yield from _compare(
            what,
            _in_turns(ways, device, num_repeats),
            against="float32",
            num_images=run.train.batch_size,
        )


def _training(
    run: TokenizerRun, device: torch.device, layout: torch.memory_format | None = None
) -> tuple[TokenizerLearner, Batch]:
    """A run at a step where every loss takes part, with images of noise and the nominal K."""
    world = distributed.World(rank=0, world_size=1, local_rank=0, device=device)
    run = replace(run, kept=KeptConfig(candidates=(run.model.num_kept,)))
    learner = build(run, world, num_classes=10)
    state = learner.state
    state.step = run.train.num_steps - 1
    if layout is not None:
        for module in (state.tokenizer, state.discriminator, state.teacher_encoder):
            if module is not None:
                module.to(memory_format=layout)  # pyright: ignore[reportCallIssue]
        # An average is updated many times slower when it is laid out unlike the weights.
        state.ema = Ema(state.tokenizer, run.optim.ema_decay)
    return learner, _noise(run, device)


def _noise(run: TokenizerRun, device: torch.device) -> Batch:
    """A batch with the views that the run's teacher needs."""
    num_images = run.train.batch_size
    generator = torch.Generator().manual_seed(run.train.seed)

    def images(size: int) -> Float[Tensor, "b 3 s s"]:
        return (2 * torch.rand(num_images, 3, size, size, generator=generator) - 1).to(device)

    image = images(run.model.image_size)
    sizes = view_sizes(run.teacher, run.model.image_size)
    views = {view: images(size) for view, size in sizes.items()}
    indices = torch.arange(num_images, device=device)
    return Batch(
        image=image,
        label=indices % 10,
        student_view=views.get("student"),
        teacher_view=views.get("teacher"),
        index=indices,
    )


def _image_calls(learner: TokenizerLearner, batch: Batch) -> dict[str, Callable[[], object]]:
    """Calls on images, by name."""
    tokenizer = learner.state.tokenizer
    condition = condition_of(tokenizer.config.condition, batch.label, "mergevq bench")

    @torch.no_grad()
    def encode() -> object:
        with learner.autocast():
            return tokenizer.eval().encode(batch.image, condition=condition)

    @functools.cache
    @torch.no_grad()
    def encoded() -> Encoded:
        return tokenizer.eval().encode(batch.image, condition=condition)

    @torch.no_grad()
    def decode() -> object:
        tokens = encoded()
        with learner.autocast():
            return tokenizer.eval().decode(
                tokens.codes, tokens.layout, tokens.grid_shape, condition=condition
            )

    def train() -> object:
        tokenizer.train()
        return learner.step(batch)

    return {"encode": encode, "decode": decode, "train step": train}


# -------------------------------------------------------------------------------- merging


def measure_merge(
    size: MergeSize, device: torch.device, *, num_repeats: int, plain: ModuleType | None
) -> Iterator[Measurement]:
    """Merge layer by layer and unmerge, with keys given: forward, and with the gradient.

    Raises:
        RuntimeError: our code and the plain definition disagree.
    """
    generator = torch.Generator().manual_seed(0)

    def normal(num_tokens: int, dim: int) -> Float[Tensor, "b n c"]:
        return torch.randn(size.num_images, num_tokens, dim, generator=generator).to(device)

    counts = merge_schedule(size.num_tokens, size.num_kept, size.num_layers)
    remaining = [size.num_tokens, *(size.num_tokens - n for n in itertools.accumulate(counts))]
    keys = [normal(num_tokens, _KEY_DIM) for num_tokens in remaining]
    grid = normal(size.num_tokens, size.dim).requires_grad_()
    weight = normal(size.num_tokens, size.dim)

    ways: dict[str, Callable[[], Tensor]] = {"mergevq": lambda: merge_and_unmerge(grid, keys)}
    if plain is not None:
        ways["dense source matrix"] = lambda: plain.unmerge(*plain.merge(grid, keys))
        _check_equal("merging", {name: way().detach() for name, way in ways.items()})
    images = "image" if size.num_images == 1 else "images"
    what = f"merge {size.num_tokens} to {size.num_kept}, {size.num_images} {images}"
    against = "dense source matrix"

    def forward(way: Callable[[], Tensor]) -> Callable[[], object]:
        return torch.no_grad()(way)

    def with_gradient(way: Callable[[], Tensor]) -> Callable[[], object]:
        return lambda: torch.autograd.grad(way(), grid, weight)

    forwards = {name: forward(way) for name, way in ways.items()}
    yield from _compare(what, _in_turns(forwards, device, num_repeats), against=against)
    gradients = {name: with_gradient(way) for name, way in ways.items()}
    times = _in_turns(gradients, device, num_repeats)
    yield from _compare(f"{what}, gradient", times, against=against)
    pairs = list(zip(keys, counts, strict=False))
    matching = {"mergevq": lambda: [match(key, count) for key, count in pairs]}
    times = _in_turns(matching, device, num_repeats)
    yield from _compare(f"{what}, matching alone", times, against=against)


def merge_and_unmerge(
    tokens: Float[Tensor, "b l c"], keys: list[Float[Tensor, "b _ d"]]
) -> Float[Tensor, "b l c"]:
    """Do what the encoder's blocks do about merging, and copy back to the grid.

    Args:
        tokens: of the grid.
        keys: what each block compares; one tensor more than blocks, of K tokens.
    """
    batch, num_tokens, _ = tokens.shape
    sizes = tokens.new_ones(batch, num_tokens)
    index = torch.arange(num_tokens, device=tokens.device).expand(batch, -1)
    for key, after in itertools.pairwise(keys):
        num_remaining = after.shape[1]
        destination = match(key, key.shape[1] - num_remaining)
        tokens, sizes = merge_step(tokens, sizes, destination, num_remaining)
        index = destination.gather(1, index)
    source, order = canonicalize(Source(index, keys[-1].shape[1]))
    return unmerge(take_rows(tokens, order), source)


# --------------------------------------------------------------------------- quantizer's loss


def measure_lfq(
    size: LfqSize,
    loss: LossConfig,
    device: torch.device,
    *,
    num_repeats: int,
    reference: Path | None,
) -> Iterator[Measurement]:
    """Forward and backward of the quantizer's losses, each way in a process of its own.

    A fresh process, because the extra memory is the rise of the resident set's high-water mark:
    that counts whatever a kernel takes for itself, which a count of tensors misses, but in an old
    process memory that was freed without being given back hides it.

    Raises:
        RuntimeError: our code and the plain definition disagree.
    """
    what = f"LFQ loss {size.num_bits} bits {size.num_tokens} tokens"
    ways: dict[str, Path | None] = {"mergevq": None}
    if reference is not None and size.num_tokens * 2**size.num_bits <= MAX_DENSE_CELLS:
        ways["dense softmax"] = reference
    arguments = (size, loss, device, num_repeats)
    results = {
        name: _in_fresh_process(_lfq_in_this_process, *arguments, path)
        for name, path in ways.items()
    }
    _check_equal("the quantizer's losses", {name: r.values for name, r in results.items()})
    yield from _compare(
        what,
        {name: result.seconds for name, result in results.items()},
        against="dense softmax",
        extra_bytes={name: result.extra_bytes for name, result in results.items()},
    )


class _LfqResult(NamedTuple):
    """Report of a process."""

    seconds: list[float]
    extra_bytes: int | None
    values: Float[Tensor, "4"]
    """The three losses and the norm of the gradient."""


def _lfq_in_this_process(
    size: LfqSize, loss: LossConfig, device: torch.device, num_repeats: int, reference: Path | None
) -> _LfqResult:
    """Measure one way; latents are unit normal."""
    plain = None if reference is None else load_reference(reference)
    generator = torch.Generator().manual_seed(0)

    def run_once(num_tokens: int) -> Float[Tensor, "4"]:
        latents = torch.randn(1, num_tokens, size.num_bits, generator=generator).to(device)
        latents.requires_grad_()
        losses = quantize_losses if plain is None else plain.lfq_losses
        found = losses(latents, size.temperature)
        entropy = found.token_entropy - found.codebook_entropy
        total = loss.commitment_weight * found.commitment + loss.entropy_weight * entropy
        (gradient,) = torch.autograd.grad(total, latents)
        values = [found.commitment, found.token_entropy, found.codebook_entropy, gradient.norm()]
        return torch.stack([value.detach() for value in values]).cpu()

    run_once(2)  # Starts the threads and loads the kernels, which take memory of their own.
    generator.manual_seed(0)
    values: list[Tensor] = []
    first: list[float] = []
    extra_bytes = _extra_memory(
        lambda: first.append(_seconds(lambda: values.append(run_once(size.num_tokens)), device)),
        device,
    )
    if first[0] <= _LONG_LOSS:
        first = _in_turns({"": lambda: run_once(size.num_tokens)}, device, num_repeats)[""]
    return _LfqResult(first, extra_bytes, values[0])


def _extra_memory(call: Callable[[], object], device: torch.device) -> int | None:
    """Most bytes in use at once during a call, beyond those before it; None if unknown here."""
    if device.type == "cuda":
        torch.accelerator.reset_peak_memory_stats()
        before = torch.accelerator.memory_allocated()
        call()
        return torch.accelerator.max_memory_allocated() - before
    # Not resource.getrusage: its mark starts at that of the parent process, and cannot be reset.
    reset = Path("/proc/self/clear_refs")
    if device.type != "cpu" or not reset.exists():
        call()
        return None
    # A command keeps freed memory, in which a call would find room without the process growing.
    give_back_freed_memory()
    reset.write_text("5", encoding="ascii")
    before = _resident("VmRSS")
    call()
    return max(0, _resident("VmHWM") - before)


def _resident(field: str) -> int:
    """Bytes of this process in physical memory: at present (VmRSS), or the most (VmHWM)."""
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        name, _, value = line.partition(":")
        if name == field:
            return 1024 * int(value.split()[0])
    raise RuntimeError(f"/proc/self/status has no field {field}")


def _in_fresh_process(function: Callable[..., Any], *arguments: object) -> Any:  # noqa: ANN401
    """Call a function of this module in a process that has done nothing else."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(max_workers=1, mp_context=context) as pool:
        return pool.submit(_with_threads, torch.get_num_threads(), function, *arguments).result()


def _with_threads(num_threads: int, function: Callable[..., Any], *arguments: object) -> Any:  # noqa: ANN401
    """Call a function with as many threads as the parent has."""
    torch.set_num_threads(num_threads)
    return function(*arguments)


# ---------------------------------------------------------------------------- taking times


def _in_turns(
    calls: Mapping[str, Callable[[], object]], device: torch.device, num_repeats: int
) -> dict[str, list[float]]:
    """Seconds of each repetition of each call; they take turns, after one call each to warm up."""
    for call in calls.values():
        call()
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(num_repeats):
        for name, call in calls.items():
            times[name].append(_seconds(call, device))
    return times


def _seconds(call: Callable[[], object], device: torch.device) -> float:
    """Wall-clock seconds of one call, until the device has done it."""
    started_at = _now(device)
    call()
    return _now(device) - started_at


def _now(device: torch.device) -> float:
    """Seconds on a clock, when the device has done what it was given."""
    if device.type != "cpu":
        torch.accelerator.synchronize()
    return time.perf_counter()


def _compare(
    what: str,
    times: Mapping[str, list[float]],
    *,
    against: str,
    num_images: int | None = None,
    extra_bytes: Mapping[str, int | None] | None = None,
) -> Iterator[Measurement]:
    """One measurement for each way, with its ratios to one of them if that was measured."""
    extra_bytes = extra_bytes or {}
    for way, seconds in times.items():
        measurement = Measurement(
            what=what,
            way=way,
            seconds=statistics.median(seconds),
            shortest=min(seconds),
            num_repeats=len(seconds),
            num_images=num_images,
            extra_bytes=extra_bytes.get(way),
        )
        if against in times and way != against:
            mine, theirs = extra_bytes.get(way), extra_bytes.get(against)
            measurement = replace(
                measurement,
                against=against,
                speedup=statistics.median(times[against]) / measurement.seconds,
                memory_ratio=theirs / max(mine, 1) if mine is not None and theirs else None,
            )
        yield measurement


def _check_equal(what: str, results: Mapping[str, Tensor]) -> None:
    """Raise `RuntimeError` unless all ways have the same result."""
    (first, expected), *others = results.items()
    for name, result in others:
        error = float((result - expected).norm() / expected.norm())
        if not error <= _TOLERANCE or not math.isfinite(error):
            raise RuntimeError(
                f"{what}: {name} differs from {first} by {error:.2g} of its norm, more than "
                f"{_TOLERANCE:g}; one of them is wrong, and speed means nothing"
            )


# ------------------------------------------------------------------------- parts of a step


def profile_train_step(run: TokenizerRun, *, num_repeats: int) -> list[Part]:
    """Share of a train step that each part takes, with the run's own precision.

    Parts are the tokenizer's modules by name, the other networks, and what the step names itself.
    An encoder pass over the student's view counts as the encoder's.
    """
    learner, batch = _training(run, resolve_device(run.train.device))
    state = learner.state
    modules = named_parts(state.tokenizer)
    for name, module in (
        ("discriminator", state.discriminator),
        ("perceptual", learner.perceptual),
        ("teacher", state.teacher_encoder),
    ):
        if module is not None:
            modules[name] = [module]
    if state.distillation is not None:
        modules["distillation"] = list(state.distillation.children())
    if state.teacher is not None:
        modules["alignment"] = list(state.teacher.children())
    return profile_parts(
        lambda: learner.step(batch), modules, learner.world.device, num_repeats=num_repeats
    )
