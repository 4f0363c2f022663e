"""Tests of `mergevq.generator.decoding`."""

from dataclasses import replace

import pytest
import torch

from mergevq.config.generator import (
    OneByOne,
    SamplingSettings,
    Several,
)
from mergevq.data.layouts import Source, canonicalize
from mergevq.generator.build import build_generator
from mergevq.generator.decoding import full_cache, prefill, put_in
from mergevq.generator.orders.random import slot_positions
from mergevq.generator.seams import Sequences
from mergevq.generator.weights import as_weights
from tests.support.generators import KINDS, ORDERS, TINY, loss_of, tiny_batch, tiny_generator
from tests.support.sampling import PLAIN, inpainted, run

FREE = SamplingSettings(passes=OneByOne(budget=False))
GREEDY = SamplingSettings(temperature=0.0)
GUIDED = SamplingSettings(guidance_scale=3.0)
SEQUENTIAL = ("raster", "merge", "anchor")


@torch.no_grad()
def decoded_logits(model, cache, given):
    """Result of `Autoregressive.logits`, one token at a time through a cache."""
    network, sequence = model.network, model.parts(given)
    states = prefill(network, cache, given.class_label, given.num_kept)
    steps = []
    for token in range(sequence.shape[1]):
        parts = sequence[:, token]
        steps.append(network.head(states, parts, network.embed_part))
        if token + 1 < sequence.shape[1]:
            states = put_in(network, cache, parts, model.order.turns(cache, parts, token))
    return [torch.stack(part, dim=1) for part in zip(*steps, strict=True)]


def make_cache(model, *, batch, settings=PLAIN):
    return model.order.cache(model.network, batch=batch, num_kept=5, settings=settings)


def make_random_cache(model, batch=4):
    return full_cache(model.network, batch, 2 * 5 - 1)


@torch.no_grad()
def decoded_slots(model, given, counts, cache=None):
    """States of the slots in the order of decoding, `counts` of them in each pass."""
    sequence, network = model.parts(given), model.network
    order, slots = given.slots, slot_positions(network, given.num_kept)
    cache = cache or make_random_cache(model, len(order))
    cache.reset()
    inputs = network.embed_prefix(given.class_label, given.num_kept)
    positions = torch.zeros(len(order), 2, 2)
    states, start = [], 0
    for count in counts:
        wanted = order[:, start : start + count]
        states.append(model.order.put(network, cache, inputs, positions, slots[wanted]))
        tokens = sequence.gather(1, wanted[..., None].expand(-1, -1, sequence.shape[2]))
        inputs, positions = model.order.pairs(network, tokens, slots[wanted])
        start += count
    return torch.cat(states, dim=1)


@torch.no_grad()
def decoded_slot_logits(model, given, cache=None):
    """Result of `Autoregressive.logits`, one slot at a time through a cache."""
    order = given.slots
    states = decoded_slots(model, given, [1] * order.shape[1], cache)
    parts = model.parts(given)
    parts = parts.gather(1, order[..., None].expand_as(parts))
    back = order.argsort(1)
    return [
        logits.gather(1, back[..., None].expand(-1, -1, logits.shape[-1]))
        for logits in model.network.part_logits(states, parts)
    ]


def doubled(model, given):
    """Rows with their class, and the same rows without, as guidance decodes them."""
    rows = Sequences(
        *(
            value.repeat(2, *[1] * (value.dim() - 1)) if torch.is_tensor(value) else value
            for value in given
        )
    )
    rows.class_label[len(given.class_label) :] = model.config.null_class
    return rows


def assert_equal_where_legal(actual, expected):
    for ours, theirs in zip(actual, expected, strict=True):
        legal = torch.isfinite(theirs)
        torch.testing.assert_close(ours[legal], theirs[legal], rtol=0, atol=1e-4)


# ------------------------------------------------------------------------------------ caches


