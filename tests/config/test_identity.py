"""A class is its name: labels of other data are told apart before they are used."""

import pytest

from mergevq.config.identity import Identity, class_difference, identify, require_same_classes

PETS = identify(["a.png", "b.png"], [0, 1], ("cat", "dog"))


def test_names_labels_and_their_order_are_in_the_identity():
    assert identify(["a.png", "b.png"], [0, 1], ("cat", "dog")) == PETS
    assert identify(["b.png", "a.png"], [0, 1], ("cat", "dog")).images != PETS.images
    assert identify(["a.png", "b.png"], [1, 0], ("cat", "dog")).labels != PETS.labels
    assert identify(["c.png", "b.png"], [0, 1], ("cat", "dog")).labels == PETS.labels
    assert PETS.num_images == 2


def test_a_name_that_is_no_text_has_a_digest():
    assert len(identify(["a\udcff.png"], [-1], ()).images) == 64


def test_more_images_of_the_same_classes_are_no_other_classes():
    more = identify(["a.png", "b.png", "c.png"], [0, 1, 1], ("cat", "dog"))
    assert class_difference(PETS, more) == ""
    assert class_difference(PETS, Identity(class_names=("cat", "dog"))) == ""


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (("cat", "eel"), r"number 1 on are dog \(of 2\) there and eel \(of 2\) here"),
        (("cat", "dog", "eel"), r"number 2 on are none \(of 2\) there and eel \(of 3\) here"),
        ((), r"number 0 on are cat, dog \(of 2\) there and none \(of 0\) here"),
        (tuple("abcdefg"), r"cat, dog \(of 2\) there and a, b, c, d, e, \.\. \(of 7\) here"),
    ],
)
def test_other_classes_are_named_from_the_first_that_differs(names, message):
    with pytest.raises(ValueError, match=rf"the run was made from other .*{message}; begin anew"):
        require_same_classes(
            PETS, Identity(class_names=names), where="the run", way_out="begin anew"
        )


def test_labels_of_the_same_images_that_moved_are_seen():
    moved = identify(["a.png", "b.png"], [1, 0], ("cat", "dog"))
    assert "labels of the 2 images" in class_difference(PETS, moved)
