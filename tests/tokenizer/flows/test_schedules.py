"""Tokens that are seen at each time, by hand; and what that makes of images."""

from dataclasses import replace

import pytest
import torch

from mergevq.config.parts import PrefixFlow
from mergevq.config.parts.flows import Always, Groups, Knots, Solution, check_solution
from mergevq.data.layouts import Ordered
from mergevq.nn.flow import shift_time, time_grid
from mergevq.tokenizer.flows.decoder import FlowDecoder, Noise
from mergevq.tokenizer.flows.schedules import count_at, group_at, num_readable, visible
from mergevq.tokenizer.flows.tokens import Shown
from tests.support.flows import CODE_DIM, GRID, flow_config, network_of, shown_of

EIGHT = torch.arange(8).expand(1, -1)


def decoder_of(schedule, num_token_layers=0):
    return PrefixFlow(
        patch_size=2,
        dim=16,
        num_layers=2,
        num_heads=2,
        lengths="all",
        schedule=schedule,
        num_token_layers=num_token_layers,
    )


def all_shown(num_tokens=8):
    codes = torch.randn(2, 8, CODE_DIM, generator=torch.Generator().manual_seed(2))
    return Shown(codes[:, :num_tokens], Ordered(num_tokens), GRID)


def test_groups_by_hand():
    data_times = torch.tensor([0.0, 0.0624, 0.0625, 0.5, 0.8124, 0.8125, 1.0])
    assert group_at(1 - data_times.double(), 8).tolist() == [0, 0, 1, 4, 6, 7, 7]


def test_counts_of_the_table_at_its_knots_and_monotone_between():
    knots = torch.linspace(0, 1, 6)
    assert count_at(knots, Knots(), 512).tolist() == [1, 193, 377, 449, 497, 512]
    counts = count_at(torch.linspace(0, 1, 1001), Knots(), 64)
    assert (counts.diff() >= 0).all()
    assert counts[[0, -1]].tolist() == [1, 64]
    falling = count_at(torch.linspace(0, 1, 1001), Knots(shares=(1.0, 0.0)), 64)
    assert (falling.diff() <= 0).all()
    assert falling[[0, -1]].tolist() == [64, 1]


def test_what_is_seen_by_hand():
    times = torch.tensor([1.0, 0.4, 0.0])
    ranks = EIGHT.expand(3, -1)
    assert visible(Always(), ranks, times) is None
    current = visible(Groups(num_groups=4), ranks, times)
    assert [row.nonzero().flatten().tolist() for row in current] == [[0, 1], [4, 5], [6, 7]]
    opened = visible(Groups(num_groups=4, current_only=False), ranks, times)
    assert opened.sum(1).tolist() == [2, 6, 8]
    assert visible(Knots(shares=(0.0, 1.0)), ranks, times).sum(1).tolist() == [8, 3, 1]


@pytest.mark.parametrize("num_steps", [3, 4, 7, 16])
@pytest.mark.parametrize("solver", ["euler", "sde"])
def test_no_group_is_left_out_by_as_many_steps_as_are_asked_for(num_steps, solver):
    decoder = decoder_of(Groups(num_groups=3))
    solution = Solution(num_steps=num_steps, solver=solver)
    if (num_steps, solver) == (3, "sde"):
        with pytest.raises(ValueError, match=r"num_steps \(3\) must be at least 4 with solver sde"):
            check_solution(decoder, solution)
        return
    check_solution(decoder, solution)
    times = torch.tensor(time_grid(num_steps, solver)[:-1])
    assert set(group_at(times, 3).tolist()) == {0, 1, 2}


@pytest.mark.parametrize("num_token_layers", [0, 1])
def test_a_step_sees_its_group_and_those_before_through_the_layers_among_tokens(num_token_layers):
    network = network_of(
        flow_config(decoder=decoder_of(Groups(num_groups=4), num_token_layers), num_steps=4)
    )
    x, time = torch.randn(2, 3, 16, 16), torch.full((2,), 0.5)
    shown = all_shown()
    velocity = network(x, time, shown)
    changed = {}
    for group in range(4):
        codes = shown.codes.clone()
        codes[:, 2 * group] += 1
        changed[group] = not torch.equal(network(x, time, shown._replace(codes=codes)), velocity)
    # At this time group 2 is read.
    before = num_token_layers > 0
    assert changed == {0: before, 1: before, 2: True, 3: False}


def test_the_time_of_the_schedule_is_without_the_shift():
    plain = flow_config(decoder=decoder_of(Knots()))
    shifted = replace(plain, times=replace(plain.times, shift=3.0))
    network, other = network_of(plain), network_of(shifted)
    time = torch.tensor([0.31, 0.71])
    x, shown = torch.randn(2, 3, 16, 16), all_shown()
    counts = []
    for flow, at in ((network.flow, time), (other.flow, shift_time(time, 3.0))):
        seen = []
        reader = flow.reader
        handle = reader.seen
        reader.seen = lambda e, v, handle=handle, seen=seen: seen.append(v) or handle(e, v)
        flow(x, at, flow.read(shown))
        counts.append(seen[0].sum(1).tolist())
    assert counts[0] == counts[1] == count_at(time, Knots(), 8).tolist()


def test_a_preview_by_all_tokens_is_the_image_and_one_by_fewer_needs_no_others():
    config = flow_config(decoder=decoder_of(Groups(num_groups=4), 1), num_steps=5)
    decoder, shown = FlowDecoder(network_of(config)), all_shown()
    noise = Noise(1, [3, 4])
    image = decoder.decode(shown.codes, shown.layout, GRID, noise)
    assert torch.equal(decoder.preview(shown.codes, GRID, noise), image)
    # Times 1, .8, .6 read groups 0, 1 and 2; of five tokens two groups are whole.
    assert num_readable(Groups(num_groups=4), [1.0, 0.8, 0.6, 0.4, 0.2], 5, 8) == 2
    early = decoder.preview(shown.codes[:, :5], GRID, noise)
    assert torch.equal(decoder.preview(shown.codes[:, :4], GRID, noise), early)
    assert not torch.equal(early, image)
    cut = decoder.decode(shown.codes, shown.layout, GRID, noise, num_steps=2)
    assert torch.equal(cut, early)


def test_previews_that_cannot_be_are_refused():
    grouped = FlowDecoder(network_of(flow_config(decoder=decoder_of(Groups(num_groups=2)))))
    with pytest.raises(ValueError, match=r"tokens \(3\) must be all of the first of 2 groups of 8"):
        grouped.preview(all_shown().codes[:, :3], GRID)
    other = FlowDecoder(network_of(flow_config()))
    with pytest.raises(ValueError, match="a preview needs ordered tokens"):
        other.preview(shown_of("ordered").codes, GRID)
    with pytest.raises(ValueError, match="must be at least two, rising or falling"):
        Knots(shares=(0.0, 1.0, 0.5))
