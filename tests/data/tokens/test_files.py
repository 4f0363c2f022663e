"""Files of tokens: what is written is read, and nothing else is taken for it."""

import json
import multiprocessing
import os
import pickle
import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.numpy import save_file
from safetensors.torch import load_file
from torch.utils.data import DataLoader

from mergevq.data.tokens.dataset import open_tokens
from mergevq.data.tokens.files import require_tokenizer
from mergevq.data.tokens.writing import claim, finish, missing_shards, write_shard
from mergevq.runtime.files import sha256_of
from tests.support.tokens import ENVIRONMENT, RECORD, assert_same, rows_of, write_all


def content(directory):
    """Bytes of every file, by name."""
    files = (path for path in directory.rglob("*") if path.is_file())
    return {path.relative_to(directory).as_posix(): path.read_bytes() for path in files}


def damage(path):
    """Change one bit of the last value."""
    data = path.read_bytes()
    path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))


def forge(directory, number=0, num_kept=3, **changes):
    """Write other arrays into a shard, and seal it with them."""
    path = directory / f"k{num_kept:05d}/tokens-{number:05d}.safetensors"
    with safe_open(path, framework="np") as file:
        arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
        metadata = file.metadata()
    arrays = {name: changes.get(name, array) for name, array in arrays.items()}
    arrays = {name: array for name, array in arrays.items() if array is not None}
    save_file(arrays, path, changes.get("metadata", metadata))
    record = json.loads((directory / "tokens.json").read_text())
    record["shards"][str(num_kept)][number]["sha256"] = sha256_of(path)
    (directory / "tokens.json").write_text(json.dumps(record))


def change_record(directory, change):
    """Let a function change the content of `tokens.json`."""
    record = json.loads((directory / "tokens.json").read_text())
    change(record)
    (directory / "tokens.json").write_text(json.dumps(record))


# ------------------------------------------------------------------------------ rows in and out


def test_a_folder_has_a_record_and_shards_for_each_number_of_tokens(tokens):
    names = [f"k{k:05d}/tokens-{number:05d}.safetensors" for k in (3, 5) for number in range(3)]
    assert sorted(content(tokens.directory)) == [*names, "tokens.json"]


@pytest.mark.parametrize("num_kept", [3, 5])
def test_rows_are_read_in_any_order_from_all_shards(tokens, num_kept):
    batch = tokens.batch([9, 0, 4, 0], num_kept)
    first = torch.tensor([9000, 0, 4000, 0])
    assert torch.equal(batch.indices, first[:, None] + torch.arange(num_kept))
    position = torch.tensor([9, 0, 4, 0])[:, None]
    assert torch.equal(batch.source.index, (position + torch.arange(6)) % num_kept)
    assert batch.source.num_kept == num_kept
    assert batch.label.tolist() == [1, 0, 0, 0]


def test_an_opened_folder_says_what_it_is(tokens):
    assert tokens.record == RECORD
    assert tokens.num_kept == (3, 5)
    assert len(tokens) == 10
    assert (RECORD.num_tokens, RECORD.num_classes, RECORD.num_shards) == (6, 2, 3)
    written = json.loads((tokens.directory / "tokens.json").read_text())
    assert (written["kind"], written["format_version"]) == ("tokens", 2)
    assert written["environments"] == [ENVIRONMENT]


def test_mirror_images_have_rows_of_their_own(tmp_path):
    tokens = write_all(tmp_path / "tokens", replace(RECORD, flip=True))
    assert len(tokens) == 20
    origin = tokens.origin([0, 1, 18, 19])
    assert origin.position.tolist() == [0, 0, 9, 9]
    assert origin.mirrored.tolist() == [0, 1, 0, 1]


def test_images_that_cannot_be_read_have_names_and_no_rows(tmp_path):
    tokens = write_all(tmp_path / "tokens", broken=(1, 4, 5, 6, 7))
    assert tokens.broken == ("1.png", "4.png", "5.png", "6.png", "7.png")
    assert len(tokens) == 5
    assert tokens.origin(range(5)).position.tolist() == [0, 2, 3, 8, 9]


