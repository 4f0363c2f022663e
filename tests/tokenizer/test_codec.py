import copy
import dataclasses
import io
import itertools
import math

import jaxtyping
import numpy as np
import pytest
import torch
from PIL import Image

from mergevq.data.layouts import source_bits
from mergevq.data.prepare import load_picture, to_tensor
from mergevq.report.pictures import merge_map, to_pil
from mergevq.tokenizer.codec import (
    blend,
    cut,
    decode_image,
    embed_image,
    encode_image,
    full_pictures,
    reconstruct_image,
    reconstruction_figure,
    tile_layout,
)
from mergevq.tokenizer.tokenizer import Tokenizer
from tests.support.parts import tokenizer_config

NUM_BITS = 6


@pytest.fixture(scope="module")
def tokenizer():
    """Trained on nothing: 16 pixels, patches of 2, 64 cells."""
    torch.manual_seed(1)
    config = tokenizer_config(
        image_size=16,
        channels=8,
        channel_mult=(1, 2),
        num_res_blocks=1,
        num_layers=3,
        num_heads=2,
        layer_scale=0.1,
        num_kept=20,
        num_bits=NUM_BITS,
        num_decoder_layers=1,
        num_decoder_heads=2,
        source_dim=16,
        num_source_heads=2,
    )
    return Tokenizer(config).eval()


def noise(width, height, seed=0, mode="RGB"):
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels).convert(mode)


def array(picture):
    return np.asarray(picture).astype(int)


# --------------------------------------------------------------------------- there and back


def test_a_picture_passes_as_its_tensor_does(tokenizer):
    picture = noise(16, 16)
    with torch.no_grad():
        expected = tokenizer.reconstruct(to_tensor(picture)[None], 20)
    encoded = encode_image(tokenizer, picture, 20)
    assert torch.equal(encoded.encoded.indices, expected.encoded.indices)
    assert decode_image(tokenizer, encoded) == to_pil(expected.image[0])


@pytest.mark.parametrize(("size", "policy"), [(16, "error"), (21, "tile"), (40, "resize")])
def test_a_picture_is_embedded_once_for_several_numbers_of_tokens(tokenizer, size, policy):
    picture = noise(size, size)
    embedded = embed_image(tokenizer, picture, size_policy=policy)
    for num_kept in (20, 30):
        expected = reconstruct_image(tokenizer, picture, num_kept, size_policy=policy)
        found = reconstruct_image(tokenizer, embedded, num_kept)
        for field in dataclasses.fields(expected):
            if field.name != "encoded":
                assert getattr(found, field.name) == getattr(expected, field.name)


def test_the_recovered_source_can_be_decoded_with(tokenizer):
    picture = noise(16, 16)
    with torch.no_grad():
        expected = tokenizer.reconstruct(to_tensor(picture)[None], 20, source="recovered")
    encoded = encode_image(tokenizer, picture, 20)
    assert decode_image(tokenizer, encoded, source="recovered") == to_pil(expected.image[0])


def test_bytes_survive_the_codec_when_the_tokenizer_changes_nothing():
    levels = Image.fromarray(np.arange(256 * 3, dtype=np.uint16).reshape(16, 16, 3).astype("u1"))
    assert to_pil(to_tensor(levels)) == levels


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "CMYK", "YCbCr", "HSV", "I;16"])
def test_any_mode_is_encoded_as_the_rgb_it_shows(tokenizer, mode):
    grey = noise(16, 16, mode="L")
    picture = grey.convert("RGB").convert(mode) if mode != "I;16" else grey.convert("I;16")
    result = reconstruct_image(tokenizer, picture, 20)
    assert result.original.mode == result.given.mode == "RGB"
    assert result.original.size == result.given.size == (16, 16)


def test_transparent_parts_are_white(tokenizer):
    picture = Image.new("RGBA", (16, 16), (255, 0, 0, 0))
    assert reconstruct_image(tokenizer, picture).original.getpixel((8, 8)) == (255, 255, 255)


