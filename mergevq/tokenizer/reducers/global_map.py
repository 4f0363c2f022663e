"""Transformer blocks, and means over groups of cells that are learned, the same for all images.

Each cell of the grid has a learned embedding; average linkage of their cosines gives the groups of
any K, and those of fewer tokens are unions of those of more. The map costs no bits, as of `pool`.

Source: Lee and Hong 2026, "Variable-Length Tokenization via Learnable Global Merging for Diffusion
Transformers" (LGM, arXiv:2606.20076; movinghoon/lgm), written from a description of its code.

Differs: tokens have places, so that quadrants of the grid take the place of the authors' four runs
of a list, and embeddings start from positions, without which cells far from each other would share
a token; exploration noise is symmetric, and drawn from a seed made of the embeddings; gradients
reach embeddings through the means alone, since codes are copied back to cells by the map.

Shape letters: B batch, L grid tokens, K kept tokens, C channels, E channels of embeddings.
"""

import hashlib
import math
from dataclasses import replace

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn
from torch.nn import functional

from mergevq.config import parts as settings
from mergevq.data.layouts import Source, blocks, merge
from mergevq.nn.blocks import EncoderBlock
from mergevq.nn.checks import require_finite
from mergevq.nn.positions import sincos_2d, to_grid, to_tokens
from mergevq.nn.precision import without_autocast
from mergevq.runtime import distributed
from mergevq.runtime.device import send
from mergevq.runtime.random import step_generator
from mergevq.tokenizer.reducers.stages import Reduction, Stages
from mergevq.tokenizer.seams import TokenSet

_APART = 100.0
"""Added to the distance of cells in two quadrants, so that these join last of all."""
_BITS = 20
"""Bits of embeddings that a map is made from: sums of their products are exact in 64."""


class GlobalMap(nn.Module):
    """Blocks of attention, of which the first see all cells and the others means over groups."""

    def __init__(self, config: settings.GlobalMap, dim: int, grid_size: int) -> None:
        """Make the blocks, which the encoder initialises after its projection, and embeddings.

        Args:
            config: settings.
            dim: channels.
            grid_size: cells on each side of the trained grid, which have an embedding each.
        """
        super().__init__()
        self.config = config
        self.grid_shape = (grid_size, grid_size)
        self.num_grid_layers = config.num_grid_layers
        self.blocks = nn.ModuleList(
            EncoderBlock(dim, config.num_heads, config.layer_scale, config.norm_eps)
            for _ in range(config.num_layers)
        )
        # Sines and cosines come in pairs, for rows and for columns.
        places = sincos_2d(self.grid_shape, 4 * math.ceil(dim / 4))
        self.embedding = nn.Parameter(places + config.start_noise * torch.randn(places.shape))
        self.checkpointing = False

    def forward(
        self,
        grid: Float[Tensor, "b l c"],
        class_token: Float[Tensor, "b 1 c"],
        grid_shape: tuple[int, int],
        num_kept: int,
        *,
        num_layers: int | None = None,
        taps: tuple[int, ...] = (),
    ) -> TokenSet:
        """Run the first `num_layers` blocks (None: all); cells are averaged behind the grid's.

        In training groups are those of distances with noise, and there is the loss `align`.
        """
        recompute = self.checkpointing and self.training
        losses: dict[str, Float[Tensor, ""]] = {}

        def means(cells: Float[Tensor, "b l c"], num_kept: int) -> tuple[Source, Reduction]:
            layout = self.implied(grid_shape, num_kept, len(cells))
            layout = replace(layout, index=send(layout.index, cells.device))
            if not self.training:
                return layout, lambda cells: merge(cells, layout)
            embedding = resized(self.embedding, self.grid_shape, grid_shape)
            with without_autocast(cells):
                losses["align"] = alignment(embedding, cells, grid_shape, self.config.align_margin)
                index, temperature = layout.index[0], self.config.temperature
                assigned = assignment(embedding, index, num_kept, temperature)
            return layout, lambda cells: means_of(cells, assigned)

        stages = Stages(self.blocks, self.num_grid_layers, num_layers, recompute)
        out = stages.run(grid, class_token, num_kept, means, taps)
        return out._replace(losses=losses or None)

    def implied(self, grid_shape: tuple[int, int], num_kept: int, num_images: int) -> Source:
        """The map of a grid's cells to K tokens, for each of the images.

        Embeddings decide it; in training, while they learn, with the noise of the step. On the meta
        device, where they have no values, the map has its shape alone.

        Raises:
            ValueError: K is not between 1 and the cells.
            RuntimeError: embeddings are not finite.
        """
        self.config.check_kept(grid_shape, num_kept)
        index = self._groups(grid_shape, num_kept)  # pyright: ignore[reportCallIssue]
        return Source(index.expand(num_images, -1), num_kept, is_implied=True)

    @torch.compiler.disable
    @torch.no_grad()
    def _groups(self, grid_shape: tuple[int, int], num_kept: int) -> Int64[Tensor, "l"]:
        """Token of each cell, in canonical order, on the CPU: a GPU is waited for once a pass."""
        num_cells = math.prod(grid_shape)
        if self.embedding.is_meta:
            return torch.zeros(num_cells, dtype=torch.int64, device="meta")
        embedding = self.embedding.detach().cpu().float()
        require_finite("embeddings of cells", embedding)
        embedding = resized(embedding, self.grid_shape, grid_shape)
        distances = distances_of(embedding)
        if self.training and self.embedding.requires_grad:
            distances = distances - self.config.exploration * exploration_noise(embedding)
        return linkage(distances + _APART * ~together(grid_shape), num_kept)


