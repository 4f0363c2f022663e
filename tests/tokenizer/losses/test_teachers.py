"""Alignment: losses by hand, heads, teachers of every kind, what of them is saved and trained."""

import math
import os
import socket
import sys
import warnings
from dataclasses import replace
from pathlib import Path
from typing import get_args

import pytest
import torch
from safetensors.torch import load_file
from torch.nn import functional

from mergevq.config.objective import (
    Cosine,
    Dino,
    HuggingFace,
    Kl,
    Labels,
    NoTeacher,
    SelfDistillation,
    Teacher,
    TorchScript,
    view_sizes,
)
from mergevq.runtime import distributed
from mergevq.tokenizer.losses.teachers import (
    AlignmentHead,
    FeatureTeacher,
    LabelTeacher,
    PrototypeHead,
    SelfTeacher,
    build_teacher,
    cosine_alignment,
    dino_alignment,
    kl_alignment,
    label_alignment,
)
from tests.support.ranks import run_on_ranks

MEMBERS = [member() for member in get_args(Teacher)]
DINO = {"student_temperature": 0.1, "teacher_temperature": 0.04}
LOSSES = {
    "kl": lambda student, target: kl_alignment(student, target, temperature=4.0),
    "dino": lambda student, target: dino_alignment(student, target, **DINO),
    "cosine": cosine_alignment,
    "labels": lambda student, target: label_alignment(student, target.argmax(-1), smoothing=0.1),
}


def self_teacher():
    return SelfTeacher(PrototypeHead(8, 6, 3), **DINO)


def tokens(generator, batch=3, dim=8):
    return torch.randn(2, batch, dim, generator=generator)


# -------------------------------------------------------------------------------------- losses


def test_kl_is_the_divergence_of_softened_features_times_the_squared_temperature():
    student, target = torch.tensor([[0.0, 0.0]]), torch.tensor([[2 * math.log(3), 0.0]])
    # At temperature 2 the target is (3/4, 1/4) and the student (1/2, 1/2).
    expected = 4 * (0.75 * math.log(1.5) + 0.25 * math.log(0.5))
    assert kl_alignment(student, target, temperature=2.0).item() == pytest.approx(expected)


def test_kl_averages_over_the_batch_and_is_0_for_equal_features(generator):
    student, target = tokens(generator)
    alone = [kl_alignment(student[i : i + 1], target[i : i + 1], temperature=4.0) for i in range(3)]
    together = kl_alignment(student, target, temperature=4.0)
    torch.testing.assert_close(together, torch.stack(alone).mean())
    assert kl_alignment(student, student + 3, temperature=4.0).item() == pytest.approx(0, abs=1e-5)


def test_kl_has_the_gradient_of_a_cross_entropy_times_the_temperature(generator):
    student, target = tokens(generator)
    student.requires_grad_()
    kl_alignment(student, target, temperature=4.0).backward()
    expected = 4 / 3 * ((student / 4).softmax(-1) - (target / 4).softmax(-1))
    torch.testing.assert_close(student.grad, expected)


def test_dino_is_the_cross_entropy_of_a_sharpened_target():
    student = torch.tensor([[0.1 * math.log(4), 0.0]])
    target = torch.tensor([[0.04 * math.log(9), 0.0]])
    # The student is (4/5, 1/5) and the target (9/10, 1/10).
    loss = dino_alignment(student, target, **DINO)
    expected = -(0.9 * math.log(0.8) + 0.1 * math.log(0.2))
    assert loss.item() == pytest.approx(expected, rel=1e-4)


def test_cosine_is_0_along_the_target_1_across_and_2_against():
    target = torch.tensor([[3.0, 0.0]])
    angles = torch.tensor([[0.5, 0.0], [0.0, 9.0], [-2.0, 0.0]])
    losses = [cosine_alignment(student[None], target).item() for student in angles]
    assert losses == pytest.approx([0.0, 1.0, 2.0])


def test_label_smoothing_spreads_a_share_over_all_classes():
    logits = torch.tensor([[math.log(2), 0.0, 0.0]])
    # Classes (1/2, 1/4, 1/4) against the target (0.9 + 0.1/3, 0.1/3, 0.1/3).
    expected = (0.9 + 0.1 / 3) * math.log(2) + 2 * (0.1 / 3) * math.log(4)
    loss = label_alignment(logits, torch.tensor([0]), smoothing=0.1)
    assert loss.item() == pytest.approx(expected)


