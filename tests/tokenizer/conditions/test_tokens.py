"""Tokens of a condition in encoder and decoder: what they change, and where they change nothing."""

from dataclasses import replace

import pytest
import torch

from mergevq.config import parts as settings
from mergevq.config.objective import SelfDistillation
from mergevq.config.parts import (
    ClassCondition,
    NoCondition,
    TextCondition,
)
from mergevq.config.recipes.conditions import digits32_class
from mergevq.config.recipes.digits import digits32
from mergevq.data.layouts import Ordered
from mergevq.runtime import distributed
from mergevq.tokenizer.conditions.tokens import ClassTokens, TextTokens, with_present
from mergevq.tokenizer.conditions.values import unknown
from mergevq.tokenizer.expanders.mask_tokens import MaskTokens
from mergevq.tokenizer.tokenizer import Tokenizer
from mergevq.training.estimate import estimate
from mergevq.training.tokenizer import train
from mergevq.training.tokenizer_step import build
from tests.support.small import shrink
from tests.training.test_tokenizer import batch

NUM_KEPT = 16
WORLD = distributed.World(rank=0, world_size=1, local_rank=0, device=torch.device("cpu"))
CLASSES = ClassCondition(num_classes=3)
TEXTS = TextCondition(dim=6, num_embeddings=3, num_bytes=20)
CONDITIONS = {
    "class": (CLASSES, torch.tensor([0, 2])),
    "text": (TEXTS, torch.randn(2, 3, 6, generator=torch.Generator().manual_seed(3))),
}


def tokenizer(condition, *, causal=False, absent="cut"):
    config = shrink(digits32_class()).model
    reducer = replace(config.reducer, causal=causal)
    expander = replace(config.expander, absent=absent)
    torch.manual_seed(0)
    model = Tokenizer(replace(config, condition=condition, reducer=reducer, expander=expander))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return model.eval()


def images():
    return torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(1)) * 2 - 1


def both(kind):
    return pytest.mark.parametrize("kind", kind, ids=str)


@both(CONDITIONS)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("absent", ["cut", "token"])
@torch.no_grad()
def test_without_its_condition_a_tokenizer_is_one_that_has_none(kind, causal, absent):
    config, _ = CONDITIONS[kind]
    model = tokenizer(config, causal=causal, absent=absent)
    plain = tokenizer(NoCondition(), causal=causal, absent=absent)
    state = model.state_dict()
    own = {name for name in state if ".condition." in name}
    assert {name.partition(".")[0] for name in own} == {"encoder", "expander"}
    plain.load_state_dict({name: state[name] for name in state if name not in own})
    nothing = unknown(config, 2, images())
    found = model.reconstruct(images(), NUM_KEPT, condition=nothing)
    expected = plain.reconstruct(images(), NUM_KEPT)
    torch.testing.assert_close(found.encoded.latents, expected.encoded.latents)
    torch.testing.assert_close(found.image, expected.image)
    lengths = torch.tensor([3, NUM_KEPT])
    codes, layout = expected.encoded.codes, expected.layout
    given = model.expander(codes, layout, (8, 8), lengths, nothing)
    torch.testing.assert_close(given.tokens, plain.expander(codes, layout, (8, 8), lengths).tokens)


@both(CONDITIONS)
def test_training_without_conditions_moves_nothing_of_them(kind):
    config, _ = CONDITIONS[kind]
    model = tokenizer(config).train()
    output = model(images(), NUM_KEPT, condition=unknown(config, 2, images()))
    output.reconstruction.square().mean().backward()
    own = {name: p.grad for name, p in model.named_parameters() if ".condition." in name}
    assert own
    for name, gradient in own.items():
        assert gradient is not None, f"{name} takes no part"
        assert not gradient.any(), name


