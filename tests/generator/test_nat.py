"""Tests of `mergevq.generator.nat`."""

import itertools
import math
from dataclasses import replace

import pytest
import torch

from mergevq.config.generator import (
    SamplingSettings,
    Several,
)
from mergevq.generator.sampling import arccos_schedule, draw, even_schedule
from mergevq.generator.seams import Sequences
from mergevq.runtime.random import BatchNumbers
from tests.support.generators import loss_of, numbers_for, tiny_batch, tiny_generator
from tests.support.sampling import run

MASKGIT = {}
ENAT = {"disentangle": True, "visible_weight": 0.0, "masking": "beta"}
REUSE = ENAT | {"reuse": True}
FAMILIES = pytest.mark.parametrize(
    "family", [MASKGIT, ENAT, REUSE], ids=["maskgit", "enat", "reuse"]
)
SPLIT = pytest.mark.parametrize("family", [ENAT, REUSE], ids=["enat", "reuse"])


def few(num_steps=4, **changes):
    return SamplingSettings(passes=Several(num_steps=num_steps, **changes))


def masked(family, **changes):
    return tiny_generator("masked", **family, **changes)


def batch(*, hidden, old=(), **changes):
    """Sequences of which some cells are hidden, and some known for long."""
    given = tiny_batch("masked", num_codes=20, **changes)
    stages = torch.ones(given.indices.shape, dtype=torch.int64)
    stages[:, list(hidden)] = 2
    stages[:, list(old)] = 0
    return given._replace(stages=stages)


# ------------------------------------------------------------------------------- what is hidden


def test_reveals_by_hand():
    assert even_schedule(64, 8) == [6, 5, 5, 6, 6, 7, 9, 20]
    assert arccos_schedule(64, 8) == [2, 3, 6, 8, 10, 11, 12, 12]


@pytest.mark.parametrize("num_tokens", [1, 2, 7, 36])
def test_every_pass_reveals_a_token(num_tokens):
    for num_steps in range(1, num_tokens + 1):
        counts = even_schedule(num_tokens, num_steps)
        assert len(counts) == num_steps
        assert min(counts) >= 1
        assert sum(counts) == num_tokens
    with pytest.raises(ValueError, match=f"must be between 1 and the {num_tokens} tokens"):
        even_schedule(num_tokens, num_tokens + 1)


@pytest.mark.parametrize(
    ("masking", "mean", "deviation"),
    # The mean of arccos(u) / (pi / 2) is 2 / pi; that of Beta(12, 3) 12 / 15.
    [("arccos", 2 / math.pi, None), ("beta", 0.8, math.sqrt(12 * 3 / (15**2 * 16)))],
)
def test_the_share_that_is_hidden_has_its_distribution(masking, mean, deviation):
    model = masked({"masking": masking}, grid_size=(32, 32)).train()
    rows = 4000
    given = Sequences(torch.zeros(rows, 1024).long(), torch.zeros(rows).long(), 5)
    numbers = BatchNumbers(seed=0, step=0, num_rows=rows, rows=slice(None))
    share = (model.draw(given, numbers).stages == 2).float().mean(1)
    assert share.mean().item() == pytest.approx(mean, abs=0.015)
    assert share.min() > 0
    if deviation:
        assert share.std().item() == pytest.approx(deviation, abs=0.01)


def test_each_sequence_has_a_mask_of_its_own_which_the_batch_does_not_change():
    model, given = masked(MASKGIT).train(), tiny_batch("masked")
    whole = model.draw(given, numbers_for(given)).stages
    counts = (whole == 2).sum(1)
    assert len(counts.unique()) > 1
    numbers = BatchNumbers(seed=0, step=0, num_rows=4, rows=slice(1, 3))
    rows = given._replace(indices=given.indices[1:3], class_label=given.class_label[1:3])
    assert torch.equal(model.draw(rows, numbers).stages, whole[1:3])


def test_old_tokens_are_a_part_of_the_visible_ones_in_half_of_the_sequences():
    model = masked(REUSE, grid_size=(8, 8)).train()
    rows = 2000
    given = Sequences(torch.zeros(rows, 64).long(), torch.zeros(rows).long(), 5)
    numbers = BatchNumbers(seed=0, step=0, num_rows=rows, rows=slice(None))
    stages = model.draw(given, numbers).stages
    assert (stages == 2).any(1).all()
    assert (stages == 0).any(1).float().mean().item() == pytest.approx(0.5, abs=0.08)


