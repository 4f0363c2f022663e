import contextlib
import dataclasses
import math
import subprocess
import sys
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

from mergevq.config.evaluation import Quality
from mergevq.config.parts import Fsq, GlobalMap, GroupedLfq, MaskTokens, Pool, Queries
from mergevq.data.prepare import to_tensor
from mergevq.metrics.image import psnr
from mergevq.metrics.lpips import Perceptual
from mergevq.tokenizer.codec import decode_image, embed_image, encode_image
from mergevq.tokenizer.compressed import (
    MAGIC,
    Compressed,
    PictureCodec,
    compress_image,
    decompress_image,
    read_header,
    write_file,
)
from mergevq.tokenizer.tokenizer import Tokenizer
from tests.support.parts import tokenizer_config

IDENTITY = "0123456789abcdef" * 4


def make_tokenizer(**changes):
    """Trained on nothing: 16 pixels, patches of 2, 64 cells, K from 8."""
    torch.manual_seed(1)
    settings = {
        "image_size": 16,
        "channels": 8,
        "channel_mult": (1, 2),
        "num_res_blocks": 1,
        "num_layers": 3,
        "num_heads": 2,
        "layer_scale": 0.1,
        "num_kept": 20,
        "num_bits": 6,
        "num_decoder_layers": 1,
        "num_decoder_heads": 2,
        "source_dim": 16,
        "num_source_heads": 2,
    }
    return Tokenizer(tokenizer_config(**(settings | changes))).eval()


@pytest.fixture(scope="module")
def codec():
    return PictureCodec(tokenizer=make_tokenizer(), identity=IDENTITY)


def picture(width=16, height=16, seed=0, mode="RGB"):
    """Noise on a smooth ground."""
    numbers = np.random.default_rng(seed)
    ground = np.linspace(0, 200, width)[None, :, None] + np.zeros((height, 1, 3))
    pixels = (ground + numbers.integers(0, 50, (height, width, 3))).astype(np.uint8)
    return Image.fromarray(pixels).convert(mode)


def pixels(image):
    return np.asarray(image).tolist()


def resealed(data):
    """The bytes with the checksum that they should have."""
    return data[:-4] + zlib.crc32(data[:-4]).to_bytes(4, "little")


def changed(done: Compressed, **fields):
    """The file with other numbers in its header, and a checksum that fits."""
    header, stream = read_header(done.data)
    return write_file(dataclasses.replace(header, **fields), stream)


# ---------------------------------------------------------------------------- there and back


@pytest.mark.parametrize("size", [(16, 16), (37, 21), (5, 3), (16, 40)])
@pytest.mark.parametrize("source", ["given", "recovered"])
def test_a_file_gives_the_picture_that_its_tokens_give(codec, size, source):
    done = compress_image(codec, picture(*size), source=source)
    tokens = encode_image(codec.tokenizer, picture(*size), size_policy="tile")
    expected = decode_image(codec.tokenizer, tokens, source=source)
    assert expected.size == size
    assert pixels(decompress_image(codec, done.data)) == pixels(expected)
    assert done.header.num_kept == 20
    assert done.header.num_tiles == len(tokens.layout.corners)
    assert (done.header.map_model is None) == (source == "recovered")


@pytest.mark.parametrize("num_kept", [8, 33, 64])
def test_any_number_of_tokens_is_kept(codec, num_kept):
    done = compress_image(codec, picture(20, 16), quality=Quality(num_kept=num_kept))
    tokens = encode_image(codec.tokenizer, picture(20, 16), num_kept, size_policy="tile")
    assert pixels(decompress_image(codec, done.data)) == pixels(
        decode_image(codec.tokenizer, tokens)
    )


@pytest.mark.parametrize(("policy", "size"), [("error", (12, 20)), ("resize", (40, 20))])
def test_other_size_policies_are_those_of_the_codec(codec, policy, size):
    done = compress_image(codec, picture(*size), size_policy=policy)
    tokens = encode_image(codec.tokenizer, picture(*size), size_policy=policy)
    assert pixels(decompress_image(codec, done.data)) == pixels(
        decode_image(codec.tokenizer, tokens)
    )


@pytest.mark.parametrize("mode", ["L", "1", "P", "RGBA", "CMYK", "LA"])
def test_a_picture_of_any_mode_passes_and_alpha_is_on_white(codec, mode):
    image = picture(mode="RGB").convert(mode) if mode != "LA" else picture(mode="L").convert("LA")
    if mode == "RGBA":
        image.putalpha(0)
        white = compress_image(codec, Image.new("RGB", (16, 16), "white"))
        assert compress_image(codec, image).data == white.data
    result = decompress_image(codec, compress_image(codec, image).data)
    assert (result.mode, result.size) == ("RGB", (16, 16))


