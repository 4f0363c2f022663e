"""A tokenizer of real numbers made into one with indices, without training.

Statistics of its codes over a data set become those of a quantizer `dimensions`; stem, blocks,
expander and decoder stay as they are.

Source: Wang et al. 2025, "Bridging Continuous and Discrete Tokens for Autoregressive Visual
Generation" (TokenBridge, arXiv:2503.16430); code YuqingWang1029/TokenBridge.

Differs: the order of channels is that of their share of low frequencies, measured, where the
authors' is written down; among them are frequencies up to a quarter of the highest, not below, so
that a grid of 8 cells has any beside its mean.

Shape letters: B batch, L grid cells, K tokens, D channels, H and W cells.
"""

import contextlib
import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from mergevq.config.base import require
from mergevq.config.parts import Continuous, Dimensions, Unquantized
from mergevq.config.tokenizer import TokenizerConfig
from mergevq.config.training import Quantization
from mergevq.data.batches import eval_batches
from mergevq.data.images import ImageDataset, open_images
from mergevq.data.layouts import Source, unmerge
from mergevq.metrics.codes import Channels, ChannelStatistics
from mergevq.runtime.artefacts import load_model, resolve, save_model, tokens_hash
from mergevq.runtime.device import deterministic, resolve_device
from mergevq.runtime.logs import Progress
from mergevq.runtime.settings import from_json, to_json
from mergevq.tokenizer.conditions.values import condition_of
from mergevq.tokenizer.seams import Encoded
from mergevq.tokenizer.tokenizer import Tokenizer

_LOW = 0.125
"""Largest low frequency in cycles a cell: a quarter of the highest there is, 0.5."""


class Measured(NamedTuple):
    """Statistics of codes."""

    channels: ChannelStatistics
    order: tuple[int, ...]
    """Channels by their share of low frequencies, the largest first; () where there is no grid."""
    num_images: int


class QuantizedTokenizer(NamedTuple):
    """A tokenizer after quantization, and what it was made by."""

    tokenizer: Tokenizer
    measured: Measured


def quantize(settings: Quantization) -> QuantizedTokenizer:
    """Measure codes, and write the tokenizer whose tokens are their nearest levels.

    Args:
        settings: of the quantization.

    Raises:
        ValueError: the tokenizer is not of real numbers, data or settings do not fit, or a channel
            is the same everywhere.
    """
    directory = resolve(settings.model)
    saved = load_model(directory, kind="tokenizer")
    config = from_json(TokenizerConfig, saved.record["config"])
    if not isinstance(config.quantizer, Continuous):
        raise ValueError(
            f"{directory} has model.quantizer.kind {config.quantizer.kind}, whose tokens have "
            "indices already; quantize a tokenizer of kind kl or none, such as digits32_kl's"
        )
    require(
        Path(settings.out).resolve() != directory.resolve(),
        f"out ({settings.out}) must be another directory than the tokenizer's",
    )
    # Refuses the number of levels before images are read.
    quantizer = Dimensions(
        dim=config.quantizer.dim,
        num_levels=settings.num_levels,
        normalized=isinstance(config.quantizer, Unquantized),
    )
    tokenizer = Tokenizer.from_pretrained(
        directory, precision="float32", device=resolve_device(settings.device)
    )
    images = open_images(settings.data, max_pixels=settings.max_pixels)
    measured = measure(tokenizer, images, settings)
    found = quantized(tokenizer, replace(quantizer, channel_order=measured.order), measured)
    note = {
        "model": tokens_hash(directory),
        "data": settings.data,
        "images": to_json(images.identity()),
        "num_images": measured.num_images,
    }
    save_model(
        settings.out,
        found.state_dict(),
        found.config,
        kind="tokenizer",
        extra=saved.record["extra"] | {"quantization": note},
    )
    return QuantizedTokenizer(found, measured)


@torch.inference_mode()
def measure(tokenizer: Tokenizer, images: ImageDataset, settings: Quantization) -> Measured:
    """Statistics of codes over images, at the tokenizer's own K.

    Args:
        tokenizer: of real numbers, in evaluation mode.
        images: what is encoded.
        settings: say how many images, and how they are read.

    Raises:
        ValueError: a channel is the same everywhere.
    """
    config, device = tokenizer.config, next(tokenizer.parameters()).device
    channels, num_images = Channels(config.quantizer.dim), 0
    shares: list[Float[Tensor, "b d"]] = []
    total = len(images) if settings.max_images is None else min(settings.max_images, len(images))
    with deterministic(device), contextlib.closing(Progress(total, unit="image")) as progress:
        for batch in eval_batches(
            images,
            image_size=config.image_size,
            batch_size=settings.batch_size,
            max_images=settings.max_images,
            num_workers=settings.num_workers,
        ):
            condition = condition_of(config.condition, batch.label, "mergevq quantize")
            encoded = tokenizer.encode(batch.image.to(device), condition=condition)
            channels.update(encoded.codes)
            shares += _low_shares(encoded)
            num_images += len(batch.image)
            progress.update(len(batch.image))
    found = channels.compute()
    for channel, variance in enumerate(found.variance.tolist()):
        require(
            variance > 0,
            f"channel {channel} is the same in all {found.num_tokens} tokens, and needs a variance "
            "above 0: take more images, or train with a lower quantizer.kl_weight",
        )
    order: tuple[int, ...] = ()
    if shares:
        mean = torch.cat(shares).mean(0)
        order = tuple(mean.argsort(descending=True, stable=True).tolist())
    return Measured(found, order, num_images)


def _low_shares(encoded: Encoded) -> list[Float[Tensor, "b d"]]:
    """Shares of low frequencies of a batch; none where tokens have no place on a grid."""
    if not isinstance(encoded.layout, Source):
        return []
    cells = unmerge(encoded.codes.float(), encoded.layout)
    return [low_shares(cells.mT.unflatten(-1, encoded.grid_shape)).cpu()]


def low_shares(grid: Float[Tensor, "b d h w"]) -> Float[Tensor, "b d"]:
    """Share of each channel's power that is at low frequencies, its mean among them.

    They are those up to a quarter of the highest frequency along a side.

    Args:
        grid: channels of cells.
    """
    power = torch.fft.fft2(grid).abs().square()
    down, along = (torch.fft.fftfreq(side, device=grid.device) for side in grid.shape[2:])
    is_low = torch.hypot(down[:, None], along) <= _LOW
    whole = power.sum((-2, -1))
    return (power * is_low).sum((-2, -1)) / whole.clamp(min=torch.finfo(whole.dtype).tiny)


def quantized(tokenizer: Tokenizer, quantizer: Dimensions, measured: Measured) -> Tokenizer:
    """The same tokenizer with another quantizer, in evaluation mode.

    Args:
        tokenizer: of real numbers; of a mean and a deviation for each, only means are kept.
        quantizer: settings of the new quantizer.
        measured: its statistics.
    """
    state: Mapping[str, Tensor] = tokenizer.state_dict()
    cut = {
        name: state[name][: quantizer.dim]
        for name in ("encoder.to_latents.weight", "encoder.to_latents.bias")
    }
    found = Tokenizer(replace(tokenizer.config, quantizer=quantizer))
    mean, variance = measured.channels.mean, measured.channels.variance
    statistics = {
        "quantizer.mean": mean.float(),
        "quantizer.deviation": torch.tensor([math.sqrt(each) for each in variance.tolist()]),
        "quantizer.levels": found.quantizer.state_dict()["levels"],
    }
    found.load_state_dict({**state, **cut, **statistics})
    found.to(next(tokenizer.parameters()).device)
    return found.eval()
