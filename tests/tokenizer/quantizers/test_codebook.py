"""The learned codebook: one table, whose entries are tokens."""

import pytest
import torch

from mergevq.config import parts as settings
from mergevq.tokenizer.quantizers.codebook import Codebook


def quantizer(**values):
    torch.manual_seed(0)
    return Codebook(settings.Codebook(codebook_size=32, dim=4, **values))


@pytest.mark.parametrize("update", [settings.GradientUpdate(), settings.EmaUpdate()])
@pytest.mark.parametrize("gradient", ["straight_through", "rotation"])
def test_every_entry_is_the_token_of_its_own_code(update, gradient):
    part = quantizer(update=update, gradient=gradient)
    parts = torch.arange(32)[:, None]
    codes = part.decode(parts)
    found = part(codes.detach().requires_grad_())
    assert torch.equal(found.parts, parts)
    assert torch.equal(found.codes, codes)


def test_the_length_of_a_latent_decides_only_where_codes_have_several(generator):
    latents = torch.randn(50, 4, generator=generator)
    unit, free = quantizer(), quantizer(l2_norm=False)
    assert torch.equal(unit(latents).parts, unit(9 * latents).parts)
    assert not torch.equal(free(latents).parts, free(9 * latents).parts)


def test_the_rotated_gradient_is_another_one_of_the_same_tokens(generator):
    latents = torch.randn(50, 4, generator=generator).requires_grad_()
    found = {}
    for gradient in ("straight_through", "rotation"):
        codes, parts = quantizer(gradient=gradient)(latents)
        weights = torch.arange(4.0)
        found[gradient] = codes, parts, torch.autograd.grad((codes * weights).sum(), latents)[0]
    straight, rotated = found.values()
    assert torch.equal(straight[0], rotated[0])
    assert torch.equal(straight[1], rotated[1])
    assert not torch.allclose(straight[2], rotated[2])


def test_running_means_are_no_weights_and_have_no_loss_of_their_own():
    learned, averaged = quantizer(), quantizer(update=settings.EmaUpdate())
    latents = torch.randn(1, 9, 4)
    assert set(learned.losses(latents)) == {"commitment", "codebook"}
    assert set(averaged.losses(latents)) == {"commitment"}
    assert [tuple(p.shape) for p in learned.parameters()] == [(32, 4)]
    assert list(averaged.parameters()) == []
    assert {name for name, _ in averaged.named_buffers()} == {
        "table.entries.counts",
        "table.entries.sums",
    }
