"""The cost of a run, from a few small steps of it: parameters, products, memory and speed."""

import time
import weakref
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from mergevq.config.generator import (
    GeneratorConfig,
)
from mergevq.config.parts import bits_of, per_token
from mergevq.config.tokenizer import KeptConfig, TokenizerConfig
from mergevq.config.training import GeneratorRun, TokenizerRun
from mergevq.data.batches import Batch, open_train_val
from mergevq.data.tokens.batches import split
from mergevq.data.tokens.dataset import open_tokens
from mergevq.generator.build import AnyGenerator, build_generator
from mergevq.runtime import distributed
from mergevq.runtime.device import resolve_device
from mergevq.tokenizer.conditions.values import require_classes, unknown
from mergevq.tokenizer.expanders.unmerge import Unmerge
from mergevq.tokenizer.tokenizer import Tokenizer
from mergevq.training import generator_step, tokenizer_step
from mergevq.training.initial import find_start
from mergevq.training.tokenizer import run_batches

_TRACKED_IMAGES = 4
"""Images per pass at which memory is measured; more are extrapolated from this and its half."""
_LONG_STEP = 2.0
"""Seconds from which a step is long enough to be timed."""
_TIMED_SECONDS = 5.0
"""Least time over which speed is measured, in as many steps as it takes."""
_NUM_FITTED_IMAGES = 256
"""Images that components are fitted to, where a run starts from them: speed is not their matter."""
_OWN = 0.85
"""Share of the time that a step has a processor, from which it counts as its own."""


class Estimate(NamedTuple):
    """Time and memory of a run on one device; to a generator an image is a sequence."""

    num_parameters: dict[str, int]
    """Trained parameters by network."""
    products: dict[str, int]
    """Multiply-adds of one image's forward pass at the nominal K; see `count_products`."""
    sequence_length: int
    """Most inputs of the transformer: L and the class token, or a generator's prefix and tokens."""
    num_train_images: int
    """To train on, mirror images counted."""
    num_val_images: int
    """Held out."""
    num_classes: int
    """0 for data without labels."""
    device: torch.device
    dtype: torch.dtype
    """Type of the products."""
    pass_images: int
    """Images that are in memory at once: the batch over ranks and accumulated parts."""
    memory_bytes: float
    """Most bytes that tensors will take at once, with all losses on and the largest K."""
    timed_images: int
    """Images of the pass that was timed; at most `pass_images`."""
    images_per_second: float
    """At that size, with loading left out."""
    cpu_share: float | None
    """CPU seconds over seconds of the thread that timed it: less than about 1 where other work has
    the processor too. None where another device computes."""


class _Trainee(NamedTuple):
    """A run that is ready for its last step, in which all of it takes part."""

    step: Callable[[int], object]
    """Train on so many images."""
    networks: Mapping[str, Iterable[nn.Parameter]]
    dtype: torch.dtype | None
    """Type of autocast; None is float32."""


class _Measured(NamedTuple):
    """Time and memory of some steps."""

    trainee: _Trainee
    memory_bytes: float
    timed_images: int
    images_per_second: float
    cpu_share: float | None


