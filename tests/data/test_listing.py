"""Finding files: patterns, links, everything that is not used, and splits that stay apart."""

import os

import pytest

from mergevq.data.listing import ending_of, is_hidden, list_files, looks_like_picture, split_of


def touch(root, *names):
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()
    return str(root)


def found(path):
    return list_files(path).names


# Names


@pytest.mark.parametrize(
    ("name", "split"),
    [
        ("train", "train"),
        ("Training", "train"),
        ("val2017", "validation"),
        ("valid", "validation"),
        ("test_1", "test"),
        ("train_station", None),
        ("cat", None),
        ("", None),
    ],
)
def test_a_split_is_a_whole_name_perhaps_with_a_number(name, split):
    assert split_of(name) == split


def test_endings_are_in_lower_case_and_foreign_formats_look_like_pictures():
    assert ending_of("a.b.PNG") == ".png"
    assert [looks_like_picture(name) for name in ("x.HEIC", "x.jpg", "x.txt", "jpg")] == [
        True,
        True,
        False,
        False,
    ]


def test_hidden_files_and_folders_of_systems_are_no_data():
    assert [is_hidden(name) for name in ("./a/b", ".a/b", "a/.b", "a/@eaDir/b", "a/b")] == [
        False,
        True,
        True,
        True,
        False,
    ]


# Finding


def test_all_usual_endings_of_the_formats_that_are_read_are_found(tmp_path):
    names = ["a.jfif", "b.jp2", "c.ppm", "d.JPG", "e.tif"]
    listing = list_files(touch(tmp_path, *names))
    assert (listing.names, listing.kind, len(listing.unused)) == (names, "images", 0)


def test_only_the_star_is_a_pattern(tmp_path):
    touch(tmp_path, "x [1]?/a.tar", "x [1]?/b.tar", "x 1a/c.tar")
    assert found(f"{tmp_path}/x [1]?/*.tar") == ["a.tar", "b.tar"]
    assert found(f"{tmp_path}/x */c.tar") == ["c.tar"]
    with pytest.raises(ValueError, match=r"x \[2\]/\*\.tar' does not exist"):
        list_files(f"{tmp_path}/x [2]/*.tar")


def test_a_range_of_a_million_million_files_is_refused_before_it_is_written_out():
    with pytest.raises(ValueError, match=r"names 999,999,999 files"):
        list_files("s-{1..999999999}.tar")


def test_a_folder_that_cannot_be_read_is_named(tmp_path, monkeypatch):
    touch(tmp_path, "cat/a.png", "dog/b.png")
    scan = os.scandir

    def refuse(path):
        if str(path).endswith("dog"):
            raise PermissionError(13, "Permission denied", path)
        return scan(path)

    monkeypatch.setattr("mergevq.data.listing.os.scandir", refuse)
    with pytest.raises(ValueError, match=r"folder .*dog cannot be read: Permission denied"):
        list_files(str(tmp_path))


# Links


def test_a_link_to_the_parent_adds_nothing_and_is_counted(tmp_path):
    touch(tmp_path, "cat/a.png", "dog/b.png")
    (tmp_path / "cat" / "up").symlink_to("..")
    (tmp_path / "itself").symlink_to(".")
    (tmp_path / "again").symlink_to(".")
    listing = list_files(str(tmp_path))
    assert listing.names == ["cat/a.png", "dog/b.png"]
    assert len(listing.unused) == 3
    assert "a link leads to this folder a second time" in listing.unused.lines()[0]


def test_a_folder_is_read_once_and_by_its_own_name(tmp_path):
    touch(tmp_path, "b/a.png", "c/a.png")
    (tmp_path / "a").symlink_to("b")
    (tmp_path / "z").symlink_to("b")
    assert found(str(tmp_path)) == ["b/a.png", "c/a.png"]
    assert found(f"{tmp_path}/*") == ["b/a.png", "c/a.png"]


def test_links_to_other_places_are_followed(tmp_path):
    touch(tmp_path, "elsewhere/cats/a.png", "data/dog/b.png")
    (tmp_path / "data" / "cat").symlink_to(tmp_path / "elsewhere" / "cats")
    assert found(str(tmp_path / "data")) == ["cat/a.png", "dog/b.png"]


# What is not used


def test_pictures_of_formats_that_are_not_read_are_counted_and_the_first_is_named(tmp_path):
    touch(tmp_path, "a.png", "b.heic", "c.AVIF", "d.jxl", "notes.txt")
    unused = list_files(str(tmp_path)).unused
    assert len(unused) == 3
    assert unused.lines() == [
        f"3 not used, the first is {str(tmp_path / 'b.heic')!r}: this format is not read; convert "
        "to PNG or JPEG"
    ]


