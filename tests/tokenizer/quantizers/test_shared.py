"""One index into two codebooks: the entry with the least weighted sum of squared distances."""

import pytest
import torch
from torch.nn import functional

from mergevq.config import parts as settings
from mergevq.tokenizer.quantizers.codebook import Codebook
from mergevq.tokenizer.quantizers.shared import Shared
from tests.support.quantize import value_and_gradient

UPDATES = [settings.GradientUpdate(), settings.EmaUpdate(restart_below=0.0)]


def quantizer(**values):
    torch.manual_seed(0)
    return Shared(
        settings.Shared(**{"codebook_size": 16, "branch_dims": (6, 3), **values}),
    )


def fill(part, *tables):
    with torch.no_grad():
        part.table.entries.weight.copy_(torch.cat([torch.tensor(table) for table in tables], -1))


@pytest.mark.parametrize(("weights", "expected"), [((1.0, 1.0), 0), ((1.0, 2.0), 1)])
def test_the_index_by_hand(weights, expected):
    part = quantizer(codebook_size=2, branch_dims=(2, 2), distance_weights=weights)
    fill(part, [[1.0, 0.0], [0.0, 1.0]], [[1.0, 0.0], [0.0, 1.0]])
    # Distances are 0 + 2 w and 2 + 0: a tie at w = 1, of which the first entry is taken.
    codes, parts = part(torch.tensor([[1.0, 0.0, 0.0, 1.0]]))
    assert parts.tolist() == [[expected]]
    assert codes.tolist() == [[1.0, 0.0, 1.0, 0.0] if expected == 0 else [0.0, 1.0, 0.0, 1.0]]


def test_losses_by_hand():
    latents = torch.tensor([[3.0, 0.0, 0.0, 0.0, 0.0, 2.0]])
    found = {}
    for means in ("branch", "channel"):
        part = quantizer(codebook_size=2, branch_dims=(4, 2), means=means)
        fill(part, [[1.0, 0.0, 0.0, 0.0], [0.0, 0.0, 0.0, 5.0]], [[1.0, 0.0], [-1.0, 0.0]])
        found[means] = part.losses(latents)
    # Of length 1, semantic channels are a code and pixel channels at a right angle to it.
    assert found["branch"]["commitment"].item() == pytest.approx((0 + 2 / 2) / 2)
    assert found["channel"]["commitment"].item() == pytest.approx(2 / 6)
    for losses in found.values():
        assert losses["codebook"].item() == pytest.approx(losses["commitment"].item())


@pytest.mark.parametrize(("branch", "weights"), [(0, (1.0, 0.0)), (1, (0.0, 1.0)), (1, (1.0, 1e6))])
def test_with_all_weight_on_one_table_it_is_that_table_alone(branch, weights, generator):
    part = quantizer(distance_weights=weights)
    latents = torch.randn(40, 9, generator=generator)
    dims, own = (6, 3)[branch], latents.split((6, 3), -1)[branch]
    plain = Codebook(settings.Codebook(codebook_size=16, dim=dims))
    table = part.table.entries.weight.split((6, 3), -1)[branch]
    plain.table.load_state_dict({"entries.weight": table.detach()})
    codes, parts = part(latents)
    assert torch.equal(parts, plain(own).parts)
    torch.testing.assert_close(codes.split((6, 3), -1)[branch], plain(own).codes)
    other = latents.split((6, 3), -1)[1 - branch]
    assert not torch.equal(parts, quantizer()(torch.cat([own, other], -1)).parts) or branch == 0


def test_the_index_is_that_of_a_slow_definition(generator):
    part = quantizer(distance_weights=(1.0, 3.0))
    latents = torch.randn(50, 9, generator=generator)
    found = part(latents).parts[:, 0]
    semantic, pixel = (functional.normalize(each, dim=-1) for each in latents.split((6, 3), -1))
    rows = part.table.entries.weight.detach().split((6, 3), -1)
    own_semantic, own_pixel = (functional.normalize(each, dim=-1) for each in rows)
    for token in range(50):
        distances = [
            ((semantic[token] - own_semantic[entry]) ** 2).sum()
            + 3 * ((pixel[token] - own_pixel[entry]) ** 2).sum()
            for entry in range(16)
        ]
        assert found[token] == torch.stack(distances).argmin()


def test_entries_in_another_order_change_indices_and_no_code(generator):
    part, other = quantizer(), quantizer()
    order = torch.randperm(16, generator=generator)
    with torch.no_grad():
        other.table.entries.weight.copy_(part.table.entries.weight[order])
    latents = torch.randn(40, 9, generator=generator)
    (codes, parts), (again, moved) = part(latents), other(latents)
    assert torch.equal(codes, again)
    assert torch.equal(parts, order[moved])
    assert not torch.equal(parts, moved)


@pytest.mark.parametrize("update", UPDATES)
def test_one_table_is_a_plain_codebook(update, generator):
    one = quantizer(branch_dims=(4,), distance_weights=(1.0,), update=update)
    plain = Codebook(settings.Codebook(codebook_size=16, dim=4, update=update))
    plain.table.load_state_dict(one.table.state_dict())
    latents = torch.randn(2, 9, 4, generator=generator)
    assert torch.equal(one(latents).parts, plain(latents).parts)
    torch.testing.assert_close(one.losses(latents), plain.losses(latents))
    for name in (None, "commitment"):
        (value, found), (other, expected) = (
            value_and_gradient(
                lambda z, of=of, name=name: of.losses(z)[name] if name else of(z).codes * 3, latents
            )
            for of in (one, plain)
        )
        torch.testing.assert_close(value, other)
        torch.testing.assert_close(found, expected)
    for of in (one, plain):
        numbers = torch.Generator().manual_seed(1)
        of.follow(of.statistics(latents.flatten(0, 1), of(latents).parts.flatten(0, 1), numbers))
    torch.testing.assert_close(one.decode(torch.arange(16)[:, None]), plain.table.codes())


def test_latents_that_are_codes_have_no_loss(generator):
    part = quantizer()
    codes = part.decode(torch.randint(16, (20, 1), generator=generator))
    assert all(value < 1e-12 for value in part.losses(2 * codes).values())


def test_an_entry_starts_again_from_one_token_in_all_tables(generator):
    part = quantizer(update=settings.EmaUpdate(decay=0.0, restart_below=0.5))
    latents = torch.randn(3, 9, generator=generator)
    parts = part(latents).parts
    part.follow(part.statistics(latents, parts, torch.Generator().manual_seed(1)))
    again = [[entry] for entry in range(16) if entry not in parts]
    codes = part.decode(torch.tensor(again))
    tokens = part._scaled(latents)
    # No code is made of the semantic half of one token and the pixel half of another.
    nearest = (codes[:, None] - tokens).abs().amax(-1).amin(1)
    assert bool((nearest < 1e-5).all())
