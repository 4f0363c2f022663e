"""Opening images: every kind of place, every mode, and everything that can be wrong with them."""

import io
import json
import logging
import os
import pickle
import sys
import tarfile
import unicodedata

import numpy as np
import pytest
import torch
from PIL import Image

from mergevq.data.images import open_images, read_nearest
from mergevq.data.prepare import BrokenImageError

RED, GREEN, BLUE, WHITE = (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255)


def encoded(color=RED, size=(4, 4), kind="PNG", mode="RGB"):
    file = io.BytesIO()
    Image.new(mode, size, color).save(file, kind)
    return file.getvalue()


def write(path, color=RED, kind="PNG"):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(encoded(color, kind=kind))
    return path


def write_parquet(path, images, labels=None, names=None, **options):
    """Rows in the Hugging Face layout."""
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    columns = {"image": [{"bytes": image, "path": "x.png"} for image in images]}
    if labels is not None:
        columns["label"] = labels
    table = pyarrow.table(columns)
    if names is not None:
        features = {"label": {"names": names, "_type": "ClassLabel"}}
        info = json.dumps({"info": {"features": features}})
        table = table.replace_schema_metadata({"huggingface": info})
    parquet.write_table(table, path, **options)
    return path


def write_tar(path, members):
    with tarfile.open(path, "w") as tar:
        for name, data in members.items():
            header = tarfile.TarInfo(name)
            header.size = len(data)
            tar.addfile(header, io.BytesIO(data))
    return path


def names(dataset):
    return [dataset.name(index) for index in range(len(dataset))]


def labels(dataset):
    return [dataset.label(index) for index in range(len(dataset))]


def color(dataset, index):
    return dataset.read(index).getpixel((1, 1))


# Folders


def test_a_plain_folder_has_every_usual_ending_in_any_case_and_no_classes(tmp_path):
    kinds = {"a.jpg": "JPEG", "b.JPEG": "JPEG", "c.Png": "PNG", "d.WEBP": "WEBP", "e.BMP": "BMP"}
    for name, kind in kinds.items():
        write(tmp_path / name, kind=kind)
    (tmp_path / "notes.txt").write_text("not an image")
    dataset = open_images(str(tmp_path))
    assert names(dataset) == list(kinds)
    assert labels(dataset) == [-1] * 5
    assert (dataset.num_classes, dataset.class_names) == (0, ())
    assert [dataset.read(index).size for index in range(5)] == [(4, 4)] * 5


def test_sub_folders_are_the_classes_in_order_of_their_names(tmp_path):
    write(tmp_path / "dog" / "1.png", GREEN)
    write(tmp_path / "cat" / "deep" / "2.png", RED)
    write(tmp_path / "cat" / "1.png", BLUE)
    dataset = open_images(str(tmp_path))
    assert dataset.class_names == ("cat", "dog")
    assert names(dataset) == ["cat/1.png", "cat/deep/2.png", "dog/1.png"]
    assert labels(dataset) == [0, 0, 1]
    assert [color(dataset, index) for index in range(3)] == [BLUE, RED, GREEN]


def test_images_beside_the_sub_folders_mean_no_classes_and_a_warning(tmp_path, caplog):
    write(tmp_path / "cat" / "1.png")
    write(tmp_path / "loose.png")
    dataset = open_images(str(tmp_path))
    assert labels(dataset) == [-1, -1]
    assert dataset.num_classes == 0
    assert "1 images lie directly in" in caplog.text


def test_hidden_files_and_folders_are_no_data(tmp_path):
    write(tmp_path / "cat" / "1.png")
    write(tmp_path / "cat" / "._1.png")
    write(tmp_path / ".thumbnails" / "1.png")
    assert names(open_images(str(tmp_path))) == ["cat/1.png"]


def test_a_root_with_nothing_but_one_split_stands_for_it(tmp_path):
    write(tmp_path / "train" / "cat" / "1.png")
    write(tmp_path / "train" / "dog" / "1.png")
    whole, inside = open_images(str(tmp_path)), open_images(str(tmp_path / "train"))
    assert whole.class_names == inside.class_names == ("cat", "dog")
    assert names(whole) == names(inside) == ["cat/1.png", "dog/1.png"]


