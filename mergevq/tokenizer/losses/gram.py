"""Gram loss: how strongly channels of a frozen trunk occur together, wherever they do.

G = F F^T / (C N) of the features F of one image, C channels at N cells, is the same for any order
of the cells: it is of texture, and of the strength of each channel, but not of places. The loss is
the mean over the first taps of the trunk of the mean squared difference of G between image and
reconstruction.

Source: Gatys et al. 2016, "Image Style Transfer Using Convolutional Neural Networks", section 2.2
(CVPR 2016), for the matrices; Lu et al. 2025, "AToken: A Unified Tokenizer for Vision", for the
loss in place of an adversary (arXiv:2509.14476).

Differs: AToken's scale of the matrices and its weight are not public. Here they are divided by C N,
so that neither width of the trunk nor size of the image decides how large they are.

Shape letters: B batch, C channels, H and W pixels or cells.
"""

from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from mergevq.config import objective as settings
from mergevq.data.batches import Batch
from mergevq.metrics.lpips import Perceptual
from mergevq.tokenizer.seams import TokenizerOutput


def gram(features: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c c"]:
    """Mean product of each two channels over the cells, over the number of channels."""
    rows = features.flatten(2)
    return rows @ rows.mT / (rows.shape[1] * rows.shape[2])


class Gram:
    """Distance of Gram matrices between images and their reconstructions (`seams.Term`)."""

    name: ClassVar[str] = "gram"

    def __init__(self, config: settings.Gram, perceptual: Perceptual) -> None:
        """Take the settings, and the frozen network of the perceptual loss."""
        self.num_taps = config.num_taps
        self.perceptual = perceptual

    def __call__(self, output: TokenizerOutput, batch: Batch) -> Float[Tensor, ""]:
        """Mean squared difference, at least 0.

        Raises:
            ValueError: the trunk has fewer taps, or the image is too small for it.
        """
        found = self.perceptual.activations(output.reconstruction, self.num_taps)
        with torch.no_grad():
            true = self.perceptual.activations(batch.image, self.num_taps)
        with torch.autocast(batch.image.device.type, enabled=False):
            distances = [
                (gram(one) - gram(other)).square().mean()
                for one, other in zip(found, true, strict=True)
            ]
            return torch.stack(distances).mean()
