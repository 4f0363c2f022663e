"""Tests of `mergevq.tokenizer.losses.frozen`."""

import json
import socket

import pytest
import torch
from safetensors.torch import load_file, save_file

from mergevq.config.objective import DINOV2_BASE
from mergevq.tokenizer.losses.frozen import HuggingFaceTeacher, TorchScriptTeacher


@pytest.fixture
def offline(monkeypatch):
    """Any attempt to reach the network fails."""
    monkeypatch.setattr(socket, "socket", None)
    monkeypatch.setattr(socket, "create_connection", None)
    monkeypatch.setattr(socket, "getaddrinfo", None)


# --------------------------------------------------------------------------------- frozen model


def test_dinov2_is_read_from_its_folder_without_a_network(dinov2_folder, offline, generator):
    from transformers import Dinov2Model

    teacher = HuggingFaceTeacher(str(dinov2_folder))
    view = torch.rand(2, 3, 28, 42, generator=generator) * 2 - 1
    mean = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)
    std = torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)
    model = Dinov2Model.from_pretrained(dinov2_folder).eval()
    expected = model(pixel_values=((view + 1) / 2 - mean) / std).pooler_output
    assert teacher.out_dim == 16
    torch.testing.assert_close(teacher.features(view), expected)


def test_the_model_is_frozen_and_the_view_gets_no_gradient(dinov2_folder):
    teacher = HuggingFaceTeacher(str(dinov2_folder))
    features = teacher.features(torch.zeros(1, 3, 28, 28, requires_grad=True))
    assert not features.requires_grad
    assert not teacher.model.training
    assert not any(p.requires_grad for p in teacher.model.parameters())