@pytest.mark.parametrize(
    ("num_bits", "dtype"),
    [
        (8, torch.uint8),
        (9, torch.uint16),
        (16, torch.uint16),
        (18, torch.uint32),
        (32, torch.uint32),
        (33, torch.int64),
        (63, torch.int64),
    ],
)
def test_indices_take_the_smallest_type_that_holds_the_last_code(tmp_path, num_bits, dtype):
    record = replace(RECORD, sizes=(2**num_bits,), num_kept=(3,), num_images=1)
    rows = rows_of(record, 0, 3)
    last = 2**num_bits - 1
    rows = rows._replace(parts=torch.tensor([[[last], [0], [last - 1]]]))
    claim(tmp_path, record, ENVIRONMENT)
    write_shard(tmp_path, record, 0, rows, broken=[])
    finish(tmp_path)
    assert load_file(tmp_path / "k00003/tokens-00000.safetensors")["indices"].dtype == dtype
    assert open_tokens(tmp_path).batch([0]).indices.tolist() == [[last, 0, last - 1]]


@pytest.mark.parametrize(("num_kept", "dtype"), [(256, torch.uint8), (257, torch.uint16)])
def test_the_source_takes_the_smallest_type_that_holds_the_last_token(tmp_path, num_kept, dtype):
    record = replace(RECORD, num_kept=(num_kept,), grid_shape=(20, 20), num_images=1)
    claim(tmp_path, record, ENVIRONMENT)
    rows = rows_of(record, 0, num_kept)
    write_shard(tmp_path, record, 0, rows, broken=[])
    finish(tmp_path)
    path = tmp_path / f"k{num_kept:05d}/tokens-00000.safetensors"
    assert load_file(path)["source"].dtype == dtype
    assert torch.equal(open_tokens(tmp_path).batch([0]).source.index, rows.source)


def test_a_number_of_tokens_has_to_be_named_where_there_are_several(tokens):
    with pytest.raises(ValueError, match=r"num_kept \(None\) must be 3 or 5, of which .*tokens"):
        tokens.batch([0])
    with pytest.raises(ValueError, match=r"num_kept \(4\) must be 3 or 5"):
        tokens.batch([0], 4)


def test_the_only_number_of_tokens_need_not_be_named(tmp_path):
    tokens = write_all(tmp_path / "tokens", replace(RECORD, num_kept=(5,)))
    assert_same([tokens.batch([2])], [tokens.batch([2], 5)])


@pytest.mark.parametrize("position", [-1, 10])
def test_a_row_that_is_not_there_is_an_error(tokens, position):
    with pytest.raises(ValueError, match=rf"position \({position}\) must be in \[0, 10\)"):
        tokens.batch([0, position], 3)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"num_kept": ()}, r"num_kept \(\) must be different numbers in order"),
        ({"num_kept": (5, 3)}, r"num_kept \(5, 3\) must be"),
        ({"num_kept": (3, 3)}, r"num_kept \(3, 3\) must be"),
        ({"num_images": 0}, r"num_images \(0\) must be at least 1"),
        ({"shard_size": 0}, r"shard_size \(0\) must be at least 1"),
    ],
)
def test_a_record_that_cannot_be_is_an_error(values, message):
    with pytest.raises(ValueError, match=message):
        replace(RECORD, **values)


# --------------------------------------------------------------------------- stopped and resumed


def test_rows_alone_decide_the_bytes(tmp_path):
    write_all(tmp_path / "first")
    write_all(tmp_path / "second")
    assert content(tmp_path / "first") == content(tmp_path / "second")


def test_shards_that_are_there_are_not_missing(tmp_path):
    claim(tmp_path, RECORD, ENVIRONMENT)
    write_shard(tmp_path, RECORD, 1, rows_of(RECORD, 1, 3), broken=[])
    assert missing_shards(tmp_path, RECORD, range(3)) == {0: (3, 5), 1: (5,), 2: (3, 5)}
    write_shard(tmp_path, RECORD, 1, rows_of(RECORD, 1, 5), broken=[])
    assert missing_shards(tmp_path, RECORD, [1, 2]) == {2: (3, 5)}


