"""The head that predicts bits block by block, each from the blocks before it."""

import itertools
import math
from dataclasses import replace

import pytest
import torch

from mergevq.config.generator import (
    OneByOne,
    SamplingSettings,
    check_sampling,
)
from mergevq.config.parts.heads import (
    Bits,
)
from mergevq.config.parts.orders import (
    Anchored,
    Masked,
    Merge,
    Random,
    Raster,
    Stream,
)
from mergevq.generator.build import build_generator
from mergevq.generator.heads.bits import block_starts, gumbel, surest
from mergevq.generator.sampling import sample
from mergevq.generator.seams import Sequences
from tests.support.generators import TINY, numbers_for, tiny_batch, tiny_generator

STRINGS = torch.tensor(list(itertools.product(range(2), repeat=3)))
PLAIN = SamplingSettings()
SCHEDULES = [(3,), (1, 2), (1, 1, 1)]


def bits_network(schedule, order=None, **changes):
    """Three bits of a token, and random weights everywhere."""
    return bits_generator(schedule, order, **changes).network


def bits_generator(schedule, order=None, **changes):
    """A generator with such a network."""
    head = Bits(sizes=(2,) * sum(schedule), schedule=schedule, num_layers=2, **changes)
    config = replace(TINY, head=head, order=order or Raster())
    model = build_generator(config).eval()
    numbers = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.network.parameters():
            noise = torch.randn(parameter.shape, generator=numbers)
            parameter.copy_(noise * 0.3 + (parameter == 1))
    return model


def log_probs(network, states, parts):
    """Log-probability of each token, by the definition: a sum over its parts."""
    logits = network.head(states.expand(len(parts), -1), parts, network.embed_part)
    return sum(
        part.detach().log_softmax(-1).gather(1, parts[:, number, None])[:, 0]
        for number, part in enumerate(logits)
    )


