"""What all commands do: lay out what they print, and tell OpenMP how to wait."""

import os


def print_table(title: str, rows: dict[str, str]) -> None:
    """Print a title, and names and values in two columns."""
    print(title)
    for name, value in rows.items():
        print(f"  {name:<14} {value}")


def let_threads_sleep() -> None:
    """Make OpenMP's idle threads sleep soon, unless the user chose; before torch is loaded."""
    # By default they spin for a while after every operator, and a decoder is hundreds of small
    # ones. On two busy cores reconstructing was 3 to 7 times faster so, at a quarter of the work.
    if os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE").upper() != "PASSIVE":
        return
    # Waking one takes longer than many a product, so those of GNU's library (PyTorch's on Linux)
    # spin for the few microseconds until the next.
    os.environ.setdefault("GOMP_SPINCOUNT", "2000")


def let_products_repeat() -> None:
    """Give a GPU's matrix products a fixed workspace, without which the last digits may vary."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
