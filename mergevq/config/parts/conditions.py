"""Settings of conditions: what is known of an image besides its tokens; no torch."""

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

from mergevq.config.base import require
from mergevq.config.ranges import check_numbers

Sees = Literal["both", "decoder"]
"""Parts that see a condition: encoder and decoder (TexTok), or the decoder alone (TA-TiTok)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class NoCondition:
    """None: an image is decoded of its tokens alone."""

    kind: Literal["none"] = "none"

    sees: ClassVar[Sees] = "decoder"
    dropout: ClassVar[float] = 0.0
    bits: ClassVar[float] = 0.0


@dataclass(frozen=True, kw_only=True, slots=True)
class ClassCondition:
    """The class of an image: tokens hold what it leaves open (TexTok, with a class for a text)."""

    kind: Literal["class"] = "class"
    num_classes: int = 10
    """Classes of the data."""
    sees: Sees = "both"
    """Parts that see the class: encoder and decoder, or the decoder alone."""
    dropout: float = 0.1
    """Share of the images of a step whose class is left out, so that one decodes without it."""

    def __post_init__(self) -> None:
        """Reject numbers outside of their ranges."""
        check_numbers(self)

    @property
    def bits(self) -> float:
        """Bits of a class, all of them alike."""
        return math.log2(self.num_classes)


@dataclass(frozen=True, kw_only=True, slots=True)
class TextCondition:
    """Embeddings of a text, made elsewhere: tokens hold what it leaves open (TexTok)."""

    kind: Literal["text"] = "text"
    dim: int = 768
    """Channels of an embedding."""
    num_embeddings: int = 77
    """Most embeddings of a text; one of zeros is none."""
    num_bytes: int = 256
    """Bytes of the longest text, each of which counts 8 bits beside the tokens of an image."""
    sees: Sees = "both"
    """Parts that see the text: encoder and decoder, or the decoder alone."""
    dropout: float = 0.1
    """Share of the images of a step whose text is left out, so that one decodes without it."""

    def __post_init__(self) -> None:
        """Reject numbers outside of their ranges."""
        check_numbers(self)

    @property
    def bits(self) -> float:
        """Bits of the longest text: no text costs more."""
        return 8.0 * self.num_bytes


Condition = NoCondition | ClassCondition | TextCondition


def require_no_condition(condition: Condition, what: str) -> None:
    """Check that images are decoded of their tokens alone.

    Args:
        condition: of a tokenizer.
        what: has no place for one.

    Raises:
        ValueError: there is a condition.
    """
    require(
        isinstance(condition, NoCondition),
        f"{what} has no place for a condition, and this tokenizer has one (model.condition.kind "
        f"{condition.kind}): take a tokenizer without, or Tokenizer.encode and Tokenizer.decode "
        "from Python, which take it as `condition`",
    )
