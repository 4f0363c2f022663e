"""Damaged and forged models, tokens and checkpoints are used, or refused in a message of ours.

Every mutation is numbered and depends on its number alone: to see one again, call `attempt` with
it. Half of them are sealed again with digests that fit, as a forger would, so that what lies behind
the digests is met too.
"""

import hashlib
import json
import os
import resource
import shutil
import signal
import struct
import warnings
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from mergevq.cli.errors import speaks_for_itself
from mergevq.data.tokens.dataset import open_tokens
from mergevq.data.tokens.files import TokenRecord, TokenRows
from mergevq.data.tokens.writing import claim, finish, write_shard
from mergevq.generator.build import load_generator, save_generator
from mergevq.generator.generation import load_pair
from mergevq.runtime.checkpoints import _digest, load_state, save_state
from mergevq.tokenizer.interop import (
    initialize_from_dinov2,
    load_official,
    official_config,
    read_official,
    read_vit,
)
from mergevq.tokenizer.tokenizer import Tokenizer
from tests.support.generators import tiny_generator
from tests.support.official import official_state
from tests.support.probes import tiny_tokenizer

MORE_MEMORY = 2**30
"""Bytes of address space that reading may take beyond what the process has."""
MOST_SECONDS = 10
"""Time one mutation may take."""
STRANGE = [
    None,
    True,
    -1,
    0,
    1,
    3,
    10**9,
    2**31,
    2**62,
    2**63,
    10**400,
    -0.5,
    1e308,
    "",
    "cnn",
    "a" * 999,
    [],
    [0],
    [[[]]],
    [10**9],
    ["a"],
    {},
    {"a": 1},
    {"tensor": "none"},
]
TEXTS = [
    b"",
    b"{",
    b"null",
    b"[]",
    b"\xff\xfe",
    b"NaN",
    b"[" * 100_000,
    b'{"a":' * 500 + b"1" + b"}" * 500,
    b"[" + b"9" * 5000 + b"]",
    b'{"format_version": 1, "format_version": 1}',
    b"<!DOCTYPE html>",
    b"version https://git-lfs.github.com/spec/v1",
]
DTYPES = (torch.float64, torch.float16, torch.int64, torch.bool, torch.complex64, torch.uint8)


# ------------------------------------------------------------------------------------ material


def write_models(folder: Path) -> None:
    """A tokenizer and a generator."""
    tiny_tokenizer().save_pretrained(folder / "tokenizer")
    save_generator(
        tiny_generator("merge"),
        folder / "generator",
        tokenizer="a" * 64,
        class_names=("a", "b", "c"),
    )


def write_tokens(folder: Path) -> None:
    """Tokens of three images in two shards, for two K."""
    record = TokenRecord(
        tokenizer="a" * 64,
        num_kept=(2, 3),
        sizes=(2**6,),
        grid_shape=(2, 2),
        data="made up",
        images="b" * 64,
        num_images=3,
        class_names=("cat", "dog"),
        shard_size=2,
    )
    claim(folder / "tokens", record, {})
    for number in range(record.num_shards):
        position = torch.tensor(record.images_of(number))
        for num_kept in record.num_kept:
            rows = TokenRows(
                parts=torch.arange(num_kept)[:, None].repeat(len(position), 1, 1),
                source=torch.arange(4).clamp_max(num_kept - 1).repeat(len(position), 1),
                label=position % 2,
                position=position,
                mirrored=torch.zeros_like(position),
            )
            write_shard(folder / "tokens", record, number, rows, broken=[])
    finish(folder / "tokens")