class MemoryTracker(TorchDispatchMode):
    """Inside it, counts the bytes of all tensors made on a device, until they are freed.

    What a kernel takes for itself while it runs is not seen.
    """

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.live = 0
        """Bytes of the tensors that are there now."""
        self.peak = 0
        """Most bytes there have been since it was last set."""
        self._kind = device.type
        self._sizes: dict[int, int] = {}

    def __torch_dispatch__(
        self,
        function: Callable[..., Any],
        types: Any,  # noqa: ANN401
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:  # noqa: ANN401
        result = function(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor) and leaf.device.type == self._kind:
                self._add(leaf.untyped_storage())
        self.peak = max(self.peak, self.live)
        return result

    def _add(self, storage: torch.UntypedStorage) -> None:
        """Count a storage once, and uncount it when it dies."""
        address = storage._cdata
        if address not in self._sizes:
            self._sizes[address] = storage.nbytes()
            self.live += storage.nbytes()
            weakref.finalize(storage, self._remove, address)

    def _remove(self, address: int) -> None:
        """A storage died."""
        self.live -= self._sizes.pop(address)


def estimate(run: TokenizerRun | GeneratorRun) -> Estimate:
    """Take a few steps of a run with few images, without writing anything.

    Raises:
        ValueError: the run cannot start: settings, data or device do not fit.
    """
    device = resolve_device(run.train.device)
    world = distributed.World(rank=0, world_size=1, local_rank=0, device=device)
    pass_images = distributed.local_batch(
        run.train.batch_size, world, accumulation=run.train.accumulation
    )
    alone = replace(run.train, batch_size=pass_images, accumulation=1)
    if isinstance(run, GeneratorRun):
        return _estimate_generator(replace(run, train=alone), world)
    return _estimate_tokenizer(replace(run, train=alone), world)


def count_products(config: TokenizerConfig | GeneratorConfig) -> dict[str, int]:
    """Multiply-adds of the forward pass of one image or sequence at the nominal K, by network.

    Those of matrix products, convolutions and attention; no others are counted. Nothing is
    computed, and no memory is taken.
    """
    with torch.device("meta"), torch.no_grad():
        if isinstance(config, GeneratorConfig):
            passes = _generator_passes(build_generator(config).eval())
        else:
            passes = _tokenizer_passes(Tokenizer(config).eval().requires_grad_(requires_grad=False))
        return {name: _multiply_adds(run) for name, run in passes.items()}


def _tokenizer_passes(tokenizer: Tokenizer) -> dict[str, Callable[[], object]]:
    """Forward pass of each network of a tokenizer on the meta device."""
    config = tokenizer.config
    grid_shape = (config.grid_size, config.grid_size)
    image = torch.empty(1, 3, config.image_size, config.image_size)
    codes = torch.empty(1, config.num_kept, config.decoded_dim)
    told = unknown(config.condition, 1, image)
    layout = tokenizer.encoder(image, config.num_kept, condition=told).layout
    given = tokenizer.expander(codes, layout, grid_shape, condition=told)

    def encode() -> None:
        out = tokenizer.encoder(image, config.num_kept, condition=told)
        tokenizer.encoder.latents(out)

    def expand() -> None:
        expander = tokenizer.expander
        if isinstance(expander, Unmerge):
            expander.predictor(codes, grid_shape)
        else:
            expander(codes, layout, grid_shape, condition=told)

    return {
        "encoder": encode,
        "decoder": lambda: tokenizer.decoder(given),
        _expander_name(tokenizer): expand,
    }


def _expander_name(tokenizer: Tokenizer) -> str:
    """The part that has an expander's weights, in words."""
    return "source predictor" if isinstance(tokenizer.expander, Unmerge) else "expander"


def _generator_passes(generator: AnyGenerator) -> dict[str, Callable[[], object]]:
    """Forward pass in training of the parts of a generator, on the meta device.

    Attention is counted as if every input saw all others: kernels differ in how much they skip.
    """
    config, network = generator.config, generator.network
    inputs = torch.empty(1, generator.num_inputs(config.num_kept), config.dim)
    num_states = config.num_states(config.num_kept)
    states = torch.empty(num_states, config.dim)
    parts = torch.empty(num_states, len(config.part_names), dtype=torch.int64)

    def transform() -> None:
        x = inputs
        for block in generator.blocks:
            x = block(x)

    return {
        "blocks": transform,
        "head": lambda: network.head(states, parts, network.embed_part),
    }


def _multiply_adds(run: Callable[[], object]) -> int:
    """Multiply-adds of a call."""
    with FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops() // 2


def describe(run: TokenizerRun | GeneratorRun, found: Estimate) -> dict[str, str]:
    """Describe what a run would take, in words by name.

    Args:
        run: what was estimated.
        found: what `estimate` returned for it.
    """
    unit = "sequence" if isinstance(run, GeneratorRun) else "image"
    parts = ", ".join(f"{count:,} {name}" for name, count in found.num_parameters.items())
    candidates = run.kept.candidates
    kept = f"{min(candidates)} to " if len(candidates) > 1 else ""
    num_images = run.train.num_steps * run.train.batch_size
    products = ", ".join(f"{count / 1e9:.3g} {name}" for name, count in found.products.items())
    classes = f"{found.num_classes} classes" if found.num_classes else "no labels"
    seconds = num_images / found.images_per_second
    model = run.model
    if isinstance(model, GeneratorConfig):
        price = f"{bits_of(model.head.sizes):g} bits"
    else:
        price = per_token(model.quantizer)
    lines = {
        "parameters": f"{sum(found.num_parameters.values()):,} ({parts})",
        "products": f"10^9 multiply-adds of a forward pass of one {unit} at {run.model.num_kept} "
        f"tokens: {products}",
        "tokens": f"{kept}{max(candidates)} of {run.model.num_tokens} per image, {price} each",
        "sequence": f"at most {found.sequence_length} inputs of the transformer",
        "data": f"{found.num_train_images:,} training and {found.num_val_images:,} validation "
        f"{unit}s, {classes}",
        "steps": f"{run.train.num_steps:,} of {run.train.batch_size} {unit}s: every {unit} "
        f"{num_images / found.num_train_images:.3g} times",
        "device": f"{found.device.type}, {str(found.dtype).removeprefix('torch.')}",
        "memory": f"{found.memory_bytes / 2**30:.3g} GiB of tensors with {found.pass_images} "
        f"{unit}s at once (estimate)",
        "speed": f"{found.images_per_second:.3g} {unit}s per second without loading (measured "
        f"with {found.timed_images} at once)",
        "time": f"{_hours(seconds)} at that speed{_limit(run, seconds)}",
        "out": run.out,
    }
    if found.cpu_share is not None and found.cpu_share < _OWN:
        lines["processor"] = (
            f"other work has it too: this run had it for {found.cpu_share:.0%} of the time, and "
            f"would take about {_hours(seconds * found.cpu_share)} alone"
        )
    return lines


def _limit(run: TokenizerRun | GeneratorRun, seconds: float) -> str:
    """The limit on a run's time, where it is the shorter one."""
    minutes = run.train.max_minutes
    if minutes is None or 60 * minutes >= seconds:
        return ""
    return f"; it ends after train.max_minutes ({_hours(60 * minutes)}), its schedules with it"


def _hours(seconds: float) -> str:
    """Hours and minutes in words."""
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours} h {minutes} min"


