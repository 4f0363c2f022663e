from statistics import NormalDist

import pytest
import torch

from mergevq.config.parts import Dimensions as Settings
from mergevq.tokenizer.quantizers.dimensions import Dimensions, normal_levels


def quantizer_of(**values):
    return Dimensions(Settings(**values))


def normals(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    ("num_levels", "expected"),
    [(2, [0.797885]), (4, [0.324663, 1.271106])],
)
def test_levels_by_hand(num_levels, expected):
    levels = normal_levels(num_levels)
    assert levels[num_levels // 2 :] == pytest.approx(expected, abs=1e-6)
    assert levels == pytest.approx([-level for level in reversed(levels)])


@pytest.mark.parametrize(("num_levels", "error"), [(2, 0.36338), (4, 0.13944), (8, 0.05497)])
def test_a_level_is_the_mean_of_its_share_of_a_normal_distribution(num_levels, error):
    values = normals(200_000)
    inner = [NormalDist().inv_cdf(k / num_levels) for k in range(1, num_levels)]
    share = torch.bucketize(values, torch.tensor(inner))
    counts = share.bincount(minlength=num_levels)
    assert (counts * num_levels / len(values) - 1).abs().max() < 0.02
    means = torch.zeros(num_levels).scatter_add(0, share, values) / counts
    levels = torch.tensor(normal_levels(num_levels))
    assert (means - levels).abs().max() < 0.02
    assert (values - levels[share]).square().mean().item() == pytest.approx(error, rel=0.02)
    # The nearest level is no farther than that of the share.
    codes = quantizer_of(dim=1, num_levels=num_levels)(values[:, None]).codes[:, 0]
    assert ((values - codes).abs() <= (values - levels[share]).abs() + 1e-6).all()


def test_a_level_is_the_nearest_and_not_that_of_the_quantile():
    # 0.75 is above the upper quartile, 0.6745, and nearer to 0.3247 than to 1.2711.
    codes, parts = quantizer_of(dim=1, num_levels=4)(torch.tensor([[0.75], [0.85]]))
    assert parts.tolist() == [[2], [3]]
    assert codes[:, 0].tolist() == pytest.approx([0.324663, 1.271106], abs=1e-6)


def test_channels_have_statistics_of_their_own():
    plain, moved = quantizer_of(dim=2, num_levels=8), quantizer_of(dim=2, num_levels=8)
    moved.load_state_dict(
        {
            "mean": torch.tensor([3.0, -1.0]),
            "deviation": torch.tensor([2.0, 0.5]),
            "levels": plain.levels,
        }
    )
    values = normals(50, 2)
    there = moved(values * moved.deviation + moved.mean)
    assert torch.equal(there.parts, plain(values).parts)
    expected = plain(values).codes * moved.deviation + moved.mean
    torch.testing.assert_close(there.codes, expected)
    assert torch.equal(moved.decode(there.parts), there.codes)


def test_parts_are_channels_in_their_order():
    values = normals(20, 3)
    plain = quantizer_of(dim=3, num_levels=4)
    ordered = quantizer_of(dim=3, num_levels=4, channel_order=(2, 0, 1))
    codes, parts = ordered(values)
    assert torch.equal(codes, plain(values).codes)
    assert torch.equal(parts, plain(values).parts[:, [2, 0, 1]])
    assert torch.equal(ordered.decode(parts), codes)


def test_normalised_tokens_have_no_scale():
    quantizer = quantizer_of(dim=6, num_levels=16, normalized=True)
    values = normals(30, 6)
    assert torch.equal(quantizer(values).parts, quantizer(9 * values + 4).parts)


def test_an_order_is_one_of_all_channels():
    with pytest.raises(ValueError, match=r"channel_order \(0, 0, 1\) must have each of the 3"):
        Settings(dim=3, channel_order=(0, 0, 1))


def test_gradients_go_straight_through():
    latents = normals(5, 4).requires_grad_()
    (gradient,) = torch.autograd.grad(
        (quantizer_of(dim=4)(latents).codes * torch.arange(4)).sum(), latents
    )
    assert torch.equal(gradient, torch.arange(4.0).expand(5, 4))
