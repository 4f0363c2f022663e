"""Pictures that are kept give the loader's pixels; those that do not fit, an error."""

import multiprocessing
from dataclasses import replace

import pytest
import torch
from PIL import Image

from mergevq.config.objective import NoTeacher, SelfDistillation
from mergevq.config.tokenizer import KeptConfig
from mergevq.config.training import DataConfig, TokenizerRun
from mergevq.data import cached
from mergevq.data.batches import train_batches
from mergevq.data.cached import Pictures, Squares, cached_batches, crop
from mergevq.data.images import open_images
from mergevq.metrics.image import to_uint8
from mergevq.runtime import device as devices
from mergevq.training.tokenizer import run_batches
from tests.support.data import noise
from tests.support.evaluations import ALONE

CPU = torch.device("cpu")
SETTINGS = {"image_size": 8, "batch_size": 4, "num_steps": 9, "seed": 3, "device": CPU}


@pytest.fixture
def dataset(tmp_path, generator):
    """Pictures of several shapes in two classes: square, of the size, turned, JPEG, and broken."""
    sizes = [(8, 8), (13, 8), (9, 14), (40, 24), (11, 11), (64, 48), (30, 21)]
    for number, size in enumerate(sizes):
        path = tmp_path / ("cat", "dog")[number % 2] / f"{number}.png"
        path.parent.mkdir(exist_ok=True)
        noise(generator, *size).save(path)
    exif = Image.Exif()
    exif[0x0112] = 6
    photograph = noise(generator, 10, 8).resize((80, 64), Image.Resampling.BICUBIC)
    photograph.save(tmp_path / "cat" / "turned.jpg", exif=exif)
    whole = (tmp_path / "dog" / "5.png").read_bytes()
    (tmp_path / "dog" / "broken.png").write_bytes(whole[:-900])
    (tmp_path / "cat" / "nothing.png").write_bytes(b"no picture")
    return open_images(str(tmp_path))


def assert_equal(found, expected):
    found, expected = list(found), list(expected)
    assert len(found) == len(expected) > 0
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one.image, other.image)
        assert torch.equal(one.label, other.label)
        assert torch.equal(one.index, other.index)
        assert one.student_view is one.teacher_view is None


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
@pytest.mark.parametrize("cache", ["memory", "device"])
@pytest.mark.parametrize(("crop", "flip"), [("center", False), ("random", False), ("random", True)])
def test_the_same_draws_give_the_pixels_of_the_loader(dataset, cache, crop, flip):
    data = DataConfig(crop=crop, flip=flip, cache=cache)
    views = {"student_size": None, "teacher_size": None}
    expected = list(train_batches(dataset, data, num_workers=0, **views, **SETTINGS))
    workers = 2 if cache == "memory" else 0
    found = cached_batches(dataset, data, num_workers=workers, **SETTINGS)
    before = set(multiprocessing.active_children())
    first = next(found)
    assert set(multiprocessing.active_children()) <= before
    assert_equal([first, *found], expected)
    assert len(dataset.broken) == 2
    later = {**SETTINGS, "num_workers": 0, "start_step": 5, "rank": 1, "world_size": 2}
    assert_equal(
        cached_batches(dataset, data, **later), train_batches(dataset, data, **views, **later)
    )


def test_a_worker_reads_on_where_it_was():
    tasks = [task[0].item() for task in cached._in_runs(32 * 10, 3)]
    assert tasks == [32 * number for number in (0, 4, 8, 1, 5, 9, 2, 6, 3, 7)]
    assert torch.equal(torch.cat(cached._in_runs(70, 0)), torch.arange(70))


def test_nothing_is_waited_for_on_a_device():
    """Tensors of `meta` have no values: what would need one, or another device's, is an error."""
    meta = torch.device("meta")
    pictures = Pictures(torch.empty(60, 3, dtype=torch.uint8, device=meta), [0], [(6, 10)], [0])
    table = torch.tensor([[0, 1], [6, 6], [0, 1]]).to(meta)
    image = crop(pictures, Squares(*table), 4, meta)
    assert (image.shape, image.dtype, image.device) == ((2, 3, 4, 4), torch.float32, meta)


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
def test_on_a_gpu_the_pixels_are_the_same_and_the_host_never_waits(dataset):
    data = DataConfig(crop="random", flip=True, cache="device")
    views = {"student_size": None, "teacher_size": None}
    expected = list(train_batches(dataset, data, num_workers=0, **views, **SETTINGS))
    options = {**SETTINGS, "device": torch.device("cuda")}
    batches = cached_batches(dataset, data, num_workers=2, **options)
    found = [next(batches)]
    torch.cuda.set_sync_debug_mode("error")
    try:
        found += batches
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert {column.device.type for batch in found for column in batch[:2]} == {"cuda"}
    # A GPU may divide in another way than a CPU: bytes are compared.
    here = [
        batch._replace(
            image=to_uint8(batch.image.cpu()), label=batch.label.cpu(), index=batch.index.cpu()
        )
        for batch in found
    ]
    assert_equal(here, [batch._replace(image=to_uint8(batch.image)) for batch in expected])


