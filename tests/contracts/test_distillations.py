"""Every kind of distillation keeps these; a new member of the union enters by existing."""

import copy
import dataclasses
import json
from dataclasses import replace
from typing import get_args

import pytest
import torch

from mergevq.config.objective import CellTeacher, Distillation, NoDistillation, NoTeacher
from mergevq.config.recipes.digits import digits32
from mergevq.config.training import TokenizerRun
from mergevq.data.batches import Batch
from mergevq.runtime import distributed
from mergevq.runtime.settings import from_json, to_json
from mergevq.tokenizer.losses.distillation import build_distillation
from mergevq.tokenizer.tokenizer import Tokenizer
from mergevq.training.fit import put_state, state_of
from mergevq.training.tokenizer import train
from mergevq.training.tokenizer_step import build
from tests.support.frozen import write_dinov2
from tests.support.parts import small_part
from tests.support.ranks import train_on_two_ranks
from tests.support.small import shrink
from tests.support.steps import update_tokenizer

WORLD = distributed.World(rank=0, world_size=1, local_rank=0, device=torch.device("cpu"))
NUM_KEPT = 16
MEMBERS = [
    pytest.param(
        replace(small_part(member), **({"teacher": small_part(teacher)} if teacher else {})),
        id="-".join([member().kind, *([teacher().kind] if teacher else [])]),
    )
    for member in get_args(Distillation)
    for has_teacher in ["teacher" in {field.name for field in dataclasses.fields(member)}]
    for teacher in (get_args(CellTeacher) if has_teacher else (None,))
]
EVERY = pytest.mark.parametrize("config", MEMBERS, indirect=True)
BUILT = pytest.mark.parametrize(
    "config", [case for case in MEMBERS if case.id != NoDistillation().kind], indirect=True
)
"""Kinds of which there is something to build."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tokenizer to start from, and a vision model where there is one to read."""
    folder = tmp_path_factory.mktemp("distillation")
    torch.manual_seed(0)
    model = Tokenizer(run_of(NoDistillation()).model)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    model.save_pretrained(folder / "tokenizer")
    return folder


@pytest.fixture
def config(request, folder):
    """The distillation with a file of its own, if it reads one."""
    member = request.param
    teacher = getattr(member, "teacher", None)
    if getattr(teacher, "kind", "") != "huggingface":
        return member
    pytest.importorskip("transformers")
    path = folder / "dinov2"
    if not path.exists():
        write_dinov2(path)
    return replace(member, teacher=replace(teacher, path=str(path)))


def run_of(config, folder=None):
    """A run that starts from the tokenizer of the folder."""
    run = shrink(digits32())
    return replace(
        run,
        distillation=config,
        init_from=None if folder is None else str(folder / "tokenizer"),
        teacher=NoTeacher(),
        train=replace(run.train, precision="float32"),
    )


def learner_of(config, folder):
    return build(run_of(config, folder), WORLD, num_classes=0)


def batch(size=4):
    numbers = torch.Generator().manual_seed(1)
    image = torch.rand(size, 3, 32, 32, generator=numbers) * 2 - 1
    return Batch(image, torch.zeros(size, dtype=torch.int64), None, None, torch.arange(size))


def after_a_step(config, folder):
    """A learner whose features are no longer those that it started with."""
    learner = learner_of(config, folder)
    update_tokenizer(learner, [batch()], NUM_KEPT)
    learner.state.step += 1
    return learner


def value_of(learner):
    """Loss of the distillation, and its name."""
    losses, _ = learner.losses(batch(), NUM_KEPT)
    name = learner.state.distillation.name
    return name, losses[name]


@EVERY
def test_settings_come_back_from_json_by_their_kind(config, folder):
    run = run_of(config, folder)
    written = json.loads(json.dumps(to_json(run)))
    assert written["distillation"]["kind"] == config.kind
    assert from_json(TokenizerRun, written) == run


def test_every_kind_has_a_name_of_its_own_and_a_docstring():
    for union in (Distillation, CellTeacher):
        members = get_args(union)
        assert len({member().kind for member in members}) == len(members)
        assert all(dataclasses.fields(member)[0].name == "kind" for member in members)
        assert all(member.__doc__ for member in members)


def test_nothing_is_built_for_the_kind_that_is_none(folder):
    model = run_of(NoDistillation()).model
    assert build_distillation(NoDistillation(), model, Tokenizer(model).encoder) is None
    learner = learner_of(NoDistillation(), folder)
    assert learner.state.distillation is None
    assert "distillation" not in state_of(learner.state)


