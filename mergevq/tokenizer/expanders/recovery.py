"""The best source map in canonical order, cell by cell on a CPU and by blocks of cells elsewhere.

Source: Li et al. 2025, "MergeVQ", section 3.2 (arXiv:2504.00999), recovers the source; the dynamic
programme and its tree of blocks are ours.

In canonical order each cell opens the next kept token or copies one that is open, and all K are
open in the end. So the state after a cell is how many tokens remain to be opened, and a map is a
path from K - 1 after the first cell to 0 after the last. The programme is a product of matrices,
one for each cell, in which sums stand for products and maxima for sums.

By cells that is a loop, whose few operators each handle one cell of all images: fast on a CPU, but
on a GPU thousands of launches of next to no work. By blocks, matrices of
neighbouring blocks of s cells are multiplied, all pairs at once, until few blocks are left. A block
of s cells opens at most s tokens, so a row of its matrix, for the number of tokens that remain
before it, has s + 1 entries, for the number of its cells that copy. That is more arithmetic and far
fewer operators.

Of maps that score the same the answer is the one with the most tokens open at each cell, and of
tokens that score the same a cell copies the one that opened last. The sums of blocks associate in
another way than those of cells, so the two ways may differ where rounding decides.

Differs: the answer is the best map in canonical order, not the best token of each cell.

Shape letters: B batch, L grid tokens, K kept tokens, M blocks, N pairs of blocks, R remaining
tokens (0 to K - 1), S copying cells of a block.
"""

import math

import torch
from jaxtyping import Float, Int16, Int64
from torch import Tensor

from mergevq.data.layouts import Source

MAX_BLOCKS = 16
"""Blocks that are left for a loop; fewer would be larger, and the last products cost the most."""

MAX_CANDIDATES = 2**26
"""Numbers that are compared at once (256 MiB in float32), if one pair of blocks has no more."""


def most_likely_source(logits: Float[Tensor, "b l k"]) -> Source:
    """The canonical source map with the highest sum of logits.

    It is found exactly, by cells on a CPU and by blocks on other devices, and nothing is read from
    the device. The map is canonical whatever the logits are: one that is not a number counts as the
    lowest, and all are kept within what can be summed.

    Args:
        logits: score of each grid cell for each kept token.

    Raises:
        ValueError: K is above L, so that some token could not open.
    """
    return (source_by_cells if logits.device.type == "cpu" else source_by_blocks)(logits)


@torch.no_grad()
def source_by_cells(logits: Float[Tensor, "b l k"]) -> Source:
    """The source map of `most_likely_source`, in O(L K) and O(L) operators.

    Raises:
        ValueError: K is above L.
    """
    logits = _summable(logits)
    batch, num_tokens, num_kept = logits.shape
    # Best token to copy when the first j + 1 are open, and its score.
    copy_score, copy_index = logits.cummax(-1)
    # By cell first, so that a step over all images reads and writes memory in one piece, in four
    # operations without new memory.
    copy_score, open_score = (t.transpose(0, 1).contiguous() for t in (copy_score, logits))
    best = logits.new_full((batch, num_kept + 1), -torch.inf)
    best[:, 1] = logits[:, 0, 0]
    without, present = best[:, :-1], best[:, 1:]
    copied, opened = torch.empty_like(present), torch.empty_like(present)
    opens = torch.zeros(num_tokens, batch, num_kept, dtype=torch.bool, device=logits.device)
    for cell in range(1, num_tokens):
        torch.add(present, copy_score[cell], out=copied)
        torch.add(without, open_score[cell], out=opened)
        torch.gt(opened, copied, out=opens[cell])
        torch.maximum(copied, opened, out=present)
    # The last open token at each cell, from the last cell back.
    last = torch.zeros(num_tokens, batch, 1, dtype=torch.int64, device=logits.device)
    last[-1] = num_kept - 1
    steps = opens.view(torch.uint8)
    for cell in range(num_tokens - 1, 0, -1):
        torch.sub(last[cell], steps[cell].gather(1, last[cell]), out=last[cell - 1])
    return _source(last[..., 0].T, copy_index)


@torch.no_grad()
def source_by_blocks(logits: Float[Tensor, "b l k"]) -> Source:
    """The source map of `most_likely_source`, in O(L^2 K) and O(log L) operators.

    A product is made in parts of `MAX_CANDIDATES`, so large ones have more operators. 64 images of
    256 cells and K = 144 take 0.2 GiB at most, beside the logits, and those of 1,024 cells and
    K = 256 take 1.1 GiB.

    Raises:
        ValueError: K is above L.
    """
    logits = _summable(logits)
    num_tokens, num_kept = logits.shape[1:]
    copy_score, copy_index = logits.cummax(-1)
    num_steps = num_tokens - 1
    smallest = max(1, math.ceil(num_steps / MAX_BLOCKS))
    sizes = [2**level for level in range((smallest - 1).bit_length() + 1)]
    bands = _single_cells(copy_score, logits, num_steps + -num_steps % sizes[-1])
    choices = []
    for size in sizes[:-1]:
        bands, choice = _products(bands, size)
        choices.append(choice)
    remaining = _through_blocks(bands, sizes[-1])
    while choices:
        _halve(remaining, choices.pop(), sizes[len(choices)])
    return _source(num_kept - 1 - remaining[:, :num_tokens], copy_index)


