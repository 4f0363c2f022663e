"""Commands that write pictures as small files of tokens, and read them again.

As in `mergevq.cli.main`, a signature is the options, a docstring is the help, and heavy modules are
imported inside.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from mergevq.cli.images import naming, output_paths, raise_failed, unused
from mergevq.cli.options import MAY_BE_EMPTY, as_text
from mergevq.cli.tables import next_lines
from mergevq.config.base import (
    BUNDLED_TOKENIZER,
    MAX_PIXELS,
    Device,
    Precision,
    RecoverySource,
    SizePolicy,
)
from mergevq.config.evaluation import Quality, TrunkName
from mergevq.runtime.environment import prepare_to_compute

if TYPE_CHECKING:
    from mergevq.metrics.lpips import Perceptual
    from mergevq.tokenizer.compressed import Compressed

Folder = Annotated[Path, tyro.conf.arg(aliases=("-o",))]
Target = Literal["psnr", "lpips", "bits_per_pixel"]
"""Measures by which K is chosen."""


def compress(  # noqa: PLR0913 - each is an option
    images: Annotated[tyro.conf.Positional[tuple[Path, ...]], MAY_BE_EMPTY],
    *,
    model: str = BUNDLED_TOKENIZER,
    out: Folder = Path("compressed"),
    num_kept: int | None = None,
    quality: tuple[Target, float] | None = None,
    source: RecoverySource = "given",
    size_policy: SizePolicy = "tile",
    lpips_weights: Path | None = None,
    lpips_trunk: TrunkName = "alex",
    device: Device = "auto",
    precision: Precision = "auto",
) -> None:
    """Write images as small files of tokens, which `mergevq decompress` reads.

    Writes OUT/NAME.mvq. Give `--num-kept` or `--quality`, which chooses K for every image by
    itself: `--quality psnr 22`, `--quality lpips 0.2`, `--quality bits_per_pixel 0.8`.

    Args:
        images: files of any format, mode and size that Pillow reads.
        model: directory of a tokenizer, a name of `mergevq models`, or owner/name@revision on
            Hugging Face.
        out: where the files go.
        num_kept: K, of each tile; the tokenizer's own by default.
        quality: a measure and its bound: the fewest tokens with at least so many dB of PSNR or at
            most such an LPIPS distance, or the most tokens of at most so many bits of the whole
            file per pixel.
        source: `recovered` leaves the source map out, to be inferred from the tokens.
        size_policy: `tile` blends overlapping tiles of the trained size, `resize` writes the image
            at about the trained number of pixels, `error` takes multiples of the patch size as
            they are.
        lpips_weights: file or folder with LPIPS weights; the cache is looked into without.
        lpips_trunk: network of LPIPS.
        device: where to compute.
        precision: of the encoder; auto is bf16 where the device gains from it, else float32.

    Raises:
        ValueError: an image could not be done; all others are.
    """
    usage = "mergevq compress IMAGE.."
    outputs = output_paths(images, out, ending=".mvq", usage=usage)
    target = {} if quality is None else {quality[0]: quality[1]}
    wanted = Quality(num_kept=num_kept, **target)
    prepare_to_compute()
    from mergevq.data.prepare import load_picture
    from mergevq.runtime.device import resolve_device
    from mergevq.runtime.files import write_bytes
    from mergevq.tokenizer.compressed import PictureCodec, compress_image

    place = resolve_device(device)
    perceptual = None
    if wanted.lpips is not None:
        perceptual = _perceptual(lpips_weights, lpips_trunk).to(place)
    codec = PictureCodec.from_pretrained(model, precision=precision, device=place)
    out.mkdir(parents=True, exist_ok=True)
    failed: list[ValueError] = []
    written: list[Path] = []
    for path, output in zip(images, outputs, strict=True):
        try:
            picture = load_picture(path)
            with naming(path):
                done = compress_image(
                    codec,
                    picture,
                    quality=wanted,
                    size_policy=size_policy,
                    source=source,
                    perceptual=perceptual,
                )
        except ValueError as error:
            failed.append(error)
            continue
        write_bytes(output, done.data)
        written.append(output)
        print(f"{path}: {_compressed_line(done, wanted)} -> {output}")
    if written:
        print(next_lines(("decompress", written[0], "--model", model)))
    raise_failed(failed, len(images), "images")


def decompress(
    files: Annotated[tyro.conf.Positional[tuple[Path, ...]], MAY_BE_EMPTY],
    *,
    model: str = BUNDLED_TOKENIZER,
    out: Folder = Path("decompressed"),
    max_pixels: int = MAX_PIXELS,
    device: Device = "auto",
    precision: Precision = "auto",
) -> None:
    """Turn files that `mergevq compress` wrote back into images.

    Writes OUT/NAME.png; one that is there already is kept, and is an error.

    Args:
        files: what `mergevq compress` wrote.
        model: the tokenizer that compressed: its directory, its name in `mergevq models`, or
            owner/name@revision on Hugging Face.
        out: where the images go.
        max_pixels: largest image that is decoded, as width times height.
        device: where to compute.
        precision: of the decoder; auto is bf16 where the device gains from it, else float32.

    Raises:
        ValueError: a file could not be done; all others are.
    """
    usage = "mergevq decompress FILE.."
    outputs = output_paths(files, out, ending=".png", usage=usage)
    prepare_to_compute()
    from mergevq.data.prepare import most_bytes, read_bounded
    from mergevq.runtime.device import resolve_device
    from mergevq.tokenizer.compressed import PictureCodec, decompress_image

    codec = PictureCodec.from_pretrained(model, precision=precision, device=resolve_device(device))
    out.mkdir(parents=True, exist_ok=True)
    failed: list[ValueError] = []
    for path, output in zip(files, outputs, strict=True):
        try:
            with naming(path):
                unused(output)
                data = read_bounded(path, most_bytes(max_pixels))
                picture = decompress_image(codec, data, max_pixels=max_pixels)
        except ValueError as error:
            failed.append(error)
            continue
        picture.save(output)
        print(f"{path}: {picture.width} x {picture.height} pixels -> {output}")
    if len(failed) < len(files):
        print(next_lines(("demo", "--model", model)))
    raise_failed(failed, len(files), "files")


def _perceptual(weights: Path | None, trunk: TrunkName) -> "Perceptual":
    """LPIPS.

    Raises:
        ValueError: there are no weights.
    """
    from mergevq.metrics.lpips import load_perceptual, missing_weights

    perceptual = load_perceptual(trunk, as_text(weights))
    if perceptual is None:
        raise ValueError(
            f"--quality lpips needs weights: {missing_weights(trunk)}; --lpips-weights FILE"
        )
    return perceptual


def _compressed_line(done: "Compressed", quality: Quality) -> str:
    """Tokens, bytes and, where it was measured, quality of one file."""
    header = done.header
    tiles = f"{header.num_tiles} tiles x " if header.num_tiles > 1 else ""
    name = "PSNR {:.2f} dB" if quality.psnr is not None else "LPIPS {:.4f}"
    reached = "" if done.reached is None else f", {name.format(done.reached)}"
    return (
        f"{tiles}{header.num_kept} of {header.grid_height * header.grid_width} tokens, "
        f"{len(done.data):,} bytes, {done.bits_per_pixel:.3f} bits per pixel{reached}"
    )
