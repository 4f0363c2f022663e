"""Tiny generators with random weights, and batches for them."""

from dataclasses import replace

import torch

from mergevq.config.generator import GeneratorConfig
from mergevq.generator.autoregressive import Generator

ORDERS = ("raster", "merge", "random", "anchor")
TINY = GeneratorConfig(
    dim=32,
    num_layers=2,
    num_heads=2,
    ffn_dim=48,
    num_head_layers=1,
    num_classes=3,
    grid_size=(3, 4),
    num_kept=5,
    kept_candidates=(5, 7),
    num_bits=5,
    factor_bits=(2, 3),
)

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
    model = Generator(replace(TINY, order=order, **changes))
    numbers = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=numbers)
            parameter.copy_(noise * 0.3 + (parameter == 1))
    return model.eval()


def tiny_batch(order, *, batch=4, num_kept=5, num_codes=5, config=TINY):
    """Sequences with many duplicates, as keywords of `Generator.logits` and the rest."""
    numbers = torch.Generator().manual_seed(2)
    length = num_kept if order in {"random", "anchor"} else config.num_tokens
    codes = torch.randperm(2**config.num_bits, generator=numbers)[:num_codes]
    picked = torch.randint(num_codes, (batch, length), generator=numbers)
    given = {
        "indices": codes[picked],
        "class_label": torch.arange(batch) % (config.num_classes + 1),
        "num_kept": num_kept,
    }
    if order == "anchor":
        cells = [torch.randperm(config.num_tokens - 1, generator=numbers) + 1 for _ in range(batch)]
        later = torch.stack(cells)[:, : num_kept - 1].sort(dim=1).values
        given["anchors"] = torch.nn.functional.pad(later, (1, 0))
    if order == "random":
        orders = [torch.randperm(num_kept, generator=numbers) for _ in range(batch)]
        given["order"] = torch.stack(orders)
    return given
