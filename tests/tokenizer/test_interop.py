"""Weights from elsewhere: the authors' checkpoints and DINOv2."""

import dataclasses
import fractions
import os
import shlex
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from mergevq.data.layouts import Source, canonicalize
from mergevq.tokenizer.interop import (
    initialize_from_dinov2,
    load_official,
    official_config,
    read_official,
    read_vit,
    select_weights,
)
from mergevq.tokenizer.reducers.merge import MergeState
from mergevq.tokenizer.tokenizer import Tokenizer
from tests.support.official import official_state
from tests.support.parts import changed, tokenizer_config

HYBRID = tokenizer_config(
    image_size=64,
    channels=32,
    channel_mult=(1, 1, 2),
    num_res_blocks=1,
    num_layers=3,
    num_heads=4,
    transformer_norm_eps=1e-5,
    patch_norm_eps=1e-6,
    num_kept=144,
    num_decoder_layers=3,
    num_decoder_heads=4,
)
ISOTROPIC = changed(
    HYBRID,
    stem="patch",
    patch_dim=64,
    patch_norm_eps=1e-6,
    num_layers=4,
    num_heads=2,
    num_kept=64,
    num_decoder_layers=4,
    num_decoder_heads=2,
)
SMALL = tokenizer_config(
    image_size=16,
    channels=8,
    channel_mult=(1, 2),
    num_res_blocks=1,
    num_layers=2,
    num_heads=2,
    num_kept=20,
    num_decoder_layers=1,
    num_decoder_heads=2,
    source_dim=16,
    num_source_heads=2,
)
_ROUNDING = 5e-6
"""float32 sums of a few units: up to 3.3e-6 with AVX2, 2.0e-6 with AVX-512."""
both = pytest.mark.parametrize(
    ("name", "config"), [("hybrid", HYBRID), ("isotropic", ISOTROPIC)], ids=["hybrid", "isotropic"]
)