@pytest.mark.parametrize(
    ("quantizer", "sizes"),
    [(GroupedLfq(num_bits=6, group_bits=2), (4, 4, 4)), (Fsq(levels=(5, 3, 4)), (5, 3, 4))],
)
def test_tokens_in_parts_pass(quantizer, sizes):
    config = dataclasses.replace(make_tokenizer().config, quantizer=quantizer)
    torch.manual_seed(0)
    tokenizer = Tokenizer(config).eval()
    assert tokenizer.quantizer.spec.sizes == sizes
    codec = PictureCodec(tokenizer=tokenizer, identity=IDENTITY)
    tokens = encode_image(tokenizer, picture(), size_policy="tile")
    result = decompress_image(codec, compress_image(codec, picture()).data)
    assert pixels(result) == pixels(decode_image(tokenizer, tokens))


def test_a_picture_after_the_stem_gives_the_same_file(codec):
    embedded = embed_image(codec.tokenizer, picture(20, 16), size_policy="resize")
    quality = Quality(num_kept=12)
    whole = compress_image(codec, picture(20, 16), quality=quality, size_policy="resize")
    assert compress_image(codec, embedded, quality=quality).data == whole.data


def test_the_same_bytes_come_out_again(codec):
    assert (
        compress_image(codec, picture(30, 30)).data == compress_image(codec, picture(30, 30)).data
    )


@pytest.mark.slow
def test_the_same_bytes_come_out_of_any_number_of_threads(tmp_path):
    make_tokenizer().save_pretrained(tmp_path / "model")
    picture(60, 50).save(tmp_path / "a.png")
    files = []
    for threads in ("1", "2"):
        command = ["compress", "a.png", "--model", "model", "-o", threads, "--device", "cpu"]
        done = subprocess.run(
            [sys.executable, "-m", "mergevq", *command, "--precision", "float32"],
            cwd=tmp_path,
            env={"OMP_NUM_THREADS": threads, "PYTHONPATH": ":".join(sys.path)},
            check=False,
            capture_output=True,
        )
        assert done.returncode == 0, done.stderr
        files.append((tmp_path / threads / "a.mvq").read_bytes())
    assert files[0] == files[1]


def test_the_header_is_as_written(codec):
    done = compress_image(codec, picture(37, 21))
    assert done.data[:13] == MAGIC + b"\x01" + bytes.fromhex(IDENTITY)[:8]
    header, stream = read_header(done.data)
    assert header == done.header
    assert header.numbers == (37, 21, 16, 16, 2, 3, 8, 8, 20)
    assert done.data == write_file(header, stream)
    assert done.bits_per_pixel == 8 * len(done.data) / (37 * 21)
    # Nine numbers below 128 of a byte each.
    assert len(done.data) == 15 + 9 + len(stream) + 4


def test_leaving_the_map_out_costs_less(codec):
    given = compress_image(codec, picture(37, 21))
    recovered = compress_image(codec, picture(37, 21), source="recovered")
    assert len(recovered.data) < len(given.data)


def test_a_map_inferred_in_another_precision_is_warned_of(codec):
    done = compress_image(codec, picture(), source="recovered")
    with pytest.warns(UserWarning, match="inferred in float32, and .* compressed in bf16"):
        decompress_image(codec, changed(done, precision="bf16"))


def test_a_directory_is_the_identity(tmp_path):
    make_tokenizer().save_pretrained(tmp_path / "a")
    make_tokenizer(num_bits=5).save_pretrained(tmp_path / "b")
    first = PictureCodec.from_pretrained(tmp_path / "a", precision="float32")
    second = PictureCodec.from_pretrained(tmp_path / "b", precision="float32")
    assert first.identity != second.identity
    done = compress_image(first, picture())
    assert pixels(decompress_image(first, done.data))
    with pytest.raises(ValueError, match=f"{first.identity[:16]}, and this one is "):
        decompress_image(second, done.data)


# ---------------------------------------------------------------------------- by a target


def decompressed_psnr(codec, done):
    result = to_tensor(decompress_image(codec, done.data))
    return float(psnr(to_tensor(picture())[None], result[None]))


