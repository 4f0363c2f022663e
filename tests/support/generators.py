"""Tiny generators with random weights, and batches for them."""

from dataclasses import replace
from typing import get_args

import torch

from mergevq.config.generator import (
    GeneratorConfig,
)
from mergevq.config.parts.heads import (
    Subindices,
)
from mergevq.config.parts.orders import (
    Order,
)
from mergevq.generator.build import build_generator
from mergevq.generator.seams import Sequences
from mergevq.runtime.random import BatchNumbers

ORDERS = ("raster", "merge", "random", "anchor")
"""Those of the autoregressive family, by kind."""
KINDS = {member().kind: member for member in get_args(Order)}
GOES_WITH = {
    ("model.order", "raster"): {
        "model.num_kept": 64,
        "model.kept_candidates": (64,),
        "kept.candidates": (64,),
    },
    ("sampling.passes", "several"): {"model.order.kind": "random"},
}
"""Changes to the run of `digits32_ar` that a part of some kind needs beside it."""
FITS = {"scale": {"grid_size": (4, 4)}}
"""Sizes that an order needs, by kind."""
TINY = GeneratorConfig(
    dim=32,
    num_layers=2,
    num_heads=2,
    ffn_dim=48,
    num_classes=3,
    grid_size=(3, 4),
    num_kept=5,
    kept_candidates=(5, 7),
    head=Subindices(sizes=(4, 8)),
)
_PARTS = {
    "annealing": "order",
    "gap_in_bits": "order",
    "window": "order",
    "groups": "order",
    "flex_attention": "order",
    "rotate_instruction": "order",
    "masking": "order",
    "visible_weight": "order",
    "disentangle": "order",
    "num_decoder_layers": "order",
    "reuse": "order",
    "tokens_per_step": "order",
    "num_holistic": "order",
    "sizes": "head",
    "num_head_layers": "head",
}


def changed(config, *, order=None, **values):
    """The same generator with another kind of order, another head, or other settings of these."""
    parts = {
        "order": KINDS[order]() if order else config.order,
        "head": values.pop("head", config.head),
    }
    for name, part in _PARTS.items():
        if name in values:
            setting = name.removeprefix("num_head_") if part == "head" else name
            setting = "num_layers" if name == "num_head_layers" else setting
            parts[part] = replace(parts[part], **{setting: values.pop(name)})
    return replace(config, **parts, **values)


# Figure 6 of the paper: clusters P1 P1 P3 P3 P5 P5 P5 P8 P8, window 2. Row 5, say, is the second
# P5: it sees itself, the two before it, and P1 and P3 where they first occurred.
CLUSTERS = torch.tensor([[1, 1, 3, 3, 5, 5, 5, 8, 8]])
FIGURE_6 = torch.tensor(
    [
        [1, 0, 0, 0, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0, 0, 0, 0],
        [1, 1, 1, 0, 0, 0, 0, 0, 0],
        [1, 1, 1, 1, 0, 0, 0, 0, 0],
        [1, 0, 1, 1, 1, 0, 0, 0, 0],
        [1, 0, 1, 1, 1, 1, 0, 0, 0],
        [1, 0, 1, 0, 1, 1, 1, 0, 0],
        [1, 0, 1, 0, 1, 1, 1, 1, 0],
        [1, 0, 1, 0, 1, 0, 1, 1, 1],
    ]
)


def tiny_generator(order, **changes):
    """In evaluation mode; outputs are random too, or every logit would be zero."""
    model = build_generator(changed(TINY, order=order, **{**FITS.get(order, {}), **changes}))
    numbers = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=numbers)
            parameter.copy_(noise * 0.3 + (parameter == 1))
    return model.eval()


def tiny_batch(order, *, batch=4, num_kept=5, num_codes=5, config=TINY):
    """Sequences with many duplicates."""
    numbers = torch.Generator().manual_seed(2)
    length = num_kept if order in {"random", "anchor"} else config.num_tokens
    codes = torch.randperm(config.num_codes, generator=numbers)[:num_codes]
    picked = torch.randint(num_codes, (batch, length), generator=numbers)
    given = Sequences(
        indices=codes[picked],
        class_label=torch.arange(batch) % (config.num_classes + 1),
        num_kept=num_kept,
    )
    if order == "anchor":
        cells = [torch.randperm(config.num_tokens - 1, generator=numbers) + 1 for _ in range(batch)]
        later = torch.stack(cells)[:, : num_kept - 1].sort(dim=1).values
        given = given._replace(anchors=torch.nn.functional.pad(later, (1, 0)))
    if order == "random":
        orders = [torch.randperm(num_kept, generator=numbers) for _ in range(batch)]
        given = given._replace(slots=torch.stack(orders))
    return given


def numbers_for(sequences, step=0):
    """Random numbers of one batch, all of it at hand."""
    rows = len(sequences.indices)
    return BatchNumbers(seed=0, step=step, num_rows=rows, rows=slice(None))


def loss_of(model, sequences, step=0):
    """Loss of a batch of which everything that is random is drawn first."""
    return model(model.draw(sequences, numbers_for(sequences, step)))
