"""Terms of the tokenizer's loss, unweighted.

Source: Li et al. 2025, "MergeVQ", section 3 and Table A1 (arXiv:2504.00999).

Differs: the source term is a cross-entropy over the K kept tokens per cell, which is what the
softmax of equation 8 implies, where equation 9 prints a binary one.

Shape letters: B batch, L grid tokens, K kept tokens, H and W pixels.
"""

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

from mergevq.config.objective import LossConfig
from mergevq.data.layouts import Source


class TokenizerLosses(NamedTuple):
    """Every term of the tokenizer's loss, unweighted scalars."""

    reconstruction: Float[Tensor, ""]
    """L1 between image and reconstruction."""
    perceptual: Float[Tensor, ""]
    """LPIPS; 0 without a network."""
    adversarial: Float[Tensor, ""]
    """Non-saturating generator loss; 0 before it starts."""
    commitment: Float[Tensor, ""]
    """Squared distance of latents to codes."""
    entropy: Float[Tensor, ""]
    """Token entropy minus codebook entropy, in nats; negative when healthy."""
    source: Float[Tensor, ""]
    """Cross-entropy of the source predictor, in nats per cell."""
    alignment: Float[Tensor, ""]
    """Class token against the teacher; 0 without one."""

    def total(self, config: LossConfig, adversarial_weight: float) -> Float[Tensor, ""]:
        """Weighted sum.

        Args:
            config: weights of all terms but one.
            adversarial_weight: of the adversarial term at this step; see the function of that name.
        """
        weights = {
            "reconstruction": config.reconstruction_weight,
            "perceptual": config.perceptual_weight,
            "adversarial": adversarial_weight,
            "commitment": config.commitment_weight,
            "entropy": config.entropy_weight,
            "source": config.source_weight,
            "alignment": config.alignment_weight,
        }
        return torch.stack([weights[name] * getattr(self, name) for name in self._fields]).sum()


def reconstruction_loss(
    image: Float[Tensor, "b 3 h w"], reconstruction: Float[Tensor, "b 3 h w"]
) -> Float[Tensor, ""]:
    """Mean absolute difference, float32 under any autocast."""
    return functional.l1_loss(reconstruction.float(), image.float())


def source_loss(logits: Float[Tensor, "b l k"], source: Source) -> Float[Tensor, ""]:
    """Cross-entropy of the predicted source against the encoder's, in nats per cell."""
    return functional.cross_entropy(logits.float().flatten(0, 1), source.index.flatten())