@both(CONDITIONS)
def test_a_condition_reaches_codes_and_pixels_of_its_own_image_alone(kind):
    config, condition = CONDITIONS[kind]
    model = tokenizer(config).train()
    output = model(images(), NUM_KEPT, condition=condition)
    output.reconstruction.square().mean().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, f"{name} takes no part"
        assert parameter.grad.any() or ".condition." not in name, name
    model.eval()
    other = condition.clone()
    other[1] = 1
    before, after = (model.encode(images(), NUM_KEPT, each) for each in (condition, other))
    assert torch.equal(before.latents[0], after.latents[0])
    assert not torch.equal(before.latents[1], after.latents[1])
    first, second = (
        model.decode(before.codes, before.layout, condition=each) for each in (condition, other)
    )
    assert torch.equal(first[0], second[0])
    assert not torch.equal(first[1], second[1])


def test_vectors_that_are_the_same_tell_classes_apart_nowhere():
    model = tokenizer(CLASSES)
    for tokens in (model.encoder.condition, model.expander.condition):
        torch.nn.init.zeros_(tokens.vectors)
    results = [
        model.reconstruct(images(), NUM_KEPT, condition=torch.tensor(classes))
        for classes in ([0, 0], [1, 2])
    ]
    assert torch.equal(results[0].image, results[1].image)
    assert torch.equal(results[0].encoded.latents, results[1].encoded.latents)


def test_a_decoder_may_be_the_only_one_that_sees_it():
    model = tokenizer(replace(CLASSES, sees="decoder"))
    assert model.encoder.condition is None
    encoded = model.encode(images(), NUM_KEPT)
    given = model.encode(images(), NUM_KEPT, torch.tensor([0, 1]))
    assert torch.equal(encoded.latents, given.latents)
    with pytest.raises(ValueError, match="needs the class of each image"):
        model.decode(encoded.codes, encoded.layout)


@pytest.mark.parametrize("call", ["encode", "reconstruct"])
def test_a_condition_is_not_forgotten(call):
    with pytest.raises(ValueError, match="needs the class of each image: pass `condition`"):
        getattr(tokenizer(CLASSES), call)(images(), NUM_KEPT)
    model = tokenizer(NoCondition())
    with pytest.raises(ValueError, match="this tokenizer has no condition"):
        getattr(model, call)(images(), NUM_KEPT, condition=torch.tensor([0, 1]))
    with pytest.raises(ValueError, match="has a condition, which must be given"):
        tokenizer(CLASSES).encoder(images(), NUM_KEPT)


def test_features_are_of_the_image_alone():
    model = tokenizer(CLASSES)
    found = model.features(images(), num_kept=NUM_KEPT, pool="class")
    nothing = model.encode(images(), NUM_KEPT, torch.tensor([-1, -1])).class_token
    torch.testing.assert_close(found, nothing)
    assert len(model.encoder.layers(images())) == model.num_layers


def test_bits_of_an_image_have_those_of_its_condition():
    model = tokenizer(ClassCondition(num_classes=8))
    bits = model.bits(4)
    assert (bits.tokens, bits.source, bits.condition, bits.total) == (32, 0, 3, 35)
    assert tokenizer(TEXTS).bits(4).total == 32 + 160


def test_a_class_is_one_vector_and_a_text_one_for_each_embedding_that_is_not_zero():
    tokens = ClassTokens(CLASSES, 4)
    found = tokens(torch.tensor([2, -1]))
    assert torch.equal(found.tokens[0, 0], tokens.vectors[2])
    assert found.present.tolist() == [[True], [False]]
    tokens = TextTokens(TEXTS, 4)
    text = torch.tensor([[[1.0, 0, 0, 0, 0, 2], [0, 0, 0, 0, 0, 0]]])
    found = tokens(text)
    assert found.present.tolist() == [[True, False]]
    weight, bias = tokens.project.weight, tokens.project.bias
    expected = weight[:, 0] + 2 * weight[:, 5] + bias + tokens.positions[0]
    torch.testing.assert_close(found.tokens[0, 0], expected)


