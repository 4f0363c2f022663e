"""Slow and plain definitions that the package's fast code must equal.

Written from the papers' text: source matrices are dense, codebooks are enumerated, one image and
one token at a time, in double precision where rounding would matter.
"""

import itertools
import math

import torch
from torch import Tensor

# ------------------------------------------------------------------------------- token merging


def linear_schedule(num_merged: int, num_layers: int = 12) -> list[int]:
    """Tokens to merge per layer as the authors' code computes them (their `parse_r`)."""

    def ramp(mean: int) -> list[int]:
        first = int(mean * 1.5)
        step = (2 * mean - first - first) / (num_layers - 1)
        return [int(first + step * layer) for layer in range(num_layers)]

    mean = min(range(num_merged + 1), key=lambda mean: abs(sum(ramp(mean)) - num_merged))
    counts = ramp(mean)
    return [counts[0] + num_merged - sum(counts), *counts[1:]]


def matching(keys: Tensor, num_merged: int) -> list[list[int]]:
    """Bipartite soft matching of one image's (N, D) keys: the members of each remaining token.

    Tokens that stay come first: unmerged candidates (odd positions), then destinations (even).
    """
    keys = keys.detach().double()
    unit = keys / keys.norm(dim=1, keepdim=True)
    destinations = list(range(0, len(keys), 2))
    candidates = list(range(1, len(keys), 2))
    best = {}
    for candidate in candidates:
        similarities = [float(unit[candidate] @ unit[other]) for other in destinations]
        partner = similarities.index(max(similarities))
        best[candidate] = (similarities[partner], destinations[partner])
    joining = sorted(candidates, key=lambda candidate: -best[candidate][0])[:num_merged]
    staying = [[candidate] for candidate in candidates if candidate not in joining]
    return staying + [
        [destination, *(candidate for candidate in joining if best[candidate][1] == destination)]
        for destination in destinations
    ]


def step_matrix(groups: list[list[int]]) -> Tensor:
    """The (M, N) matrix of one merging step: 1 where token n is a member of remaining token m."""
    matrix = torch.zeros(len(groups), sum(map(len, groups)))
    for row, members in enumerate(groups):
        matrix[row, members] = 1
    return matrix


def compose(step: Tensor, matrix: Tensor) -> Tensor:
    """Source matrix (M, L) after a step (M, N) on a source matrix (N, L): rows merged by maximum.

    The authors reduce the rows of tokens that join with `amax`.
    """
    return (step[:, :, None] * matrix[None]).amax(1)


def source_matrix(index: Tensor, num_kept: int) -> Tensor:
    """The paper's (K, L) matrix of one image: 1 where grid token l went into kept token k."""
    return (index[None] == torch.arange(num_kept)[:, None]).float()


def canonical_maps(num_tokens: int, num_kept: int) -> list[tuple[int, ...]]:
    """All maps of L cells onto K tokens whose first occurrences are 0, 1, .. K - 1 in order."""
    return [
        cells
        for cells in itertools.product(range(num_kept), repeat=num_tokens)
        if list(dict.fromkeys(cells)) == list(range(num_kept))
    ]


def num_partitions(num_things: int, num_groups: int) -> int:
    """Partitions of things into non-empty groups, by inclusion and exclusion."""
    signed = (
        (-1) ** empty * math.comb(num_groups, empty) * (num_groups - empty) ** num_things
        for empty in range(num_groups + 1)
    )
    return sum(signed) // math.factorial(num_groups)


def attention(query: Tensor, key: Tensor, value: Tensor, sizes: Tensor) -> Tensor:
    """Softmax attention of one head and image, (N, D) each, with log sizes added to the logits."""
    logits = query @ key.T / query.shape[1] ** 0.5 + sizes.log()
    return logits.softmax(-1) @ value


# ------------------------------------------------------------------------ lookup-free quantizer


def codebook(num_bits: int) -> Tensor:
    """All 2**D codes in {-1, +1}; row i holds the bits of i, channel 0 lowest."""
    rows = [[(code >> bit) & 1 for bit in range(num_bits)] for code in range(2**num_bits)]
    return 2 * torch.tensor(rows) - 1


