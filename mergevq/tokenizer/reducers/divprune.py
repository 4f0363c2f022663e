"""Transformer blocks, and cells chosen to be far from each other; the others join the nearest.

Source: Alvar et al. 2025, "DivPrune: Diversity-based Visual Token Pruning for Large Multimodal
Models", section 3 (arXiv:2503.02175).

Differs: cells that are not chosen join a chosen one, by the source map and, where `combine` is
"mean", with their features; the authors drop them. Equal distances go to the first cell, and K is
exact.

Shape letters: B batch, L grid tokens, K kept tokens, C channels.
"""

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn
from torch.nn import functional

from mergevq.config import parts as settings
from mergevq.data.layouts import Source, canonicalize, merge
from mergevq.nn.blocks import EncoderBlock
from mergevq.nn.precision import without_autocast
from mergevq.nn.rows import take_rows
from mergevq.tokenizer.reducers.stages import Reduction, Stages
from mergevq.tokenizer.seams import TokenSet


class DivPrune(nn.Module):
    """Blocks of attention, of which the first see all cells and the others the K that are left."""

    def __init__(self, config: settings.DivPrune, dim: int) -> None:
        """Make the blocks; the encoder initialises them after its projection."""
        super().__init__()
        self.combine = config.combine
        self.num_grid_layers = config.num_grid_layers
        self.blocks = nn.ModuleList(
            EncoderBlock(dim, config.num_heads, config.layer_scale, config.norm_eps)
            for _ in range(config.num_layers)
        )
        self.checkpointing = False

    def forward(
        self,
        grid: Float[Tensor, "b l c"],
        class_token: Float[Tensor, "b 1 c"],
        grid_shape: tuple[int, int],  # noqa: ARG002 - cells are compared by features, not places
        num_kept: int,
        *,
        num_layers: int | None = None,
        taps: tuple[int, ...] = (),
    ) -> TokenSet:
        """Run the first `num_layers` blocks (None: all); cells are chosen behind the grid's."""
        recompute = self.checkpointing and self.training
        stages = Stages(self.blocks, self.num_grid_layers, num_layers, recompute)
        return stages.run(grid, class_token, num_kept, self._chosen, taps)

    def _chosen(self, cells: Float[Tensor, "b l c"], num_kept: int) -> tuple[Source, Reduction]:
        """The map of chosen cells, and tokens as `combine` has them."""
        chosen = choose(cells, num_kept)
        source, order = canonicalize(Source(join(cells, chosen), num_kept))
        chosen = chosen.gather(1, order)

        def reduced(cells: Float[Tensor, "b l c"]) -> Float[Tensor, "b k c"]:
            return merge(cells, source) if self.combine == "mean" else take_rows(cells, chosen)

        return source, reduced

    def implied(self, grid_shape: tuple[int, int], num_kept: int, num_images: int) -> None:
        """Nothing: which cells are chosen depends on the image."""


@torch.no_grad()
def choose(cells: Float[Tensor, "b l c"], num_kept: int) -> Int64[Tensor, "b k"]:
    """Cells that are far from each other by angle, in the order in which they are chosen.

    The first is the one farthest from its own nearest; each next one is the one farthest from the
    nearest of those before it. The least angle between two of them is at least half of the best
    possible one. Of equal angles the first cell counts; a cell of zeros is at right angles to all.

    Args:
        cells: features, any real values.
        num_kept: K, from 1 to L.
    """
    similarity = _cosines(cells)
    own = torch.eye(cells.shape[1], dtype=torch.bool, device=cells.device)
    nearest = similarity.masked_fill(own, -torch.inf).amax(-1)
    chosen = [nearest.argmin(-1)]
    closest = torch.full_like(nearest, -torch.inf)
    for _ in range(num_kept - 1):
        last = chosen[-1][:, None]
        closest = torch.maximum(closest, take_rows(similarity, last)[:, 0])
        # A cell that is chosen is never the farthest, whatever is equal to it.
        closest = closest.scatter(1, last, torch.inf)
        chosen.append(closest.argmin(-1))
    return torch.stack(chosen, dim=1)


@torch.no_grad()
def join(cells: Float[Tensor, "b l c"], chosen: Int64[Tensor, "b k"]) -> Int64[Tensor, "b l"]:
    """Position in `chosen` of the cell that each cell is most similar to: itself where it is one.

    Args:
        cells: features.
        chosen: different cells of each image.
    """
    nearest = take_rows(_cosines(cells), chosen).argmax(1)
    places = torch.arange(chosen.shape[1], device=cells.device).expand_as(chosen)
    return nearest.scatter(1, chosen, places)


def _cosines(cells: Float[Tensor, "b l c"]) -> Float[Tensor, "b l l"]:
    """Cosine of the angle between each two cells, in float32."""
    with without_autocast(cells):
        unit = functional.normalize(cells.float(), dim=-1)
        return unit @ unit.mT