@pytest.mark.parametrize("settings", [PLAIN, FREE], ids=["k", "any"])
@pytest.mark.parametrize(
    "changes", [{}, {"num_kv_heads": 1, "qk_norm": True, "num_head_layers": 2}]
)
@pytest.mark.parametrize("batch", [1, 4])
@pytest.mark.parametrize("order", SEQUENTIAL)
def test_cached_logits_equal_uncached(order, batch, changes, settings):
    model = tiny_generator(order, **changes)
    given = tiny_batch(order, batch=batch)
    cache = make_cache(model, batch=batch, settings=settings)
    expected = model.logits(given)
    assert_equal_where_legal(decoded_logits(model, cache, given), expected)


@pytest.mark.parametrize("order", SEQUENTIAL)
def test_a_cache_can_be_used_again(order):
    model = tiny_generator(order)
    cache = make_cache(model, batch=4)
    given = tiny_batch(order)
    decoded_logits(model, cache, given._replace(indices=given.indices.flip(0)))
    assert_equal_where_legal(decoded_logits(model, cache, given), model.logits(given))


@pytest.mark.parametrize(
    "changes", [{}, {"num_kv_heads": 1, "qk_norm": True, "num_head_layers": 2}]
)
@pytest.mark.parametrize("batch", [1, 4])
def test_random_order_one_by_one_equals_the_full_forward(batch, changes):
    model, given = tiny_generator("random", **changes), tiny_batch("random", batch=batch)
    decoded, expected = decoded_slot_logits(model, given), model.logits(given)
    assert len(decoded) == len(expected) == 2
    assert_equal_where_legal(decoded, expected)


def test_a_cache_of_random_order_can_be_used_again():
    model, given = tiny_generator("random"), tiny_batch("random")
    cache = make_random_cache(model)
    other = given._replace(indices=given.indices.flip(0), slots=given.slots.flip(0))
    decoded_slot_logits(model, other, cache)
    assert_equal_where_legal(decoded_slot_logits(model, given, cache), model.logits(given))


@pytest.mark.parametrize("counts", [[2, 3], [1, 2, 2], [5], [1, 3, 1]])
def test_a_parallel_pass_equals_asking_for_each_slot_next(counts):
    model, given = tiny_generator("random"), tiny_batch("random")
    states = decoded_slots(model, given, counts)
    start = 0
    for count in counts:
        for position in range(start, start + count):
            # The slot comes right after what earlier passes decoded.
            moved = [*range(start), position]
            rest = [other for other in range(5) if other not in moved]
            order = given.slots[:, moved + rest]
            expected = model.logits(given._replace(slots=order))[0]
            asked = given.slots[:, position]
            first = model.network.part_logits(
                states[:, position, None], torch.zeros(4, 1, 2).long()
            )[0][:, 0]
            torch.testing.assert_close(first, expected[torch.arange(4), asked], rtol=0, atol=1e-4)
        start += count


@pytest.mark.parametrize("order", ORDERS)
def test_guided_cached_logits_equal_uncached(order):
    model, given = tiny_generator(order), tiny_batch(order)
    rows = doubled(model, given)
    if order == "random":
        cached = decoded_slot_logits(model, rows)
    else:
        cache = make_cache(model, batch=8)
        cached = decoded_logits(model, cache, rows)
    for part, (ours, legal) in enumerate(zip(cached, model.logits(given), strict=True)):
        conditional, unconditional = model.logits(rows)[part].chunk(2)
        guided = unconditional + 3 * (conditional - unconditional)
        ours_guided = ours[4:] + 3 * (ours[:4] - ours[4:])
        mask = torch.isfinite(legal)
        torch.testing.assert_close(ours_guided[mask], guided[mask], rtol=0, atol=1e-4)


def test_the_compressed_cache_is_as_small_as_its_budget():
    merged, full = (
        make_cache(tiny_generator(order, grid_size=(8, 8)), batch=1)
        for order in ("merge", "raster")
    )
    # Prefix, K and window, against the prefix and all inputs.
    assert merged.num_bytes / full.num_bytes == (2 + 5 + 2) / (2 + 63)


@pytest.mark.parametrize("settings", [PLAIN, GUIDED], ids=["plain", "guided"])
@pytest.mark.parametrize("order", ORDERS)
def test_an_image_depends_on_seed_and_number_alone(order, settings):
    model = tiny_generator(order)
    if order == "random":
        settings = replace(settings, passes=Several(num_steps=3))
    labels = [0, 1, 2, 0, 1, 2]
    together = run(model, labels, settings, seed=5).indices
    for number in (0, 4):
        alone = run(model, [labels[number]], settings, seed=5, image_ids=[number]).indices
        assert torch.equal(alone[0], together[number])
    reverse = run(model, labels[::-1], settings, seed=5, image_ids=range(5, -1, -1)).indices
    assert torch.equal(reverse.flip(0), together)