def test_the_callers_picture_stays_as_it_is(tokenizer):
    picture = noise(16, 12)
    exif = picture.getexif()
    exif[0x0112] = 6  # The camera was held upright.
    file = io.BytesIO()
    picture.save(file, "png", exif=exif)
    rotated = Image.open(file)
    result = reconstruct_image(tokenizer, rotated)
    assert result.original.size == (12, 16)
    assert rotated.size == (16, 12)


def test_the_nominal_number_of_tokens_is_the_default(tokenizer):
    assert encode_image(tokenizer, noise(16, 16)).encoded.indices.shape == (1, 20)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_a_tokenizer_of_any_precision_gives_a_picture(tokenizer, dtype):
    converted = Tokenizer(tokenizer.config).to(dtype).eval()
    result = reconstruct_image(converted, noise(16, 16), 20)
    assert result.given.size == (16, 16)
    assert math.isfinite(result.psnr_given)


# ------------------------------------------------------------------------- what it reports


def test_quality_is_that_of_the_pictures(tokenizer):
    result = reconstruct_image(tokenizer, noise(16, 16), 20)
    for picture, reported in (
        (result.given, result.psnr_given),
        (result.recovered, result.psnr_recovered),
    ):
        error = ((array(result.original) - array(picture)) ** 2).mean()
        assert reported == pytest.approx(10 * math.log10(255**2 / error), rel=1e-5)


def test_bits_are_those_of_tokens_and_source(tokenizer):
    result = reconstruct_image(tokenizer, noise(16, 16), 20)
    assert result.bits.tokens == 20 * NUM_BITS
    assert result.bits.source == source_bits(64, 20)
    assert result.bits_per_pixel == pytest.approx((20 * NUM_BITS + source_bits(64, 20)) / 256)


def test_every_tile_is_paid_for(tokenizer):
    result = reconstruct_image(tokenizer, noise(28, 16), 20, size_policy="tile")
    assert result.num_tiles == 2
    assert result.num_tokens == 40
    assert result.bits.total == pytest.approx(2 * (20 * NUM_BITS + source_bits(64, 20)))
    assert result.bits_per_pixel == pytest.approx(result.bits.total / (28 * 16))


def test_the_merge_map_shows_the_groups_of_the_source(tokenizer):
    picture = noise(16, 16)
    encoded = encode_image(tokenizer, picture, 20).encoded
    expected = merge_map(to_tensor(picture), encoded.source.index[0], encoded.grid_shape)
    assert reconstruct_image(tokenizer, picture, 20).merge_map == expected


def test_merge_maps_of_tiles_meet_in_the_middle_of_their_overlap(tokenizer):
    picture = noise(28, 16)
    encoded, layout = encode_image(tokenizer, picture, 20, size_policy="tile")
    assert layout.lefts == (0, 12)
    left, right = (
        array(merge_map(tile, index, encoded.grid_shape))
        for tile, index in zip(cut(to_tensor(picture), layout), encoded.source.index, strict=True)
    )
    # They share columns 12 to 15, and a pixel of the picture is 8 of the map.
    expected = np.concatenate([left[:, : 8 * 14], right[:, 8 * 2 :]], axis=1)
    result = reconstruct_image(tokenizer, picture, 20, size_policy="tile")
    assert np.array_equal(array(result.merge_map), expected)


def test_the_figure_has_a_row_for_each_number_of_tokens(tokenizer):
    results = [reconstruct_image(tokenizer, noise(16, 16), num_kept) for num_kept in (10, 20)]
    one, two = (reconstruction_figure(results[:count]) for count in (1, 2))
    assert one.width > 4 * 128
    assert one.height + 128 < two.height < 2 * one.height


# ----------------------------------------------------------------------------------- sizes


def test_an_illegal_size_names_the_legal_ones_and_the_way_out(tokenizer):
    with pytest.raises(ValueError, match=r"\(15 x 17\).* such as 16 x 16.*'resize' or 'tile'"):
        encode_image(tokenizer, noise(17, 15))


def test_a_legal_size_needs_no_policy(tokenizer):
    result = reconstruct_image(tokenizer, noise(20, 12), 20)
    assert result.original == noise(20, 12)
    assert result.given.size == (20, 12)
    assert result.num_cells == 60


