"""Lookup-free quantization: commitment and entropies of a batch."""

import math
import os
import socket
import warnings
from pathlib import Path

import pytest
import torch

from mergevq.runtime import distributed
from mergevq.tokenizer.quantizers.lfq import QuantizeLosses, quantize_losses
from tests.support import reference
from tests.support.quantize import LOW_PRECISION, LargestTensor, value_and_gradient
from tests.support.ranks import run_on_ranks

# ----------------------------------------------------------------------------------- entropies


@pytest.mark.parametrize("temperature", [0.01, 0.1, 1.0])
def test_entropies_of_ordinary_latents_equal_the_softmax_too(temperature):
    latents = torch.randn(4, 16, 9)
    losses = quantize_losses(latents, temperature)
    expected = reference.token_entropy(latents.double(), temperature).mean()
    torch.testing.assert_close(losses.token_entropy.double(), expected, rtol=1e-5, atol=1e-6)
    expected = reference.codebook_entropy(latents.double(), temperature)
    torch.testing.assert_close(losses.codebook_entropy.double(), expected, rtol=1e-5, atol=1e-6)


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
    run_on_ranks(run_rank, port, str(tmp_path))
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
