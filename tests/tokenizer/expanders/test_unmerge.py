"""Tests of `mergevq.tokenizer.expanders.unmerge`."""

import pytest
import torch
from torch import nn

from mergevq.tokenizer.expanders.unmerge import SourcePredictor
from tests.support.parts import changed
from tests.support.tokenizer import G


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
