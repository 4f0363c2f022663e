"""The baseline that learned nothing."""

import math
from dataclasses import replace

import pytest
import torch

from mergevq.config.parts import Pool
from mergevq.data.layouts import source_bits
from mergevq.evaluate.analytic import AnalyticBaseline
from mergevq.metrics.image import psnr
from mergevq.nn.positions import from_patches, to_patches
from mergevq.tokenizer.analytic.components import fit_components
from tests.support.parts import tokenizer_config

CONFIG = tokenizer_config(
    image_size=16, channel_mult=(1, 2, 4), num_layers=2, num_bits=8, num_kept=10
)


def pictures(count=6):
    coarse = torch.rand(count, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    smooth = torch.nn.functional.interpolate(coarse, size=16, mode="bicubic").clamp(0, 1)
    return (255 * smooth).round().to(torch.uint8)


def measured(config, positions, num_kepts, *batches):
    baseline = AnalyticBaseline(config, positions)
    for pixels, places in batches:
        baseline.update(pixels, torch.tensor(places))
    return baseline.compute(num_kepts)


def test_without_merging_it_is_the_levels_of_every_patch():
    pixels = pictures()
    (row,) = measured(CONFIG, range(6), [16], (pixels, list(range(6))))
    image = pixels.float() / 127.5 - 1
    components = fit_components(image, 4, 8)
    patches = components.decode(components.codes(to_patches(image, 4)))
    expected = psnr(image, from_patches(patches, 4, (4, 4))).mean()
    assert row.psnr == pytest.approx(float(expected))
    assert (row.file_format, row.num_images, row.mean_bytes) == ("components", 6, 16)


def test_fewer_tokens_are_worse_and_cost_their_map():
    rows = measured(CONFIG, range(6), [6, 10, 16], (pictures(), list(range(6))))
    assert rows[0].psnr < rows[1].psnr < rows[2].psnr
    assert 8 * rows[0].mean_bytes == pytest.approx(6 * 8 + source_bits(16, 6))
    assert rows[0].budget_bytes == math.ceil(rows[0].mean_bytes)


def test_order_and_batches_of_images_do_not_matter_and_others_do_not_count():
    pixels = pictures()
    together = measured(CONFIG, [0, 2, 3, 5], [10], (pixels, list(range(6))))
    apart = measured(CONFIG, [0, 2, 3, 5], [10], (pixels[3:], [3, 4, 5]), (pixels[:3], [0, 1, 2]))
    assert together == apart
    assert together[0].num_images == 4


def test_a_tokenizer_without_merging_or_bits_has_none():
    given = (pictures(), list(range(6)))
    pooled = replace(CONFIG, reducer=Pool(num_layers=2, num_heads=2), num_kept=4)
    assert measured(pooled, range(6), [4], given) == []
    assert measured(CONFIG, [], [10], given) == []
