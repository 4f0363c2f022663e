"""Decoding one picture: formats by content, depths with a range, and sizes within a limit."""

import io
import struct
import zlib

import jaxtyping
import numpy as np
import pytest
import torch
from PIL import Image

from mergevq.data.prepare import (
    ENDINGS,
    FORMATS,
    Loaded,
    crop_square,
    decode,
    decode_reduced,
    load_picture,
    load_square,
    most_bytes,
    random_flip,
    random_resized_crop,
    read_bounded,
    to_batch,
    to_float,
    to_rgb,
    to_tensor,
)
from mergevq.metrics.image import to_uint8
from mergevq.report.pictures import to_pil
from tests.support.data import noise, ramp, whole
from tests.support.reads import host_reads


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


# Pixels


def test_every_byte_survives_the_round_trip():
    pixels = torch.arange(256, dtype=torch.uint8).reshape(1, 1, 256).expand(3, 2, 256)
    image = to_float(pixels)
    assert (image.min(), image.max()) == (-1, 1)
    assert torch.equal(to_uint8(image), pixels)
    assert torch.equal(to_tensor(to_pil(image)), image)


def test_an_image_of_the_right_size_is_not_touched(generator):
    image = noise(generator, 64, 64)
    assert torch.equal(
        to_uint8(load_square(image, 64, generator)),
        torch.from_numpy(np.array(image)).permute(2, 0, 1),
    )


@pytest.mark.parametrize("mode", ["L", "RGBA"])
def test_other_modes_are_refused_not_guessed(mode):
    with pytest.raises(ValueError, match=rf"image mode \({mode}\) must be RGB"):
        to_tensor(Image.new(mode, (2, 2)))


# Squares


def test_the_centre_square_is_kept():
    assert to_uint8(load_square(ramp(7, 4), 4))[0, 0].tolist() == [1, 2, 3, 4]
    assert to_uint8(load_square(ramp(4, 7), 4))[1, :, 0].tolist() == [1, 2, 3, 4]


def test_a_random_square_reaches_both_ends(generator):
    corners = {crop_square(ramp(7, 4), 4, generator).getpixel((0, 0)) for _ in range(99)}
    assert corners == {(column, 0, 0) for column in range(4)}


def test_shrinking_averages_instead_of_skipping_pixels():
    stripes = np.tile(np.array([0, 255], dtype=np.uint8), (64, 32))
    image = Image.fromarray(stripes).convert("RGB")
    inner = to_uint8(load_square(image, 16))[:, 2:-2, 2:-2].float()
    assert (inner - 127.5).abs().max() <= 2


def test_the_short_side_is_resized_and_the_shape_kept():
    image = crop_square(ramp(200, 100), 50)
    assert image.size == (50, 50)
    columns = to_uint8(to_tensor(image))[0, 25].float()
    expected = 2 * torch.arange(25, 75) + 0.5  # two columns are averaged into one
    assert (columns - expected).abs().max() <= 1


@pytest.mark.parametrize("size", [(1, 1), (1, 600), (600, 1), (3, 50), (511, 7)])
@pytest.mark.parametrize("random", [False, True])
def test_any_shape_gives_a_square(generator, size, random):
    image = crop_square(Image.new("RGB", size), 64, generator if random else None)
    assert image.size == (64, 64)
    assert random_resized_crop(Image.new("RGB", size), 64, generator).size == (64, 64)


def test_a_strip_is_cut_before_it_is_enlarged():
    # Enlarged whole it would take 150 GB.
    assert crop_square(Image.new("RGB", (1, 10_000_000)), 64).size == (64, 64)


def test_a_flip_mirrors_columns_half_of_the_time(generator):
    first = [random_flip(ramp(5, 2), generator).getpixel((0, 1)) for _ in range(400)]
    assert set(first) == {(0, 1, 0), (4, 1, 0)}
    assert 150 < first.count((4, 1, 0)) < 250


def test_random_rectangles_keep_to_their_area_and_shape(generator):
    image = ramp(240, 240)
    areas, ratios = [], []
    for _ in range(300):
        pixels = np.array(random_resized_crop(image, 60, generator), dtype=float)
        width, height = (np.ptp(pixels[..., axis]) * 60 / 59 for axis in (0, 1))
        areas.append(width * height / 240**2)
        ratios.append(width / height)
    assert 0.07 < min(areas) < 0.12
    assert 0.9 < max(areas) < 1.03
    assert 0.73 < min(ratios) < 0.78
    assert 1.28 < max(ratios) < 1.38
    assert 0.47 < np.mean(areas) < 0.6  # uniform in the area, but large and long ones do not fit


def test_a_fixed_rectangle_is_the_whole_image(generator):
    image = noise(generator, 16, 16)
    crop = random_resized_crop(image, 16, generator, scale=(1.0, 1.0), ratio=(1.0, 1.0))
    assert torch.equal(to_tensor(crop), to_tensor(image))


def test_evaluation_shows_each_image_once_in_order_with_its_centre(dataset):
    batches = whole(dataset)
    assert [batch.index.tolist() for batch in batches] == [[0, 1, 2, 3], [4, 5, 6]]
    assert batches[1].student_view is None
    assert batches[1].teacher_view is None
    assert torch.equal(batches[1].image[2], load_square(dataset.read(6), 8))
    assert batches[1].label.tolist() == [dataset.label(index) for index in (4, 5, 6)]


# ------------------------------------------------------------------- photographs decoded smaller