def test_one_class_with_folders_inside_it_is_warned_of(tmp_path, caplog):
    write(tmp_path / "archive" / "cat" / "1.png")
    write(tmp_path / "archive" / "dog" / "1.png")
    assert open_images(str(tmp_path)).class_names == ("archive",)
    assert "all images are of one class, 'archive'" in caplog.text
    assert str(tmp_path / "archive") in caplog.text


def test_class_names_do_not_depend_on_the_form_of_their_accents(tmp_path):
    composed, decomposed = (unicodedata.normalize(form, "caf\u00e9") for form in ("NFC", "NFD"))
    write(tmp_path / "mac" / decomposed / "1.png")
    write(tmp_path / "mac" / "cafz" / "1.png")
    dataset = open_images(str(tmp_path / "mac"))
    assert dataset.class_names == ("cafz", composed)
    assert labels(dataset) == [1, 0]
    write(tmp_path / "mac" / composed / "1.png")
    with pytest.raises(ValueError, match=r"two folders .* one with composed and one with decomp"):
        open_images(str(tmp_path / "mac"))


def test_pictures_that_are_not_used_are_counted_and_the_first_is_named(tmp_path, caplog):
    write(tmp_path / "a.png")
    (tmp_path / "b.heic").touch()
    (tmp_path / "c.avif").touch()
    dataset = open_images(str(tmp_path))
    assert len(dataset.unused) == len(dataset.subset([0]).unused) == 2
    assert "2 not used, the first is" in caplog.text
    assert "b.heic" in caplog.text


def test_the_limit_on_pixels_is_a_setting_that_subsets_keep(tmp_path):
    write(tmp_path / "a.png")
    Image.new("RGB", (9, 9)).save(tmp_path / "b.png")
    dataset = open_images(str(tmp_path), max_pixels=80)
    assert dataset.read(0).size == (4, 4)
    with pytest.raises(BrokenImageError, match=r"b\.png: 9 x 9 are 81 pixels, .*max_pixels \(80\)"):
        dataset.subset([1]).read(0)
    assert open_images(str(tmp_path), max_pixels=81).read(1).size == (9, 9)
    with pytest.raises(ValueError, match=r"max_pixels \(0\) must be between 1 and 178956970"):
        open_images(str(tmp_path), max_pixels=0)


def test_a_file_that_becomes_a_pipe_is_a_broken_image(tmp_path):
    write(tmp_path / "a.png")
    dataset = open_images(str(tmp_path))
    (tmp_path / "a.png").unlink()
    os.mkfifo(tmp_path / "a.png")
    with pytest.raises(BrokenImageError, match=r"a\.png.* must be a regular file"):
        dataset.read(0)


def test_a_file_of_gigabytes_of_nothing_is_not_read(tmp_path):
    write(tmp_path / "a.png")
    with (tmp_path / "b.png").open("wb") as file:
        file.truncate(2**40)
    with pytest.raises(BrokenImageError, match=r"b\.png: the file is larger than"):
        open_images(str(tmp_path)).read(1)


def test_one_file_is_a_data_set_of_one(tmp_path):
    dataset = open_images(str(write(tmp_path / "photo.PNG", GREEN)))
    assert names(dataset) == ["photo.PNG"]
    assert color(dataset, 0) == GREEN


def test_patterns_lists_and_brackets_in_real_names_are_understood(tmp_path):
    for name in ("a1.png", "a2.png", "b1.png", "c.png"):
        write(tmp_path / "x [1], {1..2}" / name)
    folder = tmp_path / "x [1], {1..2}"
    assert len(open_images(str(folder))) == 4
    plain = tmp_path / "plain"
    folder.rename(plain)
    assert names(open_images(f"{plain}/a*.png, {plain}/c.png")) == ["a1.png", "a2.png", "c.png"]
    assert names(open_images(f"{plain}/a{{1..2}}.png")) == ["a1.png", "a2.png"]


