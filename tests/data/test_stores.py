"""Shards of a stranger: whatever they declare, they are read or refused in one sentence."""

import io
import os
import struct
import tarfile

import numpy as np
import pytest

from mergevq.data.images import open_images
from mergevq.data.prepare import BrokenImageError
from tests.data.test_images import encoded, labels, names, write_parquet, write_tar


def header(name, size=0, kind=tarfile.REGTYPE, **options):
    info = tarfile.TarInfo(name)
    info.size, info.type = size, kind
    for key, value in options.items():
        setattr(info, key, value)
    return info.tobuf(tarfile.GNU_FORMAT)


def padded(data):
    return data + bytes(-len(data) % 512)


def pax(**records):
    """A header of extended records."""
    lines = b""
    for key, value in records.items():
        line = f" {key}={value}\n".encode()
        length = len(line) + len(str(len(line) + 2))
        lines += f"{length}".encode() + line
    return header("pax", len(lines), tarfile.XHDTYPE) + padded(lines)


def write_raw(path, *blocks):
    path.write_bytes(b"".join(blocks) + bytes(1024))
    return str(path)


# Tar


def test_names_with_more_dots_are_counted_not_lost(tmp_path, caplog):
    shard = {"IMG_2020.01.05.png": encoded(), "b.png": encoded(), "IMG_2021.01.05.png": encoded()}
    dataset = open_images(str(write_tar(tmp_path / "s.tar", shard)))
    assert names(dataset) == ["s.tar:b"]
    assert len(dataset.unused) == 2
    assert "2 not used, the first is 's.tar:IMG_2020.01.05.png': its key ends at the" in caplog.text


def test_a_second_picture_under_one_key_is_counted(tmp_path, caplog):
    shard = {"a.png": encoded(), "a.jpg": encoded(kind="JPEG"), "a.heic": b"", "a.txt": b""}
    dataset = open_images(str(write_tar(tmp_path / "s.tar", shard)))
    assert names(dataset) == ["s.tar:a"]
    assert len(dataset.unused) == 2
    assert "1 not used, the first is 's.tar:a.jpg': a second picture under one key" in caplog.text


def test_links_in_a_shard_are_counted_and_folders_and_hidden_files_are_not(tmp_path):
    picture = encoded()
    path = write_raw(
        tmp_path / "s.tar",
        header("d/", kind=tarfile.DIRTYPE),
        header("./d/a.png", len(picture)) + padded(picture),
        header("d/b.png", kind=tarfile.SYMTYPE, linkname="a.png"),
        header("d/._a.png", 3) + padded(b"abc"),
        header("@eaDir/a.png", 3) + padded(b"abc"),
    )
    dataset = open_images(path)
    assert names(dataset) == ["s.tar:./d/a"]
    assert dataset.unused.found == {"links are not followed in a shard": (1, "s.tar:d/b.png")}


@pytest.mark.parametrize("number", ["99999999999999999999", "1048576", "-2"])
@pytest.mark.parametrize("ending", ["cls", "json"])
def test_a_number_that_is_no_class_is_named(tmp_path, number, ending):
    content = number if ending == "cls" else f'{{"label": {number}}}'
    shard = {"a.png": encoded(), f"a.{ending}": content.encode()}
    with pytest.raises(ValueError, match=rf"a\.{ending} in .*s\.tar' must hold a class number"):
        open_images(str(write_tar(tmp_path / "s.tar", shard)))


def test_deep_json_beside_an_image_is_named(tmp_path):
    shard = {"a.png": encoded(), "a.json": b"[" * 100_000}
    with pytest.raises(ValueError, match=r"a\.json in .*s\.tar' holds no class number"):
        open_images(str(write_tar(tmp_path / "s.tar", shard)))


def test_a_label_of_gigabytes_is_not_read(tmp_path):
    picture, size = encoded(), 6 * 2**30
    path = tmp_path / "s.tar"
    with path.open("wb") as file:
        file.write(header("a.png", len(picture)) + padded(picture) + header("a.cls", size))
        file.seek(size, os.SEEK_CUR)
        file.write(bytes(1024))
    with pytest.raises(ValueError, match=r"a\.cls in .* has 6,442,450,944 bytes; 1,048,576 are"):
        open_images(str(path))


