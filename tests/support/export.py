"""Exports in tests: by the command in a process of its own, where nothing checks shapes.

Inside a test sizes of traced tensors would be symbols, which no `int` is, and every note of the
tracer would be kept.
"""

import subprocess
import sys


def export(*arguments):
    """The finished `mergevq export ..`."""
    command = [sys.executable, "-m", "mergevq", "export", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def size_of(folder):
    """Bytes of all files in a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
