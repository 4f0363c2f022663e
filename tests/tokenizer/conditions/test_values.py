"""Classes and embeddings as encoder and decoder take them, and what refuses them."""

import math

import pytest
import torch

from mergevq.config.parts import ClassCondition, NoCondition, TextCondition, require_no_condition
from mergevq.tokenizer.conditions.values import (
    checked,
    condition_of,
    left_out,
    require_classes,
    unknown,
    wrong_classes,
)

CLASSES = ClassCondition(num_classes=3)
TEXTS = TextCondition(dim=2, num_embeddings=4, num_bytes=20)
LIKE = torch.zeros(1)


@pytest.mark.parametrize(
    ("config", "condition", "message"),
    [
        (NoCondition(), torch.tensor([0, 1]), "has no condition; leave `condition` out"),
        (
            CLASSES,
            None,
            "class of each image: pass `condition`, classes from 0 to 2, -1 where",
        ),
        (CLASSES, torch.tensor([0]), r"int64 of shape \(1,\)\) must be int64 of shape \(2,\)"),
        (CLASSES, torch.tensor([0.0, 1.0]), r"float32 of shape \(2,\)\) must be int64"),
        (CLASSES, torch.tensor([0, 3]), r"condition \(0 to 3\) must be classes from 0 to 2"),
        (CLASSES, torch.tensor([-2, 1]), r"condition \(-2 to 1\) must be classes"),
        (TEXTS, None, "needs a text of each image: pass `condition`, at most 4 embeddings of 2"),
        (TEXTS, torch.zeros(2, 5, 2), r"shape \(2, 5, 2\)\) must be floats of shape \(2, 4, 2\)"),
        (TEXTS, torch.zeros(2, 4, 3), r"shape \(2, 4, 3\)\) must be floats"),
        (TEXTS, torch.zeros(2), r"shape \(2,\)\) must be floats"),
        (TEXTS, torch.zeros(2, 4, 2).long(), "int64 of shape .* must be floats"),
    ],
)
def test_a_condition_that_does_not_fit_is_refused(config, condition, message):
    with pytest.raises(ValueError, match=message):
        checked(config, condition, 2, LIKE)


def test_a_text_that_is_not_finite_is_refused():
    with pytest.raises(RuntimeError, match="condition"):
        checked(TEXTS, torch.full((2, 1, 2), math.nan), 2, LIKE)


@pytest.mark.parametrize(
    ("config", "condition"),
    [
        (NoCondition(), None),
        (CLASSES, torch.tensor([2, -1])),
        (TEXTS, torch.ones(2, 3, 2)),
    ],
)
def test_a_condition_that_fits_stays_as_it_is(config, condition):
    found = checked(config, condition, 2, LIKE)
    assert found is condition or torch.equal(found, condition)


def test_images_come_with_classes_and_not_with_texts():
    labels = torch.tensor([1, -1])
    assert condition_of(NoCondition(), labels, "training") is None
    assert condition_of(CLASSES, labels, "training") is labels
    with pytest.raises(ValueError, match="training has the classes of images and no texts"):
        condition_of(TEXTS, labels, "training")


def test_nothing_is_known_of_images_whose_condition_is_left_out():
    dropped = torch.tensor([True, False])
    assert left_out(torch.tensor([1, 2]), dropped).tolist() == [-1, 2]
    assert left_out(torch.ones(2, 3, 2), dropped).sum((1, 2)).tolist() == [0, 6]
    assert unknown(NoCondition(), 2, LIKE) is None
    assert unknown(CLASSES, 2, LIKE).tolist() == [-1, -1]
    assert unknown(TEXTS, 2, LIKE).shape == (2, 1, 2)
    for config in (CLASSES, TEXTS):
        checked(config, unknown(config, 2, LIKE), 2, LIKE)


def test_every_other_class_is_a_wrong_one_in_turn():
    classes = torch.tensor([0, 0, 1, 2, -1])
    assert wrong_classes(CLASSES, classes, torch.arange(5)).tolist() == [1, 2, 2, 1, -1]
    two = ClassCondition(num_classes=2)
    assert wrong_classes(two, torch.tensor([0, 1, 1]), torch.arange(3)).tolist() == [1, 0, 0]


def test_classes_are_those_of_the_data():
    require_classes(CLASSES, 3, "the data")
    require_classes(NoCondition(), 0, "the data")
    with pytest.raises(ValueError, match=r"tokenizer \(3\) must be the 0 classes of the data: "):
        require_classes(CLASSES, 0, "the data")


def test_bits_of_ten_classes_and_of_the_longest_text():
    assert ClassCondition(num_classes=10).bits == pytest.approx(3.32, abs=0.005)
    assert TEXTS.bits == 160
    assert NoCondition().bits == 0


def test_what_has_no_place_for_a_condition_names_the_way_out():
    require_no_condition(NoCondition(), "a file")
    with pytest.raises(ValueError, match=r"a file has no place .*kind class\): take a tokenizer"):
        require_no_condition(CLASSES, "a file")
