"""Weights for decoding: laid out as the processor reads them, or stored in fewer bits.

Decoding multiplies a few rows by every matrix there is, so it waits for memory, and how a matrix
lies there decides its speed. On CPUs `PackedLinear` keeps each in the blocks of oneDNN, which
changes no product and takes a half to a third of the time (docs/results.md). `Int8Linear` reads
half as many bytes as bf16: each row of a matrix is stored as integers of -127 to 127 and one scale,
activations keep their type, nothing is calibrated, and `logit_error` says what it costs in
accuracy. With more than a few rows at a time the kernel for it is slower than bf16, so the same
rounded weights are then multiplied in bf16, or in float32 by processors without bf16, in a layout
that is made at the first such call and kept beside the integers; guidance makes two rows of an
image. `Fp16Linear` reads 16 bits and multiplies in float32: of one or two rows that is faster than
bf16, of many slower, and nearer to float32 in either case. `DecodingBlock` puts either into a block
with fewer modules to call.

Shape letters: O outputs, I inputs, B batch, T tokens.
"""

import copy

import torch
from jaxtyping import Float, Int8
from torch import Tensor, nn
from torch.nn import functional

from mergevq.config.generator import AnyWeights, Weights
from mergevq.generator.build import AnyGenerator
from mergevq.generator.seams import Sequences
from mergevq.nn.llama import Block, Mask, Projection, Recall, Rotation, gated, normalized
from mergevq.runtime.device import resolve_precision

# The CPU kernel reads this many inputs at a time; other widths give wrong results or crash it.
_KERNEL_WIDTH = 32
# With more rows than this, weights in bf16 are faster than the kernel (docs/log.md).
_KERNEL_ROWS = 4
# From 4 rows on oneDNN's product in bf16 is faster than that of 1 or 2, with the same bits.
_FEWEST_ROWS = 4
_HALF_MAX = torch.finfo(torch.float16).max
_EXACT: tuple[Weights, ...] = ("float32", "fp16")
"""Weights that are multiplied in float32."""


