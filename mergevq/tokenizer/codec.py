"""Pictures of any mode and size to tokens and back, with what they cost and what they lose.

Shape letters: T tiles, H and W pixels of the picture, h and w of a tile, K kept tokens.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Float, Int64
from PIL import Image
from torch import Tensor

from mergevq.config.base import RecoverySource, SizePolicy, check_choice
from mergevq.config.parts import require_no_condition
from mergevq.config.tokenizer import TokenizerConfig
from mergevq.data.layouts import Bits, Ordered, Source, joined
from mergevq.data.prepare import to_rgb, to_tensor
from mergevq.metrics.image import psnr
from mergevq.report.pictures import contact_sheet, merge_map, to_pil
from mergevq.tokenizer.encoder import Embedded
from mergevq.tokenizer.flows.decoder import Noise
from mergevq.tokenizer.seams import Encoded
from mergevq.tokenizer.tokenizer import Tokenizer

_WIDEST = 4
"""Most times the trained pixels that resizing gives: its short side keeps a patch, however long
the other is."""
_OVERLAP = 1 / 4
"""Least share of a tile's side that it has in common with the next."""
_TILES_AT_ONCE = 16


@dataclass(frozen=True, kw_only=True, slots=True)
class Layout:
    """Where the tiles of a picture lie; one as large as the picture when it was not cut."""

    height: int
    """Height of the picture in pixels."""
    width: int
    tile_height: int
    """Height of a tile in pixels; above `height` where a small picture was padded."""
    tile_width: int
    tops: tuple[int, ...]
    """First row of each row of tiles, ascending."""
    lefts: tuple[int, ...]
    """First column of each column of tiles, ascending."""

    @property
    def corners(self) -> list[tuple[int, int]]:
        """(top, left) of every tile in raster order."""
        return [(top, left) for top in self.tops for left in self.lefts]


class EmbeddedImage(NamedTuple):
    """A picture after the tokenizer's stem, for `encode_image` at several K."""

    picture: Image.Image
    """As the tokenizer sees it: RGB, and resized if the policy said so."""
    given_size: tuple[int, int]
    """Width and height before."""
    layout: Layout
    """Tiles of the picture."""
    parts: list[Embedded]
    """A few tiles each, in raster order."""


class EncodedImage(NamedTuple):
    """A picture as tokens: everything `decode_image` needs."""

    encoded: Encoded
    """Tokens of all tiles in raster order, one per batch item."""
    layout: Layout
    """Where they belong."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ImageReconstruction:
    """A picture beside what came back of it."""

    original: Image.Image
    """As the tokenizer saw it: RGB, and resized if the policy said so."""
    merge_map: Image.Image | None
    """Each group of merged cells in its mean colour, enlarged by a whole factor; None of ordered
    tokens, which are of no cell."""
    given: Image.Image
    """Decoded with the encoder's own source map."""
    recovered: Image.Image | None
    """Decoded with the source map inferred from the tokens alone; None where none is needed."""
    psnr_given: float
    """PSNR of `given`, in dB, between 8-bit pixels."""
    psnr_recovered: float | None
    """PSNR of `recovered`, likewise."""
    num_kept: int
    """K, of each tile."""
    num_cells: int
    """Most tokens that a tile can have: its cells, or those of all scales."""
    num_tiles: int
    """1 unless the picture was cut."""
    bits: Bits
    """Bits of the whole picture; NaN where tokens are real numbers."""
    given_size: tuple[int, int]
    """Width and height of the picture that was given, upright, before any resizing."""
    encoded: Encoded
    """Its tokens, of all tiles."""

    @property
    def is_resized(self) -> bool:
        """Whether the tokenizer saw another size than was given: all numbers are of that one."""
        return self.original.size != self.given_size

    @property
    def cost(self) -> str:
        """Bits of the whole picture in words, or real numbers."""
        bits = self.bits
        if math.isnan(bits.total):
            return f"{self.encoded.codes.numel()} real numbers"
        return f"{bits.total:.0f} bits ({bits.tokens:.0f} tokens + {bits.source:.0f} source)"

    @property
    def price(self) -> str:
        """Bits per pixel in words, or real numbers, with both sizes where they differ."""
        (seen_width, seen_height), (width, height) = self.original.size, self.given_size
        count, unit = self.bits.total, "bits"
        if math.isnan(count):
            count, unit = self.encoded.codes.numel(), "real numbers"
        text = f"{count / (seen_width * seen_height):.3f} {unit} per pixel"
        if not self.is_resized:
            return text
        share = count / (width * height)
        return (
            f"{text} of the {seen_width} x {seen_height} it was resized to ({share:.3g} of the "
            f"{width} x {height} given)"
        )

    @property
    def num_tokens(self) -> int:
        """Tokens of the whole picture."""
        return self.num_kept * self.num_tiles

    @property
    def bits_per_pixel(self) -> float:
        """Tokens and source map, over the pixels of `original`."""
        return self.bits.total / (self.original.width * self.original.height)


