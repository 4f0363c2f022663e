"""Tests of `mergevq.metrics.sets`."""

import math

import numpy as np
import pytest
import torch

from mergevq.metrics.sets import Rows, inception_score, kernel_distance, precision_recall
from tests.support import reference

NAN = float("nan")


# --------------------------------------------------------------------------------------- rows


def test_rows_come_in_the_order_of_the_images():
    rows = Rows("features")
    rows.update(torch.tensor([[3.0, 3], [1, 1]]), torch.tensor([3, 1]))
    rows.update(torch.tensor([[0.0, 0], [2, 2]]), torch.tensor([0, 2]))
    assert rows.compute().tolist() == [[0, 0], [1, 1], [2, 2], [3, 3]]


def test_an_image_seen_twice_is_an_error():
    rows = Rows("features")
    rows.update(torch.zeros(3, 2), torch.tensor([0, 4, 4]))
    with pytest.raises(ValueError, match=r"features: image 4 came twice \(1 such\)"):
        rows.compute()


def test_rows_name_the_item_that_is_not_finite():
    rows = Rows("kernel distance")
    rows.update(torch.zeros(3, 2), torch.arange(3))
    with pytest.raises(ValueError, match="kernel distance: item 4 is not finite"):
        rows.update(torch.tensor([[0.0, 0.0], [0.0, math.inf]]), torch.arange(3, 5))


def test_no_rows_are_an_error():
    with pytest.raises(ValueError, match="features has seen no image"):
        Rows("features").compute()


# ------------------------------------------------------------------------------------- scores


def test_inception_score_spans_from_one_to_the_number_of_classes():
    assert inception_score(torch.full((20, 5), 0.2)) == pytest.approx((1.0, 0.0))
    certain = torch.eye(5).repeat(4, 1)
    assert inception_score(certain, num_splits=4) == pytest.approx((5.0, 0.0))
    assert inception_score(certain, num_splits=1) == pytest.approx((5.0, 0.0))


def test_inception_score_of_contiguous_splits_by_hand():
    # The first split has one class for sure (1), the second two in turn (2).
    probabilities = torch.tensor([[1.0, 0], [1, 0], [1, 0], [0, 1]])
    score = inception_score(probabilities, num_splits=2)
    assert score == pytest.approx((1.5, 0.5))


def test_inception_score_is_its_formula(generator):
    probabilities = torch.rand(30, 7, generator=generator).softmax(-1)
    given = probabilities.double().numpy()
    divergence = (given * np.log(given / given.mean(0))).sum(1).mean()
    score = inception_score(probabilities, num_splits=1)
    assert score.mean == pytest.approx(np.exp(divergence))


def test_inception_score_refuses_what_are_no_probabilities():
    with pytest.raises(ValueError, match="must be at least 0 and sum to 1"):
        inception_score(torch.randn(20, 5))
    with pytest.raises(ValueError, match=r"num_splits \(10\) must be between 1 and the 4 images"):
        inception_score(torch.eye(4))
    with pytest.raises(ValueError, match="inception score: item 0 is not finite"):
        inception_score(torch.full((20, 5), NAN))


def test_kernel_distance_is_the_sum_over_all_pairs(generator):
    real = torch.randn(5, 3, generator=generator)
    fake = torch.randn(5, 3, generator=generator) + 0.5

    def kernel(x, y):
        return (float(x.double() @ y.double()) / 3 + 1) ** 3

    within = [
        kernel(s[i], s[j]) for s in (real, fake) for i in range(5) for j in range(5) if i != j
    ]
    between = [kernel(x, y) for x in real for y in fake]
    expected = sum(within) / 20 - 2 * sum(between) / 25
    found = kernel_distance(real, fake, num_subsets=3, subset_size=5, generator=generator)
    assert found.mean == pytest.approx(expected)
    assert found.std == pytest.approx(0, abs=1e-6 * max(map(abs, between)))


def test_kernel_distance_is_within_a_millionth_of_the_kernel_of_float64(generator):
    # As features of Inception are: not negative, and alike.
    real = torch.rand(300, 2048, generator=generator) ** 3
    fake = 1.05 * torch.rand(300, 2048, generator=generator) ** 3
    numbers = [torch.Generator().manual_seed(seed) for seed in (5, 5)]
    options = {"num_subsets": 3, "subset_size": 200}
    found = kernel_distance(real, fake, **options, generator=numbers[0])
    expected = reference.kernel_distances(real, fake, **options, generator=numbers[1])
    kernel = float((fake.double() @ real.double().T / 2048 + 1).pow(3).mean())
    assert abs(found.mean - float(expected.mean())) < 1e-6 * kernel
    assert abs(found.std - float(expected.std(correction=0))) < 1e-6 * kernel
    assert found.mean > 1e-4 * kernel


def test_kernel_distance_is_near_zero_for_one_distribution_and_grows_with_the_shift(generator):
    real, fake = torch.randn(2, 600, 4, generator=generator)
    options = {"num_subsets": 10, "subset_size": 200, "generator": generator}
    same = kernel_distance(real, fake, **options)
    shifted = kernel_distance(real, fake + 1, **options)
    assert abs(same.mean) < 0.2
    assert shifted.mean > 1
    assert same.std > 0


