"""Batches of tokens that follow from the step alone, and rows that are held out."""

from collections.abc import Callable, Iterator

import torch

from mergevq.data.tokens.dataset import TokenBatch, TokenDataset
from mergevq.runtime.random import data_seed, step_generator


def token_batches(
    dataset: TokenDataset,
    *,
    batch_size: int,
    num_steps: int,
    start_step: int = 0,
    seed: int,
    rank: int = 0,
    world_size: int = 1,
    num_kept: Callable[[int], int] | None = None,
) -> Iterator[TokenBatch]:
    """This rank's batches of steps `start_step` to `num_steps - 1`.

    Sample k of the run is row k mod N of an order of its epoch, k // N, as in
    `data.batches.train_batches`.

    Args:
        dataset: N rows; fewer than a batch are fine.
        batch_size: rows per step over all ranks.
        num_steps: length of the whole run.
        start_step: first step to give: those before are skipped without reading anything.
        seed: of the orders.
        rank: which contiguous share of every batch to give.
        world_size: number of ranks.
        num_kept: K of a step; None where there is only one.

    Raises:
        ValueError: a number is impossible.
    """
    if not 0 <= rank < world_size:
        raise ValueError(f"rank ({rank}) must be in [0, world_size ({world_size}))")
    if batch_size < 1 or batch_size % world_size:
        raise ValueError(
            f"batch_size ({batch_size}) must be a positive multiple of the number of ranks "
            f"({world_size})"
        )
    if start_step < 0:
        raise ValueError(f"start_step ({start_step}) must be at least 0")
    if len(dataset) == 0:
        raise ValueError(f"{dataset.directory} has no tokens: none of its images can be read")
    share = batch_size // world_size
    steps = range(start_step, num_steps)
    starts = (step * batch_size + rank * share for step in steps)
    batches = rows_in_order(len(dataset), seed, (range(start, start + share) for start in starts))
    kept = (None if num_kept is None else num_kept(step) for step in steps)
    return (dataset.batch(*arguments) for arguments in zip(batches, kept, strict=True))


def rows_in_order(num_rows: int, seed: int, batches: Iterator[range]) -> Iterator[list[int]]:
    """Turn numbers of samples into rows, batch by batch."""
    epoch, order = -1, torch.empty(0, dtype=torch.int64)
    for batch in batches:
        rows: list[int] = []
        for k in batch:
            if k // num_rows != epoch:
                epoch = k // num_rows
                order = torch.randperm(num_rows, generator=_epoch_generator(seed, epoch))
            rows.append(int(order[k % num_rows]))
        yield rows


def _epoch_generator(seed: int, epoch: int) -> torch.Generator:
    """Random numbers of the order of one epoch."""
    return torch.Generator().manual_seed(data_seed("order", seed, epoch))


def split(dataset: TokenDataset, val_fraction: float) -> tuple[TokenDataset, TokenDataset]:
    """Rows for training and rows held out, an image and its mirror image on the same side.

    Raises:
        ValueError: there are fewer than two images.
    """
    rows_per_image = 2 if dataset.record.flip else 1
    num_images = len(dataset) // rows_per_image
    if num_images < 2:
        raise ValueError(f"{dataset.directory} must have tokens of at least 2 images to hold 1 out")
    num_held_out = min(num_images - 1, max(1, round(num_images * val_fraction)))
    order = torch.randperm(num_images, generator=step_generator(0, "held out", 0))
    sides = (order[num_held_out:], order[:num_held_out])
    offsets = torch.arange(rows_per_image)
    rows = [(side.sort().values[:, None] * rows_per_image + offsets).flatten() for side in sides]
    train_set, val_set = (dataset.subset(side.tolist()) for side in rows)
    return train_set, val_set
