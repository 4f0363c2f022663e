"""A tokenizer that starts from components is the analytic tokenizer, bit for bit."""

from dataclasses import replace

import pytest
import torch

from mergevq.config.parts import DivPrune, GlobalMap, Pool
from mergevq.config.tokenizer import TokenizerConfig
from mergevq.data.layouts import unmerge
from mergevq.nn.positions import from_patches, to_patches
from mergevq.tokenizer.analytic.components import (
    Components,
    encode_analytic,
    fit_components,
    group_means,
)
from mergevq.tokenizer.analytic.start import (
    start_decoder_from_components,
    start_from_components,
    waves,
)
from mergevq.tokenizer.seams import Given
from mergevq.tokenizer.tokenizer import Tokenizer
from tests.support.parts import changed, tokenizer_config

CONFIG = tokenizer_config(
    image_size=32,
    stem="patch",
    patch_dim=96,
    patch_norm=False,
    channels=8,
    channel_mult=(1, 2, 2),
    num_layers=4,
    num_heads=2,
    layer_scale=0.1,
    num_kept=24,
    num_bits=12,
    decoder="patch",
    decoder_width=16,
    decoder_blocks="ca",
    num_decoder_heads=2,
    source_dim=16,
    num_source_heads=2,
)


def photographs(count: int, seed: int) -> torch.Tensor:
    """Smooth random pictures with a little noise."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.randn(count, 3, 6, 6, generator=generator)
    smooth = torch.nn.functional.interpolate(coarse, size=32, mode="bicubic")
    return (smooth + 0.1 * torch.randn(count, 3, 32, 32, generator=generator)).tanh()


@pytest.fixture(scope="module")
def components() -> Components:
    return fit_components(photographs(100, 0), 4, 12)


def started(components: Components, config: TokenizerConfig = CONFIG) -> Tokenizer:
    bit_components = tuple(component for component, _ in components.bits)
    decoder = replace(config.decoder, bit_components=bit_components)
    torch.manual_seed(0)
    tokenizer = Tokenizer(replace(config, decoder=decoder)).eval()
    start_from_components(tokenizer.encoder, components)
    start_decoder_from_components(tokenizer.decoder, components)
    return tokenizer


def clear(components: Components, patches: torch.Tensor) -> torch.Tensor:
    """Which bits are not decided by the last digits of a component."""
    coordinates = components.coordinates(patches)
    distances = [
        (coordinates[..., wave.component, None] - wave.borders).abs().amin(-1)
        for wave in waves(components)
    ]
    return torch.stack(distances, -1) > 1e-4


def psnr(image: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    return -10 * ((image.clamp(-1, 1) - other).square().mean((1, 2, 3)) / 4).log10()


def test_a_wave_is_negative_below_its_first_border_and_flips_at_each(components):
    place = torch.linspace(-8, 8, 4001)
    patches = components.mean + place[:, None, None] * components.basis.T
    for bit, wave in enumerate(waves(components)):
        codes = components.codes(patches[:, wave.component])[:, bit]
        flips = torch.bucketize(place, wave.borders)
        assert torch.equal(codes, 2.0 * (flips % 2) - 1)


@pytest.mark.parametrize("num_kept", [64, 24, 7])
def test_the_codes_are_those_of_the_mean_patches_of_its_groups(components, num_kept):
    image = photographs(16, 1)
    with torch.no_grad():
        encoded = started(components).encode(image, num_kept)
    means = group_means(to_patches(image, 4), encoded.source.index, num_kept)
    sure = clear(components, means)
    assert sure.float().mean() > 0.995
    assert torch.equal(encoded.codes[sure], components.codes(means)[sure])


@pytest.mark.parametrize("reducer", [Pool, GlobalMap, DivPrune])
@pytest.mark.parametrize("num_kept", [64, 24, 6])
def test_other_reducers_whose_last_block_sees_tokens_give_codes_of_mean_patches_too(
    components, reducer, num_kept
):
    image = photographs(16, 1)
    settings = reducer(num_layers=4, num_grid_layers=3, num_heads=2, layer_scale=0.1)
    with torch.no_grad():
        encoded = started(components, replace(CONFIG, reducer=settings)).encode(image, num_kept)
    means = group_means(to_patches(image, 4), encoded.source.index, num_kept)
    sure = clear(components, means)
    assert sure.float().mean() > 0.995
    assert torch.equal(encoded.codes[sure], components.codes(means)[sure])


@pytest.mark.parametrize(
    ("merge_shape", "locality"), [("linear", 0.0), ("square", 0.0), ("linear", 1.0)]
)
def test_the_groups_are_those_of_merging_patches(components, merge_shape, locality):
    image = photographs(16, 1)
    config = changed(CONFIG, merge_shape=merge_shape)
    config = replace(config, reducer=replace(config.reducer, locality=locality))
    with torch.no_grad():
        encoded = started(components, config).encode(image, 24)
    analytic = encode_analytic(components, image, 24, 4, merge_shape, locality)
    same = (encoded.source.index == analytic.source.index).all(-1)
    # A tie that falls to the other side regroups its image.
    assert same.sum() >= 14


def test_a_grid_of_another_shape_merges_alike(components):
    image = photographs(8, 1)[..., :20]
    with torch.no_grad():
        encoded = started(components).encode(image, 11)
    analytic = encode_analytic(components, image, 11, 4)
    assert (encoded.source.index == analytic.source.index).all(-1).sum() >= 7


def test_the_decoder_gives_the_levels_of_the_codes(components):
    generator = torch.Generator().manual_seed(0)
    codes = 2.0 * torch.randint(2, (2, 64, 12), generator=generator) - 1
    with torch.no_grad():
        image = started(components).decoder(Given(codes, (8, 8), None))
    expected = from_patches(components.decode(codes), 4, (8, 8))
    torch.testing.assert_close(image, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("num_kept", [64, 24])
def test_reconstructions_are_as_good_as_the_analytic_tokenizers(components, num_kept):
    image = photographs(16, 2)
    with torch.no_grad():
        fresh = psnr(started(components).reconstruct(image, num_kept).image, image)
    codes, source = encode_analytic(components, image, num_kept, 4)
    decoded = from_patches(components.decode(unmerge(codes, source)), 4, (8, 8))
    analytic = psnr(decoded, image)
    torch.testing.assert_close(fresh.mean(), analytic.mean(), atol=0.01, rtol=0)
    # The pictures are no noise to begin with, which a random start gives.
    assert analytic.mean() > 15


def test_it_starts_so_in_half_precision_but_for_few_bits(components):
    image = photographs(16, 1)
    tokenizer = started(components)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        encoded = tokenizer.encode(image, 64)
    expected = components.codes(to_patches(image, 4))
    assert (encoded.codes.float() == expected).float().mean() > 0.99


def test_every_weight_of_the_encoder_can_still_learn(components):
    tokenizer = started(components).train()
    output = tokenizer(photographs(4, 1), 24)
    output.reconstruction.square().mean().backward()
    moved = {name for name, weight in tokenizer.encoder.named_parameters() if weight.grad.any()}
    assert {
        "stem.conv.weight",
        "reducer.blocks.0.attn.proj.weight",
        "reducer.blocks.0.mlp.fc2.weight",
    } <= moved


def test_a_norm_in_the_stem_is_refused(components):
    config = changed(CONFIG, patch_norm=True)
    with pytest.raises(ValueError, match="needs a patch stem without norm"):
        start_from_components(Tokenizer(config).encoder, components)


def test_components_without_a_channel_are_refused():
    many = fit_components(photographs(100, 0) + 0.3 * torch.randn(100, 3, 32, 32), 4, 30)
    config = changed(CONFIG, num_bits=30, patch_dim=104, channels=4)
    with pytest.raises(ValueError, match=r"width \(104\) leaves room for 5 components, and"):
        start_from_components(Tokenizer(config).encoder, many)


def test_more_waves_than_hidden_units_are_refused():
    flat = photographs(100, 0)[:, :1, :1, :1].expand(-1, 3, 32, 32)
    narrow = fit_components(flat + 1e-3 * torch.randn(100, 3, 32, 32), 4, 20)
    config = changed(CONFIG, num_bits=20, patch_dim=104, channels=4)
    with pytest.raises(
        ValueError, match=r"the waves of 20 bits need \d+ hidden units, and the MLP"
    ):
        start_from_components(Tokenizer(config).encoder, narrow)


def test_images_that_are_all_alike_are_refused():
    alike = fit_components(torch.zeros(4, 3, 32, 32), 4, 12)
    with pytest.raises(ValueError, match="too much alike for an analytic start; set init_codes"):
        start_from_components(Tokenizer(CONFIG).encoder, alike)


def test_a_decoder_without_products_is_refused(components):
    with pytest.raises(ValueError, match=r"needs a decoder with decoder.bit_components: \["):
        start_decoder_from_components(Tokenizer(CONFIG).decoder, components)
