"""Tests of the patch stem without norm; the others are tested as parts of a tokenizer."""

import pytest
import torch

from mergevq.tokenizer.stems import PlainStem, paired_positions, patch_stem
from tests.support.parts import changed
from tests.support.tokenizer import G

PLAIN = changed(G, stem="patch", patch_dim=48, patch_norm=False)


def test_positions_are_in_pairs_of_opposite_sign_and_tell_all_cells_apart():
    positions = paired_positions((5, 7), 8)
    assert positions.shape == (35, 16)
    assert torch.equal(positions[:, ::2], -positions[:, 1::2])
    assert torch.cdist(positions, positions).add(torch.eye(35) * 9).min() > 0.05
    # Half of the features tell the row alone, the others the column.
    grid = positions.unflatten(0, (5, 7))
    assert torch.equal(grid[:, :1].expand(-1, 7, -1)[..., :8], grid[..., :8])
    assert torch.equal(grid[:1].expand(5, -1, -1)[..., 8:], grid[..., 8:])


def test_the_last_third_of_the_channels_tells_positions_too():
    stem = patch_stem(PLAIN.stem)
    assert isinstance(stem, PlainStem)
    torch.nn.init.zeros_(stem.conv.weight)
    torch.nn.init.zeros_(stem.conv.bias)
    grid = stem(torch.zeros(2, 3, 32, 16))
    assert grid.shape == (2, 48, 8, 4)
    assert not grid[:, :32].any()
    torch.testing.assert_close(grid[1, 32:].flatten(1).mT, paired_positions((8, 4), 8))


@pytest.mark.parametrize(
    ("stem", "sees"), [(PLAIN, True), (changed(PLAIN, patch_norm=True), False)]
)
def test_without_norm_an_image_is_as_bright_as_it_is(stem, sees):
    torch.manual_seed(0)
    stem, image = patch_stem(stem.stem), torch.rand(1, 3, 32, 32) / 2
    difference = (stem(image + 0.4) - stem(image)).abs().max()
    assert (difference > 0.01) == sees


def test_it_keeps_its_precision():
    torch.manual_seed(0)
    stem, image = patch_stem(PLAIN.stem), torch.rand(1, 3, 32, 32)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = stem(image)
    assert torch.equal(rounded, stem(image))
