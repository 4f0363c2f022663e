"""Latent perturbation: a decoder learns from tokens of which some are wrong.

In a share of a batch's images each token is, with a probability, another one near it. Both the
probability and the size of the neighbourhood fall in the course of training.

Source: Qiu et al. 2025, "Robust Latent Matters: Boosting Image Generation with Sampling Error
Synthesis", section 3 (arXiv:2503.08354).

Differs: the images are spread over the whole batch, where the authors' are the first of each
process, and are others in every step; a replaced token is always wrong, where theirs stays as it is
once in `num_near` times; the final ratio is what is left, where theirs is what is lost (both 0.5).

Shape letters: B batch, K tokens, D channels of codes.
"""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from mergevq.config import parts as settings
from mergevq.data.codes import CodeSpec
from mergevq.tokenizer.seams import Quantized, Quantizer, Regularized, StepDraws


class Perturb(nn.Module):
    """Tokens of some images replaced by near ones."""

    def __init__(self, config: settings.Perturb) -> None:
        """Take the settings; there are no weights."""
        super().__init__()
        self.config = config

    def num_draws(self, spec: CodeSpec) -> int:
        """One number for whether a token is replaced, and those of `Quantizer.near`."""
        return 1 + spec.dim + 1

    def forward(
        self, quantized: Quantized, *, quantizer: Quantizer, draws: StepDraws
    ) -> Regularized:
        """Replace tokens; the gradient passes straight through, of wrong codes too."""
        config, codes = self.config, quantized.codes
        ratio = self._ratio(draws.progress)
        perturbed = draws.images < config.image_share
        replaced = perturbed[:, None] & (draws.tokens[..., 0] < config.token_share * ratio)
        parts = quantizer.near(quantized.parts, draws.tokens[..., 1:], config.num_near * ratio)
        # The added zero carries the gradient, and leaves codes as `decode` has them.
        wrong = quantizer.decode(parts).to(codes.dtype) + (codes - codes.detach())
        return Regularized(torch.where(replaced[..., None], wrong, codes), None)

    def _ratio(self, progress: Float[Tensor, ""]) -> Float[Tensor, ""]:
        """Share of the first values that is left."""
        start, end = self.config.fall
        # A fall of no length is one at once.
        fallen = ((progress - start) / max(end - start, 1e-9)).clamp(0, 1)
        return 1 - (1 - self.config.final_ratio) * fallen
