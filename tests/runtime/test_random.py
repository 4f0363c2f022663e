"""A run's directory, log, device, random numbers and end, as the loops use them."""

from dataclasses import replace
from typing import get_args

import numpy as np
import pytest
import torch

from mergevq.config.recipes.tiny64 import tiny64_gr
from mergevq.runtime.random import (
    BatchNumbers,
    DataPurpose,
    data_seed,
    draw_num_kept,
    numbered_seed,
    step_generator,
)

# -------------------------------------------------------------------------------- random numbers


def draw(seed: int, *ids: int | str) -> float:
    return torch.rand((), generator=step_generator(seed, *ids), dtype=torch.float64).item()


def test_draws_depend_on_seed_and_ids_alone():
    expected = draw(0, "image", 5)
    torch.manual_seed(123)
    draw(0, "image", 4)
    assert draw(0, "image", 5) == expected


def test_every_seed_purpose_and_number_has_its_own_draws():
    keys = [(0, "a", 1), (1, "a", 1), (0, "b", 1), (0, "a", 2), (0, "a", 1, 1), (0, 1), (0, "1", 1)]
    assert len({draw(*key) for key in keys}) == len(keys)


def test_no_two_images_of_a_large_run_share_a_seed():
    # Torch's CPU generator sees the low 32 bits only, so those must differ.
    seeds = [step_generator(0, "image", k).initial_seed() for k in (0, 1, 2, 10**6, 2**32 - 1)]
    assert [(seed - seeds[0]) % 2**32 for seed in seeds] == [0, 1, 2, 10**6, 2**32 - 1]


def test_draws_are_the_same_on_every_machine_and_in_every_process():
    assert step_generator(0, "image", 5).initial_seed() == 14599848757542540231


@pytest.mark.parametrize("ids", [(), (3, "image")])
def test_ids_end_with_a_number(ids):
    with pytest.raises(ValueError, match="must end with a number"):
        step_generator(0, *ids)


def kept(seed):
    """The bits that a generator of a CPU makes of a seed."""
    return seed % 2**32


def test_a_generator_keeps_32_bits_of_its_seed():
    draws = [torch.rand(3, generator=torch.Generator().manual_seed(s)) for s in (5, 5 + 2**32)]
    assert torch.equal(*draws)


def test_numbers_under_one_key_are_distinct_also_where_they_pass_the_end():
    seeds = {kept(numbered_seed("a", number)) for number in range(10_000)}
    assert len(seeds) == 10_000
    assert len({kept(numbered_seed("a", number)) for number in (0, 2**31, 2**32 - 1)}) == 3


def test_keys_have_numbers_of_their_own():
    assert kept(numbered_seed("a", 0)) != kept(numbered_seed("b", 0))


@pytest.mark.slow
def test_all_draws_of_a_run_over_many_images_are_distinct():
    # Of 100,000 hashes of 32 bits two are equal more often than not.
    seeds = np.array(
        [
            kept(data_seed(purpose, 50, number))
            for purpose in get_args(DataPurpose)
            for number in range(25_000)
        ]
    )
    assert len(np.unique(seeds)) == len(seeds)


def test_another_seed_gives_another_order():
    assert kept(data_seed("order", 0, 0)) != kept(data_seed("order", 1, 0))


def test_k_is_drawn_from_the_distribution_and_again_after_a_resume():
    run = tiny64_gr()
    draws = [draw_num_kept(run.kept, run.train.seed, step) for step in range(2000)]
    assert draws == [draw_num_kept(run.kept, run.train.seed, step) for step in range(2000)]
    share = draws.count(144) / len(draws)
    assert share == pytest.approx(run.kept.probabilities[1], abs=0.03)
    assert set(draws) == set(run.kept.candidates)


@pytest.mark.parametrize("num_rows", [1, 3, 10])
def test_even_numbers_have_equal_distances_and_are_cut_to_the_rows(num_rows):
    found = []
    for step in range(200):
        numbers = BatchNumbers(seed=1, step=step, num_rows=num_rows, rows=slice(None))
        whole = numbers.even("here")
        spaced = whole.sort().values - whole.min()
        torch.testing.assert_close(spaced, torch.arange(num_rows) / num_rows)
        assert 0 <= whole.min() < 1 / num_rows
        parts = [replace(numbers, rows=slice(row, row + 1)).even("here") for row in range(num_rows)]
        assert torch.equal(torch.cat(parts), whole)
        # As many as 35 % of the rows, rounded up or down.
        assert int((whole < 0.35).sum()) in {int(0.35 * num_rows), int(0.35 * num_rows) + 1}
        found.append(whole[0].item())
    # One row by itself is uniform: five standard deviations of 200 draws.
    assert sum(found) / len(found) == pytest.approx(0.5, abs=5 * 0.29 / 200**0.5)
