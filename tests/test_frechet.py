import io
import math

import numpy as np
import pytest
import torch
from PIL import Image

from mergevq.extractor import FeatureExtractor
from mergevq.frechet import (
    FrechetStatistics,
    Gaussian,
    Rows,
    frechet_distance,
    inception_score,
    kernel_distance,
    load_reference,
    precision_recall,
    save_reference,
)

NAN = float("nan")


def gaussian(mean, covariance, num_samples=None):
    return Gaussian(
        torch.tensor(mean, dtype=torch.float64),
        torch.tensor(covariance, dtype=torch.float64),
        num_samples,
    )


def statistics_of(features, batch_size=None):
    statistics = FrechetStatistics(features.shape[1])
    for part in features.split(batch_size or len(features)):
        statistics.update(part)
    return statistics


def random_covariance(dim, generator):
    factor = torch.randn(dim, dim, generator=generator, dtype=torch.float64)
    return factor @ factor.T


# --------------------------------------------------------------------------------- statistics


def test_statistics_are_mean_and_unbiased_covariance(generator):
    features = torch.randn(50, 4, generator=generator) * torch.tensor([1.0, 2, 3, 4]) + 5
    found = statistics_of(features).compute()
    torch.testing.assert_close(found.mean, features.double().mean(0))
    expected = torch.from_numpy(np.cov(features.double().numpy(), rowvar=False))
    torch.testing.assert_close(found.covariance, expected)
    assert found.num_samples == 50
    assert found.covariance.dtype == torch.float64


@pytest.mark.parametrize("batch_size", [1, 3, 16])
def test_streamed_statistics_are_those_of_one_batch(generator, batch_size):
    # A large offset: sums of squares minus squared sums would lose 8 of the 16 digits here.
    features = torch.randn(50, 4, generator=generator, dtype=torch.float64) + 1e4
    streamed = statistics_of(features, batch_size).compute()
    torch.testing.assert_close(streamed, statistics_of(features).compute(), rtol=1e-10, atol=1e-10)


