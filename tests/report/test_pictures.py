import numpy as np
import pytest
import torch
from PIL import Image

from mergevq.report.pictures import contact_sheet, merge_map, to_pil

INK = 128
"""Grey level below which a pixel of a sheet is text."""


def flat(red, green, blue, size=4):
    return torch.tensor([red, green, blue]).view(3, 1, 1).expand(3, size, size)


def noise(width, height, seed=0):
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def array(picture):
    return np.asarray(picture).astype(int)


# ---------------------------------------------------------------------------------- to_pil


def test_every_byte_survives_the_way_to_floats_and_back():
    levels = np.arange(256, dtype=np.uint8).reshape(16, 16)[..., None].repeat(3, axis=-1)
    image = torch.from_numpy(levels).permute(2, 0, 1) / 127.5 - 1
    assert np.array_equal(array(to_pil(image)), levels)


def test_values_beyond_the_range_are_clipped():
    image = torch.tensor([-1.5, 0.0, 1.5]).view(1, 1, 3).expand(3, 1, 3)
    assert array(to_pil(image))[0, :, 0].tolist() == [0, 128, 255]


def test_a_picture_keeps_its_channels_and_axes():
    image = torch.full((3, 2, 3), -1.0)
    image[1, 0, 2] = 1.0
    assert to_pil(image).size == (3, 2)
    assert to_pil(image).getpixel((2, 0)) == (0, 255, 0)


def test_an_image_that_is_not_finite_has_no_picture():
    with pytest.raises(ValueError, match="not finite"):
        to_pil(torch.full((3, 2, 2), torch.nan))


# ------------------------------------------------------------------------------- merge_map


def test_a_group_is_painted_in_its_mean_colour():
    # Cells are black, white, white, light grey; the outer two are one group, though apart.
    image = torch.full((3, 2, 4), -1.0)
    image[:, :, 1:3], image[:, :, 3] = 1.0, 0.6
    picture = array(merge_map(image, torch.tensor([0, 1, 1, 0]), (1, 4)))
    mean = (0 + 204) / 2
    centres = [picture[8, 16 * cell + 8].tolist() for cell in range(4)]
    assert centres == [[mean] * 3, [255] * 3, [255] * 3, [mean] * 3]


def test_channels_are_averaged_separately():
    image = torch.cat([flat(1.0, -1.0, -1.0), flat(-1.0, 1.0, -1.0)], dim=2)
    picture = array(merge_map(image, torch.tensor([5, 5]), (1, 2)))
    assert np.unique(picture.reshape(-1, 3), axis=0).tolist() == [[128, 128, 0]]


def test_a_line_separates_groups_and_nothing_else():
    image = flat(1.0, 1.0, 1.0, size=4)
    picture = array(merge_map(image, torch.tensor([0, 0, 0, 1]), (2, 2)))
    lines = np.argwhere((picture < 255).any(-1))
    # The lower right cell of 16 pixels starts at 16: above it and left of it runs one line.
    expected = {(15, x) for x in range(16, 32)} | {(y, 15) for y in range(16, 32)}
    assert {(int(y), int(x)) for y, x in lines} == expected


@pytest.mark.parametrize(("level", "brighter"), [(-1.0, True), (-0.9, True), (0.0, False)])
def test_a_line_contrasts_with_what_it_lies_on(level, brighter):
    picture = array(merge_map(flat(level, level, level), torch.tensor([0, 1]), (1, 2)))
    difference = picture[8, 15] - picture[8, 8]
    assert (difference > 60).all() if brighter else (difference < -60).all()


@pytest.mark.parametrize(
    ("side", "grid", "expected"), [(32, 8, 128), (64, 16, 256), (256, 16, 256)]
)
def test_the_map_is_the_image_enlarged_until_cells_can_be_seen(side, grid, expected):
    index = torch.zeros(grid**2, dtype=torch.int64)
    assert merge_map(flat(0.0, 0.0, 0.0, side), index, (grid, grid)).size == (expected, expected)


def test_a_map_need_not_be_square():
    image = torch.zeros(3, 8, 24)
    assert merge_map(image, torch.arange(12), (2, 6)).size == (96, 32)


def test_a_map_refuses_a_grid_of_other_cells():
    with pytest.raises(ValueError, match=r"grid_shape \(2, 2\) must have the 6 cells"):
        merge_map(torch.zeros(3, 4, 4), torch.arange(6), (2, 2))


