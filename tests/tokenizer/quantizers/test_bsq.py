"""Binary spherical quantization against its definition and by hand."""

import math

import pytest
import torch

from mergevq.config import parts as settings
from mergevq.tokenizer.bits import quantize
from mergevq.tokenizer.quantizers.bsq import Bsq
from tests.support import reference
from tests.support.quantize import value_and_gradient

TERMS = ["commitment", "entropy"]


def quantizer(num_bits, temperature=1.0):
    return Bsq(settings.Bsq(num_bits=num_bits, entropy_temperature=temperature))


@pytest.mark.parametrize("length", [1e-6, 1.0, 1e6])
def test_tokens_are_the_signs_of_latents_of_any_length(length, generator):
    latents = length * torch.randn(2, 9, 12, generator=generator)
    codes, parts = quantizer(12)(latents)
    expected = quantize(latents)
    assert torch.equal(codes, expected.codes)
    assert torch.equal(parts[..., 0], expected.indices)


def test_losses_by_hand():
    # On the sphere (0.6, 0.8), with the code (1, 1) / sqrt(2) at a distance of 0.141778.
    losses = quantizer(2).losses(torch.tensor([[[3.0, 4.0]]]))
    assert losses["commitment"].item() == pytest.approx(0.141778**2 / 2, rel=1e-4)
    # One token is as undecided as the codebook is used.
    assert losses["entropy"].item() == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("temperature", [0.1, 1.0])
def test_losses_are_those_of_codes_on_the_sphere(temperature, generator):
    latents = torch.randn(2, 12, 6, generator=generator)
    losses = quantizer(6, temperature).losses(latents)
    unit = torch.nn.functional.normalize(latents.double().flatten(0, 1), dim=-1)
    codes = reference.codebook(6).double() / math.sqrt(6)
    distances = (unit[:, None] - codes).square()
    shares = (-distances.sum(-1) / temperature).softmax(-1)
    tokens, mean = -torch.xlogy(shares, shares).sum(-1).mean(), shares.mean(0)
    entropy = tokens + torch.xlogy(mean, mean).sum()
    commitment = distances.sum(-1).amin(-1).mean() / 6
    torch.testing.assert_close(losses["entropy"].double(), entropy, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(losses["commitment"].double(), commitment, rtol=1e-5, atol=1e-7)


def test_nothing_is_further_from_its_code_than_the_bound(generator):
    latents = torch.randn(1, 4000, 18, generator=generator)
    latents[0, 0] = 0
    latents[0, 0, 3] = 1  # The worst there is: all in one channel.
    unit = torch.nn.functional.normalize(latents, dim=-1)
    distance = (unit - quantizer(18)(latents).codes / math.sqrt(18)).norm(dim=-1)
    bound = math.sqrt(2 - 2 / math.sqrt(18))
    assert distance.amax().item() == pytest.approx(bound, rel=1e-5)


@pytest.mark.parametrize("name", [*TERMS, "codes"])
def test_no_gradient_changes_the_length_of_a_latent(name, generator):
    latents = torch.randn(2, 6, 10, generator=generator)
    weights = torch.randn(2, 6, 10, generator=generator)
    part = quantizer(10)

    def value(z):
        return part(z).codes * weights if name == "codes" else part.losses(z)[name]

    _, gradient = value_and_gradient(value, latents)
    assert gradient.norm() > 0
    along = (gradient * latents).sum(-1)
    torch.testing.assert_close(along, torch.zeros_like(along), rtol=0, atol=1e-5)


def test_the_gradient_is_that_of_the_point_on_the_sphere(generator):
    latents = torch.randn(2, 6, 10, generator=generator)
    weights = torch.randn(2, 6, 10, generator=generator)
    _, found = value_and_gradient(lambda z: quantizer(10)(z).codes * weights, latents)
    _, expected = value_and_gradient(
        lambda z: math.sqrt(10) * z / z.norm(dim=-1, keepdim=True) * weights, latents
    )
    torch.testing.assert_close(found, expected)


def test_a_latent_of_zeros_has_no_bit_and_a_finite_gradient():
    latents = torch.zeros(1, 2, 5)
    codes, parts = quantizer(5)(latents)
    assert codes.tolist() == [[[-1] * 5] * 2]
    assert parts.tolist() == [[[0]] * 2]
    for name in TERMS:
        value, gradient = value_and_gradient(
            lambda z, name=name: quantizer(5).losses(z)[name], latents
        )
        assert value.isfinite()
        assert gradient.isfinite().all()
