from dataclasses import replace

import pytest
import torch
from generators import CLUSTERS, FIGURE_6, TINY

from mergevq.cache import FullCache, SlotCache

CPU = {"device": torch.device("cpu"), "dtype": torch.float32}
MERGE = replace(TINY, order="merge", grid_size=(2, 5))


def labelled(batch, count, value):
    """Keys that say which input they belong to."""
    return torch.full((batch, 2, count, 16), float(value))


def place_all(cache, codes):
    """Place tokens as decoding does; for each, the sets of inputs it sees, prefix left out."""
    cache.reset()
    prefix = labelled(len(codes), 2, -1)
    cache.update(0, prefix, prefix)
    seen = []
    for cell in range(codes.shape[1]):
        visible = cache.place(codes[:, cell], cell)
        keys, _ = cache.update(0, labelled(len(codes), 1, cell), labelled(len(codes), 1, cell))
        rows = [keys[row, 0, visible[row, 0], 0].int().tolist() for row in range(len(codes))]
        assert all(row[:2] == [-1, -1] for row in rows)
        seen.append([sorted(row[2:]) for row in rows])
    return seen


def slot_cache(batch=1, num_slots=9, config=MERGE):
    return SlotCache(config, batch=batch, num_slots=num_slots, **CPU)


def test_slots_hold_what_figure_6_shows():
    seen = place_all(slot_cache(num_slots=SlotCache.slots_for(MERGE, 4)), CLUSTERS)
    expected = [row.nonzero()[:, 0].tolist() for row in FIGURE_6]
    assert [rows[0] for rows in seen] == expected


def test_figure_6_needs_the_slots_of_its_distinct_tokens():
    # Prefix 2, four distinct tokens, window 2 and the token being processed.
    assert SlotCache.slots_for(MERGE, 4) == 2 + 4 + 2 + 1


def test_there_are_never_more_slots_than_inputs():
    assert SlotCache.slots_for(MERGE, 10) == 2 + 9


def test_the_slots_suffice_for_any_sequence_within_the_budget(generator):
    config = replace(TINY, order="merge", grid_size=(6, 6))
    codes = torch.randint(4, (64, 36), generator=generator)
    codes[:8, 20:] = codes[:8, 19:20]
    cache = slot_cache(batch=64, num_slots=SlotCache.slots_for(config, 4), config=config)
    seen = place_all(cache, codes)
    assert cache.num_distinct.max() == 4
    assert max(len(row) for rows in seen for row in rows) == 4 + 2 + 1


def test_rows_evict_each_their_own():
    codes = torch.tensor([[5, 5, 5, 5, 5, 5], [1, 2, 3, 1, 2, 3]])
    seen = place_all(slot_cache(batch=2), codes)
    assert seen[5] == [[0, 3, 4, 5], [0, 1, 2, 3, 4, 5]]
    assert place_all(slot_cache(batch=1), codes[:1])[5] == [[0, 3, 4, 5]]


def test_a_freed_slot_is_used_again():
    cache = slot_cache(num_slots=2 + 1 + 2 + 1)
    place_all(cache, torch.full((1, 9), 7))
    assert cache.filled == 6
    assert cache.num_distinct.tolist() == [1]


def test_only_the_filled_slots_are_read():
    cache = slot_cache()
    place_all(cache, torch.tensor([[3, 4]]))
    keys, values = cache.update(1, labelled(1, 1, 0), labelled(1, 1, 0))
    assert keys.shape[2] == values.shape[2] == 4


def test_too_many_distinct_tokens_are_an_error():
    with pytest.raises(RuntimeError, match="5 distinct tokens must fit into the cache's 6 slots"):
        place_all(slot_cache(num_slots=6), torch.arange(5)[None])


def test_a_cache_is_as_good_as_new_after_a_reset():
    cache = slot_cache()
    place_all(cache, CLUSTERS.flip(1))
    assert place_all(cache, CLUSTERS) == place_all(slot_cache(), CLUSTERS)


def test_a_full_cache_returns_all_that_was_kept():
    cache = FullCache(TINY, batch=1, num_slots=5, **CPU)
    cache.update(0, labelled(1, 3, 1), labelled(1, 3, 1))
    cache.advance(2)
    keys, values = cache.update(0, labelled(1, 2, 2), labelled(1, 2, 2))
    assert keys[0, 0, :, 0].tolist() == values[0, 1, :, 5].tolist() == [1, 1, 2, 2]


def test_a_full_cache_says_when_it_is_full():
    cache = FullCache(TINY, batch=1, num_slots=2, **CPU)
    with pytest.raises(RuntimeError, match="3 inputs must fit into the cache's 2 slots"):
        cache.update(0, labelled(1, 3, 1), labelled(1, 3, 1))
    cache.update(0, labelled(1, 2, 1), labelled(1, 2, 1))
    cache.advance(2)
    cache.reset()
    assert cache.update(0, labelled(1, 2, 1), labelled(1, 2, 1))[0].shape[2] == 2


def test_bytes_are_those_of_keys_and_values():
    # Two layers, two heads of 16 channels, keys and values of four bytes each.
    assert FullCache(TINY, batch=3, num_slots=5, **CPU).num_bytes == 2 * 2 * 3 * 2 * 5 * 16 * 4
    assert slot_cache(num_slots=9).num_bytes == 2 * 2 * 2 * 9 * 16 * 4
