"""Tokens of signs: integers, and entropies that need no codebook."""

import math

import pytest
import torch

from mergevq.tokenizer.bits import (
    codebook_entropy,
    codes_to_indices,
    indices_to_codes,
    quantize,
    token_entropy,
)
from tests.support import reference
from tests.support.quantize import (
    LOW_PRECISION,
    LargestTensor,
    random_indices,
    sharp_and_soft_latents,
    value_and_gradient,
)

FLOATS = [*LOW_PRECISION, torch.float32]
LAYOUTS = [(4, 16), (2, 3, 5)]
NUM_BITS = [1, 2, 8, 18, 24, 31, 32, 33, 62, 63]


# -------------------------------------------------------------------------- codes and indices


@pytest.mark.parametrize("num_bits", [1, 3, 10])
def test_every_index_round_trips(num_bits):
    indices = torch.arange(2**num_bits)
    assert torch.equal(codes_to_indices(indices_to_codes(indices, num_bits)), indices)


@pytest.mark.parametrize("num_bits", NUM_BITS)
@pytest.mark.parametrize("shape", LAYOUTS)
@pytest.mark.parametrize("dtype", FLOATS)
def test_indices_round_trip_in_any_layout_and_width(shape, num_bits, dtype, generator):
    indices = random_indices(shape, num_bits, generator)
    codes = indices_to_codes(indices, num_bits, dtype)
    assert codes.shape == (*shape, num_bits)
    assert codes.dtype == dtype
    assert torch.equal(codes_to_indices(codes), indices)


@pytest.mark.parametrize("num_bits", NUM_BITS)
@pytest.mark.parametrize("shape", LAYOUTS)
def test_codes_round_trip_in_any_layout_and_width(shape, num_bits):
    codes, indices = quantize(torch.randn(*shape, num_bits))
    assert indices.dtype == torch.int64
    assert indices.shape == shape
    assert (indices >= 0).all()
    assert torch.equal(indices_to_codes(indices, num_bits), codes)


def test_the_first_channel_is_the_lowest_bit():
    codes = torch.tensor([[1, -1, -1], [-1, 1, 1], [-1, -1, -1], [1, 1, 1.0]])
    assert codes_to_indices(codes).tolist() == [1, 6, 0, 7]
    assert torch.equal(reference.codebook(3)[[1, 6, 0, 7]], codes.long())


@pytest.mark.parametrize("index", [-1, 16])
def test_an_index_outside_the_codebook_is_an_error(index):
    with pytest.raises(ValueError, match=r"must be between 0 and 15, the last of 16 codes"):
        indices_to_codes(torch.tensor([[3, index]]), num_bits=4)


def test_a_negative_index_is_an_error_at_the_largest_width():
    with pytest.raises(ValueError, match=r"indices \(-1 to 0\)"):
        indices_to_codes(torch.tensor([0, -1]), num_bits=63)


def test_no_tokens_are_fine():
    assert indices_to_codes(torch.empty(2, 0, dtype=torch.int64), 18).shape == (2, 0, 18)
    assert quantize(torch.empty(2, 0, 18)).indices.shape == (2, 0)


# ---------------------------------------------------------------------------- straight-through


def test_codes_are_signs_and_zero_is_negative():
    latents = torch.tensor([[0.3, -2.0, 0.0, -0.0, 1e-30]])
    assert quantize(latents).codes.tolist() == [[1, -1, -1, -1, 1]]
    assert quantize(latents).indices.tolist() == [0b10001]


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("scale", [1e-4, 1.0, 1e4])
def test_codes_are_exact_signs_in_every_precision(dtype, scale):
    latents = (scale * torch.randn(4, 64, 18)).to(dtype)
    codes = quantize(latents).codes
    assert codes.dtype == dtype
    assert torch.equal(codes, torch.where(latents > 0, 1, -1).to(dtype))


@pytest.mark.parametrize("dtype", FLOATS)
def test_the_gradient_passes_straight_through(dtype):
    weights = torch.randn(2, 3, 4).to(dtype)
    _, gradient = value_and_gradient(
        lambda latents: quantize(latents).codes * weights, (100 * torch.randn(2, 3, 4)).to(dtype)
    )
    assert torch.equal(gradient, weights)


def test_indices_equal_those_of_the_same_values_in_another_precision():
    latents = torch.randn(4, 64, 18).bfloat16()
    assert torch.equal(quantize(latents).indices, quantize(latents.float()).indices)


def test_a_latent_that_is_not_a_number_shows_in_its_code():
    assert quantize(torch.tensor([[math.nan, 1.0]])).codes.isnan().tolist() == [[True, False]]