@pytest.mark.parametrize("name", ["kl", "dino", "cosine"])
def test_no_loss_has_a_gradient_for_the_target(name, generator):
    student, target = tokens(generator).requires_grad_()
    gradients = torch.autograd.grad(
        LOSSES[name](student, target), (student, target), allow_unused=True
    )
    assert gradients[0].abs().sum() > 0
    assert gradients[1] is None


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("batch", [1, 3])
def test_losses_of_large_inputs_are_finite_float32_under_autocast(name, dtype, batch, generator):
    student, target = (1e4 * tokens(generator, batch)).to(dtype)
    student.requires_grad_()
    with torch.autocast("cpu", dtype):
        loss = LOSSES[name](student, target)
    loss.backward()
    assert loss.dtype == torch.float32
    assert loss.isfinite()
    assert student.grad.isfinite().all()


@pytest.mark.parametrize("name", LOSSES)
def test_losses_and_gradients_of_zeros_are_finite(name):
    student = torch.zeros(1, 8, requires_grad=True)
    loss = LOSSES[name](student, torch.zeros(1, 8))
    loss.backward()
    assert loss.isfinite()
    assert student.grad.isfinite().all()


# --------------------------------------------------------------------------------------- heads


@pytest.mark.parametrize(
    ("dim", "num_layers", "millions"), [(512, 2, 2.63), (512, 3, 6.82), (768, 3, 14.16)]
)
def test_heads_have_the_size_of_the_authors(dim, num_layers, millions):
    head = AlignmentHead(dim, 768, num_layers)
    assert round(sum(p.numel() for p in head.parameters()) / 1e6, 2) == millions


