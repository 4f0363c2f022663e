"""Find the files of a data set: everything that a path, a list or a pattern names.

Files are found by name and never opened. Whatever looks like a picture and is not used is counted,
and splits of a data set (train, validation, test) are never joined unless each is named.
"""

import os
import re
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from glob import glob
from pathlib import Path
from typing import NamedTuple

from mergevq.data.prepare import ENDINGS
from mergevq.runtime.files import require_regular

DATA_ENDINGS = frozenset({*ENDINGS, ".parquet", ".tar"})

# Pictures in formats that are not read.
_FOREIGN_ENDINGS = frozenset(
    {".arw", ".avif", ".cr2", ".cr3", ".dds", ".dng", ".eps", ".exr", ".hdr", ".heic", ".heif"}
    | {".hif", ".ico", ".jxl", ".jxr", ".nef", ".orf", ".pcx", ".psd", ".raf", ".rw2", ".sgi"}
    | {".svg", ".tga"}
)
_COMPRESSED_SHARDS = (".tar.bz2", ".tar.gz", ".tar.xz", ".tar.zst", ".tgz")
# Folders of systems: thumbnails, halves of files, waste.
_SYSTEM_FOLDERS = frozenset({"#recycle", "$RECYCLE.BIN", "@eaDir", "__MACOSX", "lost+found"})
_SPLITS = {
    "train": "train",
    "training": "train",
    "dev": "validation",
    "val": "validation",
    "valid": "validation",
    "validation": "validation",
    "eval": "test",
    "evaluation": "test",
    "test": "test",
    "testing": "test",
}


class Listing(NamedTuple):
    """Files of one kind."""

    root: str
    """Deepest folder that holds all of them, absolute."""
    names: list[str]
    """Path of each below `root`, with `/`, in order."""
    kind: str
    """`images`, `.parquet` or `.tar`."""
    unused: "Unused"
    """Files that look like pictures and are not among them."""

    def paths(self) -> list[str]:
        """Absolute path of each file."""
        return [os.path.join(self.root, name) for name in self.names]


@dataclass(slots=True)
class Unused:
    """Things that look like pictures and are not used, counted by reason."""

    found: dict[str, tuple[int, str]] = field(default_factory=dict)
    """How many there are and the name of the first, by reason."""

    def __len__(self) -> int:
        return sum(count for count, _ in self.found.values())

    def add(self, reason: str, name: str) -> None:
        """Count one."""
        count, first = self.found.get(reason, (0, name))
        self.found[reason] = (count + 1, first)

    def lines(self) -> list[str]:
        """One sentence for each reason."""
        return [
            f"{count} not used, the first is {first!r}: {reason}"
            for reason, (count, first) in self.found.items()
        ]


def list_files(path: str) -> Listing:
    """Find the files of a data set.

    Args:
        path: a file, a folder, or a comma-separated list with `*` and `{000..009}` patterns. Each
            folder is read once, however many links lead to it. Hidden files are no data.

    Raises:
        ValueError: there are none, more than one kind, or several splits in one part of the list.
    """
    parts, unused, seen = _expand(path), Unused(), set[tuple[int, int]]()
    # Real folders first, so that a link to one is the one that is left out.
    entries = sorted(dict.fromkeys(entry for part in parts for entry in part), key=os.path.islink)
    below = {entry: list(_walk(entry, seen, unused)) for entry in entries}
    found = {file for files in below.values() for file in files}
    files = sorted(found, key=lambda file: file.replace(os.sep, "/"))
    kinds = sorted({"images" if ending in ENDINGS else ending for ending in map(ending_of, files)})
    if not kinds:
        endings = ", ".join(sorted(DATA_ENDINGS))
        reasons = "".join(f"; {line}" for line in unused.lines())
        raise ValueError(
            f"data path {path!r} holds no images: no regular file ends in {endings}{reasons}"
        )
    if len(kinds) > 1:
        raise ValueError(
            f"data path {path!r} mixes {' and '.join(kinds)}; choose one kind, as in 'DIR/*.tar'"
        )
    if kinds == ["images"]:
        # Folders are classes, and splits would be taken for such even if each is named.
        _require_one_split(path, files, pictures=True)
    else:
        for part in parts:
            here = {file for entry in part for file in below[entry]}
            _require_one_split(path, sorted(here), pictures=False)
    folders = [entry if os.path.isdir(entry) else os.path.dirname(entry) for entry in entries]
    root = os.path.commonpath(folders)
    names = [os.path.relpath(file, root).replace(os.sep, "/") for file in files]
    return Listing(root, names, kinds[0], unused)


