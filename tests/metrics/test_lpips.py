"""LPIPS: published values, definition, precision, gradients, and where the weights come from."""

import hashlib
import socket
from functools import partial

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn import functional

from mergevq.metrics.lpips import (
    TRUNKS,
    Perceptual,
    cache_folder,
    convert_perceptual,
    convert_perceptual_files,
    load_perceptual,
    missing_weights,
    weights_digest,
)

NAMES = list(TRUNKS)


def golden_pair():
    y, x = torch.meshgrid(torch.linspace(-1, 1, 64), torch.linspace(-1, 1, 64), indexing="ij")
    first = torch.stack([torch.sin(5 * x + 2 * y), torch.cos(4 * y), x * y])
    second = torch.stack([torch.sin(5 * x + 2 * y + 0.4), 0.8 * torch.cos(4 * y), x * x * y])
    return first[None], second[None]


def pair(generator, batch=2, side=32):
    return torch.rand(2, batch, 3, side, side, generator=generator) * 2 - 1


def positive(perceptual):
    """Heads as in the published weights: none below 0."""
    for name, parameter in perceptual.named_parameters():
        if name.startswith("lin"):
            parameter.abs_()
    return perceptual


@pytest.mark.parametrize(("trunk", "expected"), [("alex", 0.045926), ("squeeze", 0.066116)])
def test_the_published_weights_give_the_published_distance(shared, trunk, expected):
    perceptual = load_perceptual(trunk, str(shared / "weights"))
    assert perceptual(*golden_pair()).item() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize(
    ("trunk", "num_parameters"), [("vgg", 14_716_160), ("alex", 2_470_848), ("squeeze", 724_736)]
)
def test_every_trunk_has_the_parameters_of_the_published_one(trunk, num_parameters):
    assert sum(p.numel() for p in Perceptual(trunk).parameters()) == num_parameters


def test_vgg_is_laid_out_as_in_torchvision():
    names = [name for name in Perceptual("vgg").state_dict() if name.endswith("weight")]
    convs = [0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28]
    assert names == [
        *(f"features.{i}.weight" for i in convs),
        *(f"lin{i}.model.1.weight" for i in range(5)),
    ]


def test_vgg_is_the_weighted_distance_of_its_unit_features(generator):
    perceptual = Perceptual("vgg")
    for parameter in perceptual.parameters():
        # Signals of equal size at every depth, so that no tap's share of the sum is lost in it.
        parameter.normal_(0, (2 / parameter[0].numel()) ** 0.5, generator=generator)
    image, reconstruction = pair(generator)
    state = perceptual.state_dict()
    shift = torch.tensor([-0.030, -0.088, -0.188]).view(3, 1, 1)
    scale = torch.tensor([0.458, 0.448, 0.450]).view(3, 1, 1)
    features = torch.cat([(image - shift) / scale, (reconstruction - shift) / scale])
    expected = torch.zeros(2)
    for head, convs in enumerate([(0, 2), (5, 7), (10, 12, 14), (17, 19, 21), (24, 26, 28)]):
        for i in convs:
            weight, bias = state[f"features.{i}.weight"], state[f"features.{i}.bias"]
            features = functional.conv2d(features, weight, bias, padding=1).clamp(min=0)
        unit = features / features.pow(2).sum(1, keepdim=True).sqrt()
        left, right = unit.chunk(2)
        weight = state[f"lin{head}.model.1.weight"]
        expected += ((left - right) ** 2 * weight.view(1, -1, 1, 1)).sum(1).mean((1, 2))
        features = functional.max_pool2d(features, 2)
    torch.testing.assert_close(perceptual(image, reconstruction), expected)


@pytest.mark.parametrize("trunk", NAMES)
def test_equal_images_are_at_distance_0_and_others_further(trunk, generator):
    perceptual = positive(Perceptual(trunk))
    image, reconstruction = pair(generator)
    assert torch.equal(perceptual(image, image), torch.zeros(2))
    assert (perceptual(image, reconstruction) > 0).all()