def test_names_do_not_change_when_the_folder_moves(tmp_path):
    write(tmp_path / "here" / "cat" / "1.png")
    before = names(open_images(str(tmp_path / "here")))
    (tmp_path / "here").rename(tmp_path / "there")
    assert names(open_images(str(tmp_path / "there"))) == before


def test_max_images_are_evenly_spaced_so_that_sorted_data_keep_their_classes(tmp_path):
    for name in ("a/1", "a/2", "a/3", "b/1", "b/2", "b/3"):
        write(tmp_path / f"{name}.png")
    assert names(open_images(str(tmp_path), max_images=4)) == [
        "a/1.png",
        "a/2.png",
        "b/1.png",
        "b/2.png",
    ]
    assert labels(open_images(str(tmp_path), max_images=2)) == [0, 1]
    assert len(open_images(str(tmp_path), max_images=9)) == 6


def test_a_subset_of_a_subset_keeps_names_labels_and_classes(tmp_path):
    for name in ("a/1", "a/2", "b/3", "c/4"):
        write(tmp_path / f"{name}.png")
    subset = open_images(str(tmp_path)).subset([3, 1, 2]).subset([2, 0])
    assert names(subset) == ["b/3.png", "c/4.png"]
    assert labels(subset) == [1, 2]
    assert subset.class_names == ("a", "b", "c")


# What can be wrong with a path


@pytest.mark.parametrize("path", ["nowhere", "nowhere/*.png", "nowhere-{0..1}.tar", ""])
def test_a_missing_path_is_named(path):
    with pytest.raises(ValueError, match=r"data path '.*' does not exist"):
        open_images(path)


def test_a_missing_shard_of_a_range_is_named(tmp_path):
    write_tar(tmp_path / "s-000.tar", {"a.png": encoded()})
    with pytest.raises(ValueError, match=r"s-001\.tar' does not exist"):
        open_images(f"{tmp_path}/s-{{000..001}}.tar")


def test_an_empty_folder_is_an_error_that_lists_the_endings(tmp_path):
    (tmp_path / "notes.txt").write_text("not an image")
    with pytest.raises(ValueError, match=r"holds no images: no regular file ends in \.bmp, \.gif"):
        open_images(str(tmp_path))


def test_a_mixture_of_kinds_is_an_error(tmp_path):
    write(tmp_path / "a.png")
    write_tar(tmp_path / "a.tar", {"a.png": encoded()})
    with pytest.raises(ValueError, match=r"mixes \.tar and images; choose one kind"):
        open_images(str(tmp_path))


def test_no_usable_image_is_an_error_with_the_first_reason(tmp_path):
    (tmp_path / "a.png").write_bytes(b"no image")
    (tmp_path / "b.png").write_bytes(b"")
    with pytest.raises(
        ValueError, match=r"none of the 2 images .*: cannot read a\.png: no image f"
    ):
        open_images(str(tmp_path))


def test_max_images_below_one_is_an_error(tmp_path):
    write(tmp_path / "a.png")
    with pytest.raises(ValueError, match=r"max_images \(0\) must be at least 1"):
        open_images(str(tmp_path), max_images=0)


@pytest.mark.parametrize(
    ("path", "module", "packages"),
    [
        ("digits", "sklearn.datasets", "matplotlib scikit-learn"),
        ("x.parquet", "pyarrow.parquet", "pyarrow"),
    ],
)
def test_a_missing_package_comes_with_its_install_command(
    tmp_path, monkeypatch, path, module, packages
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "x.parquet").write_bytes(b"PAR1")
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(RuntimeError, match=f"pip install {packages}"):
        open_images(path)


# Broken images


def test_a_broken_image_is_named_and_its_neighbour_is_found(tmp_path, caplog):
    write(tmp_path / "b.png", GREEN)
    (tmp_path / "a.png").write_bytes(encoded()[:-20])
    dataset = open_images(str(tmp_path))
    assert list(dataset.broken) == ["a.png"]
    assert caplog.messages == [dataset.broken["a.png"] + " (1 broken so far)"]
    with pytest.raises(BrokenImageError, match=r"cannot read a\.png: "):
        dataset.read(0)
    broken = {}
    assert read_nearest(dataset, 0, broken)[0] == 1
    assert list(broken) == ["a.png"]