# ----------------------------------------------------------------------------------- pictures


def embed_image(
    tokenizer: Tokenizer, image: Image.Image, *, size_policy: SizePolicy = "error"
) -> EmbeddedImage:
    """Run the tokenizer's stem on a picture, which takes most of the time of encoding it.

    Args:
        tokenizer: on any device, in any floating-point type.
        image: of any mode.
        size_policy: see `SizePolicy`.

    Raises:
        ValueError: the size is not legal.
    """
    require_no_condition(tokenizer.config.condition, "a picture by itself")
    picture = _fit(image, tokenizer.config, size_policy)
    layout = _layout(picture, tokenizer.config, size_policy)
    if size_policy == "error":
        tokenizer.grid_shape(torch.empty(1, 3, picture.height, picture.width, device="meta"))
    weight = next(tokenizer.parameters())
    tiles = cut(to_tensor(picture), layout).to(weight.device, weight.dtype)
    with torch.no_grad():
        parts = [tokenizer.embed(part) for part in tiles.split(_TILES_AT_ONCE)]
    return EmbeddedImage(picture, to_rgb(image).size, layout, parts)


def encode_image(
    tokenizer: Tokenizer,
    image: Image.Image | EmbeddedImage,
    num_kept: int | None = None,
    *,
    size_policy: SizePolicy = "error",
) -> EncodedImage:
    """Turn a picture into tokens.

    Args:
        tokenizer: on any device, in any floating-point type.
        image: of any mode; or what `embed_image` gave, whose size policy then counts.
        num_kept: K, of each tile if the picture is cut; None is the nominal K.
        size_policy: see `SizePolicy`.

    Raises:
        ValueError: the size or K is not legal.
    """
    if not isinstance(image, EmbeddedImage):
        image = embed_image(tokenizer, image, size_policy=size_policy)
    return EncodedImage(_encode(tokenizer, image.parts, num_kept), image.layout)


def decode_image(
    tokenizer: Tokenizer,
    image: EncodedImage,
    *,
    source: RecoverySource = "given",
) -> Image.Image:
    """Turn tokens back into a picture of the size that was encoded.

    Args:
        tokenizer: the one that encoded.
        image: from `encode_image`.
        source: the source map that was stored, or the one inferred from the tokens.
    """
    check_choice("source", source, RecoverySource)
    return to_pil(_decode(tokenizer, image, source))


@torch.no_grad()
def decode_tiles(
    tokenizer: Tokenizer,
    tokens: Float[Tensor, "T K D"] | Int64[Tensor, "T K P"] | Int64[Tensor, "T K"],
    source: Source | Ordered | None,
    grid_shape: tuple[int, int],
    layout: Layout,
) -> Float[Tensor, "3 H W"]:
    """Decode all tiles of a picture, a few at a time, and blend them, in float32 on the CPU.

    Args:
        tokenizer: the one that encoded.
        tokens: of all tiles in raster order, as codes, parts or indices.
        source: their source maps, or their order; None infers it from the tokens.
        grid_shape: (height, width) of a tile in cells.
        layout: places of the tiles.
    """
    images = []
    for tile in range(0, len(tokens), _TILES_AT_ONCE):
        rows = slice(tile, tile + _TILES_AT_ONCE)
        some = tokens[rows]
        used = tokenizer.recover(some, grid_shape) if source is None else source.rows(rows)
        noise = Noise(0, range(tile, tile + len(some)))
        images.append(tokenizer.decode(some, used, grid_shape, noise).float().cpu())
    return blend(torch.cat(images), layout)


def reconstruct_image(
    tokenizer: Tokenizer,
    image: Image.Image | EmbeddedImage,
    num_kept: int | None = None,
    *,
    size_policy: SizePolicy = "error",
) -> ImageReconstruction:
    """Encode and decode a picture, with the given and with the recovered source map.

    The arguments and errors are those of `encode_image`.
    """
    if not isinstance(image, EmbeddedImage):
        image = embed_image(tokenizer, image, size_policy=size_policy)
    encoded_image = encode_image(tokenizer, image, num_kept)
    encoded, layout = encoded_image
    picture = image.picture
    original = to_tensor(picture)
    given, recovered = _decode(tokenizer, encoded_image, "given"), None
    if tokenizer.has_maps:
        recovered = _decode(tokenizer, encoded_image, "recovered")
    num_tiles, kept = len(layout.corners), encoded.layout.num_kept
    tile_bits = tokenizer.bits(kept, encoded.grid_shape)
    return ImageReconstruction(
        original=picture,
        merge_map=_merge_map(original, encoded, layout),
        given=to_pil(given),
        recovered=None if recovered is None else to_pil(recovered),
        psnr_given=float(psnr(original[None], given[None])),
        psnr_recovered=None if recovered is None else float(psnr(original[None], recovered[None])),
        num_kept=kept,
        num_cells=tokenizer.config.most_kept(encoded.grid_shape),
        num_tiles=num_tiles,
        bits=Bits(num_tiles * tile_bits.tokens, num_tiles * tile_bits.source),
        given_size=image.given_size,
        encoded=encoded,
    )


