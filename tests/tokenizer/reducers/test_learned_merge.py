"""Tests of `mergevq.tokenizer.reducers.learned_merge`."""

import copy
import math
from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from mergevq.config.parts import LearnedMerge as Settings
from mergevq.config.parts import Merge as MergeSettings
from mergevq.config.recipes.digits import digits32_learned_merge
from mergevq.nn.blocks import Attention
from mergevq.tokenizer.reducers.learned_merge import (
    LearnedMerge,
    _gates,
    attend_present,
    candidate_numbers,
    keep_probability,
    mean_number,
    products,
    rounded_mean,
)
from mergevq.tokenizer.reducers.matching import legal_schedule, merge_schedule, merging_order
from mergevq.tokenizer.reducers.merge import Merge, MergeState
from mergevq.tokenizer.tokenizer import Tokenizer
from tests.support.reads import host_reads
from tests.support.small import shrink

SMALL = Settings(num_layers=3, num_candidates=8, num_heads=2, layer_scale=0.5)
CLASS = torch.zeros(2, 1, 8)


def reducer(settings=SMALL):
    torch.manual_seed(0)
    return LearnedMerge(settings, 8)


def grid(num_tokens=64):
    return torch.randn(2, num_tokens, 8, generator=torch.Generator().manual_seed(1))


def with_numbers(made, *places):
    """The reducer with all probability on one candidate of each block but the last."""
    with torch.no_grad():
        for logits, place in zip(made.logits, places, strict=True):
            logits.copy_(torch.eye(len(logits))[place] * 200)
    return made


def test_the_mean_and_the_probabilities_of_four_numbers_by_hand():
    logits = torch.zeros(4, requires_grad=True)
    assert candidate_numbers(4, 4) == [4, 3, 2, 1]
    mean = mean_number(logits, 4)
    assert mean == 2.5
    (gradient,) = torch.autograd.grad(mean, logits)
    assert gradient.tolist() == [0.375, 0.125, -0.125, -0.375]
    assert keep_probability(logits, 4).tolist() == [1.0, 0.75, 0.5, 0.25]
    made = reducer(replace(SMALL, num_layers=2, num_candidates=4))
    assert made._wanted(4) == [3]
    # Of nine tokens the steps are rounded up; the last is never none.
    assert candidate_numbers(4, 9) == [9, 7, 5, 3]


def test_a_mean_that_is_whole_is_not_rounded_up():
    # A fifth each is a hair more than that of 1.
    assert math.fsum(0.2 * number for number in candidate_numbers(5, 5)) >= 3
    for number in range(1, 40):
        whole = [0.1 * (place % 7) for place in range(number)]
        assert rounded_mean([*whole, *whole[::-1]], 2 * number) == number + 1
        assert rounded_mean([*whole, 0.77, *whole[::-1]], 2 * number + 1) == number + 1
        assert rounded_mean([0.3] * (2 * number + 1), 2 * number + 1) == number + 1
    assert rounded_mean([3.0, -1e30], 9) == 9
    assert rounded_mean([0.0, 0.0, 0.0, 0.0], 4) == 3


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(("places", "num_kept"), [((0, 3), 24), ((2, 4), 20), ((3, 0), 40)])
def test_all_probability_on_one_number_is_merging_with_that_number(training, places, num_kept):
    made = with_numbers(reducer(), *places).train(training)
    fixed = copy.deepcopy(made.blocks)
    x = torch.cat([CLASS, grid()], dim=1)
    state = MergeState(index=torch.arange(64).expand(2, -1), sizes=None)
    counts = made.schedule(64, num_kept)
    numbers = candidate_numbers(8, 64)
    wanted = [numbers[places[0]], min(numbers[place] for place in places), num_kept]
    assert [64 - sum(counts[: n + 1]) for n in range(3)] == wanted
    with torch.no_grad():
        for block, count in zip(fixed, counts, strict=True):
            x, state = block(x, state, count)
        found = made(grid(), CLASS, (8, 8), num_kept)
    assert found.layout.num_kept == num_kept
    torch.testing.assert_close(found.class_token, x[:, 0], rtol=0, atol=1e-6)
    # In another order, so as sets.
    torch.testing.assert_close(
        found.tokens.sort(1).values, x[:, 1:].sort(1).values, rtol=0, atol=1e-6
    )
    assert (found.losses is not None) == training


def test_training_has_the_tokens_of_validation():
    made = reducer()
    for num_kept in (8, 20, 64):
        with torch.no_grad():
            trained = made.train()(grid(), CLASS, (8, 8), num_kept)
            fixed = made.eval()(grid(), CLASS, (8, 8), num_kept)
        assert torch.equal(trained.layout.index, fixed.layout.index)
        torch.testing.assert_close(trained.tokens, fixed.tokens, rtol=0, atol=1e-6)


