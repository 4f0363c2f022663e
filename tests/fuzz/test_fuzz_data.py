"""Damaged and forged data are used, or refused in a message of ours.

Every mutation is numbered and depends on its number alone: to see one again, call `attempt` with
it. Numbers that guard content (checksums, CRCs) are mostly made to fit again, as a forger would, so
that whatever lies behind them is met too.
"""

import io
import json
import shutil
import struct
import tarfile
import warnings
import zipfile
import zlib
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mergevq.cli.errors import speaks_for_itself
from mergevq.config.training import DataConfig
from mergevq.data.arrays import ImageArray
from mergevq.data.batches import eval_batches, open_train_val
from mergevq.data.images import open_images
from mergevq.data.prepare import FORMATS, BrokenImageError, load_picture
from tests.fuzz.test_fuzz_models import (
    STRANGE,
    TEXTS,
    bounded,
    mutate_bytes,
    mutate_file,
    needs_linux,
    pick,
)

SIZES = [0, 1, 3, 255, 2**15, 2**16, 2**28, 2**31 - 1, 2**31, 2**32 - 1]
CLASSES = ("cat", "dog")


# ------------------------------------------------------------------------------------ material


def picture(number: int, kind: str = "PNG", mode: str = "RGB") -> bytes:
    """A noisy picture as a file."""
    pixels = np.random.default_rng(number).integers(0, 256, (6 + number, 7, 4), np.uint8)
    image = Image.fromarray(pixels, "RGBA").convert(mode)
    file = io.BytesIO()
    image.save(file, kind)
    return file.getvalue()


def write_pictures(folder: Path) -> None:
    """A folder with a picture of each format, and of several modes."""
    for number, (kind, endings) in enumerate(FORMATS.items()):
        path = folder / CLASSES[number % 2] / f"{number}{endings[0]}"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(picture(number, kind))
    for number, mode in enumerate(("L", "LA", "RGBA", "P", "1", "I;16")):
        source = Image.open(io.BytesIO(picture(number)))
        image = source.convert("L").convert("I;16") if mode == "I;16" else source.convert(mode)
        image.save(folder / "cat" / f"mode-{number}.png")
    Image.open(io.BytesIO(picture(3))).save(folder / "dog" / "c.tiff", compression="tiff_lzw")


def write_shards(folder: Path) -> None:
    """Two tar shards, with labels beside the images."""
    for shard in range(2):
        with tarfile.open(folder / f"s-{shard}.tar", "w", format=tarfile.PAX_FORMAT) as tar:
            for number in range(3):
                members = {
                    f"{number}.png": picture(number),
                    f"{number}.cls": str(number % 2).encode(),
                    f"{number}.json": json.dumps({"label": number % 2, "text": "x"}).encode(),
                }
                for name, content in members.items():
                    info = tarfile.TarInfo(name)
                    info.size = len(content)
                    tar.addfile(info, io.BytesIO(content))


def table(images, labels, features):
    """A table in the layout of Hugging Face."""
    pyarrow = pytest.importorskip("pyarrow")
    found = pyarrow.table({"image": images, "label": labels})
    return found.replace_schema_metadata({"huggingface": features})


FEATURES = json.dumps({"info": {"features": {"label": {"names": CLASSES, "_type": "ClassLabel"}}}})


def write_parquet(folder: Path) -> None:
    """Two parquet files of several row groups."""
    parquet = pytest.importorskip("pyarrow.parquet")
    for number in range(2):
        images = [{"bytes": picture(row), "path": f"{row}.png"} for row in range(4)]
        file = folder / f"{number}.parquet"
        parquet.write_table(table(images, [0, 1, 1, 0], FEATURES), file, row_group_size=2)


def write_array(folder: Path) -> None:
    """Images as one array."""
    np.savez_compressed(folder / "a.npz", np.zeros((5, 4, 6, 3), np.uint8))
    np.savez(folder / "b.npz", np.zeros((5, 4, 6, 3), np.uint8))