def test_an_official_head_loads_index_by_index(shared, generator):
    state = load_file(shared / "golden" / "official_hybrid.safetensors")
    prefix = "encoder.dist_head."
    official = {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
    head = AlignmentHead(64, 48, 3)
    head.layers.load_state_dict(official)
    token = torch.randn(2, 64, generator=generator)
    hidden = functional.gelu(token @ official["0.weight"].T + official["0.bias"])
    hidden = functional.gelu(hidden @ official["2.weight"].T + official["2.bias"])
    expected = hidden @ official["4.weight"].T + official["4.bias"]
    torch.testing.assert_close(head(token), expected)


def test_a_head_of_two_layers_normalises_between_them(generator):
    head = AlignmentHead(8, 5, 2)
    token = torch.randn(2, 8, generator=generator)
    hidden = functional.layer_norm(functional.gelu(head.layers[0](token)), (32,))
    torch.testing.assert_close(head(token), head.layers[3](hidden))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_heads_are_in_float32_under_autocast(dtype, generator):
    head = AlignmentHead(8, 5, 3)
    token = (1e4 * torch.randn(1, 8, generator=generator)).to(dtype)
    with torch.autocast("cpu", dtype):
        assert torch.equal(head(token), head(token.float()))
    assert head(token).isfinite().all()


def test_without_transformers_the_message_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(RuntimeError, match="pip install transformers"):
        build_teacher(HuggingFace(), dim=8, num_classes=0)


# ---------------------------------------------------------------------------------- each kind


@pytest.mark.parametrize("loss", [Kl(), Dino(), Cosine()], ids=lambda loss: loss.kind)
def test_a_frozen_model_teaches_with_the_loss_asked_for(loss, dinov2_folder, generator):
    config = HuggingFace(path=str(dinov2_folder), loss=loss)
    teacher = build_teacher(config, dim=8, num_classes=0)
    assert isinstance(teacher, FeatureTeacher)
    token = torch.randn(2, 8, generator=generator, requires_grad=True)
    view = torch.rand(2, 3, 28, 28, generator=generator) * 2 - 1
    student, target = teacher.head(token), teacher.model.features(view)
    expected = {
        "kl": lambda: kl_alignment(student, target, temperature=4.0),
        "dino": lambda: dino_alignment(student, target, **DINO),
        "cosine": lambda: cosine_alignment(student, target),
    }[loss.kind]()
    measured = teacher.loss(token, None, view, None)
    measured.backward()
    assert torch.equal(measured, expected)
    assert token.grad.abs().sum() > 0


@pytest.mark.parametrize(
    ("loss", "setting"),
    [
        (Kl(), "temperature"),
        (Dino(), "student_temperature"),
        (Dino(), "teacher_temperature"),
    ],
)
def test_temperatures_of_the_configuration_are_used(loss, setting, dinov2_folder, generator):
    config = HuggingFace(path=str(dinov2_folder), loss=loss)
    teacher = build_teacher(config, dim=8, num_classes=0)
    other = replace(config, loss=replace(loss, **{setting: 2.5}))
    changed = build_teacher(other, dim=8, num_classes=0)
    changed.load_state_dict(teacher.state_dict())
    token = torch.randn(2, 8, generator=generator)
    view = torch.rand(2, 3, 28, 28, generator=generator)
    assert teacher.loss(token, None, view, None) != changed.loss(token, None, view, None)


def test_a_frozen_model_is_neither_saved_nor_trained_nor_moved_with_its_teacher(dinov2_folder):
    config = HuggingFace(path=str(dinov2_folder), num_head_layers=2)
    teacher = build_teacher(config, dim=8, num_classes=0)
    assert set(teacher.state_dict()) == {
        f"head.layers.{i}.{name}" for i in (0, 2, 3) for name in ("weight", "bias")
    }
    assert all(p.requires_grad for p in teacher.parameters())
    teacher.train().to(torch.float64)
    assert not teacher.model.model.training
    assert teacher.model.model.dtype == torch.float32


def test_an_extractor_from_a_file_teaches_with_the_loss_asked_for(extractor_file, generator):
    config = TorchScript(path=extractor_file, loss=Cosine(), num_head_layers=2)
    teacher = build_teacher(config, dim=8, num_classes=0)
    token = torch.randn(2, 8, generator=generator, requires_grad=True)
    view = torch.rand(2, 3, 16, 16, generator=generator) * 2 - 1
    measured = teacher.loss(token, None, view, None)
    measured.backward()
    expected = cosine_alignment(teacher.head(token), teacher.model.features(view))
    assert torch.equal(measured, expected)
    assert token.grad.abs().sum() > 0
    assert {name.split(".")[0] for name in teacher.state_dict()} == {"head"}


@pytest.mark.parametrize("teacher", MEMBERS, ids=lambda teacher: teacher.kind)
def test_each_view_of_a_teacher_has_a_size(teacher):
    assert view_sizes(teacher, 48).keys() == teacher.views


def test_views_are_as_large_as_the_tokenizers_images_or_as_they_are_set():
    assert view_sizes(SelfDistillation(), 48) == {"student": 48}
    assert view_sizes(SelfDistillation(view_size=32), 48) == {"student": 32}
    set_both = TorchScript(view_size=32, teacher_size=40)
    assert view_sizes(set_both, 48) == {"student": 32, "teacher": 40}
    assert view_sizes(HuggingFace(), 48) == {"student": 48, "teacher": 224}


def test_labels_teach_by_cross_entropy(generator):
    config = Labels(label_smoothing=0.2)
    teacher = build_teacher(config, dim=8, num_classes=5)
    assert isinstance(teacher, LabelTeacher)
    token, label = torch.randn(3, 8, generator=generator), torch.tensor([0, 4, 2])
    expected = label_alignment(teacher.head(token), label, smoothing=0.2)
    assert torch.equal(teacher.loss(token, label, None, None), expected)


def test_images_without_a_label_are_counted_and_refused(generator):
    logits = torch.randn(4, 5, generator=generator)
    with pytest.raises(ValueError, match=r"2 of 4 images have no label.*teacher.kind 'self'"):
        label_alignment(logits, torch.tensor([0, -1, 4, -1]), smoothing=0.1)


def test_labels_that_the_data_does_not_have_are_an_error():
    with pytest.raises(ValueError, match=r"num_classes \(0\) must be at least 1 .* kind 'self'"):
        build_teacher(Labels(), dim=8, num_classes=0)


def test_no_teacher_is_none():
    assert build_teacher(NoTeacher(), dim=8, num_classes=5) is None


def test_what_a_teacher_needs_and_does_not_get_is_an_error(dinov2_folder):
    token = torch.zeros(1, 8)
    by_label = build_teacher(Labels(), dim=8, num_classes=2)
    by_itself = build_teacher(SelfDistillation(), dim=8, num_classes=0)
    config = HuggingFace(path=str(dinov2_folder))
    by_model = build_teacher(config, dim=8, num_classes=0)
    with pytest.raises(ValueError, match="label of every image"):
        by_label.loss(token, None, None, token)
    with pytest.raises(ValueError, match="the target that its average makes"):
        by_itself.loss(token, None, None, None)
    with pytest.raises(ValueError, match="its own view"):
        by_model.loss(token, None, None, token)


# ------------------------------------------------------------------------------- self-teacher


def test_the_self_teacher_is_built_from_its_configuration():
    config = SelfDistillation(num_prototypes=7, student_temperature=0.2, teacher_temperature=0.3)
    teacher = build_teacher(config, dim=8, num_classes=0)
    assert isinstance(teacher, SelfTeacher)
    assert teacher.head.prototypes.shape == (7, 256)
    assert (teacher.student_temperature, teacher.teacher_temperature) == (0.2, 0.3)


def test_prototypes_are_compared_by_cosine(generator):
    head = PrototypeHead(8, 6, 2)
    token = torch.randn(3, 8, generator=generator)
    features = head.bottleneck(token)
    expected = functional.cosine_similarity(features[:, None], head.prototypes[None], dim=-1)
    torch.testing.assert_close(head(token), expected)
    torch.testing.assert_close(head.compare(1e4 * features), expected)
    assert torch.equal(head.compare(torch.zeros(1, 256)), torch.zeros(1, 6))


def test_self_distillation_is_the_dino_loss_of_the_two_heads(generator):
    teacher = self_teacher()
    student_token, teacher_token = tokens(generator)
    features = teacher.teacher_head.bottleneck(teacher_token)
    target = teacher.teacher_head.compare(features - features.mean(0))
    expected = dino_alignment(teacher.head(student_token), target, **DINO)
    assert torch.equal(
        teacher.loss(student_token, None, None, teacher.target(teacher_token)), expected
    )


def test_gradients_reach_the_student_and_never_the_teacher(generator):
    teacher = self_teacher()
    student_token, teacher_token = (t.requires_grad_() for t in tokens(generator).unbind())
    teacher.loss(student_token, None, None, teacher.target(teacher_token)).backward()
    assert teacher_token.grad is None
    assert all(p.grad is None and not p.requires_grad for p in teacher.teacher_head.parameters())
    assert student_token.grad.abs().sum() > 0
    assert all(p.grad.abs().sum() > 0 for p in teacher.head.parameters())


def test_an_update_averages_the_head():
    teacher = self_teacher()
    with torch.no_grad():
        for parameter in teacher.head.parameters():
            parameter.add_(1)
    before = [p.clone() for p in teacher.teacher_head.parameters()]
    teacher.update(0.75)
    for old, new in zip(before, teacher.teacher_head.parameters(), strict=True):
        torch.testing.assert_close(new.data, old + 0.25)


def test_saving_between_steps_and_loading_continues_bit_for_bit(generator):
    first, second = self_teacher(), self_teacher()
    student_token, teacher_token = tokens(generator)
    first.loss(student_token, None, None, first.target(teacher_token))
    first.update(0.9)
    assert {name.split(".")[0] for name in first.state_dict()} == {"head", "teacher_head"}
    second.load_state_dict(first.state_dict())
    for teacher in (first, second):
        teacher.loss(teacher_token, None, None, teacher.target(student_token))
        teacher.update(0.5)
    torch.testing.assert_close(first.state_dict(), second.state_dict(), rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("batch", [1, 2])
def test_self_distillation_of_large_tokens_is_finite_under_autocast(dtype, batch, generator):
    teacher = self_teacher()
    student_token, teacher_token = (1e4 * tokens(generator, batch=batch)).to(dtype).unbind()
    student_token = student_token.clone().requires_grad_()
    with torch.autocast("cpu", dtype):
        loss = teacher.loss(student_token, None, None, teacher.target(teacher_token))
    loss.backward()
    assert loss.isfinite()
    assert student_token.grad.isfinite().all()


def test_what_all_images_share_does_not_hide_their_differences(generator):
    """Class tokens of a fresh encoder: one direction common to all, a thousandth of their own."""
    teacher = self_teacher()
    student_token, own = tokens(generator, batch=16)
    common = torch.randn(8, generator=generator)
    with torch.no_grad():
        target = targets(teacher, common + 1e-3 * own)
    # As far from an even guess as prototypes of 256 channels let them be, and not all alike.
    assert target.amax(-1).mean() > 1.5 / 6
    assert len(target.argmax(-1).unique()) > 2
    even = math.log(6)
    loss = teacher.loss(student_token, None, None, teacher.target(common + 1e-3 * own))
    assert abs(loss.item() - even) > 0.01


def targets(teacher, teacher_token):
    """Probabilities of prototypes by the teacher."""
    features = teacher.teacher_head.bottleneck(teacher_token)
    cosines = teacher.teacher_head.compare(features - features.mean(0))
    return (cosines / teacher.teacher_temperature).softmax(-1)


def run_rank(rank: int, port: int, folder: str) -> None:
    warnings.simplefilter("error")
    torch.set_num_threads(1)
    place = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    os.environ.update(place, MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    distributed.init(torch.device("cpu"), timeout_seconds=60)
    torch.manual_seed(0)
    teacher = self_teacher()
    share = slice(2 * rank, 2 * rank + 2)
    student_token, teacher_token = tokens(torch.Generator().manual_seed(0), batch=4)
    loss = teacher.loss(student_token[share], None, None, teacher.target(teacher_token[share]))
    distributed.barrier()
    distributed.shutdown()
    torch.save(loss.detach(), Path(folder) / f"{rank}.pt")


def test_two_ranks_have_the_loss_of_one_process(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    run_on_ranks(run_rank, port, str(tmp_path))
    torch.manual_seed(0)
    teacher = self_teacher()
    student_token, teacher_token = tokens(torch.Generator().manual_seed(0), batch=4)
    expected = teacher.loss(student_token, None, None, teacher.target(teacher_token))
    losses = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2)]
    torch.testing.assert_close(torch.stack(losses).mean(), expected.detach())
    alone = teacher.loss(student_token[:2], None, None, teacher.target(teacher_token[:2]))
    assert abs(alone - losses[0]) > 1e-3