class PackedLinear(nn.Module):
    """A linear layer without bias on a CPU, whose weight lies in the blocks that oneDNN reads."""

    def __init__(self, weight: Float[Tensor, "o i"]) -> None:
        """Lay out a weight."""
        super().__init__()
        self.fewest = _FEWEST_ROWS * weight.shape[1] if weight.dtype == torch.bfloat16 else 0
        # No buffer: the layout is this processor's, and a file of it would be read wrongly.
        self.packed = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), None)

    @staticmethod
    def serves(weight: Float[Tensor, "o i"]) -> bool:
        """Whether this processor has a product for the weight's type."""
        if weight.device.type != "cpu" or not torch.backends.mkldnn.is_available():
            return False
        if weight.dtype == torch.bfloat16:
            return torch.ops.mkldnn._is_mkldnn_bf16_supported()
        return weight.dtype == torch.float32

    def forward(self, x: Float[Tensor, "*shape i"]) -> Float[Tensor, "*shape o"]:
        """Multiply."""
        if torch.compiler.is_compiling():
            return _outside_of_graphs(x, self.packed)  # pyright: ignore[reportCallIssue]
        if 0 < 2 * x.numel() <= self.fewest and x.ndim > 1:
            # Guidance makes two rows of a lone image, which wait longer for memory than four do.
            more = torch.cat([x] * (self.fewest // x.numel()))
            product = torch.ops.mkldnn._linear_pointwise(more, self.packed, None, "none", [], "")
            return product[: len(x)]
        return torch.ops.mkldnn._linear_pointwise(x, self.packed, None, "none", [], "")


@torch.compiler.disable
def _outside_of_graphs(
    x: Float[Tensor, "*shape i"], packed: Float[Tensor, "o i"]
) -> Float[Tensor, "*shape o"]:
    """The product of a `PackedLinear`, whose layout compilers cannot read, between two graphs."""
    return torch.ops.mkldnn._linear_pointwise(x, packed, None, "none", [], "")


class Fp16Linear(nn.Module):
    """A linear layer without bias on a CPU, whose weight is float16; the rest is float32."""

    def __init__(self, weight: Float[Tensor, "o i"]) -> None:
        """Lay out a weight."""
        super().__init__()
        # No buffer, as in `PackedLinear`.
        self.packed = torch.ops.quantized.linear_prepack_fp16(weight.detach().float(), None)
        # fbgemm's kernels of AVX2 for one row and for two, which also serve what is left of many,
        # sum in another order than those for three to six: threes never leave one or two.
        self.rows_at_once = 3 if torch.backends.cpu.get_cpu_capability() == "AVX2" else 1

    @staticmethod
    def is_there() -> bool:
        """Whether this processor has the product."""
        return "fbgemm" in torch.backends.quantized.supported_engines

    @classmethod
    def serves(cls, weight: Float[Tensor, "o i"]) -> bool:
        """Whether this processor has the product, and float16 the range of the weight."""
        fits = weight.device.type == "cpu" and bool(weight.abs().max() <= _HALF_MAX)
        return fits and cls.is_there()

    def forward(self, x: Float[Tensor, "*shape i"]) -> Float[Tensor, "*shape o"]:
        """Multiply; a row has the same bits among any number of rows."""
        num_rows = x.shape[:-1].numel()
        if self.rows_at_once > 1 and num_rows % self.rows_at_once:
            rows = functional.pad(x.reshape(num_rows, -1), (0, 0, 0, -num_rows % self.rows_at_once))
            return self._product(rows)[:num_rows].view(*x.shape[:-1], -1)
        return self._product(x)

    def _product(self, x: Float[Tensor, "*shape i"]) -> Float[Tensor, "*shape o"]:
        if torch.compiler.is_compiling():
            return _half_outside_of_graphs(x, self.packed)  # pyright: ignore[reportCallIssue]
        return torch.ops.quantized.linear_dynamic_fp16(x, self.packed)


@torch.compiler.disable
def _half_outside_of_graphs(
    x: Float[Tensor, "*shape i"], packed: torch.ScriptObject
) -> Float[Tensor, "*shape o"]:
    """The product of an `Fp16Linear`, between two graphs as that of `PackedLinear`."""
    return torch.ops.quantized.linear_dynamic_fp16(x, packed)


class Int8Linear(nn.Module):
    """A linear layer without bias whose weight is stored in 8 bits."""

    def __init__(self, weight: Float[Tensor, "o i"], dtype: torch.dtype) -> None:
        """Round a weight, by one scale for each output; inputs and outputs are in `dtype`."""
        super().__init__()
        weight = weight.detach().float()
        largest = weight.abs().amax(dim=1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
        scale = largest / 127
        # No buffers: nothing saves these, and a module finds its plain attributes sooner.
        self.weight: Int8[Tensor, "o i"] = (weight / scale).round().to(torch.int8)
        self.scale: Float[Tensor, "o"] = scale[:, 0].to(dtype)
        # In float32 PyTorch's kernel for 8 bits is the slower way.
        has_kernel = dtype == torch.bfloat16 and weight.device.type == "cpu"
        fits = weight.shape[1] % _KERNEL_WIDTH == 0
        self.most = _KERNEL_ROWS * weight.shape[1] if has_kernel and fits else 0
        # A list, as submodules would be saved and moved.
        self.wide: list[nn.Module] = []

    def forward(self, x: Float[Tensor, "*shape i"]) -> Float[Tensor, "*shape o"]:
        """Multiply; a few rows on a CPU in bf16 without ever expanding the weight."""
        if 0 < x.numel() <= self.most:
            flat = x.reshape(-1, x.shape[-1])
            product = torch.ops.aten._weight_int8pack_mm(flat, self.weight, self.scale)
            return product.view(*x.shape[:-1], -1)
        if self.most and not torch.compiler.is_compiling() and (self.wide or self._lay_out()):
            return self.wide[0](x)
        return functional.linear(x, self.weight.to(x.dtype)) * self.scale

    def _lay_out(self) -> bool:
        """Keep the rounded weight beside its integers, in a type that this processor multiplies."""
        weight = self.weight.to(torch.bfloat16) * self.scale[:, None]
        if PackedLinear.serves(weight):
            self.wide = [PackedLinear(weight)]
        elif PackedLinear.serves(weight.float()):
            self.wide = [_InFloat32(weight)]
        return bool(self.wide)


class _InFloat32(nn.Module):
    """A product of bf16 by a processor that has none: in float32, and rounded again."""

    def __init__(self, weight: Float[Tensor, "o i"]) -> None:
        """Lay out a weight."""
        super().__init__()
        self.layer = PackedLinear(weight.float())

    def forward(self, x: Float[Tensor, "*shape i"]) -> Float[Tensor, "*shape o"]:
        """Multiply."""
        return self.layer(x.float()).to(x.dtype)


class DecodingBlock(nn.Module):
    """A `Block` for decoding: gains are in the weights behind them, one module stands for nine.

    On two cores calling modules took an eighth of the time of a token (docs/log.md).
    """

    def __init__(self, block: Block, weights: Weights) -> None:
        """Take `block` apart; it is of no use afterwards."""
        super().__init__()
        attention, ffn = block.attention, block.ffn
        self.dtype = torch.float32 if weights in _EXACT else torch.bfloat16
        # Not registered as submodules, of which a module finds the names last.
        self.layers = (
            _layer(attention.qkv.weight * block.attention_norm.weight, weights),
            _layer(attention.out.weight, weights),
            _layer(ffn.up.weight * block.ffn_norm.weight, weights),
            _layer(ffn.down.weight, weights),
        )
        del attention.qkv, attention.out
        self.attention = attention

    def forward(
        self,
        x: Float[Tensor, "b n c"],
        turns: Rotation | None = None,
        mask: Mask | None = None,
        recall: Recall | None = None,
    ) -> Float[Tensor, "b n c"]:
        """Mix tokens, then channels, as `Block` does."""
        qkv, out, up, down = self.layers
        x = x + out(self.attention.mix(qkv(normalized(x, self.dtype)), turns, mask, recall))
        return x + down(gated(up(normalized(x, self.dtype))))


def resolve_weights(weights: AnyWeights, device: torch.device) -> Weights:
    """Weights by their name: `auto` is those that sample fastest and stay near float32.

    That is bf16 where the device multiplies it in hardware, else float16 on processors with a
    product for it, else float32. int8 is for those who ask: its error is larger.
    """
    if weights != "auto":
        return weights
    if resolve_precision("auto", device) is not None:
        return "bf16"
    return "fp16" if device.type == "cpu" and Fp16Linear.is_there() else "float32"


def as_weights(generator: AnyGenerator, weights: Weights) -> AnyGenerator:
    """A copy of a generator for sampling only, with weights of another type.

    Args:
        generator: in evaluation mode, where it is to sample.
        weights: `bf16` and `int8` have activations in bf16, `fp16` in float32.
    """
    copied = copy.deepcopy(generator).requires_grad_(requires_grad=False)
    for layers in copied.layers:
        for number, layer in enumerate(layers):
            if isinstance(layer, Block):
                layers[number] = DecodingBlock(layer, weights)
            elif isinstance(layer, Projection):
                layers[number] = _layer(layer.weight, weights)
    return copied if weights in _EXACT else copied.to(torch.bfloat16)


def _layer(weight: Float[Tensor, "o i"], weights: Weights) -> nn.Module:
    """The layer to multiply by a weight with."""
    if weights == "int8":
        return Int8Linear(weight, torch.bfloat16)
    if weights == "fp16":
        if Fp16Linear.serves(weight):
            return Fp16Linear(weight)
        # The same numbers but beyond float16's range, in the time of float32.
        weight = weight.float().half().float().where(weight.abs() <= _HALF_MAX, weight.float())
    weight = weight.to(torch.float32 if weights in _EXACT else torch.bfloat16)
    if PackedLinear.serves(weight):
        return PackedLinear(weight)
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    linear.weight = nn.Parameter(weight, requires_grad=False)
    return linear


@torch.no_grad()
def logit_error(generator: AnyGenerator, other: AnyGenerator, sequences: Sequences) -> float:
    """How far another generator's logits are off, as a share of the spread of the first's.

    Args:
        generator: the one taken as right.
        other: the same in other types.
        sequences: to compare on; everything that is random about them is drawn.

    Returns:
        Root mean square difference over the standard deviation, all parts together.
    """
    right, wrong = (
        torch.cat([part.flatten() for part in model.logits(sequences)])
        for model in (generator, other)
    )
    legal = right > -torch.inf
    difference = (right - wrong)[legal]
    return float(difference.square().mean().sqrt() / right[legal].std())