def test_nothing_of_the_codebooks_size_is_made():
    with LargestTensor() as largest:
        codes, indices = quantize(torch.randn(1, 4, 63))
        indices_to_codes(indices, 63)
    assert codes.numel() == 4 * 63
    assert largest.num_entries <= 4 * 63


# ----------------------------------------------------------------------------------- entropies


@pytest.mark.parametrize("temperature", [0.01, 0.1, 1.0])
@pytest.mark.parametrize("num_bits", [1, 2, 5, 10])
@pytest.mark.parametrize(
    ("fast", "slow"),
    [
        (token_entropy, reference.token_entropy),
        (codebook_entropy, reference.codebook_entropy),
    ],
    ids=["token", "codebook"],
)
def test_entropies_equal_the_softmax_over_the_whole_codebook(
    fast, slow, num_bits, temperature, generator
):
    latents = sharp_and_soft_latents(24, num_bits, temperature, generator)
    value, gradient = value_and_gradient(fast, latents, temperature)
    expected, expected_gradient = value_and_gradient(slow, latents.double(), temperature)
    torch.testing.assert_close(value.double(), expected, rtol=1e-5, atol=1e-5)
    scale = expected_gradient.abs().max()
    assert scale > 0
    torch.testing.assert_close(gradient / scale, (expected_gradient / scale).float())


def test_entropies_by_hand():
    undecided, decided = torch.zeros(3, 7), torch.eye(8)[:, 1:] * 2 - 1
    assert token_entropy(undecided).tolist() == pytest.approx([7 * math.log(2)] * 3)
    assert token_entropy(decided).tolist() == [0] * 8
    assert codebook_entropy(undecided).item() == pytest.approx(7 * math.log(2))
    # Eight different codes, each used once.
    assert codebook_entropy(decided).item() == pytest.approx(math.log(8))
    assert codebook_entropy(decided[:1].expand(5, -1)).item() == 0


def test_a_fully_used_codebook_has_the_largest_entropy():
    # An epsilon of 1e-5 in the logarithm would stop at 11.19 of 12.48 nats.
    every_code = indices_to_codes(torch.arange(2**14), 14)
    assert codebook_entropy(every_code).item() == pytest.approx(14 * math.log(2), rel=1e-5)
    undecided = torch.zeros(1, 18)
    assert codebook_entropy(undecided).item() == pytest.approx(18 * math.log(2), rel=1e-5)


@pytest.mark.parametrize("num_bits", [11, 18, 24, 25, 26, 40, 63])
def test_one_token_uses_the_codebook_as_much_as_it_is_undecided(num_bits, generator):
    # Bits of one token are independent, so exact and grouped forms agree at any width.
    latents = 0.01 * torch.randn(1, num_bits, generator=generator)
    torch.testing.assert_close(codebook_entropy(latents), token_entropy(latents)[0])


@pytest.mark.parametrize("num_bits", [25, 26, 40, 63])
def test_above_24_bits_groups_bound_the_entropy_from_above(num_bits, generator):
    # Sixteen different decided codes: log 16 exactly; groups of bits sum to at least that.
    latents = 2 * torch.randint(2, (16, num_bits), generator=generator) - 1.0
    assert len(quantize(latents).indices.unique()) == 16
    assert math.log(16) - 1e-5 <= codebook_entropy(latents).item() <= num_bits * math.log(2)


def test_the_bound_counts_what_groups_share():
    # All bits agree: two codes are used, log 2; each of two groups says log 2.
    latents = torch.tensor([1.0, -1.0])[:, None]
    assert codebook_entropy(latents.expand(-1, 24)).item() == pytest.approx(math.log(2))
    assert codebook_entropy(latents.expand(-1, 26)).item() == pytest.approx(2 * math.log(2))


def test_tokens_may_lie_in_any_layout():
    latents = 0.01 * torch.randn(2, 3, 4, 6)
    assert token_entropy(latents).shape == (2, 3, 4)
    torch.testing.assert_close(codebook_entropy(latents), codebook_entropy(latents.flatten(0, 2)))


def test_the_dense_form_would_lose_its_gradient_under_autocast(generator):
    # Shows that the test above can fail: with these latents precision matters.
    latents = 0.02 * torch.randn(64, 10, generator=generator)
    _, expected = value_and_gradient(reference.codebook_entropy, latents.double(), 0.01)
    latents.requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        dense = reference.product_codebook_entropy(latents, 0.01)
        ours = codebook_entropy(latents)
    (dense_gradient,) = torch.autograd.grad(dense, latents)
    (gradient,) = torch.autograd.grad(ours, latents)
    assert (dense_gradient - expected).norm() > 0.05 * expected.norm()
    assert (gradient - expected).norm() < 1e-4 * expected.norm()
