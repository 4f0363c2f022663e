"""A wrong map is a map: canonical, with every group, and as many cells elsewhere as were given."""

import pytest
import torch

from mergevq.data.coding.maps import require_canonical
from mergevq.data.layouts import Source, blocks, canonicalize, merge, unmerge
from mergevq.evaluate.robustness.maps import move_cells
from mergevq.nn.rows import take_rows


def random_maps(count, num_cells, num_kept, seed=0):
    """Canonical maps whose groups are of cells anywhere."""
    generator = torch.Generator().manual_seed(seed)
    first = torch.stack([torch.randperm(num_cells, generator=generator) for _ in range(count)])
    others = torch.randint(num_kept, (count, num_cells), generator=generator)
    index = torch.where(first < num_kept, first, others)
    return canonicalize(Source(index, num_kept)).source


def moved_cells(source, moved):
    """Cells in another group, groups called by their tokens of before."""
    return (moved.order.gather(1, moved.source.index) != source.index).sum(1)


def maps_of_places(count, num_cells, num_kept, seed=0):
    """Canonical maps in which every cell is in the group of the nearest of K cells."""
    generator, side = torch.Generator().manual_seed(seed), int(num_cells**0.5)
    places = torch.cartesian_prod(torch.arange(side), torch.arange(side)).float()
    centres = torch.stack(
        [places[torch.randperm(num_cells, generator=generator)[:num_kept]] for _ in range(count)]
    )
    return canonicalize(Source(torch.cdist(places, centres).argmin(-1), num_kept)).source


@pytest.mark.parametrize("groups", ["neighbour", "random"])
@pytest.mark.parametrize(("make", "num_kept"), [(random_maps, 60), (maps_of_places, 20)])
def test_a_thousand_wrong_maps_are_legal_and_as_wrong_as_they_should_be(groups, make, num_kept):
    num_cells, side = 64, 8
    source = make(170, num_cells, num_kept)
    counts = [round(share * num_cells) for share in (0.02, 0.05, 0.1, 0.5, 0.7, 0.9)]
    ids = list(range(170))
    found = move_cells(source, (side, side), groups, counts, seed=0, image_ids=ids)
    assert list(found) == sorted(set(counts))
    for count, moved in found.items():
        require_canonical(moved.source.index, num_kept)
        assert torch.equal(moved.num_moved, moved_cells(source, moved))
        assert ((moved.num_moved - count).abs() <= 1).all()
        assert (moved.order.sort().values == torch.arange(num_kept)).all()


def test_no_moved_cell_leaves_the_map_and_its_tokens_as_they_are():
    source = random_maps(3, 16, 5)
    (moved,) = move_cells(source, (4, 4), "random", [0], seed=0, image_ids=[0, 1, 2]).values()
    assert torch.equal(moved.source.index, source.index)
    assert (moved.order == torch.arange(5)).all()


def test_tokens_follow_their_groups():
    source = random_maps(4, 16, 5)
    codes = torch.arange(20.0).view(4, 5, 1)
    (moved,) = move_cells(source, (4, 4), "neighbour", [6], seed=0, image_ids=range(4)).values()
    before, after = unmerge(codes, source), unmerge(take_rows(codes, moved.order), moved.source)
    assert (before != after).sum((1, 2)).tolist() == moved.num_moved.tolist()


def test_a_cell_takes_the_group_of_a_cell_beside_it():
    # Two halves, left and right: at first only the two columns in the middle can change.
    source = blocks((4, 4), (1, 2), 50)
    ids = range(50)
    moved = move_cells(source, (4, 4), "neighbour", [1], seed=0, image_ids=ids)[1]
    changed = moved.order.gather(1, moved.source.index) != source.index
    assert changed.view(50, 4, 4).any(1).any(0).tolist() == [False, True, True, False]
    anywhere = move_cells(source, (4, 4), "random", [1], seed=0, image_ids=ids)[1]
    changed = anywhere.order.gather(1, anywhere.source.index) != source.index
    assert changed.view(50, 4, 4).any(1).any(0).all()


def test_a_cell_alone_in_its_group_changes_places():
    source = blocks((2, 2), (2, 2))
    moved = move_cells(source, (2, 2), "neighbour", [1], seed=0, image_ids=[0])[1]
    assert moved.num_moved.tolist() == [2]
    require_canonical(moved.source.index, 4)


def test_one_group_has_no_other():
    source = Source(torch.zeros(1, 9, dtype=torch.int64), 1)
    moved = move_cells(source, (3, 3), "random", [4], seed=0, image_ids=[0])[4]
    assert moved.num_moved.tolist() == [0]


def test_draws_of_an_image_do_not_depend_on_its_batch_or_on_other_counts():
    source = random_maps(2, 16, 5)
    both = move_cells(source, (4, 4), "random", [3, 9], seed=1, image_ids=[4, 7])[9]
    alone = move_cells(source.rows(slice(1, 2)), (4, 4), "random", [9], seed=1, image_ids=[7])[9]
    assert torch.equal(both.source.index[1:], alone.source.index)
    other = move_cells(source.rows(slice(1, 2)), (4, 4), "random", [9], seed=2, image_ids=[7])[9]
    assert not torch.equal(other.source.index, alone.source.index)


def test_the_mean_of_a_group_is_of_its_new_cells():
    source = random_maps(1, 16, 3)
    (moved,) = move_cells(source, (4, 4), "random", [8], seed=0, image_ids=[0]).values()
    grid = torch.arange(16.0).view(1, 16, 1)
    means = merge(grid, moved.source)
    own = grid[0, moved.source.index[0] == 0].mean()
    assert means[0, 0, 0] == own
