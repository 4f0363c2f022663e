"""Classes by a weighted vote of nearest neighbours.

Source: Caron et al. 2021, "Emerging Properties in Self-Supervised Vision Transformers", appendix
F.1 (arXiv:2104.14294), after Wu et al. 2018 (arXiv:1805.01978).

Shape letters: N training images, M images to classify, C channels, Y classes, K neighbours.
"""

from typing import NamedTuple

import torch
from jaxtyping import Float, Int64
from torch import Tensor
from torch.nn import functional

_QUERIES_AT_ONCE = 1024
"""Images looked up at once: a block of similarities must fit into memory."""


class Neighbours(NamedTuple):
    """The training images most similar to each query."""

    similarity: Float[Tensor, "m k"]
    """Cosine, the highest first."""
    position: Int64[Tensor, "m k"]
    """Where among the training images."""


@torch.no_grad()
def nearest(
    queries: Float[Tensor, "m c"],
    bank: Float[Tensor, "n c"],
    num_neighbours: int,
    *,
    own: Int64[Tensor, "m"] | None = None,
) -> Neighbours:
    """Find the features with the highest cosine similarity.

    Args:
        queries: features of the images to classify.
        bank: of the training images, on the device to compute on.
        num_neighbours: K.
        own: position in the bank of each query itself, which is not its own neighbour; None for
            queries that are not in the bank.

    Raises:
        ValueError: there are fewer than K others.
    """
    num_others = len(bank) - (own is not None)
    if num_neighbours > num_others:
        raise ValueError(
            f"k ({num_neighbours}) must be at most the number of training images to choose from "
            f"({num_others})"
        )
    unit = functional.normalize(bank, dim=1)
    found = []
    for start in range(0, len(queries), _QUERIES_AT_ONCE):
        rows = slice(start, start + _QUERIES_AT_ONCE)
        similarity = functional.normalize(queries[rows].to(bank.device), dim=1) @ unit.mT
        if own is not None:
            similarity.scatter_(1, own[rows, None].to(bank.device), -torch.inf)
        found.append(similarity.topk(num_neighbours, dim=1))
    return Neighbours(
        torch.cat([part.values for part in found]).cpu(),
        torch.cat([part.indices for part in found]).cpu(),
    )


def vote(
    neighbours: Neighbours,
    label: Int64[Tensor, "n"],
    num_classes: int,
    num_neighbours: int,
    temperature: float,
) -> Float[Tensor, "m y"]:
    """Log of the votes for each class: exp(similarity / temperature) by each of the nearest.

    Args:
        neighbours: at least as many as shall vote.
        label: of the training images.
        num_classes: Y.
        num_neighbours: how many of the neighbours vote.
        temperature: low lets the nearest decide.

    Returns:
        Minus infinity for a class that no neighbour has.
    """
    logits = neighbours.similarity[:, :num_neighbours].double() / temperature
    # Relative to the highest: exp(1 / 0.001) is no number.
    weights = (logits - logits[:, :1]).exp()
    voted = label[neighbours.position[:, :num_neighbours]]
    votes = weights.new_zeros(len(weights), num_classes).scatter_add(1, voted, weights)
    return votes.log().float()