def resized(
    embedding: Float[Tensor, "n e"], trained: tuple[int, int], wanted: tuple[int, int]
) -> Float[Tensor, "l e"]:
    """Embeddings of the cells of another grid, between those of the trained one."""
    if trained == wanted:
        return embedding
    grid = to_grid(embedding[None], trained)
    return to_tokens(functional.interpolate(grid, size=wanted, mode="bilinear"))[0]


def cosines(embedding: Float[Tensor, "*b l e"]) -> Float[Tensor, "*b l l"]:
    """Cosine of each vector with each; 0 with a vector of zeros."""
    unit = functional.normalize(embedding, dim=-1)
    return unit @ unit.mT


def distances_of(embedding: Float[Tensor, "l e"]) -> Float[Tensor, "l l"]:
    """1 minus the cosine of each two embeddings, the same to the last bit on every machine.

    A sum of rounded products depends on its order, and near a tie the map with it; so products are
    those of whole numbers.
    """
    largest = embedding.abs().max().frexp().exponent
    whole = torch.ldexp(embedding, _BITS - largest).round().long()
    products = whole @ whole.mT
    lengths = products.diagonal().float().sqrt()
    return 1 - products.float() / (lengths[:, None] * lengths).clamp(min=1)


def together(grid_shape: tuple[int, int]) -> Tensor:
    """Whether two cells are in one quadrant of a grid (L, L); thin grids have two halves."""
    height, width = grid_shape
    quadrant = blocks(grid_shape, (min(2, height), min(2, width))).index[0]
    return quadrant[:, None] == quadrant


def exploration_noise(embedding: Float[Tensor, "l e"]) -> Float[Tensor, "l l"]:
    """Normal numbers cut off at 1, one for each pair of cells.

    They are drawn from a seed made of the embeddings. So they are the same on every rank, after a
    resume and in each part of a step, and others after a step.
    """
    digest = hashlib.sha256(embedding.contiguous().view(torch.uint8).numpy().tobytes())
    seed = int.from_bytes(digest.digest()[:8], "little")
    generator = step_generator(seed, "exploration", 0)
    size = (len(embedding), len(embedding))
    upper = torch.randn(size, generator=generator, dtype=embedding.dtype).triu(1)
    return (upper + upper.mT).clamp(-1, 1)


def linkage(distances: Float[Tensor, "l l"], num_clusters: int) -> Int64[Tensor, "l"]:
    """Cluster of each cell by average linkage, numbered by lowest cells.

    The two clusters with the least mean distance of their cells join, until so many are left; of
    equal distances the first ones. Clusters of fewer are unions of those of more.

    Args:
        distances: symmetric; the diagonal counts for nothing.
        num_clusters: from 1 to L.
    """
    between, count = distances.clone().fill_diagonal_(torch.inf), len(distances)
    sizes, lowest = [1] * count, torch.arange(count)
    for _ in range(count - num_clusters):
        first, second = sorted(divmod(int(between.argmin()), count))
        joined = sizes[first] * between[first] + sizes[second] * between[second]
        sizes[first] += sizes[second]
        between[first] = between[:, first] = joined / sizes[first]
        between[second] = between[:, second] = torch.inf
        lowest[lowest == second] = first
    return lowest.unique(return_inverse=True)[1]


def assignment(
    embedding: Float[Tensor, "l e"],
    index: Int64[Tensor, "l"],
    num_clusters: int,
    temperature: float,
) -> Float[Tensor, "l k"]:
    """One-hot cluster of each cell, with the gradient of a soft assignment.

    Args:
        embedding: of cells.
        index: cluster of each.
        num_clusters: K.
        temperature: of the softmax over cosines with clusters' mean directions, which are fixed.
    """
    unit = functional.normalize(embedding.float(), dim=-1)
    hard = unit.new_zeros(len(unit), num_clusters).scatter(1, index[:, None], 1.0)
    # A sum has the direction of the mean.
    centres = functional.normalize(hard.mT @ unit.detach(), dim=-1)
    soft = (unit @ centres.mT / temperature).softmax(-1)
    return hard + (soft - soft.detach())


def means_of(
    cells: Float[Tensor, "b l c"], assigned: Float[Tensor, "l k"]
) -> Float[Tensor, "b k c"]:
    """Mean of the cells of each cluster, by an assignment that may pass gradients."""
    if assigned.shape[0] == assigned.shape[1]:
        # Nothing merges, and yet every weight takes part in every step.
        return cells + 0 * assigned.sum()
    with without_autocast(cells):
        return ((assigned / assigned.sum(0)).mT @ cells.float()).to(cells.dtype)


def alignment(
    embedding: Float[Tensor, "l e"],
    cells: Float[Tensor, "b l c"],
    grid_shape: tuple[int, int],
    margin: float,
) -> Float[Tensor, ""]:
    """How far cosines of embeddings are from those of features, beyond a margin, in float32.

    A mean over pairs of cells in one quadrant; those of features are means over all images of a
    step, without gradient.

    Args:
        embedding: of cells.
        cells: features.
        grid_shape: (height, width) in cells.
        margin: difference that counts for nothing.
    """
    with torch.no_grad():
        wanted = distributed.mean(cosines(cells.float()).mean(0))
    pairs = send(together(grid_shape).fill_diagonal_(fill_value=False), cells.device)
    beyond = ((wanted - cosines(embedding.float())).abs() - margin).relu() * pairs
    # A quadrant of one cell has no pair.
    return beyond.sum() / pairs.sum().clamp(min=1)
