"""Pieces of measuring a finished quickstart; test_quickstart.py has the whole."""

import pytest
import torch

from mergevq.data.batches import Batch
from mergevq.demo.trial import _nearest, _stacked, training_seconds
from mergevq.report.pictures import to_pil


def batch_of(images, labels):
    count = torch.arange(len(images))
    return Batch(
        image=images, label=torch.tensor(labels), student_view=None, teacher_view=None, index=count
    )


def test_training_time_is_added_up_from_the_logged_rates():
    log = [
        {"step": 0, "images_per_second": 8.0},
        {"step": 10, "images_per_second": 4.0},
        {"step": 11, "psnr@16": 20.0},
        {"step": 12, "sequences_per_second": 4.0},
    ]
    assert training_seconds(log, batch_size=8) == pytest.approx(1 + 20 + 4)


def test_stacked_batches_keep_their_order():
    images = torch.stack([torch.full((3, 8, 8), value) for value in (-1.0, 0.0, 1.0)])
    image, label = _stacked([batch_of(images[:2], [4, 5]), batch_of(images[2:], [6])])
    assert image[:, 0, 0, 0].tolist() == [-1, 0, 1]
    assert label.tolist() == [4, 5, 6]


def test_the_nearest_image_is_found_in_any_batch():
    images = torch.stack([torch.full((3, 8, 8), value) for value in (-1.0, -0.2, 0.6, 1.0)])
    samples = torch.stack([torch.full((3, 8, 8), value) for value in (0.7, -0.9)])
    found = _nearest(samples, [batch_of(images[:1], [0]), batch_of(images[1:], [0, 0, 0])])
    assert [image.tobytes() for image in found] == [
        to_pil(images[2]).tobytes(),
        to_pil(images[0]).tobytes(),
    ]
