"""Tests of `mergevq.tokenizer.reducers.divprune`."""

import itertools
import math

import pytest
import torch
from torch.nn import functional

from mergevq.config.parts import DivPrune as Settings
from mergevq.data.layouts import canonicalize, unmerge
from mergevq.tokenizer.reducers.divprune import DivPrune, choose, join


def at_angles(*degrees):
    """One image whose cells are vectors of a plane, of different lengths."""
    angles = torch.tensor(degrees) * math.pi / 180
    lengths = 1 + torch.arange(len(degrees))
    return (torch.stack([angles.cos(), angles.sin()], -1) * lengths[:, None])[None]


def random_cells(seed, num_cells=9, channels=3):
    return torch.randn(1, num_cells, channels, generator=torch.Generator().manual_seed(seed))


def reducer(**values):
    torch.manual_seed(0)
    made = DivPrune(Settings(num_layers=2, num_heads=2, layer_scale=0.5, **values), 8)
    return made.requires_grad_(False)


def test_cells_of_known_angles_are_chosen_in_order():
    cells = at_angles(0.0, 10.0, 20.0, 90.0, 100.0, 180.0)
    assert choose(cells, 4)[0].tolist() == [5, 0, 3, 2]
    assert choose(cells, 1)[0].tolist() == [5]
    # 10 degrees is as near to 0 as to 20, and 100 to 90.
    assert join(cells, torch.tensor([[5, 0, 3]]))[0].tolist() == [1, 1, 1, 2, 2, 0]


def test_the_least_angle_is_at_least_half_of_the_best_possible_one():
    for seed in range(20):
        cells = random_cells(seed)
        unit = functional.normalize(cells[0].double(), dim=-1)
        angles = (unit @ unit.mT).clamp(-1, 1).acos()

        def least(chosen, angles=angles):
            return min(float(angles[i, j]) for i, j in itertools.combinations(chosen, 2))

        best = max(map(least, itertools.combinations(range(9), 4)))
        assert least(choose(cells, 4)[0].tolist()) >= best / 2 - 1e-6


def test_the_choice_is_that_of_the_definition():
    """Every step over all pairs, one image and one cell at a time."""
    cells = torch.cat([random_cells(seed) for seed in range(4)])
    for row, found in zip(cells, choose(cells, 6), strict=True):
        unit = functional.normalize(row, dim=-1)
        distance = [[1 - float(a @ b) for b in unit] for a in unit]
        others = [min(d for j, d in enumerate(near) if j != i) for i, near in enumerate(distance)]
        chosen = [max(range(9), key=others.__getitem__)]
        while len(chosen) < 6:
            left = [j for j in range(9) if j not in chosen]
            chosen.append(max(left, key=lambda j: min(distance[i][j] for i in chosen)))
        assert found.tolist() == chosen


def test_cells_that_are_equal_are_chosen_once_each():
    cells = torch.ones(1, 5, 3)
    chosen = choose(cells, 5)[0]
    assert sorted(chosen.tolist()) == [0, 1, 2, 3, 4]
    assert join(cells, chosen[None, :3])[0, chosen[:3]].tolist() == [0, 1, 2]
    assert choose(torch.zeros(1, 5, 3), 3).unique().numel() == 3


@pytest.mark.parametrize("num_grid_layers", [None, 0, 1])
def test_with_all_cells_it_is_the_blocks_alone(num_grid_layers):
    grid, cls = random_cells(0, 16, 8), torch.zeros(1, 1, 8)
    found = reducer(num_grid_layers=num_grid_layers)(grid, cls, (4, 4), 16)
    assert torch.equal(found.layout.index[0], torch.arange(16))
    x = torch.cat([cls, grid], dim=1)
    for block in reducer().blocks:
        x = block(x)
    assert torch.equal(found.tokens, x[:, 1:])


@pytest.mark.parametrize("combine", ["mean", "chosen"])
def test_a_token_is_the_mean_of_its_cells_or_the_chosen_one(combine):
    grid, cls = random_cells(0, 16, 8), torch.zeros(1, 1, 8)
    cells = reducer()(grid, cls, (4, 4), 16).tokens
    tokens, _, source, *_ = reducer(combine=combine)(grid, cls, (4, 4), 5)
    assert torch.equal(canonicalize(source).source.index, source.index)
    assert source.sizes().min() >= 1
    chosen = choose(cells, 5)[0].tolist()
    for place, token in enumerate(tokens[0]):
        group = (source.index[0] == place).nonzero().flatten().tolist()
        (own,) = set(group) & set(chosen)
        expected = cells[0, group].mean(0) if combine == "mean" else cells[0, own]
        torch.testing.assert_close(token, expected, rtol=0, atol=1e-6)
    assert torch.equal(unmerge(tokens, source)[0, chosen].unique(dim=0), tokens[0].unique(dim=0))


def test_blocks_behind_the_choice_see_the_chosen_cells_alone():
    grid, cls = random_cells(0, 16, 8), torch.zeros(1, 1, 8)
    made = reducer(num_grid_layers=1)
    stopped = made(grid, cls, (4, 4), 5, num_layers=1)
    assert stopped.tokens.shape[1] == 5
    x = torch.cat([stopped.class_token[:, None], stopped.tokens], dim=1)
    whole = made(grid, cls, (4, 4), 5)
    assert torch.equal(whole.tokens, made.blocks[1](x)[:, 1:])
    assert torch.equal(whole.layout.index, stopped.layout.index)
    assert made(grid, cls, (4, 4), 5, num_layers=0).layout.num_kept == 16


def test_a_choice_behind_more_blocks_than_there_are_is_refused():
    message = r"num_grid_layers \(3\) must be at most reducer.num_layers \(2\)"
    with pytest.raises(ValueError, match=message):
        Settings(num_layers=2, num_grid_layers=3)
