"""Weights for decoding: laid out as the processor reads them, or stored in 8 bits.

Decoding multiplies a few rows by every matrix there is, so it waits for memory, and how a matrix
lies there decides its speed. On CPUs `PackedLinear` keeps each in the blocks of oneDNN, which
changes no product and takes a half to a third of the time (docs/results.md). `Int8Linear` reads
half as many bytes as bf16: each row of a matrix is stored as integers of -127 to 127 and one scale,
activations keep their type, nothing is calibrated, and `logit_error` says what it costs in
accuracy. With more than about six rows at a time, it is the slower of the two; guidance makes two
rows of an image.

Shape letters: O outputs, I inputs, B batch, T tokens.
"""

import copy

import torch
from jaxtyping import Float, Int8, Int64
from torch import Tensor, nn
from torch.nn import functional

from mergevq.config import Weights
from mergevq.generator import Generator

# The CPU kernel reads this many inputs at a time; other widths give wrong results or crash it.
_KERNEL_WIDTH = 32
# With more rows than this, expanding the weights first is faster than the kernel.
_KERNEL_ROWS = 8


class PackedLinear(nn.Module):
    """A linear layer without bias on a CPU, whose weight lies in the blocks that oneDNN reads."""

    def __init__(self, linear: nn.Linear) -> None:
        """Lay out the weight of `linear`.

        Raises:
            ValueError: the layer has a bias.
        """
        super().__init__()
        _refuse_bias(linear)
        # No buffer: the layout is this processor's, and a file of it would be read wrongly.
        self.packed = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach(), None)

    @staticmethod
    def serves(linear: nn.Linear) -> bool:
        """Whether this processor has a product for the layer's type."""
        weight = linear.weight
        if weight.device.type != "cpu" or not torch.backends.mkldnn.is_available():
            return False
        if weight.dtype == torch.bfloat16:
            return torch.ops.mkldnn._is_mkldnn_bf16_supported()
        return weight.dtype == torch.float32

    def forward(self, x: Float[Tensor, "*shape i"]) -> Float[Tensor, "*shape o"]:
        """Multiply."""
        return torch.ops.mkldnn._linear_pointwise(x, self.packed, None, "none", [], "")


class Int8Linear(nn.Module):
    """A linear layer without bias whose weight is stored in 8 bits."""

    def __init__(self, linear: nn.Linear) -> None:
        """Round the weight of `linear`, by one scale for each output.

        Raises:
            ValueError: the layer has a bias.
        """
        super().__init__()
        _refuse_bias(linear)
        weight = linear.weight.detach().float()
        largest = weight.abs().amax(dim=1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
        scale = largest / 127
        # No buffers: nothing saves these, and a module finds its plain attributes sooner.
        self.weight: Int8[Tensor, "o i"] = (weight / scale).round().to(torch.int8)
        self.scale: Float[Tensor, "o"] = scale[:, 0].to(linear.weight.dtype)
        # In float32 PyTorch's kernel for 8 bits is the slower way.
        has_kernel = self.scale.dtype == torch.bfloat16 and weight.device.type == "cpu"
        fits = linear.in_features % _KERNEL_WIDTH == 0
        self.most = _KERNEL_ROWS * linear.in_features if has_kernel and fits else 0

    def forward(self, x: Float[Tensor, "*shape i"]) -> Float[Tensor, "*shape o"]:
        """Multiply; on a CPU in bf16 without ever expanding the weight."""
        if 0 < x.numel() <= self.most and x.dtype == self.scale.dtype:
            flat = x.reshape(-1, x.shape[-1])
            product = torch.ops.aten._weight_int8pack_mm(flat, self.weight, self.scale)
            return product.view(*x.shape[:-1], -1)
        return functional.linear(x, self.weight.to(x.dtype)) * self.scale


def as_weights(generator: Generator, weights: Weights) -> Generator:
    """A copy of a generator for sampling only, with weights of another type.

    Args:
        generator: in evaluation mode.
        weights: `bf16` and `int8` have activations in bf16.
    """
    copied = copy.deepcopy(generator).requires_grad_(requires_grad=False)
    if weights != "float32":
        copied = copied.to(torch.bfloat16)
    for module in list(copied.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, nn.Linear):
                setattr(module, name, _layer(child, weights))
    return copied


def _layer(linear: nn.Linear, weights: Weights) -> nn.Module:
    """The layer to multiply with instead."""
    if weights == "int8":
        return Int8Linear(linear)
    return PackedLinear(linear) if PackedLinear.serves(linear) else linear


def _refuse_bias(linear: nn.Linear) -> None:
    """Raise `ValueError` when a layer has a bias."""
    if linear.bias is not None:
        raise ValueError("a layer with a bias cannot be stored otherwise; use it as it is")


@torch.no_grad()
def logit_error(
    generator: Generator,
    other: Generator,
    indices: Int64[Tensor, "b t"],
    class_label: Int64[Tensor, "b"],
    num_kept: int,
    *,
    anchors: Int64[Tensor, "b t"] | None = None,
    order: Int64[Tensor, "b t"] | None = None,
) -> float:
    """How far another generator's logits are off, as a share of the spread of the first's.

    Args:
        generator: the one taken as right.
        other: the same in other types.
        indices: sequences to compare on; they and the rest are as in `Generator.logits`.
        class_label: their classes.
        num_kept: their K.
        anchors: cells of the tokens.
        order: of the slots.

    Returns:
        Root mean square difference over the standard deviation, all parts together.
    """
    right, wrong = (
        torch.cat(
            [
                part.flatten()
                for part in model.logits(
                    indices, class_label, num_kept, anchors=anchors, order=order
                )
            ]
        )
        for model in (generator, other)
    )
    legal = right > -torch.inf
    difference = (right - wrong)[legal]
    return float(difference.square().mean().sqrt() / right[legal].std())
