"""Agreement of masks by its definitions, empty ones among them."""

import pytest
import torch

from mergevq.metrics.masks import MaskScores, boundary, boundary_f, dice, iou


def mask(*rows):
    """One mask of rows of digits."""
    return torch.tensor([[[digit == "1" for digit in row] for row in rows]])


def test_a_hand_case():
    found, truth = mask("1100"), mask("1010")
    assert float(iou(found, truth)) == pytest.approx(1 / 3)
    assert float(dice(found, truth)) == pytest.approx(1 / 2)


@pytest.mark.parametrize("measure", [iou, dice, boundary_f])
def test_two_empty_masks_agree_and_one_does_not(measure):
    empty, other = mask("000", "000"), mask("010", "000")
    assert float(measure(empty, empty)) == 1
    assert float(measure(empty, other)) == 0
    assert float(measure(other, empty)) == 0
    assert float(measure(other, other)) == 1


def test_nested_masks_agree_more_the_nearer_they_are():
    rows = torch.arange(8)[:, None].expand(8, 8)
    truth = (rows < 6)[None]
    found = torch.stack([rows < count for count in range(7)])
    for measure in (iou, dice):
        values = measure(found, truth.expand(7, 8, 8))
        assert (values.diff() > 0).all()
        assert values[-1] == 1
    assert iou(found, truth.expand(7, 8, 8)).tolist() == pytest.approx([n / 6 for n in range(7)])


def test_a_boundary_is_next_to_what_is_not_of_the_mask():
    block = mask("00000", "01110", "01110", "01110", "00000")
    assert torch.equal(boundary(block), mask("00000", "01110", "01010", "01110", "00000"))
    # Beyond the edges of a picture there is no mask.
    assert torch.equal(boundary(mask("111", "111", "111")), mask("111", "101", "111"))


def test_boundaries_agree_within_one_pixel_and_no_further():
    columns = torch.eye(8, dtype=torch.bool)[:, None].expand(8, 8, 8)
    assert float(boundary_f(columns[3:4], columns[4:5])) == 1
    assert float(boundary_f(columns[3:4], columns[5:6])) == 0
    # Of 16 pixels 8 are near the others, of which all are near: 2 * 0.5 / 1.5.
    both = columns[1:2] | columns[5:6]
    assert float(boundary_f(both, columns[5:6])) == pytest.approx(2 / 3)


def test_means_are_over_images_and_one_number_is_over_pixels():
    scores = MaskScores()
    scores.update(mask("1111"), mask("1110"))
    scores.update(torch.cat([mask("1000"), mask("0000")]), torch.cat([mask("0100"), mask("0000")]))
    numbers = scores.compute()
    assert numbers["iou"] == pytest.approx((3 / 4 + 0 + 1) / 3)
    assert numbers["ciou"] == pytest.approx(3 / 6)
    assert numbers["dice"] == pytest.approx((6 / 7 + 0 + 1) / 3)
    assert scores.num_images == 3


def test_empty_masks_alone_agree_over_all_pixels():
    scores = MaskScores()
    scores.update(mask("00"), mask("00"))
    assert scores.compute() == {"iou": 1, "dice": 1, "boundary_f": 1, "ciou": 1}
