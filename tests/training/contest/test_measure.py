"""K at which arms are measured, by the bits of each."""

from dataclasses import replace

import pytest

from mergevq.config.contest import Arm, ContestSettings
from mergevq.config.recipes.digits import digits32, digits32_global_map, digits32_pool
from mergevq.config.tokenizer import KeptConfig
from mergevq.data.layouts import source_bits
from mergevq.training.contest.measure import bits_of, points
from tests.support.small import shrink

KEPT = KeptConfig(candidates=(16, 20))
MERGE = Arm(name="merge", run=replace(shrink(digits32()), kept=KEPT))
POOL = Arm(name="pool", run=shrink(digits32_pool()))


def asked(arm, **given):
    return points(ContestSettings(arms=(MERGE, POOL), **given), arm)


def test_bits_are_those_of_tokens_and_layout_at_each_k_there_is():
    assert bits_of(MERGE.run) == {k: pytest.approx(8 * k + source_bits(64, k)) for k in KEPT_RANGE}
    # Rows times columns of 8 x 8 cells, from 16 to 32.
    assert bits_of(POOL.run) == {k: 8.0 * k for k in (16, 18, 20, 21, 24, 25, 28, 30, 32)}
    # Weights decide a map that is learned, and not its bits.
    learned = replace(shrink(digits32_global_map()), kept=KEPT)
    assert bits_of(learned) == {k: 8.0 * k for k in KEPT_RANGE}


KEPT_RANGE = range(16, 21)


def test_at_equal_bits_an_arm_has_as_many_tokens_as_fit():
    costs = bits_of(MERGE.run)
    for budget in (int(costs[18]) + 1, int(costs[19])):
        assert asked(MERGE, bits=(budget,)).num_kept == {f"{budget} bits": 18}
    # 183 bits would be 22 tokens and a piece, and 21 blocks are the most below.
    assert asked(POOL, bits=(183, 10**6)).num_kept == {"183 bits": 21, "1000000 bits": 32}


def test_what_an_arm_does_not_have_is_left_out_and_said():
    found = asked(MERGE, bits=(20,), num_kept=(5, 16))
    assert found.num_kept == {"K = 16": 16}
    least = 128 + source_bits(64, 16)
    assert found.left_out[0].startswith("merge at K = 5: num_kept (5) must be at least 8")
    assert found.left_out[1:] == [f"merge at 20 bits: it takes at least {least:.1f}"]


def test_each_arm_has_its_own_k_if_nothing_is_asked_for():
    assert asked(POOL) == ({"own K": 16}, [])
