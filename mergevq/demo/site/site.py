"""A tokenizer as a folder of static files, which any web server or `python -m http.server` serves.

The page computes with onnxruntime-web in one thread, and asks no other place for anything. That
package is fetched by npm in one version when a site is written, and its checksum is compared.
"""

import base64
import hashlib
import json
import shutil
import subprocess
import tarfile
import tempfile
from pathlib import Path
from typing import NamedTuple

from mergevq.config.tokenizer import TokenizerConfig
from mergevq.generator.export.folder import export_folder
from mergevq.runtime.artefacts import read_record, resolve
from mergevq.runtime.files import atomic_directory
from mergevq.runtime.settings import from_json

RUNTIME_VERSION = "1.30.0"
RUNTIME_INTEGRITY = (
    "q0y+JrrtukXSzsBWEMccVfqX25LRmosXHF+CaRJmg8pZClzcV7svNc4rKY3jL02Vb7QmRMDs1SigqR4CXAfKYQ=="
)
"""SHA-512 of the package, as its registry has it."""
RUNTIME_FILES = (
    "ort.wasm.min.mjs",
    "ort-wasm-simd-threaded.mjs",
    "ort-wasm-simd-threaded.wasm",
)
"""Files of its folder `dist` that a page of one thread needs."""
PAGE = ("index.html", "style.css", "app.js", "LICENSE-onnxruntime.txt")
"""Files of this folder that a site begins with."""
_PACKAGE = f"onnxruntime-web@{RUNTIME_VERSION}"
_WAY_OUT = (
    f"give the folder `dist` of {_PACKAGE}, fetched elsewhere with `npm pack`, as --runtime FOLDER"
)
_SECONDS = 600
"""Longest time that npm may take."""


class Site(NamedTuple):
    """A site that was written."""

    folder: Path
    num_kept: tuple[int, ...]
    """Values of K that its slider has."""
    num_bytes: int
    """Size of all files."""
    model_bytes: int
    """The part of it that is graphs and weights."""


def write_site(
    model: str, out: Path, *, num_kept: tuple[int, ...] = (), runtime: Path | None = None
) -> Site:
    """Write a page with a tokenizer; an older site is replaced.

    Args:
        model: a tokenizer that merges, as `artefacts.resolve` takes it.
        out: folder.
        num_kept: values of K; none is the least, the nominal and the greatest that it was trained
            with.
        runtime: folder with `RUNTIME_FILES`; None fetches the package by npm.

    Raises:
        ValueError: the model has no source maps, `runtime` lacks a file or is of another version,
            or `out` holds something else.
        RuntimeError: npm is absent or fetches nothing, or the `export` extra is missing.
    """
    _require_replaceable(out)
    directory = resolve(model)
    config = from_json(TokenizerConfig, read_record(directory)["config"])
    if config.reducer.kind != "merge":
        raise ValueError(
            f"model.reducer.kind ({config.reducer.kind}) must be merge: the page shows which cells "
            "an image merges; use `mergevq export onnx`"
        )
    counts = num_kept or (*(config.kept_range or ()), config.num_kept)
    counts = tuple(sorted(set(counts)))
    with atomic_directory(out) as partial:
        (partial / "runtime").mkdir()
        _place_runtime(partial / "runtime", runtime)
        exported = export_folder(str(directory), partial / "model", "onnx", num_kept=counts)
        for name in PAGE:
            shutil.copyfile(Path(__file__).parent / name, partial / name)
        num_bytes = sum(path.stat().st_size for path in partial.rglob("*") if path.is_file())
    return Site(out, counts, num_bytes, exported.num_bytes)


def _require_replaceable(out: Path) -> None:
    """Refuse a folder of something else.

    Raises:
        ValueError: it holds files and is no site.
    """
    is_site = (out / "index.html").is_file() and (out / "model" / "export.json").is_file()
    if out.exists() and not is_site and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"{out} holds other files and would be replaced; choose another --out")


def _place_runtime(folder: Path, runtime: Path | None) -> None:
    """Copy the runtime's files into a folder.

    Raises:
        ValueError: a file is missing in the folder that was given, or is of another version.
        RuntimeError: it cannot be fetched.
    """
    if runtime is None:
        with tempfile.TemporaryDirectory() as temporary:
            _extract(_fetch(Path(temporary)), folder)
        return
    missing = [name for name in RUNTIME_FILES if not (runtime / name).is_file()]
    if missing:
        raise ValueError(f"runtime ({runtime}) lacks {', '.join(missing)}; {_WAY_OUT}")
    head = (runtime / RUNTIME_FILES[0]).read_bytes()[:200].decode("utf-8", "replace")
    if f"v{RUNTIME_VERSION}" not in head:
        found = head.partition("ONNX Runtime Web v")[2].split()[:1] or ["unknown"]
        raise ValueError(
            f"runtime ({runtime}) is of version {found[0]} and must be {RUNTIME_VERSION}; "
            f"{_WAY_OUT}"
        )
    for name in RUNTIME_FILES:
        shutil.copyfile(runtime / name, folder / name)


def _fetch(folder: Path) -> Path:
    """The package, fetched by npm into a folder.

    Raises:
        RuntimeError: npm is absent, fails, or gives another file.
    """
    npm = shutil.which("npm")
    if npm is None:
        raise RuntimeError(
            f"fetching {_PACKAGE} needs npm, which is not installed; install Node.js, or {_WAY_OUT}"
        )
    command = [npm, "pack", _PACKAGE, "--json", "--pack-destination", str(folder)]
    try:
        done = subprocess.run(
            command, cwd=folder, capture_output=True, text=True, timeout=_SECONDS, check=False
        )
    except subprocess.TimeoutExpired:
        raise RuntimeError(
            f"npm did not fetch {_PACKAGE} within {_SECONDS} seconds; {_WAY_OUT}"
        ) from None
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if "npm error" in line] or ["no message"]
        raise RuntimeError(f"npm could not fetch {_PACKAGE} ({lines[0].strip()}); {_WAY_OUT}")
    path = folder / json.loads(done.stdout)[0]["filename"]
    digest = base64.b64encode(hashlib.sha512(path.read_bytes()).digest()).decode()
    if digest != RUNTIME_INTEGRITY:
        raise RuntimeError(
            f"{path.name} from npm has the SHA-512 {digest} and must have {RUNTIME_INTEGRITY}: it "
            f"is another file; {_WAY_OUT}"
        )
    return path


def _extract(package: Path, folder: Path) -> None:
    """Take the files that are needed, and no others, out of the package."""
    with tarfile.open(package) as archive:
        for name in RUNTIME_FILES:
            member = archive.extractfile(f"package/dist/{name}")
            if member is None:
                raise RuntimeError(f"{package.name} lacks dist/{name}; {_WAY_OUT}")
            with member, (folder / name).open("wb") as file:
                shutil.copyfileobj(member, file)