def ending_of(name: str) -> str:
    """The ending of a file name, in lower case, with its dot."""
    return os.path.splitext(name)[1].lower()


def looks_like_picture(name: str) -> bool:
    """Whether a name ends as names of pictures do, also of formats that are not read."""
    return ending_of(name) in ENDINGS or ending_of(name) in _FOREIGN_ENDINGS


def is_hidden(path: str) -> bool:
    """Whether a file, or a folder above it, is hidden or a system's own."""
    return any(
        (part.startswith(".") and part not in {".", ".."}) or part in _SYSTEM_FOLDERS
        for part in path.split("/")
    )


def split_of(name: str) -> str | None:
    """Which split a name stands for: `train`, `validation` or `test`, perhaps with a number."""
    match = re.fullmatch(r"([a-z]+)[-_ ]?\d*", name.lower())
    return _SPLITS.get(match.group(1)) if match else None


def _expand(path: str) -> list[list[str]]:
    """Absolute files and folders that each part of a list names.

    Raises:
        ValueError: one of them does not exist.
    """
    if os.path.exists(path):
        return [[os.path.abspath(path)]]
    parts: list[list[str]] = []
    for part in path.split(","):
        entries: list[str] = []
        for pattern in _expand_braces(os.path.expanduser(part.strip())):
            # Brackets and question marks belong to names; only `*` is a pattern.
            found = sorted(glob(re.sub(r"([?[])", r"[\1]", pattern)))
            if not found:
                raise ValueError(f"data path {pattern!r} does not exist")
            entries += [os.path.abspath(entry) for entry in found]
        parts.append(entries)
    return parts


def _expand_braces(pattern: str) -> list[str]:
    """Write out each `{000..009}` as its numbers, with the same zeros in front.

    Raises:
        ValueError: there are more than a million.
    """
    match = re.search(r"\{(\d{1,9})\.\.(\d{1,9})\}", pattern)
    if match is None or os.path.exists(pattern):
        return [pattern]
    first, last = match.groups()
    if int(last) - int(first) >= 2**20:
        raise ValueError(f"data path {pattern!r} names {int(last) - int(first) + 1:,} files")
    numbers = (str(number).zfill(len(first)) for number in range(int(first), int(last) + 1))
    heads = (pattern[: match.start()] + number for number in numbers)
    return [head + tail for head in heads for tail in _expand_braces(pattern[match.end() :])]


def _walk(top: str, seen: set[tuple[int, int]], unused: Unused) -> Iterator[str]:
    """Data files at or below a path.

    Args:
        top: file or folder.
        seen: device and inode of each folder read so far; links may lead anywhere, also upwards.
        unused: is told of every file that looks like data and is none.

    Raises:
        ValueError: the path is neither folder nor regular file, or a folder cannot be read.
    """
    if not os.path.isdir(top):
        yield from _single(top, unused)
        return
    folders, links = [top], deque[str]()
    while folders or links:
        folder = folders.pop() if folders else links.popleft()
        entries = _entries(folder)
        status = os.stat(folder)
        if (status.st_dev, status.st_ino) in seen:
            unused.add("a link leads to this folder a second time", folder)
            continue
        seen.add((status.st_dev, status.st_ino))
        for entry in entries:
            if not entry.is_dir():
                if _is_data(entry, unused):
                    yield entry.path
            elif entry.name in _SYSTEM_FOLDERS:
                unused.add("folders of this name are a system's own", entry.path)
            elif not is_hidden(entry.name):
                (links if entry.is_symlink() else folders).append(entry.path)


def _single(file: str, unused: Unused) -> Iterator[str]:
    """A file that is named itself, if it is data.

    Raises:
        ValueError: it is no regular file.
    """
    if ending_of(file) in DATA_ENDINGS:
        require_regular(Path(file))
        yield file
    elif reason := _reason(file):
        unused.add(reason, file)


