"""A product of codebooks: one is a plain codebook, several are codebooks side by side."""

import pytest
import torch

from mergevq.config import parts as settings
from mergevq.tokenizer.quantizers.codebook import Codebook
from mergevq.tokenizer.quantizers.product import Product
from tests.support.quantize import value_and_gradient

UPDATES = [settings.GradientUpdate(), settings.EmaUpdate()]


def quantizer(num_codebooks, codebook_size=16, book_dim=4, **values):
    torch.manual_seed(0)
    return Product(
        settings.Product(
            num_codebooks=num_codebooks, codebook_size=codebook_size, book_dim=book_dim, **values
        )
    )


@pytest.mark.parametrize("update", UPDATES)
@pytest.mark.parametrize("gradient", ["straight_through", "rotation"])
def test_one_codebook_is_a_plain_codebook(update, gradient, generator):
    one = quantizer(1, update=update, gradient=gradient)
    plain = Codebook(settings.Codebook(codebook_size=16, dim=4, update=update, gradient=gradient))
    plain.table.load_state_dict(one.tables[0].state_dict())
    latents = torch.randn(2, 9, 4, generator=generator)
    weights = torch.randn(2, 9, 4, generator=generator)
    assert torch.equal(one(latents).parts, plain(latents).parts)
    losses = one.losses(latents)
    assert losses.pop("orthogonality") == 0
    torch.testing.assert_close(losses, plain.losses(latents), rtol=0, atol=0)
    for name in (None, "commitment"):
        (value, found), (other, expected) = (
            value_and_gradient(
                lambda z, of=of, name=name: of.losses(z)[name] if name else of(z).codes * weights,
                latents,
            )
            for of in (one, plain)
        )
        assert torch.equal(value, other)
        torch.testing.assert_close(found, expected)
    for of in (one, plain):
        numbers = torch.Generator().manual_seed(1)
        of.follow(of.statistics(latents.flatten(0, 1), of(latents).parts.flatten(0, 1), numbers))
    assert torch.equal(one.decode(torch.arange(16)[:, None]), plain.table.codes())


def test_several_are_codebooks_side_by_side(generator):
    part = quantizer(3)
    latents = torch.randn(5, 12, generator=generator)
    codes, parts = part(latents)
    for book, table in enumerate(part.tables):
        own, chosen = table(latents[:, 4 * book : 4 * book + 4])
        assert torch.equal(codes[:, 4 * book : 4 * book + 4], own)
        assert torch.equal(parts[:, book], chosen)
    assert len(part.tables[0].codes().unique(dim=0)) == 16
    assert not torch.equal(part.tables[0].codes(), part.tables[1].codes())


def test_losses_are_means_over_codebooks(generator):
    part = quantizer(3, l2_norm=False)
    latents = torch.randn(5, 12, generator=generator)
    each = [table.losses(z) for table, z in zip(part.tables, latents.chunk(3, -1), strict=True)]
    found = part.losses(latents)
    for name in ("commitment", "codebook"):
        mean = sum(losses[name] for losses in each) / 3
        torch.testing.assert_close(found[name], mean)


def test_orthogonality_by_hand():
    part = quantizer(3, codebook_size=2, book_dim=2, l2_norm=False)
    with torch.no_grad():
        # The nearest codes of the latents below: (2, 0), (3, 4) and (0, 1).
        for table, code in zip(part.tables, [(2.0, 0.0), (3.0, 4.0), (0.0, 1.0)], strict=True):
            table.entries.weight.copy_(torch.tensor([code, (90.0, 90.0)]))
    latents = torch.tensor([[1.0, 0.1, 2.0, 3.0, 0.2, 0.8]])
    # Cosines are 0.6, 0 and 0.8.
    expected = (0.6**2 + 0.8**2) / 3
    assert part.losses(latents)["orthogonality"].item() == pytest.approx(expected)
    only = quantizer(2, codebook_size=2, book_dim=2, l2_norm=False)
    only.load_state_dict({n: v for n, v in part.state_dict().items() if ".2." not in n})
    assert only.losses(latents[:, :4])["orthogonality"].item() == pytest.approx(0.36)


def test_orthogonality_of_random_directions_is_one_over_their_dimension(generator):
    part = quantizer(2, codebook_size=512, book_dim=8)
    latents = torch.randn(2000, 16, generator=generator)
    assert part.losses(latents)["orthogonality"].item() == pytest.approx(1 / 8, rel=0.1)


def test_orthogonality_moves_latents_and_no_code(generator):
    part = quantizer(2)
    latents = torch.randn(5, 8, generator=generator).requires_grad_()
    part.losses(latents)["orthogonality"].backward()
    assert latents.grad.count_nonzero() == latents.numel()
    assert all(p.grad is None for p in part.parameters())


def test_a_near_token_differs_in_one_codebook_and_in_each_of_them(generator):
    part = quantizer(3)
    parts = torch.randint(16, (200, 3), generator=generator)
    uniforms = torch.rand(200, 13, generator=generator)
    changed = part.near(parts, uniforms, torch.tensor(4095.0)) != parts
    assert (changed.sum(-1) == 1).all()
    assert changed.any(0).all()