def test_compressed_shards_beside_others_are_counted(tmp_path):
    touch(tmp_path, "a-0.tar", "a-1.tar.gz")
    assert "compressed shards are not read" in list_files(str(tmp_path)).unused.lines()[0]


def test_pipes_devices_and_dead_links_are_no_images(tmp_path):
    touch(tmp_path, "a.png")
    os.mkfifo(tmp_path / "b.png")
    (tmp_path / "c.png").symlink_to("/dev/zero")
    (tmp_path / "d.png").symlink_to("nowhere")
    listing = list_files(str(tmp_path))
    assert listing.names == ["a.png"]
    assert "3 not used" in listing.unused.lines()[0]
    assert "no regular file" in listing.unused.lines()[0]
    with pytest.raises(ValueError, match=r"b\.png must be a regular file"):
        list_files(str(tmp_path / "b.png"))


def test_thumbnails_of_a_storage_box_are_no_class(tmp_path):
    touch(tmp_path, "cat/a.png", "@eaDir/cat/thumb.png", "cat/@eaDir/x.jpg", "__MACOSX/a.png")
    listing = list_files(str(tmp_path))
    assert listing.names == ["cat/a.png"]
    assert len(listing.unused) == 3


def test_where_nothing_is_found_the_reasons_are_given(tmp_path):
    with pytest.raises(ValueError, match=r"holds no images.*1 not used, .*a\.heic.*not read"):
        list_files(touch(tmp_path, "a.heic"))


# Splits

JOINED = {
    "hugging face": (
        "data/train-00000-of-00002.parquet",
        "data/train-00001-of-00002.parquet",
        "data/validation-00000-of-00001.parquet",
        "data/test-00000-of-00001.parquet",
    ),
    "hugging face folders": ("default/train/0000.parquet", "default/validation/0000.parquet"),
    "shards in folders": ("train/000.tar", "val/000.tar"),
    "shards side by side": ("train-000.tar", "val-000.tar"),
    "shards with a name": ("imagenet-train-0.tar", "imagenet-validation-0.tar"),
    "folders of classes": ("train/cat/1.png", "Val/cat/1.png"),
    "deeper": ("set/train/cat/1.png", "set/test/cat/1.png"),
    "inside classes": ("cat/train/1.png", "cat/test/1.png", "dog/train/1.png"),
    "coco": ("train2017/1.jpg", "val2017/1.jpg", "unlabeled2017/1.jpg"),
    "names of several words": ("train_images/1.png", "test_images/1.png"),
    "pictures side by side": ("train_1.png", "train_2.png", "test_1.png"),
}


@pytest.mark.parametrize("names", JOINED.values(), ids=JOINED)
def test_splits_are_not_joined_and_each_path_that_is_offered_opens(tmp_path, names):
    with pytest.raises(ValueError, match=r"holds splits .* which would be joined; give") as error:
        list_files(touch(tmp_path, *names))
    offered = [part for part in str(error.value).split("'")[1:-1] if str(tmp_path) in part][1:]
    assert len(offered) > 1
    opened = [list_files(path).paths() for path in offered]
    assert all(opened)
    assert not set(opened[0]) & set(opened[1])


def test_a_pattern_is_guarded_and_shards_that_are_each_named_are_joined(tmp_path):
    touch(tmp_path, "train-000.tar", "val-000.tar")
    with pytest.raises(ValueError, match=r"holds splits \(train, val\)"):
        list_files(f"{tmp_path}/*.tar")
    assert found(f"{tmp_path}/train-*.tar, {tmp_path}/val-*.tar") == [
        "train-000.tar",
        "val-000.tar",
    ]


@pytest.mark.parametrize(
    "names",
    [
        ("train/1.png", "bus/1.png"),
        ("train_station/1.png", "test_tube/1.png", "cat/1.png"),
        ("bus/train_1.png", "bus/test_1.png", "bus/cat_1.png"),
        ("train-000.tar", "train-001.tar"),
        ("cat/test-1.png", "dog/train-1.png"),
        ("cat/test-1.png", "cat/train-1.png", "dog/1.png"),
        ("train/a/1.png", "training/a/1.png"),
    ],
)
def test_classes_that_sound_like_splits_are_left_alone(tmp_path, names):
    assert found(touch(tmp_path, *names)) == sorted(names)


def test_names_of_splits_above_the_path_do_not_matter(tmp_path):
    touch(tmp_path, "train/val/cat/1.png", "train/val/dog/1.png")
    assert found(str(tmp_path / "train" / "val")) == ["cat/1.png", "dog/1.png"]