@BUILT
def test_a_loss_has_the_weight_of_its_settings(config, folder):
    learner = learner_of(config, folder)
    name = learner.state.distillation.name
    assert learner.run.own_weights[name] == getattr(config, f"{name}_weight") > 0
    assert name in learner.losses(batch(), NUM_KEPT)[0]


@BUILT
def test_a_loss_is_a_finite_number_that_reaches_every_trained_weight(config, folder):
    learner = after_a_step(config, folder)
    _, loss = value_of(learner)
    assert loss.shape == ()
    assert loss.dtype == torch.float32
    assert loss.isfinite()
    learner.state.optimizer.zero_grad()
    loss.backward()
    for name, parameter in learner.state.distillation.named_parameters():
        assert (parameter.grad is not None) == parameter.requires_grad, name
        assert parameter.grad is None or parameter.grad.any(), name
    gradients = [p.grad for p in learner.state.tokenizer.parameters() if p.grad is not None]
    assert all(gradient.isfinite().all() for gradient in gradients)
    assert any(gradient.any() for gradient in gradients)


@BUILT
def test_the_frozen_model_stays_as_it_is(config, folder):
    learner = learner_of(config, folder)
    image = batch().image
    before = frozen_features(learner.state.distillation, image)
    for _ in range(2):
        update_tokenizer(learner, [batch()], NUM_KEPT)
        learner.state.step += 1
    after = frozen_features(learner.state.distillation, image)
    assert all(map(torch.equal, before, after))
    assert not any(features.requires_grad for features in after)


def frozen_features(distillation, image):
    """Features that the tokenizer's are compared with."""
    if hasattr(distillation, "encoder"):
        with torch.no_grad():
            return distillation.encoder.layers(image)
    return [distillation.teacher(image, (8, 8))]


@BUILT
def test_the_same_numbers_give_the_same_bits(config, folder):
    first, second = (value_of(after_a_step(config, folder)) for _ in range(2))
    assert first[0] == second[0]
    assert torch.equal(first[1], second[1])


@BUILT
def test_a_loss_stays_in_float32_under_autocast(config, folder):
    learner = after_a_step(config, folder)
    _, plain = value_of(learner)
    with torch.autocast("cpu", torch.bfloat16):
        _, cast = value_of(learner)
    assert cast.dtype == torch.float32
    torch.testing.assert_close(cast, plain, rtol=0.1, atol=0.02)


@BUILT
def test_a_run_that_is_gone_on_with_has_the_same_bits(config, folder):
    learner = after_a_step(config, folder)
    again = learner_of(config, folder)
    put_state(again.state, copy.deepcopy(state_of(learner.state)))
    for _ in range(2):
        first, second = (
            update_tokenizer(each, [batch()], NUM_KEPT)[0] for each in (learner, again)
        )
        assert first.keys() == second.keys()
        assert all(torch.equal(*map(torch.as_tensor, (first[n], second[n]))) for n in first)
        for each in (learner, again):
            each.state.step += 1


@BUILT
def test_it_is_no_part_of_the_tokenizer_that_is_saved(config, folder):
    learner = learner_of(config, folder)
    plain = learner_of(NoDistillation(), folder).state.tokenizer
    assert learner.state.tokenizer.state_dict().keys() == plain.state_dict().keys()
    parameters = set(learner.state.tokenizer.parameters())
    assert parameters.isdisjoint(learner.state.distillation.parameters())
    for name, weight in plain.state_dict().items():
        assert torch.equal(weight, learner.state.tokenizer.state_dict()[name]), name


@BUILT
@pytest.mark.slow
def test_two_ranks_equal_one_process(config, folder, tmp_path):
    pytest.importorskip("sklearn")
    run = run_of(config, folder)
    run = replace(
        run,
        data=replace(run.data, max_images=32),
        loss=replace(run.loss, recovered_share=0.0),
        optim=replace(run.optim, warmup_steps=0),
        # Of parts of four images the first one is compared, of all eight the first and the fifth.
        train=replace(run.train, batch_size=8, num_steps=3, save_every=3, eval_every=3),
    )
    train(replace(run, out=str(tmp_path / "one")))
    train_on_two_ranks(replace(run, out=str(tmp_path / "two")))
    first, second = (
        [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        for name in ("one", "two")
    )
    assert [line["step"] for line in first] == [0, 1, 2]
    for one, two in zip(first, second, strict=True):
        assert one[config.kind] == pytest.approx(two[config.kind], rel=5e-3, abs=1e-6)
