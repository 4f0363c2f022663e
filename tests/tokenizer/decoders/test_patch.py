"""Tests of `mergevq.tokenizer.decoders.patch`."""

import itertools

import pytest
import torch

from mergevq.config.tokenizer import TokenizerConfig
from mergevq.tokenizer.decoders.patch import PatchDecoder, PixelSkip
from mergevq.tokenizer.seams import Given
from mergevq.tokenizer.tokenizer import Tokenizer
from tests.support.parts import changed
from tests.support.tokenizer import G

COMPONENTS = (0, 0, 1, 0, 2, 1)
PATCH = changed(G, decoder="patch", decoder_width=16, bit_components=COMPONENTS)


def signs(*shape: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return 2.0 * torch.randint(2, shape, generator=generator) - 1


def given(codes: torch.Tensor, grid_shape: tuple[int, int] = (8, 8)) -> Given:
    return Given(codes, grid_shape, None)


def decoder(config: TokenizerConfig = PATCH) -> PatchDecoder:
    torch.manual_seed(0)
    return PatchDecoder(config.decoder, config.quantizer.dim, config.patch_size).eval()


@pytest.mark.parametrize("levels", [2, 3, 4])
@pytest.mark.parametrize("grid_shape", [(8, 8), (3, 5), (1, 1)])
def test_a_cell_becomes_its_pixels_on_any_grid(levels, grid_shape):
    config = changed(PATCH, channel_mult=(1,) * levels, num_kept=16)
    height, width = grid_shape
    side = config.patch_size
    image = decoder(config)(given(signs(2, height * width, 6), grid_shape))
    assert image.shape == (2, 3, height * side, width * side)


def test_the_tokenizer_decodes_with_it():
    tokenizer = Tokenizer(PATCH).eval()
    assert isinstance(tokenizer.decoder, PatchDecoder)
    image = torch.zeros(1, 3, 32, 32)
    assert tokenizer.reconstruct(image, source="recovered").image.shape == image.shape


def test_every_weight_has_a_gradient_and_recomputing_changes_none():
    gradients = []
    for checkpointing in (False, True):
        part = decoder().train()
        part.checkpointing = checkpointing
        codes = signs(2, 64, 6).requires_grad_()
        part(given(codes)).square().mean().backward()
        gradients.append([codes.grad, *(weight.grad for weight in part.parameters())])
    for first, second in zip(*gradients, strict=True):
        assert first.abs().max() > 0
        torch.testing.assert_close(first, second)


def test_without_attention_a_cell_sees_only_its_neighbours_and_their_seams_are_joined():
    part = decoder(changed(PATCH, decoder_blocks="c", bit_components=()))
    codes = signs(1, 64, 6)
    other = codes.clone()
    other[:, 3 * 8 + 4] *= -1  # row 3, column 4
    differs = (part(given(codes)) - part(given(other))).abs().amax((0, 1)) > 1e-7
    rows, columns = differs.nonzero(as_tuple=True)
    # One cell by the block, and half of another by the convolution over the seams.
    assert (rows.min(), rows.max()) == (4 * 2 - 2, 4 * 5 + 1)
    assert (columns.min(), columns.max()) == (4 * 3 - 2, 4 * 6 + 1)


def test_attention_sees_all_cells():
    part = decoder(changed(PATCH, decoder_blocks="a", bit_components=()))
    codes = signs(1, 64, 6)
    other = codes.clone()
    other[:, 0] *= -1
    differs = (part(given(codes)) - part(given(other))).abs().amax((0, 1))
    assert (differs > 0).all()


def test_products_of_a_components_bits_reach_any_function_of_them_and_of_no_other():
    skip = PixelSkip(PATCH.decoder.bit_groups, 5)
    assert skip.subsets[:7] == ((0,), (1,), (3,), (0, 1), (0, 3), (1, 3), (0, 1, 3))
    assert len(skip.subsets) == 7 + 3 + 1
    every = torch.tensor(list(itertools.product([-1.0, 1.0], repeat=6)))
    design = torch.stack([every[:, list(subset)].prod(-1) for subset in skip.subsets], -1)
    torch.testing.assert_close(skip(every[None])[0], skip.linear(design))
    # The seven and the constant are as many as a component of three bits has levels.
    own = torch.cat([design[:, :7], torch.ones(64, 1)], 1)
    assert torch.linalg.matrix_rank(own) == 8


def test_the_gradient_of_a_sign_is_half_of_what_flipping_it_changes():
    skip = PixelSkip(PATCH.decoder.bit_groups, 1)
    codes = signs(1, 1, 6).requires_grad_()
    skip(codes).sum().backward()
    for bit in range(6):
        flipped = codes.detach().clone()
        flipped[..., bit] *= -1
        difference = (skip(codes) - skip(flipped)).sum() / 2 * codes[0, 0, bit]
        torch.testing.assert_close(codes.grad[0, 0, bit], difference.detach())


def test_in_half_precision_the_products_are_not_rounded():
    part = decoder()
    torch.nn.init.zeros_(part.conv_out.weight)
    codes = signs(1, 64, 6)
    expected = part(given(codes))
    with torch.autocast("cpu", torch.bfloat16):
        rounded = part(given(codes.bfloat16()))
    # The other way gives its bias alone, in half precision.
    torch.testing.assert_close(rounded.float(), expected, atol=2e-3, rtol=0)


def test_half_precision_trains():
    part = decoder().train()
    with torch.autocast("cpu", torch.bfloat16):
        loss = part(given(signs(2, 64, 6))).float().square().mean()
    loss.backward()
    assert all(weight.grad.isfinite().all() for weight in part.parameters())
