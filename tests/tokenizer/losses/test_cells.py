"""Tests of `mergevq.tokenizer.losses.cells`."""

from dataclasses import replace

import pytest
import torch
from torch.nn import functional

from mergevq.config.objective import TrainedTokenizer, VisionModel
from mergevq.config.parts import MaskTokens, Queries
from mergevq.config.recipes.digits import digits32
from mergevq.tokenizer.losses.cells import TokenizerCells, VisionCells, to_cells
from mergevq.tokenizer.losses.frozen import HuggingFaceTeacher
from mergevq.tokenizer.tokenizer import Tokenizer
from tests.support.small import shrink


def images(side=32, count=2):
    numbers = torch.Generator().manual_seed(1)
    return torch.rand(count, 3, side, side, generator=numbers) * 2 - 1


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A small tokenizer with cells of 4 pixels, in training and as a directory."""
    torch.manual_seed(0)
    model = Tokenizer(shrink(digits32()).model)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    path = tmp_path_factory.mktemp("cells") / "tokenizer"
    model.save_pretrained(path)
    return model.eval(), str(path)


# ------------------------------------------------------------------------------- other tokenizers


@pytest.mark.parametrize("layer", [None, 0, 2])
def test_features_of_a_tokenizer_are_those_of_its_encoder_with_merging_off(saved, layer):
    model, path = saved
    cells = TokenizerCells(TrainedTokenizer(path=path, layer=layer))
    expected = model.features(images(), layer=layer, stage="pre_merge")
    features = cells(images(), (8, 8))
    assert features.shape == (2, 64, cells.out_dim)
    torch.testing.assert_close(features, expected)
    assert not features.requires_grad


def test_cells_of_another_size_are_interpolated(saved):
    cells = TokenizerCells(TrainedTokenizer(path=saved[1]))
    own = cells(images(), (8, 8)).mT.unflatten(2, (8, 8))
    # Each place of a grid of half the side has the four around it before all others.
    expected = functional.interpolate(own, (4, 4), mode="bilinear", antialias=True)
    torch.testing.assert_close(cells(images(), (4, 4)), expected.flatten(2).mT)
    assert cells(images(), (16, 16)).shape == (2, 256, cells.out_dim)


def test_a_tokenizer_of_the_package_teaches_by_its_name():
    cells = TokenizerCells(TrainedTokenizer(path="digits32"))
    assert cells(images(), (8, 8)).shape == (2, 64, cells.out_dim)


def test_a_block_that_is_not_there_is_refused(saved):
    with pytest.raises(ValueError, match=r"layer \(4\) must be at most the 3 blocks of tokenizer"):
        TokenizerCells(TrainedTokenizer(path=saved[1], layer=4))


def test_tokens_of_no_place_are_refused(tmp_path):
    model = shrink(digits32()).model
    queries = Queries(num_queries=16, num_layers=1, num_heads=2)
    model = replace(model, reducer=queries, expander=MaskTokens(dim=16, num_layers=1, num_heads=2))
    Tokenizer(model).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"tokens of no place \(reducer queries\)"):
        TokenizerCells(TrainedTokenizer(path=str(tmp_path)))


# --------------------------------------------------------------------------------- vision models


def test_patches_are_those_behind_the_class_token_in_raster_order(dinov2_folder):
    from transformers import Dinov2Model

    teacher = HuggingFaceTeacher(str(dinov2_folder))
    view = images(56)[:, :, :28]
    mean = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)
    std = torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)
    model = Dinov2Model.from_pretrained(dinov2_folder).eval()
    expected = model(pixel_values=((view + 1) / 2 - mean) / std).last_hidden_state[:, 1:]
    patches = teacher.patches(view)
    assert patches.shape == (2, 16, 2, 4)
    torch.testing.assert_close(patches.flatten(2).mT, expected)
    assert not patches.requires_grad


@pytest.mark.parametrize("grid_shape", [(2, 2), (3, 4)])
def test_an_image_is_resized_so_that_each_cell_has_a_patch(dinov2_folder, grid_shape):
    cells = VisionCells(VisionModel(path=str(dinov2_folder)))
    size = tuple(14 * side for side in grid_shape)
    view = functional.interpolate(images(), size, mode="bicubic", antialias=True).clamp(-1, 1)
    expected = cells.model.patches(view).flatten(2).mT
    torch.testing.assert_close(cells(images(), grid_shape), expected)


def test_an_image_of_a_size_of_its_own_has_features_that_are_interpolated(dinov2_folder):
    cells = VisionCells(VisionModel(path=str(dinov2_folder), teacher_size=28))
    patches = cells.model.patches(images(28))
    torch.testing.assert_close(cells(images(28), (2, 2)), patches.flatten(2).mT)
    assert cells(images(28), (8, 8)).shape == (2, 64, 16)


def test_a_model_without_patches_needs_a_size(dinov2_folder, monkeypatch):
    cells = VisionCells(VisionModel(path=str(dinov2_folder)))
    monkeypatch.setattr(cells.model.model.config, "patch_size", (14, 14))
    with pytest.raises(ValueError, match=r"teacher_size \(None\) must be a number for teacher"):
        cells(images(), (2, 2))


def test_features_of_a_convolution_are_cells_already(dinov2_folder, monkeypatch):
    teacher = HuggingFaceTeacher(str(dinov2_folder))
    states = torch.arange(2 * 16 * 4.0).view(2, 16, 2, 2)
    monkeypatch.setattr(teacher, "model", lambda **_: {"last_hidden_state": states})
    teacher.model.device, teacher.model.config = torch.device("cpu"), None
    assert torch.equal(teacher.patches(images(28)), states)


def test_fewer_tokens_than_patches_are_refused(dinov2_folder, monkeypatch):
    teacher = HuggingFaceTeacher(str(dinov2_folder))
    monkeypatch.setattr(teacher.model.config, "patch_size", 7)
    with pytest.raises(RuntimeError, match="gives 5 tokens and must give one for each of 16 patch"):
        teacher.patches(images(28))


def test_features_are_laid_out_row_by_row():
    features = torch.tensor([[[[1.0, 2.0], [3.0, 4.0]]]])
    assert to_cells(features, (2, 2)).tolist() == [[[1.0], [2.0], [3.0], [4.0]]]
    # The mean of four where one cell covers all.
    assert to_cells(features, (1, 1)).tolist() == [[[2.5]]]
