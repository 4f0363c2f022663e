"""Pictures that a run makes, one file for each, and the digests that tell them from other files.

`SHA256SUMS` beside the pictures has a line for each, as `sha256sum --check` reads it; processes
other than the first add to files of their own. A picture without a line was not made by the run,
whatever its name is.
"""

import hashlib
import io
import re
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from mergevq.data.prepare import decode
from mergevq.runtime.files import require_regular, write_bytes

SUMS = "SHA256SUMS"

_LINE = re.compile(rb"([0-9a-f]{64})  ([^/\0\n]{1,100}\.png)\n")
_LONGEST_LINE = 200
_PICTURES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm"}
"""Endings of files that could be taken for pictures of a run."""


class SampleFiles:
    """The pictures of one run, by number.

    Args:
        folder: where they are or will be.
        names: file of each, in order; None is every one that was made, in order of name.
        rank: of this process, if several write.
    """

    def __init__(self, folder: Path, names: Sequence[str] | None = None, *, rank: int = 0) -> None:
        self.folder = folder
        self._sums = folder / (f"{SUMS}.{rank}" if rank else SUMS)
        self._digests = _read_digests(folder)
        self.names = sorted(self._digests) if names is None else list(names)

    def __len__(self) -> int:
        return len(self.names)

    def name(self, number: int) -> str:
        """File name of a picture."""
        return self.names[number]

    def path(self, number: int) -> Path:
        """File of a picture."""
        return self.folder / self.names[number]

    def has(self, number: int) -> bool:
        """Whether a picture was made and is still there."""
        return self.names[number] in self._digests and self.path(number).is_file()

    def save(self, number: int, picture: Image.Image) -> None:
        """Write a digest and then its picture, which has its name only when it is whole."""
        buffer = io.BytesIO()
        picture.save(buffer, format="PNG")
        digest = hashlib.sha256(buffer.getvalue()).hexdigest()
        path, name = self.path(number), self.names[number]
        with self._sums.open("ab+") as file:
            # A line that a power cut left half must not swallow this one.
            if file.tell():
                file.seek(-1, io.SEEK_END)
                file.write(b"" if file.read(1) == b"\n" else b"\n")
            file.write(f"{digest}  {name}\n".encode())
        self._digests.setdefault(name, set()).add(digest)
        write_bytes(path, buffer.getvalue())

    def read(self, number: int) -> Image.Image:
        """Read a picture as RGB.

        Raises:
            ValueError: it is missing, or not the one that was made.
        """
        path = self.path(number)
        require_regular(path)
        data = path.read_bytes()
        if hashlib.sha256(data).hexdigest() not in self._digests.get(self.names[number], set()):
            raise ValueError(
                f"{path} is not the picture that was made: its SHA-256 is not in {SUMS}; delete "
                "it, and it is made again when the command is repeated"
            )
        return decode(data)

    def strangers(self) -> list[str]:
        """Names of files that look like pictures and were not made by this run."""
        return sorted(
            path.name
            for path in self.folder.iterdir()
            if path.suffix.lower() in _PICTURES and path.name not in self._digests
        )


def is_sample_folder(folder: Path) -> bool:
    """Whether a folder says which of its pictures a run made."""
    return (folder / SUMS).is_file()


def _read_digests(folder: Path) -> dict[str, set[str]]:
    """Digests of every picture by name; several where it was made more than once."""
    digests: dict[str, set[str]] = {}
    for path in sorted(folder.glob(f"{SUMS}*")):
        require_regular(path)
        with path.open("rb") as file:
            while line := file.readline(_LONGEST_LINE):
                if found := _LINE.fullmatch(line):
                    digests.setdefault(found[2].decode(), set()).add(found[1].decode())
    return digests
