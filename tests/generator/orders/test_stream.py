"""Codes and their source map in one stream: relations, what is legal, and exact likelihoods."""

import itertools
from dataclasses import replace

import pytest
import torch

from mergevq.config.generator import (
    SamplingSettings,
)
from mergevq.config.parts.heads import (
    Bits,
    Subindices,
)
from mergevq.config.parts.orders import (
    Stream,
)
from mergevq.generator.orders.stream import (
    OTHER,
    legal_groups,
    legal_relations,
    neighbours,
    relations,
)
from mergevq.generator.sampling import sample
from mergevq.generator.seams import Sequences
from tests.support.generators import TINY, numbers_for, tiny_generator

ONE_BIT = Subindices(sizes=(2,))


def partitions(num_cells, num_kept=None):
    """All canonical maps of so many cells."""
    maps = [
        [0, *rest]
        for rest in itertools.product(range(num_cells), repeat=num_cells - 1)
        if all(group <= max([0, *rest[:cell]]) + 1 for cell, group in enumerate(rest))
    ]
    if num_kept is not None:
        maps = [groups for groups in maps if max(groups) == num_kept - 1]
    return torch.tensor(maps)


def test_a_grid_of_four_by_hand():
    # 0 0 / 1 0: opens, copies its left, opens (its left is outside), copies what is above it.
    groups = torch.tensor([[0, 0, 1, 0]])
    assert relations(groups, (2, 2)).tolist() == [[0, 1, 0, 2]]
    near = neighbours(groups, (2, 2))
    assert near[0, 3].tolist() == [1, 0, 0, -1, -1, -1, -1]
    assert near[0, 2].tolist() == [-1, 0, -1, 0, -1, -1, -1]


def test_a_copy_that_no_neighbour_has_is_named():
    groups = torch.tensor([[0, 1, 2, 3, 0, 1]])
    assert relations(groups, (1, 6)).tolist() == [[0, 0, 0, 0, OTHER, OTHER]]
    assert relations(torch.tensor([[0, 1, 2, 3, 2, 2]]), (1, 6)).tolist() == [[0, 0, 0, 0, 5, 1]]


@pytest.mark.parametrize(("grid", "count"), [((2, 3), 203), ((1, 5), 52), ((3, 2), 203)])
def test_relations_and_groups_give_the_map_back_and_are_legal(grid, count):
    groups = partitions(grid[0] * grid[1])
    assert len(groups) == count
    relation, near = relations(groups, grid), neighbours(groups, grid)
    opened = (relation == 0).cumsum(1) - (relation == 0).long()
    named = torch.where(relation == OTHER, groups, 0)
    for row, kept in enumerate((groups.amax(1) + 1).tolist()):
        left = torch.arange(groups.shape[1], 0, -1)
        legal = legal_relations(near[row], opened[row], left, kept)
        assert legal.gather(1, relation[row][:, None]).all()
        legal = legal_groups(near[row], opened[row], relation[row], 6)
        assert legal.gather(1, named[row][:, None]).all()
    # What a decoder does: a group from its relation.
    back = torch.cat([opened[..., None], near, named[..., None]], dim=-1)
    assert torch.equal(back.gather(2, relation[..., None])[..., 0], groups)


def tiny(tokens_per_step, head=ONE_BIT):
    """A generator of 2 x 2 cells, any K, and tokens of a bit or two."""
    return tiny_generator(
        "stream",
        tokens_per_step=tokens_per_step,
        head=head,
        grid_size=(2, 2),
        num_kept=2,
        kept_candidates=(1, 2, 3, 4),
    )


@pytest.mark.parametrize("tokens_per_step", [1, 2, 4])
@pytest.mark.parametrize("num_kept", [1, 2, 3, 4])
@pytest.mark.parametrize("head", [ONE_BIT, Bits(sizes=(2, 2))], ids=["subindices", "bits"])
def test_probabilities_of_all_codes_and_maps_sum_to_one(tokens_per_step, num_kept, head):
    model = tiny(tokens_per_step, head)
    maps = partitions(4, num_kept)
    num_codes = model.config.num_codes
    codes = torch.tensor(list(itertools.product(range(num_codes), repeat=num_kept)))
    groups = maps.repeat_interleave(len(codes), 0)
    indices = codes.repeat(len(maps), 1).gather(1, groups)
    label = torch.zeros(len(groups), dtype=torch.int64)
    given = Sequences(indices, label, num_kept, source_index=groups)
    total = model.log_likelihood(given).detach().double().exp().sum()
    torch.testing.assert_close(total.item(), 1.0, rtol=1e-5, atol=0)