def test_a_mask_hides_absent_tokens_from_all():
    mask = torch.tensor([[True, True, False], [True, True, False], [True, True, True]])
    present = torch.tensor([[True], [False]])
    found = with_present(mask, present, end=2, num_inputs=3)
    assert found.shape == (2, 1, 3, 3)
    assert torch.equal(found[0, 0], mask)
    assert found[1, 0].tolist() == [[True, False, False]] * 2 + [[True, False, True]]
    alone = with_present(None, present, end=2, num_inputs=3)
    assert alone[:, 0, 0].tolist() == [[True, True, True], [True, False, True]]


def test_tokens_with_places_have_no_condition():
    message = (
        "model.condition.kind class is for tokens without places, and model.reducer.kind merge"
    )
    with pytest.raises(ValueError, match=message):
        replace(digits32().model, condition=CLASSES)


def run(**values):
    small = shrink(digits32_class())
    return replace(
        small,
        model=replace(small.model, condition=ClassCondition(num_classes=3, **values)),
        train=replace(small.train, precision="float32"),
    )


def test_a_share_of_the_images_of_a_step_is_without_its_class_however_it_is_cut():
    learner = build(run(dropout=0.25), WORLD, num_classes=3)
    whole = batch(8)._replace(label=torch.arange(8) % 3)
    found = learner._condition(0, 1, whole)
    assert int((found == -1).sum()) == 2
    halves = [
        learner._condition(place, 2, batch(4)._replace(label=labels))
        for place, labels in enumerate(whole.label.split(4))
    ]
    assert torch.equal(torch.cat(halves), found)
    learner.state.step = 1
    assert not torch.equal(learner._condition(0, 1, whole), found)


def test_training_takes_the_classes_of_the_data_and_a_teacher_of_itself_sees_none():
    pytest.importorskip("sklearn")
    message = r"tokenizer \(3\) must be the 10 classes of the data"
    for refused in (train, estimate):
        with pytest.raises(ValueError, match=message):
            refused(run())
    teacher = SelfDistillation(view_size=24, num_head_layers=2, num_prototypes=16)
    learner = build(replace(run(), teacher=teacher), WORLD, num_classes=3)
    one = batch(4)._replace(label=torch.arange(4) % 3)
    targets = [
        learner.self_targets([one._replace(label=labels)], NUM_KEPT)[0]
        for labels in (one.label, torch.zeros(4, dtype=torch.int64))
    ]
    assert torch.equal(*targets)
    learner.step(one)
    assert learner.state.guard.num_skipped == 0


def test_a_wrong_class_hurts_where_tokens_leave_it_to_the_class():
    """Dark and bright images, of which the tokens are all the same."""
    classes = ClassCondition(num_classes=2)
    torch.manual_seed(0)
    expander = MaskTokens(
        settings.MaskTokens(dim=16, num_layers=1, num_heads=2), 1, 1, ClassTokens(classes, 16)
    )
    decoder = torch.nn.Linear(16, 3)
    optimizer = torch.optim.AdamW([*expander.parameters(), *decoder.parameters()], lr=2e-2)
    labels = torch.tensor([0, 1, 0, 1, -1])
    image = torch.tensor([-0.8, 0.8, -0.8, 0.8, 0.0])[:, None, None].expand(5, 4, 3)

    def decoded(condition):
        given = expander(torch.ones(5, 1, 1), Ordered(1), (2, 2), condition=condition)
        return decoder(given.tokens)

    for _ in range(60):
        optimizer.zero_grad()
        (decoded(labels) - image).square().mean().backward()
        optimizer.step()
    with torch.no_grad():
        right, wrong, unknown_one = (
            float((decoded(each) - image)[:4].square().mean())
            for each in (labels, (1 - labels).clamp_max(1), torch.full((5,), -1))
        )
    assert right < 0.1 * unknown_one < 0.1 * wrong
