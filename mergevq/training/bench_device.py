"""Everything that is worth knowing of a device that is lent for a few minutes, in one record.

What comes first matters most: the device, its rate at a large product, encode, decode and the train
step with the share of that rate they reach, then decoding in every order beside the plain loops.
Nothing is begun once the time is up; what was left out is in the record.
"""

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from types import ModuleType
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from mergevq.config.generator import GeneratorConfig
from mergevq.config.training import TokenizerRun
from mergevq.generator.bench import bench_generator
from mergevq.generator.bench import line as generator_line
from mergevq.runtime.device import precision_name, resolve_device
from mergevq.training.bench import _image_calls, _in_turns, _training, conditions

_REPEATS = 5
"""Calls of encode, decode and train step that are timed."""
_STEPS = 16
"""Steps that are timed of each sequence."""
_LARGE_SIDE = {"cuda": 8192}
"""Side of the matrices whose product is the device's rate; elsewhere `_SMALL_SIDE`."""
_SMALL_SIDE = 512


def bench_device(
    run: TokenizerRun,
    config: GeneratorConfig,
    *,
    batch_sizes: Sequence[int],
    minutes: float,
    plain: ModuleType | None,
    say: Callable[[str], object],
) -> dict[str, Any]:
    """Measure until the time is up.

    Args:
        run: model, batch, losses and precision of the tokenizer, and the device; needs no data.
        config: size and grid of the generators.
        batch_sizes: images sampled at once.
        minutes: after these nothing more is begun.
        plain: the plain loops; None measures without.
        say: takes each line of the report as it comes.

    Returns:
        JSON: `conditions`, `flops_per_second` of the product, `images` (seconds, FLOPs and
        utilisation of each call), `speeds` of the generators, `left_out` and `seconds` in all.
    """
    started_at = time.perf_counter()
    device = resolve_device(run.train.device)
    found = conditions(run)
    say(f"device: {found.get('device')}, torch {torch.__version__}")
    rate = _rate(device)
    say(f"product in bf16: {rate / 1e12:.3g} TFLOP/s")
    record: dict[str, Any] = {
        "conditions": found,
        "flops_per_second": rate,
        "images": {},
        "speeds": [],
        "left_out": [],
    }

    def is_over(what: str) -> bool:
        over = time.perf_counter() - started_at > 60 * minutes
        if over:
            record["left_out"].append(what)
            say(f"{what}: left out, {minutes:g} minutes are over")
        return over

    if not is_over("encode, decode and train step"):
        record |= _measure_images(run, device, rate, say)
    for num_images in batch_sizes:
        if not is_over(f"sampling {num_images} at once"):
            for speed in bench_generator(
                config,
                batch_sizes=[num_images],
                num_repeats=1,
                max_steps=_STEPS,
                weights=["bf16"],
                device=device,
                plain=plain,
            ):
                record["speeds"].append(asdict(speed))
                say(generator_line(speed))
    record["seconds"] = time.perf_counter() - started_at
    return record


def _measure_images(
    run: TokenizerRun, device: torch.device, rate: float, say: Callable[[str], object]
) -> dict[str, Any]:
    """Seconds, FLOPs and utilisation of encode, decode and train step."""
    learner, batch = _training(run, device)
    images: dict[str, Any] = {}
    for what, call in _image_calls(learner, batch).items():
        flops = _flops(call)
        times = _in_turns({what: call}, device, _REPEATS)[what]
        seconds = statistics.median(times)
        images[what] = {
            "seconds": times,
            "flops": flops,
            "utilisation": flops / seconds / rate,
            "images_per_second": run.train.batch_size / seconds,
        }
        say(
            f"{what}: {1e3 * seconds:.1f} ms (best {1e3 * min(times):.1f}), "
            f"{run.train.batch_size / seconds:.3g} images/s, {flops / 1e12:.3g} TFLOP, "
            f"{flops / seconds / rate:.1%} of the product's rate"
        )
    return {"images": images, "precision": precision_name(learner.dtype)}


def _flops(call: Callable[[], object]) -> int:
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


def _rate(device: torch.device) -> float:
    """FLOPs per second of a large square product in bf16, the best of a few."""
    side = _LARGE_SIDE.get(device.type, _SMALL_SIDE)
    x = torch.randn(side, side, device=device, dtype=torch.bfloat16)
    seconds = min(_in_turns({"": lambda: x @ x}, device, _REPEATS)[""])
    return 2 * side**3 / seconds
