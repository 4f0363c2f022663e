"""Tokens that a part of a tokenizer sees beside its own: those of a condition.

Source: Zha et al. 2024, "Language-Guided Image Tokenization for Generation" (arXiv:2412.05796);
positions of embeddings as TA-TiTok (bytedance/1d-tokenizer).

Differs: where a condition is left out no token is seen, in place of a learned one that stands for
it, so that without conditions the model is the same as one that has none.

Shape letters: B images, T tokens of a condition, C channels of a text's embedding, E channels of
the part.
"""

from typing import assert_never

import torch
from jaxtyping import Bool
from torch import Tensor, nn
from torch.nn import functional

from mergevq.config import parts as settings
from mergevq.nn.blocks import initialize
from mergevq.tokenizer.seams import Condition, Told


class ClassTokens(nn.Module):
    """One token for the class of an image."""

    def __init__(self, config: settings.ClassCondition, dim: int) -> None:
        """Make a vector of `dim` channels for each class."""
        super().__init__()
        self.vectors = nn.Parameter(torch.randn(config.num_classes, dim) * dim**-0.5)

    def forward(self, condition: Condition) -> Told:
        """Vectors of classes; none is seen of class -1."""
        return Told(self.vectors[condition.clamp_min(0)][:, None], condition[:, None] >= 0)


class TextTokens(nn.Module):
    """A token for each embedding of a text: a linear map and a position."""

    def __init__(self, config: settings.TextCondition, dim: int) -> None:
        """Make the map from embeddings to `dim` channels."""
        super().__init__()
        self.project = nn.Linear(config.dim, dim)
        self.positions = nn.Parameter(torch.randn(config.num_embeddings, dim) * dim**-0.5)
        initialize(self)

    def forward(self, condition: Condition) -> Told:
        """Map embeddings; those of zeros are not seen."""
        positions = self.positions[: condition.shape[1]]
        tokens = self.project(condition.to(positions.dtype)) + positions
        return Told(tokens, (condition != 0).any(-1))


def build_condition(config: settings.Condition, dim: int) -> ClassTokens | TextTokens | None:
    """Tokens of a condition, of `dim` channels; None without one."""
    match config:
        case settings.NoCondition():
            return None
        case settings.ClassCondition():
            return ClassTokens(config, dim)
        case settings.TextCondition():
            return TextTokens(config, dim)
        case _:
            assert_never(config)


def told(tokens: ClassTokens | TextTokens | None, condition: Condition | None) -> Told | None:
    """Tokens of a condition for a part that sees it; None where the part sees none.

    Raises:
        ValueError: a condition is needed and not given.
    """
    if tokens is None:
        return None
    if condition is None:
        raise ValueError(
            "this tokenizer has a condition, which must be given: "
            "mergevq.tokenizer.conditions.values.unknown is that of unknown ones"
        )
    return tokens(condition)


def with_present(
    mask: Bool[Tensor, "*mask n"] | None, present: Bool[Tensor, "b t"], end: int, num_inputs: int
) -> Bool[Tensor, "b 1 #n n"]:
    """A mask in which no input sees tokens of a condition that are absent.

    Args:
        mask: of the inputs; None is all.
        present: tokens of the condition that are there.
        end: inputs up to their last.
        num_inputs: all inputs.
    """
    sides = (end - present.shape[1], num_inputs - end)
    keys = functional.pad(present, sides, value=1.0)[:, None, None]
    return keys if mask is None else keys & mask
