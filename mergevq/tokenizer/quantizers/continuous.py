"""Tokens as real numbers: a mean and a deviation for each channel, or channels as they are.

Latents of `Kl` are means and log-variances. In training a code is drawn, mean + deviation x noise;
in evaluation it is the mean. The loss is the divergence of what is drawn from a standard normal,
sum over channels of (mean^2 + variance - 1 - log variance) / 2, mean over tokens.

Source: Kingma and Welling 2013, "Auto-Encoding Variational Bayes", appendix B (arXiv:1312.6114); as
a tokenizer's bottleneck ViTok (philippe-eecs/vitok), written from its description.

Differs: ViTok takes the mean over channels too, others the sum over tokens, so weights of the loss
are of another scale; without a deviation codes are normalised over the channels of a token, where
HieraTok and Ming-UniVision have a deviation or stored statistics.

Shape letters: B batch, K tokens, D channels of codes, E channels of latents.
"""

from typing import ClassVar

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn
from torch.nn import functional

from mergevq.config import parts as settings
from mergevq.data.codes import CodeSpec, no_indices
from mergevq.tokenizer.seams import Quantized

_LOG_VARIANCES = (-30.0, 20.0)
"""Least and largest log-variance: squares and exponentials stay finite."""
_STEP = 2**-24
"""Distance of the numbers in [0, 1) that float32 draws."""


class Kl(nn.Module):
    """D channels, each drawn from a normal distribution of its own in training."""

    is_random: ClassVar[bool] = True

    def __init__(self, config: settings.Kl) -> None:
        """Take the settings; there are no weights."""
        super().__init__()
        self.spec = CodeSpec(sizes=config.sizes, dim=config.dim)

    def forward(
        self, latents: Float[Tensor, "*b e"], uniforms: Float[Tensor, "*b d"] | None = None
    ) -> Quantized:
        """Draw each channel by its number, or without numbers take its mean.

        Args:
            latents: means, then log-variances.
            uniforms: a number in [0, 1) for each channel of a code; None draws nothing.
        """
        mean, log_variance = moments(latents)
        if uniforms is not None:
            # In the middle of its step, as 0 and 1 would be infinite.
            normals = torch.special.ndtri(uniforms.float() * (1 - _STEP) + _STEP / 2)
            mean = mean + (0.5 * log_variance).exp() * normals
        return Quantized(mean, no_parts(mean))

    def decode(self, _parts: Int64[Tensor, "*b 0"]) -> Float[Tensor, "*b d"]:
        """Raise `ValueError`: codes are not made of parts."""
        raise ValueError(no_indices("decoding of parts"))

    def near(
        self,
        _parts: Int64[Tensor, "*b 0"],
        _uniforms: Float[Tensor, "*b n"],
        _num_near: Float[Tensor, ""],
    ) -> Int64[Tensor, "*b 0"]:
        """Raise `ValueError`: real numbers have no near tokens."""
        raise ValueError(no_indices("a near token"))

    def losses(self, latents: Float[Tensor, "b k e"]) -> dict[str, Float[Tensor, ""]]:
        """Divergence from a standard normal, in nats a token."""
        mean, log_variance = moments(latents)
        nats = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance)
        return {"kl": nats.sum(-1).mean()}


class Unquantized(nn.Module):
    """D channels as they are, of mean 0 and variance 1 over the channels of each token."""

    is_random: ClassVar[bool] = False

    def __init__(self, config: settings.Unquantized) -> None:
        """Take the settings; there are no weights."""
        super().__init__()
        self.spec = CodeSpec(sizes=config.sizes, dim=config.dim)

    def forward(
        self, latents: Float[Tensor, "*b d"], _uniforms: Float[Tensor, "*b d"] | None = None
    ) -> Quantized:
        """Normalise each token; otherwise its scale would grow, which nothing else bounds."""
        codes = functional.layer_norm(latents.float(), (self.spec.dim,))
        return Quantized(codes, no_parts(codes))

    def decode(self, _parts: Int64[Tensor, "*b 0"]) -> Float[Tensor, "*b d"]:
        """Raise `ValueError`: codes are not made of parts."""
        raise ValueError(no_indices("decoding of parts"))

    def near(
        self,
        _parts: Int64[Tensor, "*b 0"],
        _uniforms: Float[Tensor, "*b n"],
        _num_near: Float[Tensor, ""],
    ) -> Int64[Tensor, "*b 0"]:
        """Raise `ValueError`: real numbers have no near tokens."""
        raise ValueError(no_indices("a near token"))

    def losses(self, _latents: Float[Tensor, "b k d"]) -> dict[str, Float[Tensor, ""]]:
        """None: there is nothing that codes are to be near to."""
        return {}


def moments(
    latents: Float[Tensor, "*b e"],
) -> tuple[Float[Tensor, "*b d"], Float[Tensor, "*b d"]]:
    """Means and log-variances of latents, in float32."""
    mean, log_variance = latents.float().chunk(2, -1)
    return mean, log_variance.clamp(*_LOG_VARIANCES)


def no_parts(codes: Float[Tensor, "*b d"]) -> Int64[Tensor, "*b 0"]:
    """Parts of tokens that have none."""
    return codes.new_empty((*codes.shape[:-1], 0), dtype=torch.int64)
