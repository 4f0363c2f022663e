"""Tests of `mergevq.generator.orders.merge`."""

import pytest
import torch
from torch.nn.attention.flex_attention import flex_attention

from mergevq.generator.orders.merge import first_occurrence, leaders, merge_block_mask, merge_mask
from mergevq.nn.llama import rotation
from tests.support.generators import CLUSTERS, FIGURE_6
from tests.support.transformer import block


def test_the_mask_is_figure_6_of_the_paper():
    mask = merge_mask(first_occurrence(CLUSTERS), window=2)
    assert torch.equal(mask[0].int(), FIGURE_6.int())


def test_first_occurrences_and_leaders_by_hand():
    groups = torch.tensor([[7, 2, 7, 2, 9, 7], [1, 1, 1, 0, 1, 0]])
    assert first_occurrence(groups).int().tolist() == [[1, 1, 0, 0, 1, 0], [1, 0, 0, 1, 0, 0]]
    assert leaders(groups).tolist() == [[0, 1, 0, 1, 4, 0], [0, 0, 0, 3, 0, 3]]


def test_without_duplicates_the_mask_is_causal():
    first = torch.ones(1, 6, dtype=torch.bool)
    assert torch.equal(merge_mask(first, window=0)[0], torch.ones(6, 6).tril().bool())


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_the_block_mask_attends_as_the_plain_mask(generator):
    first = torch.cat([first_occurrence(CLUSTERS), first_occurrence(CLUSTERS.flip(1))])
    query, key, value = torch.randn(3, 2, 4, 9, 16, generator=generator)
    mask = merge_mask(first, window=2)[:, None]
    expected = torch.nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=mask)
    attended = flex_attention(query, key, value, block_mask=merge_block_mask(first, window=2))
    torch.testing.assert_close(attended, expected)


def test_an_input_is_untouched_by_what_is_masked(generator):
    x = torch.randn(1, 9, 16, generator=generator)
    mask = merge_mask(first_occurrence(CLUSTERS), window=2)
    turns = rotation(torch.zeros(1, 9, 2), head_dim=4)
    changed = x.clone()
    changed[:, 1] += 1
    layer = block()
    before, after = layer(x, turns, mask), layer(changed, turns, mask)
    differs = (before != after).any(-1)[0]
    assert differs.int().tolist() == [0, 1, 1, 1, 0, 0, 0, 0, 0]