def test_an_image_of_gigabytes_is_broken_and_not_read(tmp_path):
    path, size = tmp_path / "s.tar", 6 * 2**30
    with path.open("wb") as file:
        file.write(header("a.png", size))
        file.seek(size, os.SEEK_CUR)
        file.write(header("b.png", len(encoded())) + padded(encoded()) + bytes(1024))
    dataset = open_images(str(path))
    assert list(dataset.broken) == ["s.tar:a"]
    with pytest.raises(BrokenImageError, match=r"s\.tar:a: 6,442,450,944 bytes are more than"):
        dataset.read(0)


def sparse(size, name="a.png"):
    """A file whose zeros are left out, in the oldest of the ways of GNU."""
    block = bytearray(header(name, 512, tarfile.GNUTYPE_SPARSE))
    block[386:410] = b"00000000000\0" + b"00000001000\0"
    block[483:495] = struct.pack(">BxxxQ", 0x80, size)
    block[148:156] = b" " * 8
    block[148:156] = f"{sum(block):06o}\0 ".encode()
    return bytes(block) + bytes(512)


@pytest.mark.parametrize(
    "blocks",
    [
        [header("a.png", 2**40)],
        [pax(size=2**40), header("a.png", 4), padded(b"abcd")],
        [pax(size=-(2**40)), header("a.png", 4), padded(b"abcd")],
        [pax(size=-512), header("a.png", 4), padded(b"abcd")],
        [pax(size=2**70), header("a.png", 4), padded(b"abcd")],
        [header("pax", 2**40, tarfile.XHDTYPE)],
        [header("name", 2**40, tarfile.GNUTYPE_LONGNAME)],
        [pax(a="b")] * 3000 + [header("a.png", 4), padded(b"abcd")],
        [sparse(2**40)],
    ],
    ids=[
        "size",
        "pax size",
        "negative",
        "backwards",
        "beyond an offset",
        "pax header",
        "long name",
        "a thousand headers",
        "sparse",
    ],
)
def test_forged_headers_are_refused_in_one_sentence(tmp_path, blocks):
    path = write_raw(tmp_path / "s.tar", *blocks)
    with pytest.raises(ValueError, match=r"shard .*s\.tar is damaged|holds no images; 1 not used"):
        open_images(path)


def test_a_label_whose_zeros_are_left_out_is_refused(tmp_path):
    path = write_raw(tmp_path / "s.tar", sparse(3, "a.cls"))
    with pytest.raises(ValueError, match=r"a\.cls in .*s\.tar' has 3 bytes"):
        open_images(path)


# Parquet


def table_of(path, columns, metadata=None):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    names, arrays = zip(*columns, strict=True)
    table = pyarrow.Table.from_arrays([pyarrow.array(array) for array in arrays], names=names)
    if metadata is not None:
        table = table.replace_schema_metadata({"huggingface": metadata})
    parquet.write_table(table, path)
    return str(path)


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ("{", "is not JSON"),
        ("null", "must be a JSON object"),
        ("[1]", "must be a JSON object"),
        ('{"info": null}', "must be a JSON object"),
        ('{"info": {"features": {"label": {"names": 3}}}}', "must name the classes in a list"),
        ('{"info": {"features": {"label": {"names": [1]}}}}', "must name the classes in a list"),
        ('{"info": {"features": {"label": 3}}}', "must name the classes in a list"),
        ("[" * 100_000, "is nested more deeply"),
    ],
)
def test_metadata_that_say_no_classes_are_one_sentence(tmp_path, metadata, message):
    path = table_of(tmp_path / "a.parquet", [("image", [encoded()])], metadata)
    with pytest.raises(ValueError, match=rf"metadata 'huggingface' of .*a\.parquet {message}"):
        open_images(path)


