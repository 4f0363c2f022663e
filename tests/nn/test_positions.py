"""Tests of `mergevq.nn.positions`."""

import math

import pytest
import torch

from mergevq.nn.positions import sincos, sincos_2d, to_grid, to_tokens

# ----------------------------------------------------------------------------------- positions


def test_a_grid_is_read_in_raster_order_and_laid_out_again():
    tokens = torch.arange(6.0)[None, :, None]
    assert to_grid(tokens, (2, 3)).tolist() == [[[[0, 1, 2], [3, 4, 5]]]]
    assert torch.equal(to_tokens(to_grid(tokens, (2, 3))), tokens)


def test_gradients_pass_through_the_grid_and_back():
    tokens = torch.randn(2, 6, 3, requires_grad=True)
    grid = to_grid(tokens, (2, 3))
    assert torch.equal(grid, to_grid(tokens.detach(), (2, 3)))
    weights = torch.randn(2, 6, 3)
    (gradient,) = torch.autograd.grad((to_tokens(grid) * weights).sum(), tokens)
    assert torch.equal(gradient, weights)


def test_position_features_by_hand():
    features = sincos(torch.tensor([0.0, 2.0]), 4)
    assert features[0].tolist() == [0, 0, 1, 1]
    # Frequencies are 1 and 1 / 100.
    expected = [math.sin(2), math.sin(0.02), math.cos(2), math.cos(0.02)]
    assert features[1].tolist() == pytest.approx(expected)


def test_grid_features_are_those_of_row_and_column():
    features = sincos_2d((2, 3), 8)
    rows, columns = features[:, :4], features[:, 4:]
    assert torch.equal(rows, sincos(torch.tensor([0, 0, 0, 1, 1, 1.0]), 4))
    assert torch.equal(columns, sincos(torch.tensor([0, 1, 2, 0, 1, 2.0]), 4))


def test_a_cell_has_the_same_features_in_every_grid():
    small, large = sincos_2d((4, 4), 16), sincos_2d((5, 9), 16)
    torch.testing.assert_close(small.reshape(4, 4, 16), large.reshape(5, 9, 16)[:4, :4])
