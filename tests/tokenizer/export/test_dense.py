"""Merging and source recovery in comparisons and scans, beside the library's."""

import pytest
import torch

from mergevq.data.layouts import Source, canonicalize
from mergevq.nn.rows import take_rows
from mergevq.tokenizer.expanders.recovery import most_likely_source
from mergevq.tokenizer.export import dense
from mergevq.tokenizer.reducers import matching
from mergevq.tokenizer.reducers.matching import match, merge_step


@pytest.mark.parametrize(("num_tokens", "num_merged"), [(16, 8), (17, 8), (17, 3), (5, 0), (2, 1)])
@pytest.mark.parametrize("batch", [1, 3])
def test_matching_is_the_librarys(num_tokens, num_merged, batch, generator):
    keys = torch.randn(batch, num_tokens, 4, generator=generator)
    keys[0] = keys[0].round()  # With similarities that are equal.
    assert torch.equal(dense.match(keys, num_merged), match(keys, num_merged))


@pytest.mark.parametrize("num_tokens", [12, 7])
def test_matching_of_near_tokens_is_the_librarys(num_tokens, generator):
    keys = torch.randn(3, num_tokens, 4, generator=generator)
    cells = torch.arange(24).expand(3, -1)
    index = canonicalize(Source(cells % num_tokens, num_tokens)).source.index
    places = 0.1 * matching.centres(index, num_tokens, 6)
    assert torch.equal(places, 0.1 * dense.centres(index, num_tokens, 6))
    wanted = match(keys, 3, places)
    assert torch.equal(dense.match(keys, 3, places), wanted)
    assert not torch.equal(wanted, match(keys, 3))


def test_equal_similarities_go_to_the_first():
    keys = torch.ones(1, 6, 2)
    assert dense.match(keys, 2).tolist() == [[1, 1, 2, 1, 3, 0]]
    assert torch.equal(dense.match(keys, 2), match(keys, 2))


@pytest.mark.parametrize("batch", [1, 3])
def test_merged_tokens_are_the_librarys(batch, generator):
    tokens = torch.randn(batch, 9, 5, generator=generator)
    sizes = torch.randint(1, 6, (batch, 9), generator=generator).float()
    destination = match(torch.randn(batch, 9, 4, generator=generator), 3)
    merged, new_sizes = dense.merge_step(tokens, sizes, destination, 6)
    wanted = merge_step(tokens, sizes, destination, 6)
    assert torch.equal(new_sizes, wanted.sizes)
    torch.testing.assert_close(merged, wanted.tokens)
    alone = (destination[:, :, None] == destination[:, None, :]).sum(-1) == 1
    rows = merged.gather(1, destination[..., None].expand_as(tokens))
    assert torch.equal(rows[alone], tokens[alone])


@pytest.mark.parametrize("batch", [1, 3])
def test_the_canonical_order_is_the_librarys(batch, generator):
    fill = torch.stack([torch.randperm(12, generator=generator) for _ in range(batch)])
    index = torch.where(fill < 5, fill, torch.randint(5, (batch, 12), generator=generator))
    tokens = torch.randn(batch, 5, 3, generator=generator)
    wanted = canonicalize(Source(index, 5))
    ordered, rank = dense.canonicalize(index, 5)
    assert torch.equal(ordered, wanted.source.index)
    assert torch.equal(dense.ordered(tokens, rank), take_rows(tokens, wanted.order))


@pytest.mark.parametrize("num_kept", [1, 2, 5, 12])
def test_the_most_likely_source_is_the_librarys(num_kept, generator):
    logits = torch.randn(3, 12, num_kept, generator=generator)
    logits[1] = logits[1].round()  # With scores that are equal.
    wanted = most_likely_source(logits).index
    assert torch.equal(dense.most_likely_source(logits), wanted)
    assert torch.equal(dense.most_likely_source(logits[:1]), wanted[:1])
