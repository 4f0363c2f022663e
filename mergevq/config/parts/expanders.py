"""Settings of expanders: codes back to the grid; no torch."""

from dataclasses import dataclass
from typing import ClassVar, Literal

from mergevq.config.base import LayoutKind, require, require_heads
from mergevq.config.ranges import check_numbers


@dataclass(frozen=True, kw_only=True, slots=True)
class Unmerge:
    """Copies of kept tokens in the cells of a source map, which a predictor can recover."""

    kind: Literal["unmerge"] = "unmerge"
    dim: int = 384
    """Width of the source predictor (paper, Table A2)."""
    num_layers: int = 2
    """Blocks of the source predictor."""
    num_heads: int = 8
    """Attention heads of the source predictor."""

    def __post_init__(self) -> None:
        """Reject a predictor that cannot be built."""
        check_numbers(self)
        require_heads("expander.dim", self.dim, self.num_heads, "expander.num_heads")
        # Sine and cosine of row and column.
        require(self.dim % 4 == 0, f"expander.dim ({self.dim}) must be a multiple of 4")

    reads: ClassVar[LayoutKind] = "source"
    """Layout of the tokens that it expands."""

    def given_dims(self, code_dim: int) -> tuple[int, int | None]:
        """Channels of a decoder's input and of its style (None: no style), of codes of D."""
        return code_dim, code_dim


@dataclass(frozen=True, kw_only=True, slots=True)
class MaskTokens:
    """One mask token in every cell, which reads the codes by attention (TiTok)."""

    kind: Literal["mask_tokens"] = "mask_tokens"
    dim: int = 384
    """Width."""
    absent: Literal["cut", "token"] = "cut"
    """In place of a token that an image does not have: nothing, or a learned token (FlexTok)."""
    num_layers: int = 4
    """Transformer blocks."""
    num_heads: int = 8
    """Attention heads."""

    reads: ClassVar[LayoutKind] = "ordered"

    def __post_init__(self) -> None:
        """Reject blocks that cannot be built."""
        check_numbers(self)
        require_heads("expander.dim", self.dim, self.num_heads, "expander.num_heads")
        # Sine and cosine of row and column.
        require(self.dim % 4 == 0, f"expander.dim ({self.dim}) must be a multiple of 4")

    def given_dims(self, code_dim: int) -> tuple[int, int | None]:  # noqa: ARG002
        """Channels of a decoder's input and of its style (None: no style), of codes of D."""
        return self.dim, None


@dataclass(frozen=True, kw_only=True, slots=True)
class Fuse:
    """Tokens of the cells, which read those of the whole image before them (Hita)."""

    kind: Literal["fuse"] = "fuse"
    dim: int = 384
    """Width."""
    fusion: Literal["causal", "full"] = "causal"
    """Tokens that each reads besides itself: those before it, or all."""
    num_layers: int = 3
    """Transformer blocks."""
    num_heads: int = 8
    """Attention heads."""

    reads: ClassVar[LayoutKind] = "holistic"

    def __post_init__(self) -> None:
        """Reject blocks that cannot be built."""
        check_numbers(self)
        require_heads("expander.dim", self.dim, self.num_heads, "expander.num_heads")
        # Sine and cosine of row and column.
        require(self.dim % 4 == 0, f"expander.dim ({self.dim}) must be a multiple of 4")

    def given_dims(self, code_dim: int) -> tuple[int, int | None]:  # noqa: ARG002
        """Channels of a decoder's input and of its style (None: no style), of codes of D."""
        return self.dim, None


@dataclass(frozen=True, kw_only=True, slots=True)
class ScaleSum:
    """The sum of the codes of all scales, each enlarged to the grid and filtered (VAR)."""

    kind: Literal["scale_sum"] = "scale_sum"

    reads: ClassVar[LayoutKind] = "scales"

    def given_dims(self, code_dim: int) -> tuple[int, int | None]:
        """Channels of a decoder's input and of its style (None: no style), of codes of D."""
        return code_dim, code_dim


Expander = Unmerge | MaskTokens | Fuse | ScaleSum