@pytest.mark.parametrize("tokens_per_step", [1, 2])
@pytest.mark.parametrize("head", [ONE_BIT, Bits(sizes=(2,))], ids=["subindices", "bits"])
def test_samples_have_the_probabilities_that_they_are_given(tokens_per_step, head):
    model, number = tiny(tokens_per_step, head), 4000
    found = sample(
        model,
        labels=torch.zeros(number, dtype=torch.int64),
        num_kept=2,
        seed=0,
        image_ids=range(number),
        settings=SamplingSettings(),
    )
    assert (found.source_index.amax(1) == 1).all()
    rows = torch.cat([found.indices, found.source_index], 1)
    kinds, counts = rows.unique(dim=0, return_counts=True)
    label = torch.zeros(len(kinds), dtype=torch.int64)
    given = Sequences(kinds[:, :4], label, 2, source_index=kinds[:, 4:])
    expected = model.log_likelihood(given).detach().exp() * number
    # The 0.999 quantile of chi-square with 27 degrees of freedom: 7 maps of 4 codes, less one.
    assert len(kinds) <= 28
    assert float(((counts - expected) ** 2 / expected).sum()) < 55.5


@pytest.mark.parametrize("tokens_per_step", [1, 2, 4])
def test_cached_logits_are_those_of_a_whole_pass(tokens_per_step):
    model = tiny_generator("stream", tokens_per_step=tokens_per_step)
    labels = torch.tensor([0, 1, 2])
    settings = SamplingSettings(guidance_scale=1.0, temperature=0.0)
    found = sample(model, labels=labels, num_kept=5, seed=0, image_ids=range(3), settings=settings)
    given = Sequences(found.indices, labels, 5, source_index=found.source_index)
    logits = model.logits(model.draw(given, numbers_for(given)))
    parts = model.layout(given).targets
    for part, target in zip(logits, parts.unbind(-1), strict=True):
        chosen = part.gather(-1, target[..., None])[..., 0]
        assert (chosen >= part.amax(-1) - 1e-4).all()


def test_copies_enter_with_their_token():
    model = tiny_generator("stream")
    groups = torch.tensor([[0, 0, 1, 2, 3, 4, 4, 0, 1, 2, 3, 0]])
    kept = torch.tensor([[3, 9, 20, 31, 7]])
    given = Sequences(kept.gather(1, groups), torch.tensor([0]), 5, source_index=groups)
    parts = model.parts(given)
    assert torch.equal(parts[..., 1], groups)
    assert torch.equal(model.network.indices(parts), given.indices)
    targets = model.layout(given).targets
    copies = targets[..., 0] != 0
    assert not targets[..., 2:][copies].any()
    assert copies.sum() == 12 - 5


@pytest.mark.parametrize(
    ("groups", "message"),
    [
        (None, "order 'stream' needs source_index"),
        ([0, 2, 1, 3, 4, 0, 0, 0, 0, 0, 0, 0], "its 5 kept tokens numbered from 0 in the order"),
        ([0, 1, 2, 3, 3, 0, 0, 0, 0, 0, 0, 0], "its 5 kept tokens numbered from 0 in the order"),
        ([0, 1, 2, 3, 5, 0, 0, 0, 0, 0, 0, 0], "source_index .0 to 5. must be between 0 and 4"),
        ([0, 1, 2, 3, 4, 0, 0, 0, 0, 0, 0, 1], "cells of one kept token must have the same index"),
    ],
)
def test_maps_that_are_none_are_refused(groups, message):
    model = tiny_generator("stream")
    indices = torch.tensor([[0, 1, 2, 3, 4, 0, 0, 0, 0, 0, 0, 0]])
    source = None if groups is None else torch.tensor([groups])
    given = Sequences(indices, torch.tensor([0]), 5, source_index=source)
    with pytest.raises(ValueError, match=message):
        model.log_likelihood(given)


def test_steps_must_fill_the_grid():
    with pytest.raises(ValueError, match=r"tokens_per_step \(5\) must divide the 12 cells"):
        replace(TINY, order=Stream(tokens_per_step=5))
