"""Raster order after random ones: permutations fall away, inputs have the cell of their target."""

import itertools
from dataclasses import replace

import pytest
import torch

from mergevq.config.generator import SamplingSettings
from mergevq.config.parts.orders import Raster
from mergevq.generator.seams import Sequences
from tests.support.generators import TINY, numbers_for, tiny_batch, tiny_generator

ANNEALED = Raster(annealing=(0.5, 0.75))
RASTER = torch.arange(TINY.num_tokens)


def annealed(**changes):
    """A generator of random weights that learns in random orders first."""
    return tiny_generator("raster", annealing=ANNEALED.annealing, **changes)


def orders(seed, rows=4):
    """A random order for each row."""
    numbers = torch.Generator().manual_seed(seed)
    return torch.rand(rows, TINY.num_tokens, generator=numbers).argsort(-1)


def test_the_share_of_random_orders_falls_from_one_to_zero():
    # 600 steps: all random up to 300, a line down to 450, raster for the last 150.
    shares = [ANNEALED.permuted_share(step / 600) for step in (0, 300, 375, 420, 450, 599)]
    assert shares == pytest.approx([1, 1, 0.5, 0.2, 0, 0])
    always, never = Raster(annealing=(1.0, 1.0)), Raster(annealing=(0.0, 0.0))
    assert [always.permuted_share(step / 600) for step in (0, 599)] == [1, 1]
    assert [never.permuted_share(step / 600) for step in (0, 599)] == [0, 0]
    assert Raster().permuted_share(0.0) == 0


@pytest.mark.parametrize(
    ("annealing", "message"),
    [
        ((0.75, 0.5), r"annealing \(0.75, 0.5\) must end after it begins"),
        ((0.5, 1.5), r"annealing \(0.5, 1.5\) must all be between 0 and 1"),
    ],
)
def test_impossible_annealing_is_named(annealing, message):
    with pytest.raises(ValueError, match=message):
        Raster(annealing=annealing)


def test_each_sequence_is_permuted_with_that_probability_and_in_training_alone():
    model, given = annealed(), tiny_batch("raster", batch=2000)
    assert model.draw(given, numbers_for(given)).slots is None
    model.train()
    for progress, share in ((0.0, 1), (0.5, 1), (0.625, 0.5), (0.7, 0.2), (0.75, 0), (1.0, 0)):
        slots = model.draw(given, replace(numbers_for(given), progress=progress)).slots
        assert torch.equal(slots.sort(-1).values, RASTER.expand_as(slots))
        is_permuted = (slots != RASTER).any(-1).float()
        # Four times the spread of a mean of 2,000.
        assert is_permuted.mean().item() == pytest.approx(share, abs=4 * (0.25 / 2000) ** 0.5)
        if share == 1:
            # Each cell is as often in each place: 2,000 / 12 times, four times the spread of that.
            first = slots[:, 0].bincount(minlength=TINY.num_tokens)
            assert (first - 2000 / 12).abs().max() < 4 * (2000 / 12) ** 0.5


def test_each_input_has_the_vector_of_the_cell_it_predicts_and_turns_by_its_own():
    model, given = annealed(), tiny_batch("raster")
    slots = orders(3)
    layout = model.layout(given._replace(slots=slots))
    network, vectors = model.network, model.order.targets
    prefix = network.embed_prefix(given.class_label, given.num_kept)
    for row, order in enumerate(slots.tolist()):
        assert torch.equal(layout.inputs[row, 0], prefix[row, 0])
        assert torch.equal(layout.inputs[row, 1], prefix[row, 1] + vectors[order[0]])
        assert layout.positions[row, :2].tolist() == [[0, 0], [0, 0]]
        for place, (cell, following) in enumerate(itertools.pairwise(order)):
            parts = network.codes(given.indices[row, cell])
            expected = network.embed(parts[None, None])[0, 0] + vectors[following]
            assert torch.equal(layout.inputs[row, 2 + place], expected)
            at = [1 + cell // 4, 1 + cell % 4]
            assert layout.positions[row, 2 + place].tolist() == at
        assert torch.equal(layout.parts[row], network.codes(given.indices[row, order]))


def test_without_vectors_and_permutations_it_is_raster_order_bit_for_bit():
    plain, model, given = tiny_generator("raster"), annealed(), tiny_batch("raster")
    weights = plain.state_dict()
    assert "order.targets" not in weights
    model.load_state_dict(weights | {"order.targets": torch.zeros(TINY.num_tokens, TINY.dim)})
    model.train()
    drawn = model.draw(given, replace(numbers_for(given), progress=1.0))
    plain.train()
    expected = plain.draw(given, numbers_for(given))
    torch.manual_seed(0)
    loss = model(drawn)
    torch.manual_seed(0)
    assert torch.equal(loss.total, plain(expected).total)
    settings, labels = SamplingSettings(guidance_scale=2.0), torch.tensor([0, 1])
    draws = plain.draws(0, range(2), 5, settings)
    found = [each.eval().sample(labels, 5, draws, settings).indices for each in (plain, model)]
    assert torch.equal(*found)


def test_the_identity_as_the_order_is_raster_order():
    model, given = annealed(), tiny_batch("raster")
    same = given._replace(slots=RASTER.expand(4, -1))
    assert torch.equal(model(same).total, model(given).total)
    assert torch.equal(model.log_likelihood(same), model.log_likelihood(given))


def test_a_token_depends_on_those_before_it_in_the_order_and_on_its_cell():
    model, slots = annealed(), orders(5)
    given = tiny_batch("raster")._replace(slots=slots)
    changed = given.indices.clone()
    rows = torch.arange(4)
    changed[rows, slots[:, 6]] ^= 1
    first, second = model.logits(given)[0], model.logits(given._replace(indices=changed))[0]
    differs = (first != second).any(-1).gather(1, slots)
    assert not differs[:, :7].any()
    assert differs[:, 7:].all()
    # The same tokens at hand, and another cell to come.
    swapped = slots.clone()
    swapped[:, [6, 7]] = slots[:, [7, 6]]
    other = model.logits(given._replace(slots=swapped))[0]
    first, other = (logits[rows, at[:, 6]] for logits, at in ((first, slots), (other, swapped)))
    assert not torch.isclose(first, other).all(-1).any()


def test_likelihoods_of_all_sequences_sum_to_one_in_any_order():
    changes = {"sizes": (2, 2), "grid_size": (1, 3), "num_kept": 2, "kept_candidates": (2,)}
    model = annealed(**changes)
    every = torch.tensor(list(itertools.product(range(4), repeat=3)))
    for order in (None, torch.tensor([2, 0, 1])):
        slots = None if order is None else order.expand(len(every), -1)
        given = Sequences(every, torch.ones(len(every), dtype=torch.int64), 2, slots=slots)
        total = model.log_likelihood(given).detach().double().exp().sum().item()
        assert total == pytest.approx(1, abs=1e-5)


def test_cached_states_are_those_of_a_whole_pass_in_raster_order():
    model, settings = annealed(), SamplingSettings()
    labels, states = torch.tensor([0, 2]), []
    decoder = model.decoder(labels, 5, model.draws(0, range(2), 5, settings), settings)
    decoder.seek(0)
    for _ in range(decoder.num_steps):
        states.append(decoder.states)
        decoder.step()
    parts = decoder.parts()
    with torch.no_grad():
        cached = model.network.part_logits(torch.stack(states, dim=1), parts)
        whole = model.logits(Sequences(model.network.indices(parts), labels, 5))
    for ours, theirs in zip(cached, whole, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4)
