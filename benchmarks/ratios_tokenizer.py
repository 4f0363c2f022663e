"""Parts of the tokenizer against the paper's definitions as they stand, `reference.py`."""

import itertools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks import reference
from benchmarks.entry import Entry, Pair
from benchmarks.ratios_images import images
from mergevq.config.base import Precision
from mergevq.config.recipes import TOKENIZER_RECIPES
from mergevq.runtime.device import lay_out, resolve_precision
from mergevq.tokenizer.quantizers.lfq import quantize_losses
from mergevq.tokenizer.reducers.matching import merge_schedule
from mergevq.tokenizer.tokenizer import Tokenizer
from mergevq.training.bench.tokenizer import LfqSize, MergeSize, merge_and_unmerge

CPU = torch.device("cpu")
_KEY_DIM = 64
"""Channels of the keys that merging compares."""


def lfq_pair(size: LfqSize) -> Pair:
    """Losses of the quantizer and their gradient: without a codebook, or over all codes."""
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(1, size.num_tokens, size.num_bits, generator=generator)
    latents.requires_grad_()

    def gradient(losses: Callable[[Tensor, float], Any]) -> Tensor:
        found = losses(latents, size.temperature)
        total = found.commitment + found.token_entropy - found.codebook_entropy
        return torch.autograd.grad(total, latents)[0]

    def agree(plain: Tensor, ours: Tensor) -> None:
        assert (plain - ours).abs().max() < 1e-3 * plain.abs().max()

    return Pair(lambda: gradient(reference.lfq_losses), lambda: gradient(quantize_losses), agree)


def merge_pair(size: MergeSize) -> Pair:
    """Merging, copying back and the gradient: an index for each cell, or a dense source matrix."""
    generator = torch.Generator().manual_seed(0)

    def normal(num_tokens: int, dim: int) -> Tensor:
        return torch.randn(size.num_images, num_tokens, dim, generator=generator)

    counts = merge_schedule(size.num_tokens, size.num_kept, size.num_layers)
    remaining = [size.num_tokens, *(size.num_tokens - n for n in itertools.accumulate(counts))]
    keys = [normal(num_tokens, _KEY_DIM) for num_tokens in remaining]
    grid = normal(size.num_tokens, size.dim).requires_grad_()
    weight = normal(size.num_tokens, size.dim)

    def gradient(found: Tensor) -> Tensor:
        return torch.autograd.grad(found, grid, weight)[0]

    return Pair(
        lambda: gradient(reference.unmerge(*reference.merge(grid, keys))),
        lambda: gradient(merge_and_unmerge(grid, keys)),
        torch.testing.assert_close,
    )


def precision_pair(recipe: str, num_images: int) -> Pair:
    """Encoding and decoding in float32, or as commands do it on this device."""
    config = TOKENIZER_RECIPES[recipe]().model
    image, _ = images(num_images, config.image_size)

    def made(precision: Precision) -> Tokenizer:
        torch.manual_seed(0)
        tokenizer = Tokenizer(config).eval()
        tokenizer.precision = precision
        lay_out(tokenizer, CPU, resolve_precision(precision, CPU))
        return tokenizer

    plain, ours = made("float32"), made("auto")

    @torch.inference_mode()
    def decoded(tokenizer: Tokenizer) -> Tensor:
        return tokenizer.reconstruct(image).image

    def agree(plain: Tensor, ours: Tensor) -> None:
        # A bit of a token near 0 may differ, and with it what follows.
        assert (plain - ours).abs().median() < 0.1

    return Pair(lambda: decoded(plain), lambda: decoded(ours), agree)


def _merging(num_tokens: int, num_kept: int, dim: int, num_images: int) -> Entry:
    size = MergeSize(num_tokens, num_kept, 12, dim, num_images)
    plural = "image" if num_images == 1 else "images"
    return Entry(
        f"merge {num_tokens:,} to {num_kept} tokens and back, gradient, {num_images} {plural}",
        lambda: merge_pair(size),
    )


def _losses(num_bits: int, num_tokens: int) -> Entry:
    return Entry(
        f"LFQ losses, gradient, {num_bits} bits, {num_tokens:,} tokens",
        lambda: lfq_pair(LfqSize(num_bits, num_tokens)),
    )


def _precision(recipe: str, num_images: int) -> Entry:
    return Entry(
        f"encode and decode as commands do, {recipe}, {num_images} images",
        lambda: precision_pair(recipe, num_images),
    )


ENTRIES = (
    _losses(10, 1024),
    _losses(10, 4096),
    _losses(14, 1024),
    _losses(14, 4096),
    _losses(18, 256),
    _merging(256, 144, 192, 16),
    _merging(1024, 256, 512, 1),
    _merging(1024, 256, 512, 8),
    Entry(
        "encode and decode as commands do, photos64, 16 images",
        lambda: precision_pair("photos64", 16),
    ),
    Entry(
        "encode and decode as commands do, images128_gr, 2 images",
        lambda: precision_pair("images128_gr", 2),
    ),
)
