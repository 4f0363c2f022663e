"""Group-wise lookup-free quantization against its definition, by hand, and against `lfq`."""

import math

import pytest
import torch

from mergevq.config import parts as settings
from mergevq.tokenizer.quantizers.grouped_lfq import GroupedLfq
from mergevq.tokenizer.quantizers.lfq import Lfq
from tests.support.quantize import LargestTensor, value_and_gradient

BY_HAND = torch.tensor([[[0.3, -0.2, 0.1, 0.4], [-0.1, 0.25, -0.3, 0.05], [0.2, 0.2, -0.1, -0.4]]])


def quantizer(num_bits, num_groups, temperature=0.5, codebook_entropy="sum"):
    return GroupedLfq(
        settings.GroupedLfq(
            num_bits=num_bits,
            group_bits=num_bits // num_groups,
            codebook_entropy=codebook_entropy,
            entropy_temperature=temperature,
        )
    )


def entropy(probabilities):
    return -torch.xlogy(probabilities, probabilities).sum(-1)


def reference(latents, num_groups, temperature):
    """Token entropy, and codebook entropy summed and pooled, by a softmax over each group's codes.

    In float64, from a table of all codes.
    """
    width = latents.shape[-1] // num_groups
    codes = ((torch.arange(2**width)[:, None] >> torch.arange(width)) & 1) * 2.0 - 1
    groups = latents.double().flatten(0, -2).unflatten(-1, (num_groups, 1, width))
    shares = (-(groups - codes).square().sum(-1) / temperature).softmax(-1)
    tokens = entropy(shares).sum(1).mean()
    return tokens, entropy(shares.mean(0)).sum(), entropy(shares.mean((0, 1)))


@pytest.mark.parametrize("temperature", [0.01, 1.0])
@pytest.mark.parametrize("num_bits", [1, 8, 13])
@pytest.mark.parametrize("codebook_entropy", ["sum", "pooled"])
def test_one_group_is_lookup_free_quantization(num_bits, temperature, codebook_entropy, generator):
    latents = 0.1 * torch.randn(2, 16, num_bits, generator=generator)
    one = quantizer(num_bits, 1, temperature, codebook_entropy)
    lfq = Lfq(settings.Lfq(num_bits=num_bits, entropy_temperature=temperature))
    for ours, theirs in zip(one(latents), lfq(latents), strict=True):
        assert torch.equal(ours, theirs)
    assert list(one.losses(latents)) == list(lfq.losses(latents)) == ["commitment", "entropy"]
    for name in ("commitment", "entropy"):
        ours, theirs = (
            value_and_gradient(lambda z, of=of, name=name: of.losses(z)[name], latents)
            for of in (one, lfq)
        )
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("temperature", [0.01, 0.5])
def test_entropies_are_those_of_a_softmax_over_the_codes_of_each_group(temperature, generator):
    latents = 2 * temperature * torch.randn(2, 12, 6, generator=generator)
    codebooks = []
    for num_groups in (1, 2, 3, 6):
        tokens, summed, pooled = reference(latents, num_groups, temperature)
        for kind, expected in (("sum", tokens - summed), ("pooled", tokens / num_groups - pooled)):
            part = quantizer(6, num_groups, temperature, kind)
            found, gradient = value_and_gradient(
                lambda z, part=part: part.losses(z)["entropy"], latents
            )
            torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)
            assert gradient.isfinite().all()
        codebooks.append(summed.item())
    # The whole codebook's entropy is bounded from above, and less tightly by more groups.
    assert codebooks == sorted(codebooks)
    assert codebooks[0] < codebooks[-1]


@pytest.mark.parametrize(
    ("num_groups", "summed", "pooled"),
    [(1, 2.409692, 2.409692), (2, 2.571645, 1.372234), (4, 2.627610, 0.687772)],
)
def test_entropies_by_hand(num_groups, summed, pooled):
    found = quantizer(4, num_groups).losses(BY_HAND)["entropy"]
    assert found.item() == pytest.approx(1.719240 - summed, abs=2e-6)
    found = quantizer(4, num_groups, codebook_entropy="pooled").losses(BY_HAND)["entropy"]
    assert found.item() == pytest.approx(1.719240 / num_groups - pooled, abs=2e-6)


def test_constant_groups_that_differ_are_diverse_when_they_are_pooled():
    latents = torch.tensor([[[-5.0, 5.0]] * 4])
    assert quantizer(2, 2).losses(latents)["entropy"].item() == pytest.approx(0, abs=1e-6)
    pooled = quantizer(2, 2, codebook_entropy="pooled").losses(latents)["entropy"]
    assert pooled.item() == pytest.approx(-math.log(2), abs=1e-6)


def test_the_first_group_is_that_of_the_first_channels_the_lowest_bit_first():
    latents = torch.tensor([[1.0, -1, -1, -1, 1, 1], [-1, 1, 1, 1, -1, -1]])
    codes, parts = quantizer(6, 2)(latents)
    assert torch.equal(codes, latents)
    assert parts.tolist() == [[1, 6], [6, 1]]


def test_tokens_of_the_most_bits_come_back(generator):
    part = quantizer(63, 9)
    codes, parts = part(torch.randn(2, 5, 63, generator=generator))
    assert torch.equal(part.decode(parts), codes)
    assert torch.equal(part.spec.split(part.spec.join(parts)), parts)


def test_no_tensor_has_the_codes_of_several_groups():
    latents = torch.randn(1, 512, 32, requires_grad=True)
    with LargestTensor() as largest:
        losses = quantizer(32, 4, temperature=0.01).losses(latents)
        (losses["commitment"] + losses["entropy"]).backward()
    # The latents themselves, and what is as large as they are; of 2**32 codes nothing is made.
    assert largest.num_entries == 512 * 32