def photograph(width, height):
    """Smooth shapes, edges and some noise, as a JPEG file."""
    generator = np.random.default_rng(0)
    coarse = generator.integers(0, 256, (height // 64, width // 64, 3), dtype=np.uint8)
    smooth = np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC))
    noisy = smooth + generator.normal(0, 5, smooth.shape)
    return encoded(Image.fromarray(noisy.clip(0, 255).astype(np.uint8)), "JPEG", quality=90)


@pytest.mark.parametrize(
    ("size", "least_side", "factor"),
    [
        ((512, 384), 48, 8),
        ((512, 384), 49, 4),
        ((512, 384), 192, 2),
        ((512, 384), 193, 1),
        ((516, 384), 48, 4),
        ((513, 384), 48, 1),
        ((512, 384), None, 1),
    ],
)
def test_a_jpeg_is_decoded_as_small_as_the_side_that_must_be_left(size, least_side, factor):
    image, found = decode_reduced(photograph(*size), least_side)
    assert found == factor
    assert (found * image.width, found * image.height) == size


def test_strips_and_other_formats_are_decoded_whole():
    assert decode_reduced(photograph(1152, 64), 2).factor == 1
    picture = encoded(Image.new("RGB", (512, 512)))
    assert decode_reduced(picture, 8).image.size == (512, 512)


def test_what_is_cropped_from_a_smaller_picture_lies_at_the_same_place_and_looks_alike():
    data = photograph(1024, 768)
    whole, (small, factor) = decode(data), decode_reduced(data, 3 * 48)
    assert factor == 4
    for seed in range(4):
        first, second = (torch.Generator().manual_seed(seed) for _ in range(2))
        expected, found = crop_square(whole, 48, first), crop_square(small, 48, second)
        differences = np.abs(np.asarray(expected).astype(int) - np.asarray(found).astype(int))
        assert differences.mean() < 0.5
        assert differences.max() <= 4
        # A student's view at twice the resolution of its smallest rectangle, too.
        expected = random_resized_crop(whole, 24, first)
        found = random_resized_crop(small, 24, second, factor=factor)
        differences = np.abs(np.asarray(expected).astype(int) - np.asarray(found).astype(int))
        assert differences.mean() < 1
        assert torch.equal(first.get_state(), second.get_state())


# One conversion for pictures, arrays and tensors


LIKE = torch.zeros(1)


def test_pictures_bytes_floats_and_tensors_of_one_image_are_equal_to_the_last_bit():
    picture = noise(None, 6, 4)
    pixels = np.asarray(picture)
    image = to_tensor(picture)
    forms = (picture, [picture], pixels, pixels[None], image.numpy(), image, image[None])
    for form in forms:
        assert torch.equal(to_batch(form, LIKE), image[None])
    assert torch.equal(to_batch([picture, picture], LIKE), torch.stack([image, image]))


def test_bytes_are_scaled_by_the_definition_and_other_modes_go_through_rgb():
    assert to_batch(np.array([[[0, 51, 255]]], np.uint8), LIKE).flatten().tolist() == pytest.approx(
        [-1, 51 / 127.5 - 1, 1]
    )
    clear = Image.new("RGBA", (2, 2), (0, 0, 0, 0))
    assert to_batch(clear, LIKE).eq(1).all()


def test_a_tensor_is_neither_copied_nor_cast_and_a_picture_is_as_the_weights():
    image, like = torch.zeros(1, 3, 4, 4), torch.zeros(1, dtype=torch.bfloat16)
    assert to_batch(image, like) is image
    assert to_batch(noise(None, 4, 4), like).dtype == torch.bfloat16
    mirrored = np.zeros((3, 4, 4))[..., ::-1]
    mirrored.flags.writeable = False
    assert to_batch(mirrored, LIKE).dtype == torch.float32


def test_images_of_a_loader_are_taken_as_they_are_and_not_read():
    image = torch.full((1, 3, 4, 4), 9.0)
    with host_reads() as reads:
        assert to_batch(Loaded(image), LIKE) is image
    assert reads == []


@pytest.mark.parametrize(
    ("image", "message"),
    [
        ("a.png", r"image is str and must be a PIL image .* use load_picture"),
        ([], "a sequence of 0, with nothing in it"),
        ([np.zeros((2, 2, 3))], "a sequence of 1, with ndarray in it"),
        ([noise(None, 4, 4), noise(None, 6, 4)], "4 x 4 and 6 x 4; crop_square"),
        (np.zeros((4, 4, 3), np.int64), r"dtype int64 and must be uint8 .*astype\(numpy.uint8\)"),
        (np.zeros((3, 4, 4), np.uint8), r"shape \(3, 4, 4\) and must be \(h, w, 3\)"),
        (np.zeros((4, 4), np.uint8), r"shape \(4, 4\) .* PIL.Image.fromarray"),
        (
            np.zeros((4, 4, 3)),
            r"shape \(1, 4, 4, 3\) .*movedim\(-1, -3\)",
        ),
        (np.full((3, 4, 4), 255.0), r"\(255 to 255\) must be finite and between -1 and 1"),
        (torch.zeros(3, 4, 4, dtype=torch.uint8), r"dtype torch.uint8 .* image / 127.5 - 1"),
        (torch.zeros(4, 4), "2 dimensions and must have 4"),
        (torch.full((3, 4, 4), -1.06), r"\(-1.06 to -1.06\) must be finite"),
    ],
)
def test_what_no_image_can_be_gets_both_numbers_and_the_way_out(monkeypatch, image, message):
    # As for users, who run without the shape checks that would stop it before.
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    with pytest.raises(ValueError, match=message):
        to_batch(image, LIKE)
