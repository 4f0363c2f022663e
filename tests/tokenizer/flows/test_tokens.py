"""Tokens that a flow decoder is shown: their ranks, and what stands for those that are hidden."""

import pytest
import torch

from mergevq.data.layouts import Ordered, Source
from mergevq.tokenizer.flows.tokens import TokenReader, on_patches, ranks
from tests.support.flows import CODE_DIM, LAYOUTS, NUM_KEPT, shown_of


def reader_of(num_slots=8):
    torch.manual_seed(0)
    return TokenReader(CODE_DIM, 4, num_slots)


def test_ordered_tokens_rank_in_their_order():
    assert ranks(Ordered(3), 2, torch.device("cpu")).tolist() == [[0, 1, 2]] * 2


def test_tokens_of_more_cells_come_first_and_of_equally_many_the_earlier_one():
    source = Source(torch.tensor([[0, 1, 1, 2, 3, 3]]), 4)
    assert ranks(source, 1, torch.device("cpu")).tolist() == [[2, 0, 3, 1]]


@pytest.mark.parametrize("kind", LAYOUTS)
def test_a_hidden_token_is_the_learned_one_and_the_others_are_as_they_were(kind):
    reader, lengths = reader_of(), torch.tensor([1, 3, 5])
    shown = shown_of(kind, lengths=lengths)
    seen = reader.seen(reader(shown))
    order = ranks(shown.layout, 3, torch.device("cpu"))
    for image, length in enumerate(lengths):
        for token in range(8):
            is_there = token < NUM_KEPT and order[image, token] < length
            wanted = reader.embed(shown.codes[image, token]) if is_there else reader.hidden
            torch.testing.assert_close(seen[image, token], wanted)


def test_an_image_without_tokens_is_not_one_of_which_all_are_hidden():
    reader = reader_of()
    null = reader.seen(reader(shown_of("ordered", is_null=torch.tensor([True, False, True]))))
    assert torch.equal(null[0], reader.null.expand(8, -1))
    none = reader.seen(reader(shown_of("ordered", lengths=torch.zeros(3, dtype=torch.int64))))
    assert torch.equal(none[1], reader.hidden.expand(8, -1))
    assert torch.equal(reader.seen(reader(shown_of("ordered").without()))[1], null[0])


def test_fewer_tokens_are_the_first_of_more():
    reader, shown = reader_of(), shown_of("ordered")
    fewer = shown._replace(codes=shown.codes[:, :2], layout=Ordered(2))
    first = shown._replace(lengths=torch.full((3,), 2))
    assert torch.equal(reader.seen(reader(fewer)), reader.seen(reader(first)))


def test_more_tokens_than_slots_are_an_error():
    with pytest.raises(ValueError, match=r"tokens \(5\) must be at most 4, the most that the"):
        reader_of(4)(shown_of("ordered"))


def test_a_patch_has_the_token_of_its_cell():
    tokens = torch.tensor([[[1.0], [2.0]]])
    cells = on_patches(tokens, torch.tensor([[0, 1]]), (1, 2), 2)
    assert cells[0, :, 0].tolist() == [1, 1, 2, 2, 1, 1, 2, 2]