@pytest.mark.parametrize(
    ("size", "expected"),
    [((16, 16), (16, 16)), ((160, 160), (16, 16)), ((7, 7), (16, 16)), ((64, 16), (32, 8))],
)
def test_resizing_keeps_the_shape_and_the_trained_number_of_pixels(tokenizer, size, expected):
    result = reconstruct_image(tokenizer, noise(*size), 20, size_policy="resize")
    assert result.original.size == result.given.size == expected
    assert result.num_tiles == 1


def test_numbers_of_a_resized_picture_say_both_sizes_and_pictures_have_the_given_one(tokenizer):
    result = reconstruct_image(tokenizer, noise(64, 16), 20, size_policy="resize")
    assert (result.is_resized, result.given_size) == (True, (64, 16))
    small, large = (result.bits.total / pixels for pixels in (32 * 8, 64 * 16))
    assert result.price == (
        f"{small:.3f} bits per pixel of the 32 x 8 it was resized to ({large:.3g} of the 64 x 16 "
        "given)"
    )
    pictures = full_pictures([result])
    assert sorted(pictures) == ["given_20.png", "merge_map_20.png", "recovered_20.png"]
    assert pictures["given_20.png"].size == pictures["recovered_20.png"].size == (64, 16)
    plain = reconstruct_image(tokenizer, noise(16, 16), 20, size_policy="resize")
    assert plain.price == f"{plain.bits_per_pixel:.3f} bits per pixel"
    assert full_pictures([plain])["given_20.png"] == plain.given


def test_resizing_leaves_the_trained_size_alone(tokenizer):
    assert reconstruct_image(tokenizer, noise(16, 16), size_policy="resize").original == noise(
        16, 16
    )


def test_a_sliver_keeps_at_least_one_cell(tokenizer):
    result = reconstruct_image(tokenizer, noise(900, 1), 60, size_policy="resize")
    assert result.original.height == 2


def test_a_strip_far_longer_than_a_training_image_is_refused_before_it_is_resized(tokenizer):
    with pytest.raises(
        ValueError, match=r"60000 x 1 is too long .* 3920 x 2 would be 7,840 pixels"
    ):
        encode_image(tokenizer, noise(60_000, 1), size_policy="resize")


@pytest.mark.parametrize("size", [(16, 16), (17, 16), (39, 23), (5, 40), (9, 3)])
def test_tiles_give_the_size_back(tokenizer, size):
    result = reconstruct_image(tokenizer, noise(*size), 20, size_policy="tile")
    assert result.original.size == result.given.size == result.recovered.size == size
    assert result.merge_map.size == (8 * size[0], 8 * size[1])


def test_one_tile_is_no_tile(tokenizer):
    plain = encode_image(tokenizer, noise(16, 16), 20)
    tiled = encode_image(tokenizer, noise(16, 16), 20, size_policy="tile")
    assert torch.equal(plain.encoded.indices, tiled.encoded.indices)
    assert decode_image(tokenizer, plain) == decode_image(tokenizer, tiled)


def test_a_tile_has_the_tokens_of_its_crop(tokenizer):
    # More tiles than are encoded at once, so that the parts are joined in the right order.
    picture = noise(64, 64)
    encoded, layout = encode_image(tokenizer, picture, 20, size_policy="tile")
    assert len(encoded.indices) == len(layout.corners) == 25
    top, left = layout.corners[18]
    crop = picture.crop((left, top, left + 16, top + 16))
    assert torch.equal(encoded.indices[18:19], encode_image(tokenizer, crop, 20).encoded.indices)


# ----------------------------------------------------------------------------------- tiles


@pytest.mark.parametrize("size", [(16, 16), (17, 16), (39, 23), (128, 61), (5, 40), (9, 3)])
def test_blending_undoes_cutting(size, generator):
    image = torch.rand(3, *size, generator=generator)
    layout = tile_layout(*size, 16)
    torch.testing.assert_close(blend(cut(image, layout), layout), image)


@pytest.mark.parametrize("length", range(1, 100, 7))
def test_tiles_cover_and_overlap_by_a_quarter(length):
    tops = tile_layout(length, 16, 16).tops
    assert tops[0] == 0
    assert tops[-1] == max(0, length - 16)
    assert all(0 < after - before <= 12 for before, after in itertools.pairwise(tops))


