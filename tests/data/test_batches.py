"""Preparing images, holding some out, and the streams of batches."""

import logging
import math
import pickle
import subprocess
import sys
import unicodedata
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from mergevq.config.training import DataConfig
from mergevq.data import batches
from mergevq.data.batches import Batch, open_train_val, split, train_batches
from mergevq.data.images import open_images
from mergevq.data.prepare import BrokenImageError, crop_square
from mergevq.metrics.image import to_uint8
from tests.support.data import noise, ramp, whole

# Newer Pythons warn of the loader's default way to start processes.
forks = pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")


AUGMENTED = DataConfig(crop="random", flip=True)


def stream(dataset, data=AUGMENTED, num_steps=6, **options):
    settings = {
        "image_size": 8,
        "batch_size": 4,
        "seed": 3,
        "student_size": 6,
        "teacher_size": 5,
        "num_workers": 0,
    }
    return list(train_batches(dataset, data, num_steps=num_steps, **(settings | options)))


def assert_same(batches, expected):
    assert len(batches) == len(expected)
    for batch, other in zip(batches, expected, strict=True):
        for field in Batch._fields:
            assert torch.equal(getattr(batch, field), getattr(other, field)), field


def joined(first, second):
    """Two ranks' batches side by side."""
    pairs = zip(first, second, strict=True)
    return [Batch(*(torch.cat(parts) for parts in zip(*pair, strict=True))) for pair in pairs]


def test_values_beyond_the_range_are_clipped_and_the_nearest_byte_is_chosen():
    image = torch.tensor([-3.0, -1.0, 0.0, 1 / 127.5 * 1.4 - 1, 2.0]).expand(3, 1, 5)
    assert to_uint8(image)[0, 0].tolist() == [0, 0, 128, 1, 255]


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_values_that_are_not_finite_have_no_pixels(value):
    with pytest.raises(ValueError, match="not finite"):
        to_uint8(torch.full((3, 1, 1), value))


# Holding out


def test_a_split_is_a_partition_that_keeps_names_and_labels(dataset):
    train, val = split(dataset, 0.4)
    parts = [part.name(index) for part in (train, val) for index in range(len(part))]
    assert sorted(parts) == [dataset.name(index) for index in range(7)]
    assert all(
        part.label(index) == part.class_names.index(part.name(index).split("/")[0])
        for part in (train, val)
        for index in range(len(part))
    )


def test_a_split_has_about_the_share_that_was_asked_for(tmp_path):
    for number in range(400):
        Image.new("L", (1, 1)).save(tmp_path / f"{number}.bmp")
    dataset = open_images(str(tmp_path))
    assert 0.2 < len(split(dataset, 0.25)[1]) / 400 < 0.3
    assert len(split(dataset, 1e-9)[1]) == 1
    assert len(split(dataset, 1 - 1e-9)[0]) == 1


def test_an_image_stays_on_its_side_when_others_go(folder, dataset):
    held_out = {split(dataset, 0.4)[1].name(index) for index in range(len(split(dataset, 0.4)[1]))}
    gone = next(index for index in range(7) if dataset.name(index) not in held_out)
    (folder / dataset.name(gone)).unlink()
    val = split(open_images(str(folder)), 0.4)[1]
    assert {val.name(index) for index in range(len(val))} == held_out


def test_the_split_is_the_same_on_every_machine(dataset):
    val = split(dataset, 0.4)[1]
    assert [val.name(index) for index in range(len(val))] == ["cat/4.png", "dog/3.png"]


def test_one_image_cannot_be_split(dataset):
    with pytest.raises(ValueError, match="1 image cannot be split; give val_path"):
        split(dataset.subset([0]), 0.5)


@pytest.mark.parametrize("fraction", [0.0, 1.0, math.nan])
def test_an_impossible_share_is_an_error(dataset, fraction):
    with pytest.raises(ValueError, match=r"val_fraction \(.*\) must be in \(0, 1\)"):
        split(dataset, fraction)


def test_validation_images_come_from_their_own_place_or_are_held_out(folder):
    held_out = DataConfig(path=str(folder), val_fraction=0.4, max_images=3)
    train, val = open_train_val(held_out)
    assert (len(train), len(val)) == (3, 2)
    own = replace(held_out, val_path=str(folder), max_images=None)
    assert [len(part) for part in open_train_val(own)] == [7, 7]


