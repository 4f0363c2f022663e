"""Photographs as `.mvq` files, and as JPEG, WebP, AVIF and JPEG XL of as many bytes.

    python -m benchmarks.codecs FOLDER --lpips WEIGHTS --out docs/results/photographs24

Each picture is reduced to a short side of `--side` pixels by means of areas, which leaves nothing
of the file that it came from. `mergevq compress` then writes it at every K, and each other format
answers with its best file of at most as many bytes. Whole files count, headers included.

Writes OUT/codecs.json, for `docs/tables.py`, and OUT/codecs.png.
"""

import argparse
import bisect
import functools
import io
import multiprocessing
import sys
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image

from mergevq.config.base import BUNDLED_TOKENIZER
from mergevq.config.evaluation import Quality
from mergevq.data.prepare import load_picture, to_tensor
from mergevq.metrics.baselines import QUALITIES, FileFormat, encoded, file_formats
from mergevq.metrics.image import psnr, to_uint8
from mergevq.metrics.lpips import Perceptual, load_perceptual
from mergevq.metrics.references import ImageHashes
from mergevq.report.plots import Curve, Panel, line_plot
from mergevq.runtime.device import precision_name
from mergevq.runtime.environment import prepare_to_compute
from mergevq.runtime.files import write_json
from mergevq.runtime.run import command_line, environment
from mergevq.tokenizer.codec import decode_image, embed_image, encode_image
from mergevq.tokenizer.compressed import PictureCodec, compress_image

MVQ = "mvq"


class File(NamedTuple):
    """A picture as a file, and what comes back from it."""

    num_bytes: int
    psnr: float
    lpips: float


def reduced(picture: Image.Image, side: int) -> Image.Image:
    """A picture with a short side of so many pixels, each the mean of the area it covers."""
    short = min(picture.size)
    if short < side:
        raise SystemExit(f"short side of {short} pixels must be at least --side ({side})")
    width, height = (round(length * side / short) for length in picture.size)
    return picture.resize((width, height), Image.Resampling.BOX)


class Judge(NamedTuple):
    """Compares pictures with one picture."""

    picture: Image.Image
    perceptual: Perceptual

    def psnr(self, back: Image.Image) -> float:
        return float(psnr(to_tensor(self.picture)[None], to_tensor(back)[None]))

    @torch.no_grad()
    def lpips(self, back: Image.Image) -> float:
        return float(self.perceptual(to_tensor(self.picture)[None], to_tensor(back)[None]))


class Rival:
    """One format's files of one picture; everything is found out once."""

    def __init__(self, judge: Judge, file_format: FileFormat) -> None:
        self.qualities = QUALITIES[file_format]
        self.data = functools.cache(functools.partial(encoded, judge.picture, file_format))
        self.psnr = functools.cache(lambda quality: judge.psnr(self.back(quality)))
        self.lpips = functools.cache(lambda quality: judge.lpips(self.back(quality)))

    def back(self, quality: int) -> Image.Image:
        with Image.open(io.BytesIO(self.data(quality))) as opened:
            return opened.convert("RGB")

    def file(self, quality: int) -> File:
        return File(len(self.data(quality)), self.psnr(quality), self.lpips(quality))

    def within(self, budget: int) -> File:
        """The best file of at most so many bytes; the smallest there is where none is."""
        # Files grow with quality, but for a few bytes here and there.
        place = bisect.bisect_right(self.qualities, budget, key=lambda q: len(self.data(q)))
        return self.file(self.qualities[max(0, place - 1)])


class Comparison(NamedTuple):
    """One picture at one K."""

    num_pixels: int
    own: File
    within: dict[FileFormat, File]
    """The best of as many bytes."""


def compare(
    codec: PictureCodec, picture: Image.Image, counts: Sequence[int], perceptual: Perceptual
) -> list[Comparison]:
    """One picture at every K."""
    judge, tokenizer = Judge(picture, perceptual), codec.tokenizer
    rivals = {each: Rival(judge, each) for each in file_formats()}
    embedded = embed_image(tokenizer, picture, size_policy="tile")
    found = []
    for count in counts:
        data = compress_image(codec, embedded, quality=Quality(num_kept=count)).data
        # To the pixel what the file decompresses to, in half of the time.
        back = decode_image(tokenizer, encode_image(tokenizer, embedded, count))
        own = File(len(data), judge.psnr(back), judge.lpips(back))
        found.append(
            Comparison(
                num_pixels=picture.width * picture.height,
                own=own,
                within={name: rival.within(len(data)) for name, rival in rivals.items()},
            )
        )
    return found


def mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def summary(found: Sequence[Comparison], files: Sequence[File]) -> dict[str, float]:
    """Means over the pictures."""
    bits = [8 * file.num_bytes / each.num_pixels for file, each in zip(files, found, strict=True)]
    return {
        "mean_bytes": mean([file.num_bytes for file in files]),
        "bits_per_pixel": mean(bits),
        "psnr": mean([file.psnr for file in files]),
        "lpips": mean([file.lpips for file in files]),
    }


def results(count: int, found: Sequence[Comparison]) -> dict[str, Any]:
    """One K: the `.mvq` files, and each format beside them."""
    rows = []
    for name in found[0].within:
        pairs = [(each.own, each.within[name]) for each in found]
        rows.append(
            {
                "file_format": name,
                **summary(found, [file for _, file in pairs]),
                "num_above_budget": sum(file.num_bytes > own.num_bytes for own, file in pairs),
                "num_better": {
                    "psnr": sum(file.psnr > own.psnr for own, file in pairs),
                    "lpips": sum(file.lpips < own.lpips for own, file in pairs),
                },
            }
        )
    return {"num_kept": count, MVQ: summary(found, [each.own for each in found]), "files": rows}


def by_name(row: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {MVQ: row[MVQ], **{file["file_format"]: file for file in row["files"]}}


def plot(rows: Sequence[dict[str, Any]]) -> Image.Image:
    """PSNR and LPIPS over bits per pixel; as colours there are five."""
    panels = []
    for title, key in (("PSNR in dB, mean", "psnr"), ("LPIPS (less is better), mean", "lpips")):
        curves = []
        for number, name in enumerate(by_name(rows[0])):
            files = [by_name(row)[name] for row in rows]
            curves.append(
                Curve(
                    x=[file["bits_per_pixel"] for file in files],
                    y=[file[key] for file in files],
                    label=f".{name}" if name == MVQ else name,
                    colour=number,
                )
            )
        panels.append(Panel(title=title, curves=curves))
    return line_plot(panels, x_label="bits per pixel, whole files")


def parser() -> argparse.ArgumentParser:
    found = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    found.add_argument("folder", type=Path, help="pictures, all files of it")
    found.add_argument("--model", default=BUNDLED_TOKENIZER)
    found.add_argument("--num-kept", type=int, nargs="+", default=[36, 144])
    found.add_argument("--side", type=int, default=512, help="short side in pixels")
    found.add_argument("--lpips", help="file or folder with LPIPS weights")
    found.add_argument("--lpips-trunk", default="alex", choices=("alex", "vgg", "squeeze"))
    found.add_argument("--workers", type=int, default=1, help="processes")
    found.add_argument("--out", type=Path, default=Path("runs/codecs"))
    return found


class Looked(NamedTuple):
    """Everything about one picture."""

    name: str
    pixels: torch.Tensor
    found: list[Comparison]


def look(options: argparse.Namespace, path: Path) -> Looked:
    prepare_to_compute()
    codec = PictureCodec.from_pretrained(options.model)
    perceptual = load_perceptual(options.lpips_trunk, options.lpips)
    if perceptual is None:
        raise SystemExit("name the weights of LPIPS: --lpips FILE")
    picture = reduced(load_picture(path), options.side)
    found = compare(codec, picture, options.num_kept, perceptual)
    print(path.stem, file=sys.stderr, flush=True)
    return Looked(path.stem, to_uint8(to_tensor(picture)), found)


def main(argv: list[str]) -> int:
    options = parser().parse_args(argv)
    paths = sorted(options.folder.iterdir())
    counts = options.num_kept = sorted(options.num_kept)
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(options.workers, mp_context=context) as pool:
        looked = list(pool.map(functools.partial(look, options), paths))
    hashes, found = ImageHashes(), [each.found for each in looked]
    for number, each in enumerate(looked):
        hashes.update(each.pixels[None], torch.tensor([number]))
    codec = PictureCodec.from_pretrained(options.model)
    rows = [results(count, [each[number] for each in found]) for number, count in enumerate(counts)]
    options.out.mkdir(parents=True, exist_ok=True)
    record = {
        "kind": "codec comparison",
        "command": command_line(),
        "environment": environment(torch.device("cpu")),
        "model": {"path": options.model, "hash": codec.identity},
        "precision": precision_name(codec.tokenizer.computes_in()),
        "lpips": options.lpips_trunk,
        "data": {
            "num_images": len(looked),
            "short_side": options.side,
            "pixels_sha256": hashes.compute(),
            "pictures": [
                {"name": each.name, "height": each.pixels.shape[1], "width": each.pixels.shape[2]}
                for each in looked
            ],
        },
        "results": rows,
    }
    write_json(options.out / "codecs.json", record)
    plot(rows).save(options.out / "codecs.png")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
