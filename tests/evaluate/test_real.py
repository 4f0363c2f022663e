"""Real images beside samples: equal numbers, the right classes, a ratio."""

import numpy as np
import pytest
import torch
from PIL import Image

from mergevq.data.images import open_images
from mergevq.evaluate.classes import open_classifier
from mergevq.evaluate.real import measure_real
from mergevq.metrics.extractor import FeatureExtractor
from mergevq.metrics.frechet import FrechetStatistics, frechet_distance
from mergevq.runtime.distributed import World
from tests.support.evaluations import write_network

pytestmark = pytest.mark.filterwarnings("ignore:a Frechet distance of:UserWarning")

CPU = torch.device("cpu")
ALONE = World(rank=0, world_size=1, local_rank=0, device=CPU)
COLOURS = {"blue": (9, 9, 250), "green": (9, 250, 9), "red": (250, 9, 9)}


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
            Image.fromarray(pixels - number).save(folder / f"{number}.png")
    return str(tmp_path / "images")


def statistics(extractor, pixels):
    found = FrechetStatistics(extractor.dim)
    found.update(extractor.features(pixels))
    return found.compute()


def measured(network, images, outputs=None, num_images=9, names=tuple(COLOURS)):
    extractor = FeatureExtractor(network)
    reference = statistics(extractor, torch.randint(256, (40, 3, 16, 16), dtype=torch.uint8))
    classifier = None if outputs is None else open_classifier(network, outputs, 3, CPU)
    found = measure_real(
        images,
        num_images,
        ALONE,
        image_size=16,
        extractor=extractor,
        reference=reference,
        classifier=classifier,
        class_names=names,
        max_pixels=10**6,
        batch_size=4,
    )
    return found, extractor, reference


def test_the_distance_is_that_of_the_images(network, images):
    found, extractor, reference = measured(network, images)
    dataset = open_images(images)
    pixels = torch.stack([torch.from_numpy(np.array(dataset.read(i))) for i in range(9)])
    own = statistics(extractor, pixels.permute(0, 3, 1, 2))
    assert found.frechet == pytest.approx(frechet_distance(reference, own), rel=1e-4)
    assert found.class_accuracy is None


def test_outputs_are_put_into_the_order_of_the_classes(network, images):
    # The network tells red, green, blue; folders are in the order of the alphabet.
    assert measured(network, images, (2, 1, 0))[0].class_accuracy == pytest.approx(8 / 9)
    assert measured(network, images, ())[0].class_accuracy == pytest.approx(4 / 9)


def test_fewer_images_than_samples_are_refused_with_both_numbers(network, images):
    with pytest.raises(ValueError, match=r"holds 9 images and must hold as many .* \(10\)"):
        measured(network, images, num_images=10)


def test_images_of_other_classes_are_refused(network, images):
    with pytest.raises(ValueError, match=r"has the 3 classes blue, green, red, and must have"):
        measured(network, images, (), names=("cat", "dog", "fox"))
