"""Quantization: signs, integers, and entropies that need no codebook."""

import math
import os
import socket
import warnings
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mergevq.runtime import distributed
from mergevq.tokenizer.quantizers.lfq import (
    QuantizeLosses,
    codebook_entropy,
    codes_to_indices,
    indices_to_codes,
    quantize,
    quantize_losses,
    token_entropy,
)
from tests.support import reference
from tests.support.quantize import random_indices

LOW_PRECISION = [torch.bfloat16, torch.float16]
FLOATS = [*LOW_PRECISION, torch.float32]
LAYOUTS = [(4, 16), (2, 3, 5)]
NUM_BITS = [1, 2, 8, 18, 24, 31, 32, 33, 62, 63]


class LargestTensor(TorchDispatchMode):
    """Notes how many entries the largest tensor has that any operation makes."""

    num_entries = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        sizes = [leaf.numel() for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)]
        self.num_entries = max([self.num_entries, *sizes])
        return result


def sharp_and_soft_latents(num_tokens, num_bits, temperature, generator):
    """From undecided to fully decided bits: log-odds of 4 z / t between about -30 and 30."""
    latents = torch.randn(num_tokens, num_bits, generator=generator)
    scales = torch.logspace(-2, 1, num_tokens)[:, None]
    return temperature * latents * scales


def value_and_gradient(function, latents, *arguments):
    latents = latents.clone().requires_grad_()
    value = function(latents, *arguments)
    (gradient,) = torch.autograd.grad(value.sum(), latents)
    return value.detach(), gradient


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


@pytest.mark.parametrize("temperature", [0.01, 0.1, 1.0])
def test_entropies_of_ordinary_latents_equal_the_softmax_too(temperature):
    latents = torch.randn(4, 16, 9)
    losses = quantize_losses(latents, temperature)
    expected = reference.token_entropy(latents.double(), temperature).mean()
    torch.testing.assert_close(losses.token_entropy.double(), expected, rtol=1e-5, atol=1e-6)
    expected = reference.codebook_entropy(latents.double(), temperature)
    torch.testing.assert_close(losses.codebook_entropy.double(), expected, rtol=1e-5, atol=1e-6)


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


@pytest.mark.parametrize("num_bits", [4, 18, 30])
@pytest.mark.parametrize("latents", ["large", "equal", "zero", "mixed"])
def test_gradients_are_finite_at_the_lowest_temperature(latents, num_bits, generator):
    random = torch.randn(1, 32, num_bits, generator=generator)
    value = {
        "large": random * 1e4,
        "equal": random[:, :1].expand(-1, 32, -1),
        "zero": torch.zeros(1, 32, num_bits),
        "mixed": random * torch.logspace(-8, 8, 32)[:, None],
    }[latents].clone()
    value.requires_grad_()
    losses = quantize_losses(value, temperature=0.01)
    for loss in losses:
        (gradient,) = torch.autograd.grad(loss, value, retain_graph=True)
        assert loss.isfinite()
        assert gradient.isfinite().all()


def test_one_token_gives_finite_losses():
    losses = quantize_losses(torch.randn(1, 1, 18))
    assert all(loss.isfinite() for loss in losses)


@pytest.mark.parametrize("num_bits", [10, 26])
@pytest.mark.parametrize("dtype", LOW_PRECISION)
def test_losses_are_in_full_precision_under_autocast(dtype, num_bits, generator):
    latents = 0.02 * torch.randn(1, 64, num_bits, generator=generator)
    latents.requires_grad_()
    with torch.autocast("cpu", dtype=dtype):
        losses = quantize_losses(latents)
    for loss, expected in zip(losses, quantize_losses(latents), strict=True):
        assert torch.equal(loss, expected)
        (gradient,) = torch.autograd.grad(loss, latents, retain_graph=True)
        (expected_gradient,) = torch.autograd.grad(expected, latents, retain_graph=True)
        assert torch.equal(gradient, expected_gradient)


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


@pytest.mark.parametrize("dtype", LOW_PRECISION)
def test_losses_of_low_precision_latents_are_in_full_precision(dtype):
    latents = (0.01 * torch.randn(2, 32, 10)).to(dtype)
    losses, expected = quantize_losses(latents), quantize_losses(latents.float())
    assert [loss.dtype for loss in losses] == [torch.float32] * 3
    assert losses == expected


