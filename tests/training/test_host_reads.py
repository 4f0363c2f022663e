"""Steps of every stage on a device of which the host cannot read: nothing waits for a GPU."""

import copy
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from mergevq.config.objective import NoTeacher
from mergevq.config.recipes.digits import (
    digits32_divprune,
    digits32_global_map,
    digits32_learned_merge,
    digits32_perturb,
    digits32_pool,
    digits32_queries,
    digits32_select,
    digits32_vq,
)
from mergevq.config.recipes.holistic import digits32_holistic
from mergevq.config.training import SourceRun, TokenizerRun
from mergevq.data.images import open_images
from mergevq.data.tokens.dataset import open_tokens
from mergevq.evaluate.probe.finetune import finetune
from mergevq.runtime.optim import Ema
from mergevq.training.decoder import step as decoder_step
from mergevq.training.fit import state_of
from mergevq.training.generator_step import build as build_generator_learner
from mergevq.training.posthoc.part import train_part
from mergevq.training.tokenizer_step import TokenizerLearner, build
from tests.evaluate.probe import test_finetune as finetuning
from tests.support import probes
from tests.support.reads import Unreadable, host_reads, unreadable_device
from tests.support.small import shrink
from tests.support.steps import judged
from tests.training import test_generator as generators
from tests.training import test_tokenizer as tokenizers
from tests.training.decoder import test_run as decoders
from tests.training.test_tokenizer import WORLD

material = generators.material


@pytest.fixture
def unreadable():
    with unreadable_device() as found:
        yield found


def with_running_means() -> TokenizerRun:
    """Codes that follow tokens, a teacher of labels, and an adversary."""
    run = judged(shrink(digits32_vq()))
    return replace(run, train=replace(run.train, precision="float32"))


RUNS = {"self": tokenizers.small, "labels": with_running_means}


def with_perturbed_tokens() -> TokenizerRun:
    """A regularizer that draws."""
    run = shrink(digits32_perturb())
    return replace(run, loss=replace(run.loss, perceptual_weight=0.0, discriminator_start_step=0))


@pytest.mark.parametrize("make", [*RUNS.values(), with_perturbed_tokens])
def test_a_step_of_a_tokenizer(make, unreadable):
    learner = build(make(), replace(WORLD, device=unreadable.device), num_classes=10)
    unreadable.copies.clear()
    numbers = learner.step(tokenizers.batch())
    assert "grad_norm" in numbers
    assert unreadable.copies == []
    with pytest.raises(NotImplementedError, match="meta"):
        learner.state.guard.read()


def of(recipe) -> TokenizerRun:
    """A recipe's step, without what is the same in all."""
    run = shrink(recipe())
    loss = replace(run.loss, perceptual_weight=0.0, adversarial_weight=0.0)
    return replace(run, loss=loss, train=replace(run.train, precision="float32"))


REDUCERS = [
    digits32_pool,
    digits32_global_map,
    digits32_divprune,
    digits32_select,
    digits32_queries,
    digits32_holistic,
]
EXCEPTIONS = [digits32_learned_merge]
"""Recipes whose step has to read: the numbers that it learns are shapes."""


@pytest.mark.parametrize("recipe", REDUCERS)
def test_a_step_with_each_reducer(recipe, unreadable):
    learner = build(of(recipe), replace(WORLD, device=unreadable.device), num_classes=10)
    unreadable.copies.clear()
    learner.step(tokenizers.batch())
    assert unreadable.copies == []


@pytest.mark.parametrize("recipe", EXCEPTIONS)
def test_a_step_that_has_to_read_does_so_once(recipe, monkeypatch, unreadable):
    # The encoder runs once: there is no other view of an image, and no average that teaches.
    batch = tokenizers.batch()._replace(student_view=None)
    run = replace(of(recipe), teacher=NoTeacher())
    learner = build(run, replace(WORLD, device=unreadable.device), num_classes=10)
    with pytest.raises(NotImplementedError, match="meta"):
        learner.step(batch)
    tolist, reads = torch.Tensor.tolist, []

    def known(tensor: torch.Tensor) -> object:
        if tensor.device.type != "meta":
            return tolist(tensor)
        reads.append(tensor.shape)
        return torch.zeros(tensor.shape).tolist()

    monkeypatch.setattr(torch.Tensor, "tolist", known)
    unreadable.copies.clear()
    learner.step(batch)
    assert len(reads) == 1
    assert unreadable.copies == []


@pytest.mark.parametrize("order", generators.ORDERS)
def test_a_step_of_a_generator(order, material, unreadable):
    run = generators.small(material, order)
    tokens = open_tokens(run.tokens.path)
    world = replace(WORLD, device=unreadable.device)
    learner = build_generator_learner(run, world, tokens.record)
    unreadable.copies.clear()
    learner.step(tokens.batch(range(4), learner.state.generator.config.num_kept))
    assert unreadable.copies == []


