"""Tests of `mergevq.data.codes`."""

import pytest
import torch

from mergevq.data.codes import indices_to_subindices, subindices_to_indices
from tests.support.quantize import random_indices

LAYOUTS = [(4, 16), (2, 3, 5)]


def test_a_token_is_cut_from_its_lowest_bits_up():
    # 45 is 0b101101: two bits 01, then three bits 011, then one bit 1.
    assert indices_to_subindices(torch.tensor([45]), (2, 3, 1)).tolist() == [[1, 3, 1]]
    assert subindices_to_indices(torch.tensor([[1, 3, 1]]), (2, 3, 1)).tolist() == [45]


@pytest.mark.parametrize(
    "layout", [(18,), (9, 9), (6, 12), (12, 6), (1,) * 18, (16, 16), (31, 32), (21, 21, 21), (63,)]
)
@pytest.mark.parametrize("shape", LAYOUTS)
def test_subindices_round_trip_in_any_layout(shape, layout, generator):
    indices = random_indices(shape, sum(layout), generator)
    parts = indices_to_subindices(indices, layout)
    assert parts.shape == (*shape, len(layout))
    for part, bits in zip(parts.unbind(-1), layout, strict=True):
        assert part.min() >= 0
        assert part.max() == 2**bits - 1
    assert torch.equal(subindices_to_indices(parts, layout), indices)


def test_a_layout_with_too_few_bits_is_an_error():
    with pytest.raises(ValueError, match=r"must be between 0 and 31, the last code of 5 bits"):
        indices_to_subindices(torch.tensor([32]), (2, 3))