def test_fewer_training_images_are_of_all_classes(folder):
    data = DataConfig(path=str(folder), val_path=str(folder), max_images=3)
    train, val = open_train_val(data)
    assert [train.label(index) for index in range(3)] == [0, 0, 1]
    assert len(val) == 7


def test_the_limit_on_pixels_holds_in_training_and_validation(folder):
    # The images are 8 x 14 to 14 x 8 pixels: 112 to 121.
    data = DataConfig(path=str(folder), val_path=str(folder), max_pixels=112)
    for part in open_train_val(data):
        assert sum(is_readable(part, index) for index in range(len(part))) == 2
    for part in open_train_val(replace(data, max_pixels=121)):
        assert all(is_readable(part, index) for index in range(len(part)))


def is_readable(dataset, index):
    try:
        return dataset.read(index).mode == "RGB"
    except BrokenImageError:
        return False


def test_both_forms_of_an_accent_are_on_one_side_of_a_split(tmp_path):
    sides = []
    for form in ("NFC", "NFD"):
        for number in range(20):
            name = unicodedata.normalize(form, f"caf\u00e9 {number}.png")
            (tmp_path / form).mkdir(exist_ok=True)
            Image.new("RGB", (2, 2)).save(tmp_path / form / name)
        val = split(open_images(str(tmp_path / form)), 0.4)[1]
        sides.append({val.name(index).split()[1] for index in range(len(val))})
    assert sides[0] == sides[1]


def test_validation_classes_must_be_numbered_as_in_training(folder, tmp_path):
    (tmp_path / "val").mkdir()
    (folder / "dog").rename(tmp_path / "val" / "dog")
    (folder / "cow").mkdir()
    ramp(8, 8).save(folder / "cow" / "x.png")
    config = DataConfig(path=str(folder), val_path=str(tmp_path / "val"))
    with pytest.raises(ValueError, match=r"classes dog, which are not those of .*: cat, cow"):
        open_train_val(config)


def test_validation_images_may_lack_labels_or_the_last_classes(folder, tmp_path):
    (tmp_path / "val").mkdir()
    ramp(8, 8).save(tmp_path / "val" / "x.png")
    config = DataConfig(path=str(folder), val_path=str(tmp_path / "val"))
    assert open_train_val(config)[1].num_classes == 0
    (tmp_path / "val" / "cat").mkdir()
    (tmp_path / "val" / "x.png").rename(tmp_path / "val" / "cat" / "x.png")
    assert open_train_val(config)[1].class_names == ("cat",)


# Training batches


def test_large_jpegs_are_decoded_smaller_for_training_alone(tmp_path, generator):
    pixels = np.asarray(noise(generator, 32, 24).resize((256, 192), Image.Resampling.BICUBIC))
    for number in range(3):
        (tmp_path / "photos").mkdir(exist_ok=True)
        picture = Image.fromarray(np.roll(pixels, 50 * number, 1))
        picture.save(tmp_path / "photos" / f"{number}.jpg", quality=95)
    photos = open_images(str(tmp_path / "photos"))
    data = DataConfig(crop="random", flip=True)
    options = {"image_size": 12, "student_size": 3, "teacher_size": 8, "num_steps": 3}
    small = stream(photos, data, **options)
    whole_ones = stream(photos, replace(data, reduced_jpeg=False), **options)
    for first, second in zip(small, whole_ones, strict=True):
        assert torch.equal(first.index, second.index)
        for name in ("image", "teacher_view"):
            difference = 127.5 * (getattr(first, name) - getattr(second, name)).abs()
            assert 0 < difference.mean() < 1
    (evaluated,) = whole(photos, image_size=12)
    exact = [np.asarray(crop_square(photos.read(number), 12)) for number in range(3)]
    assert np.array_equal(to_uint8(evaluated.image).permute(0, 2, 3, 1).numpy(), np.stack(exact))


