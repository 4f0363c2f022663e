import hashlib
import warnings

import pytest
import torch
from torch import Tensor, nn

from mergevq.metrics.extractor import INCEPTION_SHA256, FeatureExtractor, metric_name, sha256_of


class Conventional(nn.Module):
    """Mean colours as features, their softmax as classes; the bias only moves the classes."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("bias", torch.tensor([5.0, 0.0, 0.0]))

    def forward(
        self, images: Tensor, return_features: bool = False, no_output_bias: bool = False
    ) -> Tensor:
        small = torch.nn.functional.interpolate(images, [4, 4], mode="area")
        features = small.mean([2, 3])
        if return_features:
            return features
        logits = features / 255
        return torch.softmax(logits if no_output_bias else logits + self.bias, -1)


class Plain(nn.Module):
    def forward(self, images: Tensor) -> Tensor:
        return images.mean([2, 3])


class Grid(nn.Module):
    def forward(self, images: Tensor, return_features: bool = False) -> Tensor:
        return images if return_features else -images


def saved(module, path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        torch.jit.script(module).save(path)
    return path


@pytest.fixture
def extractor(tmp_path) -> FeatureExtractor:
    return FeatureExtractor(saved(Conventional(), tmp_path / "My-Net v1_features.pt"))


def test_pixels_reach_the_network_as_they_are_in_files(extractor):
    pixels = torch.tensor([0, 100, 255], dtype=torch.uint8)[None, :, None, None]
    assert extractor.features(pixels.expand(2, 3, 8, 8)).tolist() == [[0.0, 100.0, 255.0]] * 2
    assert extractor.dim == 3


def test_images_of_any_size_are_left_to_the_network(extractor):
    pixels = torch.full((1, 3, 16, 40), 7, dtype=torch.uint8)
    assert extractor.features(pixels).tolist() == [[7.0, 7.0, 7.0]]


def test_class_probabilities_leave_out_the_bias_where_the_network_can(extractor):
    pixels = torch.zeros(2, 3, 8, 8, dtype=torch.uint8)
    probabilities = extractor.probabilities(pixels)
    torch.testing.assert_close(probabilities, torch.full((2, 3), 1 / 3))


def test_the_extractor_is_known_by_its_file(extractor):
    assert extractor.name == "my_net_v1"
    assert extractor.sha256 == hashlib.sha256(extractor.path.read_bytes()).hexdigest()
    assert extractor.sha256 == sha256_of(extractor.path)


def test_an_extractor_other_than_inception_is_named_in_its_metrics(extractor):
    assert extractor.metric_name("frechet") == "frechet_my_net_v1"
    assert extractor.metric_name("kernel") == "kernel_my_net_v1"


def test_a_file_that_only_has_inceptions_name_gives_no_fid(tmp_path):
    extractor = FeatureExtractor(saved(Conventional(), tmp_path / "inception-2015-12-05.pt"))
    assert extractor.metric_name("frechet") == "frechet_inception_2015_12_05"


def test_only_the_inception_file_gives_the_names_of_the_literature():
    kinds = ("frechet", "class_score", "kernel", "precision", "recall")
    names = [metric_name(kind, "renamed", INCEPTION_SHA256) for kind in kinds]
    assert names == ["fid", "inception_score", "kid", "precision", "recall"]
    others = [metric_name(kind, "other", "0" * 64) for kind in kinds]
    assert others == [f"{kind}_other" for kind in kinds]


def test_features_need_no_gradient_and_do_not_change(extractor):
    pixels = torch.randint(0, 256, (2, 3, 8, 8), dtype=torch.uint8)
    first, second = extractor.features(pixels), extractor.features(pixels)
    assert not first.requires_grad
    assert torch.equal(first, second)


def test_a_missing_extractor_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"no extractor at .*nowhere\.pt"):
        FeatureExtractor(tmp_path / "nowhere.pt")


def test_a_file_that_is_no_torchscript_is_named(tmp_path):
    (tmp_path / "weights.pt").write_bytes(b"something else")
    with pytest.raises(RuntimeError, match=r"extractor .*weights\.pt is not a TorchScript file"):
        FeatureExtractor(tmp_path / "weights.pt")


def test_a_state_dict_is_not_an_extractor(tmp_path):
    torch.save(Conventional().state_dict(), tmp_path / "weights.pt")
    with pytest.raises(RuntimeError, match="is not a TorchScript file"):
        FeatureExtractor(tmp_path / "weights.pt")


def test_a_network_called_in_another_way_is_refused(tmp_path):
    path = saved(Plain(), tmp_path / "plain.pt")
    with pytest.raises(ValueError, match=r"has forward\(images\) and needs forward\(images, ret"):
        FeatureExtractor(path)


def test_a_network_that_gives_no_vectors_is_refused(tmp_path):
    path = saved(Grid(), tmp_path / "grid.pt")
    with pytest.raises(ValueError, match=r"gave \(1, 3, 32, 32\) for 1 images .* \(1, D\)"):
        FeatureExtractor(path)


def test_mobilenet_is_called_as_the_public_inception_is(shared):
    extractor = FeatureExtractor(shared / "weights" / "mobilenet_v2_features.pt")
    pixels = torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8)
    assert extractor.metric_name("frechet") == "frechet_mobilenet_v2"
    assert extractor.dim == 1280
    assert extractor.features(pixels).shape == (2, 1280)
    probabilities = extractor.probabilities(pixels)
    assert probabilities.shape == (2, 1001)
    torch.testing.assert_close(probabilities.sum(1), torch.ones(2))
