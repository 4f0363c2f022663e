"""Tests of `mergevq.tokenizer.losses.distillation`; tests/contracts/test_distillations.py has what
every kind keeps.
"""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from mergevq.config.objective import Semantic as SemanticSettings
from mergevq.config.recipes.digits import digits32
from mergevq.tokenizer.losses.cells import TokenizerCells
from mergevq.tokenizer.losses.distillation import Semantic, cosine_distance
from mergevq.tokenizer.seams import TokenizerOutput
from mergevq.tokenizer.tokenizer import Tokenizer
from tests.support.parts import tokenizer_config

SMALL = tokenizer_config(
    image_size=32,
    channels=8,
    num_res_blocks=1,
    num_layers=3,
    num_heads=2,
    layer_scale=0.1,
    num_bits=8,
    source_dim=16,
    num_source_layers=1,
    num_source_heads=2,
    num_decoder_layers=2,
    num_decoder_heads=2,
    num_kept=16,
)


with torch.device("meta"):
    ENCODER = Tokenizer(SMALL).encoder
"""An encoder that is not looked at."""


@pytest.fixture
def model():
    torch.manual_seed(0)
    return Tokenizer(SMALL)


def images(count=3):
    return torch.rand(count, 3, 32, 32, generator=torch.Generator().manual_seed(1)) * 2 - 1


def test_a_cosine_by_hand():
    student, target = torch.tensor([[[3.0, 4.0]]]), torch.tensor([[[4.0, 3.0]]])
    assert float(cosine_distance(student, target)) == pytest.approx(1 - 0.96)
    assert float(cosine_distance(student, -2 * student)) == pytest.approx(2)
    # A mean over places and images.
    both = torch.tensor([[[3.0, 4.0], [3.0, 4.0]]])
    assert float(cosine_distance(both, torch.cat([target, student], 1))) == pytest.approx(0.02)


def test_features_of_zeros_have_a_finite_gradient():
    student = torch.zeros(1, 2, 3, requires_grad=True)
    loss = cosine_distance(student, torch.zeros(1, 2, 3))
    loss.backward()
    assert float(loss.detach()) == 1
    assert student.grad.isfinite().all()


# ----------------------------------------------------------------------------------- semantic


class Fixed(TokenizerCells):
    """A teacher with the same features for every image."""

    def __init__(self, features):
        self.features = features
        self.out_dim = features.shape[-1]
        self.seen = []

    def __call__(self, image, grid_shape):
        self.seen.append((image, grid_shape))
        return self.features


def output_of(decoded, grid_shape=(1, 2)):
    encoded = SimpleNamespace(grid_shape=grid_shape)
    return TokenizerOutput(None, encoded, {}, None, decoded)


def semantic(features, dim=2):
    torch.manual_seed(0)
    return Semantic(SemanticSettings(layer=1), dim, Fixed(features))


def test_a_student_with_the_teachers_features_has_no_loss(generator):
    features = torch.randn(3, 2, 5, generator=generator)
    loss = semantic(features, dim=5)
    loss.head = torch.nn.Identity()  # The head has no way to be one.
    assert float(loss.loss(ENCODER, images(), output_of(features))) == pytest.approx(0, abs=1e-6)
    assert float(loss.loss(ENCODER, images(), output_of(3 * features))) == pytest.approx(
        0, abs=1e-6
    )
    assert float(loss.loss(ENCODER, images(), output_of(-features))) == pytest.approx(2)


def test_the_head_is_three_linear_layers_four_times_as_wide_with_silu(generator):
    features = torch.randn(3, 2, 5, generator=generator)
    loss = semantic(features)
    assert [tuple(p.shape) for p in loss.parameters() if p.ndim == 2] == [(8, 2), (8, 8), (5, 8)]
    tokens = torch.randn(3, 2, 2, generator=generator)
    one, _, two, _, three = loss.head
    expected = three(torch.nn.functional.silu(two(torch.nn.functional.silu(one(tokens)))))
    torch.testing.assert_close(loss.head(tokens), expected)


def test_the_teacher_sees_the_image_and_gets_no_gradient(generator):
    features = torch.randn(3, 2, 5, generator=generator).requires_grad_()
    loss = semantic(features)
    image, tokens = images(), torch.randn(3, 2, 2, generator=generator).requires_grad_()
    loss.loss(ENCODER, image, output_of(tokens)).backward()
    assert features.grad is None
    assert tokens.grad.any()
    ((seen, grid_shape),) = loss.teacher.seen
    assert seen is image
    assert grid_shape == (1, 2)
    assert not any(value is features for value in loss.state_dict().values())


def test_without_tokens_of_the_decoder_there_is_nothing_to_compare(generator):
    loss = semantic(torch.randn(3, 2, 5, generator=generator))
    with pytest.raises(ValueError, match="needs decoder_layer 1"):
        loss.loss(ENCODER, images(), output_of(None))


@pytest.mark.parametrize("layer", [0, 1, 2])
def test_tokens_are_those_after_the_block_that_is_named(model, layer):
    seen = []
    block = model.decoder.blocks[min(layer, 1)]

    def take(_, given, made):
        seen.append(made if layer == 2 else given[0])

    with block.register_forward_hook(take):
        output = model(images(), 16, decoder_layer=layer)
    assert torch.equal(output.decoded, seen[0])
    assert output.decoded.shape == (3, 64, SMALL.decoder.width)
    plain = model(images(), 16)
    assert plain.decoded is None
    assert torch.equal(plain.reconstruction, output.reconstruction)


def test_a_block_that_the_decoder_does_not_have_is_refused():
    run = digits32()
    assert run.model.decoder.num_blocks == 2
    with pytest.raises(ValueError, match=r"layer \(3\) must be at most the 2 blocks of .* cnn"):
        replace(run, distillation=SemanticSettings(layer=3))
    assert replace(run, distillation=SemanticSettings(layer=2)).own_weights["semantic"] == 0.5