def test_workers_send_bytes(dataset):
    fetcher = batches._TrainFetcher(dataset, DataConfig(), 8, 6, 5, 0, None)
    found = fetcher[[(0, 0), (1, 1)]].batch
    for name in ("image", "student_view", "teacher_view"):
        assert getattr(found, name).dtype == torch.uint8
    assert found.to_batch(torch.device("cpu")).image.is_contiguous()


def test_a_batch_has_the_asked_for_shapes_types_and_range(dataset):
    batch = stream(dataset, num_steps=1)[0]
    assert batch.image.shape == (4, 3, 8, 8)
    assert batch.student_view.shape == (4, 3, 6, 6)
    assert batch.teacher_view.shape == (4, 3, 5, 5)
    assert (batch.label.dtype, batch.index.dtype) == (torch.int64, torch.int64)
    assert -1 <= batch.image.min() < -0.9
    assert 0.9 < batch.image.max() <= 1
    assert batch.label.tolist() == [dataset.label(index) for index in batch.index.tolist()]


def test_views_that_are_not_asked_for_are_not_made(dataset):
    batch = stream(dataset, num_steps=1, student_size=None, teacher_size=None)[0]
    assert batch.student_view is None
    assert batch.teacher_view is None


def test_adding_views_changes_nothing_else(dataset):
    assert_same(
        [batch._replace(student_view=batch.index) for batch in stream(dataset)],
        [
            alone._replace(student_view=alone.index, teacher_view=batch.teacher_view)
            for alone, batch in zip(
                stream(dataset, student_size=None, teacher_size=None),
                stream(dataset, student_size=None),
                strict=True,
            )
        ],
    )


def test_the_views_do_not_depend_on_how_the_image_is_cropped(dataset):
    for batch, other in zip(stream(dataset), stream(dataset, DataConfig()), strict=True):
        assert not torch.equal(batch.image, other.image)
        assert torch.equal(batch.student_view, other.student_view)
        assert torch.equal(batch.teacher_view, other.teacher_view)


def test_every_epoch_shows_every_image_once_in_another_order(dataset):
    shown = torch.cat([batch.index for batch in stream(dataset, num_steps=14)]).reshape(8, 7)
    assert torch.equal(shown.sort().values, torch.arange(7).expand(8, 7))
    assert len({tuple(order) for order in shown.tolist()}) == 8


def test_another_seed_gives_another_order_and_other_crops(dataset):
    assert not torch.equal(stream(dataset)[0].index, stream(dataset, seed=4)[0].index)
    one = dataset.subset([0])
    assert not torch.equal(stream(one)[0].student_view, stream(one, seed=4)[0].student_view)


def test_the_same_seed_gives_the_same_bits(dataset):
    assert_same(stream(dataset), stream(dataset))


def test_the_global_generator_is_left_alone(dataset):
    before = torch.get_rng_state()
    stream(dataset)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("step", [1, 4, 6])
def test_starting_at_a_step_equals_skipping_to_it(dataset, step):
    assert_same(stream(dataset, start_step=step), stream(dataset)[step:])


def test_two_ranks_side_by_side_equal_one_process(dataset):
    ranks = [stream(dataset, rank=rank, world_size=2) for rank in range(2)]
    assert_same(joined(*ranks), stream(dataset))


def test_the_batch_size_does_not_change_the_stream(dataset):
    small, large = stream(dataset, num_steps=6), stream(dataset, num_steps=3, batch_size=8)
    assert_same([joined([a], [b])[0] for a, b in zip(small[::2], small[1::2], strict=True)], large)


def test_one_image_fills_a_batch_with_its_own_crops(dataset):
    batch = stream(dataset.subset([2]), num_steps=1)[0]
    assert batch.index.tolist() == [0, 0, 0, 0]
    assert not torch.equal(batch.student_view[0], batch.student_view[1])


def test_the_crop_and_flip_settings_have_their_effect(tmp_path):
    ramp(16, 8).save(tmp_path / "x.png")
    one = open_images(str(tmp_path))
    columns, plain = {}, {"student_size": None, "teacher_size": None}
    for crop in ("center", "random"):
        for flip in (False, True):
            data = DataConfig(crop=crop, flip=flip)
            images = to_uint8(torch.cat([batch.image for batch in stream(one, data, 40, **plain)]))
            columns[crop, flip] = {tuple(image[0, 0, [0, -1]].tolist()) for image in images}
    assert columns["center", False] == {(4, 11)}
    assert columns["center", True] == {(4, 11), (11, 4)}
    assert columns["random", False] == {(start, start + 7) for start in range(9)}
    assert len(columns["random", True]) == 18