def full_pictures(results: Sequence[ImageReconstruction]) -> dict[str, Image.Image]:
    """Reconstructions of one picture as pictures of the size that was given, by file name.

    Merge maps have the size they were drawn in.
    """
    pictures: dict[str, Image.Image] = {}
    for result in results:
        if result.merge_map is not None:
            pictures[f"merge_map_{result.num_kept}.png"] = result.merge_map
        for name, picture in (("given", result.given), ("recovered", result.recovered)):
            if picture is None:
                continue
            resized = picture
            if result.is_resized:
                resized = picture.resize(result.given_size, Image.Resampling.BICUBIC)
            pictures[f"{name}_{result.num_kept}.png"] = resized
    return pictures


def reconstruction_figure(reconstructions: Sequence[ImageReconstruction]) -> Image.Image:
    """Reconstructions of one picture, a row each: original, merge map, given, recovered source."""
    rows, captions, titles = [], [], []
    for result in reconstructions:
        tiles = f"{result.num_tiles} tiles x " if result.num_tiles > 1 else ""
        kept = f"{tiles}{result.num_kept} of {result.num_cells} tokens"
        price = f"{kept}\n{result.cost}"
        if not math.isnan(result.bits.total):
            price = (
                f"{kept}\n{result.bits.total:.0f} bits, {result.bits_per_pixel:.3f} per pixel\n"
                f"({result.bits.tokens:.0f} tokens + {result.bits.source:.0f} source)"
            )
        columns = [
            ("Original", result.original, _size_in_words(result)),
            ("Merge map", result.merge_map, price),
            ("Given source", result.given, f"PSNR {result.psnr_given:.2f} dB"),
            ("Recovered source", result.recovered, f"PSNR {result.psnr_recovered:.2f} dB")
            if result.psnr_recovered is not None
            else ("", None, ""),
        ]
        shown = [(title, picture, text) for title, picture, text in columns if picture is not None]
        if result.merge_map is None:
            # The price has no picture of its own.
            shown[1] = ("Decoded", result.given, f"{price}\n{columns[2][2]}")
        titles = [title for title, _, _ in shown]
        rows.append([picture for _, picture, _ in shown])
        captions.append([text for _, _, text in shown])
    return contact_sheet(rows, titles, captions=captions)


def _size_in_words(result: ImageReconstruction) -> str:
    """Size of what the tokenizer saw, and of what was given if that is another."""
    text = f"{result.original.width} x {result.original.height} pixels"
    if result.is_resized:
        text += f"\nresized from {result.given_size[0]} x {result.given_size[1]}"
    return text


# -------------------------------------------------------------------------------------- tiles


def tile_layout(height: int, width: int, tile_side: int) -> Layout:
    """Cover a picture with square tiles, evenly spaced, overlapping by a quarter or more."""
    return Layout(
        height=height,
        width=width,
        tile_height=tile_side,
        tile_width=tile_side,
        tops=_starts(height, tile_side),
        lefts=_starts(width, tile_side),
    )


def cut(image: Float[Tensor, "3 H W"], layout: Layout) -> Float[Tensor, "T 3 h w"]:
    """The tiles of a picture in raster order; where it is too small its edge is repeated."""
    right = max(0, layout.tile_width - layout.width)
    bottom = max(0, layout.tile_height - layout.height)
    padded = torch.nn.functional.pad(image[None], (0, right, 0, bottom), mode="replicate")[0]
    return torch.stack(
        [
            padded[:, top : top + layout.tile_height, left : left + layout.tile_width]
            for top, left in layout.corners
        ]
    )


def blend(tiles: Float[Tensor, "T 3 h w"], layout: Layout) -> Float[Tensor, "3 H W"]:
    """Lay tiles over each other, each fading out towards its edges; undoes `cut`."""
    height, width = max(layout.height, layout.tile_height), max(layout.width, layout.tile_width)
    total = tiles.new_zeros(3, height, width)
    weight = tiles.new_zeros(height, width)
    window = _fade(layout.tile_height, tiles)[:, None] * _fade(layout.tile_width, tiles)
    for tile, (top, left) in zip(tiles, layout.corners, strict=True):
        area = slice(top, top + layout.tile_height), slice(left, left + layout.tile_width)
        total[:, *area] += window * tile
        weight[area] += window
    return (total / weight)[:, : layout.height, : layout.width]


