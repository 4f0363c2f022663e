"""A regularizer in training: what it changes, what it leaves, and when it is there."""

from dataclasses import replace

import pytest
import torch

from mergevq.config.objective import NoTeacher
from mergevq.config.parts import NoRegularizer, Perturb
from mergevq.config.recipes.tiny64 import tiny64_gr
from mergevq.data.batches import Batch
from mergevq.runtime import distributed
from mergevq.training.tokenizer_step import build
from tests.support.small import shrink
from tests.support.steps import update_tokenizer

WORLD = distributed.World(rank=0, world_size=1, local_rank=0, device=torch.device("cpu"))
ALL = Perturb(image_share=1.0)
NUM_KEPT = 16


def learner_of(regularizer, world=WORLD):
    run = shrink(tiny64_gr())
    run = replace(
        run,
        regularizer=regularizer,
        loss=replace(run.loss, perceptual_weight=0.0, adversarial_weight=0.0, source_gradient=0.5),
        teacher=NoTeacher(),
        train=replace(run.train, precision="float32", num_steps=10),
    )
    return build(run, world, num_classes=0)


def batch(size=4):
    numbers = torch.Generator().manual_seed(1)
    image = torch.rand(size, 3, 32, 32, generator=numbers) * 2 - 1
    labels = torch.zeros(size, dtype=torch.int64)
    return Batch(image, labels, None, None, torch.arange(size))


def trained(regularizer):
    """Numbers and weights after two steps."""
    learner = learner_of(regularizer)
    numbers = []
    for _ in range(2):
        numbers.append(update_tokenizer(learner, [batch()], NUM_KEPT)[0])
        learner.state.step += 1
    return numbers, list(learner.state.tokenizer.state_dict().values())


def same(first, second):
    pairs = zip(first[1], second[1], strict=True)
    return first[0] == second[0] and all(torch.equal(*pair) for pair in pairs)


def test_no_share_trains_to_the_bits_of_no_regularizer():
    none = trained(NoRegularizer())
    assert same(none, trained(Perturb(image_share=0.0)))
    assert same(none, trained(replace(ALL, token_share=0.0)))
    assert not same(none, trained(ALL))


def test_losses_of_the_quantizer_and_use_of_the_codebook_are_without_it():
    learners = [learner_of(regularizer) for regularizer in (NoRegularizer(), ALL)]
    plain, changed = (update_tokenizer(learner, [batch()], NUM_KEPT)[0] for learner in learners)
    for name in ("commitment", "entropy"):
        assert plain[name] == changed[name] != 0
    for name in ("reconstruction", "source"):
        assert plain[name] != changed[name]
    first, second = (learner.state.usage.compute() for learner in learners)
    assert torch.equal(first.bit_probs, second.bit_probs)
    assert first.usage == second.usage


def test_decoder_and_source_predictor_get_wrong_codes_and_the_true_source(monkeypatch):
    learner = learner_of(ALL)
    seen = []
    train_pass = learner.state.tokenizer.expander.train_pass

    def look(codes, predicted_from, layout, shape, *, inferred, lengths, condition):
        assert lengths is condition is None
        seen.append((codes, predicted_from, layout))
        return train_pass(codes, predicted_from, layout, shape, inferred=inferred)

    monkeypatch.setattr(learner.state.tokenizer.expander, "train_pass", look)
    draws = learner._draws(0, 1, batch(), NUM_KEPT)
    _, output = learner.losses(batch(), NUM_KEPT, draws=draws)
    ((codes, predicted_from, layout),) = seen
    assert (codes != output.encoded.codes).any(-1).all()
    assert torch.equal(codes, predicted_from)
    assert layout is output.encoded.layout


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("num_parts", [1, 2])
def test_draws_are_those_of_the_whole_batch_however_it_is_shared(num_parts, world_size):
    whole = learner_of(ALL)._draws(0, 1, batch(8), NUM_KEPT)
    size = 8 // world_size // num_parts
    found = []
    for rank in range(world_size):
        learner = learner_of(ALL, replace(WORLD, rank=rank, world_size=world_size))
        for position in range(num_parts):
            place = rank * num_parts + position
            found.append(learner._draws(place, num_parts, batch(size), NUM_KEPT))
    assert torch.equal(torch.cat([draws.images for draws in found]), whole.images)
    assert torch.equal(torch.cat([draws.tokens for draws in found]), whole.tokens)
    assert whole.tokens.shape == (8, NUM_KEPT, 20)


def test_every_step_has_draws_of_its_own_and_its_place_in_the_run():
    learner = learner_of(ALL)
    first = learner._draws(0, 1, batch(), NUM_KEPT)
    learner.state.step = 4
    later = learner._draws(0, 1, batch(), NUM_KEPT)
    assert (first.progress, later.progress) == (0, torch.tensor(0.4))
    assert not torch.equal(first.tokens, later.tokens)
    assert not torch.equal(first.images, later.images)


def test_it_is_no_part_of_the_tokenizer_that_is_validated_and_saved():
    learner = learner_of(ALL)
    plain = learner_of(NoRegularizer()).state.tokenizer
    tokenizer = learner.state.tokenizer
    assert tokenizer.state_dict().keys() == plain.state_dict().keys()
    assert not any(module is learner.regularizer for module in tokenizer.modules())
    image = batch().image
    for mode in (True, False):
        expected = plain.train(mode).reconstruct(image, NUM_KEPT).image
        assert torch.equal(tokenizer.train(mode).reconstruct(image, NUM_KEPT).image, expected)


def test_without_a_regularizer_nothing_is_drawn():
    learner = learner_of(NoRegularizer())
    assert learner.regularizer is None
    assert learner._draws(0, 1, batch(), NUM_KEPT) is None