def test_merged_halves_are_the_whole(generator):
    features = torch.randn(50, 4, generator=generator)
    first, second = statistics_of(features[:13]), statistics_of(features[13:])
    first.merge(FrechetStatistics(4))
    first.merge(second)
    whole = statistics_of(features).compute()
    torch.testing.assert_close(first.compute(), whole, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(second.compute(), statistics_of(features[13:]).compute())


def test_an_empty_batch_changes_nothing(generator):
    features = torch.randn(5, 4, generator=generator)
    statistics = statistics_of(features)
    statistics.update(features[:0])
    torch.testing.assert_close(statistics.compute(), statistics_of(features).compute())


def test_statistics_name_the_sample_that_is_not_finite():
    statistics = FrechetStatistics(2)
    statistics.update(torch.zeros(10, 2))
    broken = torch.zeros(4, 2)
    broken[3, 1] = NAN
    with pytest.raises(ValueError, match="frechet distance: item 13 is not finite"):
        statistics.update(broken)


def test_statistics_of_another_dimension_are_refused():
    with pytest.raises(ValueError, match="dimension 3 must have the dimension 2"):
        FrechetStatistics(2).update(torch.zeros(4, 3))


def test_one_sample_has_no_covariance():
    statistics = FrechetStatistics(2)
    statistics.update(torch.zeros(1, 2))
    with pytest.raises(ValueError, match="at least 2 samples and there are 1"):
        statistics.compute()


# ----------------------------------------------------------------------------------- distance


def test_distance_of_equal_covariances_is_that_of_the_means():
    covariance = [[2.0, 0.5], [0.5, 1.0]]
    distance = frechet_distance(gaussian([0, 0], covariance), gaussian([3, 4], covariance))
    assert distance == pytest.approx(25)


def test_distance_of_diagonal_covariances_adds_squared_differences_of_deviations():
    first = gaussian([0, 0, 0], np.diag([1.0, 4.0, 9.0]))
    second = gaussian([0, 0, 1], np.diag([4.0, 4.0, 0.25]))
    assert frechet_distance(first, second) == pytest.approx(1 + 0 + 2.5**2 + 1)


def test_distance_of_covariances_that_do_not_commute_is_the_closed_form():
    one, two = np.array([[2.0, 1.0], [1.0, 3.0]]), np.array([[5.0, -2.0], [-2.0, 1.0]])
    # In two dimensions tr((AB)**0.5)**2 = tr(AB) + 2 sqrt(det A det B).
    root_trace = math.sqrt(np.trace(one @ two) + 2 * math.sqrt(5.0 * 1.0))
    expected = np.trace(one) + np.trace(two) - 2 * root_trace
    distance = frechet_distance(gaussian([0, 0], one), gaussian([0, 0], two))
    assert distance == pytest.approx(expected, rel=1e-12)


def test_distance_equals_the_eigenvalues_of_the_product(generator):
    first, second = random_covariance(12, generator), random_covariance(12, generator)
    eigenvalues = np.linalg.eigvals((first @ second).numpy())
    expected = first.trace() + second.trace() - 2 * np.sqrt(eigenvalues).real.sum()
    zero = torch.zeros(12, dtype=torch.float64)
    distance = frechet_distance(Gaussian(zero, first, None), Gaussian(zero, second, None))
    assert distance == pytest.approx(float(expected), rel=1e-9)


def test_distance_is_symmetric(generator):
    zero = torch.zeros(6, dtype=torch.float64)
    first = Gaussian(zero, random_covariance(6, generator), None)
    second = Gaussian(zero + 1, random_covariance(6, generator), None)
    assert frechet_distance(first, second) == pytest.approx(frechet_distance(second, first))


def test_distance_to_itself_vanishes_also_without_full_rank(generator):
    features = 10 * torch.randn(40, 200, generator=generator).abs()
    statistics = statistics_of(features).compute()
    assert int(torch.linalg.matrix_rank(statistics.covariance)) == 39
    with pytest.warns(UserWarning, match="of 40 samples is biased upwards"):
        distance = frechet_distance(statistics, statistics)
    assert 0 <= distance < 1e-9


def test_distance_without_full_rank_is_finite_and_right():
    # Deviations 1 and 2 on different axes share nothing: all variance counts.
    first = gaussian([0, 0, 0], np.diag([1.0, 0.0, 0.0]))
    second = gaussian([0, 0, 0], np.diag([0.0, 4.0, 0.0]))
    assert frechet_distance(first, second) == pytest.approx(5.0)


def test_rounding_never_makes_a_distance_negative(generator):
    zero = torch.zeros(5, dtype=torch.float64)
    sides = [Gaussian(zero, random_covariance(5, generator), None) for _ in range(20)]
    distances = [frechet_distance(side, side) for side in sides]
    assert 0 <= min(distances) <= max(distances) < 1e-10


def test_distance_to_a_point_is_the_whole_variance():
    point = gaussian([0, 0], np.zeros((2, 2)))
    assert frechet_distance(point, gaussian([1, 0], np.eye(2))) == pytest.approx(3.0)
    assert frechet_distance(point, point) == 0.0


def test_distance_of_samples_approaches_that_of_their_distributions(generator):
    first = torch.randn(4000, 3, generator=generator)
    second = 2 * torch.randn(4000, 3, generator=generator) + 1
    distance = frechet_distance(statistics_of(first).compute(), statistics_of(second).compute())
    # One squared for the mean and for the deviation, on each of three axes.
    assert distance == pytest.approx(6.0, rel=0.05)


def test_enough_samples_and_unknown_numbers_give_no_warning():
    for num_samples in (None, 2048):
        side = gaussian([0, 0], np.eye(2), num_samples)
        assert frechet_distance(side, side) < 1e-12


def test_too_few_samples_on_one_side_give_a_warning():
    few, many = gaussian([0, 0], np.eye(2), 2047), gaussian([0, 0], np.eye(2), 50_000)
    with pytest.warns(UserWarning, match="2047 samples .* at least 2048"):
        frechet_distance(many, few)


def test_distance_between_different_extractors_is_refused():
    with pytest.raises(ValueError, match="dimension 2 cannot be compared with dimension 3"):
        frechet_distance(gaussian([0, 0], np.eye(2)), gaussian([0, 0, 0], np.eye(3)))


def test_distance_of_damaged_statistics_is_refused():
    good = gaussian([0, 0], np.eye(2))
    with pytest.raises(ValueError, match="a mean is not finite"):
        frechet_distance(gaussian([NAN, 0], np.eye(2)), good)
    with pytest.raises(ValueError, match="a covariance is not finite"):
        frechet_distance(good, gaussian([0, 0], [[NAN, 0], [0, 1]]))
    with pytest.raises(ValueError, match=r"variance of -0\.5 beside 1; none may be negative"):
        frechet_distance(good, gaussian([0, 0], np.diag([1.0, -0.5])))


# ---------------------------------------------------------------------------------- reference


def test_a_reference_comes_back_as_it_was_written(tmp_path, generator):
    statistics = statistics_of(torch.randn(9, 4, generator=generator)).compute()
    metadata = {"extractor": "mobilenet", "crop": "center", "size": 64, "flip": False}
    save_reference(tmp_path / "reference.npz", statistics, metadata)
    found = load_reference(tmp_path / "reference.npz")
    assert torch.equal(found.statistics.mean, statistics.mean)
    assert torch.equal(found.statistics.covariance, statistics.covariance)
    assert found.statistics.num_samples == 9
    assert found.metadata == metadata
    assert [path.name for path in tmp_path.iterdir()] == ["reference.npz"]


def test_a_reference_without_a_number_of_samples_stays_without(tmp_path):
    save_reference(tmp_path / "reference.npz", gaussian([0, 0], np.eye(2)), {})
    assert load_reference(tmp_path / "reference.npz").statistics.num_samples is None


def test_a_reference_of_the_adm_evaluator_is_read(tmp_path):
    np.savez(
        tmp_path / "adm.npz",
        arr_0=np.zeros((4, 8, 8, 3), dtype=np.uint8),
        mu=np.array([1, 2], dtype=np.float32),
        sigma=np.array([[2, 1], [1, 2]], dtype=np.float32),
        mu_s=np.zeros(3),
        sigma_s=np.zeros((3, 3)),
    )
    statistics, metadata = load_reference(tmp_path / "adm.npz")
    assert statistics.mean.tolist() == [1.0, 2.0]
    assert statistics.covariance.tolist() == [[2.0, 1.0], [1.0, 2.0]]
    assert statistics.mean.dtype == statistics.covariance.dtype == torch.float64
    assert statistics.num_samples is None
    assert metadata == {}


def test_a_missing_reference_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"there is no file .*nowhere\.npz"):
        load_reference(tmp_path / "nowhere.npz")