def test_a_target_is_met_and_measured(codec):
    for num_kept in (30, 50, 60):
        most = compress_image(codec, picture(), quality=Quality(num_kept=num_kept)).bits_per_pixel
        found = compress_image(codec, picture(), quality=Quality(bits_per_pixel=most))
        assert found.bits_per_pixel <= most
        assert found.reached is None
    whole = decompressed_psnr(codec, compress_image(codec, picture(), quality=Quality(num_kept=64)))
    for target in (5.0, whole - 1e-6):
        found = compress_image(codec, picture(), quality=Quality(psnr=target))
        assert found.reached == decompressed_psnr(codec, found) >= target


class AsManyAs(Perceptual):
    """In place of LPIPS: a distance that falls with every token of the files that were made."""

    def __init__(self, monkeypatch):
        torch.nn.Module.__init__(self)
        self.weight = torch.nn.Parameter(torch.ones(1))
        self.num_kept = []
        real = encode_image

        def noted(tokenizer, image, num_kept=None):
            self.num_kept.append(num_kept)
            return real(tokenizer, image, num_kept)

        monkeypatch.setattr("mergevq.tokenizer.compressed.encode_image", noted)

    def forward(self, *_):
        return torch.tensor([1 / self.num_kept[-1]])


@pytest.mark.parametrize("wanted", [8, 9, 31, 63, 64])
def test_the_fewest_tokens_that_meet_a_target_are_found_in_a_few_tries(codec, wanted, monkeypatch):
    distance = AsManyAs(monkeypatch)
    quality = Quality(lpips=1 / (wanted - 0.5))
    done = compress_image(codec, picture(), quality=quality, perceptual=distance)
    assert done.header.num_kept == wanted
    assert done.reached == pytest.approx(1 / wanted)
    assert len(distance.num_kept) <= 7


@pytest.mark.parametrize(
    ("quality", "message"),
    [
        (Quality(psnr=99.0), r"psnr \(99\) cannot be reached: with all 64 tokens it is \d"),
        (Quality(bits_per_pixel=0.1), r"bits_per_pixel \(0.1\) is too few: with 8 tokens"),
        (Quality(num_kept=3), r"num_kept \(3\) must be at least 8"),
        (Quality(lpips=0.1), r"lpips \(0.1\) is measured with weights that are not there"),
    ],
    ids=str,
)
def test_a_target_that_cannot_be_met_is_an_error(codec, quality, message):
    with pytest.raises(ValueError, match=message):
        compress_image(codec, picture(), quality=quality)


def test_only_one_target_can_be_named():
    with pytest.raises(ValueError, match=r"2 targets \(num_kept, psnr\)"):
        Quality(num_kept=3, psnr=20.0)
    for name in ("psnr", "lpips", "bits_per_pixel"):
        with pytest.raises(ValueError, match=name):
            Quality(**{name: math.nan})


def test_only_k_that_were_trained_with_are_tried():
    codec = PictureCodec(tokenizer=make_tokenizer(kept_range=(16, 40)), identity=IDENTITY)
    with pytest.raises(ValueError, match="with all 40 tokens"):
        compress_image(codec, picture(), quality=Quality(psnr=99.0))
    with pytest.raises(ValueError, match="with 16 tokens, the fewest"):
        compress_image(codec, picture(), quality=Quality(bits_per_pixel=0.1))


# ---------------------------------------------------------------------------- refused


@pytest.fixture(scope="module")
def small(codec):
    return compress_image(codec, picture(), quality=Quality(num_kept=8))


def test_a_file_with_any_byte_changed_is_refused(codec, small):
    for position in range(len(small.data)):
        for change in (1, 128, 255):
            data = bytearray(small.data)
            data[position] ^= change
            with pytest.raises(ValueError, match=r"it is (no \.mvq|damaged)|it has version"):
                decompress_image(codec, bytes(data))


def test_a_file_cut_off_anywhere_is_refused(codec, small):
    for length in range(len(small.data)):
        with pytest.raises(ValueError, match=r"it is no \.mvq|cut off"):
            decompress_image(codec, small.data[:length])


