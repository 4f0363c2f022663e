"""Commands that read and write images, tokens and weights.

As in `mergevq.cli.main`, a signature is the options, a docstring is the help, and heavy modules are
imported inside.
"""

import math
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from mergevq.cli.options import MAY_BE_EMPTY, Counts, Sampling, whole_numbers
from mergevq.cli.tables import logit_error_line, next_lines
from mergevq.config.base import BUNDLED_TOKENIZER, MAX_PIXELS, Device, Precision, SizePolicy
from mergevq.config.parts import bits_of, per_token
from mergevq.runtime.environment import let_products_repeat, prepare_to_compute

if TYPE_CHECKING:
    from mergevq.config.tokenizer import TokenizerConfig
    from mergevq.tokenizer.codec import ImageReconstruction


RECONSTRUCT = "mergevq reconstruct IMAGE.."
_LARGE = {"error": 8, "tile": 500}
"""Times the trained number of pixels from which a picture gets a warning, by size policy."""


def reconstruct(
    images: Annotated[tyro.conf.Positional[tuple[Path, ...]], MAY_BE_EMPTY],
    *,
    model: str = BUNDLED_TOKENIZER,
    decoder: str | None = None,
    num_kept: Counts = (),
    out: Path = Path("reconstructions"),
    size_policy: SizePolicy = "tile",
    device: Device = "auto",
    precision: Precision = "auto",
) -> None:
    """Show what a tokenizer makes of images, and what that costs.

    Writes OUT/NAME.png: original, merge map, and reconstruction with the given and with the
    recovered source map, a row for each number of tokens; and in OUT/NAME the merge map and both
    reconstructions as pictures of their own, in the size of the image.

    Args:
        images: files of any format and mode that Pillow reads.
        model: directory of a tokenizer, a name of `mergevq models`, or owner/name@revision on
            Hugging Face.
        decoder: directory of a decoder that was trained for the tokenizer, or its id; by default
            the tokenizer's own.
        num_kept: K, one or several (16,20); the tokenizer's own if there are none.
        out: where the pictures go.
        size_policy: for images of another size than trained: `tile` blends overlapping tiles of
            the trained size, `resize` keeps the aspect ratio and about the trained number of
            pixels, `error` takes multiples of the patch size as they are.
        device: where to compute.
        precision: of the model; auto is bf16 where the device gains from it, else float32.

    Raises:
        ValueError: an image could not be done; all others are.
    """
    outputs = output_paths(images, out, ending=".png", usage=RECONSTRUCT)
    num_kepts = whole_numbers("num_kept", num_kept)
    prepare_to_compute()
    from mergevq.data.prepare import load_picture
    from mergevq.runtime.device import resolve_device
    from mergevq.tokenizer.codec import (
        embed_image,
        full_pictures,
        reconstruct_image,
        reconstruction_figure,
    )
    from mergevq.tokenizer.tokenizer import Tokenizer

    tokenizer = Tokenizer.from_pretrained(
        model, precision=precision, device=resolve_device(device), decoder=decoder
    )
    out.mkdir(parents=True, exist_ok=True)
    failed: list[ValueError] = []
    for path, output in zip(images, outputs, strict=True):
        try:
            picture = load_picture(path)
            _warn_if_large(path, picture.size, tokenizer.config, size_policy)
            with naming(path):
                embedded = embed_image(tokenizer, picture, size_policy=size_policy)
                results = [
                    reconstruct_image(tokenizer, embedded, count) for count in num_kepts or (None,)
                ]
        except ValueError as error:
            failed.append(error)
            continue
        # Saved first: a console that cannot show a name must not cost the picture.
        reconstruction_figure(results).save(output)
        folder = output.with_suffix("")
        folder.mkdir(exist_ok=True)
        for name, full in full_pictures(results).items():
            full.save(folder / name)
        for result in results:
            print(f"{path}: {_result_line(result)}")
        print(f"{path}: -> {output}, full size in {folder}")
    if len(failed) < len(images):
        print(next_lines(("compress", "PICTURE", "--model", model)))
    raise_failed(failed, len(images), "images")


