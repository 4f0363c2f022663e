"""Token merging: L grid tokens become K kept tokens and a source map, and back.

Source: Bolya et al. 2023, "Token Merging: Your ViT But Faster", section 3 (arXiv:2210.09461);
Li et al. 2025, "MergeVQ", section 3.2 and appendix A.1 (arXiv:2504.00999).

Differs: the paper's source matrix is never built, an index per grid token does its work in O(L);
kept tokens leave in canonical order (by the lowest raster cell of their group), not in the order
the matching happens to produce; K is any integer, not only a square; distance may count against
similarity, so that near tokens merge first.

Shape letters: B batch, L grid tokens, N tokens at some layer, K kept tokens, C channels, D channels
of a key.
"""

import functools
import itertools
import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from mergevq.config.parts import MergeShape
from mergevq.nn.precision import without_autocast
from mergevq.nn.rows import take_rows, weighted_sum

# The authors' linear schedule runs from 1.5 to 0.5 times its mean (their "inflect" of -0.5).
_LINEAR_INFLECTION = 0.5


@torch.no_grad()
def match(
    keys: Float[Tensor, "b n d"], num_merged: int, places: Float[Tensor, "b n 2"] | None = None
) -> Int64[Tensor, "b n"]:
    """Bipartite soft matching: where each of N tokens goes among the N - num_merged that remain.

    Tokens at even positions are destinations, those at odd positions candidates; the `num_merged`
    candidates most similar (cosine) to a destination join it. The tokens that remain are ordered
    as candidates first, then destinations. A class token is protected by not being passed in.

    Args:
        keys: what tokens are compared by; the paper takes attention keys averaged over heads.
        num_merged: tokens to remove, from 0 to N // 2; equal similarities go to the first.
        places: of tokens, whose distance counts against the cosine; None counts keys alone.

    Raises:
        ValueError: more tokens are to be merged than there are candidates.
    """
    batch, num_tokens, _ = keys.shape
    if not 0 <= num_merged <= num_tokens // 2:
        raise ValueError(
            f"num_merged ({num_merged}) must be between 0 and half of the {num_tokens} tokens; "
            "spread the merging over more layers"
        )
    similarity = _similarity(keys)
    if places is not None:
        similarity = similarity - distance(places)
    # The place of a maximum takes far longer to find than the maximum: for those that join only.
    ranked = similarity.amax(-1).argsort(dim=-1, descending=True, stable=True)
    joins = ranked[:, :num_merged]
    partner = take_rows(similarity, joins).max(-1).indices
    num_staying = ranked.shape[1] - num_merged
    stays = torch.ones_like(ranked, dtype=torch.bool).scatter(1, joins, value=False)
    destination = torch.empty(batch, num_tokens, dtype=torch.int64, device=keys.device)
    destination[:, ::2] = torch.arange(num_staying, num_tokens - num_merged, device=keys.device)
    destination[:, 1::2] = (stays.cumsum(-1) - 1).scatter(1, joins, num_staying + partner)
    return destination


@torch.no_grad()
def merging_order(keys: Float[Tensor, "b n d"]) -> Int64[Tensor, "b c"]:
    """Place of each candidate in the order in which `match` merges them, from 0.

    Args:
        keys: of N tokens, of which those at odd positions are candidates.
    """
    ranked = _similarity(keys).amax(-1).argsort(dim=-1, descending=True, stable=True)
    return ranked.argsort(-1)


def _similarity(keys: Float[Tensor, "b n d"]) -> Float[Tensor, "b c e"]:
    """Cosine of each candidate, at odd positions, with each destination, at even ones."""
    with without_autocast(keys):
        unit = torch.nn.functional.normalize(keys.float(), dim=-1)
        return unit[:, 1::2] @ unit[:, ::2].mT


def distance(places: Float[Tensor, "b n 2"]) -> Float[Tensor, "b c e"]:
    """Distance of each candidate, at odd positions, from each destination, at even ones."""
    return (places[:, 1::2, None] - places[:, None, ::2]).square().sum(-1).sqrt()


