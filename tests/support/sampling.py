"""Helpers that the tests of `mergevq.generator.sampling` share."""

from dataclasses import replace

import torch

from mergevq.config.generator import (
    SamplingSettings,
)
from mergevq.generator.sampling import inpaint, sample

PLAIN = SamplingSettings()


def run(model, labels, settings=PLAIN, *, seed=0, image_ids=None, num_kept=5):
    image_ids = range(len(labels)) if image_ids is None else image_ids
    return sample(
        model,
        labels=torch.tensor(labels),
        num_kept=num_kept,
        seed=seed,
        image_ids=image_ids,
        settings=settings,
    )


def inpainted(model, indices, keep, labels, **changes):
    settings = replace(PLAIN, **changes)
    return inpaint(
        model,
        indices=indices,
        keep=keep,
        labels=torch.tensor(labels),
        seed=0,
        image_ids=range(len(labels)),
        settings=settings,
    )
