"""Latent perturbation: which tokens become wrong, and how wrong."""

import pytest
import torch

from mergevq.config import parts as settings
from mergevq.tokenizer.quantizers.lfq import Lfq
from mergevq.tokenizer.regularizers.perturb import Perturb
from mergevq.tokenizer.seams import StepDraws

BITS = 18


def perturbed(config, *, num_images=50, num_kept=40, progress=0.0):
    """Bits in which codes differ, of each token."""
    quantizer, regularizer = Lfq(settings.Lfq(num_bits=BITS)), Perturb(config)
    numbers = torch.Generator().manual_seed(1)
    quantized = quantizer(torch.randn(num_images, num_kept, BITS, generator=numbers))
    draws = StepDraws(
        images=(torch.arange(num_images) + 0.5) / num_images,
        tokens=torch.rand(
            num_images, num_kept, regularizer.num_draws(quantizer.spec), generator=numbers
        ),
        progress=torch.tensor(progress),
    )
    codes, lengths = regularizer(quantized, quantizer=quantizer, draws=draws)
    assert lengths is None
    return (codes != quantized.codes).sum(-1)


@pytest.mark.parametrize("none", [{"image_share": 0.0}, {"token_share": 0.0}])
def test_no_share_is_no_change(none):
    assert not perturbed(settings.Perturb(**none)).any()


@pytest.mark.parametrize("share", [1.0, 0.3])
def test_so_many_tokens_of_so_many_images_are_replaced_within_the_ball(share):
    counts = perturbed(settings.Perturb(image_share=0.5, token_share=share))
    assert not counts[25:].any()
    # Of 1,000 tokens; five standard deviations are 0.08.
    assert (counts[:25] > 0).float().mean().item() == pytest.approx(share, abs=0.08 * (share < 1))
    # 100 of 4,096 codes are those of up to 5 of 18 bits.
    assert counts.max() == 5


@pytest.mark.parametrize(
    ("progress", "ratio", "radius"),
    # 75 and 50 of 4,096 codes are 1.8 and 1.2 %; up to 4 of 18 bits differ in 1.5 %.
    [(0.0, 1.0, 5), (0.2, 1.0, 5), (0.4, 0.75, 5), (0.6, 0.5, 4), (1.0, 0.5, 4)],
)
def test_both_the_share_and_the_ball_fall(progress, ratio, radius):
    counts = perturbed(settings.Perturb(image_share=1.0), progress=progress)
    assert (counts > 0).float().mean().item() == pytest.approx(ratio, abs=0.06)
    assert counts.max() == radius


def test_a_fall_without_length_is_at_once():
    config = settings.Perturb(image_share=1.0, fall=(0.5, 0.5), final_ratio=0.0)
    assert perturbed(config, progress=0.5).all()
    assert not perturbed(config, progress=0.51).any()