def log_assignments(latents: Tensor, temperature: float) -> Tensor:
    """Log-softmax over the codebook of minus squared distance over temperature, (N, 2**D)."""
    codes = codebook(latents.shape[-1]).to(latents.dtype)
    distances = (latents.reshape(-1, 1, latents.shape[-1]) - codes).square().sum(-1)
    return (-distances / temperature).log_softmax(-1)


def entropy(log_probabilities: Tensor) -> Tensor:
    """Entropy in nats along the last dimension."""
    return -(log_probabilities.exp() * log_probabilities).sum(-1)


def token_entropy(latents: Tensor, temperature: float) -> Tensor:
    """Entropy of each token's soft assignment, (N,)."""
    return entropy(log_assignments(latents, temperature))


def codebook_entropy(latents: Tensor, temperature: float) -> Tensor:
    """Entropy of the mean soft assignment."""
    per_token = log_assignments(latents, temperature)
    return entropy(per_token.logsumexp(0) - math.log(len(per_token)))


def product_codebook_entropy(latents: Tensor, temperature: float) -> Tensor:
    """The same through one matrix product, as it is usually written: logits are 2 z.c."""
    codes = codebook(latents.shape[-1]).to(latents.dtype)
    logits = 2 * latents.flatten(0, -2) @ codes.T / temperature
    return entropy(logits.softmax(-1).mean(0).log())


# -------------------------------------------------------------------------------------- images


def ssim(first: Tensor, second: Tensor, window: Tensor, freedom: int) -> Tensor:
    """SSIM of bytes (B, C, H, W) in float64: every window cut out, its moments about its mean.

    Args:
        first: images.
        second: images.
        window: weights (K, K) that sum to one.
        freedom: 0 for population, 1 for sample variances, which are of a uniform window.
    """
    side, correction = len(window), window.numel() / (window.numel() - freedom)
    x, y = (each.unfold(2, side, 1).unfold(3, side, 1) for each in (first, second))

    def mean(windows: Tensor) -> Tensor:
        return (windows * window).sum((-2, -1), keepdim=True)

    x_mean, y_mean = mean(x), mean(y)
    x_variance = correction * mean((x - x_mean) ** 2)
    y_variance = correction * mean((y - y_mean) ** 2)
    covariance = correction * mean((x - x_mean) * (y - y_mean))
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    similarity = (2 * x_mean * y_mean + c1) * (2 * covariance + c2)
    similarity /= (x_mean**2 + y_mean**2 + c1) * (x_variance + y_variance + c2)
    return similarity.mean((1, 2, 3, 4, 5))


# ------------------------------------------------------------------------------ sets of images


def kernel_distances(
    real: Tensor, fake: Tensor, num_subsets: int, subset_size: int, generator: torch.Generator
) -> Tensor:
    """Unbiased MMD**2 of the cubic kernel over each random subset, in float64."""

    def kernel(x: Tensor, y: Tensor) -> Tensor:
        return (x @ y.T / x.shape[1] + 1) ** 3

    distances = []
    for _ in range(num_subsets):
        x, y = (
            side[torch.randperm(len(side), generator=generator)[:subset_size]].double()
            for side in (real, fake)
        )
        others = ~torch.eye(subset_size, dtype=torch.bool)
        within = kernel(x, x)[others].mean() + kernel(y, y)[others].mean()
        distances.append(within - 2 * kernel(x, y).mean())
    return torch.stack(distances)


def precision_recall(real: Tensor, fake: Tensor, k: int) -> tuple[float, float]:
    """Share of fake points in the balls of real ones, and the reverse, one distance at a time."""
    x, y = real.double(), fake.double()

    def covered(points: Tensor, members: Tensor) -> float:
        radii = [(members - member).square().sum(1).sort().values[k] for member in members]
        inside = [
            bool(((members - point).square().sum(1) <= torch.stack(radii)).any())
            for point in points
        ]
        return sum(inside) / len(inside)

    return covered(y, x), covered(x, y)