def test_a_shard_that_is_not_whole_is_not_there(tmp_path, monkeypatch):
    def fail(descriptor):
        raise OSError("No space left on device")

    claim(tmp_path, RECORD, ENVIRONMENT)
    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="No space left"):
        write_shard(tmp_path, RECORD, 0, rows_of(RECORD, 0, 3), broken=[])
    assert missing_shards(tmp_path, RECORD, [0]) == {0: (3, 5)}


def test_a_complete_folder_is_left_as_it_is(tokens):
    before = content(tokens.directory)
    claim(tokens.directory, RECORD, ENVIRONMENT | {"torch": "3.0.0"})
    finish(tokens.directory)
    assert content(tokens.directory) == before


def test_a_shard_that_was_deleted_is_written_again(tokens):
    before = content(tokens.directory)
    (tokens.directory / "k00003/tokens-00001.safetensors").unlink()
    write_all(tokens.directory)
    assert content(tokens.directory) == before


def test_every_environment_that_wrote_is_kept(tmp_path):
    other = ENVIRONMENT | {"torch": "3.0.0"}
    for environment in (ENVIRONMENT, other, ENVIRONMENT):
        claim(tmp_path, RECORD, environment)
    written = json.loads((tmp_path / "tokens.json").read_text())
    assert written["environments"] == [ENVIRONMENT, other]


def test_the_same_images_at_another_path_are_the_same_tokens(tokens):
    before = content(tokens.directory)
    assert claim(tokens.directory, replace(RECORD, data="./elsewhere"), ENVIRONMENT)
    assert content(tokens.directory) == before


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("tokenizer", "c" * 64),
        ("num_kept", (3,)),
        ("sizes", (2**16,)),
        ("grid_shape", (3, 2)),
        ("images", "c" * 64),
        ("num_images", 11),
        ("class_names", ("cat",)),
        ("flip", True),
        ("shard_size", 8),
    ],
)
def test_other_tokens_do_not_go_into_the_same_folder(tokens, name, value):
    before = content(tokens.directory)
    there, here = (
        re.escape(str(list(v) if isinstance(v, tuple) else v))
        for v in (getattr(RECORD, name), value)
    )
    with pytest.raises(ValueError, match=f"holds other tokens .*\n  {name}: {there} there, {here}"):
        claim(tokens.directory, replace(RECORD, **{name: value}), ENVIRONMENT)
    assert content(tokens.directory) == before


def test_a_long_difference_is_abridged(tokens):
    names = tuple(f"class {number}" for number in range(1000))
    with pytest.raises(
        ValueError, match=r"class_names: \['cat', 'dog'\] there, \['class 0'.*\.\. "
    ):
        claim(tokens.directory, replace(RECORD, class_names=names), ENVIRONMENT)


# ---------------------------------------------------------------------------- what is not right


def test_tokens_of_another_tokenizer_are_refused():
    require_tokenizer(RECORD, "a" * 64)
    with pytest.raises(ValueError, match=f"are of tokenizer {'a' * 64} and must be of {'c' * 64}"):
        require_tokenizer(RECORD, "c" * 64)


def test_a_folder_without_tokens_is_an_error(tmp_path):
    with pytest.raises(
        ValueError, match=r"holds no tokens: there is no tokens\.json; `mergevq enc"
    ):
        open_tokens(tmp_path)


def test_a_folder_that_is_not_complete_is_not_opened(tmp_path):
    claim(tmp_path, RECORD, ENVIRONMENT)
    with pytest.raises(ValueError, match="is not complete; run the same `mergevq encode` again"):
        open_tokens(tmp_path)


def test_a_folder_is_not_sealed_before_it_is_complete(tmp_path):
    claim(tmp_path, RECORD, ENVIRONMENT)
    for num_kept in (3, 5):
        write_shard(tmp_path, RECORD, 0, rows_of(RECORD, 0, num_kept), broken=[])
    with pytest.raises(
        RuntimeError, match=r"k00003/tokens-00001\.safetensors is missing, and 1 mo"
    ):
        finish(tmp_path)


