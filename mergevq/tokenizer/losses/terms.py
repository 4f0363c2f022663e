"""Terms of the tokenizer's loss, unweighted.

Source: Li et al. 2025, "MergeVQ", section 3 and Table A1 (arXiv:2504.00999).

Differs: the source term is a cross-entropy over the K kept tokens per cell, which is what the
softmax of equation 8 implies, where equation 9 prints a binary one.

Shape letters: B batch, L grid tokens, K kept tokens, H and W pixels.
"""

from collections.abc import Mapping

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

from mergevq.config.objective import LossConfig
from mergevq.data.layouts import Source

TokenizerLosses = dict[str, Float[Tensor, ""]]
"""Terms of the tokenizer's loss by name, unweighted scalars: the seven of `term_weights`, 0 where
they do not count, after them those that only one kind of part has, and the further ones."""


def term_weights(
    config: LossConfig, own: Mapping[str, float], adversarial_weight: float
) -> dict[str, float]:
    """Weight of each term by its name.

    Args:
        config: weights of the terms that any tokenizer may have, but one.
        own: weights of the terms that only this tokenizer's parts have.
        adversarial_weight: of the adversarial term at this step; see the function of that name.
    """
    return {
        "reconstruction": config.reconstruction_weight,
        "perceptual": config.perceptual_weight,
        "adversarial": adversarial_weight,
        "commitment": config.commitment_weight,
        "entropy": config.entropy_weight,
        "source": config.source_weight,
        "alignment": config.alignment_weight,
        **own,
        **config.further_weights,
    }


def total(losses: TokenizerLosses, weights: Mapping[str, float]) -> Float[Tensor, ""]:
    """Weighted sum of all terms, in their order.

    Raises:
        ValueError: a term has no weight.
    """
    if missing := [name for name in losses if name not in weights]:
        raise ValueError(
            f"losses ({', '.join(losses)}) must all have a weight, and {missing[0]} has none; give "
            f"the settings of the part that it comes from {missing[0]}_weight"
        )
    return torch.stack([weights[name] * term for name, term in losses.items()]).sum()


def reconstruction_loss(
    image: Float[Tensor, "b 3 h w"], reconstruction: Float[Tensor, "b 3 h w"]
) -> Float[Tensor, ""]:
    """Mean absolute difference, float32 under any autocast."""
    return functional.l1_loss(reconstruction.float(), image.float())


def source_loss(logits: Float[Tensor, "b l k"], source: Source) -> Float[Tensor, ""]:
    """Cross-entropy of the predicted source against the encoder's, in nats per cell."""
    return functional.cross_entropy(logits.float().flatten(0, 1), source.index.flatten())
