"""Masks as images through a tokenizer and back: `mergevq evaluate masks`.

An image becomes a mask where its brightness is above one half; the mask, black and white, goes
through the tokenizer and is cut at one half again. Of ordered tokens the first ones are decoded, so
that agreement is a curve over how many there are; of others it is over K. Beside it there are masks
in as many bits without a tokenizer. Two empty masks agree wholly, and are counted.

Source: HiMTok (yayafengzi/LMM-HiMTok), its masks by the number of tokens.

Differs: masks are of any images at one half of brightness, where theirs are of objects.

Shape letters: B batch, S side of the images in pixels.
"""

import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from mergevq.config.evaluation import MaskSettings
from mergevq.config.records import MaskRecord, MaskRow
from mergevq.data.batches import Batch, eval_batches
from mergevq.data.images import open_images
from mergevq.data.prepare import to_float
from mergevq.evaluate.content.codings import CODINGS, code_within
from mergevq.evaluate.content.passes import Numbered, Passes, Way, degraded, open_passes
from mergevq.evaluate.subject import RECORD, evaluation_record, json_numbers, require_fresh
from mergevq.metrics.image import to_uint8
from mergevq.metrics.masks import MaskScores
from mergevq.metrics.references import CROP, ImageHashes
from mergevq.report.plots import Curve, Panel, has_plots, line_plot
from mergevq.runtime import distributed
from mergevq.runtime.device import deterministic
from mergevq.runtime.files import write_json
from mergevq.runtime.logs import Progress
from mergevq.runtime.settings import to_json

PLOT = "masks.png"


class Kind(NamedTuple):
    """One kind of masks that come back."""

    name: str
    way: Way | None = None
    """Way through the tokenizer; of a coding, the one whose bits it has."""
    bits: float | None = None
    """Bits of one mask; None where there are none, as of tokens that are real numbers."""


class Agreement:
    """Agreement of the masks of one kind, with what they take."""

    def __init__(self) -> None:
        self.scores = MaskScores()
        self.num_bytes, self.num_above = 0, 0


def evaluate_masks(settings: MaskSettings) -> MaskRecord:
    """Evaluate and write numbers and a plot.

    Raises:
        ValueError: model, data or settings do not fit.
        RuntimeError: a file is damaged.
    """
    out = Path(settings.out)
    require_fresh(out)
    plotting = has_plots(out / PLOT)
    passes = open_passes(settings.through)
    if not settings.through.num_kept and passes.is_ordered():
        passes = passes._replace(ways=[Way(n, "given") for n in prefixes(passes.ways[0].num_kept)])
    images, side = open_images(settings.data, max_pixels=settings.max_pixels), passes.side
    count = min(settings.max_images or len(images), len(images))
    batches = eval_batches(
        images,
        image_size=side,
        batch_size=settings.through.batch_size,
        max_images=count,
        num_workers=0,
    )
    hashes, progress = ImageHashes(), Progress(count, unit="mask")
    with deterministic(passes.device):
        found, num_empty = measure_masks(passes, batches, hashes, progress)
    progress.close()
    rows = mask_rows(found)
    num_images = progress.done
    world = distributed.World(rank=0, world_size=1, local_rank=0, device=passes.device)
    record: MaskRecord = {
        "kind": "mask evaluation",
        "settings": to_json(settings),
        **evaluation_record(world),
        "model": passes.record,
        "data": {
            "path": settings.data,
            "num_images": num_images,
            "num_unreadable": count - num_images,
            "pixels_sha256": hashes.compute(),
            "image_size": side,
            "crop": CROP,
        },
        "num_empty": num_empty,
        "rows": rows,
    }
    out.mkdir(parents=True, exist_ok=True)
    if plotting:
        line_plot(
            [Panel(title="IoU", curves=curves(rows))], x_label="bits of a mask", size=(5.4, 3.6)
        ).save(out / PLOT)
    write_json(out / RECORD, record)
    return record


def prefixes(num_kept: int) -> list[int]:
    """Powers of two below K, and K.

    Examples:
        >>> prefixes(20)
        [1, 2, 4, 8, 16, 20]
    """
    return [*(2**n for n in range(num_kept.bit_length()) if 2**n < num_kept), num_kept]