def test_the_search_for_a_readable_image_wraps_around(tmp_path):
    write(tmp_path / "a.png")
    (tmp_path / "b.png").write_bytes(b"")
    assert read_nearest(open_images(str(tmp_path)), 1, {})[0] == 0


def test_a_broken_image_is_warned_of_once_and_counted_in_every_subset(tmp_path, caplog):
    write(tmp_path / "a.png")
    dataset = open_images(str(tmp_path))
    dataset.subset([0]).record_broken({"x": "cannot read x"})
    dataset.record_broken({"x": "cannot read x", "y": "cannot read y"})
    assert dataset.broken == {"x": "cannot read x", "y": "cannot read y"}
    assert caplog.record_tuples == [
        ("mergevq", logging.WARNING, "cannot read x (1 broken so far)"),
        ("mergevq", logging.WARNING, "cannot read y (2 broken so far)"),
    ]


def test_a_vanished_file_is_a_broken_image(tmp_path):
    write(tmp_path / "a.png")
    dataset = open_images(str(tmp_path))
    (tmp_path / "a.png").unlink()
    with pytest.raises(BrokenImageError, match=r"cannot read a\.png"):
        dataset.read(0)


def test_postscript_is_never_run(tmp_path):
    Image.new("RGB", (2, 2)).save(tmp_path / "x.eps")
    (tmp_path / "x.eps").rename(tmp_path / "x.png")
    with pytest.raises(ValueError, match="no image format"):
        open_images(str(tmp_path))


# Modes


def opened(tmp_path, image, name="x.png", **options):
    image.save(tmp_path / name, **options)
    return open_images(str(tmp_path / name)).read(0)


@pytest.mark.parametrize(
    ("mode", "value", "expected"),
    [
        ("1", 1, WHITE),
        ("L", 7, (7, 7, 7)),
        ("LA", (7, 255), (7, 7, 7)),
        ("LA", (7, 0), WHITE),
        ("RGBA", (9, 8, 7, 255), (9, 8, 7)),
        ("RGBA", (9, 8, 7, 0), WHITE),
        ("RGBA", (0, 0, 0, 51), (204, 204, 204)),
    ],
)
def test_every_mode_becomes_rgb_on_white(tmp_path, mode, value, expected):
    image = opened(tmp_path, Image.new(mode, (2, 2), value))
    assert image.mode == "RGB"
    assert image.getpixel((0, 0)) == expected


def test_a_palette_with_a_transparent_colour_is_put_on_white(tmp_path):
    image = Image.new("P", (2, 1))
    image.putpalette([9, 8, 7, 1, 2, 3])
    image.putpixel((1, 0), 1)
    result = opened(tmp_path, image, transparency=0)
    assert [result.getpixel((x, 0)) for x in range(2)] == [WHITE, (1, 2, 3)]


def test_a_transparent_colour_of_an_rgb_file_is_put_on_white(tmp_path):
    result = opened(tmp_path, Image.new("RGB", (1, 1), (9, 8, 7)), transparency=(9, 8, 7))
    assert result.getpixel((0, 0)) == WHITE


def test_sixteen_bits_are_scaled_not_clipped(tmp_path):
    values = np.array([[0, 257, 32768, 65535]], dtype=np.uint16)
    result = opened(tmp_path, Image.fromarray(values))
    assert [result.getpixel((x, 0))[0] for x in range(4)] == [0, 1, 128, 255]


def test_cmyk_becomes_rgb(tmp_path):
    result = opened(tmp_path, Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "x.jpg", quality=100)
    assert np.abs(np.array(result, dtype=int) - RED).max() <= 2


def test_the_camera_orientation_is_applied(tmp_path):
    image = Image.new("RGB", (4, 2))
    image.putpixel((0, 0), RED)
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was held a quarter turn to the left
    result = opened(tmp_path, image, exif=exif)
    assert result.size == (2, 4)
    assert result.getpixel((1, 0)) == RED


def test_a_float_image_is_broken_because_its_range_is_unknown(tmp_path):
    Image.new("F", (2, 2)).save(tmp_path / "x.tiff")
    with pytest.raises(ValueError, match="a float image has no defined range"):
        open_images(str(tmp_path))


