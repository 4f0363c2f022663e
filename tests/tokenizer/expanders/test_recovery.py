"""Tests of `mergevq.tokenizer.expanders.recovery`."""

import itertools

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from mergevq.tokenizer.expanders import recovery
from mergevq.tokenizer.expanders.recovery import (
    most_likely_source,
    source_by_blocks,
    source_by_cells,
)
from tests.support.reads import host_reads

both_ways = pytest.mark.parametrize("search", [source_by_cells, source_by_blocks])
SIZES = [(1, 1), (2, 1), (2, 2), (3, 2), (7, 3), (16, 16), (17, 6), (18, 9), (40, 39), (67, 24)]


@pytest.fixture(params=[2, recovery.MAX_BLOCKS])
def blocks_left(request, monkeypatch):
    """With two blocks left, small maps have all the products of large ones."""
    monkeypatch.setattr(recovery, "MAX_BLOCKS", request.param)


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


def reference(logits):
    """The best map of one image in Python's numbers: by cells, and as recovery says by ties."""
    rows, num_kept = logits.tolist(), logits.shape[1]
    best = {0: (rows[0][0], (0,))}
    for row in rows[1:]:
        paths = {}
        for last in range(num_kept):
            ways = []
            if last in best:
                score, path = best[last]
                copy = max(range(last + 1), key=lambda token: (row[token], token))
                ways.append((score + row[copy], (*path, copy)))
            if last - 1 in best:
                score, path = best[last - 1]
                ways.append((score + row[last], (*path, last)))
            if ways:
                # The first of equal ones copies, so its last token was open earlier.
                paths[last] = max(ways, key=lambda way: way[0])
        best = paths
    return best[num_kept - 1][1]


def is_canonical(source):
    anchors = source.anchors()
    rises = (anchors[:, 1:] > anchors[:, :-1]).all()
    return bool((anchors[:, 0] == 0).all() and rises and (anchors < source.index.shape[1]).all())


def totals(logits, source):
    return logits.double().gather(2, source.index[..., None]).sum((1, 2))


# ---------------------------------------------------------------------------------- the best map


@both_ways
@pytest.mark.usefixtures("blocks_left")
@pytest.mark.parametrize("num_kept", [1, 2, 3, 5])
def test_the_most_likely_source_is_the_best_of_all_canonical_maps(search, num_kept, generator):
    logits = torch.randn(4, 5, num_kept, generator=generator)
    maps = torch.tensor(list(canonical_sources(5, num_kept)))
    scores = logits[:, torch.arange(5), maps].sum(-1)
    assert torch.equal(search(logits).index, maps[scores.argmax(-1)])


@both_ways
@pytest.mark.usefixtures("blocks_left")
@pytest.mark.parametrize("num_kept", [1, 2, 3, 5])
def test_of_equal_maps_the_one_whose_tokens_open_first_is_found(search, num_kept, generator):
    logits = torch.randint(2, (20, 5, num_kept), generator=generator).float()
    maps = list(canonical_sources(5, num_kept))
    last = {index: tuple(itertools.accumulate(index, max)) for index in maps}
    for scores, found in zip(logits, search(logits).index.tolist(), strict=True):
        total = {index: scores[range(5), index].sum().item() for index in maps}
        assert tuple(found) == max(maps, key=lambda index: (total[index], last[index], index))


@both_ways
@pytest.mark.usefixtures("blocks_left")
@pytest.mark.parametrize(("num_tokens", "num_kept"), SIZES)
@pytest.mark.parametrize("num_values", [1, 2, 5, 1000])
def test_maps_are_those_of_the_reference_with_ties(
    search, num_tokens, num_kept, num_values, generator
):
    logits = torch.randint(num_values, (2, num_tokens, num_kept), generator=generator).float()
    assert list(map(tuple, search(logits).index.tolist())) == [reference(each) for each in logits]


@pytest.mark.usefixtures("blocks_left")
@pytest.mark.parametrize(("num_tokens", "num_kept"), [*SIZES, (256, 144), (300, 20)])
def test_both_ways_have_the_same_total_of_any_logits(num_tokens, num_kept, generator):
    logits = torch.randn(3, num_tokens, num_kept, generator=generator) * 10
    cells, blocks = source_by_cells(logits), source_by_blocks(logits)
    assert is_canonical(blocks)
    torch.testing.assert_close(totals(logits, blocks), totals(logits, cells), rtol=1e-6, atol=0)


