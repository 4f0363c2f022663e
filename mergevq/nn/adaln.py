"""Blocks whose norms follow a condition, such as a time; at the start each is the identity.

Source: Peebles and Xie 2023, "Scalable Diffusion Models with Transformers", section 3.2 (adaLN-Zero
and time embeddings, arXiv:2212.09748); Bachmann et al. 2025, "FlexTok", section 3 (a modulation for
patches and one for registers, arXiv:2502.13967).

Shape letters: B batch, N tokens, M conditions, C channels, F channels of the condition, O outputs.
"""

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from mergevq.nn.blocks import NORM_EPS, Attention, Mlp
from mergevq.nn.norm import LayerNorm
from mergevq.nn.positions import sincos

_TIME_SCALE = 1000.0
"""Times are multiplied by it: in [0, 1] all but the first few of the sines would be constant."""
_TIME_FEATURES = 256


class TimeEmbedding(nn.Module):
    """A time in [0, 1] as channels: sines and cosines, then two linear layers."""

    def __init__(self, dim: int) -> None:
        """Make the layers."""
        super().__init__()
        self.fc1 = nn.Linear(_TIME_FEATURES, dim)
        self.fc2 = nn.Linear(dim, dim)

    def forward(self, time: Float[Tensor, "b"]) -> Float[Tensor, "b f"]:
        """Embed each time."""
        features = sincos(_TIME_SCALE * time.float(), _TIME_FEATURES).to(self.fc1.weight.dtype)
        return self.fc2(functional.silu(self.fc1(features)))


class Modulation(nn.Module):
    """Shifts, scales and gates of tokens by a condition, from weights of their own for each set."""

    def __init__(self, cond_dim: int, dim: int, count: int, num_sets: int = 1) -> None:
        """Start at zero: no shift, no scale, closed gates.

        Args:
            cond_dim: channels of the condition.
            dim: channels of tokens.
            count: numbers for each channel.
            num_sets: sets of tokens.
        """
        super().__init__()
        self.count = count
        self.linears = nn.ModuleList(nn.Linear(cond_dim, count * dim) for _ in range(num_sets))
        for linear in self.linears:
            _zero(linear)

    def forward(self, cond: Float[Tensor, "b m f"], sizes: tuple[int, ...]) -> tuple[Tensor, ...]:
        """The numbers, each of shape (B, M, C), or of several sets (B, N, C).

        Args:
            cond: one condition for all tokens (M = 1), or one for each (M = N) of a single set.
            sizes: number of tokens in each set, one set after the other.
        """
        cond = functional.silu(cond)
        parts = [linear(cond) for linear in self.linears]
        if len(parts) > 1:
            sets = zip(parts, sizes, strict=True)
            parts = [part.expand(-1, size, -1) for part, size in sets]
        return torch.cat(parts, dim=1).chunk(self.count, dim=-1)


def modulate(
    x: Float[Tensor, "b n c"], shift: Float[Tensor, "b m c"], scale: Float[Tensor, "b m c"]
) -> Float[Tensor, "b n c"]:
    """Scale by 1 + `scale`, then shift."""
    return x * (1 + scale) + shift


class AdaBlock(nn.Module):
    """Attention and an MLP with modulated norms and gates."""

    def __init__(self, dim: int, num_heads: int, cond_dim: int, num_sets: int = 1) -> None:
        """Make the layers; `dim` must be a multiple of `num_heads`."""
        super().__init__()
        self.norm1 = _plain_norm(dim)
        self.attn = Attention(dim, num_heads)
        self.norm2 = _plain_norm(dim)
        self.mlp = Mlp(dim)
        self.modulation = Modulation(cond_dim, dim, 6, num_sets)

    def forward(
        self, x: Float[Tensor, "b n c"], cond: Float[Tensor, "b 1 f"], sizes: tuple[int, ...]
    ) -> Float[Tensor, "b n c"]:
        """Let all tokens look at each other; `sizes` is the number of tokens in each set."""
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation(cond, sizes)
        x = x + gate1 * self.attn(modulate(self.norm1(x), shift1, scale1)).tokens
        return x + gate2 * self.mlp(modulate(self.norm2(x), shift2, scale2))


class AdaMlp(nn.Module):
    """An MLP with a modulated norm and a gate: each token alone, with its own condition."""

    def __init__(self, dim: int, cond_dim: int) -> None:
        """Make the layers."""
        super().__init__()
        self.norm = _plain_norm(dim)
        self.mlp = Mlp(dim)
        self.modulation = Modulation(cond_dim, dim, 3)

    def forward(
        self, x: Float[Tensor, "b n c"], cond: Float[Tensor, "b m f"]
    ) -> Float[Tensor, "b n c"]:
        """Transform each token by its own condition (M = N) or by one for all (M = 1)."""
        shift, scale, gate = self.modulation(cond, ())
        return x + gate * self.mlp(modulate(self.norm(x), shift, scale))


class AdaOutput(nn.Module):
    """A modulated norm and a linear layer that starts at zero."""

    def __init__(self, dim: int, cond_dim: int, out_dim: int) -> None:
        """Make the layers."""
        super().__init__()
        self.norm = _plain_norm(dim)
        self.modulation = Modulation(cond_dim, dim, 2)
        self.linear = nn.Linear(dim, out_dim)
        _zero(self.linear)

    def forward(
        self, x: Float[Tensor, "b n c"], cond: Float[Tensor, "b m f"]
    ) -> Float[Tensor, "b n o"]:
        """Project each token; the condition is as of `AdaMlp`."""
        shift, scale = self.modulation(cond, ())
        return self.linear(modulate(self.norm(x), shift, scale))


def zero_start(module: nn.Module) -> None:
    """Set modulations and outputs inside a module to zero again, after it was initialised."""
    for part in module.modules():
        if isinstance(part, Modulation):
            for linear in part.linears:
                _zero(linear)
        elif isinstance(part, AdaOutput):
            _zero(part.linear)


def _plain_norm(dim: int) -> LayerNorm:
    """A layer norm without gains: the modulation has them."""
    return LayerNorm(dim, eps=NORM_EPS, elementwise_affine=False)


def _zero(linear: nn.Module) -> None:
    """Set a linear layer to zero."""
    for parameter in linear.parameters():
        nn.init.zeros_(parameter)
