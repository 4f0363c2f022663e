"""`mergevq compress` and `mergevq decompress` as they are typed."""

import numpy as np
import pytest
import torch
from PIL import Image

from mergevq.cli.main import main
from mergevq.metrics.lpips import Perceptual
from mergevq.tokenizer.codec import decode_image, encode_image
from mergevq.tokenizer.tokenizer import Tokenizer
from tests.support.parts import tokenizer_config


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """Directory of an untrained tokenizer: 16 pixels, patches of 2."""
    torch.manual_seed(1)
    config = tokenizer_config(
        image_size=16,
        channels=8,
        channel_mult=(1, 2),
        num_res_blocks=1,
        num_layers=3,
        num_heads=2,
        num_kept=20,
        kept_range=(16, 40),
        num_bits=6,
        num_decoder_layers=1,
        num_decoder_heads=2,
        source_dim=16,
        num_source_heads=2,
    )
    directory = tmp_path_factory.mktemp("model")
    Tokenizer(config).save_pretrained(directory)
    return directory


@pytest.fixture(autouse=True)
def _pictures(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for number, (width, height) in enumerate([(16, 16), (37, 21)]):
        pixels = np.random.default_rng(number).integers(0, 256, (height, width, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(f"{number}.png")


def compress(model, *words):
    options = ["--model", str(model), "--device", "cpu", "--precision", "float32"]
    return main(["compress", *words, *options])


def decompress(model, *words):
    options = ["--model", str(model), "--device", "cpu", "--precision", "float32"]
    return main(["decompress", *words, *options])


def test_pictures_become_files_and_pictures_again(model, tmp_path, capsys):
    assert compress(model, "0.png", "1.png", "-o", "small") == 0
    assert decompress(model, "small/0.mvq", "small/1.mvq", "-o", "again") == 0
    lines = capsys.readouterr().out.splitlines()
    size = (tmp_path / "small/0.mvq").stat().st_size
    assert lines[0] == (
        f"0.png: 20 of 64 tokens, {size} bytes, {8 * size / 256:.3f} bits per pixel -> small/0.mvq"
    )
    assert lines[1].startswith("1.png: 6 tiles x 20 of 64 tokens, ")
    assert lines[2:4] == ["next:", f"  mergevq decompress small/0.mvq --model {model}"]
    assert lines[5] == "small/1.mvq: 37 x 21 pixels -> again/1.png"
    assert lines[6:] == ["next:", f"  mergevq demo --model {model}"]
    tokenizer = Tokenizer.from_pretrained(model, precision="float32")
    with Image.open("1.png") as picture, Image.open("again/1.png") as again:
        expected = decode_image(tokenizer, encode_image(tokenizer, picture, size_policy="tile"))
        assert np.array_equal(np.asarray(again), np.asarray(expected))


def test_files_go_to_folders_of_their_own_by_default(model, tmp_path):
    assert compress(model, "0.png") == 0
    assert decompress(model, "compressed/0.mvq") == 0
    assert (tmp_path / "decompressed/0.png").is_file()


def test_a_target_is_said_with_what_was_reached(model, capsys):
    assert compress(model, "0.png", "--quality", "psnr", "5") == 0
    assert ", PSNR " in capsys.readouterr().out
    assert compress(model, "0.png", "--quality", "bits_per_pixel", "50") == 0
    assert "40 of 64 tokens" in capsys.readouterr().out


def test_lpips_is_measured_with_weights_from_a_file(model, capsys, monkeypatch):
    given = []

    class Constant(Perceptual):
        def forward(self, *_):
            return torch.tensor([0.125])

    def load(trunk, path):
        given.append((trunk, path))
        return Constant("squeeze")

    monkeypatch.setattr("mergevq.metrics.lpips.load_perceptual", load)
    assert compress(model, "0.png", "--quality", "lpips", "0.2", "--lpips-weights", "folder") == 0
    assert given == [("alex", "folder")]
    assert "16 of 64 tokens" in (printed := capsys.readouterr().out)
    assert "LPIPS 0.1250" in printed


def one_line(capsys):
    printed = capsys.readouterr().err
    assert printed.startswith("mergevq: error: ")
    assert printed.count("\n") == 1
    return printed


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--quality psnr 99", "0.png: psnr (99) cannot be reached: with all 40 tokens it is"),
        ("--quality bits_per_pixel 0.1", "bits_per_pixel (0.1) is too few: with 16 tokens"),
        ("--num-kept 20 --quality lpips 0.2", "2 targets (--num-kept, lpips) are given"),
        ("--quality psnr nan", "psnr (nan) must be above 0 and at most 200"),
        ("--num-kept 0", "--num-kept (0) must be between 1 and"),
    ],
)
def test_what_cannot_be_met_is_one_line(model, capsys, options, message):
    assert compress(model, "0.png", *options.split()) == 1
    assert message in one_line(capsys)


def test_lpips_without_weights_names_the_option(model, capsys, monkeypatch):
    monkeypatch.setattr("mergevq.metrics.lpips.load_perceptual", lambda *_: None)
    assert compress(model, "0.png", "--quality", "lpips", "0.2") == 1
    assert "--lpips-weights FILE" in one_line(capsys)


def test_a_wrong_file_is_one_line_and_does_not_end_a_list(model, tmp_path, capsys):
    assert compress(model, "0.png", "-o", "small") == 0
    data = (tmp_path / "small/0.mvq").read_bytes()
    (tmp_path / "cut.mvq").write_bytes(data[:40])
    (tmp_path / "newer.mvq").write_bytes(data[:4] + b"\x09" + data[5:])
    for name, message in (
        ("0.png", "0.png: it is no .mvq file: it begins with 89504e47"),
        ("cut.mvq", "cut.mvq: it is damaged or was cut off: its checksum is "),
        ("newer.mvq", "version 9 of the format, and this mergevq reads version 1"),
        ("nowhere.mvq", "nowhere.mvq: there is no file nowhere.mvq"),
    ):
        capsys.readouterr()
        assert decompress(model, name, "-o", "again") == 1
        assert message in one_line(capsys)
    assert decompress(model, "cut.mvq", "small/0.mvq", "-o", "again") == 1
    assert "1 of 2 files could not be done: cut.mvq: " in one_line(capsys)
    assert (tmp_path / "again/0.png").is_file()


def test_another_model_is_named(model, tmp_path, capsys):
    config = tokenizer_config(
        image_size=16,
        channels=8,
        channel_mult=(1, 2),
        num_res_blocks=1,
        num_layers=3,
        num_heads=2,
        num_kept=20,
        num_bits=5,
        num_decoder_layers=1,
        num_decoder_heads=2,
        source_dim=16,
        num_source_heads=2,
    )
    Tokenizer(config).save_pretrained(tmp_path / "other")
    assert compress(model, "0.png", "-o", "small") == 0
    assert decompress(tmp_path / "other", "small/0.mvq") == 1
    assert "name the model that compressed it" in one_line(capsys)


@pytest.mark.parametrize("command", ["compress", "decompress"])
def test_without_files_the_usage_is_said(command, model, capsys):
    assert main([command, "--model", str(model)]) == 1
    assert f"name at least one file: mergevq {command} " in one_line(capsys)


def test_a_picture_is_not_overwritten(model, tmp_path, capsys):
    before = (tmp_path / "0.png").read_bytes()
    assert compress(model, "0.png", "-o", ".") == 0
    assert decompress(model, "0.mvq", "-o", ".") == 1
    assert "0.png is there already; choose another folder with --out" in one_line(capsys)
    assert (tmp_path / "0.png").read_bytes() == before
    assert decompress(model, "0.png", "-o", ".") == 1
    assert "would overwrite" in one_line(capsys)