def encode(  # noqa: PLR0913 - each is an option
    *,
    model: str = BUNDLED_TOKENIZER,
    data: str,
    out: Path,
    num_kept: Counts = (),
    flip: tyro.conf.FlagCreatePairsOff[bool] = False,
    max_pixels: int = MAX_PIXELS,
    batch_size: int = 64,
    device: Device = "auto",
    precision: Precision = "auto",
    num_workers: int = 2,
) -> None:
    """Write the tokens of all images of a data set, for training generators.

    Stopped and started again it goes on where it was, and writes the same bytes. Under torchrun the
    processes share the work.

    Args:
        model: directory of a tokenizer, a name of `mergevq models`, or owner/name@revision on
            Hugging Face.
        data: a folder of images, parquet files, WebDataset shards, or `digits`.
        out: folder of the tokens.
        num_kept: K, one or several (16,20); the tokenizer's own if there are none.
        flip: also encode the mirror image of each image.
        max_pixels: largest picture that is read, as width times height; larger ones count as
            unreadable.
        batch_size: images encoded at once, a divisor of the 1024 of a shard.
        device: where to compute.
        precision: of the encoder; auto is bf16 where the device gains from it, else float32. A
            folder has one, which its record names: an index may differ where a latent is near 0.
        num_workers: loader processes; 0 loads in this one.
    """
    prepare_to_compute()
    let_products_repeat()
    from mergevq.tokenizer.encode import encode as encode_data

    written = encode_data(
        model,
        data,
        out,
        num_kept=whole_numbers("num_kept", num_kept),
        flip=flip,
        max_pixels=max_pixels,
        batch_size=batch_size,
        device=device,
        precision=precision,
        num_workers=num_workers,
    )
    record = written.record
    kept = " and ".join(map(str, record.num_kept))
    broken = f"; {len(written.broken)} cannot be read" if written.broken else ""
    print(
        f"{out}: {kept} tokens of {record.bits:g} bits for each of {len(written)} rows, from "
        f"{record.num_images} images{broken}; encoded in {record.precision}"
    )
    print(next_lines(("train", "RECIPE", "--tokens.path", out, "--tokens.tokenizer", model)))


def quantize(  # noqa: PLR0913 - each is an option
    model: tyro.conf.Positional[str],
    *,
    data: str,
    out: Path,
    levels: int = 64,
    max_images: int | None = None,
    max_pixels: int = MAX_PIXELS,
    batch_size: int = 64,
    device: Device = "auto",
    num_workers: int = 2,
) -> None:
    """Make a tokenizer with indices of one whose tokens are real numbers, without training.

    Each channel is rounded to one of so many levels, by its mean and deviation over the images. The
    new tokenizer encodes, compresses and feeds a generator as any other.

    Args:
        model: directory of a tokenizer with model.quantizer.kind kl or none, or owner/name@revision
            on Hugging Face.
        data: a folder of images, parquet files, WebDataset shards, or `digits`: best those that it
            was trained on.
        out: directory of the new tokenizer.
        levels: of each channel; a token has the channels times their logarithm in bits.
        max_images: at most so many images, evenly spaced; all by default.
        max_pixels: largest picture that is read, as width times height; larger ones count as
            unreadable.
        batch_size: images encoded at once.
        device: where to compute.
        num_workers: loader processes; 0 loads in this one.
    """
    prepare_to_compute()
    let_products_repeat()
    from mergevq.config.training import Quantization
    from mergevq.training.posthoc.quantize import quantize as quantize_tokenizer

    tokenizer, measured = quantize_tokenizer(
        Quantization(
            model=model,
            data=data,
            out=str(out),
            num_levels=levels,
            max_images=max_images,
            max_pixels=max_pixels,
            batch_size=batch_size,
            device=device,
            num_workers=num_workers,
        )
    )
    channels = measured.channels
    print(
        f"{out}: {per_token(tokenizer.config.quantizer)} a token, {levels} levels of each of "
        f"{len(channels.mean)} channels, {channels.num_active} of them in use; measured over "
        f"{channels.num_tokens} tokens of {measured.num_images} images"
    )
    print(next_lines(("encode", "--model", out, "--data", data, "--out", "TOKENS")))


