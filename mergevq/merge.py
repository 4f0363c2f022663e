"""Token merging: L grid tokens become K kept tokens and a source map, and back.

Source: Bolya et al. 2023, "Token Merging: Your ViT But Faster", section 3 (arXiv:2210.09461);
Li et al. 2025, "MergeVQ", section 3.2 and appendix A.1 (arXiv:2504.00999).

Differs: the paper's source matrix is never built, an index per grid token does its work in O(L);
kept tokens leave in canonical order (by the lowest raster cell of their group), not in the order
the matching happens to produce; K is any integer, not only a square.

Shape letters: B batch, L grid tokens, N tokens at some layer, K kept tokens, C channels, D channels
of a key.
"""

import functools
import itertools
import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from mergevq.config import MergeShape

# The authors' linear schedule runs from 1.5 to 0.5 times its mean (their "inflect" of -0.5).
_LINEAR_INFLECTION = 0.5


class Bits(NamedTuple):
    """What storing one image costs, in bits."""

    tokens: float
    """K tokens of D bits each."""
    source: float
    """The source map: log2 of the number of maps that exist for this L and K."""

    @property
    def total(self) -> float:
        """Tokens and source."""
        return self.tokens + self.source


@dataclass(frozen=True, slots=True)
class Source:
    """Which kept token each grid token went into.

    The paper's source matrix S of shape (B, K, L) is `one_hot(index).mT`. In canonical order the
    map is a causal sequence: in raster order every cell either opens the next kept token or copies
    one that is open.
    """

    index: Int64[Tensor, "b l"]
    """Position of the kept token, in [0, num_kept)."""

    num_kept: int
    """K."""

    def sizes(self) -> Int64[Tensor, "b k"]:
        """Grid tokens per kept token; each row sums to L."""
        zeros = self.index.new_zeros(self.index.shape[0], self.num_kept)
        return zeros.scatter_add(1, self.index, torch.ones_like(self.index))

    def anchors(self) -> Int64[Tensor, "b k"]:
        """Lowest raster cell of each kept token's group; increasing in canonical order.

        A kept token that no cell points to, as a predicted source may have, gets L.
        """
        batch, num_tokens = self.index.shape
        cells = torch.arange(num_tokens, device=self.index.device).expand(batch, -1)
        last = self.index.new_full((batch, self.num_kept), num_tokens)
        return last.scatter_reduce(1, self.index, cells, reduce="amin")

    def bits(self, num_bits: int) -> Bits:
        """Bits of one image: its K tokens of `num_bits` each, and its source map.

        The source is counted as an index into all maps of L cells onto K tokens in canonical
        order, of which there are as many as partitions of L things into K groups: the shortest
        code of one length for all, and the same number for every image.
        """
        num_tokens = self.index.shape[1]
        return Bits(self.num_kept * num_bits, source_bits(num_tokens, self.num_kept))


@functools.cache
def source_bits(num_tokens: int, num_kept: int) -> float:
    """Log2 of the Stirling number of the second kind S(num_tokens, num_kept).

    Example:
        Three cells onto two tokens: 0 0 1, 0 1 0 and 0 1 1.

        >>> round(2 ** source_bits(3, 2))
        3
    """
    # S(n, k) = k S(n-1, k) + S(n-1, k-1); Python's integers keep it exact at any size.
    row = [1] + [0] * num_kept
    for _ in range(num_tokens):
        row = [0] + [k * row[k] + row[k - 1] for k in range(1, num_kept + 1)]
    return math.log2(row[num_kept])


def merge(grid: Float[Tensor, "b l c"], source: Source) -> Float[Tensor, "b k c"]:
    """Average the grid tokens that share a kept token; one that no cell points to is 0."""
    sizes = source.sizes().to(torch.promote_types(grid.dtype, torch.float32))
    shares = 1 / sizes.gather(1, source.index)
    return _weighted_sum(grid, shares, source.index, source.num_kept).to(grid.dtype)


def take_rows(table: Float[Tensor, "b n c"], index: Int64[Tensor, "b m"]) -> Float[Tensor, "b m c"]:
    """Rows of each item's table; whole ones, where a gather would go number by number."""
    return torch.nn.functional.embedding(_table_rows(index, table), table.flatten(0, 1))


def unmerge(kept: Float[Tensor, "b k c"], source: Source) -> Float[Tensor, "b l c"]:
    """Copy each kept token to every grid cell it stands for (paper, equation 11)."""
    return take_rows(kept, source.index)


@torch.no_grad()
def match(keys: Float[Tensor, "b n d"], num_merged: int) -> Int64[Tensor, "b n"]:
    """Bipartite soft matching: where each of N tokens goes among the N - num_merged that remain.

    Tokens at even positions are destinations, those at odd positions candidates; the `num_merged`
    candidates most similar (cosine) to a destination join it. The tokens that remain are ordered
    as candidates first, then destinations. A class token is protected by not being passed in.

    Args:
        keys: what tokens are compared by; the paper takes attention keys averaged over heads.
        num_merged: tokens to remove, from 0 to N // 2; equal similarities go to the first.

    Raises:
        ValueError: more tokens are to be merged than there are candidates.
    """
    batch, num_tokens, _ = keys.shape
    if not 0 <= num_merged <= num_tokens // 2:
        raise ValueError(
            f"num_merged ({num_merged}) must be between 0 and half of the {num_tokens} tokens; "
            "spread the merging over more layers"
        )
    # On the meta device, where products are counted, there is no autocast.
    with torch.autocast("cpu" if keys.is_meta else keys.device.type, enabled=False):
        unit = torch.nn.functional.normalize(keys.float(), dim=-1)
        similarity = unit[:, 1::2] @ unit[:, ::2].mT
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
    merged = _weighted_sum(tokens, shares, destination, num_remaining)
    return Merged(merged.to(tokens.dtype), new_sizes)