def test_kernel_distance_follows_its_generator(generator):
    real, fake = torch.randn(2, 50, 4, generator=generator)
    first, second, other = (
        kernel_distance(
            real,
            fake,
            num_subsets=2,
            subset_size=10,
            generator=torch.Generator().manual_seed(seed),
        )
        for seed in (1, 1, 2)
    )
    assert first == second != other


def test_kernel_distance_refuses_subsets_larger_than_the_data(generator):
    message = r"subset_size \(1000\) must be between 2 and the 20 images"
    with pytest.raises(ValueError, match=message):
        kernel_distance(torch.zeros(30, 2), torch.zeros(20, 2), generator=generator)


def test_precision_and_recall_by_hand():
    # With one neighbour real balls have radius 1 around 0, 1, 10 and 11, generated ones
    # radius 0.5 around 0.5 and 1, and 98 around 99.
    real = torch.tensor([[0.0], [1.0], [10.0], [11.0]])
    fake = torch.tensor([[0.5], [1.0], [99.0]])
    found = precision_recall(real, fake, k=1)
    assert found.precision == pytest.approx(2 / 3)
    assert found.recall == 1.0
    swapped = precision_recall(fake, real, k=1)
    assert swapped == (found.recall, found.precision)


def test_the_neighbour_that_sets_the_radius_is_the_k_th():
    real = torch.tensor([[0.0], [1.0], [3.0]])
    fake = torch.tensor([[-1.5], [-1.6], [-1.7]])
    assert precision_recall(real, fake, k=1).precision == 0.0
    assert precision_recall(real, fake, k=2).precision == 1.0


@pytest.mark.parametrize("block_size", [1, 7, 1000])
def test_a_set_covers_itself_in_any_chunks(generator, block_size):
    features = torch.randn(20, 64, generator=generator).repeat_interleave(5, 0) + 30
    assert precision_recall(features, features.clone(), k=3, block_size=block_size) == (1.0, 1.0)


def test_equal_images_are_at_no_distance_whatever_rounding_does(generator):
    # The radius of images in five copies is 0. A last chunk of one row sums in another order.
    rows = 30 * torch.rand(60, 1000, generator=generator, dtype=torch.float64)
    real = rows.repeat_interleave(5, 0)
    fake = real[torch.randperm(300, generator=generator)[:51]]
    assert precision_recall(real, fake, block_size=50).precision == 1.0


def _mixture(generator):
    """Points of several kinds: apart, equal, nearly equal, and at the edges of balls."""
    apart = 3 * torch.randn(40, 24, generator=generator) + 20
    copies = apart[:6].repeat_interleave(4, 0)
    near = apart[6:10].repeat_interleave(6, 0)
    near = near + 1e-4 * torch.randn(near.shape, generator=generator)
    real = torch.cat([apart, copies, near])
    edges = apart[10:30] + (
        real[torch.randperm(len(real), generator=generator)[:20]] - apart[10:30]
    )
    noise = apart[:20] + torch.randn(20, 24, generator=generator)
    return real, torch.cat([edges, noise, apart[:3], near[:5] + 3e-5])


@pytest.mark.parametrize("shift", [0, 1000])
@pytest.mark.parametrize("block_size", [7, 1000])
def test_precision_and_recall_are_those_of_float64_wherever_float32_cannot_tell(
    generator, shift, block_size
):
    real, fake = (each + shift for each in _mixture(generator))
    found = precision_recall(real, fake, block_size=block_size)
    assert found == reference.precision_recall(real, fake, k=3)
    swapped = precision_recall(fake, real, block_size=block_size)
    assert swapped == reference.precision_recall(fake, real, k=3)


@pytest.mark.parametrize("count", [30, 100])
def test_all_points_at_one_place_cover_each_other(count):
    same = torch.full((count, 12), 7.3)
    assert precision_recall(same, same[:20].clone()) == (1.0, 1.0)
    assert precision_recall(same, same[:20] + 1e-3) == (0.0, 0.0)


def test_a_collapsed_generator_is_precise_and_recalls_nothing(generator):
    real = torch.randn(200, 8, generator=generator)
    fake = real[:1].repeat(50, 1) + 1e-3 * torch.randn(50, 8, generator=generator)
    found = precision_recall(real, fake)
    assert found.precision == 1.0
    assert found.recall < 0.01


def test_precision_and_recall_need_a_neighbour():
    with pytest.raises(ValueError, match=r"k \(3\) must be between 1 and one less than the 3"):
        precision_recall(torch.zeros(3, 2), torch.zeros(9, 2))


@pytest.mark.parametrize("side", ["real", "fake"])
def test_scores_of_features_that_are_not_finite_are_refused(generator, side):
    sides = {"real": torch.zeros(9, 2), "fake": torch.zeros(9, 2)}
    sides[side][4, 0] = NAN
    with pytest.raises(ValueError, match=rf"precision and recall \({side}\): item 4"):
        precision_recall(**sides)
    with pytest.raises(ValueError, match=rf"kernel distance \({side}\): item 4"):
        kernel_distance(**sides, subset_size=5, generator=generator)
