"""Settings of stems: pixels to grid tokens; no torch."""

from dataclasses import dataclass
from typing import Literal

from mergevq.config.base import require, require_cnn
from mergevq.config.ranges import check_numbers


@dataclass(frozen=True, kw_only=True, slots=True)
class CnnStem:
    """Residual CNN levels, each but the last halving the side (versions G and G+R)."""

    kind: Literal["cnn"] = "cnn"
    channels: int = 64
    """CNN base channels: the paper's d32, d64, d96."""
    channel_mult: tuple[int, ...] = (1, 2, 4)
    """Channels of each CNN level over `channels`; every level but one halves the side."""
    num_res_blocks: int = 4
    """Residual blocks per CNN level."""
    position_embedding: bool = False
    """Add fixed sine and cosine features of the cell, for any grid."""

    def __post_init__(self) -> None:
        """Reject levels that cannot be built."""
        check_numbers(self)
        require_cnn(self.channels, self.channel_mult)

    @property
    def patch_size(self) -> int:
        """Pixels per side of one grid cell: the downsampling factor f."""
        return 2 ** (len(self.channel_mult) - 1)

    @property
    def width(self) -> int:
        """Channels of the grid tokens: those of the coarsest level."""
        return self.channels * self.channel_mult[-1]

    @property
    def num_groups(self) -> int:
        """Groups of every group normalisation: 32, or fewer where the base width is smaller."""
        return min(32, self.channels)


@dataclass(frozen=True, kw_only=True, slots=True)
class PatchStem:
    """One convolution per patch (version R), with a norm or with positions of its own."""

    kind: Literal["patch"] = "patch"
    width: int = 768
    """Channels of the grid tokens: the encoder transformer's width."""
    patch_size: int = 16
    """Pixels per side of a patch, f."""
    norm: bool = True
    """Normalise each channel over the image, as the authors do, which hides how bright an image is.
    False leaves the channels as they are, and the last third of them also tells a cell's position,
    in pairs of opposite sign."""
    norm_eps: float = 1e-5
    """Added to the variance in that norm; the authors' code has 1e-6."""
    num_groups: int = 32
    """Groups of the normalisation before the latents."""
    position_embedding: bool = False
    """Add fixed sine and cosine features of the cell, for any grid; a stem with norm needs them."""

    def __post_init__(self) -> None:
        """Reject widths that cannot be normalised, and positions twice."""
        check_numbers(self)
        require(
            self.width % self.num_groups == 0,
            f"width ({self.width}) must be a multiple of the {self.num_groups} normalisation "
            "groups (num_groups)",
        )
        require(
            self.norm or not self.position_embedding,
            "position_embedding (True) must be False with norm False, which adds positions of its "
            "own",
        )
        require(
            self.norm or self.num_positions > 0,
            f"width ({self.width}) must be at least 24 with norm False, for features of positions",
        )

    @property
    def num_positions(self) -> int:
        """Features of positions that a stem without norm adds, a pair of channels each."""
        return 4 * (self.width // 24)


Stem = CnnStem | PatchStem