@torch.no_grad()
def centres(index: Int64[Tensor, "b l"], num_tokens: int, width: int) -> Float[Tensor, "b n 2"]:
    """Mean row and column of the cells of each token; of whole numbers, so that sums are exact.

    Args:
        index: token of each grid cell; none is without cells.
        num_tokens: N.
        width: cells in a row of the grid.
    """
    batch, num_cells = index.shape
    cells = torch.arange(num_cells, device=index.device)
    inside = torch.stack([cells // width, cells % width, torch.ones_like(cells)], dim=-1).float()
    sums = inside.new_zeros(batch, num_tokens, 3)
    sums = sums.scatter_add(1, index[..., None].expand(-1, -1, 3), inside.expand(batch, -1, -1))
    return sums[..., :2] / sums[..., 2:]


class Merged(NamedTuple):
    """Tokens after one merging step."""

    tokens: Float[Tensor, "b m c"]
    """Size-weighted means."""
    sizes: Float[Tensor, "b m"]
    """Grid tokens in each."""


def merge_step(
    tokens: Float[Tensor, "b n c"],
    sizes: Float[Tensor, "b n"],
    destination: Int64[Tensor, "b n"],
    num_remaining: int,
) -> Merged:
    """Replace tokens by size-weighted means of those with the same destination."""
    new_sizes = sizes.new_zeros(sizes.shape[0], num_remaining).scatter_add(1, destination, sizes)
    # Shares of the new token, not sums to divide: a token alone keeps its bits.
    shares = sizes / new_sizes.gather(1, destination)
    merged = weighted_sum(tokens, shares, destination, num_remaining)
    return Merged(merged.to(tokens.dtype), new_sizes)


def merge_schedule(
    num_tokens: int, num_kept: int, num_layers: int, shape: MergeShape = "linear"
) -> list[int]:
    """Tokens to merge in each layer so that exactly `num_kept` remain after the last.

    Args:
        num_tokens: L, before the first layer.
        num_kept: K, any integer from 1 to L.
        num_layers: merging layers.
        shape: `linear` decreases linearly and equals the authors' code to the last integer,
            `square` decreases with the square (the choice of appendix A.1), `constant` is even.
            No layer merges more than half of its tokens, whatever the shape would ask.

    Raises:
        ValueError: K is out of range, or that many layers cannot get that low.
    """
    _require_reachable(num_tokens, num_kept, num_layers)
    wanted = _wanted(num_tokens - num_kept, num_layers, shape)
    remaining = [num_tokens - total for total in itertools.accumulate(wanted)]
    return legal_schedule(remaining, num_tokens, num_kept)


def legal_schedule(wanted: Sequence[int], num_tokens: int, num_kept: int) -> list[int]:
    """Tokens to merge in each layer: as is wanted, as far as halves and K allow it.

    Args:
        wanted: tokens that are to remain after each layer; after the last it is K in any case.
        num_tokens: L, before the first layer.
        num_kept: K, any integer from 1 to L.

    Raises:
        ValueError: K is out of range, or that many layers cannot get that low.
    """
    num_layers = len(wanted)
    _require_reachable(num_tokens, num_kept, num_layers)
    schedule, remaining = [], num_tokens
    for layer, number in enumerate(wanted):
        # Never below half, never more than the layers that follow can still remove.
        most = min(remaining, num_kept * 2 ** (num_layers - layer - 1))
        least = max((remaining + 1) // 2, num_kept)
        after = min(max(number, least), most)
        schedule.append(remaining - after)
        remaining = after
    return schedule


def _require_reachable(num_tokens: int, num_kept: int, num_layers: int) -> None:
    """Raise `ValueError` unless so many layers leave K of L tokens."""
    if not 1 <= num_kept <= num_tokens:
        raise ValueError(
            f"num_kept ({num_kept}) must be between 1 and the {num_tokens} tokens of the grid"
        )
    if num_tokens > num_kept * 2**num_layers:
        lowest = math.ceil(num_tokens / 2**num_layers)
        raise ValueError(
            f"num_kept ({num_kept}) must be at least {lowest}: each of {num_layers} layers can "
            f"merge at most half of its tokens and the grid has {num_tokens}; keep more tokens or "
            "use more layers"
        )


def _wanted(num_merged: int, num_layers: int, shape: MergeShape) -> list[int]:
    """Counts per layer that sum to `num_merged`, before the limit of a half is applied."""
    if shape == "linear":
        return _linear(num_merged, num_layers)
    power = {"constant": 0, "square": 2}[shape]
    weights = [(num_layers - layer) ** power for layer in range(num_layers)]
    totals = [0]
    for layer in range(num_layers):
        totals.append(round(num_merged * sum(weights[: layer + 1]) / sum(weights)))
    return [after - before for before, after in itertools.pairwise(totals)]


@functools.cache
def _linear(num_merged: int, num_layers: int) -> list[int]:
    """The authors' rule: the integer mean whose ramp sums closest, the rest on the first layer."""

    def ramp(mean: int) -> list[int]:
        first = int(mean * (1 + _LINEAR_INFLECTION))
        step = 2 * (mean - first) / max(num_layers - 1, 1)
        return [int(first + step * layer) for layer in range(num_layers)]

    mean = 0
    while abs(sum(ramp(mean + 1)) - num_merged) < abs(sum(ramp(mean)) - num_merged):
        mean += 1
    counts = ramp(mean)
    counts[0] += num_merged - sum(counts)
    return counts
