"""Pictures as files of tokens: `mergevq compress` and `mergevq decompress`.

A `.mvq` file is a header, one stream of a range coder, and a checksum of all before it:

| bytes | content |
|---|---|
| 4 | magic: 0x89 and `MVQ` |
| 1 | version of the format |
| 8 | first bytes of `runtime.artefacts.tokens_hash` |
| 1 | source map: 0 none, 1 `context`, 2 `uniform` (`data.coding.maps.MapModel`) |
| 1 | precision it was encoded in: number in `PRECISIONS` |
| 1 to 5 each | `Header.numbers`: 7 bits a byte, lowest first, the highest bit on all but the last |
| 4 n | source maps of all tiles in raster order, then their tokens |
| 4 | CRC-32, lowest byte first |

Nothing in it is executed, and nothing is taken memory for before it was compared with the model,
with the number of pixels that may be decoded, and with the length of the file.
"""

import math
import warnings
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, get_args

import torch
from jaxtyping import Int64
from PIL import Image
from torch import Tensor

from mergevq.config.base import MAX_PIXELS, Precision, RecoverySource, SizePolicy, check_choice
from mergevq.config.evaluation import Quality
from mergevq.config.parts import require_no_condition
from mergevq.data.codes import require_parts
from mergevq.data.coding.maps import MapModel, code_maps, map_models
from mergevq.data.coding.streams import Reader, Writer
from mergevq.data.coding.tokens import code_tokens, least_bits
from mergevq.data.layouts import Source, require_source
from mergevq.data.prepare import to_tensor
from mergevq.metrics.image import psnr
from mergevq.metrics.lpips import Perceptual
from mergevq.report.pictures import to_pil
from mergevq.runtime.artefacts import resolve, tokens_hash
from mergevq.runtime.device import precision_name
from mergevq.tokenizer.codec import (
    EmbeddedImage,
    Layout,
    decode_tiles,
    embed_image,
    encode_image,
    tile_layout,
)
from mergevq.tokenizer.tokenizer import Tokenizer

