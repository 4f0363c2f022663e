"""From images to files of tokens: `mergevq encode`.

Images are encoded in batches that end where a shard ends: the same tokens come out whoever writes
the shard, and whether or not encoding was stopped in between. A folder has one precision, which its
record names: in bf16 the sign of a latent near zero may be another than in float32, and with it the
index. In either an image has the same tokens in any batch, but for signs of latents so close to
zero that the order of a sum decides them; `tokens.json` names the batch size among what such signs
depend on.

Shape letters: B batch, S image side, N rows of a shard, L grid tokens, K kept tokens.
"""

import contextlib
import logging
from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Int64
from numpy.typing import NDArray
from torch import Tensor

from mergevq.config.base import MAX_PIXELS, Precision
from mergevq.data.batches import Batch, eval_batches
from mergevq.data.codes import require_parts
from mergevq.data.images import ImageDataset, open_images
from mergevq.data.layouts import Source
from mergevq.data.tokens.dataset import TokenDataset, open_tokens
from mergevq.data.tokens.files import TokenRecord, TokenRows
from mergevq.data.tokens.writing import claim, finish, missing_shards, write_shard
from mergevq.runtime import distributed
from mergevq.runtime.artefacts import resolve, tokens_hash
from mergevq.runtime.device import deterministic, precision_name, resolve_device
from mergevq.runtime.logs import Progress
from mergevq.runtime.run import environment
from mergevq.tokenizer.conditions.values import condition_of, require_classes
from mergevq.tokenizer.seams import Encoded
from mergevq.tokenizer.tokenizer import Tokenizer

logger = logging.getLogger("mergevq")


def encode(  # noqa: PLR0913 - each is an option of the command
    model: str | Path,
    data: str,
    out: str | Path,
    *,
    num_kept: Sequence[int] = (),
    flip: bool = False,
    max_pixels: int = MAX_PIXELS,
    batch_size: int = 64,
    device: str = "auto",
    precision: Precision = "auto",
    num_workers: int = 2,
) -> TokenDataset:
    """Write the tokens of all images of a data set; on every rank, under `torchrun`.

    Args:
        model: directory of a tokenizer, a name of `mergevq models`, or owner/name@revision on
            Hugging Face.
        data: see `DataConfig.path`.
        out: folder of tokens; one that was begun is gone on with.
        num_kept: each K to encode with; none is the tokenizer's own.
        flip: also encode each image's mirror image.
        max_pixels: largest picture that is read, as width times height; larger ones count as
            unreadable.
        batch_size: images encoded at once, a divisor of the images of a shard.
        device: where to encode.
        precision: of the encoder; see `Tokenizer.from_pretrained`.
        num_workers: loading processes; 0 loads in this one.

    Raises:
        ValueError: tokenizer, data, settings or what is in `out` do not fit.
        RuntimeError: a shard in `out` is damaged.
    """
    world = distributed.init(resolve_device(device))
    try:
        directory = resolve(model)
        tokenizer = Tokenizer.from_pretrained(directory, precision=precision, device=world.device)
        images = open_images(data, max_pixels=max_pixels)
        record = token_record(
            tokenizer, tokens_hash(directory), images, data=data, num_kept=num_kept, flip=flip
        )
        return encode_images(
            tokenizer, images, out, record, world, batch_size=batch_size, num_workers=num_workers
        )
    finally:
        distributed.shutdown()


def token_record(
    tokenizer: Tokenizer,
    tokenizer_hash: str,
    images: ImageDataset,
    *,
    data: str,
    num_kept: Sequence[int] = (),
    flip: bool = False,
) -> TokenRecord:
    """Describe what the tokens of some images will be.

    Args:
        tokenizer: what encodes them.
        tokenizer_hash: `runtime.artefacts.tokens_hash` of its directory.
        images: what is encoded.
        data: where they came from, for a reader of the record.
        num_kept: each K to encode with; none is the tokenizer's own.
        flip: also encode each image's mirror image.

    Raises:
        ValueError: a K is not legal, or tokens are real numbers.
    """
    config = tokenizer.config
    require_parts(tokenizer.quantizer.spec.sizes, "a folder of tokens")
    condition_of(config.condition, torch.zeros(1, dtype=torch.int64), "a folder of tokens")
    require_classes(config.condition, images.num_classes, data)
    blank = torch.empty(1, 3, config.image_size, config.image_size)
    for count in num_kept:
        tokenizer.num_tokens(blank, count)
    identity, grid_shape = images.identity(), tokenizer.grid_shape(blank)
    return TokenRecord(
        tokenizer=tokenizer_hash,
        num_kept=tuple(sorted(set(num_kept or (config.num_kept,)))),
        sizes=tokenizer.quantizer.spec.sizes,
        grid_shape=grid_shape,
        data=data,
        images=identity.images,
        labels=identity.labels,
        stamp=images.stamp(),
        num_images=identity.num_images,
        class_names=identity.class_names,
        flip=flip,
        max_pixels=images.max_pixels,
        layout=config.kept_by.gives,
        num_holistic=config.num_holistic,
        precision=precision_name(tokenizer.computes_in()),
    )


