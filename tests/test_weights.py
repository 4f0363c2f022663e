import pytest
import torch
from generators import ORDERS, tiny_batch, tiny_generator
from torch import nn

from mergevq.weights import Int8Linear, PackedLinear, as_weights, logit_error


def linear(inputs=64, outputs=24):
    return nn.Linear(inputs, outputs, bias=False)


def test_weights_round_to_half_a_step_of_their_row():
    layer = linear()
    with torch.no_grad():
        layer.weight[3] *= 100
    stored = Int8Linear(layer)
    restored = stored.weight * stored.scale[:, None]
    assert stored.weight.abs().amax(dim=1).tolist() == [127] * 24
    assert ((restored - layer.weight).abs() <= 0.5001 * stored.scale[:, None]).all()


@pytest.mark.parametrize("rows", [1, 3, 8, 9, 20])
@pytest.mark.parametrize("inputs", [40, 64])
def test_the_kernel_equals_the_expanded_product(rows, inputs, generator):
    stored = Int8Linear(linear(inputs).to(torch.bfloat16))
    x = torch.randn(rows, 1, inputs, generator=generator).to(torch.bfloat16)
    expected = x.float() @ (stored.weight.float() * stored.scale.float()[:, None]).mT
    torch.testing.assert_close(stored(x).float(), expected, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("shape", [(1, 1, 24), (24,), (3, 1, 24), (2, 70, 24), (0, 24)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_layout_changes_no_product(shape, dtype, generator):
    layer = linear(24, 10).to(dtype)
    x = torch.randn(shape, generator=generator).to(dtype)
    assert PackedLinear.serves(layer)
    product = PackedLinear(layer)(x)
    assert product.dtype == dtype
    tolerance = 1e-6 if dtype == torch.float32 else 1e-2
    torch.testing.assert_close(product, layer(x), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("stored", [Int8Linear, PackedLinear])
def test_a_bias_is_refused(stored):
    with pytest.raises(ValueError, match="a layer with a bias"):
        stored(nn.Linear(4, 4))


@pytest.mark.parametrize(
    ("weights", "layer"), [("float32", PackedLinear), ("bf16", PackedLinear), ("int8", Int8Linear)]
)
def test_every_linear_layer_is_replaced_in_a_copy(weights, layer):
    model = tiny_generator("raster")
    copied = as_weights(model, weights)
    assert not any(isinstance(module, nn.Linear) for module in copied.modules())
    num_linear = sum(isinstance(module, nn.Linear) for module in model.modules())
    assert sum(isinstance(module, layer) for module in copied.modules()) == num_linear == 14
    assert copied.dtype == (torch.float32 if weights == "float32" else torch.bfloat16)
    assert model.dtype == torch.float32


@pytest.mark.parametrize("order", ORDERS)
def test_logits_are_close_and_not_equal(order):
    model, given = tiny_generator(order), tiny_batch(order)
    errors = [
        logit_error(model, as_weights(model, w), **given) for w in ("float32", "bf16", "int8")
    ]
    assert errors[0] < 1e-5
    assert errors[0] < errors[1] < errors[2] < 0.1