def golden(shared: Path, name: str) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Weights of a small instance of the authors' model, and what went in and came out of it."""
    with safe_open(shared / "golden" / f"official_{name}.safetensors", "pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    outputs = {key[3:]: tensors.pop(key) for key in list(tensors) if key.startswith("io.")}
    return tensors, outputs


# ---------------------------------------------------------------------- the authors' tokenizer


@both
def test_the_architecture_is_read_off_the_weights(shared, name, config):
    state, _ = golden(shared, name)
    read = official_config(
        state,
        image_size=64,
        num_kept=config.num_kept,
        num_heads=config.reducer.num_heads,
        num_decoder_heads=config.decoder.num_heads,
    )
    # The source predictor is not in it.
    assert dataclasses.replace(read, expander=config.expander) == config


@both
def test_the_authors_model_gives_the_same_tokens_here(shared, name, config):
    state, expected = golden(shared, name)
    model = load_official(state, config).tokenizer
    encoded = model.encode(expected["image"])
    source, order = canonicalize(Source(expected["source"], config.num_kept))
    assert torch.equal(encoded.source.index, source.index)
    assert torch.equal(encoded.indices, expected["indices"].gather(1, order))
    latents = expected["latents"].flatten(2).mT.gather(1, order[..., None].expand(-1, -1, 18))
    torch.testing.assert_close(encoded.latents, latents, rtol=0, atol=_ROUNDING)


@both
def test_the_authors_model_gives_the_same_pixels_here(shared, name, config):
    state, expected = golden(shared, name)
    model = load_official(state, config).tokenizer
    source, order = canonicalize(Source(expected["source"], config.num_kept))
    image = model.decode(expected["indices"].gather(1, order), source)
    # The expected pixels are in float32: computed in float64, ours are 2.02e-6 away from them.
    torch.testing.assert_close(image, expected["reconstruction"], rtol=0, atol=_ROUNDING)


@both
def test_the_authors_alignment_head_gives_the_same_features_here(shared, name, config):
    state, expected = golden(shared, name)
    official = load_official(state, config)
    class_token = official.tokenizer.encode(expected["image"]).class_token
    features = official.alignment_head(class_token)
    torch.testing.assert_close(features, expected["class_head"], rtol=0, atol=_ROUNDING)


def test_a_converted_model_adds_to_variances_what_the_authors_add():
    ours = Tokenizer(changed(SMALL, stem="patch", patch_dim=16))
    state = official_state(ours)
    read = official_config(state, image_size=16, num_kept=20, num_heads=2, num_decoder_heads=2)
    theirs = load_official(state, read).tokenizer
    # Values so small that what is added decides, normalised by the definition.
    x = 1e-3 * torch.randn(2, 8, 16)
    mean, variance = x.mean(-1, keepdim=True), x.var(-1, keepdim=True, correction=0)
    for blocks in (theirs.encoder.reducer.blocks, theirs.decoder.blocks):
        for norm in [norm for block in blocks for norm in (block.norm1, block.norm2)]:
            torch.testing.assert_close(norm(x), (x - mean) / (variance + 1e-5).sqrt())
    grid = 1e-3 * torch.randn(2, 16, 4, 4)
    mean, variance = grid.mean((2, 3), keepdim=True), grid.var((2, 3), keepdim=True, correction=0)
    expected = (grid - mean) / (variance + 1e-6).sqrt()
    torch.testing.assert_close(theirs.encoder.stem[1](grid), expected)
    # A model that was trained here keeps its own.
    assert ours.encoder.reducer.blocks[0].norm1.eps == 1e-6
    assert ours.encoder.stem[1].eps == 1e-5


@pytest.mark.parametrize(
    ("channels", "channel_mult", "heads"),
    [(64, (1, 8), 8), (32, (2, 12), 8), (96, (1, 8), 12)],
    ids=["d64", "d32", "d96"],
)
def test_a_decoder_has_as_many_heads_as_the_authors_of_its_width(channels, channel_mult, heads):
    wide = changed(
        SMALL,
        channels=channels,
        channel_mult=channel_mult,
        num_heads=8,
        num_decoder_heads=8,
    )
    state = official_state(Tokenizer(wide))
    read = official_config(state, image_size=16, num_kept=20, num_heads=8)
    assert read.decoder.width == channels * channel_mult[-1]
    assert read.decoder.num_heads == heads


def test_a_model_without_an_alignment_head_has_none(shared):
    state, _ = golden(shared, "hybrid")
    state = {key: value for key, value in state.items() if "dist_head" not in key}
    assert load_official(state, HYBRID).alignment_head is None


def test_other_networks_in_the_state_are_left_out(shared):
    state, expected = golden(shared, "hybrid")
    state["loss.discriminator.main.0.weight"] = torch.zeros(3)
    state["quantize.mask"] = torch.zeros(18)
    model = load_official(state, HYBRID).tokenizer
    assert model.encode(expected["image"]).indices.shape == (2, 144)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"encoder.conv_in.weight": None}, r"missing \(1\): encoder.stem.0.weight"),
        ({"encoder.extra": torch.zeros(1)}, r"unexpected \(1\): encoder.extra"),
        ({"decoder.conv_in.bias": torch.zeros(5)}, r"of another shape \(1\): decoder.conv_in.bias"),
    ],
)
def test_weights_that_do_not_fit_are_an_error_that_lists_them(shared, changed, message):
    state, _ = golden(shared, "hybrid")
    state = {key: value for key, value in (state | changed).items() if value is not None}
    with pytest.raises(ValueError, match=message):
        load_official(state, HYBRID)


def test_another_architecture_is_an_error(shared):
    state, _ = golden(shared, "hybrid")
    with pytest.raises(ValueError, match="do not fit"):
        load_official(state, changed(HYBRID, num_layers=4))


# --------------------------------------------------------------------------------------- files

STATE = {"encoder.conv_in.weight": torch.zeros(2), "decoder.conv_in.bias": torch.zeros(3)}


