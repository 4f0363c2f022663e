"""Everything that is worth knowing of a device that is lent for a few minutes, in one record.

What comes first matters most: the device, its rate at a large product, encode, decode and the train
step with the share of that rate they reach, then decoding in every order and the plain loops, and
last the compiled train step. Each part is tried by itself: an error is kept in the record, and the
others go on. Nothing is begun once the time is up; the record names what was left out.
"""

import multiprocessing
import statistics
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from multiprocessing.connection import Connection
from pathlib import Path
from types import ModuleType
from typing import Any, get_args

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from mergevq.config.generator import (
    GeneratorConfig,
)
from mergevq.config.parts.orders import (
    Order,
)
from mergevq.config.training import TokenizerRun
from mergevq.generator.bench import Speed, bench_generator, compared
from mergevq.generator.bench import line as generator_line
from mergevq.runtime.device import layout_for, precision_name, resolve_device, resolve_precision
from mergevq.runtime.files import write_json
from mergevq.runtime.run import environment
from mergevq.training.bench.tokenizer import _image_calls, _in_turns, _seconds, _training

TRAIN_STEP = "train step"
COMPILED = "train step, compiled"

_REPEATS = 5
"""Calls of encode, decode and train step that are timed."""
_STEPS = 16
"""Steps that are timed of each sequence."""
_LARGE_SIDE = {"cuda": 8192}
"""Side of the matrices whose product is the device's rate; elsewhere `_SMALL_SIDE`."""
_SMALL_SIDE = 512
_PLAIN = torch.contiguous_format
_LAST_BEGIN = 0.9
"""Share of the time after which nothing is begun, and what runs in another process is ended."""


@dataclass(kw_only=True)
class _Report:
    """A record that grows part by part."""

    say: Callable[[str], object]
    out: Path
    minutes: float
    record: dict[str, Any] = field(default_factory=dict)
    started_at: float = field(default_factory=time.perf_counter)

    @property
    def seconds_left(self) -> float:
        """Seconds in which something may still run; negative when the time is up."""
        return self.started_at + _LAST_BEGIN * 60 * self.minutes - time.perf_counter()

    def attempt(self, what: str, part: Callable[[], object]) -> None:
        """Do a part of the work if there is time; an error is noted, and ends no other part."""
        if self.seconds_left <= 0:
            self.record["left_out"].append(what)
            self.say(f"{what}: left out, the {self.minutes:g} minutes are over")
        else:
            try:
                part()
            except Exception as error:  # noqa: BLE001 - of any kind: the device is lent once
                self.record["errors"][what] = traceback.format_exc()
                first = (str(error).strip() or "no message").splitlines()[0]
                self.say(f"{what}: FAILED, {type(error).__name__}: {first}")
        self.record["seconds"] = time.perf_counter() - self.started_at
        write_json(self.out, self.record)


def bench_device(
    runs: Mapping[str, TokenizerRun],
    config: GeneratorConfig,
    *,
    batch_sizes: Sequence[int],
    minutes: float,
    plain: ModuleType | None,
    compiled: bool,
    out: Path,
    say: Callable[[str], object],
) -> dict[str, Any]:
    """Measure until the time is up.

    Args:
        runs: by name, model, batch, losses and precision of a tokenizer, and the device, which is
            the same for all; they need no data.
        config: size and grid of the generators.
        batch_sizes: images sampled at once.
        minutes: the time.
        plain: the plain loops; None measures without.
        compiled: whether the compiled train step is timed too, in a process of its own.
        out: JSON file of the record, which is written after each part.
        say: takes each line of the report as it comes.

    Returns:
        JSON: `conditions`, `flops_per_second` of the product, `images` (by run and call the
        seconds, FLOPs and utilisation), `speeds` of the generators, `errors` (what Python says, by
        part), `left_out` and `seconds` in all.
    """
    device = resolve_device(next(iter(runs.values())).train.device)
    report = _Report(say=say, out=out, minutes=minutes)
    found = environment(device)
    report.record |= {
        "conditions": found,
        "flops_per_second": None,
        "images": {},
        "speeds": [],
        "errors": {},
        "left_out": [],
    }
    say(f"device: {found.get('device')}, torch {torch.__version__}")
    report.attempt("product", lambda: _measure_product(report, device))
    for name, run in runs.items():
        _measure_images(report, name, run, device)
    for num_images in batch_sizes:
        _measure_sampling(report, config, num_images, device, plain)
    for name, run in runs.items() if compiled else ():
        # The first may take all the time there is: half of a compilation is of no use.
        report.attempt(
            f"{name}, {COMPILED}", lambda name=name, run=run: _measure_compiled(report, name, run)
        )
    return report.record


