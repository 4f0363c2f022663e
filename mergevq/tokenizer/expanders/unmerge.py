"""Copies of kept codes on the grid, by the source map or by one inferred from the codes.

Source: Li et al. 2025, "MergeVQ", section 3.2 and appendix A (arXiv:2504.00999).

Differs: the source predictor sees positions of cells and of slots, and lets kept codes look at each
other.

Shape letters: B batch, L grid tokens, K kept tokens, C channels, D bits.
"""

import math
from typing import ClassVar

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor, nn

from mergevq.config import parts as settings
from mergevq.data.layouts import Layout, Source, require_source, unmerge
from mergevq.nn.blocks import NORM_EPS, ContextBlock, QueryBlock, initialize
from mergevq.nn.checks import require_finite
from mergevq.nn.norm import LayerNorm
from mergevq.nn.positions import sincos, sincos_2d
from mergevq.tokenizer.expanders.recovery import most_likely_source
from mergevq.tokenizer.losses.terms import source_loss
from mergevq.tokenizer.seams import Condition, Expanded, Given


class Unmerge(nn.Module):
    """Copies of kept codes in the cells of a source map; a predictor can recover the map."""

    can_infer: ClassVar[bool] = True

    def __init__(self, config: settings.Unmerge, code_dim: int) -> None:
        """Build for codes of so many channels."""
        super().__init__()
        self.predictor = SourcePredictor(config, code_dim)

    def forward(
        self,
        codes: Float[Tensor, "b k d"],
        layout: Layout,
        grid_shape: tuple[int, int],
        *,
        condition: Condition | None = None,  # noqa: ARG002 - of ordered tokens alone
    ) -> Given:
        """Copy each code to the cells that it stands for; they are the style as well."""
        tokens = unmerge(codes, require_source(layout, "unmerging"))
        return Given(tokens, grid_shape, tokens)

    def train_pass(
        self,
        codes: Float[Tensor, "b k d"],
        seen: Float[Tensor, "b k d"],
        layout: Layout,
        grid_shape: tuple[int, int],
        *,
        inferred: Bool[Tensor, "b"] | None,
        lengths: Int64[Tensor, "b"] | None = None,
        condition: Condition | None = None,  # noqa: ARG002
    ) -> Expanded:
        """Unmerge by the given map, or by the predicted one where `inferred`.

        The loss `source` is the predictor's cross-entropy against the given map.

        Raises:
            ValueError: there are `lengths`.
        """
        if lengths is not None:
            raise ValueError(
                f"each of the {layout.num_kept} tokens of a source map has cells, and none can be "
                "dropped; take a tokenizer whose model.reducer.kind is queries"
            )
        source = require_source(layout, "unmerging")
        logits = self.predictor(seen, grid_shape)
        used = source
        if inferred is not None:
            recovered = most_likely_source(logits.detach().float())
            index = torch.where(inferred[:, None], recovered.index, source.index)
            used = Source(index, source.num_kept)
        return Expanded(self(codes, used, grid_shape), {"source": source_loss(logits, source)})

    def infer(
        self,
        codes: Float[Tensor, "b k d"],
        grid_shape: tuple[int, int],
        anchors: Int64[Tensor, "b k"] | None = None,
    ) -> Source:
        """Infer the source map; see `SourcePredictor.predict`."""
        return self.predictor.predict(codes, grid_shape, anchors)


class SourcePredictor(nn.Module):
    """Infers from the codes alone which kept token each grid cell copies (source recovery).

    Kept codes, whose order carries position, look at each other; one query per cell looks at them;
    queries refine each other, and each points at one kept token (paper, section 3.2, equation 8).
    """

    def __init__(self, config: settings.Unmerge, code_dim: int) -> None:
        """Build for codes of so many channels."""
        super().__init__()
        dim = config.dim
        self.from_codes = nn.Linear(code_dim, dim)
        self.norm_codes = LayerNorm(dim, eps=NORM_EPS)
        self.query = nn.Parameter(torch.zeros(dim))
        self.context_blocks = nn.ModuleList(
            ContextBlock(dim, config.num_heads) for _ in range(config.num_layers)
        )
        self.blocks = nn.ModuleList(
            QueryBlock(dim, config.num_heads) for _ in range(config.num_layers)
        )
        self.norm = LayerNorm(dim, eps=NORM_EPS)
        self.to_query = nn.Linear(dim, dim)
        # A bias would add the same to all logits of a cell.
        self.to_key = nn.Linear(dim, dim, bias=False)
        initialize(self)

    def forward(
        self, codes: Float[Tensor, "b k d"], grid_shape: tuple[int, int]
    ) -> Float[Tensor, "b l k"]:
        """Logits of each cell over the kept tokens."""
        dim = self.query.shape[0]
        num_tokens, num_kept = math.prod(grid_shape), codes.shape[1]
        # In canonical order slot k of K opens near cell k L / K, so slots share the cells' scale.
        slots = torch.arange(num_kept, device=codes.device) * (num_tokens / num_kept)
        slot_positions = torch.cat(
            [sincos(slots // grid_shape[1], dim // 2), sincos(slots % grid_shape[1], dim // 2)], -1
        )
        context = self.norm_codes(self.from_codes(codes.to(self.query.dtype)))
        context = context + slot_positions.to(context.dtype)
        cells = self.query + sincos_2d(grid_shape, dim, codes.device)
        x = cells.to(context.dtype).expand(codes.shape[0], -1, -1)
        for block in self.context_blocks:
            context = block(context)
        for block in self.blocks:
            x = block(x, context)
        return self.to_query(self.norm(x)) @ self.to_key(context).mT / math.sqrt(dim)

    @torch.no_grad()
    def predict(
        self,
        codes: Float[Tensor, "b k d"],
        grid_shape: tuple[int, int],
        anchors: Int64[Tensor, "b k"] | None = None,
    ) -> Source:
        """The most likely source in canonical order, given each cell's logits.

        Args:
            codes: kept codes in canonical order.
            grid_shape: (height, width) of the grid.
            anchors: cell at which each kept token opens, when known: that cell gets its token, and
                no cell before it can have it.

        Raises:
            ValueError: there are more tokens than cells, so some could not open.
            RuntimeError: a logit is not finite.
        """
        logits = self(codes, grid_shape).float()
        require_finite("the source predictor's logits", logits)
        if anchors is None:
            return most_likely_source(logits)
        cells = torch.arange(logits.shape[1], device=codes.device)[None, :, None]
        closed = cells < anchors[:, None, :]
        index = logits.masked_fill(closed, -torch.inf).argmax(-1)
        slots = torch.arange(codes.shape[1], device=codes.device).expand_as(anchors)
        return Source(index.scatter(1, anchors, slots), codes.shape[1])
