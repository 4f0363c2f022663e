"""Settings of decoders: the grid to pixels; no torch."""

from dataclasses import dataclass
from typing import Literal

from mergevq.config.base import require, require_cnn, require_heads
from mergevq.config.ranges import check_numbers

_MAX_COMPONENT_BITS = 10
"""Most bits of one component: a patch decoder has 2**n - 1 products of n of them."""


@dataclass(frozen=True, kw_only=True, slots=True)
class CnnDecoder:
    """Transformer blocks on the grid and an upsampling CNN, as the authors have."""

    kind: Literal["cnn"] = "cnn"
    channels: int = 64
    """CNN base channels: the paper's d32, d64, d96."""
    channel_mult: tuple[int, ...] = (1, 2, 4)
    """Channels of each CNN level over `channels`, fine to coarse, as in the stem."""
    num_res_blocks: int = 4
    """Residual blocks on the finest CNN level; every other level has one more."""
    num_layers: int = 12
    """Transformer blocks."""
    num_heads: int = 8
    """Attention heads."""
    layer_scale: float = 1e-5
    """Initial gain of residual branches."""
    norm_eps: float = 1e-6
    """Added to the variance in the transformer's layer norms; the authors' code has 1e-5."""

    def __post_init__(self) -> None:
        """Reject levels, heads and constants that cannot be."""
        check_numbers(self)
        require_cnn(self.channels, self.channel_mult)
        require_heads("decoder width", self.width, self.num_heads, "decoder.num_heads")

    def check_patch(self, patch_size: int) -> None:
        """Raise `ValueError` where the levels do not give a cell's pixels."""
        own = 2 ** (len(self.channel_mult) - 1)
        require(
            own == patch_size,
            f"decoder.channel_mult {self.channel_mult} must make the stem's cells of {patch_size} "
            f"x {patch_size} pixels, and makes {own} x {own}: every level but one doubles the side",
        )

    @property
    def width(self) -> int:
        """Transformer width: the channels of the coarsest level."""
        return self.channels * self.channel_mult[-1]

    @property
    def num_blocks(self) -> int:
        """Blocks on the grid."""
        return self.num_layers

    @property
    def num_groups(self) -> int:
        """Groups of every group normalisation: 32, or fewer where the base width is smaller."""
        return min(32, self.channels)


@dataclass(frozen=True, kw_only=True, slots=True)
class PatchDecoder:
    """Blocks of one width on the grid, then all pixels of a cell at once."""

    kind: Literal["patch"] = "patch"
    width: int = 192
    """Channels of its blocks."""
    num_heads: int = 8
    """Attention heads."""
    blocks: str = "ccaccc"
    """Blocks in order: c is a 3x3 convolution and an MLP, a is attention and an MLP."""
    bit_components: tuple[int, ...] = ()
    """Component of each bit. The products of a component's own bits go straight to the cell's
    pixels; a start from components fills it in, and empty has no such way."""

    def __post_init__(self) -> None:
        """Reject blocks of other letters, and components of too many bits."""
        check_numbers(self)
        # Sine and cosine of row and column.
        require(self.width % 4 == 0, f"decoder.width ({self.width}) must be a multiple of 4")
        require_heads("decoder width", self.width, self.num_heads, "decoder.num_heads")
        require(
            len(self.blocks) > 0 and set(self.blocks) <= set("ac"),
            f"decoder.blocks ({self.blocks!r}) must be letters c (convolution) and a (attention), "
            "such as ccaccc",
        )
        most = max((len(group) for group in self.bit_groups), default=0)
        require(
            most <= _MAX_COMPONENT_BITS,
            f"decoder.bit_components gives one component {most} bits and must give at most "
            f"{_MAX_COMPONENT_BITS}",
        )

    def check_patch(self, patch_size: int) -> None:
        """Raise `ValueError` where a cell has one pixel, of which no quarters can be made."""
        require(
            patch_size % 2 == 0,
            f"decoder (patch) needs cells of an even number of pixels a side, not {patch_size}",
        )

    @property
    def num_blocks(self) -> int:
        """Blocks on the grid."""
        return len(self.blocks)

    @property
    def bit_groups(self) -> tuple[tuple[int, ...], ...]:
        """Bits of each component, the most significant one first."""
        groups: dict[int, list[int]] = {}
        for bit, component in enumerate(self.bit_components):
            groups.setdefault(component, []).append(bit)
        return tuple(map(tuple, groups.values()))


Decoder = CnnDecoder | PatchDecoder