def test_a_damaged_shard_is_named_when_it_is_first_read(tokens):
    damage(tokens.directory / "k00005/tokens-00001.safetensors")
    tokens.batch([0, 3, 8], 5)
    tokens.batch([4], 3)
    with pytest.raises(RuntimeError, match=r"k00005/tokens-00001\.safetensors is damaged or repl"):
        tokens.batch([0, 4], 5)


def test_a_shard_of_another_place_is_not_read(tokens):
    group = tokens.directory / "k00003"
    (group / "tokens-00001.safetensors").write_bytes(
        (group / "tokens-00000.safetensors").read_bytes()
    )
    with pytest.raises(RuntimeError, match=r"tokens-00001\.safetensors is damaged or replaced"):
        tokens.batch([4], 3)


def test_a_shard_that_is_gone_is_named(tokens):
    (tokens.directory / "k00003/tokens-00002.safetensors").unlink()
    with pytest.raises(RuntimeError, match=r"k00003/tokens-00002\.safetensors is missing; run"):
        tokens.batch([8], 3)


def test_a_damaged_shard_is_not_kept(tokens):
    damage(tokens.directory / "k00003/tokens-00001.safetensors")
    (tokens.directory / "k00003/tokens-00000.safetensors").unlink()
    with pytest.raises(RuntimeError, match=r"k00003/tokens-00001\.safetensors is damaged"):
        claim(tokens.directory, RECORD, ENVIRONMENT)


def test_half_a_shard_is_not_kept(tmp_path):
    claim(tmp_path, RECORD, ENVIRONMENT)
    write_shard(tmp_path, RECORD, 0, rows_of(RECORD, 0, 3), broken=[])
    path = tmp_path / "k00003/tokens-00000.safetensors"
    path.write_bytes(path.read_bytes()[:-3])
    with pytest.raises(RuntimeError, match=r"k00003/tokens-00000\.safetensors is damaged \(.*dele"):
        claim(tmp_path, RECORD, ENVIRONMENT)


def test_all_numbers_of_tokens_are_of_the_same_images(tmp_path):
    record = replace(RECORD, num_images=4)
    claim(tmp_path, record, ENVIRONMENT)
    write_shard(tmp_path, record, 0, rows_of(record, 0, 3), broken=[])
    write_shard(tmp_path, record, 0, rows_of(record, 0, 5, broken=(2,)), broken=["2.png"])
    with pytest.raises(RuntimeError, match=r"k00005/.* has other images than .*k00003/"):
        finish(tmp_path)


# -------------------------------------------------------------------------- a stranger's folder


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"indices": np.full((4, 3), 2**18, np.int64)}, r"indices .* must be between 0 and 262143"),
        ({"indices": np.full((4, 3), -1, np.int64)}, r"indices \(-1 to -1\) must be between 0"),
        ({"indices": np.zeros((4, 4), np.int64)}, r"indices has the shape \(4, 4\) and must have"),
        ({"indices": np.zeros((4, 3), np.float32)}, "must hold whole numbers"),
        ({"source": np.full((4, 6), 3, np.int64)}, r"source \(3 to 3\) must be between 0 and 2"),
        ({"label": np.full(4, 2, np.int64)}, r"label \(2 to 2\) must be between -1 and 1"),
        ({"label": np.zeros((), np.int64)}, r"label has the shape \(\) and must have \(4,\)"),
        ({"position": np.full(4, 10, np.int64)}, r"position \(10 to 10\) must be between 0 and 9"),
        ({"mirrored": np.full(4, 2, np.int64)}, r"mirrored \(2 to 2\) must be between 0 and 1"),
        ({"mirrored": None}, "does not contain tensor mirrored"),
        ({"metadata": {}}, "a list of names"),
        ({"metadata": {"broken": "[1]"}}, "a list of names"),
        ({"metadata": {"broken": "["}}, "broken is not JSON"),
    ],
)
def test_a_shard_of_other_numbers_than_its_record_says_is_damaged(tokens, changes, message):
    forge(tokens.directory, **changes)
    with pytest.raises(RuntimeError, match=rf"is damaged.*{message}"):
        open_tokens(tokens.directory).batch([0], 3)


