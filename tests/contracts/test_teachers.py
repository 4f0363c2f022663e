"""Every kind of teacher keeps these; a new member of the union enters by existing."""

import dataclasses
import json
from dataclasses import replace
from typing import get_args

import pytest
import torch

from mergevq.config.objective import FeatureLoss, Labels, NoTeacher, Teacher, view_sizes
from mergevq.config.recipes.digits import digits32
from mergevq.config.training import TokenizerRun
from mergevq.runtime.settings import from_json, to_json
from mergevq.tokenizer.losses.teachers import build_teacher
from tests.support.frozen import write_dinov2, write_extractor

DIM, NUM_CLASSES, ROWS = 8, 5, 3
FILES = {"huggingface": "dinov2", "torchscript": "colours.pt"}
"""Files that a kind reads, in the folder of `files`."""
FEATURE_LOSSES = get_args(FeatureLoss)
MEMBERS = [
    pytest.param(replace(member(), **({"loss": loss()} if loss else {})), id="-".join(name))
    for member in get_args(Teacher)
    for of in [{field.name for field in dataclasses.fields(member)}]
    for loss in (FEATURE_LOSSES if "loss" in of else (None,))
    for name in [(member().kind, *([loss().kind] if loss else []))]
]
EVERY = pytest.mark.parametrize("config", MEMBERS, indirect=True)
BUILT = pytest.mark.parametrize(
    "config", [case for case in MEMBERS if case.id != NoTeacher().kind], indirect=True
)
"""Kinds of which there is something to build."""


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("teachers")
    write_extractor(folder / "colours.pt")
    return folder


@pytest.fixture
def config(request, files):
    """The teacher with a file of its own, if it reads one."""
    teacher = request.param
    if teacher.kind not in FILES:
        return teacher
    path = files / FILES[teacher.kind]
    if teacher.kind == "huggingface" and not path.exists():
        pytest.importorskip("transformers")
        write_dinov2(path)
    return replace(teacher, path=str(path), teacher_size=28)


def built(config):
    torch.manual_seed(0)
    return build_teacher(config, dim=DIM, num_classes=NUM_CLASSES).train()


def batch_of(config, rows=ROWS):
    """Class tokens, and all that a teacher of these settings may read of a batch."""
    numbers = torch.Generator().manual_seed(1)
    token = torch.randn(rows, DIM, generator=numbers)
    side = view_sizes(config, 28).get("teacher")
    view = torch.rand(rows, 3, side, side, generator=numbers) * 2 - 1 if side else None
    return token, torch.arange(rows) % NUM_CLASSES, view


def loss_of(teacher, batch, target=None):
    """Loss of a batch; the average's target is of the class tokens themselves, turned around."""
    token, label, view = batch
    if hasattr(teacher, "target") and target is None:
        target = teacher.target(token.detach().flip(0))
    return teacher.loss(token, label, view, target)


@EVERY
def test_settings_come_back_from_json_by_their_kind(config):
    run = replace(digits32(), teacher=config)
    written = json.loads(json.dumps(to_json(run)))
    assert written["teacher"]["kind"] == config.kind
    assert from_json(TokenizerRun, written) == run


def test_every_kind_has_a_name_of_its_own_a_docstring_and_views():
    members = get_args(Teacher)
    assert len({member().kind for member in members}) == len(members)
    for member in members:
        assert dataclasses.fields(member)[0].name == "kind"
        assert member.__doc__
        assert view_sizes(member(), 48).keys() == member.views


def test_no_teacher_is_built_for_the_kind_that_is_none():
    assert build_teacher(NoTeacher(), dim=DIM, num_classes=0) is None


@BUILT
def test_a_loss_is_a_finite_number_that_reaches_every_trained_weight(config):
    teacher, (token, label, view) = built(config), batch_of(config)
    loss = loss_of(teacher, (token.requires_grad_(), label, view))
    assert loss.shape == ()
    assert loss.dtype == torch.float32
    assert loss.isfinite()
    loss.backward()
    trained = {n: p for n, p in teacher.named_parameters() if p.requires_grad}
    assert trained
    for name, parameter in {"class token": token, **trained}.items():
        assert parameter.grad is not None, f"{name} takes no part"
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.any(), name
    assert all(p.grad is None for p in teacher.parameters() if not p.requires_grad)


@BUILT
def test_views_and_labels_that_are_not_declared_are_not_read(config):
    teacher, (token, label, view) = built(config), batch_of(config)
    expected = loss_of(teacher, (token, label, view))
    needs = {
        "view": "teacher" in config.views,
        "label": isinstance(config, Labels),
    }
    for name, given in (("view", (token, label, None)), ("label", (token, None, view))):
        if needs[name]:
            with pytest.raises(ValueError, match=name):
                loss_of(teacher, given)
        else:
            assert torch.equal(loss_of(teacher, given), expected)


@BUILT
def test_the_same_numbers_give_the_same_bits(config):
    batch = batch_of(config)
    assert torch.equal(loss_of(built(config), batch), loss_of(built(config), batch))


@BUILT
def test_a_loss_is_the_mean_over_the_images_of_a_batch(config):
    teacher, (token, label, view) = built(config), batch_of(config)
    # Targets of the average are of the whole step: each image is given its row of them.
    target = teacher.target(token.flip(0)) if hasattr(teacher, "target") else None
    alone = [
        loss_of(teacher, batch, None if target is None else target[row : row + 1])
        for row in range(ROWS)
        for batch in [[None if x is None else x[row : row + 1] for x in (token, label, view)]]
    ]
    together = loss_of(teacher, (token, label, view), target)
    torch.testing.assert_close(torch.stack(alone).mean(), together)


@BUILT
def test_a_teacher_that_is_saved_and_loaded_has_the_same_loss(config, tmp_path):
    teacher, batch = built(config), batch_of(config)
    torch.save(teacher.state_dict(), tmp_path / "state.pt")
    torch.manual_seed(1)
    other = build_teacher(config, dim=DIM, num_classes=NUM_CLASSES)
    assert not torch.equal(loss_of(other, batch), loss_of(teacher, batch))
    other.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert torch.equal(loss_of(other, batch), loss_of(teacher, batch))
