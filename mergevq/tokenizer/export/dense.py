"""Merging and source recovery in operators that graph formats have, equal to the library's.

Compilers of other runtimes have no bags of rows, no scatter that all of them compute alike, and no
stable sort; here comparisons of all pairs do their work. Maps are equal to the last integer, sums
to rounding.

Source: Bolya et al. 2023, "Token Merging", section 3 (arXiv:2210.09461); Li et al. 2025, "MergeVQ",
section 3.2 and appendix A (arXiv:2504.00999).

Shape letters: B batch, L grid tokens, N tokens at some layer, M tokens after it, K kept tokens,
C channels, D channels of a key.
"""

from collections.abc import Callable
from typing import no_type_check

import torch
from jaxtyping import Float, Int64
from torch import Tensor
from torch._higher_order_ops.scan import scan
from torch.nn import functional

from mergevq.tokenizer.reducers.matching import distance


def match(
    keys: Float[Tensor, "b n d"], num_merged: int, places: Float[Tensor, "b n 2"] | None = None
) -> Int64[Tensor, "b n"]:
    """Destination of each token; see `reducers.matching.match`.

    Args:
        keys: what tokens are compared by.
        num_merged: tokens to remove, from 0 to N // 2.
        places: whose distance counts against the cosine; None counts keys alone.
    """
    num_tokens = keys.shape[1]
    unit = functional.normalize(keys.float(), dim=-1)
    similarity = unit[:, 1::2] @ unit[:, ::2].mT
    if places is not None:
        similarity = similarity - distance(places)
    best = similarity.amax(-1)
    places = torch.arange(num_tokens // 2, device=keys.device)
    # The rank in a stable descending order: candidates that are more similar, or equal and before.
    ahead = best[:, None, :] > best[:, :, None]
    ahead = ahead | ((best[:, None, :] == best[:, :, None]) & (places[None, :] < places[:, None]))
    joins = ahead.long().sum(-1) < num_merged
    num_staying = num_tokens // 2 - num_merged
    staying = (~joins).long().cumsum(-1) - 1
    candidates = torch.where(joins, num_staying + similarity.argmax(-1), staying)
    destinations = torch.arange(num_staying, num_tokens - num_merged, device=keys.device)
    destinations = destinations.expand(keys.shape[0], -1)
    candidates = functional.pad(candidates, (0, num_tokens % 2))
    return torch.stack([destinations, candidates], -1).flatten(1)[:, :num_tokens]


def centres(index: Int64[Tensor, "b l"], num_tokens: int, width: int) -> Float[Tensor, "b n 2"]:
    """Mean row and column of the cells of each token; see `reducers.matching.centres`."""
    cells = torch.arange(index.shape[1], device=index.device)
    inside = torch.stack([cells // width, cells % width, torch.ones_like(cells)], dim=-1).float()
    rows = torch.arange(num_tokens, device=index.device)[:, None]
    sums = (index[:, None, :] == rows).float() @ inside
    return sums[..., :2] / sums[..., 2:]


def merge_step(
    tokens: Float[Tensor, "b n c"],
    sizes: Float[Tensor, "b n"],
    destination: Int64[Tensor, "b n"],
    num_remaining: int,
) -> tuple[Float[Tensor, "b m c"], Float[Tensor, "b m"]]:
    """Size-weighted means of tokens with the same destination, and their sizes.

    A token alone keeps its bits.
    """
    rows = torch.arange(num_remaining, device=tokens.device)[:, None]
    weights = (destination[:, None, :] == rows).to(sizes.dtype) * sizes[:, None, :]
    new_sizes = weights.sum(-1)
    return (weights / new_sizes[..., None]) @ tokens, new_sizes


def canonicalize(
    index: Int64[Tensor, "b l"], num_kept: int
) -> tuple[Int64[Tensor, "b l"], Int64[Tensor, "b k"]]:
    """Source index in canonical order, and the rank in it of each kept token; none is empty."""
    cells = torch.arange(index.shape[1], device=index.device)
    tokens = torch.arange(num_kept, device=index.device)
    belongs = index[:, None, :] == tokens[:, None]
    anchors = torch.where(belongs, cells, index.shape[1]).amin(-1)
    rank = (anchors[:, None, :] < anchors[:, :, None]).long().sum(-1)
    return rank.gather(1, index), rank


def ordered(tokens: Float[Tensor, "b k c"], rank: Int64[Tensor, "b k"]) -> Float[Tensor, "b k c"]:
    """Tokens by their rank; a product with a permutation, which changes no bit."""
    places = torch.arange(rank.shape[1], device=rank.device)[:, None]
    return (rank[:, None, :] == places).to(tokens.dtype) @ tokens


def copied(tokens: Float[Tensor, "b n c"], index: Int64[Tensor, "b l"]) -> Float[Tensor, "b l c"]:
    """The token of each cell; a product with a matrix of zeros and ones, which changes no bit."""
    rows = torch.arange(tokens.shape[1], device=tokens.device)
    return (index[..., None] == rows).to(tokens.dtype) @ tokens


def most_likely_source(logits: Float[Tensor, "b l k"]) -> Int64[Tensor, "b l"]:
    """Index of the canonical source map with the highest sum of logits, K at most L.

    The dynamic programme of `expanders.recovery.source_by_cells` in loops that graphs have, with
    impossible tokens after the K, so that a graph of any K has loops of one shape.
    """
    batch, num_tokens, num_kept = logits.shape
    impossible = logits.new_full((batch, num_tokens, num_tokens), -torch.inf)
    logits = torch.cat([logits, impossible], -1)[..., :num_tokens]
    copy_score, copy_index = _running_maximum(logits)
    first = torch.arange(num_tokens, device=logits.device) == 0
    lowest = impossible[:, 0]
    start = torch.where(first, logits[:, 0], lowest)

    @no_type_check
    def forward(best: tuple[Tensor], scores: tuple[Tensor, Tensor]) -> tuple[tuple, tuple]:
        """Scores after one more cell, by the number of open tokens, and where it opens one."""
        copied = best[0] + scores[0]
        opened = torch.where(first, lowest, best[0].roll(1, -1)) + scores[1]
        return (torch.maximum(copied, opened),), ((opened > copied).long(),)

    by_cell = [each.transpose(0, 1)[1:] for each in (copy_score, logits)]
    (opens,) = _loop(forward, (start,), tuple(by_cell))
    last = logits.new_zeros((batch, 1), dtype=torch.int64) + (num_kept - 1)

    @no_type_check
    def backward(last: tuple[Tensor], opens: tuple[Tensor]) -> tuple[tuple, tuple]:
        """The last open token of the cell before, and of this one."""
        return (last[0] - opens[0].gather(1, last[0]),), (last[0].clone(),)

    (lasts,) = _loop(backward, (last,), (opens.flip(0),))
    lasts = lasts.flip(0)
    opening = opens.gather(2, lasts) > 0
    copy = copy_index.transpose(0, 1)[1:].gather(2, lasts)
    index = torch.where(opening, lasts, copy)[..., 0].T
    return functional.pad(index, (1, 0))


def _running_maximum(
    values: Float[Tensor, "b l k"],
) -> tuple[Float[Tensor, "b l k"], Int64[Tensor, "b l k"]]:
    """Largest value so far along the last axis and its place, the later of equal ones."""
    places = torch.arange(values.shape[2], device=values.device)
    lowest = torch.full_like(values[..., 0], -torch.inf)

    @no_type_check
    def better(best: tuple[Tensor, Tensor], new: tuple[Tensor, Tensor]) -> tuple[tuple, tuple]:
        """The better of the best and a new value."""
        is_better = new[0] >= best[0]
        value, place = (torch.where(is_better, b, a) for a, b in zip(best, new, strict=True))
        return (value, place), (value.clone(), place.clone())

    start = (lowest, torch.zeros_like(lowest, dtype=torch.int64))
    best, place = _loop(better, start, (values.permute(2, 0, 1), places))
    return best.permute(1, 2, 0), place.permute(1, 2, 0)


def _loop(
    step: Callable[..., tuple[tuple, tuple]], state: tuple[Tensor, ...], rows: tuple[Tensor, ...]
) -> tuple[Tensor, ...]:
    """Results of all steps, stacked: a loop in a graph, and in Python where none is traced.

    Args:
        step: takes a state and one row of each, and returns the next state and a result.
        state: the first.
        rows: along the first axis of each tensor.
    """
    if torch.compiler.is_exporting():
        return tuple(scan(step, state, rows)[1])
    results = []
    for row in zip(*rows, strict=True):
        state, result = step(state, row)
        results.append(result)
    return tuple(torch.stack(each) for each in zip(*results, strict=True))
