"""Tests of `mergevq.evaluate.neighbours`."""

import numpy as np
import pytest
import torch

from mergevq.data.images import open_images
from mergevq.evaluate.neighbours import nearest_neighbours
from mergevq.metrics.extractor import FeatureExtractor
from tests.support.evaluations import ALONE


def test_a_copied_training_image_is_at_no_distance(sampled_folder):
    extractor, images = (
        FeatureExtractor(sampled_folder / "colours.pt"),
        open_images(str(sampled_folder / "images")),
    )
    pixels = torch.from_numpy(np.array(images.read(5))).permute(2, 0, 1)[None]
    for batch_size in (1, 5, 12):
        found = nearest_neighbours(
            extractor.features(pixels), images, extractor, ALONE, image_size=16,
            batch_size=batch_size,
        )  # fmt: skip
        assert found.position[0, 0] == 5
        assert found.distance[0, 0] == pytest.approx(0, abs=1e-3)
        assert (found.distance[0].diff() >= 0).all()
