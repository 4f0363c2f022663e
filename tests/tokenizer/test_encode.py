"""Encoding a data set: the tokens are those of the tokenizer, whoever writes them and when."""

import json
import os
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from mergevq.cli.main import main
from mergevq.data.batches import eval_batches
from mergevq.data.images import open_images
from mergevq.data.tokens.dataset import open_tokens
from mergevq.data.tokens.writing import claim, finish
from mergevq.runtime.artefacts import tokens_hash
from mergevq.runtime.distributed import World
from mergevq.runtime.run import environment
from mergevq.tokenizer.encode import encode, encode_images, encode_shards, token_record
from mergevq.tokenizer.tokenizer import Tokenizer
from tests.support.evaluations import write_tokenizer
from tests.support.parts import tokenizer_config
from tests.support.ranks import run_on_two_ranks

# 64 tokens of the 32-pixel digits.
CONFIG = tokenizer_config(
    image_size=32,
    channels=8,
    channel_mult=(1, 2, 2),
    num_res_blocks=1,
    num_layers=6,
    num_heads=2,
    layer_scale=0.5,
    num_kept=20,
    num_bits=12,
    num_decoder_layers=1,
    num_decoder_heads=2,
    source_dim=16,
    num_source_heads=2,
)
WORLD = World(rank=0, world_size=1, local_rank=0, device=torch.device("cpu"))
LOADING = {"batch_size": 2, "num_workers": 0}


class KilledError(Exception):
    """Stands for whatever ends a process."""


@pytest.fixture
def tokenizer():
    """Random weights large enough that images differ in their tokens."""
    model = Tokenizer(CONFIG)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.1)
    return model.eval()


@pytest.fixture(scope="module")
def digits():
    return open_images("digits", max_images=10)


def record_of(tokenizer, images, **options):
    """Shards of four images, where the command's have many more."""
    options = {"data": "digits", "num_kept": (9, 20)} | options
    return replace(token_record(tokenizer, "a" * 64, images, **options), shard_size=4)


@pytest.fixture
def record(tokenizer, digits):
    return record_of(tokenizer, digits)


@pytest.fixture
def complete(tmp_path, tokenizer, digits, record):
    return encode_images(tokenizer, digits, tmp_path / "complete", record, WORLD, **LOADING)


def content(directory):
    """Bytes of every file, by name."""
    files = (path for path in directory.rglob("*") if path.is_file())
    return {path.relative_to(directory).as_posix(): path.read_bytes() for path in files}


def shards(directory):
    return {name: data for name, data in content(directory).items() if name != "tokens.json"}


def write_image(path, generator):
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = torch.randint(256, (32, 32, 3), dtype=torch.uint8, generator=generator)
    Image.fromarray(pixels.numpy()).save(path)


# ----------------------------------------------------------------------------------- what it is


def test_tokens_from_a_file_decode_to_what_the_tokenizer_makes_of_the_image(
    tokenizer, digits, complete
):
    (batch,) = eval_batches(digits, image_size=32, batch_size=10, num_workers=0)
    for num_kept in (9, 20):
        encoded = tokenizer.encode(batch.image, num_kept)
        stored = complete.batch(range(10), num_kept)
        assert torch.equal(stored.indices, encoded.indices)
        assert torch.equal(stored.source.index, encoded.source.index)
        assert torch.equal(stored.label, batch.label)
        decoded = tokenizer.decode(stored.indices, stored.source, complete.record.grid_shape)
        expected = tokenizer.decode(encoded.codes, encoded.source)
        torch.testing.assert_close(decoded, expected, atol=1e-5, rtol=0)
    assert len(encoded.indices.unique(dim=0)) == 10


def test_the_record_says_what_was_encoded_and_how(complete):
    record = complete.record
    assert (record.tokenizer, record.data, record.num_images) == ("a" * 64, "digits", 10)
    assert (record.num_kept, record.sizes, record.grid_shape) == ((9, 20), (2**12,), (8, 8))
    assert (record.class_names, record.crop, record.flip) == (tuple("0123456789"), "center", False)
    assert complete.broken == ()
    (written,) = json.loads((complete.directory / "tokens.json").read_text())["environments"]
    assert written == environment(WORLD.device) | {"batch_size": 2}


def test_the_record_depends_on_the_images_and_their_order(tokenizer, digits):
    first, second, third = (
        token_record(tokenizer, "a" * 64, digits.subset(chosen), data="digits").images
        for chosen in ([0, 1], [1, 0], [0, 1])
    )
    assert first == third != second


def test_without_a_number_the_tokenizers_own_is_kept(tokenizer, digits):
    assert record_of(tokenizer, digits, num_kept=()).num_kept == (20,)