def write_state(folder: Path) -> None:
    """The state of a run, with an optimizer's."""
    module = torch.nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(module.parameters())
    module(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    state = {
        "module": module.state_dict(),
        "optimizer": optimizer.state_dict(),
        "step": 1,
        "scale": float("inf"),
    }
    save_state(folder / "state", state)


def write_foreign(folder: Path) -> None:
    """A checkpoint of the authors' and a ViT, as safetensors and as a torch file."""
    state = official_state(tiny_tokenizer())
    (folder / "official").mkdir()
    (folder / "lightning").mkdir()
    (folder / "vit").mkdir()
    save_file(state, folder / "official/model.safetensors")
    torch.save({"state_dict": state, "epoch": 3}, folder / "lightning/last.ckpt")
    encoder = tiny_tokenizer().encoder.state_dict()
    vit = {
        name.removeprefix("reducer."): value
        for name, value in encoder.items()
        if name.startswith("reducer.blocks.")
    }
    vit["cls_token"] = encoder["class_token"][None, None]
    save_file(vit, folder / "vit/model.safetensors")


@pytest.fixture(scope="module")
def material(tmp_path_factory) -> Path:
    """One whole folder of each kind."""
    folder = tmp_path_factory.mktemp("material")
    torch.manual_seed(0)
    for write in (write_models, write_tokens, write_state, write_foreign):
        write(folder)
    return folder


def convert(file: Path) -> None:
    """Read and load a checkpoint as `mergevq convert` does before it writes."""
    state = read_official(file)
    config = official_config(state, image_size=16, num_kept=20, num_heads=2, num_decoder_heads=2)
    load_official(state, config)


def use_tokenizer(folder: Path) -> None:
    """Load it, and encode and decode as small an image as it can."""
    tokenizer = Tokenizer.from_pretrained(folder)
    side = tokenizer.config.patch_size * 8
    if side <= 64:
        encoded = tokenizer.encode(torch.zeros(1, 3, side, side))
        tokenizer.recover(encoded.indices, encoded.grid_shape)
        tokenizer.decode(encoded.indices, encoded.source, encoded.grid_shape)


def use_generator(folder: Path) -> None:
    """Load it by itself and with a tokenizer, which is not its own."""
    load_generator(folder)
    try:
        load_pair(folder, folder.parent / "whole-tokenizer", torch.device("cpu"))
    except ValueError as error:
        if "was trained on tokens of tokenizer" not in str(error):
            raise


def use_tokens(folder: Path) -> None:
    """Read every row of every K."""
    dataset = open_tokens(folder)
    for num_kept in dataset.num_kept:
        batch = dataset.batch(range(len(dataset)), num_kept)
        assert int(batch.indices.max()) < dataset.record.num_values
        assert int(batch.source.index.max()) < num_kept
    dataset.origin(range(len(dataset)))


USES = {
    "tokenizer": use_tokenizer,
    "generator": use_generator,
    "tokens": use_tokens,
    "state": load_state,
    "official": lambda folder: convert(folder / "model.safetensors"),
    "lightning": lambda folder: convert(folder / "last.ckpt"),
    "vit": lambda folder: initialize_from_dinov2(tiny_tokenizer(), read_vit(folder)),
}


# ----------------------------------------------------------------------------------- mutations


def pick(numbers: np.random.Generator, choices):
    """One of some things."""
    choices = list(choices)
    return choices[int(numbers.integers(len(choices)))]


def places(value, path=()):
    """Paths to every value inside a value of JSON."""
    items = value.items() if isinstance(value, dict) else enumerate(value)
    for key, item in items:
        yield (*path, key)
        if isinstance(item, dict | list):
            yield from places(item, (*path, key))


def mutate_json(file: Path, numbers: np.random.Generator) -> None:
    """Change, take out or rename one value, or replace the whole text."""
    if numbers.random() < 0.15:
        file.write_bytes(pick(numbers, TEXTS))
        return
    record = json.loads(file.read_text())
    path = pick(numbers, places(record))
    inner = record
    for key in path[:-1]:
        inner = inner[key]
    way = numbers.integers(4)
    if way == 0:
        del inner[path[-1]]
    elif way == 1 and isinstance(inner, dict):
        inner["renamed"] = inner.pop(path[-1])
    else:
        inner[path[-1]] = pick(numbers, STRANGE)
    file.write_text(json.dumps(record))


def mutate_bytes(file: Path, numbers: np.random.Generator) -> None:
    """Change, cut or lengthen a file."""
    content = bytearray(file.read_bytes())
    way = numbers.integers(4)
    if way == 0:
        place = int(numbers.integers(min(len(content), pick(numbers, [16, 500, 10**9]))))
        content[place] = int(numbers.integers(256))
    elif way == 1:
        content = content[: int(numbers.integers(len(content)))]
    elif way == 2:
        content += bytes(int(numbers.integers(1, 99)))
    else:
        content = bytearray(pick(numbers, TEXTS))
    file.write_bytes(content)


def mutate_tensors(file: Path, numbers: np.random.Generator) -> None:
    """Change one tensor of a safetensors file, or claim in its header what is not there."""
    state = load_file(file)
    name = pick(numbers, state)
    tensor = state[name]
    way = numbers.integers(8)
    if way == 0:
        del state[name]
    elif way == 1:
        state[pick(numbers, ["a", name + ".more", name[1:], "up.999999999.block.0"])] = state.pop(
            name
        )
    elif way == 2:
        state[name] = tensor.to(pick(numbers, DTYPES))
    elif way == 3:
        shapes = [tensor[None], tensor.flatten(), tensor.flatten()[:0], tensor.flatten()[:1]]
        state[name] = pick(numbers, [*shapes, tensor.sum(), torch.zeros(0, 2**40)]).contiguous()
    elif way == 4 and tensor.is_floating_point() and tensor.numel():
        tensor.view(-1)[0] = pick(numbers, [torch.nan, torch.inf, 3e38])
    elif way == 5 and not tensor.is_floating_point() and tensor.numel():
        tensor.view(-1)[0] = pick(numbers, [-1, 2**7, 1, 99])
    elif way == 6:
        state["more"] = torch.zeros(3)
    else:
        header = {name: {"dtype": "F32", "shape": [2**40, 4], "data_offsets": [0, 2**44]}}
        text = json.dumps(header).encode()
        file.write_bytes(struct.pack("<Q", len(text)) + text + bytes(16))
        return
    save_file(state, file, metadata=pick(numbers, [None, {"broken": "[]"}, {"broken": "3"}]))


def mutate_torch(file: Path, numbers: np.random.Generator) -> None:
    """Change one entry of a torch file."""
    found = torch.load(file, weights_only=True)
    state = found["state_dict"]
    name = pick(numbers, state)
    way = numbers.integers(5)
    if way == 0:
        del state[name]
    elif way == 1:
        state[name] = pick(numbers, STRANGE)
    elif way == 2:
        state[name] = pick(
            numbers,
            [
                torch.zeros(1).expand(10**6, 10**6),
                torch.zeros(3, 3).to_sparse(),
                torch.empty(2**40, 2, device="meta"),
                state[name].to(torch.int64),
                state[name].flatten(),
                state[name] * torch.nan,
            ],
        )
    elif way == 3:
        found["state_dict"] = pick(numbers, STRANGE)
    else:
        found["hyper_parameters"] = pick(numbers, [Path("a"), np.float64(3), replace])
    torch.save(found, file)


def mutate_file(file: Path, numbers: np.random.Generator) -> None:
    """Put something else in the place of a file."""
    file.unlink()
    way = numbers.integers(4)
    if way == 0:
        os.mkfifo(file)
    elif way == 1:
        file.symlink_to("/dev/zero")
    elif way == 2:
        file.mkdir()


def mutate(folder: Path, numbers: np.random.Generator) -> None:
    """Change one file of a folder, in a way of its kind or as any file."""
    file = pick(numbers, sorted(path for path in folder.rglob("*") if path.is_file()))
    own = {".json": mutate_json, ".safetensors": mutate_tensors, ".ckpt": mutate_torch}[file.suffix]
    way = numbers.random()
    if way < 0.05:
        mutate_file(file, numbers)
    elif way < 0.25:
        mutate_bytes(file, numbers)
    else:
        own(file, numbers)


def sha256(file: Path) -> str:
    """Digest of a file, of nothing where there is none to read."""
    content = file.read_bytes() if file.is_file() and not file.is_symlink() else b""
    return hashlib.sha256(content).hexdigest()


def seal(folder: Path) -> None:
    """Write digests that fit, where what should hold them can be read."""
    try:
        _seal(folder)
    except (ValueError, TypeError, KeyError, AttributeError, OSError, RecursionError):
        return


def _seal(folder: Path) -> None:
    """Write digests that fit."""
    if (folder / "config.json").is_file():
        file = folder / "config.json"
        record = json.loads(file.read_text())
        weights = folder / "model.safetensors"
        if weights.is_file() and not weights.is_symlink():
            with suppress(SafetensorError):
                # Or other settings would be told apart by those that lie with the weights.
                save_file(load_file(weights), weights)
        record["weights_sha256"] = sha256(weights)
    elif (folder / "tokens.json").is_file():
        file = folder / "tokens.json"
        record = json.loads(file.read_text())
        for num_kept, shards in record["shards"].items():
            for number, shard in enumerate(shards):
                shard["sha256"] = sha256(
                    folder / f"k{int(num_kept):05d}/tokens-{number:05d}.safetensors"
                )
    elif (folder / "state.json").is_file():
        file = folder / "state.json"
        record = json.loads(file.read_text())
        record["sha256"] = {name: sha256(folder / name) for name in record["sha256"]}
        record["digest"] = _digest({n: v for n, v in record.items() if n != "digest"})
    else:
        return
    file.write_text(json.dumps(record))


# ------------------------------------------------------------------------------------- attempts


@contextmanager
def bounded():
    """Inside, more memory than `MORE_MEMORY` and more time than `MOST_SECONDS` are errors."""

    def stop(*_):
        raise AssertionError(f"took more than {MOST_SECONDS} seconds")

    pages = int(Path("/proc/self/statm").read_text().split()[0])
    used = pages * resource.getpagesize()
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    before = signal.signal(signal.SIGALRM, stop)
    resource.setrlimit(resource.RLIMIT_AS, (used + MORE_MEMORY, hard))
    signal.alarm(MOST_SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def attempt(material: Path, scratch: Path, number: int) -> str | None:
    """Make one mutation and use it; what is wrong with what happened, None if nothing."""
    kind = list(USES)[number % len(USES)]
    numbers = np.random.default_rng(number)
    folder = scratch / kind
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(material / kind, folder)
    whole = scratch / "whole-tokenizer"
    if not whole.exists():
        shutil.copytree(material / "tokenizer", whole)
    mutate(folder, numbers)
    if numbers.random() < 0.7:
        seal(folder)
    try:
        with bounded(), warnings.catch_warnings(action="ignore"):
            USES[kind](folder)
    except Exception as error:  # noqa: BLE001 - whatever it is, it is reported
        if not speaks_for_itself(error):
            return f"mutation {number} of a {kind}: {type(error).__name__}: {str(error)[:300]}"
        if len(str(error)) > 3000:
            return f"mutation {number} of a {kind}: a message of {len(str(error))} letters"
    return None


def failures(material: Path, scratch: Path, numbers: range) -> list[str]:
    """Faults that some of these mutations brought to light."""
    found = (attempt(material, scratch, number) for number in numbers)
    return [problem for problem in found if problem is not None]


needs_linux = pytest.mark.skipif(
    not Path("/proc/self/statm").exists(), reason="memory is bounded in the way of Linux"
)


@needs_linux
def test_what_is_not_mutated_is_used(material, tmp_path):
    shutil.copytree(material, tmp_path / "all")
    shutil.copytree(material / "tokenizer", tmp_path / "all/whole-tokenizer")
    for kind, use in USES.items():
        use(tmp_path / "all" / kind)


@pytest.mark.slow
@needs_linux
def test_mutated_files_are_used_or_refused_in_one_message(material, tmp_path):
    assert failures(material, tmp_path, range(56)) == []


@needs_linux
@pytest.mark.slow
def test_a_thousand_mutated_files_are_used_or_refused_in_one_message(material, tmp_path):
    assert failures(material, tmp_path, range(56, 1056)) == []