@pytest.mark.parametrize("order", ORDERS)
def test_seeds_and_numbers_give_different_images(order):
    model = tiny_generator(order)
    first = run(model, [0, 0, 0], seed=1).indices
    assert len(first.unique(dim=0)) == 3
    assert not torch.equal(first, run(model, [0, 0, 0], seed=2).indices)
    assert torch.equal(first, run(model, [0, 0, 0], seed=1).indices)


def test_the_global_generator_is_left_alone():
    model, before = tiny_generator("random"), torch.get_rng_state()
    run(model, [0])
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("order", ORDERS)
def test_sampled_indices_are_codes(order):
    indices = run(tiny_generator(order), [0] * 20).indices
    assert 0 <= int(indices.min()) <= int(indices.max()) < TINY.num_codes


def test_each_part_has_its_own_temperature():
    model = tiny_generator("raster")
    mixed = run(model, [0] * 6, replace(PLAIN, temperature=(0.0, 1.0))).indices
    parts = model.network.codes(mixed)
    assert len(parts[:, 0, 0].unique()) == 1
    assert len(parts[:, 0, 1].unique()) > 1


def count_rows(model, settings):
    rows = []
    hook = model.network.blocks[0].register_forward_hook(lambda _, __, out: rows.append(len(out)))
    sampled = run(model, [0, 1], settings)
    hook.remove()
    return sampled, rows


@pytest.mark.parametrize("order", ORDERS)
def test_only_guidance_doubles_the_batch(order):
    model = tiny_generator(order)
    plain, rows = count_rows(model, PLAIN)
    assert rows == [2] * plain.num_forward
    guided, doubled = count_rows(model, GUIDED)
    assert doubled == [4] * guided.num_forward
    assert guided.kv_bytes == 2 * plain.kv_bytes
    assert plain.num_forward == plain.indices.shape[1]


def test_scale_one_is_the_conditional_model_even_when_the_batch_is_doubled():
    model = tiny_generator("raster")
    late = replace(GUIDED, guidance_interval=(0.5, 1.0))
    plain, guided = run(model, [0, 1, 2]).indices, run(model, [0, 1, 2], late).indices
    assert torch.equal(plain[:, :6], guided[:, :6])
    assert not torch.equal(plain, guided)


def test_scale_zero_is_the_unconditional_model():
    model = tiny_generator("raster")
    without = run(model, [0, 1, 2], replace(PLAIN, guidance_scale=0.0)).indices
    assert torch.equal(without, run(model, [3, 3, 3]).indices)


# ---------------------------------------------------------------------------- merge and anchor


def test_the_budget_is_never_exceeded():
    model = tiny_generator("merge", grid_size=(4, 5))
    for settings in (PLAIN, GUIDED):
        indices = run(model, [0, 1, 2, 3] * 4, settings).indices
        assert max(len(row.unique()) for row in indices) == 5
    free = run(model, [0, 1, 2, 3] * 4, FREE).indices
    assert max(len(row.unique()) for row in free) > 5


def test_the_budget_changes_nothing_before_it_is_spent():
    model = tiny_generator("merge", grid_size=(4, 5))
    held = run(model, [0, 1, 2, 3]).indices
    free = run(model, [0, 1, 2, 3], FREE).indices
    for row in range(4):
        distinct = [len(free[row, :count].unique()) for count in range(1, 21)]
        within = sum(count <= 5 for count in distinct)
        assert torch.equal(held[row, :within], free[row, :within])


def test_merged_samples_say_which_cells_are_equal():
    sampled = run(tiny_generator("merge"), [0, 1, 2, 3])
    source_index, indices = sampled.source_index, sampled.indices
    same = indices[:, :, None] == indices[:, None, :]
    assert torch.equal(source_index[:, :, None] == source_index[:, None, :], same)
    for row in source_index:
        source = Source(row[None], int(row.max()) + 1)
        assert torch.equal(canonicalize(source).source.index[0], row)


