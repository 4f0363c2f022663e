import io

import numpy as np
import pytest
import torch
from PIL import Image

from mergevq.data.prepare import to_tensor
from mergevq.metrics.baselines import Baselines, compress_within, file_formats
from mergevq.metrics.image import psnr


@pytest.fixture
def image():
    coarse = np.random.default_rng(0).integers(0, 256, (6, 6, 3), np.uint8)
    return Image.fromarray(coarse).resize((48, 48), Image.Resampling.BICUBIC)


@pytest.mark.parametrize("file_format", file_formats())
def test_files_stay_within_their_budgets_and_more_bytes_are_better(image, file_format):
    files = compress_within(image, file_format, [700, 1000])
    assert files[0].num_bytes <= 700 < files[1].num_bytes <= 1000
    assert files[0].psnr < files[1].psnr


def test_the_file_is_the_best_that_fits_and_is_counted_whole(image):
    (file,) = compress_within(image, "JPEG", [800])

    def encoded(quality):
        buffer = io.BytesIO()
        image.save(buffer, "JPEG", quality=quality, optimize=True)
        return buffer.getvalue()

    assert len(encoded(file.quality)) == file.num_bytes
    assert len(encoded(file.quality + 1)) > 800
    with Image.open(io.BytesIO(encoded(file.quality))) as decoded:
        expected = psnr(to_tensor(image)[None], to_tensor(decoded.convert("RGB"))[None])
    assert file.psnr == pytest.approx(float(expected))


def test_an_impossible_budget_gives_the_smallest_file_and_says_so(image):
    (file,) = compress_within(image, "JPEG", [10])
    assert (file.quality, file.num_bytes > 10) == (1, True)
    baselines = Baselines([10, 10_000], [0])
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None]
    baselines.update(pixels, torch.tensor([0]))
    above = {
        (row.file_format, row.budget_bytes): row.num_above_budget for row in baselines.compute()
    }
    assert above == {
        (file_format, budget): int(budget == 10)
        for file_format in file_formats()
        for budget in (10, 10_000)
    }


def test_formats_that_this_installation_does_not_write_are_left_out(monkeypatch):
    assert {"JPEG", "WebP"} <= set(file_formats())
    monkeypatch.setattr("mergevq.metrics.baselines._JXL", "no_such_package")
    monkeypatch.setattr("mergevq.metrics.baselines.features.check", lambda _: False)
    assert file_formats() == ("JPEG", "WebP")


def test_only_the_chosen_images_are_compressed(image):
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1).repeat(4, 1, 1, 1)
    baselines = Baselines([1000], [1, 3])
    baselines.update(pixels, torch.arange(4))
    for row in baselines.compute():
        assert row.num_images == 2
        assert row.psnr == pytest.approx(compress_within(image, row.file_format, [1000])[0].psnr)