def test_numbers_of_tokens_are_ordered_and_not_repeated(tokenizer, digits):
    assert record_of(tokenizer, digits, num_kept=(20, 9, 20)).num_kept == (9, 20)


def test_a_number_of_tokens_that_the_image_has_not_is_an_error(tokenizer, digits):
    with pytest.raises(ValueError, match=r"num_kept \(65\) must be between 1 and the 64 tokens"):
        record_of(tokenizer, digits, num_kept=(20, 65))


def test_a_mirror_image_follows_its_image(tmp_path, tokenizer, digits, complete):
    record = record_of(tokenizer, digits, flip=True)
    flipped = encode_images(tokenizer, digits, tmp_path / "flipped", record, WORLD, **LOADING)
    assert flipped.record.flip
    assert len(flipped) == 20
    plain, mirror = flipped.batch(range(0, 20, 2), 9), flipped.batch(range(1, 20, 2), 9)
    assert torch.equal(plain.indices, complete.batch(range(10), 9).indices)
    (batch,) = eval_batches(digits, image_size=32, batch_size=10, num_workers=0)
    encoded = tokenizer.encode(batch.image.flip(-1), 9)
    assert torch.equal(mirror.indices, encoded.indices)
    assert torch.equal(mirror.source.index, encoded.source.index)
    assert torch.equal(mirror.label, plain.label)
    assert not torch.equal(mirror.indices, plain.indices)
    assert flipped.origin([4, 5]).position.tolist() == [2, 2]
    assert flipped.origin([4, 5]).mirrored.tolist() == [0, 1]


def test_the_batch_an_image_is_in_does_not_change_its_tokens(tmp_path, tokenizer, digits, record):
    folders = []
    for batch_size in (1, 2, 4):
        folder = tmp_path / str(batch_size)
        options = {"batch_size": batch_size, "num_workers": 0}
        encode_images(tokenizer, digits, folder, record, WORLD, **options)
        folders.append(shards(folder))
    assert folders[0] == folders[1] == folders[2]


# -------------------------------------------------------------------- stopped, resumed and shared