def test_anchors_are_those_of_kept_tokens_in_canonical_order():
    model = tiny_generator("anchor", kept_candidates=(1, 5, 7, 12))
    for num_kept in (1, 5, 12):
        sampled = run(model, [0, 1, 2, 3] * 4, num_kept=num_kept)
        assert sampled.anchors.shape == sampled.indices.shape == (16, num_kept)
        assert (sampled.anchors[:, 0] == 0).all()
        assert (sampled.anchors.diff(dim=1) >= 1).all()
        assert int(sampled.anchors.max()) < 12
        assert sampled.num_forward == num_kept


def test_a_pass_per_step():
    sampled = run(tiny_generator("random"), [0, 1], replace(PLAIN, passes=Several(num_steps=2)))
    assert sampled.num_forward == 2
    assert sampled.indices.shape == (2, 5)


def test_kept_tokens_stay_and_the_others_are_sampled():
    model, given = tiny_generator("random"), tiny_batch("random", num_codes=20)
    keep = torch.tensor([[1, 0, 1, 0, 1], [0] * 5, [1] * 5, [0, 0, 0, 0, 1]]).bool()
    result = inpainted(model, given.indices, keep, [0, 1, 2, 3], passes=Several(num_steps=3))
    assert torch.equal(result.indices[keep], given.indices[keep])
    assert not torch.equal(result.indices[~keep], given.indices[~keep])
    # Two, three and three passes for the groups that keep three, none and one.
    assert result.num_forward == 2 + 3 + 3


def test_keeping_nothing_is_sampling():
    model = tiny_generator("random")
    nothing = torch.zeros(3, 5, dtype=torch.bool)
    result = inpainted(model, torch.full((3, 5), 31), nothing, [0, 1, 2])
    assert torch.equal(result.indices, run(model, [0, 1, 2]).indices)


def test_an_inpainted_image_depends_on_what_it_keeps_and_not_on_its_batch():
    model, given = tiny_generator("random"), tiny_batch("random", num_codes=20)
    keep = torch.tensor([[1, 0, 1, 0, 1], [0, 1, 0, 0, 0], [0, 0, 1, 0, 0], [0] * 5]).bool()
    indices, labels = given.indices, [0, 1, 2, 3]
    together = inpainted(model, indices, keep, labels, guidance_scale=2.0).indices
    alone = inpainted(model, indices[:1], keep[:1], labels[:1], guidance_scale=2.0).indices
    assert torch.equal(together[:1], alone)
    hidden = indices.where(keep, 7)
    assert torch.equal(inpainted(model, hidden, keep, labels, guidance_scale=2.0).indices, together)
    shown = indices.clone()
    shown[0, 2] ^= 31
    again = inpainted(model, shown, keep, labels, guidance_scale=2.0).indices
    assert not torch.equal(again[0, ~keep[0]], together[0, ~keep[0]])


# ----------------------------------------------------------------------------------- weights


@pytest.mark.parametrize("order", ORDERS)
def test_other_types_of_weights_sample_too(order):
    model = tiny_generator(order).to(torch.bfloat16)
    plain = run(model, [0, 1], GUIDED)
    # Keys and values are in float32 all the same: on CPUs attention to them is faster.
    assert plain.kv_bytes == run(tiny_generator(order), [0, 1], GUIDED).kv_bytes
    assert run(as_weights(model, "int8"), [0, 1], GUIDED).indices.shape == plain.indices.shape


# ---------------------------------------------------------------------------------- overfits


def overfit(order, num_sequences, config, num_steps):
    """Train on one sequence for each class, then sample each class greedily."""
    torch.manual_seed(0)
    config = replace(
        config,
        order=KINDS[order](),
        num_classes=num_sequences,
        dropout=0.0,
        class_dropout=0.0,
        label_smoothing=0.0,
    )
    model = build_generator(config)
    given = tiny_batch(order, batch=num_sequences, num_kept=config.num_kept, config=config)
    given = given._replace(class_label=torch.arange(num_sequences))
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, num_steps)
    for step in range(num_steps):
        optimizer.zero_grad()
        loss_of(model, given, step).total.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    sampled = run(model.eval(), range(num_sequences), GREEDY, num_kept=config.num_kept)
    return given, sampled


