"""Decoding one picture: formats by content, depths with a range, and sizes within a limit."""

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from mergevq.decoding import (
    ENDINGS,
    FORMATS,
    decode,
    load_picture,
    most_bytes,
    read_bounded,
    to_rgb,
)


def encoded(image, kind="PNG", **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def grey(values, kind="PNG"):
    return encoded(Image.fromarray(np.array([values], dtype=np.uint16)), kind)


def row(image):
    return [image.getpixel((x, 0))[0] for x in range(image.width)]


def huge_png(width, height):
    """The head of a PNG and no pixels."""
    head = b"IHDR" + struct.pack(">IIBBBBB", width, height, 16, 0, 0, 0, 0)
    chunk = struct.pack(">I", 13) + head + struct.pack(">I", zlib.crc32(head))
    return b"\x89PNG\r\n\x1a\n" + chunk + struct.pack(">I", 9) + b"IDAT"


# Formats


@pytest.mark.parametrize("kind", FORMATS)
def test_every_format_of_the_list_is_read(kind):
    assert decode(encoded(Image.new("RGB", (8, 8), (255, 0, 0)), kind)).size == (8, 8)


@pytest.mark.parametrize("kind", ["EPS", "TGA", "ICO", "PDF", "PCX", "SGI", "DDS"])
def test_no_other_format_is_opened_whatever_the_name(kind, tmp_path):
    content = encoded(Image.new("RGB", (16, 16)), kind)
    with pytest.raises(ValueError, match="no image format that is read"):
        decode(content)
    (tmp_path / "x.png").write_bytes(content)
    with pytest.raises(ValueError, match=r"image .*x\.png cannot be read: no image format"):
        load_picture(tmp_path / "x.png")


def test_endings_are_in_lower_case_and_each_has_one_format():
    assert sum(map(len, FORMATS.values())) == len(ENDINGS)
    assert all(ending == ending.lower() and ending[0] == "." for ending in ENDINGS)


# Depths


def test_sixteen_bits_are_rounded_to_eight():
    values = [0, 128, 129, 257, 32768, 65406, 65407, 65535]
    expected = [round(value / 257) for value in values]
    assert row(decode(grey(values))) == expected
    assert row(decode(grey(values, "TIFF"))) == expected


def test_a_grey_map_of_sixteen_bits_has_a_range():
    assert row(decode(b"P5 2 1 65535\n" + struct.pack(">HH", 32768, 65535))) == [128, 255]


@pytest.mark.parametrize("kind", [np.int32, np.float32])
def test_numbers_without_a_range_are_refused(kind):
    image = Image.fromarray(np.array([[0, 70_000]], dtype=kind))
    with pytest.raises(ValueError, match="has no defined range; save it with 8"):
        decode(encoded(image, "TIFF"))
    with pytest.raises(ValueError, match="has no defined range; save it with 8"):
        to_rgb(image)


def test_twelve_bits_in_sixteen_are_warned_of():
    with pytest.warns(UserWarning, match="no value above 4095 and comes out nearly black"):
        assert row(decode(grey([0, 4095]))) == [0, 16]


@pytest.mark.parametrize("values", [[0, 0], [0, 255], [0, 4096]])
def test_black_and_full_pictures_are_not_warned_of(values):
    decode(grey(values))


def test_the_picture_that_is_given_stays_as_it_is():
    image = Image.new("RGB", (4, 2), (1, 2, 3))
    image.getexif()[0x0112] = 6
    result = to_rgb(image)
    assert (image.size, result.size) == ((4, 2), (2, 4))
    plain = Image.new("RGB", (1, 1))
    to_rgb(plain).putpixel((0, 0), (9, 9, 9))
    assert plain.getpixel((0, 0)) == (0, 0, 0)


# Sizes


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_pixels_are_counted_before_they_are_decoded():
    with pytest.raises(ValueError, match=r"13,000 x 13,000 are 169,000,000 .* \(89,478,485\)"):
        decode(huge_png(13_000, 13_000))
    with pytest.raises(ValueError, match=r"more pixels than max_pixels \(89,478,485\)"):
        decode(huge_png(2**30, 2**30))


def test_the_limit_is_inclusive():
    content = encoded(Image.new("L", (5, 4)))
    assert decode(content, max_pixels=20).size == (5, 4)
    with pytest.raises(ValueError, match=r"5 x 4 are 20 pixels, more than max_pixels \(19\)"):
        decode(content, max_pixels=19)


def test_bytes_are_counted_before_they_are_read(tmp_path):
    path = tmp_path / "x"
    path.write_bytes(b"abc")
    assert read_bounded(path, 3) == b"abc"
    with pytest.raises(ValueError, match="larger than the 2 bytes"):
        read_bounded(path, 2)
    with path.open("wb") as file:
        file.truncate(2**42)
    with pytest.raises(ValueError, match="larger than the"):
        read_bounded(path, most_bytes(1))


# Files


@pytest.mark.parametrize("name", ["nowhere.png", ".", "zeros"])
def test_only_regular_files_are_opened(tmp_path, name):
    (tmp_path / "zeros").symlink_to("/dev/zero")
    with pytest.raises(
        ValueError, match=r"image .* cannot be read: (there is no|.* must be a reg)"
    ):
        load_picture(tmp_path / name)


@pytest.mark.parametrize("content", [b"", b"no image", huge_png(4, 4)])
def test_damaged_pictures_are_one_sentence(tmp_path, content):
    (tmp_path / "x.png").write_bytes(content)
    with pytest.raises(ValueError, match=r"image .*x\.png cannot be read: \w"):
        load_picture(tmp_path / "x.png")