@pytest.mark.parametrize(("num_layers", "num_reads"), [(3, 1), (1, 0)])
@pytest.mark.parametrize("training", [True, False])
def test_a_pass_reads_the_schedule_once(training, num_layers, num_reads):
    made = reducer(replace(SMALL, num_layers=num_layers)).train(training)
    with host_reads() as reads:
        made(grid(), CLASS, (8, 8), 40)
    assert reads == ["tolist"] * num_reads


def test_the_numbers_of_a_fixed_schedule_give_what_merging_gives():
    linear = merge_schedule(64, 16, 3)
    settings = MergeSettings(num_layers=3, num_heads=2, layer_scale=0.5)
    torch.manual_seed(0)
    fixed = Merge(settings, 8)
    made = reducer(replace(SMALL, num_candidates=64))
    made = with_numbers(made, linear[0], linear[0] + linear[1]).eval()
    made.blocks.load_state_dict(fixed.blocks.state_dict())
    assert made.schedule(64, 16) == linear
    found, expected = (each(grid(), CLASS, (8, 8), 16) for each in (made, fixed))
    assert torch.equal(found.tokens, expected.tokens)
    assert torch.equal(found.layout.index, expected.layout.index)


def test_schedules_are_legal_whatever_is_wanted():
    for wanted in ([1, 1, 9], [64, 64, 9], [20, 40, 9], [40, 12, 9]):
        counts = legal_schedule(wanted, 64, 9)
        assert sum(counts) == 55
        present = 64
        for count in counts:
            assert 0 <= count <= present // 2
            present -= count
    assert legal_schedule([40, 20, 12], 64, 12) == [24, 20, 8]
    with pytest.raises(ValueError, match=r"num_kept \(7\) must be at least 8"):
        legal_schedule([8, 8, 8], 64, 7)


def test_absent_tokens_are_not_attended_to_and_see_what_is_there():
    torch.manual_seed(0)
    attn, x = Attention(8, 2).requires_grad_(requires_grad=False), torch.randn(2, 6, 8) * 3
    sizes = torch.tensor([[1.0, 2, 3, 1, 1, 4]]).expand(2, -1)
    present = torch.tensor([[1.0, 1, 0, 1, 0, 1]]).expand(2, -1)
    there = [0, 1, 3, 5]
    found = attend_present(attn, x, sizes, present)
    plain = attn(x[:, there], sizes[:, there])
    torch.testing.assert_close(found.tokens[:, there], plain.tokens, rtol=0, atol=1e-5)
    torch.testing.assert_close(found.keys[:, there], plain.keys, rtol=0, atol=1e-6)
    changed = x.clone()
    changed[:, [2, 4]] += 100
    again = attend_present(attn, changed, sizes, present)
    torch.testing.assert_close(again.tokens[:, there], plain.tokens, rtol=0, atol=1e-5)
    assert again.tokens.isfinite().all()
    own = [0, 1, 2, 3, 5]
    seen = attn(x[:, own], sizes[:, own]).tokens[:, 2]
    torch.testing.assert_close(found.tokens[:, 2], seen, rtol=0, atol=1e-5)


def test_the_gradient_of_a_gate_is_that_of_the_attention():
    """By finite differences of the weight of one token that is there and one that is not."""
    torch.manual_seed(0)
    attn = Attention(8, 2).double().requires_grad_(requires_grad=False)
    x = torch.randn(1, 5, 8, dtype=torch.float64)
    sizes = torch.ones(1, 5, dtype=torch.float64)
    present = torch.tensor([[1.0, 1, 0, 1, 1]], dtype=torch.float64, requires_grad=True)

    def value(gates):
        return attend_present(attn, x, sizes, gates).tokens[:, 0].square().sum()

    (gradient,) = torch.autograd.grad(value(present), present)
    for place in (2, 3):
        step = torch.zeros(1, 5, dtype=torch.float64)
        step[0, place] = 1e-4
        with torch.no_grad():
            slope = float(value(present + step) - value(present)) / 1e-4
        assert slope == pytest.approx(float(gradient[0, place]), rel=2e-2)