def test_without_reduction_the_pixels_are_those_of_whole_pictures(tmp_path, generator):
    picture = noise(generator, 20, 16).resize((160, 128), Image.Resampling.BICUBIC)
    picture.save(tmp_path / "0.jpg")
    found = {}
    for reduced in (False, True):
        data = DataConfig(reduced_jpeg=reduced, cache="memory")
        (batch,) = cached_batches(
            open_images(str(tmp_path)), data, num_workers=0, **{**SETTINGS, "num_steps": 1}
        )
        found[reduced] = batch.image
    assert 0 < 127.5 * (found[True] - found[False]).abs().mean() < 1


def test_pictures_that_do_not_fit_are_an_error_with_both_numbers(dataset, monkeypatch):
    monkeypatch.setattr(cached, "free_bytes", lambda _: 2000)
    data = DataConfig(cache="memory")
    message = (
        r"data\.cache \(memory\): the pictures take 1,920 bytes and may take 1,600, 80% of the "
        r"2,000 that are free \(cpu\); set data\.cache to none"
    )
    with pytest.raises(ValueError, match=message):
        next(cached_batches(dataset, data, num_workers=0, **SETTINGS))
    monkeypatch.setattr(cached, "free_bytes", lambda _: 2400)
    assert next(cached_batches(dataset, data, num_workers=0, **SETTINGS)).image.shape[0] == 4
    # Of a random crop the whole picture is kept.
    wide = replace(data, crop="random")
    with pytest.raises(ValueError, match=r"take 2,\d\d\d bytes and may take 1,920"):
        next(cached_batches(dataset, wide, num_workers=0, **SETTINGS))


def test_free_memory_is_what_the_machine_and_the_container_leave(tmp_path, monkeypatch):
    assert 0 < (devices.free_bytes(CPU) or 1) < 2**50
    (tmp_path / "meminfo").write_text("MemTotal: 900 kB\nMemAvailable: 500 kB\n")
    monkeypatch.setattr(devices, "_MEMORY", tmp_path / "meminfo")
    monkeypatch.setattr(devices, "_CONTAINER", tmp_path)
    assert devices.free_bytes(CPU) == 512_000
    (tmp_path / "memory.current").write_text("100000\n")
    (tmp_path / "memory.max").write_text("max\n")
    assert devices.free_bytes(CPU) == 512_000
    (tmp_path / "memory.max").write_text("300000\n")
    assert devices.free_bytes(CPU) == 200_000
    monkeypatch.setattr(devices, "_MEMORY", tmp_path / "none")
    assert devices.free_bytes(CPU) is None


def test_strips_cannot_be_kept_where_a_part_is_drawn(tmp_path, generator):
    noise(generator, 200, 9).save(tmp_path / "long.png")
    strips, data = open_images(str(tmp_path)), DataConfig(crop="random", cache="memory")
    with pytest.raises(ValueError, match=r"long\.png has 200 x 9 pixels.*set data\.crop"):
        next(cached_batches(strips, data, num_workers=0, **SETTINGS))
    data = replace(data, crop="center")
    options = {**SETTINGS, "num_workers": 0}
    views = {"student_size": None, "teacher_size": None}
    assert_equal(
        cached_batches(strips, data, **options), train_batches(strips, data, **views, **options)
    )


def test_no_readable_picture_is_an_error(dataset):
    names = [dataset.name(number) for number in range(len(dataset))]
    broken = dataset.subset([names.index("dog/broken.png"), names.index("cat/nothing.png")])
    with pytest.raises(ValueError, match="none of the 2 images can be read"):
        next(cached_batches(broken, DataConfig(cache="memory"), num_workers=0, **SETTINGS))


def test_a_run_takes_its_images_from_where_it_keeps_them(dataset):
    run = TokenizerRun(teacher=NoTeacher())
    run = replace(
        run,
        model=replace(run.model, image_size=32, num_kept=32),
        kept=KeptConfig(candidates=(32,)),
        data=replace(run.data, crop="random", flip=True, num_workers=0),
        train=replace(run.train, batch_size=3, num_steps=4),
    )
    kept = replace(run, data=replace(run.data, cache="device"))
    first, second = (run_batches(each, ALONE, dataset, 1) for each in (run, kept))
    assert_equal(second, first)


def test_a_teacher_with_its_own_view_needs_the_whole_picture():
    run = TokenizerRun(teacher=NoTeacher(), data=DataConfig(cache="memory"))
    with pytest.raises(ValueError, match=r"data\.cache \(memory\) must be none with teacher"):
        replace(run, teacher=SelfDistillation())