def _estimate_tokenizer(run: TokenizerRun, world: distributed.World) -> Estimate:
    """Estimate of a run whose batch is one pass of one process."""
    train_set, val_set = open_train_val(run.data)
    require_classes(run.model.condition, train_set.num_classes, "the data")
    probe = replace(
        run,
        kept=KeptConfig(candidates=(max(run.kept.candidates),)),
        # What is kept is not worth decoding for one batch.
        data=replace(run.data, num_workers=0, cache="none"),
    )
    batch = next(iter(run_batches(probe, world, train_set, 0)))
    start = find_start(probe, train_set, max_images=_NUM_FITTED_IMAGES)

    def make() -> _Trainee:
        learner = tokenizer_step.build(probe, world, num_classes=train_set.num_classes, start=start)
        state = learner.state
        state.step = run.train.num_steps - 1
        parts = {
            "encoder": state.tokenizer.encoder,
            "decoder": state.tokenizer.decoder,
            _expander_name(state.tokenizer): state.tokenizer.expander,
            "alignment head": state.teacher,
            "distillation": state.distillation,
            "discriminator": state.discriminator if learner.has_adversary else None,
        }
        return _Trainee(
            step=lambda num: learner.step(_first(batch, num)),
            networks={n: part.parameters() for n, part in parts.items() if part is not None},
            dtype=learner.dtype,
        )

    return _estimate(
        _measure(make, run.train.batch_size, world.device),
        run.model,
        world,
        pass_images=run.train.batch_size,
        sequence_length=run.model.num_tokens + 1,
        num_train_images=len(train_set),
        num_val_images=len(val_set),
        num_classes=train_set.num_classes,
    )


