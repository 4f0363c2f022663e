"""Bits that are drawn: their share, their gradient, and what evaluation makes of them."""

import pytest
import torch

from mergevq.config import parts as settings
from mergevq.tokenizer.bits import quantize
from mergevq.tokenizer.quantizers.bernoulli import Bernoulli
from tests.support import reference
from tests.support.quantize import value_and_gradient


def quantizer(num_bits, **values):
    return Bernoulli(settings.Bernoulli(num_bits=num_bits, **values))


def test_bits_of_evaluation_are_the_signs_of_latents(generator):
    latents = torch.randn(2, 9, 12, generator=generator)
    latents[0, 0] = 0
    codes, parts = quantizer(12)(latents)
    expected = quantize(latents)
    assert torch.equal(codes, expected.codes)
    assert torch.equal(parts[..., 0], expected.indices)


@pytest.mark.parametrize(
    ("latent", "temperature", "share"),
    [(2.0, 1.0, 0.8808), (-2.0, 1.0, 0.1192), (0.0, 1.0, 0.5), (2.0, 2.0, 0.7311)],
)
def test_bits_of_training_are_drawn_with_their_probability(latent, temperature, share, generator):
    latents = torch.full((2, 2500, 20), latent)
    codes, parts = quantizer(20, sample_temperature=temperature)(
        latents, torch.rand(2, 2500, 20, generator=generator)
    )
    assert set(codes.unique().tolist()) == {-1, 1}
    assert torch.equal(quantizer(20).decode(parts), codes)
    # Five standard deviations of the mean of 100,000 draws are 0.008 at most.
    assert (codes > 0).float().mean().item() == pytest.approx(share, abs=0.008)


def test_each_bit_is_drawn_by_its_own_number():
    latents = torch.tensor([[[0.0, 2.0, -2.0]]])  # p is 0.5, 0.8808 and 0.1192.
    for uniforms, bits in (((0.4, 0.9, 0.1), (1, -1, 1)), ((0.6, 0.8, 0.2), (-1, 1, -1))):
        assert quantizer(3)(latents, torch.tensor([[uniforms]])).codes.tolist() == [[list(bits)]]


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_the_gradient_is_that_of_twice_the_probability(training, temperature, generator):
    latents = 2 * torch.randn(2, 6, 10, generator=generator)
    weights = torch.randn(2, 6, 10, generator=generator)
    part = quantizer(10, sample_temperature=temperature)
    numbers = torch.rand(2, 6, 10, generator=generator) if training else None
    _, found = value_and_gradient(lambda z: part(z, numbers).codes * weights, latents)
    share = latents.sigmoid()
    torch.testing.assert_close(found, 2 * share * (1 - share) * weights)


def test_confidence_by_hand():
    # p is 0.5, 0.8808 and 0.1192.
    losses = quantizer(3).losses(torch.tensor([[[0.0, 2.0, -2.0]]]))
    assert losses["confidence"].item() == pytest.approx(0.1533, abs=5e-5)
    assert list(losses) == ["entropy", "confidence"]


def test_entropies_are_those_of_the_bits_that_are_drawn(generator):
    latents = 2 * torch.randn(2, 8, 5, generator=generator)
    share = latents.double().flatten(0, 1).sigmoid()[:, None]
    bits = reference.codebook(5) > 0
    joint = torch.where(bits, share, 1 - share).prod(-1)
    mean = joint.mean(0)
    expected = torch.xlogy(mean, mean).sum() - torch.xlogy(joint, joint).sum(-1).mean()
    found = quantizer(5).losses(latents)["entropy"]
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)