def _measure_product(report: _Report, device: torch.device) -> None:
    """FLOPs per second of a large square product in bf16, the best of a few."""
    side = _LARGE_SIDE.get(device.type, _SMALL_SIDE)
    x = torch.randn(side, side, device=device, dtype=torch.bfloat16)
    seconds = min(_in_turns({"": lambda: x @ x}, device, _REPEATS)[""])
    rate = report.record["flops_per_second"] = 2 * side**3 / seconds
    report.say(f"product in bf16: {rate / 1e12:.3g} TFLOP/s")


def _measure_images(report: _Report, name: str, run: TokenizerRun, device: torch.device) -> None:
    """Seconds, FLOPs and utilisation of encode, decode and train step."""
    report.record["images"][name] = {
        "num_images": run.train.batch_size,
        "image_size": run.model.image_size,
        "num_kept": run.model.num_kept,
        "precision": precision_name(resolve_precision(run.train.precision, device)),
    }

    def measure(what: str, call: Callable[[], object]) -> None:
        # What is only done in the first call is not counted.
        call()
        flops = count_flops(call)
        _add_times(report, name, what, _in_turns({what: call}, device, _REPEATS)[what], flops)

    # On GPUs the layout is a choice that each of them may decide differently.
    layouts: dict[str, torch.memory_format | None] = {"": None}
    if layout_for(device, resolve_precision(run.train.precision, device)) != _PLAIN:
        layouts[", contiguous"] = _PLAIN
    for suffix, layout in layouts.items():
        calls: dict[str, Callable[[], object]] = {}
        report.attempt(
            f"{name}, model{suffix}",
            lambda calls=calls, layout=layout: calls.update(
                _image_calls(*_training(run, device, layout))
            ),
        )
        for what, call in calls.items():
            each = f"{what}{suffix}"
            report.attempt(f"{name}, {each}", lambda each=each, call=call: measure(each, call))


def _add_times(
    report: _Report, name: str, what: str, times: Sequence[float], flops: int | None
) -> None:
    """Put the times of a call on images into the record."""
    images, rate = report.record["images"][name], report.record["flops_per_second"]
    seconds = statistics.median(times)
    speed = images["num_images"] / seconds
    images[what] = {"seconds": list(times), "images_per_second": speed, "flops": flops}
    columns = [f"{1e3 * seconds:.1f} ms (best {1e3 * min(times):.1f})", f"{speed:.4g} images/s"]
    if flops is not None:
        columns.append(f"{flops / 1e12:.3g} TFLOP, {flops / seconds / 1e12:.3g} TFLOP/s")
    if flops is not None and rate is not None:
        utilisation = images[what]["utilisation"] = flops / seconds / rate
        columns.append(f"{utilisation:.1%} of the product's rate")
    report.say(f"{name}, {what}: {', '.join(columns)}")