def _entries(folder: str) -> list[os.DirEntry[str]]:
    """Files and folders in a folder, by name.

    Raises:
        ValueError: it cannot be read.
    """
    try:
        with os.scandir(folder) as scan:
            return sorted(scan, key=lambda entry: entry.name)
    except OSError as error:
        raise ValueError(f"folder {folder} cannot be read: {error.strerror}") from error


def _is_data(entry: os.DirEntry[str], unused: Unused) -> bool:
    """Whether an entry that is no folder is a data file; `unused` is told if it only looks so."""
    if is_hidden(entry.name):
        return False
    looks_right = ending_of(entry.name) in DATA_ENDINGS
    if looks_right and entry.is_file():
        return True
    if reason := "no regular file" if looks_right else _reason(entry.name):
        unused.add(reason, entry.path)
    return False


def _reason(name: str) -> str:
    """Why a file that looks like data is not used; empty if it looks like nothing."""
    if name.lower().endswith(_COMPRESSED_SHARDS):
        return "compressed shards are not read; uncompress them"
    if ending_of(name) in _FOREIGN_ENDINGS:
        return "this format is not read; convert to PNG or JPEG"
    return ""


# -------------------------------------------------------------------------------------- splits


def _require_one_split(path: str, files: Sequence[str], *, pictures: bool) -> None:
    """Check that files are not of several splits, by the names of folders and files.

    Raises:
        ValueError: they are; the message has the path of each.
    """
    inside: dict[str, set[str]] = {}
    for file in files:
        inside.setdefault(os.path.dirname(file), set()).add(os.path.basename(file))
    for folder, names in inside.items():
        # In folders of classes a picture's name is its own affair.
        if not pictures or len(inside) == 1:
            _compare(path, _files_by_split(folder, names, pictures=pictures))
    if not files:
        return
    root = os.path.commonpath([os.path.dirname(file) for file in files])
    folders: dict[str, set[str]] = {}
    for folder in inside:
        deeper = folder
        while deeper != root:
            deeper, name = os.path.split(deeper)
            folders.setdefault(deeper, set()).add(name)
    for folder, names in folders.items():
        _compare(path, _folders_by_split(folder, names))


def _compare(path: str, splits: dict[str, tuple[str, str]]) -> None:
    """Check that there is one split.

    Raises:
        ValueError: there are several.
    """
    if len(splits) > 1:
        shown, given = zip(*sorted(splits.values()), strict=True)
        raise ValueError(
            f"data path {path!r} holds splits ({', '.join(shown)}), which would be joined; give "
            f"one of them as the path, and perhaps another as val_path: "
            f"{', '.join(map(repr, given))}"
        )


def _folders_by_split(folder: str, names: Iterable[str]) -> dict[str, tuple[str, str]]:
    """Name for each split among those of sibling folders, and the path to give.

    Names of several words, as `train_images` beside `test_images`, count if all folders have such
    names: classes may be called `train_station` and `test_tube`.
    """
    names = sorted(names)
    words = {name: _first_word_split(name) for name in names}
    splits = words if all(words.values()) else {name: split_of(name) for name in names}
    return {split: (name, os.path.join(folder, name)) for name, split in splits.items() if split}


def _files_by_split(
    folder: str, names: Iterable[str], *, pictures: bool
) -> dict[str, tuple[str, str]]:
    """Name for each split among those of files, and the pattern to give.

    Pictures count if all of them begin with the name of a split; shards by any word of theirs.
    """
    found: dict[str, tuple[str, str]] = {}
    for name in sorted(names):
        words = list(re.finditer(r"[a-z]+", os.path.splitext(name)[0].lower()))
        word = next((word for word in words if word.group() in _SPLITS), None)
        if pictures and (word is None or word.start() > 0):
            return {}
        if word is not None:
            pattern = f"{name[: word.end()]}*{os.path.splitext(name)[1]}"
            shown = name[word.start() : word.end()]
            found[_SPLITS[word.group()]] = (shown, os.path.join(folder, pattern))
    return found


def _first_word_split(name: str) -> str | None:
    """Which split the first word of a name stands for."""
    match = re.match(r"[a-z]+", name.lower())
    return _SPLITS.get(match.group()) if match else None
