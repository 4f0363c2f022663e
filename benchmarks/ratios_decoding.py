"""Decoding of size B with guidance, against loops like those of the authors of each order.

Both ways stand in the middle of a sequence, the caches full of made-up keys, and take the same
steps from there. The loops have the authors' bf16, or float32 beside ours in float32, which is
what processors that do not multiply bf16 need.
"""

from dataclasses import replace

import torch
from torch import Tensor, nn

from benchmarks import reference_generator
from benchmarks.entry import Entry, Pair
from mergevq.config.generator import (
    OneByOne,
    SamplingSettings,
    Several,
    Weights,
)
from mergevq.config.parts.orders import (
    Order,
    Random,
    Raster,
)
from mergevq.generator.autoregressive import Autoregressive
from mergevq.generator.bench import (
    NUM_RANDOM_STEPS,
    grid_config,
    made_up_sequences,
    random_generator,
    size_config,
)
from mergevq.generator.sampling import arccos_schedule
from mergevq.generator.weights import as_weights

SCALE = 4.0
"""Guidance."""
_IN_A_ROW = 16
"""Steps in the middle of a sequence, which is then taken up there again."""


class _Ours:
    """Sampling of the package."""

    def __init__(self, order: Order, weights: Weights, num_images: int, num_cells: int) -> None:
        generator = as_weights(_generator(order, num_cells), weights)
        config = generator.config
        in_parallel = config.order.in_parallel
        passes = Several(num_steps=NUM_RANDOM_STEPS) if in_parallel else OneByOne()
        settings = SamplingSettings(guidance_scale=SCALE, passes=passes)
        draws = generator.draws(0, range(num_images), config.num_kept, settings)
        labels = torch.zeros(num_images, dtype=torch.int64)
        self.decoder = generator.decoder(labels, config.num_kept, draws, settings)
        self.history = generator.parts(made_up_sequences(config, num_images, generator.device))
        numbers = torch.Generator().manual_seed(0)
        for memory in self.decoder.memory:
            memory.copy_(torch.randn(memory.shape[-1], generator=numbers).expand_as(memory))
        self.first = (self.decoder.num_steps - _IN_A_ROW) // 2
        self.done = _IN_A_ROW

    def __call__(self) -> Tensor:
        """One step; the parts of its tokens and all before."""
        if self.done == _IN_A_ROW:
            self.decoder.seek(self.first, self.history)
            self.done = 0
        self.decoder.step()
        self.done += 1
        return self.decoder.parts()


class _Plain:
    """A plain loop over a cache of the final length, as in LlamaGen's and RandAR's public code."""

    def __init__(self, order: Order, weights: Weights, num_images: int, num_cells: int) -> None:
        dtype = torch.float32 if weights == "float32" else torch.bfloat16
        generator = _generator(order, num_cells).to(dtype)
        config = generator.config
        null = torch.full((num_images,), config.null_class)
        self.history = generator.parts(made_up_sequences(config, 2 * num_images, generator.device))
        counts, num_steps = None, config.num_tokens
        if config.order.in_parallel:
            counts = arccos_schedule(config.num_kept, NUM_RANDOM_STEPS)
            num_steps = len(counts)
        state = generator.network.state_dict()
        if isinstance(generator.order, nn.Module):
            state |= generator.order.state_dict()
        self.loop = reference_generator.Loop(
            state,
            config,
            torch.cat([torch.zeros_like(null), null]),
            config.num_kept,
            "buffer",
            guidance=SCALE,
            order=torch.arange(config.num_kept).expand(2 * num_images, -1),
            counts=counts,
        )
        self.first = (num_steps - _IN_A_ROW) // 2
        self.num_before = sum(counts[: self.first]) if counts else self.first
        self.done = _IN_A_ROW

    def __call__(self) -> Tensor:
        """One step; the parts of its tokens and all before, of the conditional half."""
        if self.done == _IN_A_ROW:
            self.loop.seek(self.history[:, : self.num_before], self.first)
            self.done = 0
        self.loop.step()
        self.done += 1
        return self.loop.parts.chunk(2)[0]


def _generator(order: Order, num_cells: int) -> Autoregressive:
    """Random weights of size B."""
    config = replace(grid_config(size_config("B"), num_cells), order=order)
    generator = random_generator(config, torch.device("cpu"))
    assert isinstance(generator, Autoregressive)
    return generator


def _alike(plain: Tensor, ours: Tensor) -> None:
    """As many parts of as many images; that they are equal is a test of float32."""
    # Orders with slots give all of them, decoded or not.
    assert plain.shape[0] == ours.shape[0]
    assert plain.shape[2] == ours.shape[2]
    assert plain.shape[1] <= ours.shape[1]


def _entry(
    name: str, order: Order, weights: Weights, num_images: int, num_cells: int = 256
) -> Entry:
    images = "1 image" if num_images == 1 else f"{num_images} images"
    arguments = (order, weights, num_images, num_cells)
    return Entry(
        f"decode a step of {num_cells:,} cells, {name}, guidance, size B, {weights}, {images}",
        lambda: Pair(_Plain(*arguments), _Ours(*arguments), _alike),
    )


ENTRIES = (
    _entry("raster order", Raster(), "bf16", 1),
    _entry("raster order", Raster(), "fp16", 1),
    _entry("raster order", Raster(), "bf16", 8),
    _entry("RandAR in 64 passes", Random(), "bf16", 1),
    _entry("RandAR in 64 passes", Random(), "bf16", 8),
    _entry("raster order", Raster(), "float32", 1),
    _entry("raster order", Raster(), "float32", 8),
    _entry("raster order", Raster(), "float32", 1, 1024),
    _entry("RandAR in 64 passes", Random(), "float32", 1),
)