# Parquet


def test_parquet_rows_come_from_all_row_groups_of_all_files(tmp_path):
    colors = [(value, 0, 0) for value in range(7)]
    images = [encoded(value) for value in colors]
    write_parquet(tmp_path / "b.parquet", images[3:], [0, 2, 0, 1], row_group_size=3)
    write_parquet(tmp_path / "a.parquet", images[:3], [1, 1, 2], row_group_size=2)
    dataset = open_images(str(tmp_path))
    assert [color(dataset, index) for index in (6, 0, 5, 2, 3, 1, 4)] == [
        colors[index] for index in (6, 0, 5, 2, 3, 1, 4)
    ]
    assert names(dataset)[2:5] == ["a.parquet:2", "b.parquet:0", "b.parquet:1"]
    assert labels(dataset) == [1, 1, 2, 0, 2, 0, 1]
    assert dataset.class_names == ("0", "1", "2")


def test_parquet_class_names_and_missing_labels_are_kept(tmp_path):
    path = write_parquet(tmp_path / "a.parquet", [encoded()] * 3, [1, None, -1], ["cat", "dog"])
    dataset = open_images(str(path))
    assert dataset.class_names == ("cat", "dog")
    assert labels(dataset) == [1, -1, -1]
    assert dataset.num_unlabelled == 2
    assert dataset.subset([0, 2]).num_unlabelled == 1


def test_parquet_without_labels_has_no_classes(tmp_path):
    dataset = open_images(str(write_parquet(tmp_path / "a.parquet", [encoded()])))
    assert (labels(dataset), dataset.num_classes) == ([-1], 0)


def test_parquet_labels_that_are_words_are_not_used_and_it_is_said(tmp_path, caplog):
    path = write_parquet(tmp_path / "a.parquet", [encoded()], ["cat"])
    assert labels(open_images(str(path))) == [-1]
    assert "label is string, no class number" in caplog.text