def test_images_alone_are_no_reference(tmp_path):
    np.savez(tmp_path / "samples.npz", np.zeros((2, 8, 8, 3), dtype=np.uint8))
    np.save(tmp_path / "array.npy", np.zeros(3))
    with pytest.raises(ValueError, match=r"samples.npz holds no mu and sigma"):
        load_reference(tmp_path / "samples.npz")
    with pytest.raises(ValueError, match=r"array.npy is not an .npz file"):
        load_reference(tmp_path / "array.npy")


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 cut off", b"neither"])
def test_a_file_that_is_no_archive_is_named(tmp_path, content):
    (tmp_path / "broken.npz").write_bytes(content)
    with pytest.raises(ValueError, match=r"broken\.npz is not an \.npz file of plain arrays"):
        load_reference(tmp_path / "broken.npz")


def test_a_reference_with_pickled_objects_is_not_opened(tmp_path):
    objects = np.array([{"a": 1}], dtype=object)
    np.savez(tmp_path / "pickled.npz", mu=objects, sigma=objects)
    with pytest.raises(ValueError, match=r"not an \.npz file of plain arrays"):
        load_reference(tmp_path / "pickled.npz")


def test_a_reference_whose_parts_do_not_fit_is_refused(tmp_path):
    np.savez(tmp_path / "odd.npz", mu=np.zeros(3), sigma=np.eye(2))
    with pytest.raises(ValueError, match=r"sigma of shape \(2, 2\) must be square.*\(3,\)"):
        load_reference(tmp_path / "odd.npz")


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
    assert found.std == pytest.approx(0, abs=1e-12)


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


@pytest.mark.parametrize("chunk_size", [1, 7, 1000])
def test_a_set_covers_itself_in_any_chunks(generator, chunk_size):
    features = torch.randn(20, 64, generator=generator).repeat_interleave(5, 0) + 30
    assert precision_recall(features, features.clone(), k=3, chunk_size=chunk_size) == (1.0, 1.0)


def test_equal_images_are_at_no_distance_whatever_rounding_does(generator):
    # The radius of images in five copies is 0. A last chunk of one row sums in another order.
    rows = 30 * torch.rand(60, 1000, generator=generator, dtype=torch.float64)
    real = rows.repeat_interleave(5, 0)
    fake = real[torch.randperm(300, generator=generator)[:51]]
    assert precision_recall(real, fake, chunk_size=50).precision == 1.0


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


# ------------------------------------------------------------------------------- real images


def real_images(shared, num_images):
    parquet = pytest.importorskip("pyarrow.parquet")
    table = next(
        parquet.ParquetFile(shared / "data" / "imagenette64-val.parquet").iter_batches(num_images)
    )
    files = [image["bytes"] for image in table.column("image").to_pylist()]
    arrays = [np.asarray(Image.open(io.BytesIO(file)).convert("RGB")) for file in files]
    return torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2)


@pytest.mark.slow
def test_real_images_are_at_no_distance_from_themselves_and_far_from_noisy_ones(shared):
    pixels = real_images(shared, 300)
    extractor = FeatureExtractor(shared / "weights" / "mobilenet_v2_features.pt")
    noise = torch.randn(60, *pixels.shape[1:], generator=torch.Generator().manual_seed(0))
    noisy = (pixels[:60] + 20 * noise).clamp(0, 255).to(torch.uint8)
    features = torch.cat([extractor.features(part) for part in pixels.split(50)])
    # The first 60 once more, in other batches, and everything in another order.
    again = torch.cat([extractor.features(part) for part in pixels[:60].split(20)])
    reference = statistics_of(features).compute()
    identity = statistics_of(torch.cat([again, features[60:]]).flip(0), 7).compute()
    with pytest.warns(UserWarning, match="300 samples"):
        assert frechet_distance(reference, identity) < 1e-3
    with pytest.warns(UserWarning, match="60 samples"):
        clean = frechet_distance(reference, statistics_of(again).compute())
    with pytest.warns(UserWarning, match="60 samples"):
        spoilt = frechet_distance(reference, statistics_of(extractor.features(noisy)).compute())
    assert spoilt > 1.5 * clean > 0