def mask_of(image: Float[Tensor, "b 3 s s"]) -> Bool[Tensor, "b s s"]:
    """Pixels whose mean over colours is above one half, of images in [-1, 1]."""
    return image.mean(1) > 0


def measure_masks(
    passes: Passes, batches: Iterable[Batch], hashes: ImageHashes, progress: Progress
) -> tuple[dict[Kind, Agreement], int]:
    """Send masks through every way, and through codings of as many bits.

    Args:
        passes: the tokenizer.
        batches: images that masks are made of.
        hashes: takes the masks.
        progress: counts them.

    Returns:
        Agreement by kind, and how many masks are empty.
    """
    kinds = [Kind("reconstruction", way, bits_of(passes, way)) for way in passes.ways]
    budgets = [k for k in kinds if k.way and k.way.source == "given" and k.bits is not None]
    codings = [k._replace(name=name) for k in budgets for name in CODINGS]
    all_kinds = [Kind("original"), Kind("degraded"), *kinds, *codings]
    found, num_empty = {kind: Agreement() for kind in all_kinds}, 0
    for batch in batches:
        truth = mask_of(batch.image)
        num_empty += int((~truth.flatten(1).any(1)).sum())
        image = (2 * truth.float() - 1)[:, None].expand(-1, 3, -1, -1).contiguous()
        pixels = to_uint8(image)
        hashes.update(pixels, batch.index)
        found[all_kinds[0]].scores.update(truth, truth)
        halved = torch.stack([degraded(each) for each in pixels])
        found[all_kinds[1]].scores.update(mask_of(to_float(halved)), truth)
        for kind in kinds:
            if kind.way is not None:
                numbered = Numbered(batch.index, batch.label)
                decoded = passes.reconstruct(image, kind.way, numbered)
                found[kind].scores.update(mask_of(decoded), truth)
        for kind in codings:
            _code(found[kind], kind, truth)
        progress.update(len(truth))
    return found, num_empty


def _code(agreement: Agreement, kind: Kind, truth: Bool[Tensor, "b s s"]) -> None:
    """Masks through a coding, in at most the bytes of the tokens."""
    budget = math.ceil((kind.bits or 0.0) / 8)
    coded = [code_within(mask, CODINGS[kind.name], budget) for mask in truth.numpy()]
    agreement.scores.update(torch.stack([torch.from_numpy(each.mask) for each in coded]), truth)
    agreement.num_bytes += sum(each.num_bytes for each in coded)
    agreement.num_above += sum(each.num_bytes > budget for each in coded)


def bits_of(passes: Passes, way: Way) -> float | None:
    """Bits of one mask: its tokens, and with the given source its map; None of real numbers."""
    bits = passes.tokenizer.bits(way.num_kept)
    total = bits.total if way.source == "given" else bits.tokens + bits.condition
    return None if math.isnan(total) else total


# ------------------------------------------------------------------------------ what is written


def mask_rows(found: dict[Kind, Agreement]) -> list[MaskRow]:
    """Results of each kind as JSON."""
    rows: list[MaskRow] = []
    for kind, agreement in found.items():
        numbers = agreement.scores.compute()
        num_images = agreement.scores.num_images
        is_coded = kind.name in CODINGS
        rows.append(
            {
                "name": kind.name,
                "num_kept": None if kind.way is None else kind.way.num_kept,
                "source": None if kind.way is None or is_coded else kind.way.source,
                "bits": 8 * agreement.num_bytes / num_images if is_coded else kind.bits,
                "num_above_budget": agreement.num_above,
                **json_numbers(numbers),
            }
        )
    return rows


def curves(rows: Sequence[MaskRow]) -> list[Curve]:
    """IoU over bits: the ways through the tokenizer, and the codings."""
    found: dict[str, list[MaskRow]] = {}
    for row in rows:
        if row["bits"] is not None:
            source = f", {row['source']} source" if row["source"] is not None else ""
            found.setdefault(row["name"] + source, []).append(row)
    return [
        Curve(
            x=[row["bits"] or 0.0 for row in each],
            y=[row["metrics"]["iou"] for row in each],
            label=name,
            colour=number,
        )
        for number, (name, each) in enumerate(found.items())
    ]
