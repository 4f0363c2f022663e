"""Every further term of the tokenizer's loss does what its seam promises.

The terms are read off the settings: a new one is tested as it is added. See
`mergevq.tokenizer.seams.Term`.
"""

import functools
from dataclasses import fields, is_dataclass, replace
from typing import get_args

import pytest
import torch

from mergevq.config.objective import LossConfig
from mergevq.config.parts import Quantizer, weights_of
from mergevq.config.recipes.digits import digits32
from mergevq.data.batches import Batch
from mergevq.metrics.lpips import Perceptual
from mergevq.runtime import distributed
from mergevq.tokenizer.build import build_terms
from mergevq.tokenizer.losses.terms import term_weights, total
from mergevq.tokenizer.tokenizer import Tokenizer
from mergevq.training.tokenizer_step import build
from tests.support.small import shrink

NAMES = [item.name for item in fields(LossConfig) if is_dataclass(getattr(LossConfig(), item.name))]
SEVEN = list(term_weights(LossConfig(), {}, 0.0))[:7]
each_term = pytest.mark.parametrize("name", NAMES)


def config_of(name, weight=0.5):
    """A loss with this further term."""
    plain = LossConfig(perceptual_trunk="squeeze")
    return replace(plain, **{name: replace(getattr(plain, name), weight=weight)})


@functools.cache
def trunk():
    torch.manual_seed(0)
    return Perceptual("squeeze")


@functools.cache
def trained():
    """A batch, and what a small tokenizer makes of it in training."""
    torch.manual_seed(0)
    model = Tokenizer(shrink(digits32()).model).train()
    image = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(1)) * 2 - 1
    number = torch.zeros(2, dtype=torch.int64)
    batch = Batch(image=image, label=number, student_view=None, teacher_view=None, index=number)
    return batch, model(image, 16)


@each_term
def test_a_term_is_built_by_its_weight_alone(name):
    settings = getattr(LossConfig(), name)
    assert (fields(settings)[0].name, settings.weight) == ("weight", 0.0)
    assert build_terms(LossConfig(), trunk()) == ()
    (term,) = build_terms(config_of(name), trunk())
    assert term.name == name


@each_term
def test_a_term_is_a_finite_number_with_a_gradient_of_the_reconstruction(name):
    batch, output = trained()
    (term,) = build_terms(config_of(name), trunk())
    image = output.reconstruction.detach().requires_grad_()
    value = term(output._replace(reconstruction=image), batch)
    assert value.shape == ()
    assert value.dtype == torch.float32
    assert value.isfinite()
    (gradient,) = torch.autograd.grad(value, image)
    assert gradient.isfinite().all()
    assert gradient.count_nonzero() > 0
    # Weight and graph are none of its business.
    (other,) = build_terms(config_of(name, 2.0), trunk())
    assert torch.equal(other(output, batch), value)


@each_term
def test_a_term_does_not_depend_on_autocast(name):
    batch, output = trained()
    (term,) = build_terms(config_of(name), trunk())
    plain = term(output, batch)
    with torch.autocast("cpu", torch.bfloat16):
        cast = term(output, batch)
    assert cast.dtype == torch.float32
    assert torch.equal(plain, cast)


@each_term
def test_a_name_is_that_of_one_term(name):
    own = {term for kind in get_args(Quantizer) for term in weights_of(kind())}
    assert name not in {*SEVEN, *own, "loss"}
    assert config_of(name).further_weights[name] == 0.5


@each_term
def test_the_seven_terms_come_first_in_the_sum(name):
    assert SEVEN == [
        "reconstruction",
        "perceptual",
        "adversarial",
        "commitment",
        "entropy",
        "source",
        "alignment",
    ]
    assert list(term_weights(LossConfig(), {"own": 1.0}, 0.0))[7:] == ["own"]
    assert list(term_weights(config_of(name), {"own": 1.0}, 0.0))[7:] == ["own", name]


@each_term
def test_a_step_adds_the_weighted_term_after_the_others(name, monkeypatch):
    pytest.importorskip("sklearn")
    monkeypatch.setattr(
        "mergevq.training.tokenizer_step.load_perceptual", lambda *_args, **_kwargs: trunk()
    )
    run = replace(shrink(digits32()), loss=config_of(name))
    world = distributed.World(rank=0, world_size=1, local_rank=0, device=torch.device("cpu"))
    learner = build(run, world, num_classes=10)
    batch, _ = trained()
    losses, output = learner.losses(batch, 16)
    assert list(losses)[:7] == SEVEN
    assert list(losses)[-1] == name
    (term,) = learner.terms
    assert torch.equal(losses[name], term(output, batch))
    weights = term_weights(run.loss, weights_of(run.model.quantizer), 0.0)
    without = {each: value for each, value in losses.items() if each != name}
    expected = total(without, weights) + 0.5 * losses[name]
    torch.testing.assert_close(total(losses, weights), expected)


@each_term
def test_without_the_weights_of_the_trunk_a_run_goes_on_and_says_so(name, monkeypatch, caplog):
    monkeypatch.setattr(
        "mergevq.training.tokenizer_step.load_perceptual", lambda *_args, **_kwargs: None
    )
    run = replace(shrink(digits32()), loss=config_of(name))
    world = distributed.World(rank=0, world_size=1, local_rank=0, device=torch.device("cpu"))
    learner = build(run, world, num_classes=10)
    assert learner.terms == ()
    assert name not in learner.losses(trained()[0], 16)[0]
    assert f"WITHOUT perceptual loss and {name.capitalize()} loss" in caplog.text