def sample(  # noqa: PLR0913 - each is an option
    *,
    out: Path,
    sampling: Sampling,
    classes: str = "",
    num: int = 16,
    batch_size: int = 16,
    keep_from: Path | None = None,
    mask: Path | None = None,
    again: Path | None = None,
    images: Annotated[tuple[int, ...], MAY_BE_EMPTY] = (),
) -> None:
    """Sample images from a generator, or make earlier ones again.

    Writes OUT/000000.png and so on, OUT/grid.png, and OUT/samples.json, from which
    `mergevq sample --again OUT/samples.json --images 3 --out DIR` makes image 3 again. An image
    depends on the seed and its number, not on how many there are.

    Args:
        out: folder of the images; one that the same command left unfinished is completed.
        sampling: what samples, and how.
        classes: class ids separated by commas, one for each image in turn; all there are if empty.
        num: images.
        batch_size: images sampled at once.
        keep_from: image to keep tokens of; of random order only, with `--mask`.
        mask: image as large, white where that one is made anew.
        again: `samples.json` of earlier images, which says all but `--out` and `--images`.
        images: numbers of the images to make again.
    """
    prepare_to_compute()
    from mergevq.generator.writing import make_again, write_samples

    if again is not None:
        out.mkdir(parents=True, exist_ok=True)
        for number, picture in zip(images, make_again(again, images), strict=True):
            path = unused(out / f"{number:06d}.png")
            picture.save(path)
            print(f"image: {path}")
        return
    run = replace(
        sampling.run(num_images=num, batch_size=batch_size),
        classes=whole_numbers("classes", [classes]),
        keep_from=None if keep_from is None else str(keep_from),
        mask=None if mask is None else str(mask),
    )
    written = write_samples(run, out)
    if written.logit_error is not None:
        print(logit_error_line(run.weights, written.logit_error))
    if written.num_made == 0:
        print("complete already, nothing was sampled")
    if sampling.draft is not None and written.tokens_per_pass is not None:
        print(
            f"{written.tokens_per_pass:.2f} tokens in each pass, {written.tokens_per_pass - 1:.2f} "
            f"of them drafted; {written.num_passes:.1f} passes for a batch"
        )
    print(f"{len(written.images)} images: {out}")
    print(f"grid: {written.grid}")
    measures = ("--reference", "REFERENCE", "--extractor", "EXTRACTOR")
    print(next_lines(("evaluate", "generation", "--samples", out, *measures)))


def convert(
    checkpoint: tyro.conf.Positional[Path | None] = None,
    *,
    out: Path,
    image_size: int | None = None,
    num_kept: int | None = None,
    num_heads: int | None = None,
    num_decoder_heads: int | None = None,
    lpips: tuple[Path, Path] | None = None,
) -> None:
    """Turn a checkpoint of the authors' code into a model directory of this one, or LPIPS weights.

    What shapes cannot tell has to be said. The source predictor, which the authors' code does not
    train, is left random: only the given source map is of use.

    Args:
        checkpoint: their `.ckpt`, a torch state dict or safetensors.
        out: directory to write; of LPIPS, the safetensors file.
        image_size: side of the training images in pixels.
        num_kept: K the model was trained for.
        num_heads: attention heads of the encoder.
        num_decoder_heads: attention heads of the decoder; none is 12 where it is 768 wide (d96),
            else 8.
        lpips: instead of a checkpoint, torchvision's file of a VGG-16, AlexNet or SqueezeNet and
            the LPIPS authors' file of its heads.

    Raises:
        ValueError: neither a checkpoint with all that shapes cannot tell nor LPIPS is named.
    """
    from mergevq.metrics.lpips import convert_perceptual_files
    from mergevq.tokenizer.interop import load_official, official_config, read_official, read_state

    if lpips is not None:
        print(f"LPIPS: {convert_perceptual_files(*lpips, out, read=read_state)}")
        return
    if checkpoint is None or image_size is None or num_kept is None or num_heads is None:
        raise ValueError(
            "name a checkpoint with --image-size, --num-kept and --num-heads, "
            "or --lpips TRUNK HEADS"
        )
    state = read_official(checkpoint)
    config = official_config(
        state,
        image_size=image_size,
        num_kept=num_kept,
        num_heads=num_heads,
        num_decoder_heads=num_decoder_heads,
    )
    load_official(state, config).tokenizer.save_pretrained(out)
    print(
        f"{out}: {config.stem.kind} stem, width {config.dim}, {config.reducer.num_layers} encoder "
        f"blocks, {config.decoder.kind} decoder, {bits_of(config.quantizer.sizes):g} bits; its "
        "source predictor is untrained"
    )


