"""Drafts that are checked several in a pass: the samples are those of one token in each pass."""

from dataclasses import replace

import pytest
import torch

from mergevq.config.generator import Drafted, OneByOne, SamplingSettings
from mergevq.config.parts.heads import Bits, Independent
from mergevq.config.parts.orders import Merge, Raster
from mergevq.generator.build import build_generator
from mergevq.generator.sampling import sample
from tests.support.generators import TINY

DRAFTS = ("previous", "left", "above")


def built(order=None, head=None, spread=0.3, **changes):
    """A generator with random weights, in evaluation mode."""
    model = build_generator(
        replace(TINY, order=order or Raster(), head=head or TINY.head, **changes)
    )
    numbers = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for weight in model.parameters():
            weight.copy_(torch.randn(weight.shape, generator=numbers) * spread + (weight == 1))
    return model.eval()


def sampled(model, passes, ids=range(6), **changes):
    ids = list(ids)
    return sample(
        model,
        labels=torch.tensor(ids) % model.config.num_classes,
        num_kept=5,
        seed=3,
        image_ids=ids,
        settings=replace(SamplingSettings(**changes), passes=passes),
    )


CASES = {
    "raster": {},
    "targets": {"order": Raster(annealing=(0.5, 0.75))},
    "merge": {"order": Merge()},
    "no window": {"order": Merge(window=0)},
    "bits": {"head": Bits(sizes=TINY.head.sizes)},
    "independent": {"head": Independent(sizes=TINY.head.sizes)},
    "grouped": {"num_kv_heads": 1},
}


@pytest.mark.parametrize("draft", DRAFTS)
@pytest.mark.parametrize("case", CASES)
def test_samples_are_those_of_one_token_a_pass(case, draft):
    model = built(**CASES[case])
    for changes in (
        {},
        {"guidance_scale": 2.0},
        {"guidance_scale": 3.0, "guidance_schedule": "linear", "temperature": 0.7, "top_k": 5},
    ):
        plain = sampled(model, OneByOne(), **changes)
        for count in (1, 3, 40):
            found = sampled(model, Drafted(draft=draft, num_drafted=count), **changes)
            assert torch.equal(found.indices, plain.indices)
            assert found.num_forward <= plain.num_forward
            if plain.source_index is not None:
                assert torch.equal(found.source_index, plain.source_index)
