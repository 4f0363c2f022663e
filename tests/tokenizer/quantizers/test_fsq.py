"""Finite scalar quantization: levels by hand, all of them reached, and codes that come back."""

import math

import pytest
import torch

from mergevq.config import parts as settings
from mergevq.tokenizer.quantizers.fsq import Fsq
from tests.support.quantize import value_and_gradient

LEVELS = [(3,), (4, 4), (8, 6, 5), (7, 5, 5, 5), (16, 3)]


def quantizer(*levels):
    return Fsq(settings.Fsq(levels=levels))


@pytest.mark.parametrize(
    ("latents", "codes", "levels", "index"),
    [
        ((0, 0, 0), (0, 0, 0), (4, 2, 2), 100),
        ((10, 10, 10), (0.75, 1, 1), (7, 4, 4), 199),
        ((-10, -10, -10), (-1, -1, -1), (0, 0, 0), 0),
        ((0.7, -0.3, 1.2), (0.5, -0.5, 1), (6, 1, 4), 174),
    ],
)
def test_tokens_by_hand(latents, codes, levels, index):
    part = quantizer(8, 5, 5)
    found = part(torch.tensor([latents], dtype=torch.float32))
    assert found.codes.tolist() == [list(codes)]
    assert found.parts.tolist() == [list(levels)]
    assert part.spec.join(found.parts).tolist() == [index]


@pytest.mark.parametrize("levels", LEVELS)
def test_every_token_has_a_code_and_every_code_is_that_of_a_token(levels):
    part = quantizer(*levels)
    parts = part.spec.split(torch.arange(math.prod(levels)))
    codes = part.decode(parts)
    assert len(codes.unique(dim=0)) == math.prod(levels)
    assert codes.amin() == -1
    assert codes.amax() <= 1
    # Latents at which a channel is on its level: the inverse of its bound.
    count = torch.tensor(levels).double()
    bound, offset = (count - 1) * 1.001 / 2, (1 - count % 2) / 2
    inner = (codes.double() * (count // 2) + offset) / bound
    latents = inner.atanh() - (offset / bound).atanh()
    again = part(latents.float())
    assert torch.equal(again.parts, parts)
    assert torch.equal(again.codes, codes)
    # The bits too, of zeros among them.
    assert torch.equal(again.codes.view(torch.int32), codes.view(torch.int32))


@pytest.mark.parametrize("count", [3, 4, 5, 8, 15, 16])
def test_every_level_is_taken_by_latents_of_ordinary_size_in_order(count):
    latents = torch.linspace(-6, 6, 4001)[:, None]
    parts = quantizer(count)(latents).parts[:, 0]
    assert parts.unique().tolist() == list(range(count))
    assert (parts.diff() >= 0).all()


@pytest.mark.parametrize("count", [3, 4, 999, 1000])
def test_no_latent_is_so_large_that_it_has_no_level(count):
    latents = torch.tensor([[-1e30], [-50.0], [0.0], [50.0], [1e30]])
    parts = quantizer(count)(latents).parts[:, 0]
    assert parts.tolist() == [0, 0, count // 2, count - 1, count - 1]


@pytest.mark.parametrize("levels", LEVELS)
def test_the_gradient_is_that_of_the_bounded_channel(levels, generator):
    latents = torch.randn(2, 6, len(levels), generator=generator)
    weights = torch.randn(2, 6, len(levels), generator=generator)
    _, found = value_and_gradient(lambda z: quantizer(*levels)(z).codes * weights, latents)
    count = torch.tensor(levels).double()
    bound, offset = (count - 1) * 1.001 / 2, (1 - count % 2) / 2

    def bounded(z):
        return bound * torch.tanh(z + (offset / bound).atanh()) / (count // 2) * weights

    _, expected = value_and_gradient(bounded, latents.double())
    torch.testing.assert_close(found, expected.float())


def test_there_is_no_loss():
    assert quantizer(8, 5)(torch.randn(1, 3, 2)).codes.shape == (1, 3, 2)
    assert quantizer(8, 5).losses(torch.randn(1, 3, 2)) == {}
