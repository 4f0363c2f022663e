"""Source maps for the tokens of real images, before any generator.

Tokens of held-out images are decoded with their own map, with the one that the tokenizer infers
from them, and with the one that it infers from them and the cells at which they open. Beside what
comes back stands how alike the maps are: `agreement` is the share of pairs of cells of which both
maps say the same, that they share a token or that they do not.
"""

from collections.abc import Iterable

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from mergevq.data.layouts import Layout, Source
from mergevq.data.tokens.dataset import TokenBatch
from mergevq.metrics.comparison import Originals, comparison
from mergevq.metrics.extractor import FeatureExtractor
from mergevq.metrics.lpips import Perceptual
from mergevq.tokenizer.tokenizer import Tokenizer


def agreement(one: Int64[Tensor, "b l"], other: Int64[Tensor, "b l"]) -> Float[Tensor, "b"]:
    """Share of pairs of cells that two maps judge alike; names of tokens do not count."""
    same, alike = (index[:, :, None] == index[:, None] for index in (one, other))
    num_cells = one.shape[1]
    # Each cell is like itself, and every pair comes twice.
    hits = (same == alike).sum((1, 2)) - num_cells
    return hits / (num_cells * (num_cells - 1))


def maps_of(tokenizer: Tokenizer, batch: TokenBatch) -> dict[str, Layout]:
    """Layouts of the same tokens by name: `given`, and where images have their own, inferred."""
    codes, side = tokenizer.codes_of_parts(batch.parts), tokenizer.config.grid_size
    found: dict[str, Layout] = {"given": batch.layout}
    if tokenizer.has_maps:
        found["inferred"] = tokenizer.recover(codes, (side, side))
        anchors = batch.source.anchors()
        found["inferred, openings known"] = tokenizer.recover(codes, (side, side), anchors)
    return found


@torch.no_grad()
def measure_maps(
    tokenizer: Tokenizer,
    batches: Iterable[tuple[TokenBatch, Float[Tensor, "b 3 h w"]]],
    extractor: FeatureExtractor | None,
    perceptual: Perceptual | None,
) -> dict[str, dict[str, float]]:
    """Metrics of tokens of real images by the map that they are decoded with.

    Args:
        tokenizer: made the tokens.
        batches: tokens, and the images in [-1, 1] that they are of.
        extractor: of features for the Frechet distance; None leaves it out.
        perceptual: LPIPS; None leaves it out.
    """
    originals = Originals(perceptual, extractor)
    side = tokenizer.config.grid_size
    measured, shares, count = {}, dict[str, float](), 0
    for batch, image in batches:
        original = originals.update(image)
        positions = torch.arange(count, count + len(image))
        count += len(image)
        codes = tokenizer.codes_of_parts(batch.parts)
        for name, layout in maps_of(tokenizer, batch).items():
            if name not in measured:
                measured[name] = comparison(perceptual, extractor)
            measured[name].update(
                original, tokenizer.decode(codes, layout, (side, side)), positions
            )
            if isinstance(layout, Source) and isinstance(batch.layout, Source):
                alike = agreement(layout.index, batch.layout.index).sum().item()
                shares[name] = shares.get(name, 0.0) + alike
    reference = originals.compute()
    return {
        name: {**each.compute(reference), "agreement": shares.get(name, float("nan")) / count}
        for name, each in measured.items()
    }
