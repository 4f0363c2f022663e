"""Common to all commands: how they print, how they say errors, and threads and memory."""

import ctypes
import errno
import os
import re
import sys
from collections.abc import Mapping

# Of glibc's malloc.h, with the largest values that it takes.
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
_MOST_TRIM, _MOST_MMAP = 2**31 - 1, 2**25


def print_table(title: str, rows: dict[str, str]) -> None:
    """Print a title, and names and values in two columns."""
    print(title)
    for name, value in rows.items():
        print(f"  {name:<14} {value}")


# --------------------------------------------------------------------------------------- errors


_FULL = "no space is left to write {place}: make room{elsewhere}"
_FOLDER = "{place} needs a folder where there is a file: move the file away{elsewhere}"
_FORBIDDEN = "{place} may not be read or written by this user: change that{elsewhere}"
_FILE_PROBLEMS = {
    errno.ENOSPC: _FULL,
    errno.EDQUOT: _FULL,
    errno.EFBIG: _FULL,
    errno.EEXIST: _FOLDER,
    errno.ENOTDIR: _FOLDER,
    errno.EACCES: _FORBIDDEN,
    errno.EPERM: _FORBIDDEN,
    errno.EISDIR: "{place} is a folder, and a file is needed there",
    errno.EROFS: "{place} is where nothing can be written: make it writable{elsewhere}",
    errno.ENOENT: "{place} is not there: check the path",
}


def as_file_error(error: Exception) -> OSError | None:
    """The error of the system behind another one; None if it is about no file.

    Libraries in Rust, as safetensors is, give no `OSError` but its number in words.
    """
    if isinstance(error, OSError):
        return error
    found = re.search(r"\(os error (\d+)\)", str(error))
    return OSError(int(found[1]), os.strerror(int(found[1]))) if found else None


def file_problem(error: OSError, out: str | None) -> str:
    """What is wrong with which file, and a way out, in one line.

    Args:
        error: of the system, or a library's that says all itself.
        out: where the command writes, for errors that name no file; None where it does not.
    """
    if error.errno is None or (error.filename is None and out is None):
        return str(error)
    place = error.filename if error.filename is not None else out
    elsewhere = "" if out is None else ", or choose another place with --out"
    if error.errno not in _FILE_PROBLEMS:
        return f"{place}: {os.strerror(error.errno)}"
    return _FILE_PROBLEMS[error.errno].format(place=place, elsewhere=elsewhere)


def in_options(message: str, options: Mapping[str, str]) -> str:
    """A message in which settings are called as on the command line.

    A setting's name is one with `_` or a dot in it, or any before ` (VALUE)` at the beginning.
    What may be a part of a path or of an option stays.

    Args:
        message: in the library's words, such as "num_kept (0) must be at least 1".
        options: option by name of a setting, such as `--model.num-kept` by `num_kept`.
    """
    if not options:
        return message
    known = "|".join(sorted(map(re.escape, options), key=len, reverse=True))

    def said(found: re.Match[str]) -> str:
        name = found[0]
        is_first = re.fullmatch(r"(.*[:;] )?", message[: found.start()], re.DOTALL)
        is_setting = "_" in name or "." in name
        if is_setting or (is_first and message[found.end() :].startswith(" (")):
            return options[name]
        return name

    return re.sub(rf"(?<![\w./\\'\"-])({known})(?![\w/\\'\"=-]|\.\w)", said, message)


# ---------------------------------------------------------------------------- threads and memory


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


def let_products_repeat() -> None:
    """Give a GPU's matrix products a fixed workspace, without which the last digits may vary."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