def _estimate_generator(run: GeneratorRun, world: distributed.World) -> Estimate:
    """Estimate of a run whose batch is one pass of one process."""
    dataset = open_tokens(run.tokens.path)
    train_set, val_set = split(dataset, run.tokens.val_fraction)
    num_kept = max(run.kept.candidates)
    with torch.device("meta"):
        shapes = build_generator(run.resolved_model)

    def make() -> _Trainee:
        learner = generator_step.build(run, world, dataset.record)
        generator = learner.state.generator
        head = list(generator.network.get_submodule("head").parameters())
        blocks = [p for block in generator.blocks for p in block.parameters()]
        others = {id(parameter) for parameter in (*head, *blocks)}

        def step(num: int) -> None:
            rows = [row % len(train_set) for row in range(num)]
            learner.step(train_set.batch(rows, num_kept))

        embeddings = [p for p in generator.parameters() if id(p) not in others]
        networks = {"embeddings": embeddings, "blocks": blocks, "head": head}
        return _Trainee(step=step, networks=networks, dtype=learner.dtype)

    return _estimate(
        _measure(make, run.train.batch_size, world.device),
        generator_step.fitted_config(run, dataset.record),
        world,
        pass_images=run.train.batch_size,
        sequence_length=shapes.num_inputs(num_kept),
        num_train_images=len(train_set),
        num_val_images=len(val_set),
        num_classes=dataset.record.num_classes,
    )


def _estimate(
    measured: _Measured,
    model: TokenizerConfig | GeneratorConfig,
    world: distributed.World,
    *,
    pass_images: int,
    sequence_length: int,
    num_train_images: int,
    num_val_images: int,
    num_classes: int,
) -> Estimate:
    """Put together what was measured and what is known."""
    trainee = measured.trainee
    return Estimate(
        num_parameters={name: _num_trained(part) for name, part in trainee.networks.items()},
        products=count_products(model),
        sequence_length=sequence_length,
        num_train_images=num_train_images,
        num_val_images=num_val_images,
        num_classes=num_classes,
        device=world.device,
        dtype=trainee.dtype or torch.float32,
        pass_images=pass_images,
        memory_bytes=measured.memory_bytes,
        timed_images=measured.timed_images,
        images_per_second=measured.images_per_second,
        cpu_share=measured.cpu_share,
    )


def _measure(make: Callable[[], _Trainee], most: int, device: torch.device) -> _Measured:
    """Memory of a step of `most` images, and speed."""
    with (tracker := MemoryTracker(device)):
        trainee = make()
        large = min(_TRACKED_IMAGES, most)
        small = max(1, large // 2)
        peaks = []
        # The first step makes the optimizers' moments; it is of the small size too.
        for num_images in (small, small, large):
            tracker.peak = tracker.live
            trainee.step(num_images)
            peaks.append(tracker.peak)
    per_image = (peaks[2] - peaks[1]) / max(1, large - small)
    timed = _size_to_time(trainee.step, start=large, most=most, device=device)
    seconds, cpu_seconds = _time(lambda: trainee.step(timed), device)
    memory = peaks[2] + per_image * (most - large)
    share = cpu_seconds / seconds if device.type == "cpu" else None
    return _Measured(trainee, memory, timed, timed / seconds, share)


def _size_to_time(
    step: Callable[[int], object], *, start: int, most: int, device: torch.device
) -> int:
    """Double the images of a step until it takes long enough; the last size."""
    num_images = start
    while True:
        step(num_images)  # Kernels of a new size may be chosen or compiled first.
        started_at = _now(device)
        step(num_images)
        seconds = _now(device) - started_at
        if num_images == most or seconds > _LONG_STEP:
            return num_images
        num_images = min(2 * num_images, most)


def _time(step: Callable[[], object], device: torch.device) -> tuple[float, float]:
    """Seconds of a step, and those in which the processor was at work on it in this thread."""
    num_steps, started_at, cpu_started_at = 0, _now(device), time.thread_time()
    while True:
        step()
        num_steps += 1
        seconds, cpu_seconds = _now(device) - started_at, time.thread_time() - cpu_started_at
        if seconds >= _TIMED_SECONDS:
            return seconds / num_steps, cpu_seconds / num_steps


def _now(device: torch.device) -> float:
    """Seconds on a clock, when the device has done what it was given."""
    if device.type != "cpu":
        torch.accelerator.synchronize()
    return time.perf_counter()


def _first(batch: Batch, num_images: int) -> Batch:
    """The first images of a batch, with their views."""
    student, teacher = batch.student_view, batch.teacher_view
    return Batch(
        image=batch.image[:num_images],
        label=batch.label[:num_images],
        student_view=None if student is None else student[:num_images],
        teacher_view=None if teacher is None else teacher[:num_images],
        index=batch.index[:num_images],
    )


def _num_trained(parameters: Iterable[nn.Parameter]) -> int:
    """How many numbers are trained."""
    return sum(weight.numel() for weight in parameters if weight.requires_grad)