# ---------------------------------------------------------------------------------- the network


@FAMILIES
def test_a_hidden_token_is_not_looked_at(family):
    model, given = masked(family), batch(hidden=(1, 4, 5), old=(0, 2))
    before = model.logits(given)
    changed = given.indices.clone()
    changed[:, [1, 4]] ^= 7
    after = model.logits(given._replace(indices=changed))
    # The second part is conditioned on the true first one.
    assert torch.equal(before[0], after[0])


@FAMILIES
def test_every_visible_token_counts(family):
    model, given = masked(family), batch(hidden=(1, 4, 5), old=(0, 2))
    before = model.logits(given)[0]
    for cell in (0, 2, 3, 11):
        changed = given.indices.clone()
        changed[:, cell] ^= 7
        after = model.logits(given._replace(indices=changed))[0]
        assert not torch.isclose(before[:, [1, 4, 5]], after[:, [1, 4, 5]]).all(-1).any()


@SPLIT
def test_visible_features_are_the_same_whatever_is_hidden(family):
    model, given = masked(family), batch(hidden=(1, 4, 5))
    network, parts = model.network, model.parts(given)
    prefix = network.embed_prefix(given.class_label, given.num_kept)
    features = model.encode(prefix, parts, given.stages < 2)
    changed = parts.clone()
    changed[:, [1, 4, 5]] = 0
    assert torch.equal(features.states, model.encode(prefix, changed, given.stages < 2).states)


@SPLIT
def test_rows_that_hide_different_numbers_do_not_change_each_other(family):
    model = masked(family)
    given = batch(hidden=(1, 4, 5), old=(0, 2))
    stages = given.stages.clone()
    stages[1, 6:] = 2
    stages[2] = 2
    ragged = given._replace(stages=stages)
    together = model.logits(ragged)
    for row in range(4):
        alone = Sequences(
            *(value[row : row + 1] if torch.is_tensor(value) else value for value in ragged)
        )
        hidden = alone.stages[0] == 2
        for ours, theirs in zip(together, model.logits(alone), strict=True):
            torch.testing.assert_close(ours[row][hidden], theirs[0][hidden], rtol=0, atol=1e-4)


def test_a_split_of_the_visible_tokens_matters_only_with_reuse():
    one, two = batch(hidden=(1, 4, 5)), batch(hidden=(1, 4, 5), old=(0, 2))
    for family, same in ((MASKGIT, True), (REUSE, False)):
        model = masked(family)
        hidden = [part[:, [1, 4, 5]] for part in model.logits(one)]
        other = [part[:, [1, 4, 5]] for part in model.logits(two)]
        assert all(torch.equal(*pair) for pair in zip(hidden, other, strict=True)) == same


@FAMILIES
def test_training_lays_gradients_on_every_weight_with_and_without_checkpointing(family):
    model, given = masked(family, qk_norm=True).train(), tiny_batch("masked", num_codes=20)
    gradients = []
    for enabled in (False, True):
        model.network.checkpointing = enabled
        torch.manual_seed(0)
        model.zero_grad(set_to_none=True)
        loss_of(model, given).total.backward()
        missing = [name for name, weight in model.named_parameters() if weight.grad is None]
        assert missing == []
        gradients.append(model.network.blocks[0].attention.qkv.weight.grad)
    assert torch.equal(*gradients)


# -------------------------------------------------------------------------------------- the loss


def test_the_loss_by_hand():
    model = masked({"visible_weight": 0.25}, label_smoothing=0.0)
    given = batch(hidden=(1, 4, 5))
    parts, loss = model.parts(given), model(given)
    hits = torch.stack(
        [
            torch.nn.functional.cross_entropy(
                logits.flatten(0, 1), parts[..., part].flatten(), reduction="none"
            ).view(4, 12)
            for part, logits in enumerate(model.logits(given))
        ]
    )
    hidden = hits[:, :, [1, 4, 5]]
    torch.testing.assert_close(loss.nll, hidden.mean(2).sum(0).mean())
    weights = torch.full((12,), 0.25)
    weights[[1, 4, 5]] = 1
    expected = (hits * weights).sum((1, 2)) / (4 * weights.sum())
    torch.testing.assert_close(loss.parts, expected)


