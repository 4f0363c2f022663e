import math
import subprocess
import sys
from typing import get_args

import pytest
import torch
from torch import nn

from mergevq.config.generator import (
    Weights,
)
from mergevq.generator.weights import (
    DecodingBlock,
    Fp16Linear,
    Int8Linear,
    PackedLinear,
    as_weights,
    logit_error,
    resolve_weights,
)
from mergevq.nn.llama import Block, rotation
from mergevq.runtime import device as places
from tests.support.generators import ORDERS, tiny_batch, tiny_generator

HAS_BF16 = PackedLinear.serves(torch.zeros(1, 1, dtype=torch.bfloat16))
BF16 = pytest.param(
    torch.bfloat16,
    marks=pytest.mark.skipif(not HAS_BF16, reason="no layout for bf16 on this processor"),
)


def weight(inputs=64, outputs=24, dtype=torch.float32):
    return torch.randn(outputs, inputs).to(dtype)


def test_weights_round_to_half_a_step_of_their_row():
    given = weight()
    given[3] *= 100
    stored = Int8Linear(given, torch.float32)
    restored = stored.weight * stored.scale[:, None]
    assert stored.weight.abs().amax(dim=1).tolist() == [127] * 24
    assert ((restored - given).abs() <= 0.5001 * stored.scale[:, None]).all()


@pytest.mark.parametrize("rows", [0, 1, 3, 4, 5, 20])
@pytest.mark.parametrize("inputs", [40, 64])
def test_the_kernel_equals_the_expanded_product(rows, inputs, generator):
    stored = Int8Linear(weight(inputs), torch.bfloat16)
    x = torch.randn(rows, 1, inputs, generator=generator).to(torch.bfloat16)
    expected = x.float() @ (stored.weight.float() * stored.scale.float()[:, None]).mT
    torch.testing.assert_close(stored(x).float(), expected, rtol=2e-2, atol=5e-2)


def test_many_rows_are_multiplied_in_bf16_by_weights_that_are_laid_out_once(generator):
    stored = Int8Linear(weight(), torch.bfloat16)
    few, many = (torch.randn(rows, 64, generator=generator).bfloat16() for rows in (4, 5))
    stored(few)
    assert not stored.wide
    product = stored(many)
    (wide,) = stored.wide
    assert torch.equal(product, wide(many))
    stored(many)
    assert stored.wide == [wide]
    assert not stored.state_dict()


def test_a_processor_without_bf16_multiplies_many_rows_in_float32(generator, monkeypatch):
    serves = PackedLinear.serves
    monkeypatch.setattr(PackedLinear, "serves", lambda w: w.dtype != torch.bfloat16 and serves(w))
    stored = Int8Linear(weight(), torch.bfloat16)
    x = torch.randn(20, 1, 64, generator=generator).bfloat16()
    rounded = (stored.weight.to(torch.bfloat16) * stored.scale[:, None]).float()
    assert torch.equal(stored(x), torch.nn.functional.linear(x.float(), rounded).bfloat16())
    assert len(stored.wide) == 1


@pytest.mark.parametrize(
    ("device", "has_bf16", "has_fp16", "expected"),
    [
        ("cpu", True, True, "bf16"),
        ("cpu", False, True, "fp16"),
        ("cpu", False, False, "float32"),
        ("meta", False, True, "float32"),
    ],
)
def test_weights_are_chosen_by_what_the_device_multiplies(
    device, has_bf16, has_fp16, expected, monkeypatch
):
    monkeypatch.setattr(places, "_has_bf16", lambda _: has_bf16)
    monkeypatch.setattr(Fp16Linear, "is_there", lambda: has_fp16)
    assert resolve_weights("auto", torch.device(device)) == expected
    for name in get_args(Weights):
        assert resolve_weights(name, torch.device(device)) == name


