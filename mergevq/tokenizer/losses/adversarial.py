"""PatchGAN: a real-or-fake verdict for every patch of an image, and the losses of both sides.

Source: Isola et al. 2017, "Image-to-Image Translation with Conditional Adversarial Networks",
section 3.2.2 and appendix (arXiv:1611.07004); widths and depth as in Esser et al. 2021, "Taming
Transformers for High-Resolution Image Synthesis", and section 3.1 there for the losses
(arXiv:2012.09841); Tseng et al. 2021, "Regularizing Generative Adversarial Networks under Limited
Data", section 3 (LeCam, arXiv:2104.03310).

Differs: group normalisation in place of batch normalisation, with the same number of parameters.
A verdict then depends on its own image alone: not on the rest of the batch, not on whether real
and reconstructed images are judged together, not on how a batch is split over ranks, and there are
no running statistics for DDP to keep equal. The adversarial weight ramps in after the discriminator
has been trained, where the authors' code starts at full weight.

Shape letters: B batch, H and W pixels, P and Q patches down and across.
"""

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from mergevq.config.objective import LossConfig
from mergevq.nn.norm import GroupNorm

INIT_STD = 0.02
"""Spread of convolution weights around 0 and of normalisation gains around 1."""
MIN_PATCHES = 2
"""Fewest patches per side that `fitting_num_layers` leaves."""


class Discriminator(nn.Module):
    """Convolutions that halve the image `num_layers` times and then judge each patch.

    Args:
        channels: of the first layer; each further layer doubles them, up to 8 times as many.
        num_layers: halvings; a patch sees 16, 34 or 70 pixels a side with 1, 2 or 3 of them.

    Raises:
        ValueError: `num_layers` is below 1.
    """

    def __init__(self, *, channels: int = 64, num_layers: int = 3) -> None:
        super().__init__()
        if num_layers < 1:
            raise ValueError(f"num_layers ({num_layers}) must be at least 1")
        self.num_layers = num_layers
        layers: list[nn.Module] = [nn.Conv2d(3, channels, 4, 2, 1), nn.LeakyReLU(0.2)]
        in_channels = channels
        for i in range(1, num_layers + 1):
            out_channels = channels * min(2**i, 8)
            stride = 2 if i < num_layers else 1
            layers += [
                nn.Conv2d(in_channels, out_channels, 4, stride, 1, bias=False),
                GroupNorm(min(32, channels), out_channels),
                nn.LeakyReLU(0.2),
            ]
            in_channels = out_channels
        layers.append(nn.Conv2d(in_channels, 1, 4, 1, 1))
        self.layers = nn.Sequential(*layers)
        self.apply(_init)

    def forward(self, image: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b 1 p q"]:
        """Judge the patches: above 0 looks real, below 0 reconstructed.

        Args:
            image: values in [-1, 1].

        Returns:
            Logits in float32; a side has `pixels // 2**num_layers - 2` patches.

        Raises:
            ValueError: the image is too small to hold a patch.
        """
        side, min_side = min(image.shape[-2:]), 3 * 2**self.num_layers
        if side < min_side:
            raise ValueError(
                f"image side ({side}) must be at least {min_side} for a discriminator of "
                f"{self.num_layers} layers; use fitting_num_layers(image_size)"
            )
        return self.layers(image).float()


def fitting_num_layers(image_size: int, num_layers: int = 3) -> int:
    """Largest depth up to `num_layers` that leaves an image at least 2 x 2 patches.

    Args:
        image_size: side of the image in pixels; 32 and more fit 3 layers, 16 fit 2, 8 fit 1.
        num_layers: depth wished for.

    Raises:
        ValueError: the image is too small for even one layer.
    """
    # The last two convolutions, 4 wide with a border of 1, each cost a cell.
    fitting = (image_size // (MIN_PATCHES + 2)).bit_length() - 1
    if fitting < 1:
        raise ValueError(
            f"image_size ({image_size}) must be at least {2 * (MIN_PATCHES + 2)} pixels for a "
            "discriminator; set adversarial_weight to 0 to train without one"
        )
    return min(num_layers, fitting)


def _init(module: nn.Module) -> None:
    """Draw the weights as PatchGAN does."""
    if isinstance(module, nn.Conv2d):
        nn.init.normal_(module.weight, 0.0, INIT_STD)
    elif isinstance(module, nn.GroupNorm):
        nn.init.normal_(module.weight, 1.0, INIT_STD)
    else:
        return
    if module.bias is not None:
        nn.init.zeros_(module.bias)


_LECAM_DECAY = 0.999
"""Decay of the averages the LeCam terms pull towards, as in the authors' code."""


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
    def update(self, real: Float[Tensor, ""], fake: Float[Tensor, ""]) -> None:
        """Move the averages to the mean logits of a step, of all ranks."""
        self.real.lerp_(real, 1 - _LECAM_DECAY)
        self.fake.lerp_(fake, 1 - _LECAM_DECAY)


def adversarial_weight(step: int, config: LossConfig) -> float:
    """Weight of the generator loss at a step: 0, then a linear ramp, then constant."""
    if step < config.adversarial_start_step or config.adversarial_weight == 0:
        return 0.0
    since = step - config.adversarial_start_step + 1
    return config.adversarial_weight * min(1.0, since / max(1, config.adversarial_ramp_steps))


def discriminator_active(step: int, config: LossConfig) -> bool:
    """Whether the discriminator is trained at a step."""
    return config.adversarial_weight > 0 and step >= config.discriminator_start_step