def test_products_in_parts_change_nothing(monkeypatch, generator):
    logits = torch.randn(3, 67, 24, generator=generator)
    expected = source_by_blocks(logits).index
    for most in (1, 5000):
        monkeypatch.setattr(recovery, "MAX_CANDIDATES", most)
        assert torch.equal(source_by_blocks(logits).index, expected)


def test_no_images_have_no_maps():
    assert source_by_blocks(torch.zeros(0, 40, 9)).index.shape == (0, 40)


# ------------------------------------------------------------------------- logits without a number


@both_ways
@pytest.mark.usefixtures("blocks_left")
def test_impossible_tokens_are_left_out_if_a_map_can(search, generator):
    logits = torch.randint(5, (4, 40, 9), generator=generator).float()
    wanted = torch.arange(40) // 5
    wanted[30:] = 8
    possible = torch.rand(logits.shape, generator=generator) < 0.3
    possible[:, torch.arange(40), wanted] = True
    logits = logits.masked_fill(~possible, -torch.inf)
    found = search(logits)
    assert totals(logits, found).isfinite().all()
    assert list(map(tuple, found.index.tolist())) == [reference(each) for each in logits]


@both_ways
@pytest.mark.usefixtures("blocks_left")
@pytest.mark.parametrize("value", [-torch.inf, torch.inf, torch.nan, 3e38, -3e38])
def test_a_map_is_canonical_whatever_the_logits_are(search, value, generator):
    logits = torch.randn(4, 40, 9, generator=generator)
    logits[0] = value
    logits[1, :, 4] = value
    logits[2, 20] = value
    given = logits.clone()
    assert is_canonical(search(logits))
    assert torch.equal(logits.nan_to_num(), given.nan_to_num())


@both_ways
def test_more_tokens_than_cells_have_no_source(search):
    with pytest.raises(ValueError, match=r"num_kept \(3\) must be at most the 2 cells"):
        search(torch.zeros(1, 2, 3))


# -------------------------------------------------------------------------------------- operators


class Operators(TorchDispatchMode):
    """Counts operators that do more than view, or take memory, and notes the largest tensor."""

    def __init__(self):
        super().__init__()
        self.count, self.largest = 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        views = [each.alias_info and not each.alias_info.is_write for each in func._schema.returns]
        if not any(views) and "empty" not in func.name():
            self.count += 1
        for each in result if isinstance(result, (tuple, list)) else [result]:
            self.largest = max(self.largest, each.untyped_storage().nbytes())
        return result


def operators(search, batch, num_tokens, num_kept, device="meta"):
    logits = torch.zeros(batch, num_tokens, num_kept, device=device)
    with Operators() as found:
        search(logits)
    return found


def test_operators_grow_with_the_cells_or_with_the_levels_of_blocks():
    cells, blocks = (
        [operators(search, 1, size, 8, "cpu").count for size in (64, 256, 1024)]
        for search in (source_by_cells, source_by_blocks)
    )
    assert cells[2] - cells[1] == 4 * (cells[1] - cells[0])
    # Four times the cells are two levels more.
    assert blocks[2] - blocks[1] == blocks[1] - blocks[0] == 18
    assert blocks[1] < 130 < 1500 < cells[1]


def test_no_more_candidates_than_stated_are_made_at_once():
    found = operators(source_by_blocks, 64, 1024, 256)
    assert found.largest <= 4 * recovery.MAX_CANDIDATES
    # In parts there are more operators, but not as many as cells.
    assert found.count < 250


@pytest.mark.parametrize(
    ("device", "search"), [("cpu", source_by_cells), ("meta", source_by_blocks)]
)
def test_the_device_chooses_the_way(device, search):
    chosen = operators(most_likely_source, 1, 64, 20, device).count
    assert chosen == operators(search, 1, 64, 20, device).count


@both_ways
def test_nothing_is_read_from_the_device(search, generator):
    logits = torch.randn(2, 67, 24, generator=generator)
    with host_reads() as reads:
        search(logits)
    assert reads == []


@pytest.mark.gpu
def test_a_gpu_finds_the_maps_of_a_cpu_and_the_host_never_waits(generator):
    logits = torch.randint(5, (4, 256, 144), generator=generator).float()
    there = logits.cuda()
    torch.cuda.set_sync_debug_mode("error")
    try:
        found = most_likely_source(there)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(found.index.cpu(), most_likely_source(logits).index)