def test_the_distance_is_symmetric_and_each_pair_has_its_own(generator):
    perceptual = Perceptual("alex")
    image, reconstruction = pair(generator, batch=3)
    distance = perceptual(image, reconstruction)
    torch.testing.assert_close(perceptual(reconstruction, image), distance)
    alone = perceptual(image[1:2], reconstruction[1:2])
    torch.testing.assert_close(alone, distance[1:2])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_does_not_change_the_distance(dtype, generator):
    perceptual = Perceptual("squeeze")
    image, reconstruction = (x.to(dtype) for x in pair(generator))
    expected = perceptual(image.float(), reconstruction.float())
    with torch.autocast("cpu", dtype):
        assert torch.equal(perceptual(image, reconstruction), expected)


@pytest.mark.parametrize("trunk", NAMES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_large_inputs_stay_finite_under_autocast(trunk, dtype, generator):
    perceptual = Perceptual(trunk)
    image, reconstruction = (1e4 * x for x in pair(generator, batch=1))
    reconstruction.requires_grad_()
    with torch.autocast("cpu", dtype):
        distance = perceptual(image, reconstruction)
    distance.sum().backward()
    assert distance.dtype == torch.float32
    assert distance.isfinite().all()
    assert reconstruction.grad.isfinite().all()


def test_features_that_are_all_0_leave_no_nan():
    perceptual = Perceptual("alex")
    for parameter in perceptual.features.parameters():
        parameter.zero_()
    reconstruction = torch.zeros(1, 3, 32, 32, requires_grad=True)
    distance = perceptual(torch.zeros(1, 3, 32, 32), reconstruction)
    distance.sum().backward()
    assert torch.equal(distance, torch.zeros(1))
    assert torch.equal(reconstruction.grad, torch.zeros(1, 3, 32, 32))


def test_the_network_is_frozen_and_the_gradient_reaches_the_reconstruction(generator):
    perceptual = Perceptual("alex")
    image, reconstruction = pair(generator)
    reconstruction.requires_grad_()
    perceptual(image, reconstruction).sum().backward()
    assert not any(parameter.requires_grad for parameter in perceptual.parameters())
    assert not perceptual.training
    assert reconstruction.grad.abs().sum() > 0


def test_the_image_that_needs_no_gradient_keeps_nothing_for_the_backward_pass(generator):
    perceptual = Perceptual("alex")
    image, reconstruction = pair(generator, batch=1)
    reconstruction.requires_grad_()
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        perceptual(image, reconstruction)
        once = len(saved)
        perceptual(image.requires_grad_(), reconstruction)
    assert len(saved) - once > 1.5 * once


@pytest.mark.parametrize("trunk", NAMES)
def test_an_image_too_small_for_the_trunk_is_refused_and_the_smallest_is_not(trunk):
    perceptual = Perceptual(trunk)
    side = TRUNKS[trunk].min_side
    assert perceptual(torch.zeros(1, 3, side, side), torch.ones(1, 3, side, side)).isfinite().all()
    small = torch.zeros(1, 3, side + 8, side - 1)
    with pytest.raises(ValueError, match=rf"image side \({side - 1}\) must be at least {side}"):
        perceptual(small, small)


@pytest.mark.parametrize("trunk", NAMES)
def test_features_of_an_image_can_be_kept_for_several_comparisons(trunk):
    perceptual = Perceptual(trunk)
    image, one, two = 2 * torch.rand(3, 2, 3, 40, 32) - 1
    taps = perceptual.taps(image)
    for other in (one, two):
        assert torch.equal(
            perceptual.between(taps, perceptual.taps(other)), perceptual(image, other)
        )
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(perceptual.between(taps, perceptual.taps(one)), perceptual(image, one))
        assert all(torch.equal(*pair) for pair in zip(perceptual.taps(image), taps, strict=True))
    with pytest.raises(ValueError, match=r"image side \(8\) must be at least"):
        perceptual.taps(torch.zeros(1, 3, 8, 40))


def test_weights_are_found_as_a_file_in_a_folder_and_in_the_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(socket, "socket", None)
    monkeypatch.setattr(socket, "getaddrinfo", None)
    original = Perceptual("vgg")
    save_file(original.state_dict(), tmp_path / "lpips_vgg.safetensors")
    by_file = load_perceptual("vgg", str(tmp_path / "lpips_vgg.safetensors"))
    by_folder = load_perceptual("vgg", str(tmp_path))
    by_cache = load_perceptual("vgg", None, cache=tmp_path)
    weight = original.features[0].weight
    assert all(
        torch.equal(found.features[0].weight, weight) for found in (by_file, by_folder, by_cache)
    )


def test_without_weights_in_the_cache_there_is_no_network_and_a_notice_says_why(tmp_path):
    assert load_perceptual("vgg", None, cache=tmp_path) is None
    notice = missing_weights("vgg", cache=tmp_path)
    assert str(tmp_path) in notice
    assert "download.pytorch.org/models/vgg16-397923af.pth" in notice
    assert "v0.1/vgg.pth" in notice
    command = "mergevq convert --lpips vgg16-397923af.pth vgg.pth --out lpips_vgg.safetensors"
    assert command in notice


def test_a_path_that_leads_nowhere_is_an_error_and_not_a_missing_weight(tmp_path):
    with pytest.raises(ValueError, match=r"must be a safetensors file or a folder with lpips_alex"):
        load_perceptual("alex", str(tmp_path))
    with pytest.raises(ValueError, match=r"nowhere.safetensors\) must be"):
        load_perceptual("alex", str(tmp_path / "nowhere.safetensors"))


def test_weights_of_another_trunk_are_refused_by_name(tmp_path):
    save_file(Perceptual("squeeze").state_dict(), tmp_path / "other.safetensors")
    with pytest.raises(RuntimeError, match=r"does not hold LPIPS with trunk 'alex'(.|\n)*Missing"):
        load_perceptual("alex", str(tmp_path / "other.safetensors"))


def test_a_file_that_is_not_safetensors_is_refused_by_name(tmp_path):
    (tmp_path / "lpips_alex.safetensors").write_bytes(b"\x80\x04 a pickle, perhaps")
    with pytest.raises(RuntimeError, match=r"lpips_alex\.safetensors is not a readable"):
        load_perceptual("alex", str(tmp_path))


def test_weights_that_are_not_finite_are_refused(tmp_path):
    state = Perceptual("vgg").state_dict()
    state["features.0.bias"][0] = torch.nan
    save_file(state, tmp_path / "lpips_vgg.safetensors")
    with pytest.raises(RuntimeError, match="not finite"):
        load_perceptual("vgg", str(tmp_path))


def test_weights_other_than_the_published_ones_are_announced(tmp_path):
    save_file(Perceptual("alex").state_dict(), tmp_path / "lpips_alex.safetensors")
    with pytest.warns(UserWarning, match="differs from the published LPIPS 0.1 weights"):
        load_perceptual("alex", str(tmp_path))


def test_the_digest_follows_values_and_not_their_order_or_dtype():
    state = {"a": torch.tensor([1.0, 2.0]), "b": torch.tensor([3.0])}
    same = {"b": torch.tensor([3.0], dtype=torch.float16), "a": torch.tensor([1.0, 2.0])}
    other = {"a": torch.tensor([1.0, 2.0]), "b": torch.tensor([4.0])}
    assert weights_digest(same) == weights_digest(state)
    assert weights_digest(other) != weights_digest(state)


def test_the_two_published_files_join_into_one_that_loads(tmp_path):
    whole = Perceptual("vgg").state_dict()
    trunk = {name: value for name, value in whole.items() if name.startswith("features")}
    heads = {name: value for name, value in whole.items() if name.startswith("lin")}
    classifier = {"classifier.6.bias": torch.zeros(1000)}
    save_file(convert_perceptual(trunk | classifier, heads), tmp_path / "lpips_vgg.safetensors")
    assert load_file(tmp_path / "lpips_vgg.safetensors").keys() == whole.keys()
    assert load_perceptual("vgg", str(tmp_path)) is not None


def test_joining_the_two_files_the_wrong_way_round_is_an_error():
    trunk, heads = {"features.0.weight": torch.ones(1)}, {"lin0.model.1.weight": torch.ones(1)}
    with pytest.raises(ValueError, match=r"trunk_state \(0 names in features"):
        convert_perceptual(heads, trunk)


read = partial(torch.load, weights_only=True)


@pytest.fixture
def published(tmp_path):
    """Files as torchvision and LPIPS publish them, of a trunk with random weights."""

    def write(trunk):
        whole = Perceptual(trunk).state_dict()
        parts = {
            "trunk": {k: v for k, v in whole.items() if k.startswith("features")},
            "heads": {k: v for k, v in whole.items() if k.startswith("lin")},
        }
        parts["trunk"]["classifier.6.bias"] = torch.zeros(1000)
        for name, state in parts.items():
            torch.save(state, tmp_path / f"{name}.pth")
        return tmp_path / "trunk.pth", tmp_path / "heads.pth", whole

    return write


@pytest.mark.filterwarnings("ignore:.*cannot be compared")
@pytest.mark.parametrize("trunk", NAMES)
def test_two_published_files_become_the_one_that_training_reads(trunk, published, tmp_path):
    trunk_file, heads_file, whole = published(trunk)
    (tmp_path / "weights").mkdir()
    file = convert_perceptual_files(trunk_file, heads_file, tmp_path / "weights", read=read)
    assert file == tmp_path / "weights" / f"lpips_{trunk}.safetensors"
    assert [path.name for path in file.parent.iterdir()] == [file.name]
    loaded = load_perceptual(trunk, str(file.parent))
    for name, value in loaded.state_dict().items():
        assert torch.equal(value, whole[name])


def test_the_published_trunk_is_known_by_its_hash(published, tmp_path, monkeypatch):
    trunk_file, heads_file, _ = published("squeeze")
    begins = hashlib.sha256(trunk_file.read_bytes()).hexdigest()[:8]
    unmeasured = TRUNKS["squeeze"]._replace(torchvision_file=f"net-{begins}.pth", digest=None)
    monkeypatch.setitem(TRUNKS, "squeeze", unmeasured)
    out = tmp_path / "new" / "lpips.safetensors"
    assert convert_perceptual_files(trunk_file, heads_file, out, read=read) == out


@pytest.mark.parametrize("changes", [{}, {"digest": None}])
def test_joining_other_weights_than_the_published_ones_warns(
    changes, published, tmp_path, monkeypatch
):
    trunk_file, heads_file, _ = published("squeeze")
    monkeypatch.setitem(TRUNKS, "squeeze", TRUNKS["squeeze"]._replace(**changes))
    out = tmp_path / "lpips.safetensors"
    with pytest.warns(UserWarning, match=r"are not squeezenet1_1-b8a52dc0\.pth and"):
        convert_perceptual_files(trunk_file, heads_file, out, read=read)
    assert out.is_file()


def test_the_published_weights_are_joined_without_a_warning(shared, tmp_path):
    whole = load_file(shared / "weights" / "lpips_squeeze.safetensors")
    for name, prefix in (("trunk", "features"), ("heads", "lin")):
        part = {k: v for k, v in whole.items() if k.startswith(prefix)}
        save_file(part, tmp_path / f"{name}.safetensors")
    files = tmp_path / "trunk.safetensors", tmp_path / "heads.safetensors"
    file = convert_perceptual_files(*files, tmp_path, read=load_file)
    assert weights_digest(load_file(file)) == TRUNKS["squeeze"].digest


def test_files_that_do_not_belong_together_are_refused(published, tmp_path):
    _, other_heads, _ = published("squeeze")
    vgg_trunk = tmp_path / "vgg.pth"
    torch.save({"features.0.weight": torch.ones(64, 3, 3, 3)}, vgg_trunk)
    out = tmp_path / "lpips.safetensors"
    with pytest.raises(ValueError, match=r"does not go with .* the heads of trunk 'squeeze'"):
        convert_perceptual_files(vgg_trunk, other_heads, out, read=read)
    torch.save({"lin0.model.1.weight": torch.ones(1, 7, 1, 1)}, tmp_path / "odd.pth")
    with pytest.raises(ValueError, match=r"heads of \(7,\) channels must be those of vgg"):
        convert_perceptual_files(vgg_trunk, tmp_path / "odd.pth", out, read=read)
    assert not out.exists()


def test_weights_that_are_not_finite_are_not_joined(published, tmp_path):
    trunk_file, heads_file, whole = published("squeeze")
    trunk = {k: v for k, v in whole.items() if k.startswith("features")}
    trunk["features.0.bias"][0] = torch.inf
    torch.save(trunk, trunk_file)
    with pytest.raises(ValueError, match="not finite"):
        convert_perceptual_files(trunk_file, heads_file, tmp_path / "lpips", read=read)


def test_the_cache_is_in_the_home_folder_unless_set(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_folder() == cache_folder("") == tmp_path / ".cache" / "mergevq"
    assert cache_folder(str(tmp_path / "other")) == tmp_path / "other"
