"""Helpers that the tests of `mergevq.data.tokens.files` share."""

import torch

from mergevq.data.tokens.dataset import open_tokens
from mergevq.data.tokens.files import TokenRecord, TokenRows
from mergevq.data.tokens.writing import claim, finish, write_shard

RECORD = TokenRecord(
    tokenizer="a" * 64,
    num_kept=(3, 5),
    sizes=(2**18,),
    grid_shape=(2, 3),
    data="digits",
    images="b" * 64,
    num_images=10,
    class_names=("cat", "dog"),
    shard_size=4,
)
ENVIRONMENT = {"torch": "2.13.0", "device": "cpu"}


def rows_of(record, number, num_kept, broken=()):
    """Rows that say which shard, image and K they are of."""
    positions = [i for i in record.images_of(number) if i not in broken]
    position = torch.tensor(positions, dtype=torch.int64).repeat_interleave(1 + record.flip)
    cells = torch.arange(record.num_tokens)
    return TokenRows(
        parts=record.parts_of(
            (1000 * position[:, None] + torch.arange(num_kept)) % min(record.num_values, 2**62)
        ),
        source=(position[:, None] + cells) % num_kept,
        label=position % 2,
        position=position,
        mirrored=torch.arange(1 + record.flip).repeat(len(positions)),
    )


def write_all(directory, record=RECORD, broken=()):
    claim(directory, record, ENVIRONMENT)
    for number in range(record.num_shards):
        for num_kept in record.num_kept:
            rows = rows_of(record, number, num_kept, broken)
            names = [f"{i}.png" for i in record.images_of(number) if i in broken]
            write_shard(directory, record, number, rows, broken=names)
    finish(directory)
    return open_tokens(directory)


def assert_same(batches, expected):
    assert len(batches) == len(expected)
    for batch, other in zip(batches, expected, strict=True):
        assert torch.equal(batch.parts, other.parts)
        assert torch.equal(batch.source.index, other.source.index)
        assert batch.source.num_kept == other.source.num_kept
        assert torch.equal(batch.label, other.label)