def state(rows=1):
    return torch.randn(rows, TINY.dim, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("width", [None, 20])
def test_probabilities_of_all_tokens_sum_to_one(schedule, width):
    network = bits_network(schedule, width=width)
    found = log_probs(network, state(), STRINGS)
    assert found.exp().sum().item() == pytest.approx(1, abs=1e-6)
    # Not because all are alike.
    assert found.std() > 0.1


@pytest.mark.parametrize(
    ("order", "starts"),
    [
        (Raster(), (0, 1)),
        # The cell at which a token opens first; relation and group, and that for each cell.
        (Anchored(), (0, 1, 2)),
        (Stream(tokens_per_step=2), (0, 1, 2, 3, 5, 6, 7, 8)),
    ],
)
def test_a_part_depends_on_earlier_blocks_alone(order, starts, generator):
    network = bits_network((1, 2), order)
    sizes, head = network.config.part_sizes, network.config.head
    assert block_starts(network.config, head) == starts
    parts = torch.stack([torch.randint(size, (3,), generator=generator) for size in sizes], -1)
    before = network.head(state(3), parts, network.embed_part)
    ends = (*starts[1:], len(sizes))
    for changed, size in enumerate(sizes):
        other = parts.clone()
        other[:, changed] = (other[:, changed] + 1) % size
        after = network.head(state(3), other, network.embed_part)
        end = next(end for end in ends if end > changed)
        assert all(map(torch.equal, before[:end], after[:end]))
        assert not any(map(torch.equal, before[end:], after[end:]))


def test_one_block_is_independent_parts_and_the_first_block_of_any_schedule():
    one, three = bits_network((3,)), bits_network((1, 1, 1))
    three.load_state_dict(one.state_dict())
    states = state().expand(8, -1)
    logits = one.head(states, STRINGS, one.embed_part)
    # No part depends on another: each has the same probabilities whatever they are.
    assert all(torch.equal(part, part[:1].expand_as(part)) for part in logits)
    first = three.head(states, STRINGS, three.embed_part)[0]
    torch.testing.assert_close(first, logits[0])
    assert log_probs(three, state(), STRINGS).sub(log_probs(one, state(), STRINGS)).std() > 0.1


def set_by_hand(network, *, both):
    """P(a=1) = .6, P(b=1) = .9 after a=1 and .2 after a=0; .62 where both are of one block."""
    with torch.no_grad():
        for weight in network.parameters():
            weight.zero_()
        for name, weight in network.named_parameters():
            if "norm" in name:
                weight.fill_(1)
        # Inputs are the axes: 0 with nothing known, 1 after a = 0, 2 after a = 1.
        network.head.inputs[0].weight.copy_(torch.eye(TINY.dim))
        network.head.masks.weight[0, 0] = 1
        network.part_embeddings[0].weight[0, 1] = 1
        network.part_embeddings[0].weight[1, 2] = 1
        length = math.sqrt(TINY.dim)
        network.head.outputs[0].weight[1, 0] = math.log(0.6 / 0.4) / length
        if both:
            network.head.outputs[1].weight[1, 0] = math.log(0.62 / 0.38) / length
        network.head.outputs[1].weight[1, 1] = math.log(0.2 / 0.8) / length
        network.head.outputs[1].weight[1, 2] = math.log(0.9 / 0.1) / length


def test_two_bits_by_hand_cost_their_mutual_information_more_at_once():
    pairs = torch.tensor(list(itertools.product(range(2), repeat=2)))
    found = []
    for schedule in ((1, 1), (2,)):
        network = bits_network(schedule)
        set_by_hand(network, both=len(schedule) == 1)
        found.append(-log_probs(network, state(), pairs))
    in_turn, at_once = found
    assert in_turn[3].item() == pytest.approx(0.6162, abs=2e-4)
    assert at_once[3].item() == pytest.approx(0.9889, abs=2e-4)
    gap = ((-in_turn).exp() * (at_once - in_turn)).sum()
    assert gap.item() == pytest.approx(0.2689, abs=2e-4)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_choosing_follows_the_joint_distribution(schedule):
    network, count = bits_network(schedule), 20_000
    expected = count * log_probs(network, state(), STRINGS).exp()
    uniforms = torch.rand(count, 3, generator=torch.Generator().manual_seed(2))
    chosen = network.choose(state().expand(count, -1), uniforms, 1.0, PLAIN, scored=True)
    observed = torch.bincount(chosen.parts @ torch.tensor([4, 2, 1]), minlength=8)
    # 24.3 is exceeded by one in a thousand, with 7 degrees of freedom.
    assert ((observed - expected).square() / expected).sum() < 24.3
    torch.testing.assert_close(
        chosen.log_prob[:50], log_probs(network, state(), chosen.parts[:50]), rtol=0, atol=1e-4
    )


def test_guided_branches_see_the_same_bits(generator):
    network = bits_network((1, 2))
    states = torch.randn(6, TINY.dim, generator=generator)
    chosen = network.choose(states, torch.zeros(3, 3), 2.0, SamplingSettings(temperature=0.0))
    logits = network.head(states, chosen.parts.repeat(2, 1), network.embed_part)
    for part, found in zip(logits, chosen.parts.unbind(-1), strict=True):
        assert torch.equal(found, (part[3:] + 2 * (part[:3] - part[3:])).argmax(-1))


@pytest.mark.parametrize(
    ("num_bits", "sizes"), [(2, (1, 1)), (4, (1, 1, 1, 1)), (8, (2, 2, 2, 2)), (18, (4, 4, 5, 5))]
)
def test_without_a_schedule_blocks_are_even(num_bits, sizes):
    assert Bits(sizes=(2,) * num_bits).block_sizes == sizes


@pytest.mark.parametrize("order", [Raster(), Anchored(), Stream(tokens_per_step=2)])
def test_random_masks_hide_a_block_and_all_after_it_or_random_bits(order, generator):
    count, head = 4000, bits_network((1, 2), order, masking="mixed").head
    starts, per_cell = head.starts, head.per_cell
    uniforms = torch.rand(count, head.num_uniforms, generator=generator)
    masks = head.draw_masks(uniforms)
    assert masks.any(-1).all()
    places = torch.arange(masks.shape[1])
    first = masks.int().argmax(-1)
    is_suffix = (masks == (places >= first[:, None])).all(-1)
    by_schedule = uniforms[:, 1] < 0.5
    assert is_suffix[by_schedule].all()
    shares = torch.bincount(first[by_schedule], minlength=masks.shape[1]) / by_schedule.sum()
    for place, share in enumerate(shares.tolist()):
        assert share == pytest.approx((place in starts) / len(starts), abs=0.05)
    # Three bits of a cell: an order's parts are never masked where one of its bits is visible.
    assert not is_suffix[~by_schedule].all()
    for start in range(0, masks.shape[1], per_cell):
        named, bits = masks[:, start : start + per_cell].split((per_cell - 3, 3), dim=-1)
        assert bits[named.any(-1)].all()
        later = masks[:, start + per_cell :]
        assert later[bits.any(-1)].all()


def test_random_bits_are_any_of_a_number_near_half(generator):
    head = bits_network((1, 2), masking="mixed").head
    uniforms = torch.rand(4000, head.num_uniforms, generator=generator)
    uniforms[:, 1] = 0.75
    masks = head.draw_masks(uniforms)
    # Of 3 bits round(3 m), at least 1: m is above 1/2 in half of the tokens, and above 5/6 where a
    # normal number is above 2.01 = ln(5) / 0.8.
    shares = torch.bincount(masks.sum(-1), minlength=4) / len(masks)
    assert shares.tolist() == pytest.approx([0, 0.5, 0.478, 0.022], abs=0.03)
    means = masks.float().mean(0)
    torch.testing.assert_close(means, means.mean().expand(3), rtol=0, atol=0.03)


def test_masked_as_the_schedule_does_the_logits_are_those_of_the_block():
    network = bits_network((1, 2), masking="mixed")
    states = state().expand(8, -1)
    exact = network.head(states, STRINGS, network.embed_part)
    for block, start in enumerate(network.head.starts):
        uniforms = torch.full((8, network.head.num_uniforms), 0.25)
        uniforms[:, 0] = (block + 0.5) / 2
        found = network.head.masked(states, STRINGS, network.embed_part, uniforms)
        expected = [1.0 if part >= start else 0.1 for part in range(3)]
        torch.testing.assert_close(found.weights, torch.tensor([expected] * 8))
        for part in range(start, 1 if block == 0 else 3):
            torch.testing.assert_close(found.logits[part], exact[part])


def test_masks_weigh_the_loss_and_evaluation_is_exact():
    model = tiny_generator("raster", head=Bits(sizes=(2, 2, 2), masking="mixed"), dropout=0.0)
    given = tiny_batch("raster", config=model.config)
    drawn = model.draw(given, numbers_for(given))
    assert drawn.masking is None
    nll = -model.log_likelihood(given).mean() / model.config.num_tokens
    torch.testing.assert_close(model(drawn).nll, nll.detach())
    drawn = model.train().draw(given, numbers_for(given))
    assert drawn.masking.shape == (4, model.config.num_tokens, 6)
    layout = model.layout(drawn)
    states = model.network.transform(layout.inputs, model.network.turns(layout.positions))
    found = model.network.masked(states[:, layout.reads], layout.parts, drawn.masking)
    for number, logits in enumerate(found.logits):
        target, weight = layout.targets[..., number], found.weights[..., number].flatten()
        cost = torch.nn.functional.cross_entropy(
            logits.flatten(0, 1), target.flatten(), reduction="none", label_smoothing=0.1
        )
        expected = (cost * weight).sum() / weight.sum()
        torch.testing.assert_close(model(drawn).parts[number], expected)


def test_a_head_that_masks_nothing_is_not_asked_for_masks():
    network = tiny_generator("raster").network
    assert network.num_uniforms == 0
    with pytest.raises(TypeError, match=r"head \(subindices\) must be one that masks parts"):
        network.masked(state()[None], torch.zeros(1, 1, 2).long(), torch.zeros(1, 1, 3))


def by_confidence(network, condition, numbers, *, temperature=1.0, scale=None):
    """Bits of one token by the definition: a slow loop over passes and bits."""
    head, sizes = network.head, network.head.block_sizes
    num_bits, known = sum(sizes), {}
    numbers = iter(numbers.tolist())
    for block in range(len(sizes)):
        share = 1 - block / len(sizes)
        masked = [bit for bit in range(num_bits) if bit not in known]
        inputs = sum(
            network.embed_part(bit, torch.tensor(known[bit]))
            if bit in known
            else head.masks.weight[bit]
            for bit in range(num_bits)
        )
        found = head._predict(
            inputs.expand(len(condition), 1, -1), condition[:, None], torch.tensor([len(known)])
        )[:, 0]
        fresh, confidence = {}, {}
        values, noise = ([next(numbers) for _ in range(num_bits)] for _ in range(2))
        for bit in masked:
            logits = head.outputs[bit](found).float()
            logits = logits[0] if scale is None else logits[1] + scale * (logits[0] - logits[1])
            one = (logits / (temperature * share)).softmax(-1)[0].item()
            fresh[bit] = int(values[bit] >= one)
            gumbel = -math.log(-math.log(noise[bit]))
            log_prob = logits.log_softmax(-1)[fresh[bit]].item()
            confidence[bit] = log_prob + temperature * share * gumbel
        best = sorted(masked, key=lambda bit: -confidence[bit])[
            : sum(sizes[: block + 1]) - len(known)
        ]
        known |= {bit: fresh[bit] for bit in best}
    return [known[bit] for bit in range(num_bits)]


SUREST = SamplingSettings(bits_order="confidence")


@pytest.mark.parametrize("schedule", [(4,), (1, 3), (2, 1, 1), (1, 1, 1, 1)])
@pytest.mark.parametrize(("temperature", "scale"), [(1.0, None), (2.5, None), (0.8, 3.0)])
@torch.no_grad()
def test_bits_by_confidence_are_those_of_the_definition(schedule, temperature, scale):
    network = bits_network(schedule)
    rows = 12
    numbers = torch.rand(rows, 2 * 4 * len(schedule), generator=torch.Generator().manual_seed(4))
    states = state(rows if scale is None else 2 * rows)
    settings = replace(SUREST, temperature=temperature)
    found = network.choose(states, numbers, scale or 1.0, settings).parts
    for row in range(rows):
        own = states[row::rows]
        expected = by_confidence(network, own, numbers[row], temperature=temperature, scale=scale)
        assert found[row].tolist() == expected


@torch.no_grad()
def test_one_pass_by_confidence_is_independent_bits():
    network = bits_network((3,))
    numbers = torch.rand(50, 6, generator=torch.Generator().manual_seed(4))
    surest = network.choose(state(50), numbers, 1.0, SUREST).parts
    assert torch.equal(surest, network.choose(state(50), numbers[:, :3], 1.0, PLAIN).parts)


def test_the_surest_bits_stay_with_those_that_are_visible():
    confidence = torch.tensor([[-0.3, -0.1, -0.2, -0.9], [-1.0, -1.0, -1.0, -1.0]])
    visible = torch.tensor([[False, False, False, True], [False] * 4])
    kept = surest(confidence, visible, 2)
    assert kept.tolist() == [[False, True, False, True], [True, True, False, False]]
    assert surest(confidence, visible, 4).all()


def test_gumbel_noise_is_that_of_its_distribution_function():
    values = torch.tensor([0.1, 0.5, 0.9])
    torch.testing.assert_close((-(-gumbel(values)).exp()).exp(), values)
    assert gumbel(torch.tensor(0.0)).isfinite()


@pytest.mark.parametrize(
    "order",
    [
        Raster(),
        *(
            pytest.param(order, marks=pytest.mark.slow)
            for order in (Anchored(), Anchored(gap_in_bits=True), Stream(tokens_per_step=2))
        ),
    ],
)
def test_samples_by_confidence_obey_the_order_and_depend_on_their_numbers_alone(order):
    model = bits_generator((1, 2, 2), order)
    labels = torch.tensor([0, 1, 2])

    def sampled(ids, **changes):
        return sample(
            model,
            labels=labels[ids],
            num_kept=5,
            seed=3,
            image_ids=ids,
            settings=replace(SUREST, guidance_scale=2.0, **changes),
        )

    found = sampled([0, 1, 2])
    given = Sequences(found.indices, labels, 5, found.anchors, found.source_index)
    assert model.log_likelihood(given).isfinite().all()
    for number in range(3):
        assert torch.equal(sampled([number]).indices[0], found.indices[number])
    assert not torch.equal(sampled([0, 1, 2], bits_order="schedule").indices, found.indices)
    numbers = model.draws(3, [0], 5, SUREST).uniforms
    cells = order.tokens_per_step
    others = len(model.config.part_names) - 5 * cells
    assert numbers.shape[2] == others + cells * 2 * 5 * 3
    assert torch.equal(numbers, model.draws(3, [0], 5, SUREST).uniforms)


def test_what_has_no_likelihood_is_refused():
    model = bits_generator((1, 2, 2))
    with pytest.raises(ValueError, match=r"bits_order \(confidence\) .* probability"):
        model.network.choose(state(), torch.rand(1, 40), 1.0, SUREST, scored=True)
    with pytest.raises(ValueError, match=r"candidates \(2\) must be 1 with bits_order"):
        check_sampling(model.config, replace(SUREST, candidates=2))
    for order, words in (
        (Masked(), "several tokens"),
        (Random(), "several tokens"),
        (Merge(), "K"),
    ):
        with pytest.raises(ValueError, match=rf"bits_order \(confidence\) must be .*{words}"):
            check_sampling(replace(model.config, order=order), SUREST)
    free = replace(SUREST, passes=OneByOne(budget=False))
    check_sampling(replace(model.config, order=Merge()), free)
    with pytest.raises(ValueError, match="'schedule' with head 'subindices'"):
        check_sampling(TINY, SUREST)
