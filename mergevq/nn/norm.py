"""Normalisation that keeps the type and the layout of its input, also under autocast.

Source: Wu and He 2018, "Group Normalization", section 3 (arXiv:1803.08494); Ba et al. 2016, "Layer
Normalization", section 3 (arXiv:1607.06450).

Statistics are float32 in every case. Autocast on GPUs would run a whole norm in float32 and hand
that on to what follows, up to the next product.

Shape letters: B batch, C channels, H and W pixels or cells, P pixels of an image.
"""

import math
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from mergevq.nn.precision import without_autocast

_FEW_PIXELS = 1024
"""Grids below this are normalised in the contiguous layout."""
_PIXELS_IN_A_ROW = 8
"""Pixels whose channels are treated as one row."""
_ROWS_OF_A_SUM = 32
"""Rows that are summed before the sum is kept in float32."""


class LayerNorm(nn.LayerNorm):
    """Layer norm in the type of its input."""

    def forward(self, input: Float[Tensor, "*b c"]) -> Float[Tensor, "*b c"]:  # noqa: A002 - torch's name
        """Normalise the channels of each token."""
        with without_autocast(input):
            weight, bias = _fitting(self.weight, input), _fitting(self.bias, input)
            return functional.layer_norm(input, self.normalized_shape, weight, bias, self.eps)


class GroupNorm(nn.GroupNorm):
    """Group norm in the type and layout of its input."""

    def forward(self, input: Float[Tensor, "b c *p"]) -> Float[Tensor, "b c *p"]:  # noqa: A002 - torch's name
        """Normalise groups of channels over all pixels of an image."""
        with without_autocast(input):
            if is_slow(input):
                return channels_last_norm(input, self.num_groups, self.weight, self.bias, self.eps)
            weight, bias = _fitting(self.weight, input), _fitting(self.bias, input)
            return functional.group_norm(input, self.num_groups, weight, bias, self.eps)


def _fitting(parameter: Tensor | None, x: Tensor) -> Tensor | None:
    """A gain or shift in a type that the device's kernel takes beside `x`."""
    # CPUs mix float32 parameters with bf16 activations.
    return parameter if parameter is None or x.device.type == "cpu" else parameter.to(x.dtype)


def is_slow(x: Tensor) -> bool:
    """Whether torch's backward pass would be many times slower than `channels_last_norm`."""
    return (
        x.device.type == "cpu"
        and x.dtype != torch.float32
        and x.requires_grad
        and x.ndim == 4
        and not x.is_contiguous()
        and x.is_contiguous(memory_format=torch.channels_last)
    )


def channels_last_norm(
    x: Float[Tensor, "b c h w"],
    num_groups: int,
    weight: Float[Tensor, "*b c"] | None,
    bias: Float[Tensor, "*b c"] | None,
    eps: float,
) -> Float[Tensor, "b c h w"]:
    """Group norm of an image in channels_last, with a fast backward pass on a CPU.

    Args:
        x: the image.
        num_groups: groups of channels.
        weight: gain of each channel, of all images or of each; None is 1.
        bias: shift of each channel, in the shape of `weight`.
        eps: added to the variance.
    """
    return _ChannelsLast.apply(x, weight, bias, num_groups, eps)