@pytest.mark.parametrize("metadata", ["{}", '{"info": {"features": {"label": {"names": null}}}}'])
def test_metadata_without_classes_are_fine(tmp_path, metadata):
    path = table_of(tmp_path / "a.parquet", [("image", [encoded()])], metadata)
    assert labels(open_images(path)) == [-1]


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ([("image", [{"path": "x"}])], r"column 'image' is struct<path: string> and must be"),
        ([("image", [{"bytes": "x"}])], r"column 'image\.bytes' is string and must be"),
        ([("image", ["x"])], r"column 'image' is string and must be the bytes"),
        ([("image", [[b"x"]])], r"column 'image' is list<"),
        ([("image", [b"x"]), ("image", [b"x"])], r"one of 'image' and 'img' and one"),
        ([("image", [b"x"]), ("img", [b"x"])], r"one of 'image' and 'img' and one"),
        ([("image", [b"x"]), ("label", [1]), ("label", [1])], r"one of 'image' and 'img' and"),
    ],
)
def test_columns_that_cannot_be_used_are_named(tmp_path, columns, message):
    path = table_of(tmp_path / "a.parquet", columns)
    with pytest.raises(ValueError, match=rf"a\.parquet.* {message}"):
        open_images(path)


def test_a_label_of_twenty_digits_is_named(tmp_path):
    columns = [("image", [encoded()]), ("label", np.array([2**64 - 1], dtype=np.uint64))]
    path = table_of(tmp_path / "a.parquet", columns)
    with pytest.raises(ValueError, match=r"a\.parquet.* 18446744073709551615"):
        open_images(path)


def test_values_far_larger_than_their_file_are_not_read(tmp_path, monkeypatch):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    monkeypatch.setattr("mergevq.data.stores._HARMLESS_BYTES", 2**20)
    table = pyarrow.table({"image": [bytes(2**21)]})
    parquet.write_table(table, tmp_path / "a.parquet", compression="zstd")
    assert (tmp_path / "a.parquet").stat().st_size < 2**12
    with pytest.raises(ValueError, match=r"row group 0 declares 2,097,\d+ bytes of images in"):
        open_images(str(tmp_path))


def test_equal_images_may_shrink(tmp_path):
    path = write_parquet(tmp_path / "a.parquet", [bytes(2**20)] * 40 + [encoded()])
    assert open_images(str(path)).read(40).size == (4, 4)


def test_more_rows_than_a_file_can_have_are_refused(tmp_path, monkeypatch):
    path = table_of(tmp_path / "a.parquet", [("image", [b"a"] * 5000)])
    monkeypatch.setattr("mergevq.data.stores._FEW_ROWS", 10)
    with pytest.raises(ValueError, match=r"declares 5,000 rows, 5,000 in its row groups, in"):
        open_images(path)


def test_an_image_above_the_limit_of_bytes_is_broken(tmp_path, monkeypatch):
    monkeypatch.setattr("mergevq.data.images.most_bytes", lambda _: 1000)
    path = write_parquet(tmp_path / "a.parquet", [bytes(1001), encoded()])
    dataset = open_images(str(path))
    assert dataset.broken == {
        "a.parquet:0": "cannot read a.parquet:0: 1,001 bytes are more than the 1,000 that are read "
        "of one image"
    }


def test_a_thousand_columns_are_not_listed(tmp_path):
    path = table_of(tmp_path / "a.parquet", [(f"c{number}", [1]) for number in range(1000)])
    with pytest.raises(ValueError, match=r"'c19', \.\.\]; it needs 'image'"):
        open_images(path)


def test_material_of_these_tests_is_a_shard(tmp_path):
    picture = encoded()
    path = write_raw(
        tmp_path / "s.tar", pax(comment="x"), header("a.png", len(picture)), padded(picture)
    )
    assert open_images(path).read(0).size == (4, 4)
    with tarfile.open(fileobj=io.BytesIO(sparse(2**20) + bytes(1024))) as tar:
        assert tar.next().issparse()
