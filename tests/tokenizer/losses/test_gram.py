"""Tests of `mergevq.tokenizer.losses.gram`."""

import pytest
import torch

from mergevq.config import objective
from mergevq.config.objective import LossConfig
from mergevq.data.batches import Batch
from mergevq.metrics.lpips import Perceptual
from mergevq.tokenizer.losses.gram import Gram, gram
from mergevq.tokenizer.seams import TokenizerOutput


def test_a_gram_matrix_by_hand():
    # Two channels at two cells: their products are 5, 11 and 25, over 2 x 2.
    features = torch.tensor([[[[1.0, 2.0]], [[3.0, 4.0]]]])
    assert gram(features).tolist() == [[[1.25, 2.75], [2.75, 6.25]]]


def test_the_order_of_cells_does_not_change_it(generator):
    features = torch.randn(2, 5, 3, 4, generator=generator)
    order = torch.randperm(12, generator=generator)
    permuted = features.flatten(2)[..., order].unflatten(2, (3, 4))
    torch.testing.assert_close(gram(permuted), gram(features))
    assert not torch.allclose(gram(features.flip(1)), gram(features))


class Taps(Perceptual):
    """A trunk whose taps are the image as it is."""

    def __init__(self):
        super().__init__("squeeze")

    def activations(self, image, num_taps):
        return [image] * num_taps


def loss_of(reconstruction, image, perceptual, num_taps=1):
    output = TokenizerOutput(reconstruction, None, {}, None)  # pyright: ignore[reportArgumentType]
    number = torch.zeros(len(image), dtype=torch.int64)
    batch = Batch(image=image, label=number, student_view=None, teacher_view=None, index=number)
    return Gram(objective.Gram(weight=1.0, num_taps=num_taps), perceptual)(output, batch)


def test_the_loss_by_hand():
    image = torch.zeros(1, 2, 1, 2)
    reconstruction = torch.tensor([[[[1.0, 2.0]], [[3.0, 4.0]]]])
    expected = (1.25**2 + 2 * 2.75**2 + 6.25**2) / 4
    assert float(loss_of(reconstruction, image, Taps())) == pytest.approx(expected)
    # A mean over the taps.
    assert float(loss_of(reconstruction, image, Taps(), 3)) == pytest.approx(expected)
    assert float(loss_of(image, image, Taps())) == 0


@pytest.mark.parametrize("num_taps", [1, 3, 7])
def test_it_is_that_of_the_trunk_as_it_is(num_taps, generator):
    torch.manual_seed(0)
    trunk = Perceptual("squeeze")
    image, other = torch.rand(2, 2, 3, 32, 32, generator=generator) * 2 - 1
    distances = []
    for layers in (2, 5, 8, 10, 11, 12, 13)[:num_taps]:
        one, two = (
            trunk.features[:layers]((x - trunk.shift) / trunk.scale) for x in (image, other)
        )
        b, c, h, w = one.shape
        matrices = [
            torch.einsum("bchw,bdhw->bcd", features, features) / (c * h * w)
            for features in (one, two)
        ]
        distances.append(((matrices[0] - matrices[1]) ** 2).mean())
        assert b == 2
    expected = sum(distances) / num_taps
    torch.testing.assert_close(loss_of(other, image, trunk, num_taps), expected)


def test_more_taps_than_the_trunk_has_are_refused():
    image, trunk = torch.zeros(1, 3, 32, 32), Perceptual("alex")
    with pytest.raises(ValueError, match=r"num_taps \(6\) must be at most the 5 of the .* 'alex'"):
        loss_of(image, image, trunk, 6)


def test_features_of_zeros_have_a_finite_gradient():
    image = torch.zeros(1, 2, 3, 3, requires_grad=True)
    loss_of(image, torch.ones(1, 2, 3, 3), Taps()).backward()
    assert image.grad.isfinite().all()


def test_it_needs_a_perceptual_loss_beside_it():
    with pytest.raises(ValueError, match=r"gram.weight \(0.5\) needs a perceptual_weight \(0.0\)"):
        LossConfig(perceptual_weight=0.0, gram=objective.Gram(weight=0.5))
    with pytest.raises(ValueError, match=r"weight \(-1.0\) must be"):
        objective.Gram(weight=-1.0)