def test_no_tensor_has_a_row_of_the_codebook_per_token():
    latents = torch.randn(1, 256, 18, requires_grad=True)
    with LargestTensor() as largest:
        losses = quantize_losses(latents)
        (losses.commitment + losses.entropy).backward()
    # The codebook's mean itself is the largest, 256 times less than one row of it per token.
    assert largest.num_entries == 2**18


# -------------------------------------------------------------------------------------- losses


def test_losses_by_hand():
    losses = quantize_losses(torch.tensor([[[3.0, -1.0], [0.5, 1.0]]]))
    assert losses.commitment.item() == pytest.approx((2**2 + 0.5**2) / 4)
    assert losses.token_entropy.item() == pytest.approx(0, abs=1e-6)
    assert losses.codebook_entropy.item() == pytest.approx(math.log(2))


def test_the_entropy_term_is_negative_when_decided_tokens_differ():
    zero = torch.zeros(())
    assert QuantizeLosses(zero, torch.tensor(1.0), torch.tensor(3.0)).entropy.item() == -2
    assert quantize_losses(torch.randn(1, 64, 10)).entropy < 0


def test_commitment_pulls_latents_to_their_codes_and_not_codes_to_latents():
    _, gradient = value_and_gradient(
        lambda latents: quantize_losses(latents).commitment, torch.tensor([[[3.0, -0.5]]])
    )
    # d/dz of mean((z - sign z)**2) with the sign held fixed.
    assert gradient.tolist() == [[[2.0, 0.5]]]


def test_masked_losses_are_those_of_the_chosen_tokens_alone(generator):
    latents = 0.02 * torch.randn(3, 8, 10, generator=generator)
    mask = torch.rand(3, 8, generator=generator) < 0.4
    chosen = latents[mask][None]
    for index in range(3):
        value, gradient = value_and_gradient(
            lambda z, i=index: quantize_losses(z, mask=mask)[i], latents
        )
        expected = value_and_gradient(lambda z, i=index: quantize_losses(z)[i], chosen)
        torch.testing.assert_close((value, gradient[mask][None]), expected)
        assert (gradient[~mask] == 0).all()


# ------------------------------------------------------------------------------- two processes

JOINT = 0.01 * torch.linspace(-3, 5, 4 * 6 * 8).reshape(4, 6, 8).sin() * torch.arange(1, 9)


def loss_and_gradient(latents):
    latents = latents.clone().requires_grad_()
    losses = quantize_losses(latents)
    (losses.commitment + 0.1 * losses.entropy).backward()
    return {"losses": torch.stack(losses).detach(), "gradient": latents.grad}


def run_rank(rank: int, port: int, folder: str) -> None:
    warnings.simplefilter("error")
    torch.set_num_threads(1)
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE="2",
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
    )
    distributed.init(torch.device("cpu"), timeout_seconds=60)
    result = loss_and_gradient(JOINT.chunk(2)[rank])
    distributed.barrier()
    distributed.shutdown()
    torch.save(result, Path(folder) / f"{rank}.pt")


def test_two_processes_have_the_codebook_entropy_of_the_joint_batch(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.spawn(run_rank, args=(port, str(tmp_path)), nprocs=2)
    ranks = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2)]
    joint = loss_and_gradient(JOINT)
    commitment, token, codebook = torch.stack([rank["losses"] for rank in ranks]).T
    torch.testing.assert_close(commitment.mean(), joint["losses"][0])
    torch.testing.assert_close(token.mean(), joint["losses"][1])
    assert codebook[0] == codebook[1]
    torch.testing.assert_close(codebook[0], joint["losses"][2])
    # Data parallel training averages the ranks' gradients: half of each is the joint one.
    halves = torch.cat([rank["gradient"] for rank in ranks]) / 2
    torch.testing.assert_close(halves, joint["gradient"])
    # Each rank alone would say something else.
    assert not torch.allclose(loss_and_gradient(JOINT[:2])["losses"][2], codebook[0], rtol=1e-3)
