"""Tests of `mergevq.tokenizer.expanders.fuse`."""

import pytest
import torch

from mergevq.config.parts import Fuse as Settings
from mergevq.config.recipes.holistic import digits32_holistic
from mergevq.data.layouts import Ordered
from mergevq.tokenizer.expanders.fuse import Fuse
from mergevq.tokenizer.tokenizer import Tokenizer
from tests.support.small import shrink

GRID = (2, 3)
NUM_HOLISTIC = 2
NUM_ALL = 8


def fuse(fusion="causal"):
    """An expander of 8 channels for codes of 3, of which the first two are of the whole image."""
    torch.manual_seed(0)
    model = Fuse(Settings(dim=8, num_layers=2, num_heads=2, fusion=fusion), 3, NUM_HOLISTIC)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return model


def codes_of(num_kept):
    numbers = torch.Generator().manual_seed(1)
    return torch.randn(1, num_kept, 3, generator=numbers, requires_grad=True)


def reads(model, num_kept=NUM_ALL):
    """Which codes (columns) each cell (row) depends on."""
    codes = codes_of(num_kept)
    cells = model(codes, Ordered(num_kept), GRID).tokens[0]
    rows = [torch.autograd.grad(cell.sum(), codes, retain_graph=True)[0] for cell in cells]
    return torch.cat(rows).abs().sum(-1) > 1e-9


def test_a_cell_reads_its_own_code_and_all_before_it():
    # Read four tokens before, rows would be three columns short, and the last code read by none.
    expected = torch.ones(6, 8).tril(diagonal=NUM_HOLISTIC).bool()
    assert torch.equal(reads(fuse()), expected)
    assert reads(fuse("full")).all()


def test_the_image_depends_on_the_last_code():
    model = Tokenizer(shrink(digits32_holistic()).model)
    codes = torch.randn(1, 68, model.quantizer.spec.dim, requires_grad=True)
    model.decode(codes, Ordered(68)).sum().backward()
    assert (codes.grad[0].abs().sum(-1) > 0).all()


def test_cells_without_a_code_are_made_of_those_there_are():
    found = reads(fuse(), num_kept=4)
    expected = torch.ones(6, 8).tril(diagonal=NUM_HOLISTIC).bool()[:, :4]
    assert torch.equal(found, expected)
    # With one of the whole image there is no cell that has its own.
    assert reads(fuse(), num_kept=1).all()


@pytest.mark.parametrize("fusion", ["causal", "full"])
def test_codes_of_cells_are_told_apart_by_where_they_are(fusion):
    model, codes = fuse(fusion), codes_of(NUM_ALL).detach()
    swapped = codes[:, [0, 1, 2, 4, 3, 5, 6, 7]]
    first, second = (model(each, Ordered(NUM_ALL), GRID).tokens for each in (codes, swapped))
    assert (first[:, 5] - second[:, 5]).abs().max() > 1e-3
    order = [1, 0, *range(2, NUM_ALL)]
    other = model(codes[:, order], Ordered(NUM_ALL), GRID).tokens
    assert (first[:, 5] - other[:, 5]).abs().max() > 1e-3


def test_every_weight_takes_part_with_all_tokens_and_with_few():
    for num_kept in (1, NUM_HOLISTIC, 5, NUM_ALL):
        model, codes = fuse(), codes_of(num_kept)
        layout = Ordered(num_kept)
        expanded = model.train_pass(codes, codes, layout, GRID, inferred=None)
        expanded.given.tokens.square().sum().backward()
        assert all(each.grad is not None for each in model.parameters())


def test_weights_are_as_many_as_their_definition_has():
    # qkv 3, proj 1, MLP 8; biases 3 + 1 + 4 + 1, norms 4.
    blocks = 2 * (12 * 8 * 8 + 13 * 8)
    own = NUM_HOLISTIC * 8 + 8 + (3 * 8 + 8) + 2 * 8
    assert sum(each.numel() for each in fuse().parameters()) == blocks + own


def test_more_codes_than_cells_and_dropped_ones_are_refused():
    with pytest.raises(ValueError, match=r"tokens \(9\) must be at most 8: 2 of the whole image"):
        fuse()(codes_of(9), Ordered(9), GRID)
    codes = codes_of(NUM_ALL)
    with pytest.raises(ValueError, match="each of the 8 tokens of an image is read"):
        fuse().train_pass(codes, codes, Ordered(8), GRID, inferred=None, lengths=torch.tensor([4]))