@pytest.mark.parametrize(
    "num_batches", [3, *(pytest.param(n, marks=pytest.mark.slow) for n in (0, 4, 7))]
)
def test_stopped_and_resumed_gives_the_same_bytes(
    tmp_path, tokenizer, digits, record, complete, num_batches
):
    """Each batch is encoded once for each of two numbers of tokens."""
    calls = []

    def stop(module, arguments):
        calls.append(arguments)
        if len(calls) > num_batches:
            raise KilledError

    folder = tmp_path / "resumed"
    hook = tokenizer.encoder.reducer.register_forward_pre_hook(stop)
    with pytest.raises(KilledError):
        encode_images(tokenizer, digits, folder, record, WORLD, **LOADING)
    hook.remove()
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*.safetensors")}
    assert len(before) == 2 * (num_batches // 4)
    encode_images(tokenizer, digits, folder, record, WORLD, **LOADING)
    assert content(folder) == content(complete.directory)
    assert {path: path.stat().st_mtime_ns for path in before} == before


def test_a_deleted_shard_is_made_again(tokenizer, digits, record, complete):
    before = content(complete.directory)
    (complete.directory / "k00009/tokens-00001.safetensors").unlink()
    encode_images(tokenizer, digits, complete.directory, record, WORLD, **LOADING)
    assert content(complete.directory) == before


def test_two_ranks_write_what_one_writes(tmp_path, tokenizer, digits, record, complete):
    folder = tmp_path / "shared"
    claim(folder, record, environment(WORLD.device) | {"batch_size": 2})
    for rank, numbers in ((0, {"00000", "00002"}), (1, {"00000", "00001", "00002"})):
        world = replace(WORLD, rank=rank, world_size=2)
        encode_shards(tokenizer, digits, folder, record, world, **LOADING)
        written = {path.stem.removeprefix("tokens-") for path in folder.rglob("*.safetensors")}
        assert written == numbers
    finish(folder)
    assert content(folder) == content(complete.directory)


@pytest.mark.slow
def test_two_processes_write_what_one_writes(tmp_path):
    # 1,797 digits are two shards of the command's size, one for each process.
    write_tokenizer(tmp_path / "model")
    command = ["encode", "--model", str(tmp_path / "model"), "--data", "digits"]
    command += ["--num-kept", "8,12"]
    command += ["--batch-size", "1024", "--num-workers", "0", "--device", "cpu"]
    command += ["--precision", "float32", "--out"]
    assert main([*command, str(tmp_path / "one")]) == 0
    run_on_two_ranks([*command, str(tmp_path / "two")])
    assert shards(tmp_path / "one") == shards(tmp_path / "two")
    assert open_tokens(tmp_path / "one").record == open_tokens(tmp_path / "two").record
    assert len(list((tmp_path / "two/k00012").glob("*.safetensors"))) == 2


def test_tokens_of_two_tokenizers_do_not_share_a_folder(tokenizer, digits, record, complete):
    other = replace(record, tokenizer="b" * 64)
    with pytest.raises(ValueError, match=f"tokenizer: {'a' * 64} there, {'b' * 64} asked for"):
        encode_images(tokenizer, digits, complete.directory, other, WORLD, **LOADING)


def test_a_batch_ends_where_a_shard_ends(tmp_path, tokenizer, digits, record):
    with pytest.raises(ValueError, match=r"batch_size \(3\) must be a divisor of the 4 images of"):
        encode_images(tokenizer, digits, tmp_path, record, WORLD, batch_size=3, num_workers=0)


@pytest.mark.gpu
def test_a_gpu_gives_the_same_bytes_every_time(tmp_path, tokenizer, digits, record):
    world = replace(WORLD, device=torch.device("cuda"))
    tokenizer.to(world.device)
    for name in ("first", "second"):
        encode_images(tokenizer, digits, tmp_path / name, record, world, **LOADING)
    assert content(tmp_path / "first") == content(tmp_path / "second")
    assert not torch.are_deterministic_algorithms_enabled()


# ------------------------------------------------------------------------------- broken images


def test_images_that_cannot_be_read_are_named_and_left_out(tmp_path, tokenizer, generator):
    for number in range(10):
        write_image(tmp_path / f"images/{number}.png", generator)
    whole = open_images(str(tmp_path / "images"))
    folder = tmp_path / "whole"
    record = record_of(tokenizer, whole, num_kept=(9,))
    expected = encode_images(tokenizer, whole, folder, record, WORLD, **LOADING)
    # The second shard has nothing left.
    for number in (1, 4, 5, 6, 7, 9):
        (tmp_path / f"images/{number}.png").write_bytes(b"no image")
    images = open_images(str(tmp_path / "images"))
    tokens = encode_images(tokenizer, images, tmp_path / "tokens", record, WORLD, **LOADING)
    assert tokens.broken == ("1.png", "4.png", "5.png", "6.png", "7.png", "9.png")
    assert tokens.origin(range(4)).position.tolist() == [0, 2, 3, 8]
    assert torch.equal(tokens.batch(range(4)).indices, expected.batch([0, 2, 3, 8]).indices)


# ------------------------------------------------------------------------------------ from files


@pytest.fixture
def folders(tmp_path, tokenizer, generator):
    """A saved tokenizer and a folder of images in two classes."""
    tokenizer.save_pretrained(tmp_path / "model")
    for number in range(5):
        write_image(tmp_path / "images" / ("cat", "dog")[number % 2] / f"{number}.png", generator)
    return tmp_path / "model", tmp_path / "images"


def test_a_model_and_a_data_set_are_enough(tmp_path, tokenizer, folders):
    model, data = folders
    tokens = encode(model, str(data), tmp_path / "tokens", num_workers=0, device="cpu")
    assert tokens.record.tokenizer == tokens_hash(model)
    assert tokens.record.class_names == ("cat", "dog")
    assert tokens.record.shard_size == 1024
    assert tokens.batch(range(5)).label.tolist() == [0, 0, 0, 1, 1]
    image = np.asarray(Image.open(data / "dog/1.png"))
    pixels = torch.from_numpy(image.copy()).permute(2, 0, 1)[None] / 127.5 - 1
    assert torch.equal(tokens.batch([3]).indices, tokenizer.encode(pixels).indices)


def test_another_spelling_of_a_folder_is_the_same_folder_and_nothing_is_encoded(
    tmp_path, folders, monkeypatch, caplog
):
    model, _ = folders
    monkeypatch.chdir(tmp_path)
    encode(model, "images", "tokens", num_workers=0, device="cpu")
    before = content(tmp_path / "tokens")
    assert caplog.text == ""
    for spelling in ("./images", "images/", str(tmp_path / "images")):
        caplog.clear()
        encode(model, spelling, "tokens", num_workers=0, device="cpu")
        assert content(tmp_path / "tokens") == before
        assert caplog.text.count("tokens is complete already; nothing was encoded") == 1


def test_a_picture_that_changed_under_its_name_is_seen(tmp_path, folders, generator):
    model, data = folders
    encode(model, str(data), tmp_path / "tokens", num_workers=0, device="cpu")
    before = content(tmp_path / "tokens")
    write_image(data / "dog/1.png", generator)
    with pytest.raises(
        ValueError, match=r"other images with the same names: some of images 0 to 4"
    ):
        encode(model, str(data), tmp_path / "tokens", num_workers=0, device="cpu")
    assert content(tmp_path / "tokens") == before


def test_a_file_that_was_only_touched_is_the_same_picture(tmp_path, folders, caplog):
    model, data = folders
    tokens = encode(model, str(data), tmp_path / "tokens", num_workers=0, device="cpu")
    os.utime(data / "cat/0.png", (1, 1))
    again = encode(model, str(data), tmp_path / "tokens", num_workers=0, device="cpu")
    assert "nothing was encoded" in caplog.text
    assert again.record.stamp == open_images(str(data)).stamp() != tokens.record.stamp
    assert replace(again.record, stamp="") == replace(tokens.record, stamp="")
    assert torch.equal(again.batch(range(5)).indices, tokens.batch(range(5)).indices)


def test_a_picture_that_changed_while_encoding_was_stopped_is_seen(tmp_path, tokenizer, generator):
    for number in range(8):
        write_image(tmp_path / f"images/{number}.png", generator)
    images = open_images(str(tmp_path / "images"))
    record, folder = record_of(tokenizer, images, num_kept=(9,)), tmp_path / "tokens"
    encode_images(tokenizer, images, folder, record, WORLD, **LOADING)
    (folder / "k00009/tokens-00001.safetensors").unlink()
    # Of the shard that is still to be written: its new content is what will be encoded.
    write_image(tmp_path / "images/5.png", generator)
    images = open_images(str(tmp_path / "images"))
    encode_images(
        tokenizer, images, folder, record_of(tokenizer, images, num_kept=(9,)), WORLD, **LOADING
    )
    (folder / "k00009/tokens-00001.safetensors").unlink()
    write_image(tmp_path / "images/0.png", generator)
    images = open_images(str(tmp_path / "images"))
    record = record_of(tokenizer, images, num_kept=(9,))
    with pytest.raises(ValueError, match="some of images 0 to 3 changed since they were encoded"):
        encode_images(tokenizer, images, folder, record, WORLD, **LOADING)


def test_larger_pictures_than_asked_for_are_not_read_and_the_limit_stays(tmp_path, folders, capsys):
    model, data = folders
    Image.new("RGB", (33, 32)).save(data / "cat/large.png")
    command = ["encode", "--model", str(model), "--data", str(data), "--out", str(tmp_path / "out")]
    options = ["--num-workers", "0", "--device", "cpu", "--max-pixels"]
    assert main([*command, *options, "1055"]) == 0
    assert "from 6 images; 1 cannot be read" in capsys.readouterr().out
    assert main([*command, *options, "1056"]) == 1
    assert "--max-pixels: 1055 there, 1056 asked for" in capsys.readouterr().err


def test_the_command_says_what_it_wrote(tmp_path, folders, capsys):
    model, data = folders
    out = tmp_path / "tokens"
    command = ["encode", "--model", str(model), "--data", str(data), "--out", str(out)]
    options = ["--num-kept", "20,9", "--flip", "--num-workers", "0", "--device", "cpu"]
    assert main([*command, *options]) == 0
    said = "9 and 20 tokens of 12 bits for each of 10 rows, from 5 images; encoded in float32"
    goes_on = f"mergevq train RECIPE --tokens.path {out} --tokens.tokenizer {model}"
    assert capsys.readouterr().out == f"{out}: {said}\nnext:\n  {goes_on}\n"
    assert open_tokens(out).record.flip
    (data / "cat/0.png").unlink()
    assert main([*command, *options]) == 1
    assert "num_images: 5 there, 4 asked for" in capsys.readouterr().err


def test_a_folder_of_tokens_has_one_precision_which_its_record_names(tmp_path, capsys):
    write_tokenizer(tmp_path / "model")
    arguments = (tmp_path / "model", "digits", tmp_path / "tokens")
    options = {"num_kept": (8,), "batch_size": 1024, "num_workers": 0, "device": "cpu"}
    # The tests' `auto` is float32, whatever the processor has.
    assert encode(*arguments, **options).record.precision == "float32"
    with pytest.raises(ValueError, match=r"go on with --precision float32:\n.*bf16 asked for"):
        encode(*arguments, **options, precision="bf16")
    # Folders of before say nothing of it, and are of float32.
    path = tmp_path / "tokens/tokens.json"
    state = json.loads(path.read_text())
    del state["record"]["precision"]
    path.write_text(json.dumps(state))
    assert open_tokens(tmp_path / "tokens").record.precision == "float32"
    encode(*arguments, **options)
    with pytest.raises(ValueError, match="precision: float32 there, bf16 asked for"):
        encode(*arguments, **options, precision="bf16")