class _ChannelsLast(torch.autograd.Function):
    """Torch's group norm, with a backward pass by rows of channels.

    Torch's own goes through such an image channel by channel, and takes 10 to 40 times as long on a
    CPU (docs/log.md).
    """

    @staticmethod
    def forward(
        ctx: Any,  # noqa: ANN401
        x: Float[Tensor, "b c h w"],
        weight: Float[Tensor, "*b c"] | None,
        bias: Float[Tensor, "*b c"] | None,
        num_groups: int,
        eps: float,
    ) -> Float[Tensor, "b c h w"]:
        batch, channels, height, width = x.shape
        shared = weight is not None and weight.ndim == 1
        # On small grids torch's forward pass in this layout takes longer than two copies.
        laid_out = x.contiguous() if height * width < _FEW_PIXELS else x
        out, mean, rstd = torch.native_group_norm(
            laid_out,
            weight if shared else None,
            bias if shared else None,
            batch,
            channels,
            height * width,
            num_groups,
            eps,
        )
        ctx.save_for_backward(x, weight, mean, rstd)
        if weight is None or bias is None or shared:
            return out.contiguous(memory_format=torch.channels_last)
        repeats = _repeats(x)
        gain, shift = (_across(each, repeats, x.dtype) for each in (weight, bias))
        return _grid(torch.addcmul(shift, _rows(out, repeats), gain), x.shape)

    @staticmethod
    def backward(
        ctx: Any,  # noqa: ANN401
        *grads: Float[Tensor, "b c h w"],
    ) -> tuple[Tensor | None, ...]:
        x, weight, mean, rstd = ctx.saved_tensors
        repeats = _repeats(x)
        rows, grad = _rows(x, repeats), _rows(grads[0].to(x.dtype), repeats)
        groups = (x.shape[0], mean.shape[1], x.shape[1] // mean.shape[1])
        mean, rstd = mean.float()[..., None], rstd.float()[..., None]
        total = _sums(grad, repeats).view(groups)
        product = _sums(grad * rows, repeats).view(groups)
        # The same as (normalised pixel) x (its gradient), summed over pixels.
        normed = (product - mean * total) * rstd
        gain = (
            torch.ones_like(total[:1]) if weight is None else weight.float().view(-1, *groups[1:])
        )
        count = total.shape[2] * x.shape[2] * x.shape[3]
        slope = -(gain * normed).sum(2, keepdim=True) * rstd**2 / count
        offset = -(gain * total).sum(2, keepdim=True) * rstd / count - slope * mean
        scale, slope, offset = (
            _across(each.expand_as(total).flatten(1), repeats, x.dtype)
            for each in (gain * rstd, slope, offset)
        )
        out = torch.addcmul(torch.addcmul(offset, grad, scale), rows, slope)
        if weight is None:
            return _grid(out, x.shape), None, None, None, None
        per_weight = [each.flatten(1) for each in (normed, total)]
        if weight.ndim == 1:
            per_weight = [each.sum(0) for each in per_weight]
        return _grid(out, x.shape), *(each.to(weight.dtype) for each in per_weight), None, None


def _repeats(x: Float[Tensor, "b c h w"]) -> int:
    """Pixels in a row, of a width that makes vector instructions of a CPU worth while."""
    return math.gcd(x.shape[2] * x.shape[3], _PIXELS_IN_A_ROW)


def _rows(x: Float[Tensor, "b c h w"], repeats: int) -> Float[Tensor, "b r n"]:
    """Pixels as they lie in channels_last, some in a row."""
    return x.permute(0, 2, 3, 1).contiguous().view(x.shape[0], -1, repeats * x.shape[1])


def _grid(rows: Float[Tensor, "b r n"], shape: torch.Size) -> Float[Tensor, "b c h w"]:
    """The inverse of `_rows`."""
    batch, channels, height, width = shape
    return rows.view(batch, height, width, channels).permute(0, 3, 1, 2)


def _across(
    values: Float[Tensor, "b c"], repeats: int, dtype: torch.dtype
) -> Float[Tensor, "b 1 n"]:
    """A number of each channel for every pixel of a row."""
    return values.to(dtype)[:, None].repeat(1, 1, repeats)


def _sums(rows: Float[Tensor, "b r n"], repeats: int) -> Float[Tensor, "b c"]:
    """Sums over all pixels, in float32 but for those of a few rows, which are rounded once."""
    batch, num_rows, width = rows.shape
    parts = rows.view(batch, -1, math.gcd(num_rows, _ROWS_OF_A_SUM), width).sum(2)
    return parts.sum(1, dtype=torch.float32).view(batch, repeats, -1).sum(1)
