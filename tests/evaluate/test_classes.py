"""Classifiers of a generator's classes."""

import pytest
import torch

from mergevq.evaluate.classes import open_classifier
from mergevq.metrics.extractor import FeatureExtractor
from tests.support.evaluations import write_network

CPU = torch.device("cpu")


@pytest.fixture
def network(tmp_path):
    """A file whose three classes are the strongest of red, green and blue."""
    write_network(tmp_path / "colours.pt")
    return tmp_path / "colours.pt"


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
