"""Tests of `mergevq.tokenizer.reducers.queries` and `mergevq.tokenizer.expanders.mask_tokens`."""

from dataclasses import replace

import pytest
import torch

from mergevq.config.parts import MaskTokens as ExpanderSettings
from mergevq.config.parts import Queries as Settings
from mergevq.config.recipes.digits import digits32_ar, digits32_pool, digits32_queries
from mergevq.data.layouts import Ordered
from mergevq.data.tokens.files import TokenRecord
from mergevq.tokenizer.expanders.mask_tokens import MaskTokens
from mergevq.tokenizer.reducers.queries import Queries, causal_mask
from mergevq.tokenizer.seams import TokenSet
from mergevq.tokenizer.tokenizer import Tokenizer
from mergevq.training.generator_step import fitted_config
from tests.support.small import shrink

GRID = (4, 4)
NUM_QUERIES = 6


def parts():
    """A reducer of 8 channels and an expander of 12, for codes of 3."""
    torch.manual_seed(0)
    reducer = Queries(Settings(num_queries=NUM_QUERIES, num_layers=1, num_heads=2), 8)
    expander = MaskTokens(ExpanderSettings(dim=12, num_layers=2, num_heads=2), 3, NUM_QUERIES)
    return reducer, expander


def grid():
    return torch.randn(2, 16, 8, generator=torch.Generator().manual_seed(1))


def test_queries_and_slots_have_no_order_but_their_own():
    reducer, expander = parts()
    cls, codes = torch.zeros(2, 1, 8), torch.randn(2, NUM_QUERIES, 3)
    order = torch.tensor([3, 0, 5, 1, 4, 2])
    tokens = reducer(grid(), cls, GRID, NUM_QUERIES).tokens
    given = expander(codes, Ordered(NUM_QUERIES), GRID).tokens
    with torch.no_grad():
        reducer.queries.copy_(reducer.queries[order])
        expander.slots.copy_(expander.slots[order])
    permuted = reducer(grid(), cls, GRID, NUM_QUERIES).tokens
    torch.testing.assert_close(permuted, tokens[:, order], rtol=0, atol=1e-6)
    again = expander(codes[:, order], Ordered(NUM_QUERIES), GRID).tokens
    torch.testing.assert_close(again, given, rtol=0, atol=1e-6)


def test_a_code_is_a_map_of_its_own_query_alone():
    model = Tokenizer(shrink(digits32_queries()).model)
    tokens = torch.randn(1, 16, model.config.dim, requires_grad=True)
    latents = model.encoder.latents(TokenSet(tokens, tokens[:, 0], Ordered(16)))
    (gradient,) = torch.autograd.grad(latents[0, 5].sum(), tokens)
    assert gradient[0, 5].abs().min() > 0
    assert gradient[0].abs().sum() == gradient[0, 5].abs().sum()


def test_fewer_tokens_are_those_of_the_first_queries():
    reducer, _ = parts()
    found = reducer(grid(), torch.zeros(2, 1, 8), GRID, 4)
    assert found.layout == Ordered(4)
    with torch.no_grad():
        reducer.queries[4:].fill_(9.0)
    again = reducer(grid(), torch.zeros(2, 1, 8), GRID, 4)
    assert torch.equal(found.tokens, again.tokens)


def with_changed_queries(causal):
    """Tokens, latents and class token of three blocks, before and after query 3 changed."""
    torch.manual_seed(0)
    config = shrink(digits32_queries()).model
    model = Tokenizer(replace(config, reducer=replace(config.reducer, causal=causal)))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    image = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(1)) * 2 - 1
    with torch.no_grad():
        first = model.encode(image, 16)
        model.encoder.reducer.queries[3] += 1.0
        return model, image, first, model.encode(image, 16)


def test_no_token_changes_with_a_query_after_it():
    model, image, first, again = with_changed_queries(causal=True)
    assert torch.equal(first.latents[:, :3], again.latents[:, :3])
    assert torch.equal(first.class_token, again.class_token)
    assert (first.latents[:, 3:] != again.latents[:, 3:]).any(-1).all()
    with torch.no_grad():
        fewer = model.encode(image, 4)
    torch.testing.assert_close(fewer.latents, again.latents[:, :4], rtol=0, atol=1e-5)
    # Without the mask they all change.
    _, _, first, again = with_changed_queries(causal=False)
    assert (first.latents != again.latents).any(-1).all()


def test_the_mask_of_two_cells_and_two_queries():
    rows = causal_mask(2, 2, torch.device("cpu")).int().tolist()
    assert rows == [[1, 1, 0, 0], [1, 1, 0, 0], [1, 1, 1, 0], [1, 1, 1, 1]]


def test_where_a_cell_lies_matters_to_queries():
    reducer, _ = parts()
    shuffled = grid()[:, torch.randperm(16, generator=torch.Generator().manual_seed(2))]
    cls = torch.zeros(2, 1, 8)
    one, other = (reducer(cells, cls, GRID, 4).tokens for cells in (grid(), shuffled))
    assert (one - other).abs().max() > 1e-3


def test_weights_are_as_many_as_their_definition_has():
    reducer, expander = parts()
    assert reducer.queries.numel() == NUM_QUERIES * 8
    # qkv 3, proj 1, MLP 8 of 8 x 8; biases 3 + 1 + 4 + 1, two norms and two gains.
    blocks = 12 * 8 * 8 + 15 * 8
    assert sum(p.numel() for p in reducer.parameters()) == NUM_QUERIES * 8 + blocks
    block = sum(p.numel() for p in expander.blocks[0].parameters())
    assert block == 12 * (12 * 12) + 13 * 12  # qkv 3, proj 1, MLP 8; biases 3 + 1 + 4 + 1, norms 4
    own = sum(p.numel() for p in expander.parameters()) - 2 * block
    assert own == NUM_QUERIES * 12 + 12 + (3 * 12 + 12) + 2 * 12


def test_more_tokens_than_queries_are_refused():
    settings = Settings(num_queries=NUM_QUERIES)
    with pytest.raises(ValueError, match=r"num_kept \(7\) must be at most 6, the queries"):
        settings.check_kept(GRID, 7)
    assert settings.nearest_kept(GRID, 9) == 6
    _, expander = parts()
    with pytest.raises(ValueError, match=r"tokens \(7\) must be at most 6, the queries"):
        expander(torch.zeros(1, 7, 3), Ordered(7), GRID)


def test_codes_reach_pixels_through_the_expander_alone():
    model = Tokenizer(shrink(digits32_queries()).model)
    codes = torch.randn(2, 16, model.quantizer.spec.dim)
    with torch.no_grad():
        model.expander.from_codes.weight.zero_()
        first, second = model.decode(codes, Ordered(16))
    assert torch.equal(first, second)


def test_a_view_has_as_many_tokens_as_the_image():
    model = Tokenizer(shrink(digits32_queries()).model)
    assert model.config.kept_in_proportion((6, 6), 16 / 64) == 16


def test_each_layout_has_its_expander():
    model = digits32_queries().model
    message = "model.reducer.kind queries leaves tokens with the layout 'ordered', and "
    with pytest.raises(ValueError, match=message):
        replace(model, expander=digits32_pool().model.expander)


def test_generators_refuse_tokens_without_places():
    record = TokenRecord(
        tokenizer="t",
        num_kept=(16,),
        sizes=(256,),
        grid_shape=(8, 8),
        data="d",
        images="i",
        num_images=3,
        class_names=(),
        layout="ordered",
    )
    with pytest.raises(ValueError, match="are ordered, without a place on the grid"):
        fitted_config(digits32_ar(), record)
