"""Tests of `mergevq.demo.drawing`."""

import numpy as np
import pytest
import torch
from PIL import Image

from mergevq.config.generator import (
    SamplingSettings,
)
from mergevq.data.prepare import load_picture
from mergevq.demo.drawing import (
    class_choices,
    compared,
    draw,
    draw_with_both_caches,
    edit,
    square,
)
from mergevq.generator.generation import decode_sampled, load_pair, masked_origin
from mergevq.generator.sampling import sample
from mergevq.report.pictures import to_pil

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def pairs(folder):
    return {
        order: load_pair(folder / order, folder / "tokenizer", CPU)
        for order in ("merge", "random", "masked")
    }


def small(image):
    return np.asarray(image.resize((16, 16), Image.Resampling.NEAREST))


def test_samples_depend_on_class_and_seed(pairs):
    pair = pairs["merge"]
    assert class_choices(pair) == ["cat", "dog"]

    def last(seed):
        *_, images = draw(pair, "dog", 2.0, 3, seed)
        return [image.tobytes() for image in images]

    first = last(0)
    assert len(first) == 3
    assert first == last(0) != last(1)


@pytest.mark.parametrize("order", ["merge", "random", "masked"])
def test_the_last_pictures_are_those_of_sampling_at_once(pairs, order):
    pair = pairs[order]
    looks = list(draw(pair, None, 1.0, 2, 5))
    sampled = sample(
        pair.generator,
        labels=torch.tensor([0, 1]),
        num_kept=6,
        seed=5,
        image_ids=range(2),
        settings=SamplingSettings(),
    )
    with torch.no_grad():
        images = decode_sampled(pair.tokenizer, sampled, (4, 4))
    assert len(looks) == (6 if order == "random" else 8)
    for shown, image in zip(looks[-1], images, strict=True):
        assert np.array_equal(small(shown), np.asarray(to_pil(image)))


def test_both_caches_give_the_same_pictures_and_the_full_one_takes_more(pairs):
    pair = pairs["merge"]
    looks = list(draw_with_both_caches(pair, None, 2.0, 2, 5))
    for (small, full), pictures in zip(looks, draw(pair, None, 2.0, 2, 5), strict=True):
        assert [each.tobytes() for each in small.pictures] == [each.tobytes() for each in pictures]
        assert [each.tobytes() for each in full.pictures] == [each.tobytes() for each in pictures]
    # Rows of two images with guidance, two heads of 16 channels, four bytes, keys and values; the
    # window is 1: slots of prefix, K = 6 tokens and one more, and of the prefix and all but a cell.
    window, size = pair.generator.config.order.window, 2 * 4 * 2 * 16 * 4
    assert small.num_bytes == (2 + 6 + window) * size
    assert full.num_bytes == (2 + 15) * size
    assert 0 < looks[0][0].seconds < small.seconds
    words = compared(small, full._replace(pictures=[small.pictures[0], Image.new("RGB", (2, 2))]))
    assert f"{small.num_bytes / full.num_bytes:.0%} of the memory; 1 of 2 pictures" in words


def test_caches_of_other_orders_are_not_compared(pairs):
    with pytest.raises(ValueError, match=r"order \(random\) must be merge"):
        next(draw_with_both_caches(pairs["random"], None, 1.0, 1, 0))


@pytest.mark.parametrize("order", ["merge", "masked"])
def test_cells_without_a_token_are_grey_and_become_fewer(pairs, order):
    shares = []
    for (image,) in draw(pairs[order], "cat", 2.0, 1, 0):
        cells = small(image).reshape(4, 4, 4, 4, 3)
        grey = (np.abs(cells.astype(int) - 127.5) < 1).all((1, 3, 4))
        shares.append(int(grey.sum()))
        if order == "merge":
            # In raster order.
            assert grey.ravel().tolist() == sorted(grey.ravel().tolist())
    assert shares == [14, 12, 10, 8, 6, 4, 2, 0]


def test_a_class_that_is_not_there_is_an_error(pairs):
    with pytest.raises(ValueError, match=r"class \(cow\) must be one of cat, dog"):
        next(draw(pairs["merge"], "cow", 2.0, 1, 0))


def test_only_tokens_that_the_mask_touches_are_made_anew(pairs, folder):
    pair = pairs["random"]
    picture = load_picture(folder / "pictures" / "cat" / "0.png")
    shown = square(pair, picture)
    assert shown.size == (256, 256)
    mask = Image.new("L", shown.size)
    mask.paste(255, (0, 0, 60, 60))
    origin = masked_origin(pair.tokenizer, picture, mask.resize((16, 16), 0), 6)
    assert 0 < int(origin.keep.sum()) < 6
    first, other, again = (
        edit(pair, shown, mask, "dog", guidance=2.0, num_images=2, seed=seed) for seed in (0, 1, 0)
    )
    assert [image.size for image in first] == [(256, 256)] * 2
    assert first[0].tobytes() != other[0].tobytes()
    assert [each.tobytes() for each in again] == [each.tobytes() for each in first]


def test_what_cannot_be_edited_is_said(pairs, folder):
    picture = square(pairs["random"], load_picture(folder / "pictures" / "cat" / "0.png"))
    numbers = {"guidance": 1.0, "num_images": 1, "seed": 0}
    with pytest.raises(ValueError, match="the mask leaves all tokens"):
        edit(pairs["random"], picture, Image.new("L", picture.size), None, **numbers)
    mask = Image.new("L", picture.size, 255)
    mask.paste(0, (0, 0, 128, 128))
    with pytest.raises(ValueError, match="tokens can only be kept in order 'random'"):
        edit(pairs["merge"], picture, mask, None, **numbers)


def test_the_digits_of_the_package_belong_together_and_are_drawn():
    pair = load_pair("digits32_ar", "digits32", CPU)
    assert class_choices(pair) == list("0123456789")
    *_, (zero,) = draw(pair, "0", 2.0, 1, 0)
    *_, (one,) = draw(pair, "1", 2.0, 1, 0)
    # A nought is dark in the middle, where a one is light.
    assert zero.convert("L").getpixel((128, 128)) < 64
    assert one.convert("L").getpixel((128, 128)) > 128
