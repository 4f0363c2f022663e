"""Tests of `mergevq.evaluate.probe.knn`."""

import math

import pytest
import torch

from mergevq.evaluate.probe.knn import nearest, vote

# ---------------------------------------------------------------------------- nearest neighbours


def test_votes_are_those_computed_by_hand():
    bank = torch.tensor([[1.0, 0.0], [0.6, 0.8], [0.0, 2.0], [-1.0, 0.0]])
    label = torch.tensor([0, 1, 1, 2])
    found = nearest(torch.tensor([[3.0, 0.0]]), bank, 3)
    assert found.position.tolist() == [[0, 1, 2]]
    torch.testing.assert_close(found.similarity, torch.tensor([[1.0, 0.6, 0.0]]))
    # Class 0 has e^(1/T), class 1 e^(0.6/T) + 1: the nearest wins at T = 0.07, not at T = 1.
    cold, warm = (vote(found, label, 3, 3, temperature) for temperature in (0.07, 1.0))
    assert cold.argmax() == 0
    assert warm.argmax() == 1
    ratio = (math.exp(0.6) + 1) / math.exp(1.0)
    torch.testing.assert_close((warm[0, 1] - warm[0, 0]).exp(), torch.tensor(ratio))
    assert warm[0, 2] == -torch.inf
    assert vote(found, label, 3, 1, 1.0).isfinite().tolist() == [[True, False, False]]


def test_an_image_left_out_is_not_its_own_neighbour(generator):
    bank = torch.randn(1500, 4, generator=generator)
    own = torch.arange(1500)
    assert torch.equal(nearest(bank, bank, 1).position[:, 0], own)
    left_out = nearest(bank, bank, 3, own=own)
    assert (left_out.position != own[:, None]).all()
    assert torch.equal(left_out.position, nearest(bank, bank, 4).position[:, 1:])


def test_more_neighbours_than_there_are_is_an_error():
    bank = torch.eye(3)
    with pytest.raises(ValueError, match=r"k \(4\) must be at most .* \(3\)"):
        nearest(bank, bank, 4)
    with pytest.raises(ValueError, match=r"k \(3\) must be at most .* \(2\)"):
        nearest(bank, bank, 3, own=torch.arange(3))
