"""Every order and every head of a generator keeps these; a new member enters by existing."""

import dataclasses
import functools
import json
from dataclasses import replace
from typing import get_args

import pytest
import torch

from mergevq.config.generator import (
    OneByOne,
    SamplingSettings,
    Several,
)
from mergevq.config.parts.heads import (
    Bits,
    Head,
)
from mergevq.config.parts.orders import (
    Anchored,
    Masked,
    Order,
    Raster,
    Stream,
)
from mergevq.generator import network, seams
from mergevq.generator.bench import made_up_sequences
from mergevq.generator.build import build_generator, load_generator, save_generator
from mergevq.generator.sampling import run as decode
from mergevq.generator.sampling import sample
from mergevq.generator.weights import as_weights
from mergevq.runtime.random import BatchNumbers
from mergevq.runtime.settings import from_json, to_json
from tests.support.generators import FITS, TINY, loss_of, numbers_for

HEADS = get_args(Head) or (Head,)
# Where one kind of order is several models: what else it can be.
VARIANTS = {
    Raster: [Raster(annealing=(0.5, 0.75))],
    Masked: [
        Masked(disentangle=True, visible_weight=0.0),
        Masked(disentangle=True, visible_weight=0.0, reuse=True, masking="beta"),
    ],
    Anchored: [Anchored(gap_in_bits=True)],
    Stream: [Stream(tokens_per_step=4)],
}


def orders_of(member):
    """A kind of order and what else it can be."""
    return [member(), *VARIANTS.get(member, [])]


PAIRS = [
    *((order, HEADS[0]) for member in get_args(Order) for order in orders_of(member)),
    # A head does not know the order, but one that restricts parts and one that does not.
    *((order, head) for head in HEADS[1:] for order in (Raster(), Anchored())),
    (Anchored(gap_in_bits=True), Bits),
    (Raster(), functools.partial(Bits, masking="mixed")),
]
CONFIGS = [
    pytest.param(
        replace(TINY, order=order, head=head(sizes=TINY.head.sizes), **FITS.get(order.kind, {})),
        id=f"{order.kind}{number}-{head().kind}",
    )
    for number, (order, head) in enumerate(PAIRS)
]
EVERY = pytest.mark.parametrize("config", CONFIGS)
NUM_KEPT = 5
LABELS = [0, 1, 2, 0]


def settings_for(config, **changes):
    """Guided sampling in a few passes, if the order can."""
    passes = Several(num_steps=3) if config.order.in_parallel else OneByOne()
    return SamplingSettings(guidance_scale=2.0, passes=passes, **changes)


def built(config):
    """In evaluation mode, with outputs that are random too."""
    model = build_generator(config)
    numbers = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=numbers)
            parameter.copy_(noise * 0.3 + (parameter == 1))
    return model.eval()


def sequences_of(config, rows=4):
    """Random sequences with all that any order needs."""
    numbers = torch.Generator().manual_seed(2)
    cells = config.num_tokens
    source = torch.arange(cells) % NUM_KEPT
    kept = torch.randint(config.num_codes, (rows, NUM_KEPT), generator=numbers)
    later = torch.stack([torch.randperm(cells - 1, generator=numbers) + 1 for _ in range(rows)])
    anchors = torch.nn.functional.pad(later[:, : NUM_KEPT - 1].sort(dim=1).values, (1, 0))
    return seams.Sequences(
        indices=kept[:, source] if config.order.reads == "cells" else kept,
        class_label=torch.arange(rows) % config.num_classes,
        num_kept=NUM_KEPT,
        anchors=anchors,
        source_index=source.expand(rows, -1),
    )


def drawn(model, sequences, step=0):
    return model.draw(sequences, numbers_for(sequences, step))


def sampled(model, labels=LABELS, **changes):
    settings = settings_for(model.config)
    ids = changes.pop("image_ids", range(len(labels)))
    return sample(
        model,
        labels=torch.tensor(labels),
        num_kept=NUM_KEPT,
        seed=changes.pop("seed", 3),
        image_ids=ids,
        settings=replace(settings, **changes),
    )


@EVERY
def test_a_member_fits_its_seam_and_has_a_kind_of_its_own(config):
    model = build_generator(config)
    assert isinstance(model, seams.Generator)
    assert isinstance(model.network.head, network.Head)
    for part in (config.order, config.head):
        assert dataclasses.fields(part)[0].name == "kind"
    kinds = [member().kind for member in get_args(Order)]
    assert len(set(kinds)) == len(kinds)
    assert type(config.order).__doc__
    assert config.order.fills_in <= config.order.in_parallel


@EVERY
def test_settings_come_back_from_json(config):
    written = json.loads(json.dumps(to_json(config)))
    assert written["order"]["kind"] == config.order.kind
    assert from_json(type(config), written) == config


@EVERY
def test_what_is_saved_is_what_is_loaded(config, tmp_path):
    model, given = built(config), sequences_of(config)
    save_generator(model, tmp_path, tokenizer="a" * 64)
    loaded = load_generator(tmp_path)
    assert loaded.config == config
    given = drawn(model, given)
    assert torch.equal(loaded.log_likelihood(given), model.log_likelihood(given))


@EVERY
def test_shapes_are_legal_and_nothing_is_lost_of_probability(config):
    model, given = built(config), sequences_of(config)
    given = drawn(model, given)
    logits = model.logits(given)
    assert [part.shape for part in logits] == [
        (4, config.num_states(NUM_KEPT), size) for size in config.part_sizes
    ]
    assert all(part.dtype == torch.float32 for part in logits)
    assert all((part > -torch.inf).any(-1).all() for part in logits)
    likelihood = model.log_likelihood(given)
    assert likelihood.shape == (4,)
    assert (likelihood < 0).all()
    assert model.num_inputs(NUM_KEPT) >= config.num_prefix


