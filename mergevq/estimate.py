"""What a run will take, found by taking a few small steps of it: parameters, memory, speed."""

import time
import weakref
from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mergevq import distributed
from mergevq.config import KeptConfig, TokenizerRun
from mergevq.data import Batch, open_train_val
from mergevq.run import resolve_device
from mergevq.train_tokenizer import build, run_batches, train_step

_TRACKED_IMAGES = 4
"""Images per pass at which memory is measured; more are extrapolated from this and its half."""
_LONG_STEP = 2.0
"""Seconds from which a step is long enough to be timed."""


class Estimate(NamedTuple):
    """What a run will take on one device."""

    num_parameters: dict[str, int]
    """Trained parameters by network."""
    num_train_images: int
    num_val_images: int
    num_classes: int
    """0 for data without labels."""
    device: torch.device
    dtype: torch.dtype
    """Of the products."""
    pass_images: int
    """Images that are in memory at once: the batch over ranks and accumulated parts."""
    memory_bytes: float
    """Most bytes that tensors will take at once, with all losses on and the largest K."""
    timed_images: int
    """Images of the pass that was timed; at most `pass_images`."""
    images_per_second: float
    """At that size, with loading left out."""


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


def estimate(run: TokenizerRun) -> Estimate:
    """Take a few steps of a run with few images, without writing anything.

    Raises:
        ValueError: the run cannot start: settings, data or device do not fit.
    """
    device = resolve_device(run.train.device)
    world = distributed.World(rank=0, world_size=1, local_rank=0, device=device)
    pass_images = distributed.local_batch(
        run.train.batch_size, world, accumulation=run.train.accumulation
    )
    train_set, val_set = open_train_val(run.data)
    probe = replace(
        run,
        kept=KeptConfig(candidates=(max(run.kept.candidates),)),
        data=replace(run.data, num_workers=0),
        train=replace(run.train, batch_size=pass_images, accumulation=1),
    )
    batch = next(iter(run_batches(probe, world, train_set, 0)))
    tracker = MemoryTracker(device)
    with tracker:
        state, setting = build(probe, world, num_classes=train_set.num_classes)
        # By the last step every loss takes part.
        state.step = run.train.num_steps - 1
        large = min(_TRACKED_IMAGES, pass_images)
        small = max(1, large // 2)
        peaks = []
        # The first step makes the optimizers' moments; it is of the small size too.
        for num_images in (small, small, large):
            tracker.peak = tracker.live
            train_step(state, setting, _first(batch, num_images))
            peaks.append(tracker.peak)
    per_image = (peaks[2] - peaks[1]) / max(1, large - small)
    timed_images, seconds = _time(
        lambda num_images: train_step(state, setting, _first(batch, num_images)),
        start=large,
        most=pass_images,
        device=device,
    )
    networks = {
        "encoder": state.tokenizer.encoder,
        "decoder": state.tokenizer.decoder,
        "source predictor": state.tokenizer.source_predictor,
        "alignment head": state.teacher,
        "discriminator": state.discriminator if setting.has_adversary else None,
    }
    return Estimate(
        num_parameters={k: _num_parameters(v) for k, v in networks.items() if v is not None},
        num_train_images=len(train_set),
        num_val_images=len(val_set),
        num_classes=train_set.num_classes,
        device=device,
        dtype=setting.dtype or torch.float32,
        pass_images=pass_images,
        memory_bytes=peaks[2] + per_image * (pass_images - large),
        timed_images=timed_images,
        images_per_second=timed_images / seconds,
    )


def _time(
    step: Callable[[int], object], *, start: int, most: int, device: torch.device
) -> tuple[int, float]:
    """Double the images of a step until it takes long enough; the last size, and its seconds."""
    num_images = start
    while True:
        step(num_images)  # Kernels of a new size may be chosen or compiled first.
        started_at = _now(device)
        step(num_images)
        seconds = _now(device) - started_at
        if num_images == most or seconds > _LONG_STEP:
            return num_images, seconds
        num_images = min(2 * num_images, most)


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


def _num_parameters(module: nn.Module) -> int:
    """Parameters that are trained."""
    return sum(weight.numel() for weight in module.parameters() if weight.requires_grad)
