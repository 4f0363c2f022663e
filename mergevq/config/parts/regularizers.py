"""Settings of regularizers, between quantizer and expander in training alone; no torch."""

from dataclasses import dataclass
from typing import Literal

from mergevq.config.base import require
from mergevq.config.ranges import check_numbers


@dataclass(frozen=True, kw_only=True, slots=True)
class NoRegularizer:
    """None: the expander is given the codes as they are."""

    kind: Literal["none"] = "none"


@dataclass(frozen=True, kw_only=True, slots=True)
class Perturb:
    """Some tokens become near but wrong ones, as a generator's mistakes are (RobustTok)."""

    kind: Literal["perturb"] = "perturb"
    image_share: float = 0.1
    """Share of the images that have wrong tokens."""
    token_share: float = 1.0
    """Share of such an image's tokens that become wrong."""
    num_near: int = 100
    """Codes that one is drawn from, of a codebook of 4,096; in other codebooks as large a share.
    Channels with levels (`fsq`) move by one level, whatever the number."""
    fall: tuple[float, float] = (0.2, 0.6)
    """Shares of the run between which `token_share` and `num_near` fall linearly."""
    final_ratio: float = 0.5
    """Ratio of both to their first values after the fall."""

    def __post_init__(self) -> None:
        """Reject a fall that ends before it begins."""
        check_numbers(self)
        require(self.fall[0] <= self.fall[1], f"fall {self.fall} must end after it begins")


Regularizer = NoRegularizer | Perturb
