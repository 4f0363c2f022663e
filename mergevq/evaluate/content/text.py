"""Text that can still be read in reconstructions: `mergevq evaluate text`.

Words whose places are known are cut out of the original and of what comes back, and read by the
same program. Originals are the ceiling: what cannot be read there says nothing about a tokenizer.
Readings against the text of other images are the floor.

Source: TokBench (wjf5203/TokBench), its measure of text.

Differs: other words, another recogniser and other sizes, so that numbers are not those of TokBench;
buckets are of the height in pixels, 8, 10, 14 and 20, where theirs are of its share of the image,
which at 64 pixels no program reads.

Shape letters: S side of the images in pixels.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from jaxtyping import UInt8
from PIL import Image
from torch import Tensor

from mergevq.config.evaluation import RENDERED, TextSettings
from mergevq.config.records import TextBucket, TextRecord, TextRow, TextScores
from mergevq.data.prepare import to_float, to_tensor
from mergevq.evaluate.content.passes import Numbered, Passes, Way, degraded, open_passes
from mergevq.evaluate.content.readers import RapidOcr, TextReader
from mergevq.evaluate.content.words import Word, Written, rendered, written
from mergevq.evaluate.subject import RECORD, evaluation_record, require_fresh
from mergevq.metrics.image import to_uint8
from mergevq.metrics.references import ImageHashes
from mergevq.report.pictures import contact_sheet, to_pil
from mergevq.runtime import distributed
from mergevq.runtime.device import deterministic
from mergevq.runtime.files import write_json
from mergevq.runtime.logs import Progress
from mergevq.runtime.settings import to_json

BUCKETS = ((8.0, 10.0), (10.0, 14.0), (14.0, 20.0))
"""Heights of words in pixels, from the first, below the second."""
_READ_HEIGHT = 48
"""Height that a word is enlarged to before it is read, in pixels."""
_MARGIN = 2
"""Pixels around the box of a word that are read too."""
_NUM_SHOWN = 6


class Read(NamedTuple):
    """One word, and how it was read."""

    word: Word
    image: int
    """Number of its image."""
    readings: list[str]
    """In the original, degraded, and by each way of coming back."""


def evaluate_text(settings: TextSettings) -> TextRecord:
    """Evaluate and write numbers and pictures.

    Raises:
        ValueError: model, data or settings do not fit.
        RuntimeError: a file is damaged, or the reader's packages are not installed.
    """
    out = Path(settings.out)
    require_fresh(out)
    reader = RapidOcr()
    passes = open_passes(settings.through)
    side = settings.image_size or passes.tokenizer.config.image_size
    pictures = list(_pictures(settings, side))
    hashes = ImageHashes()
    with deterministic(passes.device):
        found, shown = read_words(
            passes, reader, pictures, hashes, batch_size=settings.through.batch_size
        )
    out.mkdir(parents=True, exist_ok=True)
    titles = [_title(way) for way in passes.ways]
    sheet = contact_sheet(shown, ["original", "half and back", *titles], ["" for _ in shown])
    sheet.save(out / "words.png")
    num_words = sum(len(each.words) for each in pictures)
    lost = sum(each.num_outside for each in pictures)
    world = distributed.World(rank=0, world_size=1, local_rank=0, device=passes.device)
    record: TextRecord = {
        "kind": "text evaluation",
        "settings": to_json(settings),
        **evaluation_record(world),
        "model": passes.record,
        "data": {
            "path": settings.data,
            "num_images": len(pictures),
            "num_words": num_words + lost,
            "num_outside": num_words + lost - len(found),
            "image_size": side,
            "pixels_sha256": hashes.compute(),
        },
        "reader": reader.record,
        "rows": text_rows(found, passes.ways),
    }
    write_json(out / RECORD, record)
    return record


def _pictures(settings: TextSettings, side: int) -> Iterator[Written]:
    """Pictures with words, as they were asked for."""
    if settings.data == RENDERED:
        return rendered(settings.max_images, side, settings.seed)
    return written(
        Path(settings.data),
        side,
        max_images=settings.max_images,
        max_pixels=settings.max_pixels,
    )


def _title(way: Way) -> str:
    """A way of coming back, in words."""
    return f"K = {way.num_kept}, {way.source}"


def read_words(
    passes: Passes,
    reader: TextReader,
    pictures: Sequence[Written],
    hashes: ImageHashes,
    *,
    batch_size: int,
) -> tuple[list[Read], list[list[Image.Image]]]:
    """Read every word of a height in `BUCKETS`, in the originals and in what comes back.

    Args:
        passes: the tokenizer.
        reader: of words.
        pictures: squares of one size with their words.
        hashes: takes the originals.
        batch_size: images at once.

    Returns:
        Words, and the first pictures for a sheet: original, degraded and what came back.
    """
    found, shown = [], []
    progress = Progress(len(pictures), unit="image")
    for first in range(0, len(pictures), batch_size):
        numbers = list(range(len(pictures)))[first : first + batch_size]
        images = torch.stack([to_tensor(pictures[number].image) for number in numbers])
        index = torch.tensor(numbers)
        batch, pixels = Numbered(index, torch.full_like(index, -1)), to_uint8(images)
        hashes.update(pixels, index)
        versions = [pixels, torch.stack([degraded(each) for each in pixels])]
        # Of the very bytes that are hashed and read.
        originals = to_float(pixels)
        versions += [to_uint8(passes.reconstruct(originals, w, batch)) for w in passes.ways]
        for place, number in enumerate(numbers):
            views = [version[place] for version in versions]
            words = [w for w in pictures[number].words if bucket_of(w.height) is not None]
            readings = [reader.read([cut_out(view, word) for word in words]) for view in views]
            found += [
                Read(word, number, [each[position] for each in readings])
                for position, word in enumerate(words)
            ]
            if number < _NUM_SHOWN:
                shown.append([to_pil(to_float(view)) for view in views])
            progress.update()
    progress.close()
    return found, shown


def bucket_of(height: float) -> int | None:
    """Which of `BUCKETS` a height is in; None if in none."""
    return next((n for n, (low, high) in enumerate(BUCKETS) if low <= height < high), None)


def cut_out(pixels: UInt8[Tensor, "3 s s"], word: Word) -> UInt8[Tensor, "3 h w"]:
    """A word with a margin of 2 pixels, enlarged to 48 pixels of height, bicubic."""
    left, top, right, bottom = word.box
    first = [max(0, int(edge) - _MARGIN) for edge in (left, top)]
    last = [min(pixels.shape[1], -int(-edge // 1) + _MARGIN) for edge in (right, bottom)]
    part = Image.fromarray(
        pixels[:, first[1] : last[1], first[0] : last[0]].permute(1, 2, 0).contiguous().numpy()
    )
    width = max(1, round(part.width * _READ_HEIGHT / part.height))
    part = part.resize((width, _READ_HEIGHT), Image.Resampling.BICUBIC)
    return to_uint8(to_tensor(part))


# ------------------------------------------------------------------------------------ the numbers


def text_rows(found: Sequence[Read], ways: Sequence[Way]) -> list[TextRow]:
    """Results of originals, of degraded ones, of wrong pairs, and by each way of coming back.

    Args:
        found: words with their readings.
        ways: of coming back.
    """
    words = [read.word for read in found]
    versions = [[read.readings[number] for read in found] for number in range(2 + len(ways))]
    refined = [read.readings[0] == read.word.text for read in found]
    others = _of_other_images(found)
    paired = [n for n, other in enumerate(others) if other is not None]
    wrong = [
        words[n]._replace(text=other.text) for n, other in enumerate(others) if other is not None
    ]
    return [
        text_row("original", None, words, versions[0], refined),
        text_row("degraded", None, words, versions[1], refined),
        text_row(
            "wrong image",
            None,
            wrong,
            [versions[0][n] for n in paired],
            [refined[n] for n in paired],
        ),
        *(
            text_row("reconstruction", way, words, version, refined)
            for way, version in zip(ways, versions[2:], strict=True)
        ),
    ]


def _of_other_images(found: Sequence[Read]) -> list[Word | None]:
    """For each word the next one of another image; None where all are of one."""
    others: list[Word | None] = []
    for number, read in enumerate(found):
        later = (*found[number + 1 :], *found[:number])
        others.append(next((each.word for each in later if each.image != read.image), None))
    return others


def text_row(
    name: str,
    way: Way | None,
    words: Sequence[Word],
    readings: Sequence[str],
    refined: Sequence[bool],
) -> TextRow:
    """Results of images of one kind.

    Args:
        name: of the row.
        way: of coming back; None of other images.
        words: as they should be read.
        readings: of each.
        refined: whether each is among those that can be read in the original.
    """
    buckets: list[TextBucket] = []
    for number, (low, high) in enumerate(BUCKETS):
        inside = [n for n, word in enumerate(words) if bucket_of(word.height) == number]
        sure = [n for n in inside if refined[n]]
        pairs, sure_pairs = (
            [(readings[n], words[n].text) for n in chosen] for chosen in (inside, sure)
        )
        buckets.append(
            {"low": low, "high": high, "scores": scores(pairs), "refined": scores(sure_pairs)}
        )
    exact = [value for each in buckets if (value := each["scores"]["text_exact"]) is not None]
    near = [value for each in buckets if (value := each["scores"]["text_1_minus_ned"]) is not None]
    return {
        "name": name,
        "num_kept": None if way is None else way.num_kept,
        "source": None if way is None else way.source,
        "buckets": buckets,
        "mean_exact": sum(exact) / len(exact) if exact else None,
        "mean_1_minus_ned": sum(near) / len(near) if near else None,
    }


def scores(pairs: Sequence[tuple[str, str]]) -> TextScores:
    """How many of the readings are right, and how near they are.

    Args:
        pairs: reading and text.
    """
    count = len(pairs)
    return {
        "num_words": count,
        "text_exact": sum(read == text for read, text in pairs) / count if count else None,
        "text_1_minus_ned": sum(one_minus_ned(*pair) for pair in pairs) / count if count else None,
    }


def one_minus_ned(read: str, text: str) -> float:
    """1 - edit distance by the length of the longer one; 1 of two empty texts.

    Examples:
        >>> round(one_minus_ned("HOUSE", "H0USES"), 3)
        0.667
    """
    row = list(range(len(text) + 1))
    for number, letter in enumerate(read, start=1):
        diagonal, row[0] = row[0], number
        for place, other in enumerate(text, start=1):
            best = min(row[place] + 1, row[place - 1] + 1, diagonal + (letter != other))
            diagonal, row[place] = row[place], best
    return 1 - row[-1] / max(len(read), len(text), 1)
