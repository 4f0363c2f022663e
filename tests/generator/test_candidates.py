"""Several samples of each image, ranked by how much likelier their class makes them."""

from dataclasses import replace

import pytest
import torch

from mergevq.config.generator import (
    GeneratorConfig,
    SamplingSettings,
    check_sampling,
)
from mergevq.config.parts.orders import (
    Masked,
)
from mergevq.generator.sampling import class_ratio, inpaint, sample, sample_in_steps
from mergevq.generator.seams import Sequences
from tests.support.generators import tiny_generator

LABELS = torch.tensor([0, 1, 2])
THREE = SamplingSettings(candidates=3)
OTHERS = ("raster", "random", "anchor", "stream")


def sampled(model, ids, settings=THREE, labels=LABELS):
    return sample(model, labels=labels, num_kept=5, seed=0, image_ids=ids, settings=settings)


@pytest.mark.parametrize(
    "order",
    ["merge", *(pytest.param(order, marks=pytest.mark.slow) for order in OTHERS)],
)
def test_the_candidate_of_the_highest_ratio_is_kept(order):
    model = tiny_generator(order)
    found = sampled(model, [4, 5, 6])
    one_by_one, ratios = [], []
    for number in range(3):
        ids = [3 * image + number for image in (4, 5, 6)]
        one = sampled(model, ids, replace(THREE, candidates=1))
        draws = model.draws(0, ids, 5, THREE)
        one_by_one.append(one.indices)
        ratios.append(class_ratio(model, one, LABELS, 5, draws.order))
    best = torch.stack(ratios).argmax(0)
    assert torch.equal(found.indices, torch.stack(one_by_one)[best, torch.arange(3)])
    assert len(set(best.tolist())) > 1 or order != "merge"
    assert found.num_forward > 3 * 3


def test_the_ratio_is_a_difference_of_log_likelihoods():
    model = tiny_generator("anchor")
    one = sampled(model, [0, 1, 2], SamplingSettings())
    given = Sequences(one.indices, LABELS, 5, anchors=one.anchors)
    nobody = given._replace(class_label=torch.full((3,), model.config.null_class))
    expected = model.log_likelihood(given) - model.log_likelihood(nobody)
    order = torch.arange(5).expand(3, -1)
    torch.testing.assert_close(class_ratio(model, one, LABELS, 5, order), expected.detach())


def test_an_image_depends_on_seed_and_number_alone():
    model = tiny_generator("anchor")
    together = sampled(model, [4, 5, 6])
    alone = sampled(model, [6], labels=LABELS[2:])
    assert torch.equal(alone.indices[0], together.indices[2])
    assert torch.equal(alone.anchors[0], together.anchors[2])


def test_what_cannot_be_ranked_is_refused():
    config = GeneratorConfig(order=Masked(), num_classes=3)
    with pytest.raises(ValueError, match=r"candidates \(3\) must be 1 in order 'masked'"):
        check_sampling(config, THREE)
    with pytest.raises(ValueError, match=r"candidates \(3\) must be 1 for a generator without"):
        sampled(tiny_generator("merge", num_classes=0), [0], labels=LABELS[:1])
    model = tiny_generator("random")
    common = {"labels": LABELS, "seed": 0, "image_ids": range(3), "settings": THREE}
    with pytest.raises(ValueError, match=r"must be 1 where samples are shown while"):
        next(sample_in_steps(model, num_kept=5, every=1, **common))
    keep = torch.tensor([[True, False, True, False, True]]).expand(3, -1)
    with pytest.raises(ValueError, match=r"must be 1 where samples keep tokens"):
        inpaint(model, indices=torch.zeros(3, 5).long(), keep=keep, **common)