def test_the_preprocessor_file_decides_the_normalisation(dinov2_folder, tmp_path, generator):
    for file in dinov2_folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    settings = {"image_processor_type": "BitImageProcessor", "do_normalize": True}
    settings |= {"image_mean": [0.5, 0.5, 0.5], "image_std": [0.25, 0.5, 1.0]}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(settings))
    teacher = HuggingFaceTeacher(str(tmp_path))
    view = torch.rand(1, 3, 28, 28, generator=generator) * 2 - 1
    pixels = view * torch.tensor([2.0, 1.0, 0.5]).view(3, 1, 1)
    expected = teacher.model(pixel_values=pixels).pooler_output
    torch.testing.assert_close(teacher.features(view), expected)
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({"do_normalize": False}))
    expected = teacher.model(pixel_values=(view + 1) / 2).pooler_output
    torch.testing.assert_close(HuggingFaceTeacher(str(tmp_path)).features(view), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_model_follows_a_bfloat16_autocast_but_never_a_float16_one(
    dtype, dinov2_folder, generator
):
    teacher = HuggingFaceTeacher(str(dinov2_folder))
    view = torch.rand(1, 3, 28, 28, generator=generator) * 2 - 1
    with torch.autocast("cpu", dtype):
        features, large = teacher.features(view), teacher.features(1e4 * view)
    expected = teacher.features(view)
    assert features.dtype == torch.float32
    assert large.isfinite().all()
    assert torch.equal(features, expected) == (dtype == torch.float16)
    torch.testing.assert_close(features, expected, atol=0.1, rtol=0.1)


def test_a_view_that_cannot_be_cut_into_patches_is_an_error(dinov2_folder):
    teacher = HuggingFaceTeacher(str(dinov2_folder))
    with pytest.raises(
        ValueError, match=r"teacher_size \(28 x 32\) must be a multiple of the patch"
    ):
        teacher.features(torch.zeros(1, 3, 28, 32))


def test_a_pooler_that_was_never_trained_is_not_used(tmp_path, generator):
    from transformers import ViTConfig, ViTModel

    config = ViTConfig(
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        image_size=32,
        patch_size=16,
    )
    ViTModel(config, add_pooling_layer=False).save_pretrained(tmp_path)
    teacher = HuggingFaceTeacher(str(tmp_path))
    view = torch.rand(1, 3, 32, 32, generator=generator) * 2 - 1
    again = HuggingFaceTeacher(str(tmp_path))
    output = teacher.model(pixel_values=(view + 1) / 2)
    assert not teacher.has_pooler
    assert output.pooler_output is not None
    assert torch.equal(teacher.features(view), again.features(view))


def test_of_a_model_of_image_and_text_the_image_half_teaches(tmp_path):
    from transformers import CLIPConfig, CLIPModel

    half = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    half["intermediate_size"] = 32
    text = half | {"vocab_size": 8, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    vision = half | {"image_size": 32, "patch_size": 16, "hidden_size": 24}
    CLIPModel(CLIPConfig(text_config=text, vision_config=vision)).save_pretrained(tmp_path)
    teacher = HuggingFaceTeacher(str(tmp_path))
    assert teacher.out_dim == 24
    assert teacher.features(torch.zeros(2, 3, 32, 32)).shape == (2, 24)


def test_a_model_without_some_of_its_weights_is_refused(dinov2_folder, tmp_path):
    state = load_file(dinov2_folder / "model.safetensors")
    del state["layernorm.weight"]
    save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "config.json").write_bytes((dinov2_folder / "config.json").read_bytes())
    with pytest.raises(RuntimeError, match=r"lacks the weights layernorm\.weight"):
        HuggingFaceTeacher(str(tmp_path))


def test_a_pickled_model_is_refused(dinov2_folder, tmp_path):
    (tmp_path / "config.json").write_bytes((dinov2_folder / "config.json").read_bytes())
    state = load_file(dinov2_folder / "model.safetensors")
    torch.save(state, tmp_path / "pytorch_model.bin")
    with pytest.raises(RuntimeError, match=r"could not be loaded(.|\n)*model\.safetensors"):
        HuggingFaceTeacher(str(tmp_path))


@pytest.mark.parametrize("path", ["facebook/dinov2-base", "run/dinov2", "./nothing"])
def test_a_path_that_is_not_there_is_not_looked_up_on_the_hub(monkeypatch, path):
    transformers = pytest.importorskip("transformers")
    monkeypatch.setattr(transformers.AutoModel, "from_pretrained", None)
    with pytest.raises(ValueError, match=r"is no folder; .*owner/name@revision"):
        HuggingFaceTeacher(path)


def test_a_model_on_the_hub_is_asked_for_at_its_revision_and_runs_no_code(monkeypatch):
    transformers = pytest.importorskip("transformers")
    asked = {}

    def fetch(name, **options):
        asked.update(options, name=name)
        raise OSError("no network")

    monkeypatch.setattr(transformers.AutoModel, "from_pretrained", fetch)
    with pytest.raises(RuntimeError, match=r"'owner/name@v1' could not be loaded \(no network\)"):
        HuggingFaceTeacher("owner/name@v1")
    assert (asked["name"], asked["revision"]) == ("owner/name", "v1")
    assert asked["trust_remote_code"] is False


def test_a_model_that_brings_its_own_code_is_refused_without_a_question(dinov2_folder, tmp_path):
    config = json.loads((dinov2_folder / "config.json").read_text())
    config |= {"model_type": "mine", "auto_map": {"AutoModel": "mine.Mine", "AutoConfig": "mine.C"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "mine.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    save_file({"a": torch.zeros(1)}, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(RuntimeError, match="could not be loaded"):
        HuggingFaceTeacher(str(tmp_path))
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_model_with_weights_that_are_not_finite_is_refused(dinov2_folder, tmp_path, value):
    state = load_file(dinov2_folder / "model.safetensors")
    state["layernorm.weight"][3] = value
    save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "config.json").write_bytes((dinov2_folder / "config.json").read_bytes())
    with pytest.raises(RuntimeError, match=r"are broken: layernorm\.weight has 1 of"):
        HuggingFaceTeacher(str(tmp_path))


@pytest.mark.parametrize("content", [b"", b"<html>", b"\xff" * 99])
def test_a_model_whose_weights_are_none_is_refused(dinov2_folder, tmp_path, content):
    (tmp_path / "config.json").write_bytes((dinov2_folder / "config.json").read_bytes())
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(RuntimeError, match="could not be loaded"):
        HuggingFaceTeacher(str(tmp_path))


# --------------------------------------------------------------------------------- torchscript


def test_an_extractor_sees_pixels_of_0_to_255_at_any_size(extractor_file, generator):
    teacher = TorchScriptTeacher(extractor_file)
    view = 2 * torch.rand(2, 3, 12, 20, generator=generator) - 1
    pixels = 255 * (view + 1) / 2
    expected = torch.cat([pixels.mean((2, 3)), pixels.amax((2, 3))], 1)
    assert teacher.out_dim == 6
    torch.testing.assert_close(teacher.features(view), expected)
    edges = torch.tensor([-1.0, 0.0, 1.0])[None, :, None, None].expand(1, 3, 4, 4)
    assert teacher.features(edges).tolist() == [[0.0, 127.5, 255.0] * 2]


def test_an_extractor_computes_in_float32_under_any_autocast(extractor_file, generator):
    teacher = TorchScriptTeacher(extractor_file)
    view = 2 * torch.rand(2, 3, 8, 8, generator=generator) - 1
    expected = teacher.features(view)
    with torch.autocast("cpu", torch.bfloat16):
        features = teacher.features(view)
    assert features.dtype == torch.float32
    assert torch.equal(features, expected)


def test_features_of_an_extractor_can_be_the_target_of_a_loss(extractor_file):
    features = TorchScriptTeacher(extractor_file).features(torch.zeros(1, 3, 8, 8))
    assert not features.requires_grad
    assert not features.is_inference()


def test_a_file_that_is_not_there_is_refused_by_its_name(tmp_path):
    with pytest.raises(ValueError, match=r"no extractor at .*none\.pt; give the path of a Torch"):
        TorchScriptTeacher(str(tmp_path / "none.pt"))


def test_the_default_model_is_dinov2():
    name, _, commit = DINOV2_BASE.partition("@")
    assert name == "facebook/dinov2-base"
    assert len(bytes.fromhex(commit)) == 20