def test_a_map_refuses_a_grid_that_does_not_divide_the_image():
    with pytest.raises(ValueError, match=r"image size \(5 x 4\) must be a multiple"):
        merge_map(torch.zeros(3, 5, 4), torch.arange(4), (2, 2))


# --------------------------------------------------------------------------- contact_sheet


def test_small_images_are_enlarged_by_repeating_pixels():
    image = noise(32, 32)
    sheet = array(contact_sheet([[image]]))
    assert sheet.shape == (128 + 32, 128 + 32, 3)
    assert np.array_equal(sheet[16:-16, 16:-16], array(image).repeat(4, 0).repeat(4, 1))


@pytest.mark.parametrize(
    ("size", "num_rows", "num_columns"),
    [((1, 5000), 1, 4), ((5000, 1), 3, 4), ((4000, 3000), 1, 4), ((64, 64), 200, 8)],
)
def test_a_sheet_is_bounded_whatever_is_on_it(size, num_rows, num_columns):
    image = Image.new("RGB", size)
    sheet = contact_sheet(
        [[image] * num_columns] * num_rows, captions=[["x"] * num_columns] * num_rows
    )
    texts = (num_rows + 1) * 40
    assert sheet.width <= 8192 + 400
    assert sheet.height <= 8192 + texts
    cell = contact_sheet([[image]])
    assert max(cell.size) <= 1024 + 32


def test_the_scale_can_be_chosen():
    assert contact_sheet([[noise(32, 32)]], scale=2).size == (64 + 32, 64 + 32)


def test_images_of_a_row_are_shown_equally_high():
    small, large = noise(16, 16), noise(96, 192)
    sheet = array(contact_sheet([[small, large]]))
    assert sheet.shape[0] == 192 + 32
    assert np.array_equal(sheet[16:-16, 16 : 16 + 192], array(small).repeat(12, 0).repeat(12, 1))
    assert np.array_equal(sheet[16:-16, -16 - 96 : -16], array(large))


def test_columns_are_aligned_across_rows():
    first, second = noise(128, 128, 1), noise(128, 128, 2)
    sheet = array(contact_sheet([[noise(256, 128), first], [noise(128, 128), second]]))
    left = 16 + 256 + 12
    assert np.array_equal(sheet[16:144, left : left + 128], array(first))
    assert np.array_equal(sheet[156:284, left : left + 128], array(second))


@pytest.mark.parametrize(
    ("texts", "box"),
    [
        ({"column_titles": ["Column"]}, (16, 16, 144, -144)),
        ({"row_titles": ["Row"]}, (16, 16, -144, -16)),
        ({"captions": [["Caption\nof two lines"]]}, (16, 144, 144, -16)),
    ],
    ids=["above", "left", "below"],
)
def test_text_is_drawn_beside_the_image_it_belongs_to(texts, box):
    sheet = contact_sheet([[Image.new("RGB", (128, 128), "white")]], **texts)
    left, top, right, bottom = box
    right, bottom = right % sheet.width, bottom % sheet.height
    rows, columns = np.nonzero(array(sheet).max(-1) < INK)
    assert len(rows) > 30
    assert left <= columns.min()
    assert columns.max() < right
    assert top <= rows.min()
    assert rows.max() < bottom


def test_long_captions_are_not_cut_off():
    image = Image.new("RGB", (128, 128), "white")
    narrow = contact_sheet([[image]], captions=[["short"]])
    wide = contact_sheet([[image]], captions=[["a caption that is much longer than the image"]])
    assert wide.width > narrow.width
    assert (array(wide)[:, -16:] == 255).all()


def test_rows_may_differ_in_length():
    assert contact_sheet([[noise(8, 8)] * 2, [noise(8, 8)]], ["a", "b"]).width == 2 * 128 + 12 + 32


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([],), "at least one image"),
        (([[]],), "at least one image"),
        (([[noise(8, 8)]], ["a", "b"]), r"column_titles \(2\) must be as many as columns \(1\)"),
        (([[noise(8, 8)]], (), ["a", "b"]), r"row_titles \(2\) must be as many as rows \(1\)"),
        (([[noise(8, 8)]], (), (), 0), r"scale \(0\) must be at least 1"),
    ],
)
def test_a_sheet_that_does_not_add_up_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        contact_sheet(*arguments)


def test_captions_must_match_the_images():
    with pytest.raises(ValueError, match="one text per image"):
        contact_sheet([[noise(8, 8)]], captions=[["a", "b"]])