def _summable(logits: Float[Tensor, "b l k"]) -> Float[Tensor, "b l k"]:
    """Logits whose sum over all cells is finite, so that it tells what is possible."""
    num_tokens, num_kept = logits.shape[1:]
    if num_kept > num_tokens:
        raise ValueError(
            f"num_kept ({num_kept}) must be at most the {num_tokens} cells of the grid"
        )
    most = torch.finfo(logits.dtype).max / (2 * num_tokens)
    return logits.clamp(-most, most).nan_to_num_(nan=-most)


def _source(last: Int64[Tensor, "b l"], copy_index: Int64[Tensor, "b l k"]) -> Source:
    """The map by the last open token at each cell, which opens there or is one of those to copy."""
    before = torch.cat([last[:, :1], last[:, :-1]], 1)
    copy = copy_index.gather(2, last[..., None])[..., 0]
    return Source(torch.where(last > before, last, copy), copy_index.shape[2])


def _single_cells(
    copy_score: Float[Tensor, "b l k"], open_score: Float[Tensor, "b l k"], num_steps: int
) -> Float[Tensor, "b m _ 3"]:
    """Matrices of all cells but the first, then of cells that can only copy, at score 0.

    A block's matrix is kept with s impossible rows before its K, and s impossible entries after the
    s + 1 of a row, so that shifted views of it stay inside.
    """
    batch, num_tokens, num_kept = copy_score.shape
    bands = copy_score.new_full((batch, num_steps, num_kept + 1, 3), -torch.inf)
    # Where r remain, K - r are open.
    bands[:, : num_tokens - 1, 2:, 0] = open_score[:, 1:, 1:].flip(-1)
    bands[:, : num_tokens - 1, 1:, 1] = copy_score[:, 1:].flip(-1)
    bands[:, num_tokens - 1 :, 1:, 1] = 0
    return bands


def _products(
    bands: Float[Tensor, "b m _ w"], size: int
) -> tuple[Float[Tensor, "b n _ v"], Int16[Tensor, "b n r s"]]:
    """Matrices of pairs of blocks, and how many cells of the left half copy in the best way."""
    batch, num_blocks, height, width = bands.shape
    num_kept, num_pairs = height - size, batch * num_blocks // 2
    pairs = bands.view(num_pairs, 2, height, width)
    # Where r remain before and c cells copy: e of them are in the left half, so size - e cells open
    # there, and the right half's row is r - (size - e), its entry c - e. In memory that is as far
    # from the row r - size as r rows, e rows less e entries, and c entries. The smallest e of equal
    # candidates is found, so the most tokens are open between.
    left = pairs[:, 0, size:, : size + 1].mT[..., None]
    shape = (num_pairs, size + 1, num_kept, width)
    right = pairs[:, 1].as_strided(shape, (2 * height * width, width - 1, width, 1))
    joined = bands.new_full((batch, num_blocks // 2, num_kept + 2 * size, 4 * size + 1), -torch.inf)
    best = joined.flatten(0, 1)[:, 2 * size :, :width]
    choice = torch.empty(num_pairs, num_kept, width, dtype=torch.int16, device=bands.device)
    count = max(1, MAX_CANDIDATES // math.prod(shape[1:]))
    for start in range(0, num_pairs, count):
        part = slice(start, start + count)
        best[part], choice[part] = (left[part] + right[part]).max(1)
    return joined, choice.view(batch, num_blocks // 2, num_kept, width)


def _through_blocks(bands: Float[Tensor, "b m _ w"], size: int) -> Int64[Tensor, "b _"]:
    """Remaining tokens before and after each block on the best path; the cells inside are unset."""
    batch, num_blocks, height, _ = bands.shape
    num_kept = height - size
    # Best score from a block's end to the last cell, by the tokens that remain, after impossible
    # ones; so an entry of a window is what follows where so many cells of the block copy.
    after = bands.new_full((batch, height), -torch.inf)
    after[:, size] = 0
    ends = after.unfold(1, size + 1, 1)
    scores = bands.new_empty(batch, num_kept, size + 1)
    steps = bands.new_empty(num_blocks, batch, num_kept, dtype=torch.int64)
    for block in reversed(range(num_blocks)):
        torch.add(bands[:, block, size:, : size + 1], ends, out=scores)
        torch.max(scores, -1, out=(after[:, size:], steps[block]))
    steps -= size
    remaining = bands.new_empty(batch, num_blocks * size + 1, dtype=torch.int64)
    remaining[:, 0] = num_kept - 1
    before = remaining[:, ::size].split(1, 1)
    for block in range(num_blocks):
        step = steps[block].gather(1, before[block])
        torch.add(before[block], step, out=before[block + 1])
    return remaining


def _halve(remaining: Int64[Tensor, "b _"], choice: Int16[Tensor, "b n r s"], size: int) -> None:
    """Set the remaining tokens in the middle of each pair of blocks of so many cells."""
    start, end = remaining[:, : -2 * size : 2 * size], remaining[:, 2 * size :: 2 * size]
    # 2 size - (start - end) cells copy; a row of choices has 2 size + 1.
    place = torch.add(end, start, alpha=2 * size)
    copying = choice.flatten(2)[..., 2 * size :].gather(2, place[..., None])[..., 0]
    middle = remaining[:, size :: 2 * size]
    torch.add(start, copying, out=middle)
    middle -= size
