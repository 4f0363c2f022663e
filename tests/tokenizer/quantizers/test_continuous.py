import math

import pytest
import torch
from torch.nn import functional

from mergevq.config.parts import Kl as KlSettings
from mergevq.config.parts import TwoBranches
from mergevq.config.parts import Unquantized as UnquantizedSettings
from mergevq.config.recipes.digits import digits32, digits32_kl
from mergevq.tokenizer.quantizers.continuous import Kl, Unquantized
from mergevq.tokenizer.tokenizer import Tokenizer
from tests.support.leaves import replaced
from tests.support.small import shrink


def kl_of(mean, log_variance):
    latents = torch.tensor([[[*mean, *log_variance]]], dtype=torch.float32)
    return Kl(KlSettings(dim=len(mean))).losses(latents)["kl"]


def numbers(*shape, seed=0):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(
    ("mean", "log_variance", "expected"),
    [
        ((0.0,), (0.0,), 0.0),
        ((1.0,), (0.0,), 0.5),
        ((0.0,), (math.log(2),), 0.5 * (2 - 1 - math.log(2))),
        # The sum over channels.
        ((1.0, 0.0), (0.0, math.log(2)), 0.5 + 0.5 * (1 - math.log(2))),
    ],
)
def test_the_divergence_by_hand(mean, log_variance, expected):
    assert kl_of(mean, log_variance).item() == pytest.approx(expected, abs=1e-6)


def test_the_divergence_is_a_mean_over_tokens():
    latents = torch.tensor([[[1.0, 0.0], [0.0, 0.0]], [[1.0, 0.0], [1.0, 0.0]]])
    assert Kl(KlSettings(dim=1)).losses(latents)["kl"].item() == pytest.approx(0.5 * 3 / 4)


def test_the_divergence_is_that_of_what_is_drawn():
    mean, log_variance = 0.7, -1.2
    quantizer, count = Kl(KlSettings(dim=1)), 100_000
    latents = torch.tensor([mean, log_variance]).expand(count, 2)
    drawn = quantizer(latents, numbers(count, 1)).codes[:, 0].double()
    own = torch.distributions.Normal(mean, math.exp(log_variance / 2))
    standard = torch.distributions.Normal(0.0, 1.0)
    found = (own.log_prob(drawn) - standard.log_prob(drawn)).mean().item()
    assert found == pytest.approx(kl_of([mean], [log_variance]).item(), rel=0.01)


def test_what_is_drawn_has_the_mean_and_the_deviation():
    latents = torch.tensor([[2.0, -1.0, math.log(4), math.log(0.25)]]).expand(50_000, 4)
    quantizer = Kl(KlSettings(dim=2))
    drawn = quantizer(latents, numbers(50_000, 2)).codes
    assert drawn.mean(0).tolist() == pytest.approx([2.0, -1.0], abs=0.03)
    assert drawn.std(0).tolist() == pytest.approx([2.0, 0.5], rel=0.02)
    assert torch.equal(quantizer(latents).codes, latents[:, :2])


@pytest.mark.parametrize("log_variance", [-1e6, 1e6])
def test_no_log_variance_gives_what_is_not_finite(log_variance):
    latents = torch.tensor([[[0.5, log_variance]]], requires_grad=True)
    quantizer = Kl(KlSettings(dim=1))
    loss = quantizer.losses(latents)["kl"] + quantizer(latents, numbers(1, 1, 1)).codes.sum()
    loss.backward()
    assert loss.isfinite()
    assert latents.grad.isfinite().all()


def test_means_are_codes_outside_of_training_and_normalised_ones_without_deviations():
    latents = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(1))
    means = torch.cat([latents, torch.zeros_like(latents)], -1)
    kl, none = Kl(KlSettings(dim=8)), Unquantized(UnquantizedSettings(dim=8))
    assert torch.equal(functional.layer_norm(kl(means).codes, (8,)), none(latents).codes)
    codes = none(1000 * latents).codes
    assert torch.allclose(codes, none(latents).codes, atol=1e-4)
    assert torch.allclose(codes.square().mean(-1), torch.ones(2, 5), atol=1e-4)
    assert none.losses(latents) == {}


def test_training_starts_with_little_noise():
    torch.manual_seed(0)
    model = Tokenizer(shrink(digits32_kl()).model)
    assert model.encoder.to_latents.out_features == 8
    assert model.encoder.to_latents.bias.tolist() == [0.0] * 4 + [-2.0] * 4
    latents = model.encode(torch.zeros(1, 3, 32, 32)).latents
    assert latents.shape[-1] == 8
    assert latents[..., 4:].mean().item() == pytest.approx(-2, abs=0.5)


def test_deviations_are_not_cut_into_branches():
    with pytest.raises(
        ValueError, match=r"branches.kind \(two\) must be one with quantizer.kind kl"
    ):
        replaced(digits32_kl(), {"model.branches": TwoBranches(semantic_dim=2)})
    with pytest.raises(ValueError, match=r"dim \(1\) must be between 2"):
        replaced(digits32(), {"model.quantizer": UnquantizedSettings(dim=1)})


def test_features_are_means_and_log_variances_or_means():
    torch.manual_seed(0)
    model = Tokenizer(shrink(digits32_kl()).model).eval()
    image = torch.zeros(1, 3, 32, 32)
    latents = model.features(image, stage="latents", num_kept=16)
    means = model.features(image, stage="quantized", num_kept=16)
    assert latents.shape == (1, 16, 8)
    assert torch.equal(means, latents[..., :4])
