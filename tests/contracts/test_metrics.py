"""Every metric that compares decoded images with originals keeps these; a new one enters by itself.

The metrics are those that `comparison` makes with all networks, and of patches, by each set of
rules.
"""

import threading
from typing import get_args

import pytest
import torch

from mergevq.config.evaluation import Protocol as Rules
from mergevq.metrics.comparison import Decoded, Metric, Originals, comparison
from mergevq.metrics.extractor import FeatureExtractor
from mergevq.metrics.lpips import Perceptual
from mergevq.runtime import distributed
from tests.support.frozen import write_extractor

NUM_IMAGES = 8
PATCH_SIZE = 4
NUM_METRICS = len(comparison(patch_size=PATCH_SIZE).metrics) + 3
"""LPIPS, feature cosine and Frechet distance need networks."""
EVERY = pytest.mark.parametrize(
    ("rules", "number"), [(rules, n) for rules in get_args(Rules) for n in range(NUM_METRICS)]
)
pytestmark = pytest.mark.filterwarnings("ignore:a Frechet distance of")


def perceptual():
    """LPIPS by its smallest network, with random weights."""
    network = Perceptual("squeeze")
    numbers = torch.Generator().manual_seed(0)
    for parameter in network.parameters():
        parameter.copy_(torch.rand(parameter.shape, generator=numbers) * 0.1)
    return network


@pytest.fixture(scope="module")
def networks(tmp_path_factory):
    path = write_extractor(tmp_path_factory.mktemp("extractor") / "colours.pt")
    return perceptual(), FeatureExtractor(path, torch.device("cpu"))


@pytest.fixture
def measured(networks, rules, number):
    """Numbers of one new metric by images, each batch a list of them; the reference is of all."""
    images = torch.rand(2, NUM_IMAGES, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    original, decoded = images * 2 - 1
    with torch.no_grad():
        everything = Originals(*networks)
        everything.update(original)
        reference = everything.compute()

    @torch.no_grad()
    def measure(*batches, spoil=lambda decoded: decoded):
        metrics = comparison(*networks, rules, PATCH_SIZE).metrics
        assert len(metrics) == NUM_METRICS
        metric, originals = metrics[number], Originals(*networks)
        assert isinstance(metric, Metric)
        for rows in batches:
            given = Decoded(spoil(decoded[rows]), networks[1], rules)
            metric.update(originals.update(original[rows]), given, torch.tensor(rows))
        return metric.compute(reference)

    return measure


@EVERY
def test_a_metric_gives_the_same_finite_numbers_again(measured):
    found = measured(list(range(NUM_IMAGES)))
    assert found
    assert all(isinstance(value, float) for value in found.values())
    assert all(torch.tensor(list(found.values())).isfinite())
    assert found == measured(list(range(NUM_IMAGES)))


@EVERY
def test_neither_batches_nor_the_order_of_images_change_a_number(measured):
    whole = measured(list(range(NUM_IMAGES)))
    for batches in ([[7, 2, 5, 0, 1, 6, 3, 4]], [[3], [6, 0, 1], [7, 5], [2, 4]]):
        assert measured(*batches) == pytest.approx(whole, rel=1e-4, abs=1e-5)


class TwoRanks:
    """Two threads in place of two processes: each gives its part, and both get the result."""

    def __init__(self, patch):
        self.own, self.parts = threading.local(), [None, None]
        self.meet = threading.Barrier(2, timeout=60)
        patch.setattr(distributed, "sum", lambda tensor: sum(self.all_of(tensor)))
        patch.setattr(distributed, "gather", lambda tensor: torch.cat(self.all_of(tensor)))

    def all_of(self, tensor):
        self.meet.wait()
        self.parts[self.own.rank] = tensor
        self.meet.wait()
        return list(self.parts)

    def run(self, function, *arguments):
        """Results of the function on each rank, which has one of the arguments."""
        results = [None, None]

        def on(rank):
            self.own.rank = rank
            try:
                results[rank] = function(*arguments[rank])
            except BaseException:
                self.meet.abort()
                raise

        threads = [threading.Thread(target=on, args=(rank,)) for rank in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return results


@EVERY
@pytest.mark.parametrize("shares", [([0, 2, 4, 6], [1, 3, 5, 7]), ([7, 0, 1, 2, 3, 4, 6], [5])])
def test_shares_of_two_ranks_are_one_whole_on_both(measured, shares, monkeypatch):
    whole = measured(list(range(NUM_IMAGES)))
    ranks = TwoRanks(monkeypatch)
    for found in ranks.run(measured, *[[share] for share in shares]):
        assert found == pytest.approx(whole, rel=1e-4, abs=1e-5)


@EVERY
def test_a_pixel_that_is_no_number_is_refused(measured):
    # Infinite ones do not come here: decoded images are clipped.
    def spoil(decoded):
        decoded = decoded.clone()
        decoded[1] = torch.nan
        return decoded

    with pytest.raises(ValueError, match="finite"):
        measured(list(range(NUM_IMAGES)), spoil=spoil)


def test_names_of_metrics_differ(networks):
    images = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    for rules in get_args(Rules):
        names = []
        for metric in comparison(*networks, rules, PATCH_SIZE).metrics:
            originals = Originals(*networks)
            given = Decoded(images.flip(0), networks[1], rules)
            metric.update(originals.update(images), given, torch.arange(2))
            names += metric.compute(originals.compute())
        assert len(set(names)) == len(names) >= NUM_METRICS
