"""Helpers that the tests of `mergevq.data.batches` share."""

import numpy as np
import torch
from PIL import Image

from mergevq.data.batches import eval_batches


def noise(generator, width, height):
    pixels = torch.randint(256, (height, width, 3), dtype=torch.uint8, generator=generator)
    return Image.fromarray(pixels.numpy())


def ramp(width, height):
    """Red is the column, green the row."""
    rows, columns = np.mgrid[:height, :width]
    return Image.fromarray(np.stack([columns, rows, 0 * rows], -1).astype(np.uint8))


# Evaluation batches


def whole(dataset, **options):
    settings = {"image_size": 8, "batch_size": 4, "num_workers": 0}
    return list(eval_batches(dataset, **(settings | options)))