@pytest.fixture(scope="module")
def material(tmp_path_factory) -> Path:
    """One whole folder of each kind."""
    folder = tmp_path_factory.mktemp("material")
    for kind, write in WRITERS.items():
        (folder / kind).mkdir()
        write(folder / kind)
    return folder


WRITERS = {
    "pictures": write_pictures,
    "tar": write_shards,
    "parquet": write_parquet,
    "array": write_array,
}


# ---------------------------------------------------------------------------------------- uses


def use_images(folder: Path) -> None:
    """Read every image, split the data, and make batches."""
    dataset = open_images(str(folder))
    for index in range(len(dataset)):
        dataset.label(index)
        with suppress(BrokenImageError):
            assert dataset.read(index).mode == "RGB"
    train, _ = open_train_val(DataConfig(path=str(folder), val_fraction=0.3))
    list(eval_batches(train, image_size=8, batch_size=4, num_workers=0))


def use_pictures(folder: Path) -> None:
    """Use them as data, and each by itself."""
    for path in sorted(folder.rglob("*.*")):
        with suppress(ValueError):
            load_picture(path)
    use_images(folder)


def use_arrays(folder: Path) -> None:
    """Read both, in batches."""
    for path in sorted(folder.glob("*.npz")):
        for batch in ImageArray(path).batches(2):
            assert batch.shape[1] == 3


USES = {"pictures": use_pictures, "tar": use_images, "parquet": use_images, "array": use_arrays}


# ----------------------------------------------------------------------------------- mutations


def mutate_png(content: bytes, numbers: np.random.Generator) -> bytes:
    """Change bytes of one chunk, and make its CRC fit."""
    chunks, place = [], 8
    while place < len(content):
        (length,) = struct.unpack(">I", content[place : place + 4])
        chunks.append(bytearray(content[place + 4 : place + 8 + length]))
        place += 12 + length
    chunk = pick(numbers, chunks)
    if chunk[:4] == b"IHDR" and numbers.random() < 0.7:
        struct.pack_into(">I", chunk, int(pick(numbers, [4, 8])), pick(numbers, SIZES))
    elif len(chunk) > 4:
        chunk[int(numbers.integers(4, len(chunk)))] = int(numbers.integers(256))
    parts = [struct.pack(">I", len(c) - 4) + c + struct.pack(">I", zlib.crc32(c)) for c in chunks]
    return content[:8] + b"".join(parts)


def mutate_numbers(content: bytes, numbers: np.random.Generator) -> bytes:
    """Write a number that matters to sizes over four bytes near the beginning."""
    data = bytearray(content)
    order = pick(numbers, ["<I", ">I", "<H", ">H"])
    number = pick(numbers, SIZES) % 2 ** (8 * struct.calcsize(order))
    struct.pack_into(order, data, int(numbers.integers(min(len(data), 200) - 4)), number)
    return bytes(data)


def mutate_picture(file: Path, numbers: np.random.Generator) -> None:
    """Change a picture in a way of its format."""
    content = file.read_bytes()
    is_png = file.suffix == ".png" and numbers.random() < 0.8
    file.write_bytes((mutate_png if is_png else mutate_numbers)(content, numbers))