@pytest.mark.parametrize("suffix", [".safetensors", ".pt", ".ckpt"])
def test_a_state_is_read_from_any_of_the_usual_files(tmp_path, suffix):
    path = tmp_path / f"model{suffix}"
    writers = {
        ".safetensors": lambda: save_file(STATE, path),
        ".pt": lambda: torch.save(STATE, path),
        ".ckpt": lambda: torch.save({"epoch": 3, "state_dict": STATE, "callbacks": {}}, path),
    }
    writers[suffix]()
    torch.testing.assert_close(read_official(path), STATE)


def test_averaged_weights_are_taken_when_a_lightning_file_has_them(tmp_path):
    # As Lightning writes them: the average's names have lost their dots.
    state = STATE | {
        "loss.discriminator.main.0.weight": torch.zeros(1),
        "model_ema.decay": torch.tensor(0.999),
        "model_ema.num_updates": torch.tensor(7),
        "model_ema.encoderconv_inweight": torch.full((2,), 2.0),
        "model_ema.decoderconv_inbias": torch.full((3,), 3.0),
    }
    torch.save({"epoch": 3, "state_dict": state, "hparams": {"lr": 1e-4}}, tmp_path / "last.ckpt")
    read = read_official(tmp_path / "last.ckpt")
    assert read["encoder.conv_in.weight"].tolist() == [2, 2]
    assert read["decoder.conv_in.bias"].tolist() == [3, 3, 3]
    assert not any(key.startswith("model_ema") for key in read)


def test_a_lightning_file_of_the_authors_model_loads(shared, tmp_path):
    state, expected = golden(shared, "hybrid")
    averaged = {f"model_ema.{key.replace('.', '')}": value for key, value in state.items()}
    latest = {key: torch.zeros_like(value) for key, value in state.items()}
    torch.save({"state_dict": latest | averaged, "global_step": 9}, tmp_path / "last.ckpt")
    model = load_official(read_official(tmp_path / "last.ckpt"), HYBRID).tokenizer
    _, order = canonicalize(Source(expected["source"], 144))
    indices = model.encode(expected["image"]).indices
    assert torch.equal(indices, expected["indices"].gather(1, order))


