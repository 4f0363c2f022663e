"""Tests of `mergevq.tokenizer.reducers.select`."""

import pytest
import torch

from mergevq.config.parts import Select as Settings
from mergevq.data.layouts import canonicalize
from mergevq.nn.blocks import QueryBlock
from mergevq.nn.rows import take_rows
from mergevq.tokenizer.reducers.select import Select, attention_shares, choose, groups

CLASS = torch.zeros(2, 1, 8)


def reducer(num_merger_layers=2):
    torch.manual_seed(0)
    settings = Settings(
        num_layers=2, num_merger_layers=num_merger_layers, num_heads=2, layer_scale=0.5
    )
    return Select(settings, 8)


def grid(num_cells=16):
    return torch.randn(2, num_cells, 8, generator=torch.Generator().manual_seed(1))


def test_two_kept_cells_and_two_that_join_them():
    kept, dropped = choose(torch.tensor([[0.9, 0.2, 0.8, 0.1]]), 2)
    assert (kept.tolist(), dropped.tolist()) == ([[0, 2]], [[1, 3]])
    shares = torch.tensor([[[0.7, 0.3], [0.4, 0.6]]])
    assert groups(kept, dropped, shares).tolist() == [[0, 0, 1, 1]]
    # The lowest cell of a group may be one that was dropped.
    kept, dropped = choose(torch.tensor([[0.1, 0.9, 0.8]]), 2)
    index = groups(kept, dropped, torch.tensor([[[0.2], [0.7]]]))
    assert index.tolist() == [[1, 0, 1]]


def test_of_equal_scores_the_first_are_kept():
    assert choose(torch.zeros(1, 5), 3).kept.tolist() == [[0, 1, 2]]
    scores = torch.arange(4096)[None] % 2
    assert choose(scores.float(), 100).kept.tolist() == [list(range(1, 201, 2))]


def test_where_all_cells_are_kept_no_token_looks_at_another_cell():
    made = reducer()
    with torch.no_grad():
        found = made(grid(), CLASS, (4, 4), 16)
        for block in made.mergers:
            for parameter in block.cross.parameters():
                parameter.fill_(3.0)
        again = made(grid(), CLASS, (4, 4), 16)
        x = torch.cat([CLASS, grid()], dim=1)
        for block in made.blocks:
            x = block(x)
        cells = x[:, 1:]
        for block in made.mergers:
            cells = block.block(cells)
    assert torch.equal(found.layout.index[0], torch.arange(16))
    assert torch.equal(found.tokens, again.tokens)
    assert torch.equal(found.tokens, cells)
    assert torch.equal(found.class_token, x[:, 0])


def test_tokens_are_the_kept_cells_after_a_look_at_the_others():
    made = reducer(num_merger_layers=1)
    with torch.no_grad():
        tokens, class_token, source, *_ = made(grid(), CLASS, (4, 4), 5)
        x = torch.cat([CLASS, grid()], dim=1)
        for block in made.blocks:
            x = block(x)
        kept, dropped = choose(made.selector(x[:, 1:]), 5)
        for image in range(2):
            cells = x[image, 1:]
            others = made.norm(cells)[dropped[image]][None]
            merged = made.mergers[0](cells[kept[image]][None], others)[0]
            # In the order of the lowest cell of each group.
            own = source.index[image, kept[image]]
            torch.testing.assert_close(tokens[image, own], merged, rtol=0, atol=1e-6)
    assert torch.equal(canonicalize(source).source.index, source.index)
    assert source.sizes().min() >= 1
    assert torch.equal(class_token, x[:, 0])


def test_shares_are_those_of_the_attention():
    torch.manual_seed(0)
    block = QueryBlock(8, 2).requires_grad_(requires_grad=False)
    tokens, others = torch.randn(2, 3, 8), torch.randn(2, 5, 8)
    shares = attention_shares(block, tokens, others)
    torch.testing.assert_close(shares.sum(-1), torch.ones(2, 3))
    query, key = block.cross.q(block.norm(tokens)), block.cross.kv(others)[..., :8]
    each = [
        (query[..., part] @ key[..., part].mT / 2).softmax(-1)
        for part in (slice(0, 4), slice(4, 8))
    ]
    torch.testing.assert_close(shares, (each[0] + each[1]) / 2)
    # Mixed by them, the values are what the attention gives, of one head at least.
    one = QueryBlock(8, 1).requires_grad_(requires_grad=False)
    mixed = attention_shares(one, tokens, others) @ one.cross.kv(others)[..., 8:]
    torch.testing.assert_close(one.cross.proj(mixed), one.cross(one.norm(tokens), others))


@pytest.mark.parametrize("which", ["kept", "dropped"])
def test_scores_of_kept_cells_and_of_others_have_gradients(which):
    made = reducer(num_merger_layers=1)
    scores = []
    made.selector.register_forward_hook(lambda _module, _inputs, out: scores.append(out))
    found = made(grid(), CLASS, (4, 4), 5)
    (gradient,) = torch.autograd.grad(found.tokens.square().sum(), scores[0])
    kept, dropped = choose(scores[0], 5)
    rows = kept if which == "kept" else dropped
    assert (gradient.gather(1, rows) != 0).all()


def test_a_gate_has_the_gradient_of_the_probability():
    """Scaling a kept cell by its gate, and a dropped one by the rest to 1, by the chain rule."""
    made = reducer(num_merger_layers=1)
    made.mergers[0].requires_grad_(requires_grad=False)
    for parameter in made.mergers[0].parameters():
        parameter.zero_()
    scores = []
    made.selector.register_forward_hook(lambda _module, _inputs, out: scores.append(out))
    # Nothing is merged: tokens are the kept cells themselves.
    found = made(grid(), CLASS, (4, 4), 5)
    (gradient,) = torch.autograd.grad(found.tokens.sum(), scores[0])
    x = torch.cat([CLASS, grid()], dim=1)
    for block in made.blocks:
        x = block(x)
    kept, dropped = choose(scores[0], 5)
    chance = scores[0].sigmoid()
    expected = (chance * (1 - chance) * x[:, 1:].sum(-1)).gather(1, kept)
    torch.testing.assert_close(gradient.gather(1, kept), expected)
    assert not gradient.gather(1, dropped).any()


def test_the_gradient_of_a_dropped_cell_is_that_of_the_probability_to_be_dropped():
    made = reducer(num_merger_layers=1)
    scores = []
    made.selector.register_forward_hook(lambda _module, _inputs, out: scores.append(out))
    found = made(grid(), CLASS, (4, 4), 5)
    (gradient,) = torch.autograd.grad(found.tokens.square().sum(), scores[0])
    with torch.no_grad():
        x = torch.cat([CLASS, grid()], dim=1)
        for block in made.blocks:
            x = block(x)
        chance = scores[0].sigmoid()
        kept, dropped = choose(scores[0], 5)
        cells, seen = take_rows(x[:, 1:], kept), take_rows(made.norm(x[:, 1:]), dropped)
    seen.requires_grad_()
    (slope,) = torch.autograd.grad(made.mergers[0](cells, seen).square().sum(), seen)
    expected = -(slope * seen.detach()).sum(-1) * (chance * (1 - chance)).gather(1, dropped)
    torch.testing.assert_close(gradient.gather(1, dropped), expected)


def test_the_choice_depends_on_the_whole_grid():
    made, cells = reducer(), grid()
    changed = cells.clone()
    changed[:, 15] *= -1
    with torch.no_grad():
        first, second = made.selector(cells), made.selector(changed)
    assert (first[:, :15] != second[:, :15]).all()