@pytest.mark.parametrize("shape", [(1, 1, 24), (24,), (3, 1, 24), (2, 70, 24), (0, 24)])
@pytest.mark.parametrize("dtype", [torch.float32, BF16])
def test_the_layout_changes_no_product(shape, dtype, generator):
    given = weight(24, 10, dtype)
    x = torch.randn(shape, generator=generator).to(dtype)
    assert PackedLinear.serves(given)
    product = PackedLinear(given)(x)
    assert product.dtype == dtype
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(product, x @ given.mT, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("shape", [(1, 24), (1, 1, 24), (2, 1, 24), (1, 2, 24), (3, 1, 24)])
@pytest.mark.parametrize("dtype", [torch.float32, BF16])
def test_a_row_has_the_same_bits_among_few_rows_as_among_many(shape, dtype, generator):
    layer = PackedLinear(weight(24, 10, dtype))
    many = torch.randn(16, 24, generator=generator).to(dtype)
    few = many[: math.prod(shape[:-1])]
    product = layer(few.reshape(shape))
    assert product.shape == (*shape[:-1], 10)
    assert torch.equal(product.flatten(0, -2), layer(many)[: len(few)])


@pytest.mark.parametrize("qk_norm", [False, True])
@pytest.mark.parametrize("key_heads", [1, 4])
def test_a_block_for_decoding_equals_the_block(qk_norm, key_heads, generator):
    sizes = {"dim": 32, "hidden_dim": 48, "num_heads": 4, "key_heads": key_heads}
    block = Block(**sizes, qk_norm=qk_norm, dropout=0.5).eval()
    with torch.no_grad():
        for parameter in block.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) / 4)
        x = torch.randn(2, 5, 32, generator=generator)
        turns = rotation(torch.rand(1, 5, 2) * 9, head_dim=8)
        mask = torch.rand(2, 5, 5) > 0.5
        mask |= torch.eye(5, dtype=torch.bool)
        expected = [block(x, turns), block(x, None, mask)]
        decoding = DecodingBlock(block, "float32")
        for ours, theirs in zip(
            [decoding(x, turns), decoding(x, None, mask)], expected, strict=True
        ):
            torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize(
    ("weights", "layer"),
    [
        ("float32", PackedLinear),
        ("fp16", Fp16Linear),
        ("bf16", PackedLinear if HAS_BF16 else nn.Linear),
        ("int8", Int8Linear),
    ],
)
def test_every_linear_layer_is_replaced_in_a_copy(weights, layer):
    model = tiny_generator("raster")
    copied = as_weights(model, weights)
    left = Block if layer is nn.Linear else nn.Linear | Block
    assert not any(isinstance(module, left) for module in copied.modules())
    blocks = [module for module in copied.modules() if isinstance(module, DecodingBlock)]
    layers = [*copied.network.head.outputs, *(part for block in blocks for part in block.layers)]
    num_linear = sum(isinstance(module, nn.Linear) for module in model.modules())
    assert len(layers) == num_linear == 14
    assert all(isinstance(part, layer) for part in layers)
    exact = weights in {"float32", "fp16"}
    assert copied.network.dtype == (torch.float32 if exact else torch.bfloat16)
    assert model.network.dtype == torch.float32


def test_a_processor_without_the_layout_keeps_linear_layers(monkeypatch):
    monkeypatch.setattr(PackedLinear, "serves", lambda _: False)
    model, given = tiny_generator("raster"), tiny_batch("raster")
    assert logit_error(model, as_weights(model, "float32"), given) < 1e-5


def test_no_matrix_is_kept_twice():
    copied = as_weights(tiny_generator("raster"), "float32")
    num_kept = sum(parameter.numel() for parameter in copied.parameters())
    # Embeddings, and the gains of the head's norm and of queries and keys.
    embedded = sum(m.weight.numel() for m in copied.modules() if isinstance(m, nn.Embedding))
    assert num_kept == embedded + copied.config.dim


@pytest.mark.parametrize("order", ORDERS)
def test_logits_are_close_and_not_equal(order):
    model, given = tiny_generator(order), tiny_batch(order)
    errors = [
        logit_error(model, as_weights(model, weights), given) for weights in get_args(Weights)
    ]
    assert errors[0] < 1e-5
    assert errors == sorted(errors)
    assert errors[1] < 2e-3
    assert errors[3] < 0.1


@pytest.mark.parametrize("rows", [0, 1, 2, 5, 16])
def test_half_a_weight_is_multiplied_in_float32(rows, generator):
    given = weight()
    x = torch.randn(rows, 1, 64, generator=generator)
    expected = x.double() @ given.half().double().mT
    torch.testing.assert_close(Fp16Linear(given)(x).double(), expected, rtol=1e-5, atol=1e-5)


def test_a_row_has_the_same_bits_among_any_number_of_rows(generator):
    layer, x = Fp16Linear(weight()), torch.randn(64, 1, 64, generator=generator)
    expected = torch.cat([layer(row) for row in x.split(1)])
    for rows in range(1, 65):
        assert torch.equal(layer(x[:rows]), expected[:rows]), rows


@pytest.mark.parametrize("has_kernel", [False, True])
def test_half_weights_without_the_kernel_or_beyond_the_range_are_float32(has_kernel, monkeypatch):
    model, given = tiny_generator("raster"), tiny_batch("raster")
    expected = as_weights(model, "fp16").logits(given)
    if has_kernel:
        with torch.no_grad():
            model.network.head.outputs[-1].weight[0, 0] = 1e5
    else:
        monkeypatch.setattr(Fp16Linear, "serves", lambda _: False)
    found = as_weights(model, "fp16")
    assert isinstance(found.network.head.outputs[-1], PackedLinear)
    torch.testing.assert_close(found.logits(given)[0], expected[0], rtol=1e-4, atol=1e-4)
    assert logit_error(model, found, given) < 2e-3


COMPILED = """
import sys, torch
from mergevq.generator.weights import as_weights
from tests.support.generators import tiny_generator
for weights in ("float32", "fp16", "bf16", "int8"):
    model = as_weights(tiny_generator("raster"), weights)
    dtype = torch.float32 if weights in ("float32", "fp16") else torch.bfloat16
    torch.manual_seed(0)
    x = torch.randn(2, 1, model.config.dim).to(dtype)
    with torch.no_grad():
        compiled = torch.compile(model.blocks[0], backend=sys.argv[1])(x)
        # Two roundings of bf16, of values of a few units, where kernels are fused.
        size = 1e-4 if weights == "float32" else 8e-2
        torch.testing.assert_close(compiled, model.blocks[0](x), rtol=size, atol=size)
"""


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_a_block_for_decoding_compiles(backend):
    # In a process without the checks of shapes, which compilers cannot read.
    subprocess.run([sys.executable, "-c", COMPILED, backend], check=True, timeout=300)
