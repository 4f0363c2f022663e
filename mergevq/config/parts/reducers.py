"""Settings of reducers: grid tokens to kept tokens; no torch."""

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

from mergevq.config.base import LayoutKind, require
from mergevq.config.ranges import check_numbers

MergeShape = Literal["linear", "square", "constant"]
NUM_KEYS = 8
"""Leading components of patches that merging compares, where codes are analytic."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Merge:
    """Transformer blocks that merge similar tokens; the source map tells where cells went."""

    kind: Literal["merge"] = "merge"
    num_layers: int = 12
    """Merging transformer blocks."""
    num_heads: int = 8
    """Attention heads."""
    layer_scale: float = 1e-5
    """Initial gain of residual branches; 1e-5 suits long runs, short ones want 0.1 or more."""
    norm_eps: float = 1e-6
    """Added to the variance in layer norms; the authors' code has 1e-5."""
    shape: MergeShape = "linear"
    """How merging is spread over blocks: `linear` is the authors' code, `square` the paper's."""
    locality: float = 0.0
    """Cosine that two tokens lose for each side of the grid (the longer one) between their centres:
    above 0 near tokens merge first, and source maps take fewer bits as written. 0 is the paper."""

    gives: ClassVar[LayoutKind] = "source"
    """Layout of the tokens that are left."""
    grows: ClassVar[bool] = True
    """Whether a larger grid has more tokens, in proportion to its cells."""
    num_holistic: ClassVar[int] = 0
    """Tokens of the whole image, before those of cells."""
    ends_with_tokens: ClassVar[bool] = True
    """Whether the MLP of the last block works on kept tokens alone, so that an analytic start can
    write their codes there."""

    def __post_init__(self) -> None:
        """Reject counts and constants that cannot be."""
        check_numbers(self)

    def least_kept(self, grid_shape: tuple[int, int]) -> int:
        """Fewest tokens that can be left of a grid's: every block merges half of its own."""
        return _least_of_halves(grid_shape, self.num_layers)

    def nearest_kept(self, grid_shape: tuple[int, int], num_kept: int) -> int:
        """Number of tokens next to this one that can be left of a grid's."""
        return max(self.least_kept(grid_shape), num_kept)

    def check_kept(self, grid_shape: tuple[int, int], num_kept: int) -> None:
        """Raise `ValueError` where as many tokens cannot be left of a grid's."""
        _require_halves(grid_shape, num_kept, self.num_layers)


@dataclass(frozen=True, kw_only=True, slots=True)
class LearnedMerge:
    """Merging of which training finds how many tokens each block merges, at a given cost."""

    kind: Literal["learned_merge"] = "learned_merge"
    num_layers: int = 12
    """Merging transformer blocks."""
    num_candidates: int = 16
    """Numbers of tokens that a block may leave, from all of the grid down in even steps."""
    cost: float = 1.0
    """Products of the blocks that training aims at, over those of `merge` with shape `linear` and
    the same K."""
    cost_weight: float = 5.0
    """Weight of the loss `cost`, the squared distance from it (authors' code)."""
    num_heads: int = 8
    """Attention heads."""
    layer_scale: float = 1e-5
    """Initial gain of residual branches; 1e-5 suits long runs, short ones want 0.1 or more."""
    norm_eps: float = 1e-6
    """Added to the variance in layer norms."""

    gives: ClassVar[LayoutKind] = "source"
    grows: ClassVar[bool] = True
    num_holistic: ClassVar[int] = 0
    ends_with_tokens: ClassVar[bool] = False

    def __post_init__(self) -> None:
        """Reject counts and constants that cannot be."""
        check_numbers(self)

    def least_kept(self, grid_shape: tuple[int, int]) -> int:
        """Fewest tokens that can be left of a grid's: every block merges half of its own."""
        return _least_of_halves(grid_shape, self.num_layers)

    def nearest_kept(self, grid_shape: tuple[int, int], num_kept: int) -> int:
        """Number of tokens next to this one that can be left of a grid's."""
        return max(self.least_kept(grid_shape), num_kept)

    def check_kept(self, grid_shape: tuple[int, int], num_kept: int) -> None:
        """Raise `ValueError` where as many tokens cannot be left of a grid's."""
        _require_halves(grid_shape, num_kept, self.num_layers)