def test_a_changed_byte_whose_checksum_fits_is_a_picture_or_an_error(codec, small):
    """A file with a checksum of its own may hold anything: reading it ends soon, in no crash."""
    num_pictures = 0
    for position in range(len(MAGIC) + 9, len(small.data) - 4):
        for change in (1, 2, 128, 255):
            data = bytearray(small.data)
            data[position] ^= change
            with contextlib.suppress(ValueError):
                result = decompress_image(codec, resealed(bytes(data)))
                assert result.mode == "RGB"
                num_pictures += 1
    assert num_pictures > 10


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"width": 2**20, "height": 2**20}, r"1,048,576 x 1,048,576 has [\d,]+ pixels, more than"),
        ({"width": 17}, r"its tiles, .* \(16, 16, 1, 1, 8, 8\), must be .* \(16, 16, 1, 2, 8, 8\)"),
        ({"tile_width": 2**30}, "its tiles, .*1073741824"),
        ({"grid_height": 2**30}, "its tiles, .*1073741824"),
        ({"tile_rows": 2**30}, "its tiles, .*1073741824"),
        ({"num_kept": 2**34}, r"num_kept \(17179869184\) must be between 1 and the 64"),
        ({"num_kept": 7}, r"num_kept \(7\) must be at least 8"),
        (
            {"identity": bytes(8)},
            "tokenizer 0000000000000000, and this one is 0123456789abcdef",
        ),
        (
            {"width": 4000, "height": 4000, "tile_rows": 333, "tile_columns": 333},
            r"bytes are too few for 110,889 x 8 tokens, which take at least 61,948",
        ),
    ],
    ids=str,
)
def test_numbers_are_compared_before_anything_is_made(codec, small, fields, message, monkeypatch):
    monkeypatch.setattr("mergevq.tokenizer.compressed._read_tokens", None)
    with pytest.raises(ValueError, match=message):
        decompress_image(codec, changed(small, **fields))


def test_a_picture_passed_whole_has_a_limit_on_either_side(codec, small):
    message = r"16,640 pixels is more than 64 times the 256 that"
    with pytest.raises(ValueError, match=message):
        compress_image(codec, picture(130, 128), size_policy="error")
    sides = {"width": 130, "height": 128, "tile_width": 130, "tile_height": 128}
    with pytest.raises(ValueError, match=message):
        decompress_image(codec, changed(small, **sides, grid_width=65, grid_height=64))


ORDERED = {"reducer": Queries(num_layers=1, num_heads=2), "expander": MaskTokens(num_layers=1)}


@pytest.mark.parametrize(
    "parts",
    [
        {"reducer": Pool(num_layers=1, num_heads=2)},
        {"reducer": GlobalMap(num_layers=1, num_heads=2)},
        ORDERED,
    ],
)
def test_tokens_without_maps_of_their_own_pass(parts):
    config = dataclasses.replace(make_tokenizer().config, num_kept=16, **parts)
    torch.manual_seed(0)
    codec = PictureCodec(tokenizer=Tokenizer(config).eval(), identity=IDENTITY)
    tokens = encode_image(codec.tokenizer, picture(20, 16), size_policy="tile")
    done = compress_image(codec, picture(20, 16))
    assert done.header.map_model is None
    expected = pixels(decode_image(codec.tokenizer, tokens))
    assert pixels(decompress_image(codec, done.data)) == expected
    with pytest.raises(ValueError, match=r"psnr \(99\) cannot be reached"):
        compress_image(codec, picture(20, 16), quality=Quality(psnr=99.0))


def test_a_picture_above_the_limit_is_refused(codec, small):
    with pytest.raises(ValueError, match=r"256 pixels, more than max_pixels \(255\)"):
        decompress_image(codec, small.data, max_pixels=255)
    assert decompress_image(codec, small.data, max_pixels=256).size == (16, 16)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", r"begins with nothing and must begin with 894d5651"),
        (b"\x89PNG\r\n\x1a\n" + bytes(50), "begins with 89504e47 and must begin with 894d5651"),
        (MAGIC + bytes(5), "it has 9 bytes, fewer than the 28"),
    ],
)
def test_a_foreign_file_is_refused(codec, data, message):
    with pytest.raises(ValueError, match=message):
        decompress_image(codec, data)


def test_a_newer_version_names_both(codec, small):
    data = bytearray(small.data)
    data[4] = 2
    with pytest.raises(ValueError, match=r"version 2 of the format, and .* reads version 1"):
        decompress_image(codec, resealed(bytes(data)))


def test_a_number_that_never_ends_is_refused(codec, small):
    data = small.data[:15] + b"\xff" * 40 + bytes(4)
    with pytest.raises(ValueError, match="byte 15 must begin a number"):
        decompress_image(codec, resealed(data))


def test_a_stream_that_is_too_long_is_refused(codec, small):
    header, stream = read_header(small.data)
    with pytest.raises(ValueError, match="longer than its symbols"):
        decompress_image(codec, write_file(header, stream + b"\x01\x02\x03\x04" * 3))
    with pytest.raises(ValueError, match="not a whole number of words"):
        decompress_image(codec, write_file(header, stream + b"\x01"))
