"""Format of images as files of tokens: `tokens.json`, and shards.

A folder of tokens is `tokens.json`, which says what they are, and for each K its shards, such as
`k00144/tokens-00000.safetensors`. A shard holds a fixed number of images in the order of the data,
one row for each or, where mirror images are kept too, two. It is renamed into place when it is
complete and contains nothing that depends on who wrote it or when, so encoding may be stopped,
shared out among processes and repeated, and gives the same bytes. In the end `tokens.json` is
sealed with the hash of every shard, and each is compared with it before it is first read.

A token of at most 63 bits is one number of the tensor `indices` (N, K), any other one for each of
its parts in the tensor `parts` (N, K, P).

Shape letters: B rows of a batch, N rows of a shard, L grid tokens, K kept tokens, P parts of a
token.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Int64
from numpy.typing import NDArray
from torch import Tensor

from mergevq.config.base import FORMAT_VERSION, MAX_PIXELS, Precision
from mergevq.config.identity import Identity
from mergevq.config.parts import LayoutKind, bits_of
from mergevq.data.codes import has_index, join, split
from mergevq.runtime.files import (
    open_tensors,
    parse_json,
    read_json,
    require_entries,
    sha256_of,
    write_json,
)
from mergevq.runtime.migrate import migrate_tokens
from mergevq.runtime.settings import from_json, to_json

RECORD = "tokens.json"
TokensName = Literal["indices", "parts"]
"""Tensor of a shard that has the tokens."""

CONTENT = "content"
"""Tensor of a shard: the bytes of the digest of its images."""
_INTEGERS = (torch.uint8, torch.uint16, torch.uint32, torch.int32, torch.int64)
AGAIN = "run the same `mergevq encode` again, it goes on where it stopped"


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenRecord:
    """Description of the tokens of a folder and of what they were made from."""

    tokenizer: str
    """Hash of the tokenizer (`runtime.artefacts.tokens_hash`)."""
    num_kept: tuple[int, ...]
    """Each K that every image was encoded with, smallest first."""
    sizes: tuple[int, ...]
    """Values of each part of a token; an index has part 0 as its lowest digit."""
    grid_shape: tuple[int, int]
    """Rows and columns of the grid."""
    data: str
    """Where the images came from."""
    images: str
    """SHA-256 over the names and labels of the images, in order."""
    num_images: int
    """Images of the data, counting those that cannot be read."""
    class_names: tuple[str, ...]
    """One name per class, in label order; empty when the data are unlabelled."""
    crop: Literal["center"] = "center"
    """Which square of an image was encoded, after its short side was resized."""
    labels: str = ""
    """SHA-256 over the labels of the images, in order; empty where it was not kept."""
    stamp: str = ""
    """Changes when a file of the images is touched (`ImageDataset.stamp`); empty if not kept."""
    flip: bool = False
    """Whether the row of an image is followed by the row of its mirror image."""
    max_pixels: int = MAX_PIXELS
    """Largest picture that was read, as width times height."""
    precision: Precision = "float32"
    """Precision of the encoder, by name and never `auto`; older records say nothing, and are of
    float32."""
    layout: LayoutKind = "source"
    """Layout of the tokens; only `source` has a map."""
    num_holistic: int = 0
    """Tokens of the whole image, before those of the cells."""
    shard_size: int = 1024
    """Images of a shard; the last may have fewer."""

    def __post_init__(self) -> None:
        """Reject what cannot be numbered."""
        for name in ("num_images", "shard_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} ({getattr(self, name)}) must be at least 1")
        if not self.num_kept or list(self.num_kept) != sorted(set(self.num_kept)):
            raise ValueError(f"num_kept {self.num_kept} must be different numbers in order")
        if min(self.grid_shape) < 1:
            raise ValueError(f"grid_shape {self.grid_shape} must have at least one cell")
        if self.num_holistic < 0 or (self.num_holistic > 0 and self.layout != "holistic"):
            raise ValueError(
                f"num_holistic ({self.num_holistic}) must be 0 with layout {self.layout!r}"
            )
        most = self.num_holistic + self.num_tokens
        if self.num_kept[0] < 1 or (self.num_kept[-1] > most and self.layout != "scales"):
            raise ValueError(
                f"num_kept {self.num_kept} must be between 1 and the {self.num_tokens} cells"
                + f" and {self.num_holistic} tokens before them" * (self.num_holistic > 0)
            )
        if not self.sizes or min(self.sizes) < 2 or max(self.sizes) > 2**63:
            raise ValueError(f"sizes {self.sizes} must be of 2 to 2**63 values each")

    @property
    def num_values(self) -> int:
        """Tokens that exist."""
        return math.prod(self.sizes)

    @property
    def bits(self) -> float:
        """Bits of a token."""
        return bits_of(self.sizes)

    @property
    def has_index(self) -> bool:
        """Whether a shard has a token as one number."""
        return has_index(self.sizes)

    @property
    def tokens_name(self) -> TokensName:
        """Tensor of a shard that has the tokens."""
        return "indices" if self.has_index else "parts"

    def tokens_shape(self, num_kept: int) -> tuple[int, ...]:
        """Shape of a row of that tensor."""
        return (num_kept,) if self.has_index else (num_kept, len(self.sizes))

    def shard_tokens(
        self, parts: Int64[Tensor, "n k p"]
    ) -> Int64[Tensor, "n k"] | Int64[Tensor, "n k p"]:
        """Tokens as a shard has them."""
        return join(parts, self.sizes) if self.has_index else parts

    def parts_of(
        self, tokens: Int64[Tensor, "n k"] | Int64[Tensor, "n k p"]
    ) -> Int64[Tensor, "n k p"]:
        """Parts of the tokens of a shard."""
        return split(tokens, self.sizes) if self.has_index else tokens

    @property
    def identity(self) -> Identity:
        """Images that the tokens were made from."""
        return Identity(
            class_names=self.class_names,
            labels=self.labels,
            images=self.images,
            num_images=self.num_images,
            tokenizer=self.tokenizer,
        )

    @property
    def num_tokens(self) -> int:
        """L: cells of the grid."""
        return self.grid_shape[0] * self.grid_shape[1]

    @property
    def num_mapped(self) -> int:
        """Cells of a row's source map: all, or 0 where tokens have none."""
        return self.num_tokens if self.layout == "source" else 0

    @property
    def num_classes(self) -> int:
        """How many classes there are; 0 when the data are unlabelled."""
        return len(self.class_names)

    @property
    def num_shards(self) -> int:
        """Shards for each K."""
        return -(-self.num_images // self.shard_size)

    def images_of(self, number: int) -> range:
        """Where in the data the images of a shard are."""
        first = number * self.shard_size
        return range(first, min(first + self.shard_size, self.num_images))


def require_tokenizer(record: TokenRecord, tokenizer: str) -> None:
    """Check that tokens are those of a tokenizer.

    Args:
        record: what the tokens are.
        tokenizer: hash of the tokenizer (`runtime.artefacts.tokens_hash`).

    Raises:
        ValueError: they are another's.
    """
    if record.tokenizer != tokenizer:
        raise ValueError(
            f"the tokens are of tokenizer {record.tokenizer} and must be of {tokenizer}: a number "
            "means another thing to each; encode the images again"
        )


class Shard(NamedTuple):
    """Entry of a shard in `tokens.json`."""

    num_rows: int
    sha256: str


# ------------------------------------------------------------------------------------------ shards


class TokenRows(NamedTuple):
    """Rows of a shard, in the order of the data."""

    parts: Int64[Tensor, "n k p"]
    """Parts of the tokens, in the order of the layout."""
    source: Int64[Tensor, "n l"]
    """Kept token of each cell, in [0, K); of ordered tokens there are no cells."""
    label: Int64[Tensor, "n"]
    """Class, -1 for none."""
    position: Int64[Tensor, "n"]
    """Where in the data the image is."""
    mirrored: Int64[Tensor, "n"]
    """1 for a mirror image, 0 for the image itself."""


class MappedShard(NamedTuple):
    """A shard's content; memory is filled from the file as it is touched."""

    arrays: dict[str, NDArray[Any]]
    broken: list[str]
    content: str
    """Digest of its images in hexadecimal; empty if not kept."""


def shard_path(directory: Path, num_kept: int, number: int) -> Path:
    """Where a shard is."""
    return directory / f"k{num_kept:05d}" / f"tokens-{number:05d}.safetensors"


def map_shard(path: Path) -> MappedShard:
    """Map a shard into memory.

    Raises:
        RuntimeError: it is damaged.
    """
    try:
        with open_tensors(path) as file:
            # Through torch, which maps the file; the numpy side of the library copies it.
            there = file.keys()
            tokens = "parts" if "parts" in there else "indices"
            names = (tokens, *TokenRows._fields[1:])
            tensors = {name: file.get_tensor(name) for name in names}
            content = file.get_tensor(CONTENT) if CONTENT in there else None
            broken = parse_json((file.metadata() or {}).get("broken", "null"), where="broken")
    except ValueError as error:
        raise RuntimeError(f"{path} is damaged ({error}); delete it and {AGAIN}") from error
    if not all(tensor.dtype in _INTEGERS for tensor in tensors.values()) or not _are_names(broken):
        raise RuntimeError(
            f"{path} is damaged (it must hold whole numbers and a list of names); delete it and "
            f"{AGAIN}"
        )
    digest = "" if content is None else content.numpy().tobytes().hex()
    return MappedShard({name: tensor.numpy() for name, tensor in tensors.items()}, broken, digest)


def _are_names(value: object) -> bool:
    """Whether JSON is a list of texts."""
    return isinstance(value, list) and all(isinstance(item, str) for item in value)


def check_rows(
    path: Path,
    arrays: Mapping[str, NDArray[Any]],
    record: TokenRecord,
    num_kept: int,
    num_rows: int | None = None,
) -> None:
    """Check that a shard's numbers are what its record says they are.

    Args:
        path: of the shard.
        arrays: what it holds.
        record: what the tokens are.
        num_kept: its K.
        num_rows: rows it must have; None where nothing says how many.

    Raises:
        RuntimeError: another shape, or a number outside its range.
    """
    num_rows = len(arrays["label"].reshape(-1)) if num_rows is None else num_rows
    tokens, width = record.tokens_name, record.tokens_shape(num_kept)
    if tokens not in arrays:
        raise RuntimeError(
            f"{path} is damaged: it must have tokens of {record.bits:.5g} bits as {tokens}; delete "
            f"it and {AGAIN}"
        )
    widths = {tokens: width, "source": (record.num_mapped,)}
    ranges = {
        "indices": (0, record.num_values - 1),
        "source": (0, num_kept - 1),
        "label": (-1, max(record.num_classes - 1, -1)),
        "position": (0, record.num_images - 1),
        "mirrored": (0, 1),
    }
    for name, values in arrays.items():
        shape = (num_rows, *widths.get(name, ()))
        if values.shape != shape:
            raise RuntimeError(
                f"{path} is damaged: {name} has the shape {values.shape} and must have {shape}; "
                f"delete it and {AGAIN}"
            )
        if name == "parts":
            for part, size in enumerate(record.sizes):
                _check_range(path, f"part {part}", values[..., part], 0, size - 1)
        else:
            _check_range(path, name, values, *ranges[name])


def _check_range(path: Path, name: str, values: NDArray[Any], low: int, high: int) -> None:
    """Raise `RuntimeError` where a number of a shard is outside its range."""
    if values.size and not (low <= int(values.min()) and int(values.max()) <= high):
        raise RuntimeError(
            f"{path} is damaged: {name} ({values.min()} to {values.max()}) must be between "
            f"{low} and {high}; delete it and {AGAIN}"
        )


def check_seal(path: Path, shard: Shard) -> None:
    """Compare a shard with what was written.

    Raises:
        RuntimeError: it is missing, damaged or another's.
    """
    if not path.is_file():
        raise RuntimeError(f"{path} is missing; {AGAIN}")
    if sha256_of(path) != shard.sha256:
        raise RuntimeError(
            f"{path} is damaged or replaced: it is not the file that {RECORD} was written for; "
            f"delete it and {AGAIN}"
        )


# ------------------------------------------------------------------------------------- tokens.json


def read_state(directory: Path) -> dict[str, Any]:
    """Content of `tokens.json`.

    Raises:
        ValueError: there is none, or it lacks something.
    """
    if not (directory / RECORD).is_file():
        raise ValueError(
            f"{directory} holds no tokens: there is no {RECORD}; `mergevq encode` writes them"
        )
    state = read_json(directory / RECORD)
    require_entries(state, {"record": dict, "environments": list}, where=directory / RECORD)
    complete = state.get("shards") is not None
    needed = {"shards": dict, "broken": list} if complete else {}
    require_entries(state, needed, where=directory / RECORD)
    return {"shards": None, "broken": None} | state


def record_of(directory: Path, state: Mapping[str, Any]) -> TokenRecord:
    """Record of the tokens."""
    record = migrate_tokens(state["record"])
    return from_json(TokenRecord, record, where=str(directory / RECORD))


def broken_names(state: Mapping[str, Any]) -> tuple[str, ...]:
    """Names of the images of a complete folder that could not be read."""
    return tuple(map(str, state["broken"]))


def sealed_shards(
    directory: Path, record: TokenRecord, state: Mapping[str, Any]
) -> dict[int, list[Shard]]:
    """Entries of a complete folder's shards, by K.

    Raises:
        ValueError: it does not say it of every shard.
    """
    sealed: dict[int, list[Shard]] = {}
    for num_kept in record.num_kept:
        shards = state["shards"].get(str(num_kept))
        if not isinstance(shards, list) or len(shards) != record.num_shards:
            raise ValueError(
                f"{directory / RECORD} is damaged: it must list {record.num_shards} shards of "
                f"{num_kept} tokens; encode the images again"
            )
        for shard in shards:
            entry = shard if isinstance(shard, dict) else {}
            require_entries(entry, {"num_rows": int, "sha256": str}, where=directory / RECORD)
        sealed[num_kept] = [Shard(shard["num_rows"], shard["sha256"]) for shard in shards]
        counts = [shard.num_rows for shard in sealed[num_kept]]
        if min(counts) < 0 or counts != [shard.num_rows for shard in sealed[record.num_kept[0]]]:
            raise ValueError(
                f"{directory / RECORD} is damaged: shards of {num_kept} tokens have {counts} rows, "
                "and all K must have the same, at least 0"
            )
    return sealed


def write_state(
    directory: Path,
    record: TokenRecord,
    *,
    environments: Sequence[Any],
    shards: Mapping[int, Sequence[Shard]] | None = None,
    broken: Sequence[str] | None = None,
) -> None:
    """Write `tokens.json`; it has no shards until all are written."""
    entries = None
    if shards is not None:
        entries = {str(k): [shard._asdict() for shard in group] for k, group in shards.items()}
    state = {
        "format_version": FORMAT_VERSION,
        "kind": "tokens",
        "record": to_json(record),
        "environments": list(environments),
        "broken": broken,
        "shards": entries,
    }
    write_json(directory / RECORD, state)
