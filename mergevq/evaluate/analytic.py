"""Reconstructions of a tokenizer that learned nothing: the baseline `components`.

Its codes are the signs of principal components of patches that merge as pixels do, and its decoder
puts each component at its level (`mergevq.tokenizer.analytic.components`). The components are those
of the evaluated images themselves, which a tokenizer has not seen: it has the advantage.
"""

import math
from collections.abc import Sequence

import torch
from jaxtyping import Int64, UInt8
from torch import Tensor

from mergevq.config.parts import Binary, Merge
from mergevq.config.tokenizer import TokenizerConfig
from mergevq.data.layouts import source_bits, unmerge
from mergevq.metrics.baselines import BaselineMeasurement
from mergevq.metrics.image import psnr
from mergevq.nn.positions import from_patches
from mergevq.runtime import distributed
from mergevq.tokenizer.analytic.components import encode_analytic, fit_components

NAME = "components"
_BATCH_SIZE = 64


class AnalyticBaseline:
    """Images that arrive in batches, kept until all are there.

    A tokenizer that does not merge, or whose codes are not of bits, has no such baseline, nor have
    images with fewer patches than there are numbers in one.

    Args:
        config: settings of the tokenizer beside which it stands: patches, bits, layers.
        positions: images that count.
    """

    def __init__(self, config: TokenizerConfig, positions: Sequence[int]) -> None:
        bits = isinstance(config.quantizer, Binary)
        self._config = config
        self._positions = torch.tensor(sorted(positions if bits else ()), dtype=torch.int64)
        self._pixels: list[UInt8[Tensor, "n 3 h w"]] = []
        self._kept: list[Int64[Tensor, "n"]] = []

    def update(self, pixels: UInt8[Tensor, "b 3 h w"], positions: Int64[Tensor, "b"]) -> None:
        """Keep those of the images that were chosen."""
        chosen = torch.isin(positions.cpu(), self._positions)
        self._pixels.append(pixels.cpu()[chosen])
        self._kept.append(positions.cpu()[chosen])

    def compute(self, num_kepts: Sequence[int]) -> list[BaselineMeasurement]:
        """The baseline at each K, over the images of all ranks; every rank must call."""
        reducer = self._config.reducer
        pixels = distributed.gather(torch.cat(self._pixels))
        order = distributed.gather(torch.cat(self._kept)).argsort()
        patch_size, num_bits = self._config.patch_size, self._config.quantizer.dim
        grid_shape = (pixels.shape[2] // patch_size, pixels.shape[3] // patch_size)
        num_patches = len(pixels) * math.prod(grid_shape)
        if not isinstance(reducer, Merge) or num_patches <= 3 * patch_size**2:
            return []
        # Pixels in [-1, 1], in the same order on any number of ranks.
        image = pixels[order].float() / 127.5 - 1
        components = fit_components(image, patch_size, num_bits)
        measured = []
        for count in num_kepts:
            values = []
            for part in image.split(_BATCH_SIZE):
                codes, source = encode_analytic(
                    *(components, part, count, reducer.num_layers, reducer.shape),
                    reducer.locality,
                )
                patches = unmerge(components.decode(codes), source)
                values.append(psnr(part, from_patches(patches, patch_size, grid_shape)))
            bits = count * num_bits + source_bits(math.prod(grid_shape), count)
            measured.append(
                BaselineMeasurement(
                    file_format=NAME,
                    budget_bytes=math.ceil(bits / 8),
                    mean_bytes=bits / 8,
                    psnr=float(torch.cat(values).double().mean()),
                    num_images=len(image),
                    num_above_budget=0,
                )
            )
        return measured
