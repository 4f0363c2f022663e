"""Transformer blocks, a learned choice of K cells, and attention from these to the others.

Source: Jin et al. 2024, "Unified Language-Vision Pretraining in LLM with Dynamic Discrete Visual
Tokenization", section 3.1 (LaVIT, arXiv:2309.04669).

Differs: K is asked for, and the K cells with the highest scores are kept, without noise; the
authors keep each cell by a draw of its own, outside of training too, and their loss sets the mean
number. Kept tokens see each other, where the authors' see those before them. A cell that is not
kept joins the token that attends to it most, so that there is a source map.

Shape letters: B batch, L grid tokens, K kept tokens, M others, H heads, C channels.
"""

import math
from typing import NamedTuple, cast

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from mergevq.config import parts as settings
from mergevq.data.layouts import Source, canonicalize, merge
from mergevq.nn.blocks import EncoderBlock, QueryBlock, run_blocks
from mergevq.nn.norm import LayerNorm
from mergevq.nn.precision import without_autocast
from mergevq.nn.rows import take_rows
from mergevq.tokenizer.seams import TokenSet


class Select(nn.Module):
    """Blocks of attention over all cells, a selector, and blocks of the kept cells."""

    def __init__(self, config: settings.Select, dim: int) -> None:
        """Make the blocks; the encoder initialises them after its projection."""
        super().__init__()
        self.blocks = nn.ModuleList(
            EncoderBlock(dim, config.num_heads, config.layer_scale, config.norm_eps)
            for _ in range(config.num_layers)
        )
        self.selector = Selector(dim, config.norm_eps)
        self.norm = LayerNorm(dim, eps=config.norm_eps)
        self.mergers = nn.ModuleList(
            QueryBlock(dim, config.num_heads) for _ in range(config.num_merger_layers)
        )
        self.checkpointing = False

    def forward(
        self,
        grid: Float[Tensor, "b l c"],
        class_token: Float[Tensor, "b 1 c"],
        grid_shape: tuple[int, int],  # noqa: ARG002 - cells are chosen by features, not places
        num_kept: int,
        *,
        num_layers: int | None = None,
        taps: tuple[int, ...] = (),
    ) -> TokenSet:
        """Run the first `num_layers` blocks (None: all); all of them end in `num_kept` cells."""
        recompute = self.checkpointing and self.training
        x = torch.cat([class_token, grid], dim=1)
        outputs = dict.fromkeys(taps, x)
        x = run_blocks(self.blocks, x, num_layers, recompute=recompute, outputs=outputs)
        cells = x[:, 1:]
        if num_layers is not None and num_layers < len(self.blocks):
            index = torch.arange(cells.shape[1], device=x.device).expand(len(x), -1)
            return TokenSet(cells, x[:, 0], Source(index, cells.shape[1]))
        chance = self.selector(cells).sigmoid()
        kept, dropped = choose(chance, num_kept)
        # Values are the cells' own; the gradient is that of the probability to be kept, or not.
        gate = 1 + (chance - chance.detach()).to(cells.dtype)
        tokens = take_rows(cells * gate[..., None], kept)
        others = take_rows(self.norm(cells) * (2 - gate)[..., None], dropped)
        tokens, shares = self._merge(tokens, others, recompute=recompute)
        source, order = canonicalize(Source(groups(kept, dropped, shares), num_kept))
        tokens = take_rows(tokens, order)
        # After the last block they are the tokens themselves, which have looked at the others.
        tapped = tuple(
            tokens if tap == len(self.blocks) else merge(outputs[tap][:, 1:], source)
            for tap in taps
        )
        return TokenSet(tokens, x[:, 0], source, tapped)

    def implied(self, grid_shape: tuple[int, int], num_kept: int, num_images: int) -> None:
        """Nothing: which cells are chosen depends on the image."""

    def _merge(
        self, tokens: Float[Tensor, "b k c"], others: Float[Tensor, "b m c"], *, recompute: bool
    ) -> tuple[Float[Tensor, "b k c"], Float[Tensor, "b k m"]]:
        """Kept tokens after the blocks that look at the others, and how much the last one does."""
        shares = others.new_zeros(*tokens.shape[:2], others.shape[1])
        for module in self.mergers:
            block = cast("QueryBlock", module)
            if others.shape[1] == 0:
                # There is nothing to look at, and yet every weight takes part in every step.
                nothing = 0 * block.cross(block.norm(tokens), tokens) + others.sum(1, keepdim=True)
                tokens = block.block(tokens + nothing)
                continue
            shares = attention_shares(block, tokens, others)
            if recompute:
                tokens = checkpoint(block, tokens, others, use_reentrant=False)
            else:
                tokens = block(tokens, others)
        return tokens, shares


