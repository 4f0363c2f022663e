import pytest
import torch
from generators import ORDERS, tiny_batch, tiny_generator
from torch import nn

from mergevq.int8 import Int8Linear, logit_error, quantize_weights


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


def test_a_bias_is_refused():
    with pytest.raises(ValueError, match="a layer with a bias"):
        Int8Linear(nn.Linear(4, 4))


def test_every_linear_layer_is_replaced_in_a_copy():
    model = tiny_generator("raster")
    quantized = quantize_weights(model)
    assert not any(isinstance(module, nn.Linear) for module in quantized.modules())
    num_linear = sum(isinstance(module, nn.Linear) for module in model.modules())
    assert sum(isinstance(module, Int8Linear) for module in quantized.modules()) == num_linear == 14


@pytest.mark.parametrize("order", ORDERS)
def test_logits_are_close_and_not_equal(order):
    model, given = tiny_generator(order), tiny_batch(order)
    assert logit_error(model, model, **given) == 0
    assert 0 < logit_error(model, quantize_weights(model), **given) < 0.06