def test_the_teacher_sees_the_whole_short_side_and_the_student_a_part(tmp_path):
    ramp(250, 250).save(tmp_path / "x.png")
    batches = stream(open_images(str(tmp_path)), num_steps=5, teacher_size=250, student_size=250)
    teacher, student = (
        to_uint8(torch.cat([batch[field] for batch in batches])) for field in (3, 2)
    )
    whole = torch.from_numpy(np.array(ramp(250, 250))).permute(2, 0, 1)
    assert torch.equal(teacher, whole.expand(20, 3, 250, 250))
    span = student[:, 0].amax((1, 2)).int() - student[:, 0].amin((1, 2)).int()
    assert span.min() < 150


@forks
@pytest.mark.parametrize("num_workers", [1, 2])
def test_workers_change_nothing(dataset, num_workers):
    assert_same(stream(dataset, num_workers=num_workers), stream(dataset))


def test_a_stream_can_be_left_early(dataset):
    settings = {"image_size": 8, "batch_size": 4, "seed": 0, "num_workers": 0}
    batches = train_batches(
        dataset, AUGMENTED, num_steps=10**9, student_size=None, teacher_size=None, **settings
    )
    assert next(batches).index.shape == (4,)


def test_everything_sent_to_workers_can_be_pickled(dataset):
    for item in (dataset, AUGMENTED, stream(dataset, num_steps=1)[0]):
        pickle.loads(pickle.dumps(item))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 5, "world_size": 2}, r"batch_size \(5\) must be a positive multiple"),
        ({"batch_size": 0}, r"batch_size \(0\) must be a positive multiple"),
        ({"rank": 2, "world_size": 2}, r"rank \(2\) must be in \[0, world_size \(2\)\)"),
        ({"rank": -1}, r"rank \(-1\) must be in"),
        ({"image_size": 0}, r"image_size \(0\) must be at least 1 pixel"),
        ({"student_size": 0}, r"student_size \(0\) must be at least 1 pixel"),
        ({"teacher_size": -3}, r"teacher_size \(-3\) must be at least 1 pixel"),
        ({"start_step": -1}, r"start_step \(-1\) must be at least 0"),
    ],
)
def test_impossible_requests_are_errors_before_anything_is_read(dataset, options, message):
    with pytest.raises(ValueError, match=message):
        stream(dataset, **options)


def test_an_empty_data_set_is_an_error(dataset):
    with pytest.raises(ValueError, match="the data set holds no images"):
        stream(dataset.subset([]))


# Broken images in training


def damage(folder, *names):
    for name in names:
        (folder / name).write_bytes(b"damaged")


def test_a_broken_image_is_replaced_by_the_next_and_counted_once(folder, dataset, caplog):
    damage(folder, "cat/2.png", "cat/4.png")
    batches = stream(dataset, num_steps=7)
    index = torch.cat([batch.index for batch in batches]).reshape(4, 7)
    # Images 1 and 2 are damaged, so image 3 stands in for both.
    assert torch.equal(index.sort().values, torch.tensor([0, 3, 3, 3, 4, 5, 6]).expand(4, 7))
    assert list(dataset.broken) in (["cat/2.png", "cat/4.png"], ["cat/4.png", "cat/2.png"])
    assert len(caplog.records) == 2
    assert {record.name for record in caplog.records} == {"mergevq"}


def test_the_replacement_keeps_the_labels_of_what_is_shown(folder, dataset):
    damage(folder, "cat/6.png")
    for batch in stream(dataset, num_steps=7):
        assert batch.label.tolist() == [dataset.label(index) for index in batch.index.tolist()]