@pytest.mark.parametrize(
    "change",
    [
        lambda record: record.pop("record"),
        lambda record: record.update(record=[]),
        lambda record: record.update(environments=3),
        lambda record: record.update(shards=[]),
        lambda record: record.update(broken=3),
        lambda record: record["shards"].pop("3"),
        lambda record: record["shards"]["3"].pop(),
        lambda record: record["shards"].update({"3": 5}),
        lambda record: record["shards"]["3"].append(7),
        lambda record: record["shards"]["3"].__setitem__(0, 7),
        lambda record: record["shards"]["3"][0].update(num_rows="4"),
        lambda record: record["shards"]["3"][0].update(num_rows=-4),
        lambda record: record["shards"]["3"][0].update(num_rows=3),
        lambda record: record["shards"]["3"][0].pop("sha256"),
        lambda record: record["record"].update(grid_shape=[0, 3]),
        lambda record: record["record"].update(sizes=[1, 4]),
        lambda record: record["record"].update(num_kept=[3, 7]),
        lambda record: record["record"].update(num_images=10**18),
    ],
)
def test_a_record_that_is_not_one_is_a_clear_error(tokens, change):
    change_record(tokens.directory, change)
    with pytest.raises(ValueError, match=r"tokens.json is damaged|must be|must have"):
        open_tokens(tokens.directory)


def test_a_shard_that_is_a_pipe_is_not_waited_for(tokens):
    path = tokens.directory / "k00003/tokens-00000.safetensors"
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(RuntimeError, match="is missing"):
        open_tokens(tokens.directory).batch([0], 3)


# ------------------------------------------------------------------------- loops of other people


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_data_loader_gives_what_the_files_have(tokens, num_workers):
    start = "fork" if num_workers else None
    if num_workers and start not in multiprocessing.get_all_start_methods():
        pytest.skip("other ways to start a worker import torch anew, for seconds")
    dataset = open_tokens(tokens.directory, 5)
    assert dataset[0]["indices"].shape == (5,)  # Mapped here, and again in each worker.
    loader = DataLoader(
        dataset, batch_size=4, num_workers=num_workers, multiprocessing_context=start
    )
    batches = list(loader)
    expected = tokens.batch(range(len(tokens)), 5)
    assert torch.equal(torch.cat([batch["indices"] for batch in batches]), expected.indices)
    assert torch.equal(torch.cat([batch["source"] for batch in batches]), expected.source.index)
    assert torch.equal(torch.cat([batch["label"] for batch in batches]), expected.label)


def test_a_row_comes_from_either_end_and_a_pass_ends(tokens):
    dataset = open_tokens(tokens.directory, 3)
    assert len(list(dataset)) == len(dataset)
    assert torch.equal(dataset[-1]["indices"], dataset[len(dataset) - 1]["indices"])
    assert torch.equal(dataset.subset([4, 2])[1]["indices"], dataset[2]["indices"])
    with pytest.raises(IndexError, match=r"must be in \[-\d+, \d+\)"):
        dataset[len(dataset)]


def test_a_row_of_several_numbers_of_tokens_is_an_error_that_lists_them(tokens):
    with pytest.raises(ValueError, match=r"num_kept \(None\) must be 3 or 5"):
        tokens[0]
    with pytest.raises(ValueError, match=r"num_kept \(4\) must be 3 or 5"):
        open_tokens(tokens.directory, 4)


def test_a_copy_for_a_worker_holds_no_mapped_file(tokens):
    dataset = open_tokens(tokens.directory, 3)
    assert torch.equal(pickle.loads(pickle.dumps(dataset))[1]["source"], dataset[1]["source"])
    assert len(pickle.dumps(dataset)) == len(pickle.dumps(open_tokens(tokens.directory, 3)))
