"""Programs that read a word from a small picture of it.

A reader gets pictures of single words, so that it has to find none: at low resolution, finding
fails long before reading does.
"""

import importlib.metadata
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol, runtime_checkable

import numpy as np
from jaxtyping import UInt8
from torch import Tensor

from mergevq.config.records import ReaderRecord
from mergevq.metrics.extractor import sha256_of
from mergevq.runtime.environment import needing


@runtime_checkable
class TextReader(Protocol):
    """Reads words."""

    @property
    def record(self) -> ReaderRecord:
        """Which program it is."""
        ...

    def read(self, images: Sequence[UInt8[Tensor, "3 _ _"]]) -> list[str]:
        """The text of each picture, empty where none is found.

        Args:
            images: one word each, RGB in 0..255, of any sizes.
        """
        ...


class RapidOcr:
    """The recogniser of rapidocr: PP-OCR as ONNX, whose weights come with the package."""

    def __init__(self) -> None:
        """Load the package; its recogniser loads with the first word.

        Raises:
            RuntimeError: a package of the extra `text` is not installed.
        """
        with needing("text", "reading text"):
            import rapidocr
        # Doubtful words count as they were read.
        settings = {"Global.text_score": 0.0, "Global.log_level": "critical"}
        self._engine = rapidocr.RapidOCR(params=settings)
        folder = Path(str(rapidocr.__file__)).parent / "models"
        (recogniser,) = folder.glob("*_rec_*.onnx")
        self.record: ReaderRecord = {
            "name": "rapidocr",
            "version": importlib.metadata.version("rapidocr"),
            "sha256": sha256_of(recogniser),
        }
        """Which program it is."""

    def read(self, images: Sequence[UInt8[Tensor, "3 _ _"]]) -> list[str]:
        """The text of each picture; see `TextReader`."""
        texts = []
        for image in images:
            # Blue comes first there.
            pixels = np.ascontiguousarray(image.flip(0).permute(1, 2, 0).cpu().numpy())
            found = self._engine(pixels, use_det=False, use_cls=False, use_rec=True)
            texts.append("".join(getattr(found, "txts", None) or ()).strip())
        return texts
