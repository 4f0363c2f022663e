"""Tail drop: a decoder learns from the first tokens of an image, of which there may be any number.

Source: Miwa et al. 2025, "One-D-Piece: Image Tokenizer Meets Quality-Controllable Compression",
section 3 (arXiv:2501.10064); Bachmann et al. 2025, "FlexTok: Resampling Images into 1D Token
Sequences of Flexible Length", section 3 (nested dropout, arXiv:2502.13967).

Differs: every image has a number of its own, where One-D-Piece has one for a batch; numbers of a
batch are spread evenly over those that there are; a power of two is at most K, where that of
FlexTok's code may be more. What stands for a dropped token is the expander's to choose.

Shape letters: B batch, K tokens, D channels of codes.
"""

import torch
from torch import nn

from mergevq.config import parts as settings
from mergevq.data.codes import CodeSpec
from mergevq.tokenizer.seams import Quantized, Quantizer, Regularized, StepDraws


class TailDrop(nn.Module):
    """Tokens of an image from some number on dropped."""

    def __init__(self, config: settings.TailDrop) -> None:
        """Take the settings; there are no weights."""
        super().__init__()
        self.config = config

    def num_draws(self, spec: CodeSpec) -> int:  # noqa: ARG002 - as of other regularizers
        """None: the number of an image is enough."""
        return 0

    def forward(
        self,
        quantized: Quantized,
        *,
        quantizer: Quantizer,  # noqa: ARG002 - as of other regularizers
        draws: StepDraws,
    ) -> Regularized:
        """Draw how many tokens each image has; codes stay as they are."""
        choices = self.config.lengths_of(quantized.codes.shape[1])
        table = torch.tensor(choices).to(draws.images.device, non_blocking=True)
        return Regularized(quantized.codes, table[(draws.images * len(choices)).long()])
