"""Files that anybody may have written are read within bounds, or refused in one line by name."""

import os

import pytest
import torch
from safetensors.torch import save_file

from mergevq.cli.main import main
from mergevq.runtime.files import (
    MAX_JSON_BYTES,
    MAX_JSON_DEPTH,
    atomic_directory,
    broken_weights,
    parse_json,
    read_json_file,
    read_tensors,
    sha256_of,
)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is not JSON"),
        ("{", "is not JSON"),
        (b"\xff\xfe\xfa", "is not JSON"),
        (b'"\xc3"', "is not JSON"),
        ("9" * 5000, "is not JSON"),
        ("NaN", "NaN is not a number of JSON"),
        ("[-Infinity]", "-Infinity is not a number of JSON"),
        ('{"a": 1, "b": {"c": 1, "c": 2}}', "'c' is there twice"),
        ("[" * 100_000, f"more deeply than {MAX_JSON_DEPTH} levels"),
        ("[" * 65 + "1" + "]" * 65, f"more deeply than {MAX_JSON_DEPTH} levels"),
        ('{"a":' * 200 + "1" + "}" * 200, f"more deeply than {MAX_JSON_DEPTH} levels"),
    ],
)
def test_text_that_is_not_json_within_bounds_is_refused_by_name(text, message):
    with pytest.raises(ValueError, match=message) as caught:
        parse_json(text, where="here")
    assert str(caught.value).startswith("here ")


def test_json_within_bounds_is_read():
    deepest = "[" * 64 + "1.5" + "]" * 64
    value = parse_json(deepest, where="here")
    for _ in range(64):
        (value,) = value
    assert value == 1.5
    assert parse_json(b'{"a": [null, true, "\xc3\xa9"]}', where="") == {"a": [None, True, "\u00e9"]}


def test_a_json_file_that_is_too_large_is_not_read(tmp_path):
    with (tmp_path / "a.json").open("wb") as file:
        file.truncate(2**40)
    with pytest.raises(ValueError, match=f"more than the {MAX_JSON_BYTES} bytes"):
        read_json_file(tmp_path / "a.json")


@pytest.mark.parametrize("read", [read_json_file, read_tensors, sha256_of])
def test_only_regular_files_are_read(tmp_path, read):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "zero").symlink_to("/dev/zero")
    (tmp_path / "folder").mkdir()
    for name in ("pipe", "zero", "folder"):
        with pytest.raises(ValueError, match=f"{name} must be a regular file"):
            read(tmp_path / name)
    with pytest.raises(ValueError, match="there is no file"):
        read(tmp_path / "nothing")


def test_finite_floating_point_weights_of_any_width_and_of_none_are_whole():
    kinds = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
    weights = {str(kind): torch.ones(2, 3, dtype=kind) for kind in kinds}
    assert broken_weights(weights | {"empty": torch.zeros(0, 3), "scalar": torch.tensor(1.0)}) == ""
    assert "later has 2 of 6" in broken_weights(
        weights | {"later": torch.tensor([[1, torch.nan, 1], [1, 1, -torch.inf]])}
    )


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("last.ckpt", b"<html>", "it is a web page"),
        ("model.safetensors", b"version https://git-lfs.github.com/spec/v1", "Git LFS pointer"),
        ("last.ckpt", b"\x00" * 64, "is not a torch file, or is damaged"),
    ],
)
def test_converting_what_is_no_checkpoint_ends_in_one_line(
    tmp_path, capsys, name, content, message
):
    (tmp_path / name).write_bytes(content)
    options = ["--image-size", "16", "--num-kept", "20", "--num-heads", "2"]
    assert main(["convert", str(tmp_path / name), "--out", str(tmp_path / "out"), *options]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("mergevq: error:")
    assert message in line
    assert not (tmp_path / "out").exists()


def test_reconstructing_with_broken_weights_ends_in_one_line(tmp_path, capsys):
    (tmp_path / "config.json").write_text("[" * 10_000)
    save_file({}, tmp_path / "model.safetensors")
    assert main(["reconstruct", "a.png", "--model", str(tmp_path)]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert "config.json is nested more deeply" in line


def test_replacing_a_directory_leaves_only_the_new_files(tmp_path):
    for name in ("old", "new"):
        with atomic_directory(tmp_path / "here") as partial:
            (partial / name).write_text(name)
    assert [path.name for path in tmp_path.rglob("*")] == ["here", "new"]