def mutate_tar(file: Path, numbers: np.random.Generator) -> None:
    """Change a header with its checksum, the content of a label, or add a header."""
    data = bytearray(file.read_bytes())
    with tarfile.open(file) as tar:
        member = pick(numbers, tar.getmembers())
    start = member.offset
    way = numbers.integers(6)
    if way == 0:
        content = str(pick(numbers, STRANGE)).encode()[:512]
        content = pick(numbers, [content, *TEXTS])[:512]
        data[member.offset_data : member.offset_data + len(content)] = content
        data[start + 124 : start + 136] = f"{len(content):011o}\0".encode()
    elif way == 1:
        size = pick(numbers, [*SIZES, 2**33 - 1])
        data[start + 124 : start + 136] = f"{size:011o}\0".encode()[-12:]
    elif way == 2:
        size = int(pick(numbers, [2**40, 2**62, 2**70, -1, -512, -(2**40)]))
        data[start + 124 : start + 136] = (b"\x80" if size > 0 else b"\xff") + size.to_bytes(
            11, "big", signed=True
        )
    elif way == 3:
        kinds = b"012345678gxLKSVAD\0\xff"
        data[start + 156] = pick(numbers, kinds)
    elif way == 4:
        data[start + int(numbers.integers(148))] = int(numbers.integers(256))
    else:
        record = pick(
            numbers,
            [
                b"22 size=1099511627776\n",
                b"13 size=-512\n",
                b"11 path=\n\n",
                b"99999999999 a=b\n",
                b"26 GNU.sparse.realsize=99\n",
                b"22 GNU.sparse.major=1\n22 GNU.sparse.minor=0\n",
                b"23 GNU.sparse.map=0,99\n",
                b"-3 a=b\n",
                b"\xff" * 30,
            ],
        )
        info = tarfile.TarInfo("x")
        info.size, info.type = len(record), pick(numbers, [b"x", b"g"])
        block = info.tobuf(tarfile.GNU_FORMAT) + record.ljust(512, b"\0")
        data[start:start] = block * int(pick(numbers, [1, 2, 2000]))
    if way < 5 and numbers.random() < 0.9:
        head = data[start : start + 512]
        head[148:156] = b" " * 8
        data[start + 148 : start + 156] = f"{sum(head):06o}\0 ".encode()
    file.write_bytes(data)


def mutate_parquet(file: Path, numbers: np.random.Generator) -> None:
    """Change the footer, or write other columns, labels or names of classes."""
    pyarrow, parquet = (pytest.importorskip(f"pyarrow{part}") for part in ("", ".parquet"))
    if numbers.random() < 0.5:
        data = bytearray(file.read_bytes())
        (length,) = struct.unpack("<I", data[-8:-4])
        for _ in range(int(pick(numbers, [1, 1, 2, 8]))):
            place = len(data) - 8 - int(numbers.integers(1, length + 1))
            data[place] = int(pick(numbers, [numbers.integers(256), 0, 255, 127, 128]))
        file.write_bytes(data)
        return
    images = [{"bytes": picture(row), "path": "x"} for row in range(3)]
    plain = [picture(row) for row in range(3)]
    columns = {"image": images, "label": [0, 1, 0]}
    features, way = FEATURES, numbers.integers(5)
    if way == 0:
        features = pick(numbers, [pick(numbers, TEXTS), json.dumps(pick(numbers, STRANGE))])
    elif way == 1:
        inner = json.loads(FEATURES)
        target = pick(numbers, [inner, inner["info"], inner["info"]["features"]])
        target[next(iter(target))] = pick(numbers, STRANGE)
        features = json.dumps(inner)
    elif way == 2:
        columns["label"] = pick(
            numbers,
            [
                [None] * 3,
                ["a", "b", "c"],
                [0.5, 1, 2],
                [[1]] * 3,
                [2**62, -5, 1],
                [True, False, True],
                [{"a": 1}] * 3,
                np.array([2**64 - 1] * 3, np.uint64),
            ],
        )
    elif way == 3:
        columns["image"] = pick(
            numbers,
            [
                plain,
                [None] * 3,
                [{"path": "x"}] * 3,
                [{"bytes": None}] * 3,
                [{"bytes": "x"}] * 3,
                [{"bytes": [1]}] * 3,
                ["x"] * 3,
                [[b"x"]] * 3,
                [1, 2, 3],
                [bytes(2**24)] * 3,
            ],
        )
    else:
        columns[pick(numbers, ["img", "image.bytes", "label.x", "bytes"])] = plain
    made = pyarrow.table({name: pyarrow.array(values) for name, values in columns.items()})
    if numbers.random() < 0.2:
        made = made.append_column(pick(numbers, ["image", "label"]), pyarrow.array(plain))
    made = made.replace_schema_metadata({"huggingface": features})
    compression = pick(numbers, ["none", "zstd", "snappy", "gzip"])
    parquet.write_table(made, file, row_group_size=2, compression=compression)


