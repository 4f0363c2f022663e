"""What all commands do: lay out what they print, and set threads and memory up to compute."""

import ctypes
import os
import sys

import tyro

# Of glibc's malloc.h, with the largest values that it takes.
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
_MOST_TRIM, _MOST_MMAP = 2**31 - 1, 2**25


def shown_default(default: str) -> str:
    """End of an option's help: its default, and nothing where that is empty."""
    return f"(default: {default})" if default else ""


MAY_BE_EMPTY = tyro.conf.arg(help_behavior_hint=shown_default)
"""For options whose empty default their help explains."""


def print_table(title: str, rows: dict[str, str]) -> None:
    """Print a title, and names and values in two columns."""
    print(title)
    for name, value in rows.items():
        print(f"  {name:<14} {value}")


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