def test_tiles_that_disagree_meet_without_a_seam():
    layout = tile_layout(64, 112, 64)
    assert layout.lefts == (0, 48)
    tiles = torch.stack([torch.zeros(3, 64, 64), torch.ones(3, 64, 64)])
    steps = blend(tiles, layout).diff(dim=2)
    # The whole step of 1 is spread over the 16 shared columns; a cut would take it at once.
    assert float(steps.min()) >= 0
    assert float(steps.max()) < 0.15
    torch.testing.assert_close(steps.sum(2), torch.ones(3, 64))


def test_a_constant_picture_has_no_seam(tokenizer):
    colour = (90, 140, 200)
    constant = Image.new("RGB", (40, 28), colour)
    # A tokenizer that has learned this one colour: whatever is left to see, tiling has made.
    learned = copy.deepcopy(tokenizer)
    torch.nn.init.zeros_(learned.decoder.conv_out.weight)
    learned.decoder.conv_out.bias.data = torch.tensor(colour) / 127.5 - 1
    result = reconstruct_image(learned, constant, 20, size_policy="tile")
    assert result.num_tiles == 6
    assert result.given == result.recovered == constant


def test_equal_tiles_have_equal_tokens(tokenizer):
    constant = Image.new("RGB", (40, 28), (90, 140, 200))
    encoded = encode_image(tokenizer, constant, 20, size_policy="tile").encoded
    assert (encoded.indices == encoded.indices[:1]).all()
    assert (encoded.source.index == encoded.source.index[:1]).all()


# ----------------------------------------------------------------------------------- files


def test_a_file_is_read_upright(tmp_path):
    picture = noise(16, 12)
    exif = picture.getexif()
    exif[0x0112] = 3
    picture.save(tmp_path / "turned.png", exif=exif)
    upright = load_picture(tmp_path / "turned.png")
    assert np.array_equal(array(upright), array(picture)[::-1, ::-1])


@pytest.mark.parametrize("name", ["missing.png", "folder", "text.png", "cut.png"])
def test_a_file_that_is_no_image_is_named(tmp_path, name):
    (tmp_path / "folder").mkdir()
    (tmp_path / "text.png").write_text("not an image")
    noise(64, 64).save(tmp_path / "whole.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "whole.png").read_bytes()[:500])
    with pytest.raises(ValueError, match=f"{name} cannot be read"):
        load_picture(tmp_path / name)


# --------------------------------------------------------------------------- typing errors


@pytest.fixture
def untyped():
    """Without the checks of types that only tests have, as a user calls."""
    before = jaxtyping.config.jaxtyping_disable
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", before)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda t, x: t.reconstruct(x, 20, "recoverd"), "did you mean 'recovered'"),
        (lambda t, x: t.features(x, pool="avg"), "pool .'avg'. must be one of"),
        (lambda t, x: t.features(x, stage="merge"), "did you mean 'merged'"),
        (lambda t, _: encode_image(t, noise(16, 16), size_policy="resise"), "mean 'resize'"),
        (
            lambda t, _: decode_image(t, encode_image(t, noise(16, 16)), source="recoverd"),
            "mean 'recovered'",
        ),
        (lambda t, _: encode_image(t, "a.png"), "image is str and must be a PIL image"),
        (lambda t, _: t.encode("a.png"), "image is str and must be a PIL image or several"),
        (lambda t, x: t.encode(x[0, 0]), "image has 2 dimensions and must have 4"),
        (lambda t, x: t.encode(x[..., :15]), "size_policy 'resize' or 'tile'"),
        (
            lambda t, x: t.decode((e := t.encode(x, 20)).indices[:, :9], e.source),
            "tokens .9. must be as many as the source keeps .20.",
        ),
    ],
)
def test_a_wrong_argument_gets_a_sentence(tokenizer, call, message, untyped):
    with torch.no_grad(), pytest.raises(ValueError, match=message):
        call(tokenizer, to_tensor(noise(16, 16))[None])