def encode_images(
    tokenizer: Tokenizer,
    images: ImageDataset,
    out: str | Path,
    record: TokenRecord,
    world: distributed.World,
    *,
    batch_size: int,
    num_workers: int,
) -> TokenDataset:
    """Write the tokens of images that are open, sharing them out among the ranks.

    Args:
        tokenizer: in evaluation mode, on the device of `world`.
        images: what to encode.
        out: folder of tokens; one that was begun is gone on with.
        record: see `token_record`.
        world: this process.
        batch_size: images encoded at once, a divisor of the images of a shard.
        num_workers: loading processes; 0 loads in this one.

    Raises:
        ValueError: settings or what is in `out` do not fit.
        RuntimeError: a shard in `out` is damaged.
    """
    out = Path(out)
    if distributed.is_main():
        surroundings = environment(world.device) | {"batch_size": batch_size}
        if claim(out, record, surroundings, images.content):
            logger.warning("%s is complete already; nothing was encoded", out)
    distributed.barrier()
    encode_shards(
        tokenizer, images, out, record, world, batch_size=batch_size, num_workers=num_workers
    )
    distributed.barrier()
    if distributed.is_main():
        finish(out)
    distributed.barrier()
    return open_tokens(out)


@torch.inference_mode()
def encode_shards(
    tokenizer: Tokenizer,
    images: ImageDataset,
    out: Path,
    record: TokenRecord,
    world: distributed.World,
    *,
    batch_size: int,
    num_workers: int,
) -> None:
    """Write this rank's shards that are not there: of W ranks, rank r has r, r + W, r + 2 W, ...

    Raises:
        ValueError: a shard is not a whole number of batches.
        RuntimeError: a shard in `out` is damaged.
    """
    if batch_size < 1 or record.shard_size % batch_size:
        raise ValueError(
            f"batch_size ({batch_size}) must be a divisor of the {record.shard_size} images of a "
            "shard, such as 16 or 64"
        )
    own = range(world.rank, record.num_shards, world.world_size)
    missing = missing_shards(out, record, own)
    if not missing:
        return
    positions = np.concatenate([record.images_of(number) for number in missing])
    total = sum(len(record.images_of(number)) for number in own)
    progress = Progress(total, done=total - len(positions), unit="image")
    batches = eval_batches(
        images.subset(positions),
        image_size=tokenizer.config.image_size,
        batch_size=batch_size,
        num_workers=num_workers,
    )
    with contextlib.closing(progress), deterministic(world.device):
        for number, shard in _by_shard(batches, positions, record):
            rows = {num_kept: [_no_rows(record, num_kept)] for num_kept in missing[number]}
            for batch in shard:
                encoded = _encode_batch(tokenizer, batch, tuple(rows), flip=record.flip)
                for num_kept, found in encoded.items():
                    rows[num_kept].append(found)
                progress.update(len(batch.index))
            if num_broken := _write(images, out, record, number, rows):
                progress.update(num_broken)


def _by_shard(
    batches: Iterator[Batch], positions: NDArray[np.int64], record: TokenRecord
) -> Iterator[tuple[int, Iterator[Batch]]]:
    """Number of each shard with its batches; none where no image can be read.

    Args:
        batches: of images of whole shards in order, so that each lies in one shard.
        positions: where in the data these images are.
        record: what a shard is.
    """
    unseen = np.unique(positions // record.shard_size).tolist()
    located = (batch._replace(index=torch.from_numpy(positions)[batch.index]) for batch in batches)
    for number, shard in groupby(located, lambda batch: int(batch.index[0]) // record.shard_size):
        unseen.remove(number)
        yield number, shard
    for number in unseen:
        yield number, iter(())


def _encode_batch(
    tokenizer: Tokenizer, batch: Batch, num_kept: Sequence[int], *, flip: bool
) -> dict[int, TokenRows]:
    """Encode images at each K; with `flip`, the row of each is followed by its mirror image's."""
    image = batch.image.to(next(tokenizer.parameters()).device)
    condition = condition_of(tokenizer.config.condition, batch.label, "a folder of tokens")
    views = [tokenizer.embed(view) for view in ((image, image.flip(-1)) if flip else (image,))]
    rows = {}
    for count in num_kept:
        encoded = [tokenizer.encode(view, count, condition) for view in views]
        parts = torch.stack([view.parts for view in encoded], dim=1)
        source = torch.stack([_map_of(view) for view in encoded], dim=1)
        rows[count] = TokenRows(
            parts=parts.flatten(0, 1).cpu(),
            source=source.flatten(0, 1).cpu(),
            label=batch.label.repeat_interleave(len(views)),
            position=batch.index.repeat_interleave(len(views)),
            mirrored=torch.arange(len(views)).repeat(len(batch.index)),
        )
    return rows


def _map_of(encoded: Encoded) -> Int64[Tensor, "b l"]:
    """The map of tokens; one of no cells where their layout has none."""
    layout = encoded.layout
    none = encoded.parts.new_empty(len(encoded.parts), 0)
    return layout.index if isinstance(layout, Source) else none


def _no_rows(record: TokenRecord, num_kept: int) -> TokenRows:
    """Rows that a shard begins with: none."""
    none = torch.empty(0, dtype=torch.int64)
    parts = none.view(0, num_kept, len(record.sizes))
    return TokenRows(parts, none.view(0, record.num_mapped), none, none, none)


def _write(
    images: ImageDataset,
    out: Path,
    record: TokenRecord,
    number: int,
    rows: Mapping[int, Sequence[TokenRows]],
) -> int:
    """Write a shard for each K; returns how many of its images cannot be read."""
    broken: list[str] = []
    content = images.content(record.images_of(number))
    for parts in rows.values():
        joined = TokenRows(*(torch.cat(tensors) for tensors in zip(*parts, strict=True)))
        readable = set(joined.position.tolist())
        broken = [images.name(i) for i in record.images_of(number) if i not in readable]
        write_shard(out, record, number, joined, broken=broken, content=content)
    return len(broken)
