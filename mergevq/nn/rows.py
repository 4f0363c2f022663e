"""Whole rows of a table per batch item: selected, and summed with weights.

Shape letters: B batch, N rows of an item, K rows of the result, C channels.
"""

from typing import Any

import torch
from jaxtyping import Float, Int64
from torch import Tensor


def take_rows(table: Float[Tensor, "b n c"], index: Int64[Tensor, "b m"]) -> Float[Tensor, "b m c"]:
    """Rows of each item's table; whole ones, where a gather would go number by number."""
    return torch.nn.functional.embedding(_table_rows(index, table), table.flatten(0, 1))


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


def weighted_sum(
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