def test_broken_images_do_not_tear_ranks_or_resumption_apart(folder, dataset):
    damage(folder, "cat/2.png", "dog/5.png")
    expected = stream(dataset)
    ranks = [stream(open_images(str(folder)), rank=rank, world_size=2) for rank in range(2)]
    assert_same(joined(*ranks), expected)
    assert_same(stream(dataset, start_step=3), expected[3:])


def test_a_replacement_comes_from_the_same_subset(folder, dataset):
    damage(folder, "cat/2.png")
    batches = stream(dataset.subset([1, 6]), num_steps=2)
    assert {index for batch in batches for index in batch.index.tolist()} == {1}
    assert list(dataset.broken) == ["cat/2.png"]


def test_no_usable_image_is_an_error(folder, dataset):
    damage(folder, *(dataset.name(index) for index in range(7)))
    with pytest.raises(ValueError, match="none of the 7 images can be read: cannot read"):
        stream(dataset)
    with pytest.raises(ValueError, match="none of the 7 images can be read"):
        whole(dataset)


@forks
def test_broken_images_found_by_workers_are_known_here(folder, dataset, caplog):
    damage(folder, "cat/2.png")
    stream(dataset, num_workers=2, num_steps=7)
    assert list(dataset.broken) == ["cat/2.png"]
    assert caplog.record_tuples == [
        (
            "mergevq",
            logging.WARNING,
            "cannot read cat/2.png: no image format that is read (1 broken so far)",
        )
    ]


@forks
@pytest.mark.slow
@pytest.mark.parametrize("ending", ["", "raise SystemExit(3)"])
def test_workers_that_nobody_closed_do_not_keep_python_from_ending(folder, ending):
    code = f"""
import sys
from mergevq.config.training import DataConfig
from mergevq.data.batches import train_batches
from mergevq.data.images import open_images

sys.kept = train_batches(
    open_images({str(folder)!r}), DataConfig(), image_size=16, batch_size=2, num_steps=99, seed=0,
    student_size=None, teacher_size=None, num_workers=2,
)
next(sys.kept)
{ending}
"""
    ended = subprocess.run([sys.executable, "-c", code], check=False, timeout=100, stderr=-1)
    assert (ended.returncode, ended.stderr) == (3 if ending else 0, b"")


@pytest.mark.slow
def test_errors_of_workers_arrive_here(folder, dataset):
    damage(folder, *(dataset.name(index) for index in range(7)))
    with pytest.raises(ValueError, match="none of the 7 images can be read"):
        stream(dataset, num_workers=1)


def test_ranks_share_an_evaluation_and_concatenate_to_it(dataset):
    indices = [
        [batch.index.tolist() for batch in whole(dataset, rank=rank, world_size=2)]
        for rank in range(2)
    ]
    assert indices == [[[0, 1], [4, 5]], [[2, 3], [6]]]


def test_a_rank_without_images_has_no_batches(dataset):
    assert whole(dataset.subset([0]), rank=1, world_size=2) == []


def test_fewer_images_are_spread_over_the_whole(dataset):
    batches = whole(dataset, max_images=3)
    assert [batch.index.tolist() for batch in batches] == [[0, 2, 4]]
    assert len(whole(dataset, max_images=99)) == 2


def test_broken_images_are_left_out_of_an_evaluation_and_counted(folder, dataset, caplog):
    damage(folder, *(dataset.name(index) for index in (0, 1, 2, 3, 5)))
    assert [batch.index.tolist() for batch in whole(dataset)] == [[4, 6]]
    assert len(dataset.broken) == 5
    assert len(caplog.records) == 5


@forks
def test_workers_keep_the_order_of_an_evaluation(dataset):
    settings = {"batch_size": 1}
    expected = whole(dataset, **settings)
    for batch, other in zip(whole(dataset, num_workers=2, **settings), expected, strict=True):
        assert torch.equal(batch.image, other.image)
        assert torch.equal(batch.index, other.index)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_images": 0}, r"max_images \(0\) must be at least 1"),
        ({"image_size": 0}, r"image_size \(0\) must be at least 1 pixel"),
        ({"batch_size": 3, "world_size": 2}, r"multiple of the number of ranks \(2\)"),
    ],
)
def test_impossible_evaluations_are_errors(dataset, options, message):
    with pytest.raises(ValueError, match=message):
        whole(dataset, **options)
