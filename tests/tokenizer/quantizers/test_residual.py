"""Residual codebooks: one level is a plain codebook, more of them come nearer."""

import itertools

import pytest
import torch

from mergevq.config import parts as settings
from mergevq.tokenizer.quantizers.codebook import Codebook
from mergevq.tokenizer.quantizers.residual import Residual
from tests.support.quantize import value_and_gradient

UPDATES = [settings.GradientUpdate(), settings.EmaUpdate()]


def quantizer(depth=2, **values):
    torch.manual_seed(0)
    values = {"codebook_size": 16, "branch_dims": (4,), **values}
    return Residual(settings.Residual(depth=depth, **values))


@pytest.mark.parametrize("update", UPDATES)
@pytest.mark.parametrize("share", [True, False])
def test_one_level_is_a_plain_codebook(update, share, generator):
    one = quantizer(1, update=update, share_codebook=share)
    plain = Codebook(settings.Codebook(codebook_size=16, dim=4, l2_norm=False, update=update))
    plain.table.load_state_dict(one.stacks[0].tables[0].state_dict())
    latents = torch.randn(2, 9, 4, generator=generator)
    assert torch.equal(one(latents).parts, plain(latents).parts)
    torch.testing.assert_close(one.losses(latents), plain.losses(latents), rtol=0, atol=0)
    for name in (None, "commitment"):
        (value, found), (other, expected) = (
            value_and_gradient(
                lambda z, of=of, name=name: of.losses(z)[name] if name else of(z).codes * 3, latents
            )
            for of in (one, plain)
        )
        assert torch.equal(value, other)
        torch.testing.assert_close(found, expected)
    for of in (one, plain):
        numbers = torch.Generator().manual_seed(1)
        of.follow(of.statistics(latents.flatten(0, 1), of(latents).parts.flatten(0, 1), numbers))
    assert torch.equal(one.decode(torch.arange(16)[:, None]), plain.table.codes())


def by_hand(depth, **values):
    part = quantizer(depth, codebook_size=3, branch_dims=(1,), **values)
    with torch.no_grad():
        for table in part.stacks[0].tables:
            table.entries.weight.copy_(torch.tensor([[0.0], [1.0], [4.0]]))
    return part


def test_codes_and_losses_by_hand():
    part = by_hand(2)
    latents = torch.tensor([[5.2]])
    codes, parts = part(latents)
    assert parts.tolist() == [[2, 1]]
    assert codes.item() == 5.0
    losses = part.losses(latents)
    # 5.2 to the sums 4 and 5; the codes 4 and 1 to the residuals 5.2 and 1.2.
    assert losses["commitment"].item() == pytest.approx((1.2**2 + 0.2**2) / 2)
    assert losses["codebook"].item() == pytest.approx((1.2**2 + 0.2**2) / 2)
    value, gradient = value_and_gradient(lambda z: part.losses(z)["commitment"], latents)
    assert gradient.item() == pytest.approx(1.2 + 0.2)
    assert value == losses["commitment"]


def test_a_code_never_comes_farther_where_zero_is_one(generator):
    latents = torch.randn(100, 4, generator=generator)
    errors = []
    for depth in range(1, 6):
        part = quantizer(depth)
        with torch.no_grad():
            part.stacks[0].tables[0].entries.weight[0] = 0
        errors.append((part(latents).codes - latents).square().sum(-1))
    for farther, nearer in itertools.pairwise(errors):
        assert bool((nearer <= farther + 1e-5).all())
    assert errors[-1].mean() < 0.9 * errors[0].mean()


def test_branches_are_quantized_side_by_side(generator):
    part = quantizer(3, branch_dims=(4, 2))
    latents = torch.randn(30, 6, generator=generator)
    codes, parts = part(latents)
    assert parts.shape == (30, 6)
    for number, (first, last) in enumerate([(0, 4), (4, 6)]):
        alone = quantizer(3, branch_dims=(last - first,))
        alone.stacks[0].load_state_dict(part.stacks[number].state_dict())
        own, chosen = alone(latents[:, first:last])
        assert torch.equal(codes[:, first:last], own)
        assert torch.equal(parts[:, 3 * number : 3 * number + 3], chosen)
    changed = latents.clone()
    changed[:, 4:] += 1
    assert torch.equal(part(changed).codes[:, :4], codes[:, :4])


@pytest.mark.parametrize("share", [True, False])
def test_running_means_follow_residuals(share):
    update = settings.EmaUpdate(decay=0.0, restart_below=0.0)
    part = quantizer(2, codebook_size=3, branch_dims=(1,), share_codebook=share, update=update)
    for table in part.stacks[0].tables:
        table.entries.sums.copy_(torch.tensor([[0.0], [1.0], [4.0]]))
    latents = torch.tensor([[5.2], [4.4]])
    parts = part(latents).parts
    assert parts.tolist() == [[2, 1], [2, 0]]
    part.follow(part.statistics(latents, parts, torch.Generator().manual_seed(0)))
    counts = [table.entries.counts.tolist() for table in part.stacks[0].tables]
    sums = torch.cat([table.entries.sums for table in part.stacks[0].tables]).flatten()
    # Residuals of the second code are 1.2 and 0.4.
    expected = [[1, 1, 2]] if share else [[0, 0, 2], [1, 1, 0]]
    assert counts == expected
    expected_sums = [0.4, 1.2, 9.6] if share else [0.0, 0.0, 9.6, 0.4, 1.2, 0.0]
    torch.testing.assert_close(sums, torch.tensor(expected_sums))


def test_a_near_token_differs_in_one_code_and_in_each_of_them(generator):
    part = quantizer(2, branch_dims=(4, 2))
    parts = torch.randint(16, (200, 4), generator=generator)
    uniforms = torch.rand(200, 7, generator=generator)
    changed = part.near(parts, uniforms, torch.tensor(4095.0)) != parts
    assert (changed.sum(-1) == 1).all()
    assert changed.any(0).all()
