"""Tests of `mergevq.nn.precision`."""

import torch

from mergevq.nn.precision import without_autocast


def test_nothing_is_rounded_inside_and_autocast_goes_on_after():
    x, layer = torch.randn(2, 3), torch.nn.Linear(3, 4)
    with torch.autocast("cpu", torch.bfloat16):
        with without_autocast(x):
            assert layer(x).dtype == torch.float32
        assert layer(x).dtype == torch.bfloat16
    with without_autocast(x):
        assert layer(x).dtype == torch.float32


def test_products_are_counted_on_the_meta_device():
    x = torch.zeros(2, 3, device="meta")
    with without_autocast(x):
        assert (x @ x.mT).shape == (2, 2)