def _measure_sampling(
    report: _Report,
    config: GeneratorConfig,
    num_images: int,
    device: torch.device,
    plain: ModuleType | None,
) -> None:
    """Speed of decoding in every order, then of the plain loops."""
    before, found = list(report.record["speeds"]), list[Speed]()

    def measure(orders: Sequence[str], plain: ModuleType | None) -> None:
        speeds = bench_generator(
            config,
            orders=orders,
            batch_sizes=[num_images],
            # Without, and as users sample.
            guidance=(1.0, 4.0),
            num_repeats=1,
            max_steps=_STEPS,
            weights=["bf16"],
            device=device,
            plain=plain,
        )
        for speed in speeds:
            found.append(speed)
            report.record["speeds"] = [*before, *map(asdict, compared(found))]

    for member in get_args(Order):
        kind = member().kind
        report.attempt(
            f"sampling {num_images} at once, {kind}", lambda kind=kind: measure([kind], None)
        )
    if plain is not None:
        report.attempt(f"sampling {num_images} at once, plain loops", lambda: measure([], plain))
    for speed in compared(found):
        report.say(generator_line(speed))


def _measure_compiled(report: _Report, name: str, run: TokenizerRun) -> None:
    """Times of the compiled train step, whose products are those of the plain one.

    Raises:
        TimeoutError: it takes longer than there is time.
        RuntimeError: it fails.
    """
    first, times = _in_time(_compiled_times, run, report.seconds_left)
    eager = report.record["images"][name].get(TRAIN_STEP, {})
    _add_times(report, name, COMPILED, times, eager.get("flops"))
    report.record["images"][name][COMPILED]["first_seconds"] = first
    report.say(f"{name}, first compiled steps: {first:.1f} s")


def _compiled_times(run: TokenizerRun) -> tuple[float, list[float]]:
    """Seconds of the first two steps, which compile, and of each of some after them."""
    device = resolve_device(run.train.device)
    run = replace(run, train=replace(run.train, compile=True))
    step = _image_calls(*_training(run, device))[TRAIN_STEP]
    first = sum(_seconds(step, device) for _ in range(2))
    return first, _in_turns({"": step}, device, _REPEATS)[""]


def _in_time(function: Callable[[Any], Any], argument: object, seconds: float) -> Any:  # noqa: ANN401
    """Call a function of a module in a process that is ended when the time is up.

    Raises:
        TimeoutError: the time is up.
        RuntimeError: the function raised an error, or its process died.
    """
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe(duplex=False)
    process = context.Process(target=_answer, args=(there, function, argument))
    process.start()
    there.close()
    try:
        if not here.poll(max(0.0, seconds)):
            raise TimeoutError(f"not done after {seconds:.0f} s")
        result, problem = here.recv()
    except EOFError:
        raise RuntimeError("its process ended without a result") from None
    finally:
        process.kill()
        process.join()
    if problem is not None:
        raise RuntimeError(problem)
    return result


def _answer(pipe: Connection, function: Callable[[Any], Any], argument: object) -> None:
    """Send the result of a call and None, or None and what Python says of its error."""
    try:
        answer = (function(argument), None)
    except Exception as error:  # noqa: BLE001 - it is raised again on the other side
        answer = (None, f"{type(error).__name__}: {error}\n{traceback.format_exc()}")
    pipe.send(answer)


def count_flops(call: Callable[[], object]) -> int:
    """Floating point operations of products and convolutions, counted in one call."""
    with _FlopCounter() as counter:
        call()
    return counter.total


class _FlopCounter(TorchDispatchMode):
    """Sum over all operations inside.

    Torch's own, `FlopCounterMode`, also tells modules apart, for which it cannot take a parameter
    as a module's input where there are no gradients.
    """

    def __init__(self) -> None:
        """Start from 0."""
        super().__init__()
        self.total = 0

    def __torch_dispatch__(
        self,
        function: Any,  # noqa: ANN401
        types: Any,  # noqa: ANN401
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:  # noqa: ANN401
        """Run an operation and add its count, if it is a product."""
        result = function(*args, **(kwargs or {}))
        count = flop_registry.get(function._overloadpacket)
        if count is not None:
            self.total += count(*args, **(kwargs or {}), out_val=result)
        return result
