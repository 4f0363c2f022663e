"""Optional packages: which extra brings which, and the message where one cannot be imported."""

import importlib.util
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import metadata

EXTRAS = {
    "data": ("pyarrow",),
    "demo": ("gradio>=6", "scikit-learn"),
    "eval": ("matplotlib",),
    "hub": ("huggingface_hub",),
    "log": ("tensorboard",),
    "quickstart": ("matplotlib", "scikit-learn"),
    "teacher": ("transformers",),
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
