"""Weights of 8 bits for decoding, which waits for memory and not for arithmetic.

Each row of a matrix is stored as integers of -127 to 127 and one scale; activations keep their
type. Nothing is calibrated. `logit_error` says what it costs in accuracy. On CPUs it is faster than
bf16 for a few rows at a time, about six; guidance makes two rows of an image.

Shape letters: O outputs, I inputs, B batch, T tokens.
"""

import copy

import torch
from jaxtyping import Float, Int8, Int64
from torch import Tensor, nn

from mergevq.generator import Generator
from mergevq.transformer import multiply

# The CPU kernel reads this many inputs at a time; other widths give wrong results or crash it.
_KERNEL_WIDTH = 32
# With more rows than this, expanding the weights first is faster than the kernel.
_KERNEL_ROWS = 8


class Int8Linear(nn.Module):
    """A linear layer without bias whose weight is stored in 8 bits."""

    weight: Int8[Tensor, "o i"]
    scale: Float[Tensor, "o"]

    def __init__(self, linear: nn.Linear) -> None:
        """Round the weight of `linear`, by one scale for each output.

        Raises:
            ValueError: the layer has a bias.
        """
        super().__init__()
        if linear.bias is not None:
            raise ValueError("a layer with a bias cannot be stored in 8 bits; use it as it is")
        weight = linear.weight.detach().float()
        largest = weight.abs().amax(dim=1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
        scale = largest / 127
        self.register_buffer("weight", (weight / scale).round().to(torch.int8))
        self.register_buffer("scale", scale[:, 0].to(linear.weight.dtype))

    def forward(self, x: Float[Tensor, "*shape i"]) -> Float[Tensor, "*shape o"]:
        """Multiply; on a CPU in bf16 without ever expanding the weight."""
        rows = x.numel() // x.shape[-1]
        if self._has_kernel(x) and rows <= _KERNEL_ROWS:
            product = torch.ops.aten._weight_int8pack_mm(
                x.reshape(rows, -1), self.weight, self.scale
            )
            return product.reshape(*x.shape[:-1], -1)
        return multiply(x, self.weight.to(x.dtype)) * self.scale

    def _has_kernel(self, x: Tensor) -> bool:
        """Whether PyTorch has a kernel that reads 8 bits; in float32 its own is slower."""
        fits = x.shape[-1] % _KERNEL_WIDTH == 0
        return fits and x.device.type == "cpu" and x.dtype == torch.bfloat16


def quantize_weights(generator: Generator) -> Generator:
    """A copy of a generator with every linear layer in 8 bits, for sampling only.

    Convert the generator to bf16 first: that is what the CPU kernel reads activations in.
    """
    quantized = copy.deepcopy(generator).requires_grad_(requires_grad=False)
    for module in list(quantized.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, nn.Linear):
                setattr(module, name, Int8Linear(child))
    return quantized


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