def mutate_array(file: Path, numbers: np.random.Generator) -> None:
    """Write another array, or bytes of the archive over."""
    way = numbers.integers(3)
    if way == 0:
        shapes = [(), (0,), (3,), (2, 2, 2), (2, 2, 2, 4), (0, 4, 4, 3), (1, 0, 0, 3), (1, 2, 2, 3)]
        kind = pick(numbers, [np.uint8, np.int8, np.float32, np.complex64, "U3", bool])
        np.savez(file, np.zeros(pick(numbers, shapes), kind))
    elif way == 1:
        shape = pick(
            numbers,
            [
                "(5, 4, 6, 3)",
                "(1099511627776, 4, 6, 3)",
                "(1, 1099511627776, 1, 3)",
                "(-1, 4, 6, 3)",
                "(1, 65536, 65536, 3)",
                "(True, 4, 6, 3)",
                "(5, 4, 6.5, 3)",
                "None",
                "(" * 200 + ")" * 200,
            ],
        )
        text = f"{{'descr': '|u1', 'fortran_order': False, 'shape': {shape}, }}".encode()
        text = text.ljust(int(pick(numbers, [118, 2000])), b" ") + b"\n"
        version = pick(numbers, [b"\x01\x00", b"\x02\x00", b"\x03\x00", b"\x09\x00"])
        size = struct.pack("<H" if version[0] == 1 else "<I", len(text))
        head = b"\x93NUMPY" + version + size + text
        with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("arr_0.npy", head + bytes(int(pick(numbers, [0, 360, 2**22]))))
    else:
        file.write_bytes(mutate_numbers(file.read_bytes(), numbers))


OWN = {
    "pictures": mutate_picture,
    "tar": mutate_tar,
    "parquet": mutate_parquet,
    "array": mutate_array,
}


def attempt(material: Path, scratch: Path, number: int) -> str | None:
    """Make one mutation and use it; what is wrong with what happened, None if nothing."""
    kind = list(USES)[number % len(USES)]
    numbers = np.random.default_rng(number)
    folder = scratch / kind
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(material / kind, folder)
    file = pick(numbers, sorted(path for path in folder.rglob("*") if path.is_file()))
    way = numbers.random()
    if way < 0.05:
        mutate_file(file, numbers)
    elif way < 0.2:
        mutate_bytes(file, numbers)
    else:
        OWN[kind](file, numbers)
    try:
        with bounded(), warnings.catch_warnings(action="ignore"):
            USES[kind](folder)
    except Exception as error:  # noqa: BLE001 - whatever it is, it is reported
        if not speaks_for_itself(error):
            return f"mutation {number} of {kind}: {type(error).__name__}: {str(error)[:300]}"
        if len(str(error)) > 3000:
            return f"mutation {number} of {kind}: a message of {len(str(error))} letters"
    return None


def failures(material: Path, scratch: Path, numbers: range) -> list[str]:
    """Faults that some of these mutations brought to light."""
    found = (attempt(material, scratch, number) for number in numbers)
    return [problem for problem in found if problem is not None]


@needs_linux
def test_what_is_not_mutated_is_used(material):
    for kind, use in USES.items():
        use(material / kind)
    assert open_images(str(material / "pictures")).class_names == CLASSES
    assert open_images(str(material / "parquet")).class_names == CLASSES


@needs_linux
def test_mutated_data_are_used_or_refused_in_one_message(material, tmp_path):
    assert failures(material, tmp_path, range(60)) == []


@needs_linux
@pytest.mark.slow
def test_a_thousand_mutated_data_are_used_or_refused_in_one_message(material, tmp_path):
    assert failures(material, tmp_path, range(60, 1060)) == []
