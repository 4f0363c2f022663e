"""Losses of the tokenizer and of its discriminator.

Source: Li et al. 2025, "MergeVQ", section 3 and Table A1 (arXiv:2504.00999); Esser et al. 2021,
"Taming Transformers", section 3.1 (arXiv:2012.09841); Tseng et al. 2021, "Regularizing Generative
Adversarial Networks under Limited Data", section 3 (LeCam, arXiv:2104.03310).

Differs: the source term is a cross-entropy over the K kept tokens per cell, which is what the
softmax of equation 8 implies, where equation 9 prints a binary one; the adversarial weight ramps in
after the discriminator has been trained, where the authors' code starts at full weight.

Shape letters: B batch, L grid tokens, K kept tokens, H and W pixels, P and Q cells of a patch map.
"""

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from mergevq import distributed
from mergevq.config import LossConfig
from mergevq.merge import Source

_LECAM_DECAY = 0.999
"""Of the averages the LeCam terms pull towards, as in the authors' code."""


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


def generator_loss(fake_logits: Float[Tensor, "b 1 p q"]) -> Float[Tensor, ""]:
    """Non-saturating: binary cross-entropy of each image's mean verdict against real."""
    return functional.softplus(-fake_logits.float().mean(dim=(1, 2, 3))).mean()


def discriminator_loss(
    real_logits: Float[Tensor, "b 1 p q"], fake_logits: Float[Tensor, "b 1 p q"]
) -> Float[Tensor, ""]:
    """Hinge: real above 1, fake below -1."""
    real = functional.relu(1 - real_logits.float()).mean()
    fake = functional.relu(1 + fake_logits.float()).mean()
    return 0.5 * (real + fake)


class LeCam(nn.Module):
    """Keeps the verdict on either side near the running mean of the other."""

    def __init__(self) -> None:
        """Start both averages at 0, as in the authors' code."""
        super().__init__()
        self.real: Tensor
        self.fake: Tensor
        self.register_buffer("real", torch.zeros(()))
        self.register_buffer("fake", torch.zeros(()))

    def forward(
        self, real_logits: Float[Tensor, "b 1 p q"], fake_logits: Float[Tensor, "b 1 p q"]
    ) -> Float[Tensor, ""]:
        """The regulariser for the present averages."""
        real = functional.relu(real_logits.float() - self.fake).square().mean()
        fake = functional.relu(self.real - fake_logits.float()).square().mean()
        return real + fake

    @torch.no_grad()
    def update(
        self, real_logits: Float[Tensor, "b 1 p q"], fake_logits: Float[Tensor, "b 1 p q"]
    ) -> None:
        """Move the averages, over all ranks."""
        self.real.lerp_(distributed.mean(real_logits.detach().float().mean()), 1 - _LECAM_DECAY)
        self.fake.lerp_(distributed.mean(fake_logits.detach().float().mean()), 1 - _LECAM_DECAY)


def adversarial_weight(step: int, config: LossConfig) -> float:
    """Weight of the generator loss at a step: 0, then a linear ramp, then constant."""
    if step < config.adversarial_start_step or config.adversarial_weight == 0:
        return 0.0
    since = step - config.adversarial_start_step + 1
    return config.adversarial_weight * min(1.0, since / max(1, config.adversarial_ramp_steps))


def discriminator_active(step: int, config: LossConfig) -> bool:
    """Whether the discriminator is trained at a step."""
    return config.adversarial_weight > 0 and step >= config.discriminator_start_step