def test_a_step_of_a_decoder(tmp_path: Path, unreadable: Unreadable):
    config = shrink(decoders.digits32()).model
    decoders.Tokenizer(config).save_pretrained(tmp_path / "source")
    run = decoders.small(tmp_path)
    tokenizer = decoders.Tokenizer.from_pretrained(run.tokenizer).to(unreadable.device)
    world = replace(WORLD, device=unreadable.device)
    learner = decoder_step.build(run, world, tokenizer, decoders.SCALE)
    unreadable.copies.clear()
    learner.step(decoders.batch())
    assert unreadable.copies == []


def test_steps_of_a_part(unreadable):
    """The guard reads at the end, and nothing before."""
    part, seen = torch.nn.Linear(2, 2, device=unreadable.device), []
    run = SourceRun(num_steps=3, batch_size=1)

    def loss_of(step: int, batch: torch.Tensor) -> torch.Tensor:
        seen.append(step)
        return part(batch).square().mean()

    batches = [torch.zeros(1, 2, device=unreadable.device)] * 3
    with pytest.raises(NotImplementedError, match="meta"):
        train_part(run, part, Ema(part, 0.9), batches, loss_of)
    assert seen == [0, 1, 2]
    assert unreadable.copies == []


def test_steps_of_fine_tuning(tmp_path, generator, unreadable):
    """As those of a part."""
    images = open_images(str(probes.write_colours(tmp_path, 4)))
    model = finetuning.classifier(generator).to(unreadable.device)
    config = replace(
        finetuning.PLAIN, num_epochs=1, batch_size=8, drop_path=0.1, mixup=0.8, cutmix=1.0
    )
    counted = []
    progress = SimpleNamespace(update=lambda: counted.append(1))
    unreadable.copies.clear()
    with pytest.raises(NotImplementedError, match="meta"):
        finetune(model, images, images, config, num_workers=0, progress=progress)
    assert len(counted) == 2
    assert unreadable.copies == []


def everything(learner: TokenizerLearner) -> dict:
    """The state of a learner without its guards, whose counts would be read."""
    state = learner.state
    return {
        name: part.state_dict()
        for name, part in vars(state).items()
        if hasattr(part, "state_dict") and not name.endswith("guard")
    }


def skipping(read_every: int, run) -> tuple[TokenizerLearner, list[dict]]:
    """A learner after a step, one that is not finite, and another; its state after each."""
    optim = replace(run.optim, lr=0.01, warmup_steps=0, schedule="constant")
    run = replace(run, optim=optim)
    learner, states = build(run, WORLD, num_classes=10), []
    for guard in learner.state.guards:
        guard.read_every = read_every
    for number in range(3):
        torch.manual_seed(number)
        batch = tokenizers.batch()
        if number == 1:
            batch.image[0, 0, 0, 0] = torch.nan
        with host_reads() as reads:
            learner.step(batch)
        # The one is K, which is drawn on the host; on a CPU labels are checked.
        assert read_every == 1 or reads.count("tolist") == 0
        states.append(copy.deepcopy(everything(learner)))
        learner.state.step += 1
    return learner, states


@pytest.mark.parametrize("name", RUNS)
def test_a_step_is_skipped_on_the_device_as_on_the_host(name, caplog):
    """The bits of everything that is trained; averages as they were, until they are told."""
    (first, on_host), (second, on_device) = (skipping(each, RUNS[name]()) for each in (1, 9))
    own = set(on_host[0])
    for step, (one, other) in enumerate(zip(on_host, on_device, strict=True)):
        for key in own - {"ema"}:
            assert tokenizers.equal(one[key], other[key]), (step, key)
        if step < 2:
            assert tokenizers.equal(one["ema"]["shadow"], other["ema"]["shadow"])
    trained = own & {"tokenizer", "teacher_encoder", "discriminator", "lecam", "optimizer", "ema"}
    for key in trained:
        assert tokenizers.equal(on_host[0][key], on_host[1][key]), key
        assert not tokenizers.equal(on_host[1][key], on_host[2][key]), key
    assert caplog.text.count("is not finite and is skipped; images [[0, 1, 2, 3]]") == 1
    for guard in second.state.guards:
        guard.read()
    assert caplog.text.count("step 1 is not finite and is skipped; images [[0, 1, 2, 3]]") == 2
    assert caplog.text.count("step 1 of the discriminator is not finite and is skipped") == 2
    assert state_of(first.state)["guard"] == state_of(second.state)["guard"]
    assert first.state.ema.state_dict()["num_updates"] == 2
    assert second.state.ema.state_dict()["num_updates"] == 2
