"""Classifiers of a generator's classes, and their accuracy on real images."""

import numpy as np
import pytest
import torch
from PIL import Image

from mergevq.evaluate.classes import open_classifier, real_accuracy
from mergevq.metrics.extractor import FeatureExtractor
from mergevq.runtime.distributed import World
from tests.support.evaluations import write_network

CPU = torch.device("cpu")
ALONE = World(rank=0, world_size=1, local_rank=0, device=CPU)
COLOURS = {"blue": (0, 0, 250), "green": (0, 250, 0), "red": (250, 0, 0)}


@pytest.fixture
def network(tmp_path):
    """A file whose three classes are the strongest of red, green and blue."""
    write_network(tmp_path / "colours.pt")
    return tmp_path / "colours.pt"


@pytest.fixture
def images(tmp_path):
    """Three images of each colour, by name, of which one is of the wrong colour."""
    for name, colour in COLOURS.items():
        folder = tmp_path / "images" / name
        folder.mkdir(parents=True)
        for number in range(3):
            wrong = name == "red" and number == 0
            pixels = np.full((16, 16, 3), COLOURS["blue"] if wrong else colour, np.uint8)
            Image.fromarray(pixels).save(folder / f"{number}.png")
    return str(tmp_path / "images")


def accuracy(classifier, images, names=tuple(COLOURS)):
    return real_accuracy(
        classifier, images, names, ALONE, image_size=16, max_pixels=10**6, batch_size=4
    )


def test_outputs_are_put_into_the_order_of_the_classes(network, images):
    # The network tells red, green, blue; folders are in the order of the alphabet.
    assert accuracy(open_classifier(network, (2, 1, 0), 3, CPU), images) == pytest.approx(8 / 9)
    assert accuracy(open_classifier(network, (), 3, CPU), images) == pytest.approx(4 / 9)


def test_classes_are_the_likeliest_of_the_chosen_outputs(network):
    pixels = torch.randint(256, (5, 3, 8, 8), dtype=torch.uint8)
    probabilities = FeatureExtractor(network).probabilities(pixels)
    found = open_classifier(network, (2, 0), 2, CPU).classes(pixels)
    assert torch.equal(found, (probabilities[:, 0] > probabilities[:, 2]).long())


@pytest.mark.parametrize(
    ("outputs", "num_classes", "message"),
    [
        ((), 4, r"tells 3 classes and the generator has 4; name which of its 3 outputs"),
        ((0, 1), 3, r"tells 2 classes and the generator has 3"),
        ((0, 5), 2, r"classifier_outputs \(5\) must be below the 3 outputs"),
    ],
)
def test_outputs_that_are_not_the_classes_are_refused(network, outputs, num_classes, message):
    with pytest.raises(ValueError, match=message):
        open_classifier(network, outputs, num_classes, CPU)


def test_images_of_other_classes_are_refused(network, images):
    classifier = open_classifier(network, (), 3, CPU)
    with pytest.raises(ValueError, match=r"has the 3 classes blue, green, red, and must have"):
        accuracy(classifier, images, ("cat", "dog", "fox"))
