"""This process: its threads and memory, its optional packages, the models of the package."""

import ctypes
import importlib.util
import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

from mergevq.config.base import nearest

# Of glibc's malloc.h, with the largest values that it takes.
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
_MOST_TRIM, _MOST_MMAP = 2**31 - 1, 2**25
_BUNDLED = Path(__file__).parents[1] / "bundled"


def prepare_to_compute() -> None:
    """Set threads and memory up; before torch is loaded."""
    let_threads_sleep()
    keep_freed_memory()


def let_threads_sleep() -> None:
    """Make OpenMP's idle threads sleep soon, unless the user chose; before torch is loaded."""
    # By default they spin for a while after every operator, and a decoder is hundreds of small
    # ones. On two busy cores reconstructing was 3 to 7 times faster so, at a quarter of the work.
    if os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE").upper() != "PASSIVE":
        return
    # Waking one takes longer than many a product, so those of GNU's library (PyTorch's on Linux)
    # spin for the few microseconds until the next.
    os.environ.setdefault("GOMP_SPINCOUNT", "2000")


def keep_freed_memory() -> None:
    """Let glibc keep what tensors free for those to come, unless the user chose.

    The process stays as large as it once was. Where there is no glibc, nothing changes.
    """
    # What is given back comes again in pages that the system fills with zeros first. On two cores
    # decoding took a third longer so, and training on small images a tenth.
    chosen = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "GLIBC_TUNABLES")
    if sys.platform != "linux" or any(name in os.environ for name in chosen):
        return
    set_option = getattr(ctypes.CDLL(None), "mallopt", None)
    if set_option is not None:
        # One alone would keep glibc from raising the other as it learns.
        set_option(_MMAP_THRESHOLD, _MOST_MMAP)
        set_option(_TRIM_THRESHOLD, _MOST_TRIM)


def give_back_freed_memory() -> None:
    """Give what was freed back to the system, so that memory in use is memory that is needed.

    Where there is no glibc, nothing changes.
    """
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)


def let_products_repeat() -> None:
    """Give a GPU's matrix products a fixed workspace, without which the last digits may vary."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")


EXTRAS = {
    "codec": ("constriction",),
    "data": ("pyarrow",),
    "demo": ("gradio>=6", "scikit-learn"),
    "docs": ("mkdocs-material", "mkdocstrings-python"),
    "eval": ("matplotlib",),
    "export": ("onnx", "onnxruntime", "onnxscript"),
    "hub": ("huggingface_hub",),
    "log": ("tensorboard",),
    "quickstart": ("matplotlib", "scikit-learn"),
    "teacher": ("transformers",),
    "text": ("onnxruntime", "rapidocr"),
}
"""Requirements of each extra a user may want, as in pyproject.toml."""


@contextmanager
def needing(extra: str, purpose: str) -> Iterator[None]:
    """Import packages of an extra in a `with` block.

    Args:
        extra: one of `EXTRAS`.
        purpose: the thing that cannot be done without, as the subject of a sentence.

    Raises:
        RuntimeError: a package is missing or does not import; the message has the cause and a
            command that installs the extra.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        package = (error.name or str(error)).partition(".")[0]
        raise RuntimeError(
            f"{purpose} needs {package}, which is not installed: {install_command(extra)}"
        ) from error
    except Exception as error:
        # A package of a version that does not fit the others raises whatever it stumbles over.
        cause = f"{type(error).__name__}: {error}".partition("\n")[0]
        raise RuntimeError(
            f"{purpose} needs {' and '.join(EXTRAS[extra])}, installed here in versions that do "
            f"not import ({cause}); this installs others: {install_command(extra, upgrade=True)}"
        ) from error


def install_command(extra: str, *, upgrade: bool = False) -> str:
    """A command line that installs an extra's packages for the Python that runs, from anywhere."""
    python = _quoted(sys.executable or "python")
    # Environments made by uv have no pip of their own.
    has_pip = importlib.util.find_spec("pip") is not None
    start = f"{python} -m pip install" if has_pip else f"uv pip install --python {python}"
    options = ["--upgrade"] if upgrade else []
    return " ".join([start, *options, *map(_quoted, EXTRAS[extra])])


def missing(extra: str) -> list[str]:
    """Requirements of an extra that are not installed, or in too old a version."""
    return [requirement for requirement in EXTRAS[extra] if not _is_met(requirement)]


def installed_version(distribution: str) -> str | None:
    """Version of an installed package; None without it."""
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def _is_met(requirement: str) -> bool:
    """Whether a package is installed, at least in the version after `>=` if there is one."""
    name, _, least = requirement.partition(">=")
    installed = installed_version(name)
    return installed is not None and _numbers(installed) >= _numbers(least)


def _numbers(version: str) -> list[int]:
    """Numbers that a version begins with, none of the empty one."""
    return [int(number) for number in re.findall(r"\d+", version)]


def _quoted(word: str) -> str:
    """A word as every shell takes it."""
    return word if re.fullmatch(r"[\w./\\:+-]+", word) else f'"{word}"'


class Bundled(NamedTuple):
    """A trained model of the package, found by its name; nothing is fetched."""

    name: str
    """That of its recipe."""
    directory: Path
    """Holds its weights, its settings and its card."""

    @property
    def summary(self) -> str:
        """The title of its card."""
        card = (self.directory / "README.md").read_text(encoding="utf-8")
        return card.partition("\n")[0].removeprefix("# ")

    @property
    def num_bytes(self) -> int:
        """Size of its weights."""
        return (self.directory / "model.safetensors").stat().st_size


def bundled_models() -> list[Bundled]:
    """All models of the package, by name."""
    found = sorted(path.parent for path in _BUNDLED.glob("*/model.safetensors"))
    return [Bundled(path.name, path) for path in found]


def bundled_model(name: str) -> Path | None:
    """The directory of a model of the package; None where none has this name."""
    return next((each.directory for each in bundled_models() if each.name == name), None)


def bundled_names(near: str) -> str:
    """The names there are, for a message about another one.

    Args:
        near: the other name; one that is like it is suggested.
    """
    names = [each.name for each in bundled_models()]
    return f"{', '.join(names)}{nearest(near, names)}"
