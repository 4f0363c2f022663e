"""A generator that has seen a few sequences often enough says them by heart, in every order."""

from dataclasses import replace

import pytest
import torch

from mergevq.config.generator import (
    SamplingSettings,
)
from mergevq.data.layouts import Source, canonicalize
from mergevq.generator.build import build_generator
from mergevq.generator.sampling import sample
from mergevq.generator.seams import Sequences
from tests.support.generators import KINDS, ORDERS, TINY, loss_of

NUM_SEQUENCES = 32
NUM_KEPT = 5
MOST_STEPS = 600


def sequences(order):
    """Random tokens, one class for each, as sequences."""
    config = replace(
        TINY,
        order=KINDS[order](),
        dim=64,
        ffn_dim=128,
        num_classes=NUM_SEQUENCES,
        kept_candidates=(12,) if order == "raster" else (NUM_KEPT,),
        num_kept=12 if order == "raster" else NUM_KEPT,
        dropout=0.0,
        class_dropout=0.0,
        label_smoothing=0.0,
    )
    numbers = torch.Generator().manual_seed(0)
    codes = torch.stack(
        [torch.randperm(32, generator=numbers)[: config.num_kept] for _ in range(NUM_SEQUENCES)]
    )
    maps = torch.randint(config.num_kept, (NUM_SEQUENCES, 12), generator=numbers)
    for row in maps:
        row[torch.randperm(12, generator=numbers)[: config.num_kept]] = torch.arange(
            config.num_kept
        )
    source, _ = canonicalize(Source(maps, config.num_kept))
    return config, Sequences(
        indices=codes.gather(1, source.index) if order == "merge" else codes,
        class_label=torch.arange(NUM_SEQUENCES),
        num_kept=config.num_kept,
        anchors=source.anchors() if order == "anchor" else None,
    )


def said_by_heart(model, given):
    """Whether the most likely sequence of each class is the one it was shown."""
    model.eval()
    sampled = sample(
        model,
        labels=given.class_label,
        num_kept=model.config.num_kept,
        seed=0,
        image_ids=range(NUM_SEQUENCES),
        settings=SamplingSettings(temperature=0.0),
    )
    model.train()
    same = torch.equal(sampled.indices, given.indices)
    return same and (given.anchors is None or torch.equal(sampled.anchors, given.anchors))


@pytest.mark.slow
@pytest.mark.parametrize("order", ORDERS)
def test_what_was_seen_often_is_said_by_heart(order):
    config, given = sequences(order)
    torch.manual_seed(0)
    model = build_generator(config).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for step in range(1, MOST_STEPS + 1):
        optimizer.zero_grad()
        loss = loss_of(model, given, step)
        loss.total.backward()
        optimizer.step()
        if step % 50 == 0 and said_by_heart(model, given):
            break
    # Order `random` says them in an order that it may never have seen.
    assert said_by_heart(model, given), f"after {step} steps at {float(loss.nll):.3f} nats a token"
