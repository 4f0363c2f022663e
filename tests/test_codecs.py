"""Tests of `benchmarks.codecs`."""

import io
import json

import numpy as np
import pytest
from PIL import Image

from benchmarks import codecs
from mergevq.metrics.baselines import file_formats
from mergevq.metrics.lpips import Perceptual
from mergevq.runtime.files import write_tensors
from mergevq.tokenizer.compressed import PictureCodec, compress_image, decompress_image
from tests.support.tables import tables

pytestmark = pytest.mark.filterwarnings("ignore:.*differs from the published LPIPS:UserWarning")


@pytest.fixture
def picture():
    coarse = np.random.default_rng(0).integers(0, 256, (6, 8, 3), np.uint8)
    return Image.fromarray(coarse).resize((80, 64), Image.Resampling.BICUBIC)


def test_a_reduced_pixel_is_the_mean_of_its_area(picture):
    half = np.asarray(codecs.reduced(picture, 32), dtype=float)
    assert half.shape == (32, 40, 3)
    areas = np.asarray(picture, dtype=float).reshape(32, 2, 40, 2, 3)
    # Rows and columns are rounded in turn.
    assert np.abs(half - areas.mean((1, 3))).max() <= 1
    with pytest.raises(SystemExit, match=r"short side of 64 pixels must be at least --side \(65\)"):
        codecs.reduced(picture, 65)


def test_a_rival_answers_with_its_best_file_of_as_many_bytes(picture):
    judge = codecs.Judge(picture, lambda first, second: (first - second).abs().mean())
    rival = codecs.Rival(judge, "JPEG")
    files = []
    for quality in rival.qualities:
        buffer = io.BytesIO()
        picture.save(buffer, "JPEG", quality=quality, optimize=True)
        back = Image.open(buffer)
        files.append(codecs.File(len(buffer.getvalue()), judge.psnr(back), judge.lpips(back)))
    own = codecs.File(files[40].num_bytes, files[20].psnr, 0.0)
    fitting = [file for file in files if file.num_bytes <= own.num_bytes]
    assert rival.within(own.num_bytes) == fitting[-1]


@pytest.mark.slow
def test_the_record_holds_real_files_and_the_plot_is_drawn(picture, tmp_path):
    pytest.importorskip("constriction", reason="files need the codec extra")
    pytest.importorskip("matplotlib", reason="plots need the eval extra")
    weights = Perceptual("squeeze").state_dict()
    for name, tensor in weights.items():
        weights[name] = tensor.abs() if "lin" in name else tensor
    write_tensors(tmp_path / "lpips_squeeze.safetensors", weights)
    (tmp_path / "pictures").mkdir()
    picture.save(tmp_path / "pictures" / "one.png")
    command = [str(tmp_path / "pictures"), "--model", "digits32", "--num-kept", "32", "12"]
    command += ["--side", "32", "--lpips", str(tmp_path), "--lpips-trunk", "squeeze"]
    assert codecs.main([*command, "--out", str(tmp_path / "out")]) == 0
    record = json.loads((tmp_path / "out" / "codecs.json").read_text())
    assert record["data"]["pictures"] == [{"name": "one", "height": 32, "width": 40}]
    assert [row["num_kept"] for row in record["results"]] == [12, 32]
    codec, small = PictureCodec.from_pretrained("digits32"), codecs.reduced(picture, 32)
    for row in record["results"]:
        quality = codecs.Quality(num_kept=row["num_kept"])
        data = compress_image(codec, small, quality=quality).data
        back = decompress_image(codec, data)
        assert row["mvq"]["mean_bytes"] == len(data)
        assert row["mvq"]["bits_per_pixel"] == 8 * len(data) / (40 * 32)
        expected = codecs.psnr(*(codecs.to_tensor(each)[None] for each in (small, back)))
        # Another process may add in another order.
        assert row["mvq"]["psnr"] == pytest.approx(float(expected), abs=0.05)
        assert [file["file_format"] for file in row["files"]] == list(file_formats())
        for file in row["files"]:
            fits = file["mean_bytes"] <= len(data)
            assert (file["num_above_budget"] == 0) == fits
            assert (file["num_better"]["psnr"] == 1) == (file["psnr"] > row["mvq"]["psnr"])
    head, _, first, *_ = tables.table("codecs", ["out"], tmp_path).splitlines()
    assert head.startswith("| model | files | bytes | bits per pixel | PSNR (dB) | LPIPS |")
    size = record["results"][0]["mvq"]["mean_bytes"]
    assert first.startswith(f"| `out` | `.mvq`, K = 12 | {size:.0f} |")
    with Image.open(tmp_path / "out" / "codecs.png") as plot:
        assert plot.width > 600
