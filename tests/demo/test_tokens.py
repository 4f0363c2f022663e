"""Tests of `mergevq.demo.tokens`: what the page shows of a picture, without a browser."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from mergevq.config.parts import MaskTokens, Queries
from mergevq.data.prepare import load_picture, to_tensor
from mergevq.demo.tokens import AMPLIFIED, decoded, difference, show
from mergevq.metrics.lpips import Perceptual
from mergevq.tokenizer.codec import decode_image, embed_image, encode_image, reconstruct_image
from mergevq.tokenizer.compressed import PictureCodec, decompress_image
from mergevq.tokenizer.tokenizer import Tokenizer
from tests.demo.conftest import SMALL


@pytest.fixture
def picture(folder):
    return load_picture(folder / "pictures" / "cat" / "0.png")


def small(image):
    return image.resize((16, 16), Image.Resampling.NEAREST)


def test_a_picture_comes_back_enlarged_with_its_numbers(codec, picture):
    shown = show(codec, picture, 5)
    images = (shown.original, shown.given, shown.recovered, shown.difference)
    assert {image.size for image in images} == {(256, 256)}
    assert small(shown.original).tobytes() == picture.tobytes()
    wanted = reconstruct_image(codec.tokenizer, picture, 5)
    assert small(shown.given).tobytes() == wanted.given.tobytes()
    assert small(shown.recovered).tobytes() == wanted.recovered.tobytes()
    assert shown.text.startswith("5 of 16 tokens. 20 bits of tokens")
    assert "LPIPS" not in shown.text
    assert shown.times.endswith("decoding with both sources.")


def test_the_number_of_tokens_matters(codec, picture):
    few, all_of_them = (show(codec, picture, kept) for kept in (4, 16))
    assert "4 groups of 16 cells" in few.merge_map
    assert "16 groups of 16 cells" in all_of_them.merge_map
    with pytest.raises(ValueError, match=r"num_kept \(3\)"):
        show(codec, picture, 3)


def test_a_difference_is_absolute_amplified_and_at_most_white():
    one = Image.fromarray(np.array([[[10, 20, 30], [0, 0, 255]]], dtype=np.uint8))
    other = Image.fromarray(np.array([[[12, 15, 30], [200, 0, 0]]], dtype=np.uint8))
    assert AMPLIFIED == 4
    assert np.asarray(difference(one, other)).tolist() == [[[8, 20, 0], [255, 0, 255]]]


def test_the_file_holds_what_is_shown(codec, picture):
    pytest.importorskip("constriction", reason="files need the codec extra")
    embedded = embed_image(codec.tokenizer, picture, size_policy="resize")
    shown = show(codec, embedded, 7)
    assert decompress_image(codec, shown.file).tobytes() == small(shown.given).tobytes()
    without = int(shown.text.split(" without the source map")[0].split()[-1])
    assert f"As a file {len(shown.file)} bytes, {without} without" in shown.text
    # Of so few tokens the words of the coder may be as many.
    assert without <= len(shown.file)


def test_without_the_codec_there_is_no_file(codec, picture, monkeypatch):
    monkeypatch.setattr("mergevq.demo.tokens.missing", lambda extra: [extra])
    shown = show(codec, picture, 7)
    assert shown.file is None
    assert "file" not in shown.text


def test_lpips_is_told_where_its_weights_are_and_the_picture_is_large_enough(codec, picture):
    torch.manual_seed(0)
    perceptual = Perceptual("vgg")
    shown = show(codec, picture, 5, perceptual)
    one, other = (to_tensor(small(each))[None] for each in (shown.original, shown.given))
    with torch.no_grad():
        wanted = float(perceptual(one, other))
    assert f"LPIPS {wanted:.3f} and " in shown.text
    assert "LPIPS" not in show(codec, picture, 5, Perceptual("squeeze")).text


def test_a_tokenizer_without_maps_shows_what_it_has(picture):
    torch.manual_seed(0)
    queries = Queries(num_queries=16, num_layers=1, num_heads=2)
    config = replace(SMALL, reducer=queries, expander=MaskTokens(num_layers=1))
    codec = PictureCodec(tokenizer=Tokenizer(config).eval(), identity="0" * 64)
    shown = show(codec, picture, 6)
    assert (shown.recovered, shown.merge_map) == (None, "")
    assert "source" not in shown.text
    assert shown.times.endswith("one source.")


def test_what_is_compared_is_what_decodes_with_the_given_source(codec, picture):
    image, text = decoded(codec, picture, 9)
    encoded = encode_image(codec.tokenizer, picture, 9)
    assert small(image).tobytes() == decode_image(codec.tokenizer, encoded).tobytes()
    assert text.startswith("9 of 16 tokens, ")
