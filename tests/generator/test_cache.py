from dataclasses import replace

import pytest
import torch

from mergevq.generator.cache import FullCache, SlotCache
from tests.support.generators import CLUSTERS, FIGURE_6, TINY, changed

CPU = {"device": torch.device("cpu"), "dtype": torch.float32}
# Heads of 64 channels: one for every input, and two for the prefix.
MERGE = replace(TINY, grid_size=(2, 5), dim=128)
FULL = replace(TINY, dim=128)


def attend(cache, labels, batch=1, mask=None):
    """Attend from inputs of alike keys; for each row, which inputs the last of them sees."""
    values = torch.eye(64)[labels].expand(batch, 2, -1, -1)
    blank = torch.zeros_like(values)
    weights = cache.attend(0, blank, blank, values, mask)[:, 1, -1]
    seen = [row.nonzero()[:, 0].tolist() for row in weights]
    for row, labels_seen in zip(weights, seen, strict=True):
        # Each once.
        torch.testing.assert_close(row[labels_seen], row.new_full([len(labels_seen)], row.max()))
    return seen


def place_all(cache, codes):
    """Decode tokens; for each and each row, the tokens it sees, by number."""
    cache.reset()
    batch = len(codes)
    attend(cache, [62, 63], batch)
    seen = []
    for cell in range(codes.shape[1]):
        rows = attend(cache, [cell], batch, mask=cache.place(codes[:, cell]))
        assert all(row[-2:] == [62, 63] for row in rows)
        seen.append([row[:-2] for row in rows])
    return seen


def slot_cache(batch=1, num_slots=9, config=MERGE):
    return SlotCache(config, window=config.order.window, batch=batch, num_slots=num_slots, **CPU)


def test_slots_hold_what_figure_6_shows():
    seen = place_all(slot_cache(num_slots=SlotCache.slots_for(MERGE, 4, 2)), CLUSTERS)
    expected = [row.nonzero()[:, 0].tolist() for row in FIGURE_6]
    assert [rows[0] for rows in seen] == expected


def test_figure_6_needs_the_slots_of_its_distinct_tokens():
    # Prefix 2, four distinct tokens, window 2.
    assert SlotCache.slots_for(MERGE, 4, 2) == 2 + 4 + 2


def test_there_are_never_more_slots_than_inputs():
    assert SlotCache.slots_for(MERGE, 10, 2) == 2 + 9


def test_the_slots_suffice_for_any_sequence_within_the_budget(generator):
    config = replace(MERGE, grid_size=(6, 6))
    codes = torch.randint(4, (64, 36), generator=generator)
    codes[:8, 20:] = codes[:8, 19:20]
    cache = slot_cache(
        batch=64, num_slots=SlotCache.slots_for(config, 4, config.order.window), config=config
    )
    seen = place_all(cache, codes)
    assert max(cache.num_distinct) == 4
    assert max(len(row) for rows in seen for row in rows) == 4 + 2 + 1


def test_rows_evict_each_their_own():
    codes = torch.tensor([[5, 5, 5, 5, 5, 5], [1, 2, 3, 1, 2, 3]])
    seen = place_all(slot_cache(batch=2), codes)
    assert seen[5] == [[0, 3, 4, 5], [0, 1, 2, 3, 4, 5]]
    assert place_all(slot_cache(batch=1), codes[:1])[5] == [[0, 3, 4, 5]]


def test_a_freed_slot_is_used_again():
    cache = slot_cache(num_slots=2 + 1 + 2)
    seen = place_all(cache, torch.full((1, 9), 7))
    assert cache.filled == 5
    assert cache.num_distinct == [1]
    assert seen[8] == [[0, 6, 7, 8]]


def test_without_a_window_a_duplicate_is_seen_by_itself_alone():
    config = changed(MERGE, window=0)
    cache = slot_cache(batch=2, num_slots=SlotCache.slots_for(config, 2, 0), config=config)
    seen = place_all(cache, torch.tensor([[1, 1, 2, 1, 2], [1, 2, 2, 2, 1]]))
    assert [rows[0] for rows in seen] == [[0], [0, 1], [0, 2], [0, 2, 3], [0, 2, 4]]
    assert [rows[1] for rows in seen] == [[0], [0, 1], [0, 1, 2], [0, 1, 3], [0, 1, 4]]


@pytest.mark.parametrize("window", [0, 1, 2, 3])
def test_without_reuse_the_same_tokens_are_seen_each_in_a_slot_of_its_own(generator, window):
    config = replace(MERGE, order=replace(MERGE.order, window=window), grid_size=(4, 5))
    codes = torch.randint(6, (3, 19), generator=generator)
    tight = slot_cache(3, SlotCache.slots_for(config, 6, window), config)
    full = SlotCache(config, window=window, batch=3, num_slots=2 + 19, reuses=False, **CPU)
    assert place_all(full, codes) == place_all(tight, codes)
    # The last token was written too.
    assert full.filled == 2 + 18
    assert full.keys.shape[3] > tight.keys.shape[3]
    assert place_all(full, codes[:, :7]) == place_all(tight, codes[:, :7])


def test_only_the_filled_slots_are_read():
    cache = slot_cache()
    cache.keys.fill_(torch.nan)
    cache.values.fill_(torch.nan)
    assert place_all(cache, torch.tensor([[3, 4, 3]]))[2] == [[0, 1, 2]]


def test_the_codes_are_the_distinct_tokens_in_the_order_in_which_they_came():
    cache = slot_cache(batch=2, num_slots=6)
    place_all(cache, torch.tensor([[5, 3, 5, 3], [2, 9, 7, 9]]))
    assert cache.codes.tolist() == [[5, 3, -1, -1], [2, 9, 7, -1]]
    assert cache.num_distinct == [2, 3]


def test_too_many_distinct_tokens_are_an_error():
    with pytest.raises(RuntimeError, match="5 distinct tokens must fit into the cache's 6 slots"):
        place_all(slot_cache(num_slots=6), torch.arange(5)[None])


def test_a_cache_is_as_good_as_new_after_a_reset():
    cache = slot_cache()
    place_all(cache, CLUSTERS.flip(1))
    assert place_all(cache, CLUSTERS) == place_all(slot_cache(), CLUSTERS)


def test_a_full_cache_shows_all_that_was_kept():
    cache = FullCache(FULL, batch=1, num_slots=5, **CPU)
    assert attend(cache, [1, 2, 3]) == [[1, 2, 3]]
    cache.advance(2)
    assert attend(cache, [4]) == [[1, 2, 4]]
    mask = torch.tensor([[[True, False, True, False], [True, False, True, True]]])
    assert attend(cache, [5, 6], mask=mask) == [[1, 5, 6]]


def test_a_full_cache_says_when_it_is_full():
    cache = FullCache(FULL, batch=1, num_slots=2, **CPU)
    with pytest.raises(RuntimeError, match="3 inputs must fit into the cache's 2 slots"):
        attend(cache, [1, 2, 3])
    attend(cache, [1, 2])
    cache.advance(2)
    cache.reset()
    assert attend(cache, [3, 4]) == [[3, 4]]


def test_bytes_are_those_of_keys_and_values():
    # Two layers, two heads of 64 channels, keys and values of four bytes each.
    assert FullCache(FULL, batch=3, num_slots=5, **CPU).num_bytes == 2 * 2 * 3 * 2 * 5 * 64 * 4
    assert slot_cache(num_slots=9).num_bytes == 2 * 2 * 2 * 9 * 64 * 4