def test_the_loss_counts_each_block_and_has_gradients_where_its_number_is_free():
    made = with_numbers(reducer(replace(SMALL, num_layers=4)), 4, 0, 6)
    linear = [64 - sum(merge_schedule(64, 12, 4)[: n + 1]) for n in range(4)]
    with torch.no_grad():
        # Not all on one number, where a softmax has no slope.
        for logits in made.logits:
            logits.mul_(5 / 200)
    counts = made.schedule(64, 12)
    wanted = [rounded_mean(logits.tolist(), 64) for logits in made.logits]
    remaining = [64 - sum(counts[: n + 1]) for n in range(4)]
    loss = made.cost_loss(64, counts, wanted, CLASS.device)
    free = [number == want for number, want in zip(remaining, wanted, strict=False)]
    assert free == [True, False, True]
    assert len(set(remaining)) == 3
    found = products(remaining, 64, 8) / products(linear, 64, 8)
    assert float(loss.detach()) == pytest.approx((found - 1) ** 2, rel=1e-4)
    loss.backward()
    assert [bool((logits.grad != 0).any()) for logits in made.logits] == free


def test_gates_have_the_gradient_of_the_rank():
    keys = torch.randn(2, 6, 4)
    chance = torch.rand(6, requires_grad=True)
    places = torch.tensor([[0, 2, 4, 5, 7, 8], [8, 7, 5, 4, 2, 0]])
    gates = _gates(keys, places, 2, chance, 10)
    order = merging_order(keys)
    for row in range(2):
        for candidate in range(3):
            place, rank = int(places[row, 2 * candidate + 1]), 5 - int(order[row, candidate])
            assert float(gates[row, place + 1].detach()) == float(order[row, candidate] >= 2)
            (slope,) = torch.autograd.grad(gates[row, place + 1], chance, retain_graph=True)
            assert slope.tolist() == [float(rank == each) for each in range(6)]
    assert (gates == 1).sum() == 2 * (10 - 2)


def test_a_token_that_is_merged_later_is_kept_more_often():
    made = reducer(replace(SMALL, num_layers=2))
    found = made(grid(), CLASS, (8, 8), 32)
    found.class_token.square().sum().backward()
    assert made.logits[0].grad.abs().max() > 0
    keys = torch.randn(2, 9, 4)
    order = merging_order(keys)
    assert order.sort(-1).values.tolist() == [[0, 1, 2, 3]] * 2
    unit = torch.nn.functional.normalize(keys, dim=-1)
    nearest = (unit[:, 1::2] @ unit[:, ::2].mT).amax(-1)
    for row, places in zip(nearest, order, strict=True):
        assert row.argsort(descending=True).argsort().tolist() == places.tolist()


def test_products_are_those_that_torch_counts_and_those_of_each_two_tokens():
    settings = MergeSettings(num_layers=3, num_heads=2)
    made = Merge(settings, 8).eval()
    counts = merge_schedule(64, 16, 3)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        made(grid()[:1], CLASS[:1], (8, 8), 16)
    matching = sum(2 * (n // 2) * (n - n // 2) * 4 for n in (64, 64 - counts[0], 16 + counts[2]))
    # Torch leaves out the kernel of attention: a product of queries and keys, one with values.
    pairs = 2 * 8 * (65**2 + 41**2 + 25**2)
    assert [64 - sum(counts[: n + 1]) for n in range(3)] == [40, 24, 16]
    assert counter.get_total_flops() == 2 * (products([40, 24, 16], 64, 8) - pairs) + matching


@pytest.mark.parametrize("cost", [0.9, 1.1])
def test_the_loss_alone_leads_to_the_cost(cost):
    settings = Settings(num_layers=4, num_candidates=16, num_heads=2, cost=cost)
    made = reducer(settings)
    optimizer = torch.optim.Adam(made.logits.parameters(), lr=0.05)
    linear = merge_schedule(64, 12, 4)

    def share():
        counts = made.schedule(64, 12)
        totals = [
            products([64 - sum(each[: n + 1]) for n in range(4)], 64, 8)
            for each in (counts, linear)
        ]
        return totals[0] / totals[1]

    for _ in range(60):
        optimizer.zero_grad()
        loss = made.cost_loss(64, made.schedule(64, 12), made._wanted(64), CLASS.device)
        assert float(loss.detach()) == pytest.approx((share() - cost) ** 2, abs=1e-6)
        loss.backward()
        optimizer.step()
    assert abs(share() - cost) < 0.02


def test_the_loss_is_one_of_the_run_and_of_training_alone():
    run = shrink(digits32_learned_merge())
    assert run.own_weights["cost"] == 5.0
    torch.manual_seed(0)
    model = Tokenizer(run.model).train()
    image = torch.rand(2, 3, 32, 32) * 2 - 1
    assert "cost" in model(image, 16).losses
    assert model.eval().encode(image, 16).layout.num_kept == 16
    assert "cost" not in model(image, 16).losses