@dataclass(frozen=True, kw_only=True, slots=True)
class Pool:
    """Transformer blocks, and means of a grid's blocks of cells; no map is stored."""

    kind: Literal["pool"] = "pool"
    num_layers: int = 12
    """Transformer blocks."""
    num_grid_layers: int | None = None
    """Blocks before the means, which see all cells; those behind them see the means alone. None is
    all."""
    num_heads: int = 8
    """Attention heads."""
    layer_scale: float = 1e-5
    """Initial gain of residual branches; 1e-5 suits long runs, short ones want 0.1 or more."""
    norm_eps: float = 1e-6
    """Added to the variance in layer norms."""

    gives: ClassVar[LayoutKind] = "source"
    grows: ClassVar[bool] = True
    num_holistic: ClassVar[int] = 0

    def __post_init__(self) -> None:
        """Reject counts and constants that cannot be."""
        check_numbers(self)
        _require_grid_layers(self.num_grid_layers, self.num_layers)

    def counts(self, grid_shape: tuple[int, int], num_kept: int) -> tuple[int, int] | None:
        """Blocks along both directions of a grid, the most square ones; None where there are none.

        Args:
            grid_shape: (height, width) in cells.
            num_kept: K: all blocks.
        """
        height, width = grid_shape
        pairs = [
            (rows, num_kept // rows)
            for rows in range(1, min(height, num_kept) + 1)
            if num_kept % rows == 0 and num_kept // rows <= width
        ]
        # Height over width of a block, or the other way round, whichever is above 1.
        return min(
            pairs,
            key=lambda pair: abs(math.log(height * pair[1] / (width * pair[0]))),
            default=None,
        )

    @property
    def ends_with_tokens(self) -> bool:
        """Whether the last block sees kept tokens alone."""
        return self.num_grid_layers is not None and self.num_grid_layers < self.num_layers

    def least_kept(self, grid_shape: tuple[int, int]) -> int:  # noqa: ARG002 - as of merging
        """Fewest tokens that can be left of a grid's: one block."""
        return 1

    def nearest_kept(self, grid_shape: tuple[int, int], num_kept: int) -> int:
        """Number of tokens next to this one that can be left of a grid's."""
        return min(self._both_sides(grid_shape, num_kept), key=lambda near: abs(near - num_kept))

    def check_kept(self, grid_shape: tuple[int, int], num_kept: int) -> None:
        """Raise `ValueError` where a grid cannot be cut into as many blocks."""
        _require_at_most_cells(grid_shape, num_kept)
        if self.counts(grid_shape, num_kept) is None:
            below, above = self._both_sides(grid_shape, num_kept)
            raise ValueError(
                f"num_kept ({num_kept}) must be rows times columns of blocks of the "
                f"{grid_shape[0]} x {grid_shape[1]} cells, such as {below} or {above}"
            )

    def _both_sides(self, grid_shape: tuple[int, int], num_kept: int) -> tuple[int, int]:
        """The next legal numbers at or below this one, and at or above it."""
        num_tokens = math.prod(grid_shape)
        start = min(max(num_kept, 1), num_tokens)
        below = next(k for k in range(start, 0, -1) if self.counts(grid_shape, k))
        above = next(k for k in range(start, num_tokens + 1) if self.counts(grid_shape, k))
        return below, above


@dataclass(frozen=True, kw_only=True, slots=True)
class GlobalMap:
    """Transformer blocks, and means over groups of cells that are learned; no map is stored."""

    kind: Literal["global_map"] = "global_map"
    num_layers: int = 12
    """Transformer blocks."""
    num_grid_layers: int | None = None
    """Blocks before the means, which see all cells; those behind them see the means alone. None is
    all."""
    start_noise: float = 0.02
    """Standard deviation of noise on the positions that embeddings of cells start from; far above 1
    they start at random."""
    temperature: float = 0.1
    """Temperature of the soft assignment of cells to groups, which gives gradients."""
    exploration: float = 0.1
    """Largest noise on cosines of embeddings in training, so that other groups are tried."""
    align_margin: float = 0.25
    """Difference between cosines of embeddings and of features that the loss `align` lets be."""
    align_weight: float = 0.25
    """Weight of that loss."""
    num_heads: int = 8
    """Attention heads."""
    layer_scale: float = 1e-5
    """Initial gain of residual branches; 1e-5 suits long runs, short ones want 0.1 or more."""
    norm_eps: float = 1e-6
    """Added to the variance in layer norms."""

    gives: ClassVar[LayoutKind] = "source"
    grows: ClassVar[bool] = True
    num_holistic: ClassVar[int] = 0

    def __post_init__(self) -> None:
        """Reject counts and constants that cannot be."""
        check_numbers(self)
        _require_grid_layers(self.num_grid_layers, self.num_layers)

    @property
    def ends_with_tokens(self) -> bool:
        """Whether the last block sees kept tokens alone."""
        return self.num_grid_layers is not None and self.num_grid_layers < self.num_layers

    def least_kept(self, grid_shape: tuple[int, int]) -> int:  # noqa: ARG002 - as of merging
        """Fewest tokens that can be left of a grid's: one group."""
        return 1

    def nearest_kept(self, grid_shape: tuple[int, int], num_kept: int) -> int:
        """Number of tokens next to this one that can be left of a grid's."""
        return min(max(num_kept, 1), math.prod(grid_shape))

    def check_kept(self, grid_shape: tuple[int, int], num_kept: int) -> None:
        """Raise `ValueError` where a grid has not as many cells."""
        _require_at_most_cells(grid_shape, num_kept)


@dataclass(frozen=True, kw_only=True, slots=True)
class DivPrune:
    """Transformer blocks, and cells chosen to be far from each other, which others join."""

    kind: Literal["divprune"] = "divprune"
    num_layers: int = 12
    """Transformer blocks."""
    num_grid_layers: int | None = None
    """Blocks before the choice, which see all cells; those behind it see the chosen ones alone.
    None is all."""
    combine: Literal["mean", "chosen"] = "mean"
    """A token's features: the mean over its cells, or those of the chosen cell."""
    num_heads: int = 8
    """Attention heads."""
    layer_scale: float = 1e-5
    """Initial gain of residual branches; 1e-5 suits long runs, short ones want 0.1 or more."""
    norm_eps: float = 1e-6
    """Added to the variance in layer norms."""

    gives: ClassVar[LayoutKind] = "source"
    grows: ClassVar[bool] = True
    num_holistic: ClassVar[int] = 0

    def __post_init__(self) -> None:
        """Reject counts and constants that cannot be."""
        check_numbers(self)
        _require_grid_layers(self.num_grid_layers, self.num_layers)

    @property
    def ends_with_tokens(self) -> bool:
        """Whether the last block sees kept tokens alone."""
        return self.num_grid_layers is not None and self.num_grid_layers < self.num_layers

    def least_kept(self, grid_shape: tuple[int, int]) -> int:  # noqa: ARG002 - as of merging
        """Fewest tokens that can be left of a grid's: one cell."""
        return 1

    def nearest_kept(self, grid_shape: tuple[int, int], num_kept: int) -> int:
        """Number of tokens next to this one that can be left of a grid's."""
        return min(max(num_kept, 1), math.prod(grid_shape))

    def check_kept(self, grid_shape: tuple[int, int], num_kept: int) -> None:
        """Raise `ValueError` where as many cells cannot be chosen of a grid's."""
        _require_at_most_cells(grid_shape, num_kept)


@dataclass(frozen=True, kw_only=True, slots=True)
class Select:
    """Transformer blocks, a learned choice of cells, and attention from these to the others."""

    kind: Literal["select"] = "select"
    num_layers: int = 12
    """Transformer blocks, which see all cells."""
    num_merger_layers: int = 2
    """Blocks of the chosen cells, in which they attend to the others."""
    num_heads: int = 8
    """Attention heads."""
    layer_scale: float = 1e-5
    """Initial gain of residual branches; 1e-5 suits long runs, short ones want 0.1 or more."""
    norm_eps: float = 1e-6
    """Added to the variance in layer norms."""

    gives: ClassVar[LayoutKind] = "source"
    grows: ClassVar[bool] = True
    num_holistic: ClassVar[int] = 0
    ends_with_tokens: ClassVar[bool] = False

    def __post_init__(self) -> None:
        """Reject counts and constants that cannot be."""
        check_numbers(self)

    def least_kept(self, grid_shape: tuple[int, int]) -> int:  # noqa: ARG002 - as of merging
        """Fewest tokens that can be left of a grid's: one cell."""
        return 1

    def nearest_kept(self, grid_shape: tuple[int, int], num_kept: int) -> int:
        """Number of tokens next to this one that can be left of a grid's."""
        return min(max(num_kept, 1), math.prod(grid_shape))

    def check_kept(self, grid_shape: tuple[int, int], num_kept: int) -> None:
        """Raise `ValueError` where as many cells cannot be chosen of a grid's."""
        _require_at_most_cells(grid_shape, num_kept)


@dataclass(frozen=True, kw_only=True, slots=True)
class Queries:
    """Learned queries behind the grid tokens; they alone are kept, in their order (TiTok)."""

    kind: Literal["queries"] = "queries"
    num_queries: int = 144
    """Queries: the most tokens that can be kept; fewer keep the first of them."""
    nested: bool = False
    """Run all queries whatever K is, so that tokens of a smaller K are the first of a larger."""
    causal: bool = False
    """A query sees the grid and the queries before it, and the grid sees no query (SEED); tokens of
    a smaller K are then the first of a larger one too."""
    num_layers: int = 12
    """Transformer blocks."""
    num_heads: int = 8
    """Attention heads."""
    layer_scale: float = 1.0
    """Initial gain of residual branches: all that a query becomes comes through them."""
    norm_eps: float = 1e-6
    """Added to the variance in layer norms."""

    gives: ClassVar[LayoutKind] = "ordered"
    grows: ClassVar[bool] = False
    num_holistic: ClassVar[int] = 0
    ends_with_tokens: ClassVar[bool] = False

    def __post_init__(self) -> None:
        """Reject counts and constants that cannot be."""
        check_numbers(self)

    def least_kept(self, grid_shape: tuple[int, int]) -> int:  # noqa: ARG002 - as of merging
        """Fewest tokens that can be kept: one query."""
        return 1

    def nearest_kept(
        self,
        grid_shape: tuple[int, int],  # noqa: ARG002 - as of merging
        num_kept: int,
    ) -> int:
        """Number of tokens next to this one that can be kept."""
        return min(max(num_kept, 1), self.num_queries)

    def check_kept(self, grid_shape: tuple[int, int], num_kept: int) -> None:
        """Raise `ValueError` where there are not as many queries."""
        _require_at_most_cells(grid_shape, num_kept)
        require(
            num_kept <= self.num_queries,
            f"num_kept ({num_kept}) must be at most {self.num_queries}, the queries "
            "(reducer.num_queries)",
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class Holistic:
    """Learned tokens of the whole image, and behind them one for each cell (Hita)."""

    kind: Literal["holistic"] = "holistic"
    num_holistic: int = 16
    """H: tokens of the whole image, the first ones. With those of the L cells there are H + L; K
    below that keeps the first of them."""
    num_layers: int = 6
    """Transformer blocks."""
    num_full_layers: int = 3
    """Blocks in which each token sees all; in those behind them it sees itself and those before it,
    so that no token of the whole image sees a cell."""
    num_heads: int = 8
    """Attention heads."""
    layer_scale: float = 1.0
    """Initial gain of residual branches: all that a token of the whole image becomes comes through
    them."""
    norm_eps: float = 1e-6
    """Added to the variance in layer norms."""

    gives: ClassVar[LayoutKind] = "holistic"
    grows: ClassVar[bool] = True
    ends_with_tokens: ClassVar[bool] = False

    def __post_init__(self) -> None:
        """Reject counts and constants that cannot be."""
        check_numbers(self)
        require(
            self.num_full_layers <= self.num_layers,
            f"reducer.num_full_layers ({self.num_full_layers}) must be at most "
            f"reducer.num_layers ({self.num_layers})",
        )

    def least_kept(self, grid_shape: tuple[int, int]) -> int:  # noqa: ARG002 - as of merging
        """Fewest tokens that can be kept: the first one."""
        return 1

    def nearest_kept(self, grid_shape: tuple[int, int], num_kept: int) -> int:
        """Number of tokens next to this one that can be kept."""
        return min(max(num_kept, 1), self.num_holistic + math.prod(grid_shape))

    def check_kept(self, grid_shape: tuple[int, int], num_kept: int) -> None:
        """Raise `ValueError` where there are not as many tokens."""
        num_cells = math.prod(grid_shape)
        require(
            1 <= num_kept <= self.num_holistic + num_cells,
            f"num_kept ({num_kept}) must be between 1 and {self.num_holistic + num_cells}: "
            f"{self.num_holistic} tokens of the whole image (reducer.num_holistic) and "
            f"{num_cells} cells",
        )


def _least_of_halves(grid_shape: tuple[int, int], num_layers: int) -> int:
    """Fewest tokens that blocks leave of a grid's which merge half of their own each."""
    return -(-math.prod(grid_shape) >> num_layers)  # rounded up


def _require_halves(grid_shape: tuple[int, int], num_kept: int, num_layers: int) -> None:
    """Raise `ValueError` unless blocks that merge at most half of their tokens leave as many."""
    _require_at_most_cells(grid_shape, num_kept)
    least, num_tokens = _least_of_halves(grid_shape, num_layers), math.prod(grid_shape)
    require(
        num_kept >= least,
        f"num_kept ({num_kept}) must be at least {least}: each of reducer.num_layers "
        f"({num_layers}) can merge at most half of its tokens and the first has "
        f"{num_tokens}; keep more tokens or use more layers",
    )


def _require_grid_layers(num_grid_layers: int | None, num_layers: int) -> None:
    """Reject more blocks before a reduction than there are."""
    require(
        num_grid_layers is None or num_grid_layers <= num_layers,
        f"reducer.num_grid_layers ({num_grid_layers}) must be at most "
        f"reducer.num_layers ({num_layers})",
    )


def _require_at_most_cells(grid_shape: tuple[int, int], num_kept: int) -> None:
    """Raise `ValueError` unless tokens are from 1 to as many as a grid has cells."""
    num_tokens = math.prod(grid_shape)
    require(
        1 <= num_kept <= num_tokens,
        f"num_kept ({num_kept}) must be between 1 and the {num_tokens} tokens of the grid",
    )


Reducer = Merge | LearnedMerge | Pool | GlobalMap | DivPrune | Select | Queries | Holistic