@EVERY
def test_training_starts_uniform_and_reaches_every_weight(config):
    torch.manual_seed(0)
    model = build_generator(replace(config, label_smoothing=0.0, qk_norm=True))
    assert all(torch.isfinite(weight).all() for weight in model.parameters())
    given = sequences_of(config)
    loss = loss_of(model, given)
    legal = [(part > -torch.inf).sum(-1) for part in model.logits(drawn(model, given))]
    assert [int(count.max()) for count in legal[-2:]] == list(config.head.sizes)
    uniform = torch.stack([count.float().log().mean() for count in legal])
    torch.testing.assert_close(loss.parts, uniform)
    assert len(loss.parts) == len(config.part_names)
    torch.testing.assert_close(loss.total, loss.parts.sum())
    model = built(replace(config, qk_norm=True)).train()
    loss_of(model, given).total.backward()
    for name, weight in model.named_parameters():
        assert weight.grad is not None, name
        assert torch.isfinite(weight.grad).all(), name


@EVERY
def test_the_same_numbers_give_the_same_bits(config):
    model, given = built(config), sequences_of(config)
    losses = []
    for step in (0, 0, 1):
        model.train()
        torch.manual_seed(0)
        losses.append(loss_of(model, given, step).total)
    assert torch.equal(losses[0], losses[1])
    assert not torch.equal(losses[0], losses[2])


@EVERY
def test_a_share_of_a_batch_draws_what_the_whole_batch_would(config):
    model, given = built(config).train(), sequences_of(config)
    whole = drawn(model, given)
    numbers = BatchNumbers(seed=0, step=0, num_rows=4, rows=slice(2, 4))
    share = model.draw(given.cut(2)[1], numbers)
    for ours, theirs in zip(share, whole.cut(2)[1], strict=True):
        assert torch.equal(ours, theirs) if torch.is_tensor(ours) else ours == theirs


@EVERY
def test_a_sequence_does_not_depend_on_its_batch(config):
    model, given = built(config), sequences_of(config)
    given = drawn(model, given)
    together = model.log_likelihood(given)
    for row, alone in enumerate(given.cut(4)):
        torch.testing.assert_close(
            model.log_likelihood(alone)[0], together[row], rtol=1e-5, atol=1e-4
        )


@pytest.mark.parametrize(
    # Every order; that other heads draw as the first does takes longer.
    "config",
    [
        config if head is HEADS[0] else pytest.param(*config.values, marks=pytest.mark.slow)
        for config, (_, head) in zip(CONFIGS, PAIRS, strict=True)
    ],
)
def test_an_image_depends_on_seed_and_number_alone(config):
    model = built(config)
    together = sampled(model)
    for number in (1, 3):
        alone = sampled(model, [LABELS[number]], image_ids=[number])
        for ours, theirs in zip(alone[:3], together[:3], strict=True):
            assert (ours is None and theirs is None) or torch.equal(ours[0], theirs[number])
    assert not torch.equal(sampled(model, seed=4).indices, together.indices)
    assert torch.equal(sampled(model).indices, together.indices)


@EVERY
def test_samples_are_sequences_that_can_be_learned_from(config):
    model = built(config)
    found = sampled(model)
    given = seams.Sequences(
        indices=found.indices,
        class_label=torch.tensor(LABELS),
        num_kept=NUM_KEPT,
        anchors=found.anchors,
        source_index=found.source_index,
    )
    assert found.indices.shape == (4, config.length(NUM_KEPT))
    assert 0 <= int(found.indices.min()) <= int(found.indices.max()) < config.num_codes
    assert found.num_forward >= 1
    assert found.kv_bytes >= 0
    assert torch.isfinite(loss_of(model, given).total)


@EVERY
def test_a_decoder_goes_on_from_any_step(config):
    model, settings = built(config), settings_for(config)
    draws = model.draws(0, range(4), NUM_KEPT, settings)
    decoder = model.decoder(torch.tensor(LABELS), NUM_KEPT, draws, settings)
    decode(decoder)
    whole = decoder.parts().clone()
    history = model.parts(made_up_sequences(config, 4, model.device))
    for step in (decoder.num_steps - 1, 1):
        decoder.seek(step, history)
        for _ in range(step, decoder.num_steps):
            decoder.step()
        assert decoder.parts().shape == whole.shape
    decode(decoder)
    assert torch.equal(decoder.parts(), whole)


@EVERY
def test_autocast_gives_a_float32_loss_near_to_the_exact_one(config):
    model, given = built(config), sequences_of(config)
    expected = loss_of(model, given).total
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = loss_of(model, given).total
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, expected, rtol=0.05, atol=0)


@EVERY
@pytest.mark.parametrize("weights", [pytest.param("fp16", marks=pytest.mark.slow), "bf16", "int8"])
def test_weights_of_other_types_sample_too(config, weights):
    found = sampled(as_weights(built(config), weights)).indices
    assert found.shape == (len(LABELS), config.length(NUM_KEPT))


@EVERY
def test_broken_weights_do_not_sample(config):
    model = built(config)
    with torch.no_grad():
        model.network.blocks[0].ffn.down.weight[0, 0] = torch.nan
    with pytest.raises(RuntimeError, match="states or logits are not finite"):
        sampled(model)
