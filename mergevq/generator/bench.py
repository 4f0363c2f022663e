"""How fast generators decode and what their caches take, beside plain loops over the same weights.

Ways that are compared take turns, so that what else the machine does falls on all of them alike; of
each step the median over turns counts. A sequence may be timed whole, or at some of its steps: then
short runs of steps are spread evenly over it, and the caches before each run are filled with
made-up keys. A step costs what is in the cache, nearly in proportion, so the mean over evenly
spread steps is that of the sequence; the steps are part of every result.

Weights are random, which changes no time but one: an untrained MergeAR draws its K distinct tokens
first. Skipped tokens are filled in likewise, so its cache is as full as it can be.

The plain loops are in `benchmarks/reference_generator.py` of the repository.

"""

import itertools
import os
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from types import ModuleType
from typing import Any, NamedTuple, Protocol, get_args, runtime_checkable

import torch

from mergevq.config.generator import (
    GeneratorConfig,
    OneByOne,
    SamplingSettings,
    Several,
    Weights,
    sized,
)
from mergevq.config.parts.orders import (
    Holistic,
    Order,
    Raster,
)
from mergevq.generator.build import AnyGenerator, build_generator
from mergevq.generator.seams import Sequences
from mergevq.generator.weights import as_weights, logit_error
from mergevq.runtime.device import resolve_precision
from mergevq.runtime.logs import Progress
from mergevq.runtime.random import step_generator
from mergevq.runtime.run import environment
from mergevq.runtime.settings import to_json

NAMES = {
    "raster": "full cache",
    "merge": "MergeAR",
    "random": "RandAR",
    "anchor": "anchored",
    "masked": "MaskGIT",
    "stream": "codes and map",
    "ordered": "ordered tokens",
    "holistic": "holistic first",
    "scale": "next scale",
}
"""Names of orders, by kind, in the printed table."""
NOMINAL_KEPT = {256: 144, 1024: 256}
"""K of the paper's versions by their grid cells; of other grids a quarter of the cells is kept."""
NUM_CLASSES = 1000
NUM_RANDOM_STEPS = 64
"""Passes in which RandAR decodes its K tokens."""
_STEPS_IN_A_ROW = 4
"""A run of timed steps, where not all are timed."""
_RECOMPUTED_STEPS = 2
"""Timed steps of the loop without a cache, whose every step runs the sequence so far."""


@dataclass(frozen=True, kw_only=True)
class Speed:
    """How one way decodes one kind of sequence."""

    order: str
    way: str
    """`mergevq`, or which plain loop."""
    weights: Weights
    num_cells: int
    """L: cells of the grid."""
    num_kept: int
    """K."""
    num_tokens: int
    """Tokens of a sequence: L, or K in orders `random` and `anchor`."""
    num_steps: int
    """Passes through the transformer for a batch."""
    timed_steps: tuple[int, ...]
    """Steps that were timed, from 0."""
    num_repeats: int
    """Turns; of each step the median counts."""
    num_images: int
    """Images of a batch."""
    guidance: float
    """Scale of guidance, for which each image has two rows; 1 is none."""
    seconds_per_step: float
    """Mean over the timed steps."""
    tokens_per_second: float
    images_per_second: float
    kv_bytes: int
    """Bytes of the cache; 0 without one."""
    logit_error: float | None = None
    """Logit error of 8-bit weights against bf16 ones, as in `generator.weights.logit_error`."""
    times_raster: float | None = None
    """Images per second over those of order `raster` with the same weights and guidance."""
    cache_share: float | None = None
    """Bytes over those of order `raster`."""
    times_plain: Mapping[str, float] | None = None
    """In order `raster` tokens per second over those of each plain loop."""


@runtime_checkable
class Decoder(Protocol):
    """Something that decodes step by step and can start anywhere."""

    num_steps: int

    @property
    def kv_bytes(self) -> int:
        """Memory of the cache."""
        ...

    def seek(self, step: int) -> None:
        """Get ready for a step, with made-up tokens before it."""
        ...

    def step(self) -> None:
        """Do it."""
        ...


