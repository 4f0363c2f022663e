"""Tests of `mergevq.data.tokens.batches`."""

import numpy as np
import pytest
import torch
from PIL import Image

from mergevq.config.training import DataConfig
from mergevq.data.batches import train_batches
from mergevq.data.images import open_images
from mergevq.data.layouts import Source
from mergevq.data.tokens.batches import token_batches
from tests.support.tokens import assert_same, write_all

STREAM = {"batch_size": 4, "num_steps": 6, "seed": 3, "num_kept": lambda step: (3, 5)[step % 2]}


# -------------------------------------------------------------------------------------- batches


def test_the_stream_shows_every_row_once_an_epoch(tokens):
    batches = list(token_batches(tokens, **STREAM | {"batch_size": 5}))
    positions = [(batch.indices[:, 0] // 1000).tolist() for batch in batches]
    epochs = [sorted(a + b) for a, b in zip(positions[::2], positions[1::2], strict=True)]
    assert epochs == [list(range(10))] * 3
    assert positions[:2] != positions[2:4]


def test_rows_come_in_the_order_in_which_images_do(tmp_path, tokens):
    for number in range(10):
        Image.fromarray(np.zeros((4, 4, 3), np.uint8)).save(tmp_path / f"{number}.png")
    images = train_batches(
        open_images(f"{tmp_path}/*.png"),
        DataConfig(),
        image_size=4,
        batch_size=4,
        num_steps=6,
        seed=3,
        student_size=None,
        teacher_size=None,
        num_workers=0,
    )
    batches = token_batches(tokens, **STREAM)
    assert [(batch.indices[:, 0] // 1000).tolist() for batch in batches] == [
        batch.index.tolist() for batch in images
    ]


def test_a_resumed_stream_goes_on_where_it_was(tokens):
    whole = list(token_batches(tokens, **STREAM))
    assert_same(list(token_batches(tokens, **STREAM, start_step=4)), whole[4:])


def test_two_ranks_see_what_one_sees(tokens):
    ranks = [list(token_batches(tokens, **STREAM, rank=rank, world_size=2)) for rank in (0, 1)]
    joined = [
        type(first)(
            torch.cat([first.parts, second.parts]),
            Source(torch.cat([first.source.index, second.source.index]), first.source.num_kept),
            torch.cat([first.label, second.label]),
            first.sizes,
        )
        for first, second in zip(*ranks, strict=True)
    ]
    assert_same(joined, list(token_batches(tokens, **STREAM)))


def test_each_step_has_its_number_of_tokens(tokens):
    batches = token_batches(tokens, **STREAM, start_step=1)
    assert [batch.source.num_kept for batch in batches] == [5, 3, 5, 3, 5]


def test_another_seed_gives_another_order(tokens):
    first, second = (
        torch.cat([batch.label for batch in token_batches(tokens, **STREAM | {"seed": seed})])
        for seed in (3, 4)
    )
    assert not torch.equal(first, second)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"rank": 2, "world_size": 2}, r"rank \(2\) must be in \[0, world_size \(2\)\)"),
        ({"world_size": 3}, r"batch_size \(4\) must be a positive multiple of .* ranks \(3\)"),
        ({"batch_size": 0}, r"batch_size \(0\) must be a positive multiple"),
        ({"start_step": -1}, r"start_step \(-1\) must be at least 0"),
    ],
)
def test_a_stream_that_cannot_be_is_an_error_at_once(tokens, values, message):
    with pytest.raises(ValueError, match=message):
        token_batches(tokens, **STREAM | values)


def test_a_stream_needs_a_row(tmp_path):
    tokens = write_all(tmp_path / "tokens", broken=range(10))
    with pytest.raises(ValueError, match="has no tokens: none of its images can be read"):
        token_batches(tokens, **STREAM)
