"""Near tokens: uniform in a ball without its centre, or one level to either side."""

import itertools

import pytest
import torch

from mergevq.tokenizer.bits import indices_to_codes
from mergevq.tokenizer.near import ball_share, choose_bits, near_bits, near_level, radius_of


def test_the_ball_is_a_share_of_the_codebook():
    assert ball_share(4, 2) == 10 / 16
    assert ball_share(4, 4) == 15 / 16
    with pytest.raises(ValueError, match=r"radius \(5\) must be between 1 and the 4 bits"):
        ball_share(4, 5)


def test_radii_of_the_papers_hundred_near_codes():
    # 100 of 4,096 are 2.44 %; 1 of 8 bits differs in 3.1 % of the codes.
    assert [radius_of(num_bits, 100) for num_bits in (8, 12, 16, 18, 32)] == [1, 3, 4, 5, 10]
    # 64 of 4,096 are 1.56 %: 4,047 of 262,144 codes differ in up to 4 of 18 bits, 0.02 % fewer.
    assert [radius_of(18, count) for count in (63, 64)] == [4, 5]
    # No ball is that large: half of the codes of one bit is the other one.
    assert radius_of(1, 4095) == 1


@pytest.mark.parametrize("num_bits", [1, 2, 8, 12, 18, 32, 63])
@pytest.mark.parametrize("num_near", [1, 50, 100, 360, 4095])
def test_tokens_differ_in_up_to_the_radius(num_bits, num_near, generator):
    parts = torch.randint(2 ** (num_bits - 1), (4000, 1), generator=generator)
    uniforms = torch.rand(4000, num_bits + 1, generator=generator)
    near = near_bits(parts, num_bits, uniforms, torch.tensor(float(num_near)))
    found = (indices_to_codes((near ^ parts)[:, 0], num_bits) > 0).sum(-1)
    radius = radius_of(num_bits, num_near)
    assert 1 <= found.min() <= found.max() <= radius
    # Most of a ball is at its edge.
    assert found.max() >= min(radius, num_bits // 2)


def test_near_tokens_are_uniform_in_the_ball(generator):
    # Of 6 bits, 6 codes differ in one and 15 in two: of 64, 6 are less than 1,000 of 4,096.
    uniforms = torch.rand(42_000, 7, generator=generator)
    parts = torch.full((42_000, 1), 0b101001)
    near = near_bits(parts, 6, uniforms, torch.tensor(1000.0))
    counts = (near ^ parts)[:, 0].bincount(minlength=64)
    ball = [i for i in range(64) if i.bit_count() in {1, 2}]
    assert int(counts[ball].sum()) == 42_000
    # Five standard deviations of 2,000 draws are 220.
    assert counts[ball].tolist() == pytest.approx([2000] * 21, abs=220)


def test_the_ball_is_over_the_bits_of_all_parts(generator):
    uniforms = torch.rand(300, 9, generator=generator)
    parts = torch.randint(16, (300, 2), generator=generator)
    whole = parts[:, :1] + 16 * parts[:, 1:]
    near = near_bits(parts, 8, uniforms, torch.tensor(300.0))
    expected = near_bits(whole, 8, uniforms, torch.tensor(300.0))
    assert torch.equal(near[:, :1] + 16 * near[:, 1:], expected)


def test_bits_of_the_lowest_numbers_are_chosen():
    numbers = torch.tensor([[0.3, 0.1, 0.2], [0.3, 0.1, 0.2]])
    chosen = choose_bits(numbers, torch.tensor([1, 2]))
    assert chosen.tolist() == [[False, True, False], [False, True, True]]


def test_levels_move_by_one_and_are_reflected_at_the_ends():
    # A line of 4 levels: from 1 to 0 or 2, and from an end to the only neighbour.
    for level, expected in ((0, {1}), (1, {0, 2}), (2, {1, 3}), (3, {2})):
        parts = torch.full((2, 1), level)
        found = near_level(parts, torch.tensor([0.4, 0.6]), [4])
        assert set(found[:, 0].tolist()) == expected


def test_channels_and_directions_are_even():
    sizes = (4, 3, 5)
    parts = torch.ones(600, 3, dtype=torch.int64)
    near = near_level(parts, (torch.arange(600) + 0.5) / 600, sizes)
    moves, counts = (near - parts).unique(dim=0, return_counts=True)
    expected = [
        [step * (channel == moved) for channel in range(3)]
        for moved, step in itertools.product(range(3), (-1, 1))
    ]
    assert sorted(moves.tolist()) == sorted(expected)
    assert counts.tolist() == [100] * 6
