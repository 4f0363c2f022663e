"""A reference says what it is for, and is refused where it is not."""

import numpy as np
import pytest
import torch

from mergevq.config.records import ReferenceRecord
from mergevq.data.arrays import ImageArray
from mergevq.data.images import open_images
from mergevq.metrics.extractor import FeatureExtractor
from mergevq.metrics.frechet import load_features, load_reference
from mergevq.metrics.references import (
    ImageHashes,
    describe_images,
    make_reference,
    open_reference,
    reference_features,
)
from tests.support.evaluations import ALONE, write_images, write_network
from tests.support.records import assert_declared

pytestmark = pytest.mark.filterwarnings("ignore:a reference of:UserWarning")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("references")
    write_images(folder / "images", 7)
    write_network(folder / "colours.pt")
    write_network(folder / "others.pt").write_bytes((folder / "colours.pt").read_bytes())
    return folder


@pytest.fixture(scope="module")
def extractor(folder):
    return FeatureExtractor(folder / "colours.pt")


def make(folder, path, kind="generation", **changes):
    given = {"image_size": 16, "batch_size": 3, "device": "cpu"}
    make_reference(
        str(folder / "images"), path, kind, extractor=folder / "colours.pt", **given | changes
    )
    return path


def opened(path, kind, extractor, image_size=16):
    return open_reference(path, kind, extractor=extractor, image_size=image_size)


@pytest.mark.parametrize("batch_size", [1, 3, 7])
def test_streamed_statistics_are_those_of_one_batch(folder, extractor, batch_size):
    described = describe_images(
        open_images(str(folder / "images")),
        extractor,
        ALONE,
        image_size=16,
        batch_size=batch_size,
        num_features=7,
    )
    features = described.features.double()
    torch.testing.assert_close(described.statistics.mean, features.mean(0))
    torch.testing.assert_close(described.statistics.covariance, features.T.cov())
    assert described.num_images == described.statistics.num_samples == 7


def test_a_reference_says_what_it_is_of(tmp_path, folder, extractor):
    path = make(folder, tmp_path / "reference.npz", max_images=5, num_features=3)
    metadata = load_reference(path).metadata
    assert_declared(metadata, ReferenceRecord)
    assert metadata["kind"] == "generation"
    assert metadata["extractor_sha256"] == extractor.sha256
    assert (metadata["num_images"], metadata["image_size"]) == (5, 16)
    assert len(metadata["pixels_sha256"]) == 64
    assert load_features(path).shape == (3, 5)
    assert opened(path, "generation", extractor).statistics.num_samples == 5


def test_pictures_larger_than_asked_for_are_not_read(tmp_path, folder):
    with pytest.raises(ValueError, match=r"256 pixels, more than max_pixels \(255\)"):
        make(folder, tmp_path / "none.npz", max_pixels=255)


def test_few_images_give_a_warning(tmp_path, folder):
    with pytest.warns(UserWarning, match=r"of 7 images biases .* use at least 2048"):
        make(folder, tmp_path / "reference.npz")


@pytest.mark.parametrize(
    ("made", "wanted", "named"),
    [
        ("generation", "reconstruction", "--kind reconstruction --data DATA"),
        ("reconstruction", "generation", "--kind generation --data TRAINING_DATA"),
    ],
)
def test_each_kind_refuses_the_other_and_names_the_right_one(
    tmp_path, folder, extractor, made, wanted, named
):
    path = make(folder, tmp_path / "reference.npz", made)
    with pytest.raises(ValueError, match=f"is for {made}, and {wanted} .*{named}"):
        opened(path, wanted, extractor)


def test_another_extractor_and_size_are_refused(tmp_path, folder, extractor):
    path = make(folder, tmp_path / "reference.npz")
    other = FeatureExtractor(folder / "colours.pt")
    other.name, other.sha256 = "others", "0" * 64
    with pytest.raises(ValueError, match=r"with extractor colours .* this is others \(0000"):
        opened(path, "generation", other)
    with pytest.raises(ValueError, match=r"is of 16 x 16 pixels .* have 256 x 256"):
        opened(path, "generation", extractor, image_size=256)


def test_a_file_of_the_adm_evaluator_is_for_generation_with_inception_only(tmp_path, extractor):
    path = tmp_path / "adm.npz"
    np.savez(path, mu=np.zeros(5), sigma=np.eye(5), mu_s=np.zeros(3), sigma_s=np.eye(3))
    with pytest.raises(ValueError, match="is for generation, as all files of the ADM evaluator"):
        opened(path, "reconstruction", extractor)
    with pytest.raises(ValueError, match="give the Inception-2015 file with --extractor"):
        opened(path, "generation", extractor)


def test_images_in_a_file_are_described_on_reading(tmp_path, folder, extractor):
    path = make(folder, tmp_path / "reference.npz", "reconstruction", array=tmp_path / "array.npz")
    assert len(ImageArray(tmp_path / "array.npz")) == 7
    expected = opened(path, "reconstruction", extractor)
    found = opened(tmp_path / "array.npz", "reconstruction", extractor)
    torch.testing.assert_close(found.statistics.mean, expected.statistics.mean)
    assert_declared(found.metadata, ReferenceRecord)
    assert found.metadata["pixels_sha256"] == expected.metadata["pixels_sha256"]
    assert reference_features(path, extractor, 2) is None
    assert reference_features(tmp_path / "array.npz", extractor, 2).shape == (7, 5)
    with pytest.raises(ValueError, match=r"is of 16 x 16 pixels .* have 32 x 32"):
        opened(tmp_path / "array.npz", "generation", extractor, image_size=32)


def test_a_hash_is_of_the_images_in_order_and_not_of_their_batches(generator):
    pixels = torch.randint(0, 256, (4, 3, 2, 2), generator=generator, dtype=torch.uint8)

    def hashed(pixels, order, size):
        hashes = ImageHashes()
        for part in torch.tensor(order).split(size):
            hashes.update(pixels[part], part)
        return hashes.compute()

    whole = hashed(pixels, [0, 1, 2, 3], 4)
    assert hashed(pixels, [2, 3, 0, 1], 3) == whole
    assert hashed(pixels.flip(0), [0, 1, 2, 3], 4) != whole
    changed = pixels.clone()
    changed[3, 0, 0, 0] ^= 1
    assert hashed(changed, [0, 1, 2, 3], 4) != whole