def _result_line(result: "ImageReconstruction") -> str:
    """Tokens, bits and quality of one reconstruction."""
    tiles = f"{result.num_tiles} tiles x " if result.num_tiles > 1 else ""
    return (
        f"{tiles}{result.num_kept} of {result.num_cells} tokens, "
        f"{result.cost}, {result.price}, "
        f"PSNR {result.psnr_given:.2f} dB"
        + (
            f" given source, {result.psnr_recovered:.2f} dB recovered source"
            if result.psnr_recovered is not None
            else ""
        )
    )


def output_paths(paths: Sequence[Path], out: Path, *, ending: str, usage: str) -> list[Path]:
    """OUT/NAME and an ending for every file, numbered where names are equal.

    Args:
        paths: files that are read.
        out: folder that is written to.
        ending: of the names of what is written.
        usage: the command, for the message where there are no files.

    Raises:
        ValueError: there are no files, or one would be overwritten.
    """
    if not paths:
        raise ValueError(f"name at least one file: {usage}")
    outputs: list[Path] = []
    for path in paths:
        candidates = [out / f"{path.stem}{ending}"]
        candidates += [out / f"{path.stem}-{number}{ending}" for number in range(2, len(paths) + 1)]
        outputs.append(next(each for each in candidates if each not in outputs))
    overwritten = {path.resolve() for path in paths} & {path.resolve() for path in outputs}
    if overwritten:
        raise ValueError(f"out ({out}) would overwrite {overwritten.pop()}; choose another folder")
    return outputs


def raise_failed(failed: Sequence[ValueError], num_files: int, noun: str) -> None:
    """End a command with what went wrong with some of its files, if anything did.

    Args:
        failed: an error for each that failed.
        num_files: how many there were.
        noun: what they are, for the message.

    Raises:
        ValueError: a file could not be done.
    """
    if num_files == 1 and failed:
        raise failed[0]
    if failed:
        problems = "; ".join(map(str, failed))
        raise ValueError(f"{len(failed)} of {num_files} {noun} could not be done: {problems}")


def _warn_if_large(
    path: Path, size: tuple[int, int], config: "TokenizerConfig", size_policy: SizePolicy
) -> None:
    """Say how much more a picture of (width, height) takes than one of the trained size."""
    times = size[0] * size[1] / config.image_size**2
    if times < _LARGE.get(size_policy, math.inf):
        return
    if size_policy == "tile":
        detail = f"{times:.0f} times those of a tile, which may take minutes"
    else:
        cells = size[0] * size[1] // config.patch_size**2
        detail = (
            f"{cells} tokens at once, {times:.0f} times the {config.grid_size**2} trained on, "
            "which may take minutes and much memory; --size-policy tile takes less memory"
        )
    print(
        f"mergevq: {path}: {size[0]} x {size[1]} pixels are {detail}; --size-policy resize is "
        "quicker",
        file=sys.stderr,
    )


def unused(path: Path) -> Path:
    """A path where nothing is.

    Raises:
        ValueError: there is something.
    """
    if path.exists():
        raise ValueError(f"{path} is there already; choose another folder with --out")
    return path


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Put the file that an error is about before its message.

    Raises:
        ValueError: whatever was raised inside.
    """
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
