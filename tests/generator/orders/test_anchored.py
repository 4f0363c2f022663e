"""Gaps between anchors in bits: which are legal, by hand and by enumeration."""

import itertools

import pytest
import torch

from mergevq.config.generator import GeneratorConfig
from mergevq.config.parts.heads import Bits
from mergevq.config.parts.orders import Anchored
from mergevq.generator.orders.anchored import from_bits, implied, legal_bits, to_bits
from tests.support.generators import tiny_batch, tiny_generator


@pytest.mark.parametrize("most", range(8))
def test_bits_lead_to_every_number_up_to_the_largest_and_to_no_other(most):
    reached = []
    for bits in map(torch.tensor, itertools.product((0, 1), repeat=3)):
        steps = [
            legal_bits(from_bits(bits[:place]), place, 3, torch.tensor(most))[bit]
            for place, bit in enumerate(bits)
        ]
        if all(steps):
            reached.append(from_bits(bits).item())
    assert reached == list(range(most + 1))


def test_bits_are_the_number_highest_first():
    assert to_bits(torch.tensor([[6, 1]]), 3).tolist() == [[[1, 1, 0], [0, 0, 1]]]
    assert from_bits(to_bits(torch.arange(8)[None], 3)).tolist() == [list(range(8))]
    assert to_bits(torch.tensor([[0]]), 0).shape == (1, 1, 0)
    assert implied(torch.zeros(2, 1, dtype=torch.int64), 3).tolist() == [[[True, False, False]]] * 2


@pytest.mark.parametrize(
    ("side", "num_kept", "bits"), [(16, 144, 7), (8, 20, 6), (8, 63, 1), (8, 64, 0)]
)
def test_there_are_bits_enough_for_the_largest_gap(side, num_kept, bits):
    config = GeneratorConfig(
        order=Anchored(gap_in_bits=True),
        head=Bits(sizes=(2, 2, 2)),
        grid_size=(side, side),
        num_kept=num_kept,
        kept_candidates=(num_kept,),
    )
    assert config.num_gap_bits == bits
    assert config.part_sizes == (*(2,) * bits, side * side, 2, 2, 2)
    assert config.part_names[:bits] == tuple(f"gap_bit_{n}" for n in range(1, bits + 1))
    assert config.part_names[bits] == "anchor"


def test_the_cell_is_implied_by_the_bits_and_costs_nothing():
    model, given = tiny_generator("anchor", gap_in_bits=True), tiny_batch("anchor")
    # 12 cells, 5 tokens or more: 3 bits of gaps of at most 8.
    gaps = from_bits(model.parts(given)[..., :3]) + 1
    assert torch.equal(gaps[:, 1:], given.anchors.diff(dim=1))
    anchor = model.logits(given)[3]
    assert torch.equal(anchor.log_softmax(-1)[..., 0], torch.zeros(4, 5))