def test_label_smoothing_is_that_of_pytorch():
    model = masked({"visible_weight": 0.0}, label_smoothing=0.2)
    given = batch(hidden=range(12))
    parts = model.parts(given)
    expected = [
        torch.nn.functional.cross_entropy(
            logits.flatten(0, 1), parts[..., part].flatten(), label_smoothing=0.2
        )
        for part, logits in enumerate(model.logits(given))
    ]
    torch.testing.assert_close(model(given).parts, torch.stack(expected))


TWO_CELLS = {"sizes": (2, 2), "grid_size": (1, 2), "num_kept": 2, "kept_candidates": (2,)}


def two_cells(family):
    """A model of two cells, all pairs of tokens, and log-probabilities of one cell or both."""
    model = masked(family, **TWO_CELLS)
    pairs = torch.tensor(list(itertools.product(range(4), repeat=2)))
    label = torch.zeros(16, dtype=torch.int64)

    def log_prob(cell, hidden):
        stages = torch.ones(16, 2, dtype=torch.int64)
        stages[:, hidden] = 2
        given = Sequences(pairs, label, 2, stages=stages)
        parts = model.parts(given)
        return sum(
            logits[:, cell].log_softmax(-1).gather(1, parts[:, cell, part, None])[:, 0]
            for part, logits in enumerate(model.logits(given))
        )

    return model, pairs, log_prob


@FAMILIES
def test_likelihood_in_a_fixed_order_sums_to_one(family):
    _, _, log_prob = two_cells(family)
    for first, second in ((0, 1), (1, 0)):
        total = (log_prob(first, [0, 1]) + log_prob(second, [second])).exp().sum()
        assert total.item() == pytest.approx(1, abs=1e-5)


@FAMILIES
def test_the_bound_is_the_mean_over_orders(family):
    model, pairs, log_prob = two_cells(family)
    orders = [log_prob(a, [0, 1]) + log_prob(b, [b]) for a, b in ((0, 1), (1, 0))]
    label = torch.zeros(16, dtype=torch.int64)
    # One of two hidden tokens, or both, each number as often.
    found = []
    for hidden, share in (([0], 0.25), ([1], 0.25), ([0, 1], 0.5)):
        stages = torch.ones(16, 2, dtype=torch.int64)
        stages[:, hidden] = 2
        found.append(share * model.log_likelihood(Sequences(pairs, label, 2, stages=stages)))
    torch.testing.assert_close(sum(found), sum(orders) / 2)


# -------------------------------------------------------------------------------------- sampling


@FAMILIES
def test_an_image_depends_on_seed_and_number_alone(family):
    model, labels = masked(family), [0, 1, 2, 0, 1, 2]
    settings = replace(few(), guidance_scale=3.0, guidance_schedule="linear")
    together = run(model, labels, settings, seed=5).indices
    for number in (0, 4):
        alone = run(model, [labels[number]], settings, seed=5, image_ids=[number]).indices
        assert torch.equal(alone[0], together[number])
    assert len(run(model, [0] * 6, settings).indices.unique(dim=0)) == 6


@FAMILIES
def test_without_noise_the_surest_tokens_are_kept_first(family):
    model = masked(family)
    settings = replace(few(3, confidence_temperature=0.0), temperature=0.0)
    draws = model.draws(0, [0, 1], 5, settings)
    decoder = model.decoder(torch.tensor([0, 1]), 5, draws, settings)
    decoder.seek(0)
    decoder.step()
    given = Sequences(
        torch.zeros(2, 12).long(), torch.tensor([0, 1]), 5, stages=torch.full((2, 12), 2)
    )
    # Greedy, part by part: the second part given the most likely first one.
    with torch.no_grad():
        first = model.logits(given)[0].log_softmax(-1)
        best = first.argmax(-1)
        second = model.logits(given._replace(indices=best))[1].log_softmax(-1)
    score = first.amax(-1) + second.amax(-1)
    count = arccos_schedule(12, 3)[0]
    for row in range(2):
        surest = set(score[row].topk(count).indices.tolist())
        assert set((decoder.stages[row] == 1).nonzero()[:, 0].tolist()) == surest
        for cell in surest:
            expected = [best[row, cell].item(), second[row, cell].argmax().item()]
            assert decoder.parts()[row, cell].tolist() == expected