def test_a_plain_binary_column_is_read_too(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    parquet.write_table(pyarrow.table({"img": [encoded(GREEN)]}), tmp_path / "a.parquet")
    assert color(open_images(str(tmp_path)), 0) == GREEN


def test_a_parquet_row_without_bytes_is_a_broken_image(tmp_path):
    dataset = open_images(str(write_parquet(tmp_path / "a.parquet", [None, encoded()])))
    assert list(dataset.broken) == ["a.parquet:0"]


def test_parquet_without_images_lists_its_columns(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    parquet.write_table(pyarrow.table({"text": ["a"]}), tmp_path / "a.parquet")
    with pytest.raises(ValueError, match=r"has the columns \['text'\]; it needs 'image'"):
        open_images(str(tmp_path))


def test_an_empty_parquet_file_holds_no_images(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    write_parquet(tmp_path / "a.parquet", [encoded()])
    parquet = pytest.importorskip("pyarrow.parquet")
    table = parquet.read_table(tmp_path / "a.parquet").slice(0, 0)
    assert isinstance(table, pyarrow.Table)
    parquet.write_table(table, tmp_path / "a.parquet")
    with pytest.raises(ValueError, match="holds no images"):
        open_images(str(tmp_path))


@pytest.mark.parametrize("label", [-2, 2**40])
def test_labels_that_are_no_class_numbers_are_an_error(tmp_path, label):
    path = write_parquet(tmp_path / "a.parquet", [encoded()], [label])
    with pytest.raises(ValueError, match=f"must be class numbers .* {label}"):
        open_images(str(path))


def test_a_label_beyond_the_named_classes_is_an_error(tmp_path):
    path = write_parquet(tmp_path / "a.parquet", [encoded()], [2], ["cat", "dog"])
    with pytest.raises(ValueError, match=r"label \(2\) must be below 2 classes"):
        open_images(str(path))


def test_parquet_files_that_name_different_classes_are_not_joined(tmp_path):
    write_parquet(tmp_path / "a.parquet", [encoded()], [0], ["cat", "dog"])
    write_parquet(tmp_path / "b.parquet", [encoded()], [0], ["dog", "cat"])
    with pytest.raises(ValueError, match=r"b\.parquet and .*a\.parquet name different classes"):
        open_images(str(tmp_path))


def test_a_parquet_file_that_breaks_off_is_named(tmp_path):
    path = write_parquet(tmp_path / "a.parquet", [encoded()] * 9)
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(ValueError, match=r"a\.parquet is not a readable parquet file"):
        open_images(str(path))


def test_a_damaged_row_group_stops_with_the_name_of_the_file(tmp_path):
    path = write_parquet(tmp_path / "a.parquet", [encoded()] * 9, row_group_size=3)
    dataset = open_images(str(path))
    data = path.read_bytes()
    path.write_bytes(data[:4] + bytes(len(data) // 2) + data[4 + len(data) // 2 :])
    with pytest.raises(RuntimeError, match=r"row group 1 of .*a\.parquet is damaged"):
        dataset.read(4)


def test_row_groups_beyond_the_budget_are_read_again_and_it_is_said(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr("mergevq.data.stores._CACHED_BYTES", 1)
    images = [encoded((value, 0, 0)) for value in range(6)]
    path = write_parquet(tmp_path / "a.parquet", images, row_group_size=2)
    dataset = open_images(str(path))
    assert [color(dataset, index)[0] for index in (5, 0, 3, 1, 4, 2)] == [5, 0, 3, 1, 4, 2]
    assert "each image read in random order costs a row group" in caplog.text
    assert list(dataset._store.cached) == [1]


# Tar shards


def test_shards_are_a_sized_data_set_with_labels_from_either_file(tmp_path):
    shard = {
        "a.png": encoded(RED),
        "a.cls": b"2\n",
        "a.json": b'{"caption": "no label here"}',
        "b.json": b'{"label": 0}',
        "b.JPG": encoded(GREEN, (8, 8), "JPEG"),
    }
    write_tar(tmp_path / "s-000.tar", shard)
    write_tar(tmp_path / "s-001.tar", {"sub/c.png": encoded(BLUE), "sub/c.txt": b"a caption"})
    for path in (str(tmp_path), f"{tmp_path}/s-{{000..001}}.tar", f"{tmp_path}/*.tar"):
        dataset = open_images(path)
        assert names(dataset) == ["s-000.tar:a", "s-000.tar:b", "s-001.tar:sub/c"]
        assert labels(dataset) == [2, 0, -1]
        assert dataset.class_names == ("0", "1", "2")
    assert [color(dataset, index) for index in (0, 2)] == [RED, BLUE]
    assert dataset.read(1).size == (8, 8)


def test_labels_without_an_image_and_hidden_members_are_no_samples(tmp_path):
    write_tar(tmp_path / "s.tar", {"a.cls": b"0", "b.png": encoded(), "._b.png": b"resource fork"})
    assert names(open_images(str(tmp_path))) == ["s.tar:b"]


@pytest.mark.parametrize(
    ("name", "data"),
    [("a.cls", b"cat"), ("a.json", b'{"label": "cat"}'), ("a.json", b"[1]"), ("a.json", b"{")],
)
def test_a_label_that_is_no_number_is_named_with_its_shard(tmp_path, name, data):
    write_tar(tmp_path / "s.tar", {"a.png": encoded(), name: data})
    with pytest.raises(ValueError, match=rf"{name} in .*s\.tar' holds no class number"):
        open_images(str(tmp_path))


def shard_of(tmp_path, num_images=4):
    members = {f"{number}.png": encoded((number, 0, 0)) for number in range(num_images)}
    return write_tar(tmp_path / "s.tar", members)


@pytest.mark.parametrize("length", [300, 700, 1024, 3 * 1024])
def test_a_shard_that_breaks_off_is_named(tmp_path, length):
    path = shard_of(tmp_path)
    path.write_bytes(path.read_bytes()[:length])
    with pytest.raises(ValueError, match=r"shard .*s\.tar is damaged"):
        open_images(str(path))


def test_a_shard_with_a_damaged_header_is_named(tmp_path):
    path = shard_of(tmp_path)
    data = bytearray(path.read_bytes())
    data[2 * 1024 + 100 : 2 * 1024 + 200] = bytes(100)
    path.write_bytes(data)
    with pytest.raises(ValueError, match=r"s\.tar is damaged: it breaks off at byte 2048"):
        open_images(str(path))


def test_a_compressed_shard_is_refused(tmp_path):
    with tarfile.open(tmp_path / "s.tar", "w:gz"):
        pass
    with pytest.raises(ValueError, match=r"s\.tar is damaged or no uncompressed tar file"):
        open_images(str(tmp_path))


def test_a_shard_that_shrinks_or_vanishes_while_in_use_stops_the_run(tmp_path):
    path = shard_of(tmp_path)
    dataset = open_images(str(path))
    path.write_bytes(path.read_bytes()[:2048])
    with pytest.raises(RuntimeError, match=r"s\.tar has become shorter"):
        dataset.read(3)
    path.unlink()
    with pytest.raises(RuntimeError, match=r"cannot read shard .*s\.tar"):
        dataset.read(0)


def test_webdataset_writes_what_is_read_here(tmp_path):
    webdataset = pytest.importorskip("webdataset")
    with webdataset.TarWriter(str(tmp_path / "s.tar")) as writer:
        for number in range(3):
            image = Image.new("RGB", (2, 2), (number, 0, 0))
            writer.write({"__key__": f"k{number}", "png": image, "cls": 2 - number})
    dataset = open_images(str(tmp_path))
    assert names(dataset) == ["s.tar:k0", "s.tar:k1", "s.tar:k2"]
    assert labels(dataset) == [2, 1, 0]
    assert [color(dataset, 2)[0] for _ in range(2)] == [2, 2]


# All kinds


@pytest.mark.parametrize("kind", ["folder", "parquet", "tar"])
def test_a_copy_sent_to_another_process_reads_the_same(tmp_path, kind):
    colors = [(value, 0, 0) for value in range(3)]
    if kind == "folder":
        path = tmp_path
        for number, value in enumerate(colors):
            write(tmp_path / f"{number}.png", value)
    elif kind == "parquet":
        images = [encoded(value) for value in colors]
        path = write_parquet(tmp_path / "a.parquet", images, row_group_size=1)
    else:
        path = shard_of(tmp_path, 3)
    dataset = open_images(str(path))
    size = len(pickle.dumps(dataset))
    assert [color(dataset, index) for index in range(3)] == colors
    data = pickle.dumps(dataset)
    assert len(data) == size
    copy = pickle.loads(data)
    assert [color(copy, index) for index in range(3)] == colors
    assert names(copy) == names(dataset)


@pytest.mark.slow
def test_digits_are_grey_and_labelled_and_fill_the_range():
    pytest.importorskip("sklearn")
    dataset = open_images("digits")
    assert (len(dataset), dataset.num_classes) == (1797, 10)
    assert dataset.class_names == tuple("0123456789")
    assert labels(dataset)[:10] == list(range(10))
    pixels = torch.from_numpy(np.array(dataset.read(0)))
    assert pixels.shape == (32, 32, 3)
    assert torch.equal(pixels[..., 0], pixels[..., 2])
    assert pixels.min() == 0
    assert pixels.max() >= 240
    assert dataset.name(7) == "digits:7"


def test_real_photographs_open_with_their_class_names(shared):
    pytest.importorskip("pyarrow")
    dataset = open_images(str(shared / "data" / "clothing64-mini-train.parquet"))
    assert (len(dataset), dataset.num_classes) == (170, 17)
    assert dataset.class_names[:2] == ("Blazer", "Blouse")
    assert sorted(labels(dataset)) == sorted(10 * list(range(17)))
    assert dataset.read(169).size == (64, 64)
    assert dataset.broken == {}


def test_a_real_file_of_several_row_groups_is_counted_from_its_header(shared):
    pytest.importorskip("pyarrow")
    dataset = open_images(str(shared / "data" / "imagenette64-val.parquet"))
    assert (len(dataset), dataset.num_classes) == (3925, 10)
    assert dataset.class_names[0] == "n01440764 tench"
    assert dataset.read(3924).size == (64, 64)
