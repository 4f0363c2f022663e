"""A model as a folder of graphs and a manifest, `export.json`."""

import shutil
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

from mergevq.config.parts import require_no_condition
from mergevq.data.codes import require_parts
from mergevq.generator.build import load_generator
from mergevq.generator.export.step import generator_graphs
from mergevq.generator.generation import require_same_tokenizer
from mergevq.runtime.artefacts import model_hash, read_record, resolve, tokens_hash
from mergevq.runtime.environment import needing
from mergevq.runtime.files import atomic_directory, sha256_of, write_json
from mergevq.runtime.run import versions
from mergevq.tokenizer.export.files import OPSET, Format, GraphRecord, write_graphs
from mergevq.tokenizer.export.graphs import is_exportable, tokenizer_graphs
from mergevq.tokenizer.tokenizer import Tokenizer

MANIFEST = "export.json"
CARD = "MODEL_CARD.md"
_LICENCE = (
    "These files are the weights of the model in another form and have its licence: see "
    "MODEL_CARD.md if it is here, else ask whoever trained it."
)
_FORMAT_VERSION = 1


class ExportedFolder(NamedTuple):
    """A folder that was written."""

    folder: Path
    graphs: list[GraphRecord]
    num_bytes: int
    """Size of all files."""


def export_folder(
    model: str,
    out: Path,
    form: Format,
    *,
    num_kept: tuple[int, ...] = (),
    generator: str | None = None,
) -> ExportedFolder:
    """Write a tokenizer, and a generator of its tokens, as graphs; an older folder is replaced.

    Args:
        model: the tokenizer, as `artefacts.resolve` takes it.
        out: folder.
        form: of the graphs.
        num_kept: values of K; none is the model's own.
        generator: a MergeAR generator; None is none.

    Raises:
        ValueError: a model is not there, does not fit or cannot be exported, or `out` holds
            something else.
        RuntimeError: a package is missing, or a file does not compute what the model does.
    """
    _require_replaceable(out)
    if form == "onnx":
        with needing("export", "mergevq export"):
            import onnx  # noqa: F401
            import onnxruntime  # noqa: F401
            import onnxscript  # noqa: F401
    directory = resolve(model)
    tokenizer = Tokenizer.from_pretrained(directory, precision="float32").requires_grad_(
        requires_grad=False
    )
    require_parts(tokenizer.quantizer.spec.sizes, "mergevq export")
    require_no_condition(tokenizer.config.condition, "mergevq export")
    if not is_exportable(tokenizer):
        kind = tokenizer.config.reducer.kind
        raise ValueError(
            f"{directory.name} has a reducer of kind {kind}, and those of kind merge can be "
            "exported; use it from Python"
        )
    counts = tuple(sorted(set(num_kept))) or (tokenizer.config.num_kept,)
    graphs = tokenizer_graphs(tokenizer, counts)
    record: dict[str, Any] = {
        "format_version": _FORMAT_VERSION,
        "format": form,
        "model": {"name": directory.name, "sha256": model_hash(directory)},
        **_tokenizer_record(tokenizer, counts),
    }
    if generator is not None:
        told, more = _generator_graphs(generator, directory)
        record["generator"], graphs = told, [*graphs, *more]
    with atomic_directory(out) as partial:
        records = write_graphs(graphs, partial, form)
        if (directory / "README.md").is_file():
            shutil.copyfile(directory / "README.md", partial / CARD)
        record |= {
            "graphs": records,
            "files": {path.name: sha256_of(path) for path in sorted(partial.iterdir())},
            "opset": OPSET if form == "onnx" else None,
            "versions": versions() | _export_versions(form),
            "licence": _LICENCE,
        }
        write_json(partial / MANIFEST, record)
    return ExportedFolder(out, records, sum(path.stat().st_size for path in out.iterdir()))


def _require_replaceable(out: Path) -> None:
    """Refuse a folder of something else.

    Raises:
        ValueError: it holds files and no manifest.
    """
    is_export = (out / MANIFEST).is_file()
    if out.exists() and not is_export and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(
            f"{out} holds other files and no {MANIFEST} and would be replaced; choose another --out"
        )


def _tokenizer_record(tokenizer: Tokenizer, num_kept: tuple[int, ...]) -> dict[str, Any]:
    """Numbers that are needed to use the graphs of a tokenizer."""
    config = tokenizer.config
    bits = [tokenizer.bits(count) for count in num_kept]
    return {
        "image_size": config.image_size,
        "pixels": "float32, RGB in [-1, 1], channels first: bytes / 127.5 - 1",
        "grid_size": [config.grid_size, config.grid_size],
        "num_kept": list(num_kept),
        "num_codes": tokenizer.quantizer.spec.num_values,
        "bits": [{"tokens": each.tokens, "source": each.source} for each in bits],
    }


def _generator_graphs(generator: str, tokenizer: Path) -> tuple[dict[str, Any], list[Any]]:
    """Numbers that are needed to use the graphs of a generator, and the graphs."""
    directory = resolve(generator)
    extra = read_record(directory).get("extra", {})
    require_same_tokenizer(extra.get("tokenizer"), tokens_hash(tokenizer), generator=directory)
    loaded = load_generator(directory).requires_grad_(requires_grad=False)
    graphs = generator_graphs(loaded)
    config = loaded.config
    record = {
        "name": directory.name,
        "sha256": model_hash(directory),
        "num_classes": config.num_classes,
        "null_class": config.null_class,
        "num_kept": list(config.kept_candidates) or [config.num_kept],
        "num_cells": config.num_tokens,
        "num_prefix": config.num_prefix,
        "window": getattr(config.order, "window", 0),
        "part_sizes": list(config.part_sizes),
    }
    return record, graphs


def _export_versions(form: Format) -> dict[str, str | None]:
    """Versions of the packages that wrote the files."""
    names = ("onnx", "onnxruntime", "onnxscript") if form == "onnx" else ()
    return {name: metadata.version(name) for name in names}