class _Timed(NamedTuple):
    """One of those that take turns."""

    name: str
    weights: Weights
    guidance: float
    generator: AnyGenerator
    decoder: Decoder
    steps: list[list[int]]
    """Runs of steps that are timed."""


def bench_generator(  # noqa: PLR0913 - each is an option of the command
    config: GeneratorConfig,
    *,
    batch_sizes: Sequence[int],
    num_repeats: int,
    max_steps: int | None,
    weights: Sequence[Weights],
    device: torch.device,
    plain: ModuleType | None,
    orders: Sequence[str] | None = None,
    guidance: Sequence[float] = (1.0,),
) -> Iterator[Speed]:
    """Time orders of one grid, batch by batch.

    Args:
        config: size and grid; the order is replaced.
        batch_sizes: images at once.
        num_repeats: turns.
        max_steps: steps timed of each sequence; None is all.
        weights: types of weights, each with all orders.
        device: where to compute.
        plain: the plain loops; they have bf16 weights, float32 ones on devices without bf16.
        orders: kinds of orders; None is all.
        guidance: scales, of which 1 is none.

    Raises:
        ValueError: nothing is to be timed.
    """
    least = min(num_repeats, *batch_sizes, *([] if max_steps is None else [max_steps]))
    if least < 1 or not weights or not guidance:
        raise ValueError(
            f"num_repeats ({num_repeats}), batch_sizes {tuple(batch_sizes)} and max_steps "
            f"({max_steps}) must be at least 1, weights {tuple(weights)} name a type and guidance "
            f"{tuple(guidance)} a scale: there is nothing to time otherwise"
        )
    generators: dict[tuple[str, Weights], AnyGenerator] = {}
    errors: dict[tuple[str, Weights], float] = {}
    for member in get_args(Order):
        order = member().kind
        if orders is not None and order not in orders:
            continue
        exact = random_generator(_with_order(config, member()), device)
        bf16 = as_weights(exact, "bf16")
        for kind in weights:
            generators[order, kind] = bf16 if kind == "bf16" else as_weights(exact, kind)
        if "int8" in weights:
            errors[order, "int8"] = _error(bf16, generators[order, "int8"])
    for num_images, scale in itertools.product(batch_sizes, guidance):
        timed = [
            _ours(kind, scale, generator, num_images, max_steps)
            for (_, kind), generator in generators.items()
        ]
        if plain is not None:
            # Loops in bf16 that a processor emulates would be a comparison with nothing.
            dtype = resolve_precision("auto", device) or torch.float32
            raster = random_generator(replace(config, order=Raster()), device).to(dtype)
            timed += [
                _plain(plain, way, scale, raster, num_images, max_steps) for way in plain.WAYS
            ]
        seconds = take_turns(timed, device, num_repeats)
        found = [
            _speed(one, times, num_images, num_repeats)
            for one, times in zip(timed, seconds, strict=True)
        ]
        for speed in compared(found):
            yield replace(speed, logit_error=errors.get((speed.order, speed.weights)))


def _with_order(config: GeneratorConfig, order: Order) -> GeneratorConfig:
    """The same generator with another order; tokens of the whole image are beside all cells."""
    if not isinstance(order, Holistic):
        return replace(config, order=order)
    num_kept = order.num_holistic + config.num_tokens
    return replace(config, order=order, num_kept=num_kept, kept_candidates=(num_kept,))