MAGIC = b"\x89MVQ"
"""First bytes of a file."""
VERSION = 1
"""Version of the format that is written, and the newest that is read."""
ENDING = ".mvq"
PRECISIONS: tuple[Precision, ...] = ("float32", "bf16", "float16")
"""Precisions by their number in a file."""
_MAP_MODELS: tuple[MapModel | None, ...] = (None, *get_args(MapModel))
_ID_BYTES = 8
_CHECKSUM_BYTES = 4
_FIXED = len(MAGIC) + 1 + _ID_BYTES + 2
_LEAST_BYTES = _FIXED + 9 + _CHECKSUM_BYTES
_NUMBER_BYTES = 5
_MOST_TIMES = 64
"""Most times the trained pixels that a picture passed whole may have: a file of a few bytes cannot
ask for more, however few tokens it has."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PictureCodec:
    """A tokenizer that compresses pictures, and the identity that its files carry."""

    tokenizer: Tokenizer
    """In evaluation mode."""
    identity: str
    """`runtime.artefacts.tokens_hash` of its directory, hexadecimal."""

    def __post_init__(self) -> None:
        """Raise `ValueError` where tokens are real numbers, or decoded by a condition."""
        require_parts(self.tokenizer.quantizer.spec.sizes, "a compressed file")
        require_no_condition(self.tokenizer.config.condition, "a compressed file")

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        *,
        precision: Precision = "auto",
        device: torch.device | str = "cpu",
    ) -> "PictureCodec":
        """Load; the arguments and errors are those of `Tokenizer.from_pretrained`."""
        directory = resolve(path)
        tokenizer = Tokenizer.from_pretrained(directory, precision=precision, device=device)
        return cls(tokenizer=tokenizer, identity=tokens_hash(directory))

    @property
    def id_bytes(self) -> bytes:
        """The identity as a file has it."""
        return bytes.fromhex(self.identity)[:_ID_BYTES]


@dataclass(frozen=True, kw_only=True, slots=True)
class Header:
    """Header of a file, before its stream."""

    identity: bytes
    """First bytes of the hash of the tokenizer that encoded."""
    map_model: MapModel | None
    """Model of the source maps; None where they are left out."""
    precision: Precision
    """Precision of the encoder."""
    width: int
    """Width of the picture in pixels."""
    height: int
    tile_width: int
    """Width of a tile in pixels."""
    tile_height: int
    tile_rows: int
    tile_columns: int
    grid_height: int
    """Height of a tile in cells."""
    grid_width: int
    num_kept: int
    """K, of each tile."""

    @property
    def numbers(self) -> tuple[int, ...]:
        """The whole numbers, in the order of the file."""
        return (
            *(self.width, self.height, self.tile_width, self.tile_height),
            *(self.tile_rows, self.tile_columns, self.grid_height, self.grid_width),
            self.num_kept,
        )

    @property
    def num_tiles(self) -> int:
        """Tiles of the picture."""
        return self.tile_rows * self.tile_columns

    @property
    def grid_shape(self) -> tuple[int, int]:
        """(height, width) of a tile in cells."""
        return self.grid_height, self.grid_width


class Compressed(NamedTuple):
    """A picture as the content of a file."""

    data: bytes
    """Content of the file."""
    header: Header
    """Beginning of a file."""
    reached: float | None
    """PSNR or LPIPS of what it decompresses to, where that was the target."""

    @property
    def bits_per_pixel(self) -> float:
        """Bits of the whole file over pixels of the picture."""
        return 8 * len(self.data) / (self.header.width * self.header.height)


# ------------------------------------------------------------------------------------ pictures


def compress_image(
    codec: PictureCodec,
    image: Image.Image | EmbeddedImage,
    *,
    quality: Quality | None = None,
    size_policy: SizePolicy = "tile",
    source: RecoverySource = "given",
    perceptual: Perceptual | None = None,
) -> Compressed:
    """Compress a picture of any mode.

    Args:
        codec: from `PictureCodec.from_pretrained`.
        image: transparent parts become white; or what `embed_image` gave, whose size policy then
            counts.
        quality: what K is chosen by, by bisection among those that the tokenizer was trained with;
            None is its own K. Quality is measured on what the file decompresses to, and taken to
            grow with K: the target is met, by almost the best K where it does not.
        size_policy: see `SizePolicy`; of `resize` the file holds the resized picture.
        source: `recovered` leaves the source map out, to be inferred from the tokens.
        perceptual: LPIPS, where that is the target.

    Raises:
        ValueError: the size or K is not legal, or the target cannot be met.
        RuntimeError: the `codec` extra is not installed.
    """
    check_choice("source", source, RecoverySource)
    quality = quality or Quality()
    embedded = image
    if not isinstance(embedded, EmbeddedImage):
        embedded = embed_image(codec.tokenizer, embedded, size_policy=size_policy)
    _require_small_tiles(codec.tokenizer, embedded.layout)
    trial = _Trial(codec, embedded, quality, source, perceptual)
    if quality.bits_per_pixel is not None:
        return _most_that_fit(trial, quality.bits_per_pixel)
    if quality.psnr is not None:
        return _fewest_that_reach(trial, "psnr", quality.psnr)
    if quality.lpips is not None:
        return _fewest_that_reach(trial, "lpips", quality.lpips)
    return trial(quality.num_kept)


def decompress_image(
    codec: PictureCodec, data: bytes, *, max_pixels: int = MAX_PIXELS
) -> Image.Image:
    """Turn the content of a file back into a picture.

    Args:
        codec: of the tokenizer that compressed.
        data: content of the file, which may be a stranger's.
        max_pixels: largest picture that is decoded, as width times height.

    Raises:
        ValueError: no such file, of a newer format, damaged, of another tokenizer, or too large.
        RuntimeError: the `codec` extra is not installed.
    """
    header, stream = read_header(data)
    layout = _checked(codec, header, len(stream), max_pixels)
    precision = precision_name(codec.tokenizer.computes_in())
    infers = header.map_model is None and codec.tokenizer.has_maps
    if infers and header.precision != precision:
        warnings.warn(
            f"the source map is inferred in {precision}, and the picture was compressed in "
            f"{header.precision}: quality may differ; take precision {header.precision}",
            stacklevel=2,
        )
    parts, source = _read_tokens(codec.tokenizer, header, stream)
    return to_pil(decode_tiles(codec.tokenizer, parts, source, header.grid_shape, layout))


class _Trial(NamedTuple):
    """Compresses one picture at any K."""

    codec: PictureCodec
    embedded: EmbeddedImage
    quality: Quality
    source: RecoverySource
    perceptual: Perceptual | None

    def __call__(self, num_kept: int | None) -> Compressed:
        """Compress, and measure what the target is about."""
        tokenizer = self.codec.tokenizer
        encoded, layout = encode_image(tokenizer, self.embedded, num_kept)
        has_map = self.source == "given" and tokenizer.has_maps
        source = require_source(encoded.layout, "a file") if has_map else None
        count, (grid_height, grid_width) = encoded.layout.num_kept, encoded.grid_shape
        maps = None if source is None else source.to("cpu")
        sizes = tokenizer.quantizer.spec.sizes
        model, stream = _shortest(encoded.parts.cpu(), sizes, maps, encoded.grid_shape)
        header = Header(
            identity=self.codec.id_bytes,
            map_model=model,
            precision=precision_name(tokenizer.computes_in()),
            width=layout.width,
            height=layout.height,
            tile_width=layout.tile_width,
            tile_height=layout.tile_height,
            tile_rows=len(layout.tops),
            tile_columns=len(layout.lefts),
            grid_height=grid_height,
            grid_width=grid_width,
            num_kept=count,
        )
        reached = None
        if self.quality.psnr is not None or self.quality.lpips is not None:
            image = decode_tiles(tokenizer, encoded.parts, source, encoded.grid_shape, layout)
            reached = self._measure(to_pil(image))
        return Compressed(write_file(header, stream), header, reached)

    def _measure(self, result: Image.Image) -> float:
        """PSNR or LPIPS between 8-bit pixels.

        Raises:
            ValueError: there is no LPIPS.
        """
        pair = to_tensor(self.embedded.picture)[None], to_tensor(result)[None]
        if self.quality.psnr is not None:
            return float(psnr(*pair))
        if self.perceptual is None:
            raise ValueError(
                f"lpips ({self.quality.lpips}) is measured with weights that are not there: name "
                "them, or take another target"
            )
        device = next(self.perceptual.parameters()).device
        with torch.no_grad():
            return float(self.perceptual(*(each.to(device) for each in pair)))

    @property
    def num_kepts(self) -> list[int]:
        """K that there are for a tile: those trained with, if the grid is the trained one."""
        config, shape = self.codec.tokenizer.config, self.embedded.parts[0].grid_shape
        low, high = config.kept_by.least_kept(shape), config.most_kept(shape)
        if config.kept_range is not None and math.prod(shape) == config.num_tokens:
            low, high = max(low, config.kept_range[0]), min(high, config.kept_range[1])
        every = range(low, high + 1)
        return [count for count in every if config.kept_by.nearest_kept(shape, count) == count]


def _fewest_that_reach(trial: _Trial, name: str, target: float) -> Compressed:
    """The file of the smallest K whose quality is as good as the target.

    Raises:
        ValueError: there is none.
    """
    sign = 1 if name == "psnr" else -1

    def reaches(found: Compressed) -> bool:
        return sign * (found.reached or 0.0) >= sign * target

    found, last = _first(trial, trial.num_kepts, reaches)
    if found is None:
        raise ValueError(
            f"{name} ({target:g}) cannot be reached: with all {last.header.num_kept} tokens it is "
            f"{last.reached:.4g}; ask for no better, or take another tokenizer"
        )
    return found


def _most_that_fit(trial: _Trial, target: float) -> Compressed:
    """The file of the largest K with at most so many bits per pixel.

    Raises:
        ValueError: there is none.
    """
    found, last = _first(trial, trial.num_kepts[::-1], lambda each: each.bits_per_pixel <= target)
    if found is None:
        raise ValueError(
            f"bits_per_pixel ({target:g}) is too few: with {last.header.num_kept} tokens, the "
            f"fewest there can be, it is {last.bits_per_pixel:.4g}; allow as many, or leave the "
            "source map out (source recovered)"
        )
    return found


def _first(
    trial: _Trial, num_kepts: list[int], is_met: Callable[[Compressed], bool]
) -> tuple[Compressed | None, Compressed]:
    """The first K in order that meets a condition, which all after it are taken to meet.

    Returns:
        Its file, None where the last K does not meet it; and the file of the last K.
    """
    last = trial(num_kepts[-1])
    if not is_met(last):
        return None, last
    best, low, high = last, 0, len(num_kepts) - 1
    while low < high:
        middle = (low + high) // 2
        found = trial(num_kepts[middle])
        if is_met(found):
            best, high = found, middle
        else:
            low = middle + 1
    return best, last


# --------------------------------------------------------------------------------------- bytes


def write_file(header: Header, stream: bytes) -> bytes:
    """A header and a stream as the content of a file."""
    model, precision = _MAP_MODELS.index(header.map_model), PRECISIONS.index(header.precision)
    body = MAGIC + bytes([VERSION]) + header.identity + bytes([model, precision])
    body += b"".join(map(_number_bytes, header.numbers)) + stream
    return body + zlib.crc32(body).to_bytes(_CHECKSUM_BYTES, "little")


def read_header(data: bytes) -> tuple[Header, bytes]:
    """Header and stream of the content of a file; the checksum is compared.

    Raises:
        ValueError: no such file, of another format, or damaged.
    """
    if not data.startswith(MAGIC):
        raise ValueError(
            f"it is no {ENDING} file: it begins with {data[: len(MAGIC)].hex() or 'nothing'} and "
            f"must begin with {MAGIC.hex()}; name one that `mergevq compress` wrote"
        )
    if len(data) < _LEAST_BYTES:
        raise ValueError(
            f"it has {len(data)} bytes, fewer than the {_LEAST_BYTES} of the shortest {ENDING} "
            "file: it was cut off; copy it again"
        )
    version = data[len(MAGIC)]
    if version != VERSION:
        raise ValueError(
            f"it has version {version} of the format, and this mergevq reads version {VERSION}; "
            "install the mergevq that wrote it, or a newer one"
        )
    body, checksum = data[:-_CHECKSUM_BYTES], data[-_CHECKSUM_BYTES:]
    found = zlib.crc32(body).to_bytes(_CHECKSUM_BYTES, "little")
    if found != checksum:
        raise ValueError(
            f"it is damaged or was cut off: its checksum is {checksum[::-1].hex()}, and that of "
            f"its bytes {found[::-1].hex()}; copy it again"
        )
    model, precision = body[_FIXED - 2 : _FIXED]
    if model >= len(_MAP_MODELS) or precision >= len(PRECISIONS):
        raise ValueError(
            f"it has source maps of kind {model} and precision {precision}, and must have at most "
            f"{len(_MAP_MODELS) - 1} and {len(PRECISIONS) - 1}; compress the picture again"
        )
    numbers, position = [], _FIXED
    for _ in range(9):
        number, position = _read_number(body, position)
        numbers.append(number)
    width, height, tile_width, tile_height, rows, columns, *grid, num_kept = numbers
    header = Header(
        identity=body[len(MAGIC) + 1 : _FIXED - 2],
        map_model=_MAP_MODELS[model],
        precision=PRECISIONS[precision],
        width=width,
        height=height,
        tile_width=tile_width,
        tile_height=tile_height,
        tile_rows=rows,
        tile_columns=columns,
        grid_height=grid[0],
        grid_width=grid[1],
        num_kept=num_kept,
    )
    return header, body[position:]


def _number_bytes(number: int) -> bytes:
    """A whole number, 7 bits a byte."""
    parts = []
    while number >= 128:
        parts.append(number % 128 + 128)
        number //= 128
    return bytes([*parts, number])


def _read_number(body: bytes, start: int) -> tuple[int, int]:
    """A positive number and the position after it.

    Raises:
        ValueError: there is none.
    """
    number = 0
    for place, byte in enumerate(body[start : start + _NUMBER_BYTES]):
        number += (byte & 127) << 7 * place
        if byte < 128 and number > 0:
            return number, start + place + 1
        if byte < 128:
            break
    raise ValueError(
        f"byte {start} must begin a number from 1 on of at most {_NUMBER_BYTES} bytes; compress "
        "the picture again"
    )


def _shortest(
    parts: Int64[Tensor, "t k p"],
    sizes: tuple[int, ...],
    source: Source | None,
    grid_shape: tuple[int, int],
) -> tuple[MapModel | None, bytes]:
    """Maps and tokens of all tiles as one stream, by the model of maps that makes it shorter."""
    models: tuple[MapModel | None, ...] = (None,)
    if source is not None:
        models = map_models(math.prod(grid_shape), source.num_kept)
    streams: list[tuple[MapModel | None, Writer]] = []
    for model in models:
        writer = Writer()
        if source is not None and model is not None:
            code_maps(writer, model, source.index, grid_shape, source.num_kept)
        streams.append((model, writer))
    # Tokens cost the same behind either, and most of the time.
    model, writer = min(streams, key=lambda stream: len(stream[1].to_bytes()))
    code_tokens(writer, parts, sizes, source, grid_shape)
    return model, writer.to_bytes()


# ------------------------------------------------------------------------------------- reading


def _checked(codec: PictureCodec, header: Header, num_bytes: int, max_pixels: int) -> Layout:
    """Where the tiles lie, after everything in the header was compared.

    Raises:
        ValueError: it is of another tokenizer, too large, or not what is ever written.
    """
    config, spec = codec.tokenizer.config, codec.tokenizer.quantizer.spec
    if header.identity != codec.id_bytes:
        raise ValueError(
            f"it was compressed by the tokenizer {header.identity.hex()}, and this one is "
            f"{codec.id_bytes.hex()}; name the model that compressed it"
        )
    if header.width * header.height > max_pixels:
        raise ValueError(
            f"its picture of {header.width:,} x {header.height:,} has "
            f"{header.width * header.height:,} pixels, more than max_pixels ({max_pixels:,}); "
            "raise it if the file is to be trusted"
        )
    tile, whole = (header.tile_height, header.tile_width), (header.height, header.width)
    if tile == whole and header.num_tiles == 1:
        layout = Layout(
            height=header.height,
            width=header.width,
            tile_height=header.height,
            tile_width=header.width,
            tops=(0,),
            lefts=(0,),
        )
    else:
        layout = tile_layout(header.height, header.width, config.image_size)
    expected = (
        *(layout.tile_height, layout.tile_width, len(layout.tops), len(layout.lefts)),
        *(layout.tile_height // config.patch_size, layout.tile_width // config.patch_size),
    )
    found = (*tile, header.tile_rows, header.tile_columns, *header.grid_shape)
    if found != expected or any(side % config.patch_size for side in tile):
        raise ValueError(
            "its tiles, in height and width, rows and columns, and cells "
            f"({', '.join(map(str, found))}), must be those that this tokenizer has for its "
            f"picture ({', '.join(map(str, expected))}); compress the picture again"
        )
    _require_small_tiles(codec.tokenizer, layout)
    num_cells = math.prod(header.grid_shape)
    config.kept_by.check_kept(header.grid_shape, header.num_kept)
    known = map_models(num_cells, header.num_kept) if codec.tokenizer.has_maps else ()
    if header.map_model not in {None, *known}:
        raise ValueError(
            f"its maps of {num_cells} cells and {header.num_kept} tokens are {header.map_model}, "
            "which this tokenizer never writes of so many; compress the picture again"
        )
    least = math.floor(header.num_tiles * header.num_kept * least_bits(spec.sizes) / 8)
    if num_bytes < least:
        raise ValueError(
            f"its {num_bytes:,} bytes are too few for {header.num_tiles:,} x {header.num_kept:,} "
            f"tokens, which take at least {least:,}; compress the picture again"
        )
    return layout


def _require_small_tiles(tokenizer: Tokenizer, layout: Layout) -> None:
    """Raise `ValueError` where a picture passed whole would take far more than a trained one."""
    pixels, trained = layout.tile_height * layout.tile_width, tokenizer.config.image_size**2
    if pixels > _MOST_TIMES * trained:
        raise ValueError(
            f"a tile of {pixels:,} pixels is more than {_MOST_TIMES} times the {trained:,} that "
            "the tokenizer was trained on; take size_policy tile"
        )


def _read_tokens(
    tokenizer: Tokenizer, header: Header, stream: bytes
) -> tuple[Int64[Tensor, "t k p"], Source | None]:
    """Tokens and maps of a stream, on the device of the tokenizer.

    Raises:
        ValueError: the stream is not one of such tokens.
    """
    spec, device = tokenizer.quantizer.spec, next(tokenizer.parameters()).device
    reader, source = Reader(stream), None
    if header.map_model is not None:
        empty = torch.zeros(header.num_tiles, math.prod(header.grid_shape), dtype=torch.int64)
        index = code_maps(reader, header.map_model, empty, header.grid_shape, header.num_kept)
        source = Source(index, header.num_kept)
    blank = torch.zeros(header.num_tiles, header.num_kept, len(spec.sizes), dtype=torch.int64)
    parts = code_tokens(reader, blank, spec.sizes, source, header.grid_shape)
    reader.require_end()
    return parts.to(device), None if source is None else source.to(device)