def _fade(length: int, like: Tensor) -> Float[Tensor, " length"]:
    """A smooth hill over a tile: near 0 at both ends, never 0, so a lone tile counts in full."""
    positions = torch.arange(length, dtype=like.dtype, device=like.device)
    return ((positions + 0.5) * (math.pi / length)).sin().square()


def _starts(length: int, tile_side: int) -> tuple[int, ...]:
    """First pixel of each tile along one direction."""
    room = max(0, length - tile_side)
    num_steps = math.ceil(room / (tile_side - math.ceil(_OVERLAP * tile_side)))
    return tuple(round(step * room / max(1, num_steps)) for step in range(num_steps + 1))


# -------------------------------------------------------------------------------------- inside


def _fit(image: Image.Image, config: TokenizerConfig, size_policy: SizePolicy) -> Image.Image:
    """RGB, and resized if that is the policy.

    Raises:
        ValueError: no picture, or one that is far too long to be resized.
    """
    check_choice("size_policy", size_policy, SizePolicy)
    if not isinstance(image, Image.Image):
        raise ValueError(
            f"image is {type(image).__name__} and must be a PIL image; for a file use "
            "load_picture, for an array PIL.Image.fromarray"
        )
    picture = to_rgb(image)
    if size_policy != "resize":
        return picture
    scale = config.image_size / math.sqrt(picture.width * picture.height)
    patch = config.patch_size
    width, height = (max(patch, round(side * scale / patch) * patch) for side in picture.size)
    if (width, height) == picture.size:
        return picture
    if width * height > _WIDEST * config.image_size**2:
        raise ValueError(
            f"picture of {picture.width} x {picture.height} is too long to be resized: "
            f"{width} x {height} would be {width * height:,} pixels, and the tokenizer was trained "
            f"on {config.image_size**2:,}; cut it, or take size_policy 'tile'"
        )
    return picture.resize((width, height), Image.Resampling.BICUBIC)


def _layout(picture: Image.Image, config: TokenizerConfig, size_policy: SizePolicy) -> Layout:
    """Tiles of the trained size, or one tile that is the picture."""
    if size_policy == "tile":
        return tile_layout(picture.height, picture.width, config.image_size)
    return Layout(
        height=picture.height,
        width=picture.width,
        tile_height=picture.height,
        tile_width=picture.width,
        tops=(0,),
        lefts=(0,),
    )


@torch.no_grad()
def _encode(tokenizer: Tokenizer, tiles: Sequence[Embedded], num_kept: int | None) -> Encoded:
    """Encode all tiles, a few at a time."""
    some = [tokenizer.encode(part, num_kept) for part in tiles]
    return Encoded(
        codes=torch.cat([each.codes for each in some]),
        parts=torch.cat([each.parts for each in some]),
        layout=joined([each.layout for each in some]),
        grid_shape=some[0].grid_shape,
        class_token=torch.cat([each.class_token for each in some]),
        latents=torch.cat([each.latents for each in some]),
        sizes=some[0].sizes,
    )


def _decode(
    tokenizer: Tokenizer, image: EncodedImage, source: RecoverySource
) -> Float[Tensor, "3 H W"]:
    """Decode all tiles and blend them, in float32 on the CPU."""
    encoded = image.encoded
    used = encoded.layout if source == "given" else None
    tokens = encoded.parts if encoded.sizes else encoded.codes
    return decode_tiles(tokenizer, tokens, used, encoded.grid_shape, image.layout)


def _merge_map(
    original: Float[Tensor, "3 H W"], encoded: Encoded, layout: Layout
) -> Image.Image | None:
    """Merge maps of all tiles as one picture, cut in the middle of every overlap."""
    source = encoded.layout
    if not isinstance(source, Source):
        return None
    maps = [
        merge_map(tile, index, encoded.grid_shape)
        for tile, index in zip(cut(original, layout), source.index.cpu(), strict=True)
    ]
    scale = maps[0].width // layout.tile_width
    picture = Image.new("RGB", (scale * layout.width, scale * layout.height))
    for tile_map, (top, left) in zip(maps, layout.corners, strict=True):
        # Pasted in raster order, a later tile covers an earlier one from half of their overlap on.
        skip_top = _half_overlap(layout.tops, top, layout.tile_height)
        skip_left = _half_overlap(layout.lefts, left, layout.tile_width)
        box = (scale * skip_left, scale * skip_top, *tile_map.size)
        picture.paste(tile_map.crop(box), (scale * (left + skip_left), scale * (top + skip_top)))
    return picture


def _half_overlap(starts: tuple[int, ...], start: int, length: int) -> int:
    """Half of the pixels a tile shares with the one before it."""
    position = starts.index(start)
    return 0 if position == 0 else (starts[position - 1] + length - start) // 2
