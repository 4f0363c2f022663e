"""Tests of `mergevq.metrics.frechet`."""

import io
import math

import numpy as np
import pytest
import torch
from PIL import Image

from mergevq.metrics.extractor import FeatureExtractor
from mergevq.metrics.frechet import (
    FrechetStatistics,
    Gaussian,
    frechet_distance,
    load_reference,
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