def test_without_reuse_a_step_is_the_full_forward():
    for family in (MASKGIT, ENAT):
        model, settings = masked(family), few(4)
        draws = model.draws(0, range(3), 5, settings)
        decoder = model.decoder(torch.tensor([0, 1, 2]), 5, draws, settings)
        decoder.seek(0)
        for _ in range(3):
            decoder.step()
        stages = decoder.stages
        cells = (stages == 2).nonzero()[:, 1].view(3, -1)
        with torch.no_grad():
            states = decoder._states(cells)
            tokens = model.network.indices(decoder.parts())
            given = Sequences(tokens, torch.tensor([0, 1, 2]), 5, stages=1 + (stages == 2).long())
            expected = model.logits(given)[0]
            found = model.network.part_logits(states, torch.zeros(3, cells.shape[1], 2).long())[0]
        at = cells[..., None].expand(-1, -1, expected.shape[-1])
        torch.testing.assert_close(found, expected.gather(1, at), rtol=0, atol=1e-4)


def test_with_reuse_a_step_looks_at_the_new_tokens_alone():
    model, settings = masked(REUSE), few(4)
    lengths = []
    hook = model.network.blocks[0].register_forward_hook(
        lambda _, inputs, __: lengths.append(inputs[0].shape[1])
    )
    run(model, [0, 1], settings)
    hook.remove()
    # The prefix, then what each pass but the last has kept.
    assert lengths == [2, *arccos_schedule(12, 4)[:-1]]


@FAMILIES
def test_one_token_a_pass_is_the_default(family):
    sampled = run(masked(family), [0, 1])
    assert sampled.num_forward == 12
    assert sampled.indices.shape == (2, 12)
    assert sampled.source_index is sampled.anchors is None
    assert (sampled.kv_bytes > 0) == (family is REUSE)


def test_numbers_of_the_passes_leave_the_others_as_they_are():
    plain = draw(3, [7], 12, 2, torch.device("cpu"))
    more = draw(3, [7], 12, 2, torch.device("cpu"), num_passes=4)
    assert torch.equal(plain.uniforms, more.uniforms)
    assert torch.equal(plain.order, more.order)
    assert more.passes.shape == (1, 4, 12, 3)


# -------------------------------------------------------------------------------------- overfits


@pytest.mark.slow
@FAMILIES
def test_what_was_learned_is_sampled(family):
    torch.manual_seed(0)
    small = {"dim": 64, "ffn_dim": 128, "num_classes": 8}
    small |= {"grid_size": (2, 3), "kept_candidates": (5,)}
    plain = {"dropout": 0.0, "class_dropout": 0.0, "label_smoothing": 0.0}
    model = masked(family, **small, **plain).train()
    model.reset_parameters()
    given = tiny_batch("masked", batch=8, config=model.config)
    given = given._replace(class_label=torch.arange(8))
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 600)
    for step in range(600):
        optimizer.zero_grad()
        loss_of(model, given, step).total.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    settings = replace(few(3), temperature=0.0)
    assert torch.equal(run(model.eval(), range(8), settings).indices, given.indices)


# ---------------------------------------------------------------------------------------- errors


def test_what_does_not_fit_is_named():
    model = masked(MASKGIT)
    given = batch(hidden=(1,))
    with pytest.raises(ValueError, match="needs stages, the tokens hidden"):
        model.logits(given._replace(stages=None))
    with pytest.raises(ValueError, match="of 5 tokens must have 12: all cells in order 'masked'"):
        model.parts(given._replace(indices=given.indices[:, :5]))
    with pytest.raises(ValueError, match=r"num_steps \(13\) must be between 1 and the 12 tokens"):
        run(model, [0], few(13))
    settings = few(4)
    draws = model.draws(0, [0], 5, settings)._replace(passes=None)
    with pytest.raises(ValueError, match="needs numbers for every pass"):
        model.decoder(torch.tensor([0]), 5, draws, settings)
    with pytest.raises(ValueError, match="must be one of those trained on"):
        model.logits(given._replace(num_kept=6))
