"""Seeds: distinct numbers by construction, in the 32 bits that torch's generator keeps."""

from typing import get_args

import numpy as np
import torch

from mergevq.seeds import DataPurpose, data_seed, numbered_seed


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