def grid_config(config: GeneratorConfig, num_cells: int) -> GeneratorConfig:
    """The same generator on a square grid, with its nominal K.

    Raises:
        ValueError: the number of cells is no square, or the grid is too small.
    """
    side = round(num_cells**0.5)
    if side * side != num_cells or num_cells < 4:
        raise ValueError(f"grid_tokens ({num_cells}) must be the square of 2 or more, as 256 is")
    num_kept = NOMINAL_KEPT.get(num_cells, num_cells // 4)
    return replace(config, grid_size=(side, side), num_kept=num_kept, kept_candidates=(num_kept,))


def size_config(size: str) -> GeneratorConfig:
    """A class-conditional generator of a named size.

    Raises:
        ValueError: there is no such size.
    """
    return sized(GeneratorConfig(num_classes=NUM_CLASSES), size)


def random_generator(config: GeneratorConfig, device: torch.device) -> AnyGenerator:
    """A generator with random weights, outputs too, in evaluation mode."""
    with torch.device("meta"):
        generator = build_generator(config)
    # Drawn on the CPU, as numbers of a generator can only be used where it is.
    generator = generator.to_empty(device="cpu").requires_grad_(requires_grad=False)
    numbers = step_generator(0, "bench", 0)
    generator.reset_parameters(numbers)
    for output in generator.network.head.layers[-1]:
        torch.nn.init.normal_(output.get_parameter("weight"), std=0.02, generator=numbers)
    return generator.to(device).eval()


def spread_steps(num_steps: int, max_steps: int | None) -> list[list[int]]:
    """Runs of steps, evenly spread, at most `max_steps` in all; None is one run of all steps."""
    if max_steps is None or max_steps >= num_steps:
        return [list(range(num_steps))]
    in_a_row = min(_STEPS_IN_A_ROW, max_steps)
    num_runs = max_steps // in_a_row
    # Each run is in the middle of its share of the sequence.
    starts = [
        round((run + 0.5) * num_steps / num_runs - in_a_row / 2 - 0.01) for run in range(num_runs)
    ]
    return [list(range(start, start + in_a_row)) for start in starts]


def take_turns(
    timed: Sequence[_Timed], device: torch.device, num_repeats: int
) -> list[dict[int, float]]:
    """Median seconds of each timed step of each way, after one step of each to warm up."""
    times: list[dict[int, list[float]]] = [
        {step: [] for run in one.steps for step in run} for one in timed
    ]
    for one in timed:
        _time_run(one.decoder, one.steps[0][:1], device)
    progress = Progress(num_repeats * sum(len(one.steps) for one in timed), unit="run")
    for _ in range(num_repeats):
        for runs in itertools.zip_longest(*(one.steps for one in timed)):
            for one, seconds, run in zip(timed, times, runs, strict=True):
                if run is not None:
                    taken = _time_run(one.decoder, run, device)
                    for step, value in zip(run, taken, strict=True):
                        seconds[step].append(value)
                    progress.update()
    progress.close()
    return [
        {step: statistics.median(values) for step, values in seconds.items()} for seconds in times
    ]


def compared(speeds: Sequence[Speed]) -> list[Speed]:
    """The same, with ratios to order `raster` and to the plain loops."""
    ours = {
        (speed.weights, speed.guidance): speed
        for speed in speeds
        if _is_ours(speed) and speed.order == "raster"
    }
    found = []
    for speed in speeds:
        raster = ours.get((speed.weights, speed.guidance)) if _is_ours(speed) else None
        plain = {
            other.way: other.tokens_per_second
            for other in speeds
            if not _is_ours(other) and other.guidance == speed.guidance
        }
        if raster is not None and speed is not raster:
            speed = replace(
                speed,
                times_raster=speed.images_per_second / raster.images_per_second,
                cache_share=speed.kv_bytes / raster.kv_bytes,
            )
        if speed is raster and plain:
            ratios = {way: speed.tokens_per_second / value for way, value in plain.items()}
            speed = replace(speed, times_plain=ratios)
        found.append(speed)
    return found


def record(
    device: torch.device,
    options: Mapping[str, Any],
    configs: Sequence[GeneratorConfig],
    speeds: Sequence[Speed],
) -> dict[str, Any]:
    """Everything, for a JSON file."""
    load = {"load_average": os.getloadavg()[0]} if hasattr(os, "getloadavg") else {}
    return {
        "conditions": {**environment(device), **load, **options},
        "generators": [to_json(config) for config in configs],
        "speeds": [asdict(speed) for speed in speeds],
    }


def line(speed: Speed) -> str:
    """A speed as a line of fixed columns."""
    name = NAMES[speed.order] if _is_ours(speed) else speed.way
    timed = len(speed.timed_steps)
    columns = [
        f"{speed.num_cells:>5} cells x {speed.num_images:<2} {name:<17} {speed.weights:<8}",
        "no guidance " if speed.guidance == 1 else f"guidance {speed.guidance:<3g}",
        f"{speed.tokens_per_second:>7.1f} tokens/s {speed.images_per_second:>8.4f} images/s",
        f"{1e3 * speed.seconds_per_step:>8.1f} ms x {speed.num_steps} steps ({timed} timed)",
        f"{speed.kv_bytes / 1e6:>7.1f} MB",
    ]
    if speed.times_raster is not None and speed.cache_share is not None:
        columns.append(
            f"{speed.times_raster:.2f} x the images of full cache, {speed.cache_share:.3f} of its "
            "bytes"
        )
    if speed.times_plain is not None:
        ratios = ", ".join(f"{ratio:.2f} x {way}" for way, ratio in speed.times_plain.items())
        columns.append(ratios)
    if speed.logit_error is not None:
        columns.append(f"logit error {speed.logit_error:.2%}")
    return "  ".join(columns)


# ---------------------------------------------------------------------------------- decoders


class OurDecoder:
    """Our decoding of a generator's order."""

    def __init__(
        self,
        generator: AnyGenerator,
        num_images: int,
        most_steps: int = NUM_RANDOM_STEPS,
        guidance: float = 1.0,
    ) -> None:
        """Allocate the cache and make up what is in it.

        Args:
            generator: in evaluation mode.
            num_images: of the batch.
            most_steps: passes, if the order decodes several tokens in one.
            guidance: its scale; 1 is none.
        """
        config = generator.config
        num_steps = min(most_steps, config.num_states(config.num_kept))
        several = Several(num_steps=num_steps)
        passes = several if config.order.in_parallel else OneByOne()
        settings = SamplingSettings(passes=passes, guidance_scale=guidance)
        labels = torch.zeros(num_images, dtype=torch.int64, device=generator.device)
        draws = generator.draws(0, range(num_images), config.num_kept, settings)
        self.decoder = generator.decoder(labels, config.num_kept, draws, settings)
        self.num_steps, self.kv_bytes = self.decoder.num_steps, self.decoder.kv_bytes
        self.step = self.decoder.step
        sequences = made_up_sequences(config, num_images, generator.device)
        self.history = generator.parts(sequences)
        for memory in self.decoder.memory:
            # Keys and values that are neither zero nor of any model.
            numbers = torch.randn(memory.shape[-1], generator=torch.Generator().manual_seed(0))
            memory.copy_(numbers.to(memory.device).expand_as(memory))

    def seek(self, step: int) -> None:
        """Take the made-up tokens before a step as decoded."""
        self.decoder.seek(step, self.history)


class PlainDecoder:
    """A plain loop over all tokens in raster order."""

    def __init__(
        self,
        plain: ModuleType,
        way: str,
        generator: AnyGenerator,
        num_images: int,
        guidance: float = 1.0,
    ) -> None:
        """Give the loop our weights; guided images have a second row, of no class."""
        config = generator.config
        self.num_steps = config.num_tokens
        device = generator.device
        labels = torch.zeros(num_images, dtype=torch.int64, device=device)
        if guidance != 1:
            labels = torch.cat([labels, torch.full_like(labels, config.null_class)])
        self.history = generator.parts(made_up_sequences(config, len(labels), device))
        state = generator.network.state_dict()
        scale = None if guidance == 1 else guidance
        self.loop = plain.Loop(state, config, labels, config.num_kept, way, guidance=scale)
        self.step = self.loop.step

    @property
    def kv_bytes(self) -> int:
        """Memory of keys and values."""
        return self.loop.kv_bytes

    def seek(self, step: int) -> None:
        """Make up the tokens before, and their keys and values."""
        self.loop.seek(self.history[:, :step], step)


def made_up_sequences(config: GeneratorConfig, num_images: int, device: torch.device) -> Sequences:
    """Sequences of which the first K tokens are distinct and the others repeat them in turn."""
    tokens = torch.arange(config.length(config.num_kept), device=device)
    kept = torch.arange(config.num_kept, device=device)
    return Sequences(
        indices=(tokens % config.num_kept).expand(num_images, -1),
        class_label=torch.zeros(num_images, dtype=torch.int64, device=device),
        num_kept=config.num_kept,
        source_index=(torch.arange(config.num_tokens, device=device) % config.num_kept).expand(
            num_images, -1
        ),
        anchors=(kept * config.num_tokens // config.num_kept).expand(num_images, -1),
        slots=kept.expand(num_images, -1),
        stages=torch.full((num_images, len(tokens)), 2, device=device),
    )


# ------------------------------------------------------------------------------------- times


def _ours(
    weights: Weights,
    guidance: float,
    generator: AnyGenerator,
    num_images: int,
    max_steps: int | None,
) -> _Timed:
    """Our decoder of a generator's order."""
    decoder = OurDecoder(generator, num_images, guidance=guidance)
    steps = spread_steps(decoder.num_steps, max_steps)
    return _Timed("mergevq", weights, guidance, generator, decoder, steps)


def _plain(
    plain: ModuleType,
    way: str,
    guidance: float,
    generator: AnyGenerator,
    num_images: int,
    max_steps: int | None,
) -> _Timed:
    """A plain loop; without a cache only a few steps are timed, however many there are."""
    decoder = PlainDecoder(plain, way, generator, num_images, guidance)
    if way == "recompute":
        few = spread_steps(decoder.num_steps, _RECOMPUTED_STEPS * _STEPS_IN_A_ROW)
        steps = [run[len(run) // 2 : len(run) // 2 + 1] for run in few]
    else:
        steps = spread_steps(decoder.num_steps, max_steps)
    weights: Weights = "bf16" if generator.network.dtype == torch.bfloat16 else "float32"
    return _Timed(way, weights, guidance, generator, decoder, steps)


def _time_run(decoder: Decoder, steps: Sequence[int], device: torch.device) -> list[float]:
    """Seconds of each of some successive steps."""
    decoder.seek(steps[0])
    seconds = []
    for _ in steps:
        started_at = _now(device)
        decoder.step()
        seconds.append(_now(device) - started_at)
    return seconds


def _now(device: torch.device) -> float:
    """Seconds on a clock, when the device has done what it was given."""
    if device.type != "cpu":
        torch.accelerator.synchronize()
    return time.perf_counter()


def _speed(one: _Timed, times: Mapping[int, float], num_images: int, num_repeats: int) -> Speed:
    """Speed that the times of steps amount to."""
    config = one.generator.config
    num_tokens = config.length(config.num_kept)
    seconds = statistics.fmean(times.values())
    images_per_second = num_images / (seconds * one.decoder.num_steps)
    return Speed(
        order=config.order.kind,
        way=one.name,
        weights=one.weights,
        num_cells=config.num_tokens,
        num_kept=config.num_kept,
        num_tokens=num_tokens,
        num_steps=one.decoder.num_steps,
        timed_steps=tuple(times),
        num_repeats=num_repeats,
        num_images=num_images,
        guidance=one.guidance,
        seconds_per_step=seconds,
        tokens_per_second=num_tokens * images_per_second,
        images_per_second=images_per_second,
        kv_bytes=one.decoder.kv_bytes,
    )


def _is_ours(speed: Speed) -> bool:
    """Whether it is the package's decoding."""
    return speed.way == "mergevq"


@torch.no_grad()
def _error(right: AnyGenerator, quantized: AnyGenerator) -> float:
    """Logit error of 8-bit weights on made-up tokens."""
    sequences = made_up_sequences(right.config, 1, right.device)
    return logit_error(right, quantized, sequences)
