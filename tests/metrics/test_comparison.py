"""Tests of `mergevq.metrics.comparison`."""

import math

import pytest
import torch
from torch import nn

from mergevq.metrics.comparison import Comparison, Originals, comparison, standard_metrics
from mergevq.metrics.extractor import FeatureExtractor
from mergevq.metrics.image import psnr, ssim


class Means(nn.Module):
    """Two features of an image: means of two colours."""

    def forward(self, images: torch.Tensor, return_features: bool = False) -> torch.Tensor:
        means = images.mean([2, 3])[:, :2]
        return means if return_features else means * 2


@pytest.fixture
def extractor(tmp_path):
    torch.jit.script(Means()).save(tmp_path / "means.pt")
    return FeatureExtractor(str(tmp_path / "means.pt"), torch.device("cpu"))


def pictures(count, seed):
    numbers = torch.Generator().manual_seed(seed)
    return torch.rand(count, 3, 16, 16, generator=numbers) * 2 - 1


def compared(found, images, decoded, *cuts):
    """Add images in batches that end at `cuts`."""
    originals = Originals(None, found._extractor)
    first = 0
    for last in (*cuts, len(images)):
        part = slice(first, last)
        found.update(originals.update(images[part]), decoded[part], torch.arange(first, last))
        first = last
    return found.compute(originals.compute())


def test_numbers_are_means_over_images_however_they_come_in_batches():
    images, decoded = pictures(5, 0), pictures(5, 1)
    whole = compared(comparison(), images, decoded)
    parts = compared(comparison(), images, decoded, 2, 3)
    assert whole == pytest.approx(parts, abs=1e-6)
    assert list(whole) == ["psnr", "num_exact", "ssim", "l1"]
    assert whole["psnr"] == pytest.approx(float(psnr(images, decoded).mean()), abs=1e-4)
    assert whole["ssim"] == pytest.approx(float(ssim(images, decoded).mean()), abs=1e-6)
    assert whole["l1"] == pytest.approx(float((images - decoded).abs().mean()), abs=1e-6)


def test_decoded_images_are_clipped_and_exact_ones_are_counted():
    images = pictures(3, 0).sign()
    decoded = images * torch.tensor([5.0, 0.5, 1.0])[:, None, None, None]
    found = compared(comparison(), images, decoded)
    assert found["psnr"] == math.inf
    assert found["num_exact"] == 2
    # Half of the way from +-1: a squared error of 0.25, of a range of 2, after rounding to bytes.
    assert found["psnr_finite"] == pytest.approx(10 * math.log10(4 / 0.25), abs=0.1)


@pytest.mark.filterwarnings("ignore:a Frechet distance of")
def test_features_are_taken_once_a_batch_for_all_who_read_them(extractor, monkeypatch):
    calls = []
    features = extractor.features
    monkeypatch.setattr(extractor, "features", lambda x: calls.append(len(x)) or features(x))
    images = pictures(6, 0)
    found = compared(comparison(None, extractor), images, images, 4)
    assert calls == [4, 4, 2, 2]  # originals and decoded, of two batches
    cosine, distance = (name for name in found if "means" in name)
    assert found[cosine] == pytest.approx(1)
    assert found[distance] == pytest.approx(0, abs=1e-4)


def test_without_a_reference_there_is_no_distance(extractor):
    images = pictures(4, 0)
    found = comparison(None, extractor)
    found.update(Originals(None, extractor).update(images), images, torch.arange(4))
    assert extractor.metric_name("frechet") not in found.compute()


def test_a_step_at_each_border_of_patches_is_a_seam():
    ramp = torch.arange(16) / 32
    original = ramp.expand(2, 3, 16, 16)
    # Steps of 1/32 to the right, and 1/32 more where a patch of 4 begins.
    stepped = original + torch.arange(16) // 4 / 32
    found = compared(comparison(patch_size=4), original, stepped, 1)
    assert found["seam_ratio"] == pytest.approx(2)
    assert found["sharpness"] == pytest.approx(1)
    # Of patches of another size these steps are inside as often as across borders.
    other = compared(comparison(patch_size=2), original, stepped)["seam_ratio"]
    assert 1 < other < 2
    # The same images have none, and half of the contrast is a quarter of the energy.
    halved = compared(comparison(patch_size=4), original, original / 2)
    assert halved["seam_ratio"] == pytest.approx(1)
    assert halved["sharpness"] == pytest.approx(1 / 4)


def test_flat_images_have_no_seam_ratio():
    images = pictures(2, 0)
    found = compared(comparison(patch_size=4), torch.zeros_like(images), images)
    assert not {"seam_ratio", "sharpness"} & set(found)
    found = compared(comparison(patch_size=4), images, torch.zeros_like(images))
    assert found["sharpness"] == 0
    assert "seam_ratio" not in found
    for whole in (comparison(), comparison(patch_size=1)):
        assert "seam_ratio" not in compared(whole, images, images)


class Brightest:
    """A metric of one's own: the brightest decoded pixel."""

    def __init__(self):
        self.most = -1.0

    def update(self, original, decoded, positions):  # noqa: ARG002 - as of other metrics
        self.most = max(self.most, float(decoded.image.max()))

    def compute(self, reference):  # noqa: ARG002
        return {"brightest": self.most}


def test_a_metric_of_ones_own_stands_beside_the_others():
    images = pictures(2, 0)
    found = compared(
        Comparison([*standard_metrics(None, None, "own"), Brightest()]), images, images
    )
    assert found["brightest"] == float(images.max())
    assert float(Comparison([Brightest()]).num_images) == 0
    with pytest.raises(ValueError, match="PSNR is not among the metrics"):
        Comparison([Brightest()]).psnr  # noqa: B018
