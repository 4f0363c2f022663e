"""Analytic codes against definitions and cases worked out on paper."""

import pytest
import torch

from mergevq.data.layouts import Source, unmerge
from mergevq.nn.positions import from_patches, to_patches
from mergevq.tokenizer.analytic.components import (
    allot_bits,
    encode_analytic,
    fit_components,
    fit_levels,
    group_means,
)


def photographs(count: int = 24) -> torch.Tensor:
    """Smooth random images: large components first, as in photographs."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(count, 3, 4, 4, generator=generator)
    smooth = torch.nn.functional.interpolate(noise, size=16, mode="bicubic")
    return (smooth + 0.05 * torch.randn(count, 3, 16, 16, generator=generator)).tanh()


def test_patches_are_numbered_as_a_convolutions_weights() -> None:
    image = torch.randn(2, 3, 8, 12)
    weight = torch.randn(5, 3, 4, 4)
    convolved = torch.nn.functional.conv2d(image, weight, stride=4).flatten(2).mT
    torch.testing.assert_close(to_patches(image, 4) @ weight.flatten(1).mT, convolved)


def test_patches_go_back_to_the_image() -> None:
    image = torch.randn(2, 3, 8, 12)
    assert torch.equal(from_patches(to_patches(image, 4), 4, (2, 3)), image)


def test_each_bit_goes_where_the_error_is_largest_and_quarters_it() -> None:
    # 16 -> 4, then the tie of 4 and 4 goes to the first: 4 -> 1; then 4 -> 1; 1, 1, 0.9: the first.
    bits = allot_bits(torch.tensor([16.0, 4.0, 0.9]), 4)
    assert bits == ((0, 0), (0, 1), (1, 0), (0, 2))


def test_levels_of_even_numbers_are_the_middles_of_even_intervals() -> None:
    values = torch.linspace(0, 1, 40_001, dtype=torch.float64)
    levels = fit_levels(values, 4)
    torch.testing.assert_close(
        levels, torch.tensor([1, 3, 5, 7], dtype=torch.float64) / 8, atol=1e-4, rtol=0
    )


def test_levels_of_a_gaussian_are_lloyds() -> None:
    # Max 1960, "Quantizing for Minimum Distortion", table I: 4 levels at +-0.4528 and +-1.510.
    uniform = (torch.arange(100_000, dtype=torch.float64) + 0.5) / 100_000
    levels = fit_levels(torch.special.ndtri(uniform), 4)
    expected = torch.tensor([-1.510, -0.4528, 0.4528, 1.510], dtype=torch.float64)
    torch.testing.assert_close(levels, expected, atol=2e-3, rtol=0)


def test_components_are_uncorrelated_and_ordered() -> None:
    image = photographs()
    components = fit_components(image, 4, 6)
    coordinates = components.coordinates(to_patches(image, 4).flatten(0, 1))
    covariance = torch.cov(coordinates.mT)
    off = covariance - covariance.diag().diag()
    assert off.abs().max() < 1e-4 * covariance[0, 0]
    assert (covariance.diag().diff() < 1e-4).all()


def test_neighbouring_levels_differ_in_one_bit() -> None:
    components = fit_components(photographs(), 4, 8)
    levels = components.levels[0]
    assert len(levels) >= 4
    patches = components.mean + levels[:, None] * components.basis[:, 0]
    codes = components.codes(patches)
    assert (codes.diff(dim=0).abs().sum(-1) == 2).all()


def test_codes_decode_to_the_nearest_level_of_each_component() -> None:
    components = fit_components(photographs(), 4, 8)
    patches = to_patches(photographs(), 4).flatten(0, 1)
    coordinates = components.coordinates(components.decode(components.codes(patches)))
    wanted = components.coordinates(patches)
    for component, levels in enumerate(components.levels):
        nearest = (wanted[:, component, None] - levels).abs().argmin(-1)
        torch.testing.assert_close(coordinates[:, component], levels[nearest], atol=1e-5, rtol=0)


def test_more_bits_come_nearer_and_the_first_are_the_coarse_ones() -> None:
    image = photographs()
    patches = to_patches(image, 4).flatten(0, 1)
    errors = []
    for num_bits in (1, 4, 12):
        components = fit_components(image, 4, num_bits)
        assert components.bits[0] == (0, 0)
        decoded = components.decode(components.codes(patches))
        errors.append(float((decoded - patches).square().mean()))
    assert errors[0] > errors[1] > errors[2]


def test_all_tokens_kept_are_the_codes_of_the_patches() -> None:
    image = photographs(2)
    components = fit_components(photographs(), 4, 8)
    tokens = encode_analytic(components, image, 16, 3)
    assert torch.equal(tokens.codes, components.codes(to_patches(image, 4)))
    assert torch.equal(tokens.source.index, torch.arange(16).expand(2, -1))


def test_merged_tokens_are_the_codes_of_their_cells_mean() -> None:
    image = photographs(3)
    components = fit_components(photographs(), 4, 8)
    codes, source = encode_analytic(components, image, 9, 3)
    patches = to_patches(image, 4)
    for b in range(3):
        for token in range(9):
            cells = source.index[b] == token
            mean = patches[b, cells].mean(0)
            assert torch.equal(codes[b, token], components.codes(mean[None])[0])
    assert torch.equal(source.anchors(), source.anchors().sort(-1).values)
    # A flat picture's means are the patches themselves.
    flat = patches[:, :1].expand(-1, 16, -1)
    torch.testing.assert_close(group_means(flat, source.index, 9), flat[:, :9])
    assert unmerge(codes, Source(source.index, 9)).shape == (3, 16, 8)


def test_two_patches_are_too_few() -> None:
    with pytest.raises(ValueError, match=r"2 patches of 48 numbers .* give more images"):
        fit_components(torch.zeros(2, 3, 4, 4), 4, 8)