class Selector(nn.Module):
    """A score for each cell, from its own features and from the mean of the grid's."""

    def __init__(self, dim: int, norm_eps: float) -> None:
        """Make the layers."""
        super().__init__()
        self.norm = LayerNorm(dim, eps=norm_eps)
        self.to_features = nn.Linear(dim, dim)
        self.to_score = nn.Sequential(
            nn.Linear(dim, dim // 2),
            nn.GELU(),
            nn.Linear(dim // 2, dim // 4),
            nn.GELU(),
            nn.Linear(dim // 4, 1),
        )

    def forward(self, cells: Float[Tensor, "b l c"]) -> Float[Tensor, "b l"]:
        """Logits of the probability to be kept, in float32."""
        features = functional.gelu(self.to_features(self.norm(cells)))
        own, rest = features.tensor_split(2, dim=-1)
        mean = rest.mean(1, keepdim=True).expand_as(rest)
        return self.to_score(torch.cat([own, mean], dim=-1))[..., 0].float()


class Choice(NamedTuple):
    """Cells in raster order."""

    kept: Int64[Tensor, "b k"]
    """Those that become tokens."""
    dropped: Int64[Tensor, "b m"]
    """The others."""


@torch.no_grad()
def choose(scores: Float[Tensor, "b l"], num_kept: int) -> Choice:
    """The K cells with the highest scores, of equal ones the first."""
    order = scores.argsort(dim=-1, descending=True, stable=True)
    kept, dropped = order[:, :num_kept], order[:, num_kept:]
    return Choice(kept.sort(-1).values, dropped.sort(-1).values)


@torch.no_grad()
def attention_shares(
    block: QueryBlock, tokens: Float[Tensor, "b k c"], others: Float[Tensor, "b m c"]
) -> Float[Tensor, "b k m"]:
    """Share of a block's attention that each token gives to each of the others, over its heads.

    Args:
        block: its weights.
        tokens: that attend.
        others: that are attended to.
    """
    cross = block.cross
    heads = (cross.num_heads, tokens.shape[-1] // cross.num_heads)
    query = cross.q(block.norm(tokens)).unflatten(-1, heads).transpose(1, 2)
    key = cross.kv(others).chunk(2, dim=-1)[0].unflatten(-1, heads).transpose(1, 2)
    with without_autocast(tokens):
        logits = query.float() @ key.float().mT / math.sqrt(heads[1])
    return logits.softmax(-1).mean(1)


@torch.no_grad()
def groups(
    kept: Int64[Tensor, "b k"], dropped: Int64[Tensor, "b m"], shares: Float[Tensor, "b k m"]
) -> Int64[Tensor, "b l"]:
    """Token of each cell: a kept cell's own, or the one that gives a dropped cell most attention.

    Args:
        kept: cells that became tokens, in the tokens' order.
        dropped: all others.
        shares: attention of each token to each dropped cell; of equal ones the first counts.
    """
    places = torch.arange(kept.shape[1], device=kept.device).expand_as(kept)
    index = kept.new_zeros(len(kept), kept.shape[1] + dropped.shape[1])
    return index.scatter(1, kept, places).scatter(1, dropped, shares.argmax(1))