class Malicious:
    """An object that would create a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_code_in_a_file_is_refused_and_does_not_run(tmp_path):
    state = {"state_dict": STATE, "hyper_parameters": Malicious(tmp_path / "created")}
    torch.save(state, tmp_path / "bad.ckpt")
    message = r"holds Python objects \(posix.mkdir\) besides weights.*take out its weights with"
    with pytest.raises(ValueError, match=message) as caught:
        read_official(tmp_path / "bad.ckpt")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "created").exists()


@pytest.mark.slow
def test_the_advice_for_a_file_of_objects_makes_one_that_is_read(tmp_path):
    torch.save({"state_dict": STATE, "hparams": fractions.Fraction(1, 2)}, tmp_path / "last.ckpt")
    with pytest.raises(ValueError, match="fractions") as caught:
        read_official(tmp_path / "last.ckpt")
    command = str(caught.value).partition("with: ")[2]
    arguments = shlex.split(command)
    subprocess.run([sys.executable, *arguments[1:]], cwd=tmp_path, check=True)
    torch.testing.assert_close(read_official(tmp_path / "weights.pt"), STATE)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "it is empty"),
        (b"\n<!DOCTYPE html><html>", "it is a web page"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0", "Git LFS pointer"),
        (b"\x80\x02nothing", "is not a torch file, or is damaged"),
        (b"PK\x03\x04nothing", "is not a torch file, or is damaged"),
    ],
)
@pytest.mark.parametrize("name", ["last.ckpt", "model.safetensors"])
def test_what_was_fetched_in_place_of_a_checkpoint_is_named_in_one_line(
    tmp_path, content, message, name
):
    (tmp_path / name).write_bytes(content)
    message = message if name == "last.ckpt" or "torch" not in message else "not a readable"
    with pytest.raises(ValueError, match=message) as caught:
        read_official(tmp_path / name)
    assert "\n" not in str(caught.value)


def test_a_checkpoint_that_is_a_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "last.ckpt")
    with pytest.raises(ValueError, match="must be a regular file"):
        read_official(tmp_path / "last.ckpt")


def test_a_checkpoint_with_weights_that_are_not_finite_is_refused(tmp_path):
    torch.save(STATE | {"encoder.conv_in.weight": torch.tensor([1, torch.inf])}, tmp_path / "a.pt")
    with pytest.raises(ValueError, match=r"encoder\.conv_in\.weight has 1 of 2 values"):
        read_official(tmp_path / "a.pt")


@pytest.mark.parametrize("content", [[1], 3, {1: torch.zeros(1)}])
def test_a_torch_file_without_a_state_dict_says_what_it_holds(tmp_path, content):
    torch.save(content, tmp_path / "a.pt")
    with pytest.raises(ValueError, match="holds no state dict, but a"):
        read_official(tmp_path / "a.pt")


def test_a_tensor_that_is_larger_than_its_file_is_refused(tmp_path):
    torch.save({"encoder.a": torch.zeros(1).expand(10**6, 10**6)}, tmp_path / "a.pt")
    with pytest.raises(ValueError, match=r"encoder\.a does not have its values in the file"):
        read_official(tmp_path / "a.pt")


def test_a_torch_file_that_would_unpack_to_more_than_it_is_is_refused(tmp_path):
    torch.save({"encoder.a": torch.zeros(10**6)}, tmp_path / "a.pt")
    with zipfile.ZipFile(tmp_path / "a.pt") as plain:
        members = {name: plain.read(name) for name in plain.namelist()}
    with zipfile.ZipFile(tmp_path / "b.pt", "w", zipfile.ZIP_DEFLATED) as packed:
        for name, value in members.items():
            packed.writestr(name, value)
    with pytest.raises(ValueError, match="it would unpack to"):
        read_official(tmp_path / "b.pt")


def test_a_file_of_another_model_is_an_error_that_shows_its_names(tmp_path):
    save_file({"transformer.wte.weight": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match=r"holds no 'encoder\.' weights but \['transformer\.wte"):
        read_official(tmp_path / "other.safetensors")


# ---------------------------------------------------------------------------- weight selection


def test_selection_takes_every_nth_entry_where_sizes_divide():
    assert select_weights(torch.arange(6), (3,)).tolist() == [0, 2, 4]
    grid = torch.arange(24).reshape(4, 6)
    assert select_weights(grid, (2, 3)).tolist() == [[0, 2, 4], [12, 14, 16]]
    assert select_weights(grid, (4, 6)).tolist() == grid.tolist()


def test_selection_spreads_from_first_to_last_where_sizes_do_not_divide():
    assert select_weights(torch.arange(7), (4,)).tolist() == [0, 2, 4, 6]
    # 0, 1.75, 3.5, 5.25, 7
    assert select_weights(torch.arange(8), (5,)).tolist() == [0, 2, 4, 5, 7]
    # From the width of ViT-B to that of the encoder, as the authors do.
    chosen = select_weights(torch.arange(768), (512,))
    assert torch.equal(chosen, torch.linspace(0, 767, 512).round().long())
    assert len(chosen.unique()) == 512


@pytest.mark.parametrize("shape", [(7,), (6, 1)])
def test_selection_only_shrinks(shape):
    with pytest.raises(ValueError, match=r"cannot fill .* selection only shrinks"):
        select_weights(torch.arange(6), shape)


# -------------------------------------------------------------------------------------- DINOv2


@pytest.fixture
def vit():
    """A DINOv2 of width 48 with three layers, all of its weights random."""
    transformers = pytest.importorskip("transformers")
    config = transformers.Dinov2Config(
        hidden_size=48, num_hidden_layers=3, num_attention_heads=2, image_size=28, patch_size=14
    )
    model = transformers.Dinov2Model(config)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)
    return model.eval()


def test_blocks_filled_from_a_dinov2_of_the_same_width_compute_the_same(vit):
    tokenizer = Tokenizer(changed(SMALL, channels=24))
    initialize_from_dinov2(tokenizer, vit.state_dict())
    x = torch.randn(2, 9, 48)
    state = MergeState(index=torch.arange(8).expand(2, -1), sizes=None)
    for block, layer in zip(tokenizer.encoder.reducer.blocks, vit.encoder.layer[:2], strict=True):
        expected = layer(x)
        expected = expected[0] if isinstance(expected, tuple) else expected
        torch.testing.assert_close(block(x, state, 0)[0], expected, rtol=1e-4, atol=1e-4)
    assert torch.equal(tokenizer.encoder.class_token, vit.embeddings.cls_token.flatten())


def test_a_wider_dinov2_is_thinned_out(vit):
    tokenizer = Tokenizer(SMALL)
    initialize_from_dinov2(tokenizer, vit.state_dict())
    block, layer = tokenizer.encoder.reducer.blocks[1], vit.encoder.layer[1]
    # Width 48 to 16: every third.
    assert torch.equal(block.ls1.gamma, layer.layer_scale1.lambda1[::3])
    assert torch.equal(block.mlp.fc1.weight, layer.mlp.fc1.weight[::3, ::3])
    # Queries, keys and values one after the other.
    key = vit.state_dict()["encoder.layer.1.attention.k_proj.weight"]
    assert torch.equal(block.attn.qkv.weight[16:32], key[::3, ::3])
    image = torch.rand(1, 3, 16, 16)
    assert tokenizer.encode(image).latents.isfinite().all()


def test_only_blocks_and_class_token_are_filled(vit):
    tokenizer = Tokenizer(SMALL)
    before = {key: value.clone() for key, value in tokenizer.state_dict().items()}
    initialize_from_dinov2(tokenizer, vit.state_dict())
    after = tokenizer.state_dict()
    moved = {key for key in before if not torch.equal(before[key], after[key])}
    filled = ("encoder.reducer.blocks.", "encoder.class_token")
    assert moved == {key for key in before if key.startswith(filled)}


def test_a_dinov2_in_the_names_of_timm_is_understood():
    larger = Tokenizer(changed(SMALL, channels=16)).encoder.state_dict()
    state = {
        key.removeprefix("reducer."): torch.randn_like(value)
        for key, value in larger.items()
        if "blocks." in key
    }
    state |= {"cls_token": torch.randn(1, 1, 32), "pos_embed": torch.randn(1, 5, 32)}
    state |= {"norm.weight": torch.randn(32), "patch_embed.proj.bias": torch.randn(32)}
    tokenizer = Tokenizer(SMALL)
    initialize_from_dinov2(tokenizer, state)
    own = tokenizer.encoder
    assert torch.equal(own.class_token, state["cls_token"].flatten()[::2])
    assert torch.equal(
        own.reducer.blocks[1].mlp.fc2.weight, state["blocks.1.mlp.fc2.weight"][::2, ::2]
    )


def test_a_dinov2_is_read_from_a_folder(vit, tmp_path):
    vit.save_pretrained(tmp_path)
    state = read_vit(tmp_path)
    tokenizers = Tokenizer(SMALL), Tokenizer(SMALL)
    initialize_from_dinov2(tokenizers[0], state)
    initialize_from_dinov2(tokenizers[1], vit.state_dict())
    first, second = (tokenizer.encoder.reducer.blocks.state_dict() for tokenizer in tokenizers)
    torch.testing.assert_close(first, second, rtol=0, atol=0)


def test_a_vit_with_too_few_layers_or_channels_is_an_error(vit):
    with pytest.raises(ValueError, match=r"the ViT lacks \['reducer.blocks.3.attn"):
        initialize_from_dinov2(Tokenizer(changed(SMALL, num_layers=4)), vit.state_dict())
    with pytest.raises(ValueError, match="selection only shrinks"):
        initialize_from_dinov2(Tokenizer(changed(SMALL, channels=32)), vit.state_dict())


def test_names_that_are_not_a_vits_are_an_error():
    with pytest.raises(ValueError, match="the ViT lacks"):
        initialize_from_dinov2(Tokenizer(SMALL), {"conv1.weight": torch.zeros(3)})