class Canonical(NamedTuple):
    """Kept tokens in canonical order."""

    source: Source
    """The source map of the ordered tokens."""
    order: Int64[Tensor, "b k"]
    """Position each of them had before; `take_rows(tokens, order)` orders them."""


def canonicalize(source: Source) -> Canonical:
    """Sort kept tokens by anchor, the lowest raster cell of their group."""
    order = source.anchors().argsort(-1)
    rank = order.argsort(-1)
    return Canonical(Source(rank.gather(1, source.index), source.num_kept), order)


@torch.no_grad()
def most_likely_source(logits: Float[Tensor, "b l k"]) -> Source:
    """The canonical source map with the highest sum of logits.

    In canonical order each cell opens the next kept token or copies one that is open, and all K are
    open in the end. The best such map is found exactly by dynamic programming over cells and open
    tokens, in O(L K).

    Args:
        logits: score of each grid cell for each kept token.

    Raises:
        ValueError: K is above L, so that some token could not open.
    """
    batch, num_tokens, num_kept = logits.shape
    if num_kept > num_tokens:
        raise ValueError(
            f"num_kept ({num_kept}) must be at most the {num_tokens} cells of the grid"
        )
    # Best token to copy when the first j + 1 are open, and its score.
    copy_score, copy_index = logits.cummax(-1)
    best = logits.new_full((batch, num_kept), -torch.inf)
    best[:, 0] = logits[:, 0, 0]
    opens = torch.zeros(batch, num_tokens, num_kept, dtype=torch.bool, device=logits.device)
    for cell in range(1, num_tokens):
        copied = best + copy_score[:, cell]
        opened = torch.full_like(best, -torch.inf)
        opened[:, 1:] = best[:, :-1] + logits[:, cell, 1:]
        opens[:, cell] = opened > copied
        best = torch.maximum(copied, opened)
    rows = torch.arange(batch, device=logits.device)
    last = torch.full_like(rows, num_kept - 1)
    index = torch.zeros(batch, num_tokens, dtype=torch.int64, device=logits.device)
    for cell in range(num_tokens - 1, 0, -1):
        opening = opens[rows, cell, last]
        index[:, cell] = torch.where(opening, last, copy_index[rows, cell, last])
        last = last - opening.long()
    return Source(index, num_kept)


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
    wanted = _wanted(num_tokens - num_kept, num_layers, shape)
    schedule, remaining, total = [], num_tokens, 0
    for layer, count in enumerate(wanted):
        total += count
        # Never below half, never more than the layers that follow can still remove.
        most = min(remaining, num_kept * 2 ** (num_layers - layer - 1))
        least = max((remaining + 1) // 2, num_kept)
        after = min(max(num_tokens - total, least), most)
        schedule.append(remaining - after)
        remaining = after
    return schedule


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


class _WeightedSum(torch.autograd.Function):
    """Sums of weighted tokens by destination; the weights have no gradient.

    As bags of rows of one table: each sum is read and written once, by one thread, where a scatter
    would go number by number, and on GPUs in no fixed order. Torch's own gradient of bags does not
    know that every row is in one bag, and takes nearly three times as long.
    """

    @staticmethod
    def forward(
        ctx: Any,  # noqa: ANN401
        tokens: Float[Tensor, "b n c"],
        weights: Float[Tensor, "b n"],
        destination: Int64[Tensor, "b n"],
        num_out: int,
    ) -> Float[Tensor, "b m c"]:
        ctx.save_for_backward(weights, destination)
        order = destination.argsort(dim=-1, stable=True)
        counts = destination.new_zeros(destination.shape[0], num_out)
        counts = counts.scatter_add(1, destination, torch.ones_like(destination)).flatten()
        sums = torch.nn.functional.embedding_bag(
            _table_rows(order, tokens).flatten(),
            tokens.flatten(0, 1),
            counts.cumsum(0) - counts,
            mode="sum",
            per_sample_weights=weights.gather(1, order).flatten(),
        )
        return sums.unflatten(0, (-1, num_out))

    @staticmethod
    def backward(
        ctx: Any,  # noqa: ANN401
        *grads: Float[Tensor, "b m c"],
    ) -> tuple[Tensor | None, ...]:
        weights, destination = ctx.saved_tensors
        rows = torch.nn.functional.embedding_bag(
            _table_rows(destination, grads[0]).view(-1, 1),
            grads[0].flatten(0, 1),
            mode="sum",
            per_sample_weights=weights.reshape(-1, 1),
        )
        return rows.unflatten(0, destination.shape), None, None, None


def _weighted_sum(
    tokens: Float[Tensor, "b n c"],
    weights: Float[Tensor, "b n"],
    destination: Int64[Tensor, "b n"],
    num_out: int,
) -> Float[Tensor, "b m c"]:
    """Sum in float32 at least, so that large groups keep their bits."""
    return _WeightedSum.apply(tokens.to(weights.dtype), weights, destination, num_out)


def _table_rows(index: Int64[Tensor, "b m"], items: Float[Tensor, "b n c"]) -> Int64[Tensor, "b m"]:
    """Rows of all items under each other that an index into each item means."""
    return index + items.shape[1] * torch.arange(items.shape[0], device=items.device)[:, None]
