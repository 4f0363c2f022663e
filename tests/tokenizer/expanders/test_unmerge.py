"""Tests of `mergevq.tokenizer.expanders.unmerge`."""

import itertools

import pytest
import torch
from torch import nn

from mergevq.tokenizer.expanders.unmerge import SourcePredictor, most_likely_source
from tests.support.parts import changed
from tests.support.tokenizer import G

# -------------------------------------------------------------------------- the most likely source


def canonical_sources(num_tokens, num_kept):
    """All canonical maps, by brute force."""
    for index in itertools.product(range(num_kept), repeat=num_tokens):
        opened = 0
        for cell in index:
            if cell > opened:
                break
            opened += cell == opened
        else:
            if opened == num_kept:
                yield index


@pytest.mark.parametrize("num_kept", [1, 2, 3, 5])
def test_the_most_likely_source_is_the_best_of_all_canonical_maps(num_kept, generator):
    logits = torch.randn(4, 5, num_kept, generator=generator)
    found = most_likely_source(logits).index
    maps = torch.tensor(list(canonical_sources(5, num_kept)))
    scores = logits[:, torch.arange(5), maps].sum(-1)
    assert torch.equal(found, maps[scores.argmax(-1)])


def test_more_tokens_than_cells_have_no_source():
    with pytest.raises(ValueError, match=r"num_kept \(3\) must be at most the 2 cells"):
        most_likely_source(torch.zeros(1, 2, 3))


@pytest.mark.slow
def test_the_predictor_learns_a_source_from_codes():
    predictor = SourcePredictor(changed(G, num_source_layers=1).expander, 6)
    codes = torch.randn(2, 6, 6).sign()
    # Each cell opens the next of six tokens or copies one that is open.
    index = torch.tensor(
        [
            [0, 0, 1, 2, 0, 3, 1, 1, 4, 2, 5, 0, 5, 3, 3, 4],
            [0, 1, 1, 2, 3, 4, 5, 0, 2, 2, 1, 0, 5, 5, 4, 3],
        ]
    )
    optimizer = torch.optim.Adam(predictor.parameters(), lr=0.003)
    for _ in range(400):
        loss = nn.functional.cross_entropy(predictor(codes, (4, 4)).mT, index)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert torch.equal(predictor.predict(codes, (4, 4)).index, index)
