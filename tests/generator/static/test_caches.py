"""Tables on the device give the slots that the tables on the host give."""

from dataclasses import replace

import pytest
import torch

from mergevq.generator.cache import SlotCache
from mergevq.generator.static.caches import StaticSlotCache
from tests.generator.test_cache import CLUSTERS, CPU, FIGURE_6, MERGE, place_all


@pytest.mark.parametrize("window", [0, 1, 2, 5])
def test_slots_are_given_as_by_the_cache_on_the_host(window, generator):
    config = replace(MERGE, grid_size=(5, 6), order=replace(MERGE.order, window=window))
    codes = torch.randint(6, (3, 29), generator=generator)
    host = SlotCache(
        config, window=window, batch=3, num_slots=SlotCache.slots_for(config, 6, window), **CPU
    )
    tables = StaticSlotCache(config, window=window, batch=3, num_distinct=6, **CPU)
    for cache in (host, tables):
        cache.reset()
    host.filled = host.num_prefix
    for column in codes.unbind(1):
        lengths = list(host._lengths)
        host.place(column)
        seen = tables.place(column)
        assert seen.sum(-1)[:, 0].tolist() == lengths
        slots = torch.as_tensor(host._slot).expand(3, 1)
        assert torch.equal(tables.slot, slots)
    assert tables.num_distinct[:, 0].tolist() == host.num_distinct
    assert torch.equal(tables.codes, host.codes[:, :6])


def test_the_tables_hold_what_figure_6_shows():
    cache = StaticSlotCache(MERGE, window=2, batch=1, num_distinct=4, **CPU)
    expected = [row.nonzero()[:, 0].tolist() for row in FIGURE_6]
    assert [rows[0] for rows in placed(cache)] == expected


def placed(cache):
    """Result of `place_all`, whose cache takes note of the prefix."""
    reset = cache.reset

    def with_prefix():
        reset()
        advance = cache.place
        cache.place = lambda codes: (cache.advance(2), advance(codes))[1]

    cache.reset = with_prefix
    return place_all(cache, CLUSTERS)
