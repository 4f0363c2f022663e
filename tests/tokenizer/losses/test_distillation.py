"""Tests of `mergevq.tokenizer.losses.distillation`; tests/contracts/test_distillations.py has what
every kind keeps.
"""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from mergevq.config.objective import Preserve as PreserveSettings
from mergevq.config.objective import Semantic as SemanticSettings
from mergevq.config.parts import MaskTokens, Queries
from mergevq.config.recipes.digits import digits32
from mergevq.tokenizer.losses.cells import TokenizerCells
from mergevq.tokenizer.losses.distillation import (
    Preserve,
    Semantic,
    cosine_distance,
    layer_weights,
)
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


# ----------------------------------------------------------------------------------- preserve


def test_weights_of_blocks_by_hand():
    distances = torch.tensor([0.1, 0.4])
    weights = layer_weights(distances, 2.0)
    torch.testing.assert_close(weights, torch.tensor([0.2153, 0.7847]), rtol=0, atol=1e-4)
    assert float((weights * distances).sum()) == pytest.approx(0.3354, abs=1e-4)


def test_without_distance_or_growth_blocks_have_the_weights_of_their_numbers():
    expected = torch.tensor([1.0, 2.0, 3.0, 4.0]) / 10
    torch.testing.assert_close(layer_weights(torch.zeros(4), 2.0), expected)
    torch.testing.assert_close(layer_weights(torch.tensor([0.5, 0.1, 2.0, 1.0]), 0.0), expected)


def test_weights_sum_to_one_and_grow_with_the_distance_of_their_block(generator):
    distances = torch.rand(5, generator=generator)
    weights = layer_weights(distances, 3.0)
    torch.testing.assert_close(weights.sum(), torch.tensor(1.0))
    for block in range(5):
        more = distances.clone()
        more[block] += 0.1
        moved = layer_weights(more, 3.0) - weights
        assert moved[block] > 0
        assert (moved.sum() - moved[block]) < 0
    assert layer_weights(torch.tensor([2.0, 0.0]), 1000.0).tolist() == [1, 0]


def moved(model, block=1, shift=0.3):
    """The tokenizer with one block of the encoder changed."""
    numbers = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in model.encoder.reducer.blocks[block].parameters():
            parameter.add_(shift * torch.randn(parameter.shape, generator=numbers))
    return model


def test_at_the_start_there_is_no_loss(model):
    loss = Preserve(PreserveSettings(every=1), model.encoder)
    start = loss.loss(model.encoder, images(), output_of(None))
    assert float(start.detach()) == pytest.approx(0, abs=1e-6)
    assert float(loss.loss(moved(model).encoder, images(), output_of(None)).detach()) > 0.01


def test_it_is_the_weighted_cosine_of_tokens_with_merging_off_block_by_block(model):
    loss = Preserve(PreserveSettings(beta=3.0, every=1), model.encoder)
    before = [model.features(images(), layer=n, stage="pre_merge") for n in (1, 2, 3)]
    moved(model)
    after = [model.features(images(), layer=n, stage="pre_merge") for n in (1, 2, 3)]
    distances = [
        1 - torch.nn.functional.cosine_similarity(one, other, -1).mean()
        for one, other in zip(before, after, strict=True)
    ]
    assert float(distances[0].detach()) == pytest.approx(0, abs=1e-6)
    shares = [number / 3 * torch.exp(3 * d) for number, d in enumerate(distances, 1)]
    expected = sum(s * d for s, d in zip(shares, distances, strict=True)) / sum(shares)
    torch.testing.assert_close(loss.loss(model.encoder, images(), output_of(None)), expected)


def test_no_gradient_passes_through_the_weights_or_into_the_copy(model):
    loss = Preserve(PreserveSettings(every=1), model.encoder)
    encoder = moved(model).encoder
    loss.loss(encoder, images(), output_of(None)).backward()
    assert all(parameter.grad is None for parameter in loss.parameters())
    found = encoder.stem[0].weight.grad.clone()
    encoder.zero_grad()
    pairs = zip(encoder.layers(images()), loss.encoder.layers(images()), strict=True)
    distances = torch.stack([cosine_distance(*pair) for pair in pairs])
    (layer_weights(distances.detach(), 2.0) * distances).sum().backward()
    torch.testing.assert_close(encoder.stem[0].weight.grad, found)


@pytest.mark.parametrize(("every", "taken"), [(1, [0, 1, 2, 3, 4, 5]), (4, [0, 4]), (9, [0])])
def test_one_of_so_many_images_is_compared(model, every, taken):
    loss = Preserve(PreserveSettings(every=every), model.encoder)
    some = Preserve(PreserveSettings(every=1), model.encoder)
    encoder, image = moved(model).encoder, images(6)
    found = loss.loss(encoder, image, output_of(None))
    assert torch.equal(found, some.loss(encoder, image[taken], output_of(None)))


def test_the_copy_is_of_the_start_and_shares_nothing_with_the_encoder(model):
    loss = Preserve(PreserveSettings(), model.encoder)
    start = {name: weight.clone() for name, weight in model.encoder.state_dict().items()}
    moved(model)
    for name, weight in loss.encoder.state_dict().items():
        assert torch.equal(weight, start[name])
    assert not any(parameter.requires_grad for parameter in loss.parameters())


def test_of_queries_all_are_compared():
    reducer = Queries(num_queries=16, num_layers=2, num_heads=2)
    model = replace(SMALL, reducer=reducer, expander=MaskTokens(dim=16, num_layers=1, num_heads=2))
    encoder = Tokenizer(model).encoder
    layers = encoder.layers(images())
    assert [tokens.shape for tokens in layers] == [(3, 16, SMALL.dim)] * 2
    assert torch.equal(layers[-1], encoder(images(), 16).tokens)


def test_a_start_that_is_random_or_that_stays_is_refused():
    run = digits32()
    with pytest.raises(ValueError, match="random without init_from and init_vit: set one of them"):
        replace(run, distillation=PreserveSettings())
    with pytest.raises(ValueError, match=r"encoder_lr_ratio \(0\) above 0"):
        replace(run, distillation=PreserveSettings(), init_from="x", encoder_lr_ratio=0.0)
    assert replace(run, distillation=PreserveSettings(), init_vit="x").own_weights["preserve"] == 1