@pytest.mark.slow
@pytest.mark.parametrize("order", ORDERS)
def test_greedy_sampling_reproduces_what_was_learned(order):
    small = {"dim": 64, "num_layers": 1, "ffn_dim": 128, "grid_size": (2, 3), "num_kept": 4}
    # In random order a sequence is many tasks, and takes longer to learn.
    num_steps = 600 if order == "random" else 300
    given, sampled = overfit(order, 8, replace(TINY, **small, kept_candidates=(4,)), num_steps)
    assert torch.equal(sampled.indices, given.indices)
    if order == "anchor":
        assert torch.equal(sampled.anchors, given.anchors)


def test_calls_that_do_not_fit_the_generator_are_errors():
    model = tiny_generator("random")
    with pytest.raises(ValueError, match=r"num_steps \(6\) must be between 1 and the 5 tokens"):
        run(model, [0], replace(PLAIN, passes=Several(num_steps=6)))
    with pytest.raises(ValueError, match=r"top_k has 3 numbers and must have 1 or 2, one for each"):
        run(model, [0], replace(PLAIN, top_k=(1, 2, 3)))
    with pytest.raises(ValueError, match=r"2 labels must go with as many image_ids \(1\)"):
        run(model, [0, 1], image_ids=[0])
    with pytest.raises(ValueError, match=r"class_label \(7 to 7\) must be between 0 and 3"):
        run(model, [7])
    with pytest.raises(ValueError, match=r"num_kept \(6\) must be one of those trained on"):
        run(model, [0], num_kept=6)
    with pytest.raises(ValueError, match=r"call generator\.eval"):
        run(tiny_generator("raster").train(), [0])
    with pytest.raises(
        ValueError, match=r"guidance_scale \(3.0\) must be 1 for a generator without"
    ):
        run(tiny_generator("raster", num_classes=0), [0], GUIDED)
    keep = torch.zeros(1, 12, dtype=torch.bool)
    with pytest.raises(ValueError, match="tokens can only be kept in order 'random', not 'merge'"):
        inpainted(tiny_generator("merge"), torch.zeros(1, 12).long(), keep, [0])


def test_a_generator_without_classes_samples():
    assert run(tiny_generator("anchor", num_classes=0), [0, 0]).indices.shape == (2, 5)


@pytest.mark.parametrize("order", ORDERS)
def test_samples_can_be_learned_from(order):
    model = tiny_generator(order)
    sampled = run(model, [0, 1])
    given = Sequences(sampled.indices, torch.tensor([0, 1]), 5, anchors=sampled.anchors)
    loss_of(model, given).total.backward()
    assert model.network.part_embeddings[-1].weight.grad.abs().sum() > 0


@pytest.mark.parametrize("order", ORDERS)
def test_broken_weights_do_not_sample(order):
    model = tiny_generator(order)
    with torch.no_grad():
        model.network.blocks[0].ffn.down.weight[0, 0] = torch.nan
    with pytest.raises(RuntimeError, match="states or logits are not finite"):
        run(model, [0, 1])


@pytest.mark.parametrize("order", ORDERS)
def test_logits_that_are_not_finite_are_an_error_though_the_states_are(order):
    model = tiny_generator(order)
    with torch.no_grad():
        model.network.head.outputs[-1].weight[1, 0] = torch.nan
    with pytest.raises(RuntimeError, match="logits are not finite"):
        run(model, [0, 1])


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("gradients", [False, True])
def test_a_generator_in_double_precision_works_with_and_without_gradients(order, gradients):
    given = tiny_batch(order)
    expected = torch.cat([part.flatten() for part in tiny_generator(order).logits(given)])
    model = tiny_generator(order).double()
    with torch.set_grad_enabled(gradients):
        found = torch.cat([part.flatten() for part in model.logits(given)])
    legal = expected > -torch.inf
    torch.testing.assert_close(found[legal], expected[legal], rtol=1e-4, atol=1e-4)
    assert run(model, [0, 1]).indices.shape == run(tiny_generator(order), [0, 1]).indices.shape
