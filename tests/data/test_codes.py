"""Tests of `mergevq.data.codes`."""

import math

import pytest
import torch

from mergevq.data.codes import CodeSpec, indices_to_subindices, subindices_to_indices
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
    with pytest.raises(ValueError, match=r"must be between 0 and 31, the last of 32 codes"):
        indices_to_subindices(torch.tensor([32]), (2, 3))


@pytest.mark.parametrize("sizes", [(2**18,), (8, 5), (3, 4, 5), (2,) * 63, (2**31, 2**32)])
def test_parts_and_index_are_each_others_inverse(sizes, generator):
    spec = CodeSpec(sizes=sizes, dim=3)
    parts = torch.stack([torch.randint(size, (4, 6), generator=generator) for size in sizes], -1)
    parts[0, 0] = torch.tensor(sizes) - 1
    indices = spec.join(parts)
    assert torch.equal(spec.split(indices), parts)
    assert int(indices[0, 0]) == spec.num_values - 1
    assert spec.bits == pytest.approx(sum(math.log2(size) for size in sizes))


def test_part_0_is_the_lowest_digit():
    assert CodeSpec(sizes=(8, 5), dim=2).join(torch.tensor([[3, 4]])).tolist() == [3 + 8 * 4]


def test_parts_of_bits_are_the_sub_indices(generator):
    indices = torch.randint(2**18, (5,), generator=generator)
    parts = CodeSpec(sizes=(2**6, 2**12), dim=18).split(indices)
    assert torch.equal(parts, indices_to_subindices(indices, (6, 12)))


def test_tokens_of_too_many_values_have_no_index():
    spec = CodeSpec(sizes=(2**32, 2**32), dim=64)
    message = "a token has 64 bits, and an index has 63: use `parts`, 2 numbers"
    assert not spec.has_index
    with pytest.raises(ValueError, match=message):
        spec.split(torch.zeros(1, dtype=torch.int64))
    with pytest.raises(ValueError, match=message):
        spec.join(torch.zeros(1, 2, dtype=torch.int64))


def test_parts_that_a_token_cannot_have_are_refused():
    spec = CodeSpec(sizes=(8, 5), dim=2)
    spec.check(torch.tensor([[7, 4]]))
    with pytest.raises(ValueError, match=r"indices \(5 to 5\) must be between 0 and 4"):
        spec.check(torch.tensor([[7, 5]]))
    with pytest.raises(ValueError, match="tokens of 3 parts must have 2"):
        spec.check(torch.tensor([[7, 4, 0]]))
