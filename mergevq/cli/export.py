"""Commands that write models for other runtimes: `mergevq export`.

As in `mergevq.cli.main`, a signature is the options, a docstring is the help, and heavy modules are
imported inside.
"""

import shlex
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import tyro

from mergevq.cli.options import Counts, whole_numbers
from mergevq.cli.tables import next_lines
from mergevq.config.base import BUNDLED_TOKENIZER
from mergevq.runtime.environment import prepare_to_compute

if TYPE_CHECKING:
    from mergevq.generator.export.folder import ExportedFolder


def onnx(
    model: tyro.conf.Positional[str] = BUNDLED_TOKENIZER,
    *,
    out: Path = Path("exported"),
    num_kept: Counts = (),
    generator: str | None = None,
) -> None:
    """Write a tokenizer, and a generator of its tokens, as ONNX graphs that run without PyTorch.

    Each K has an encoder; the decoder and the recovery of source maps take any K. OUT also gets a
    manifest, export.json. Every file is run and compared with PyTorch before the command ends.

    Args:
        model: a tokenizer's directory, a name of `mergevq models`, or owner/name@revision on
            Hugging Face.
        out: folder; an older export in it is replaced.
        num_kept: values of K; the model's own by default.
        generator: a MergeAR generator trained on its tokens, whose step is written too.
    """
    _write("onnx", model, out, num_kept, generator)


def pt2(
    model: tyro.conf.Positional[str] = BUNDLED_TOKENIZER,
    *,
    out: Path = Path("exported"),
    num_kept: Counts = (),
    generator: str | None = None,
) -> None:
    """Write a tokenizer, and a generator of its tokens, as programs of torch.export.

    They are the graphs of `mergevq export onnx`, and run with PyTorch alone.

    Args:
        model: a tokenizer's directory, a name of `mergevq models`, or owner/name@revision on
            Hugging Face.
        out: folder; an older export in it is replaced.
        num_kept: values of K; the model's own by default.
        generator: a MergeAR generator trained on its tokens, whose step is written too.
    """
    _write("pt2", model, out, num_kept, generator)


def web(
    model: tyro.conf.Positional[str] = BUNDLED_TOKENIZER,
    *,
    out: Path = Path("site"),
    num_kept: Counts = (),
    runtime: Path | None = None,
) -> None:
    """Write a static page that runs a tokenizer in its visitor's browser.

    npm fetches onnxruntime-web once, in one version; the page itself asks no other place for
    anything.

    Args:
        model: a tokenizer's directory, a name of `mergevq models`, or owner/name@revision on
            Hugging Face.
        out: folder; an older site in it is replaced.
        num_kept: values of K that the slider has; by default the least, the nominal and the
            greatest that the model was trained with.
        runtime: folder `dist` of onnxruntime-web, where npm cannot fetch it.
    """
    prepare_to_compute()
    from mergevq.demo.site.site import write_site

    site = write_site(model, out, num_kept=whole_numbers("num_kept", num_kept), runtime=runtime)
    print(
        f"{site.folder}: {site.num_bytes / 1e6:.1f} MB, of which the model "
        f"{site.model_bytes / 1e6:.1f}; K {', '.join(map(str, site.num_kept))}"
    )
    print(f"next:\n  python -m http.server --directory {shlex.quote(str(site.folder))}")


def _write(
    form: Literal["onnx", "pt2"],
    model: str,
    out: Path,
    num_kept: tuple[str, ...],
    generator: str | None,
) -> None:
    """Write a folder and print what is in it."""
    prepare_to_compute()
    from mergevq.generator.export.folder import export_folder

    counts = whole_numbers("num_kept", num_kept)
    _print(export_folder(model, out, form, num_kept=counts, generator=generator))
    print(next_lines(("export", "web", model), ("reconstruct", "PICTURE", "--model", model)))


def _print(exported: "ExportedFolder") -> None:
    """Files of an export, and how near they are to PyTorch."""
    width = max(len(graph["file"]) for graph in exported.graphs)
    for graph in exported.graphs:
        print(
            f"{graph['file']:<{width}}  whole numbers equal {graph['equal']:.2%}, "
            f"others within {graph['largest_difference']:.1e}"
        )
    print(f"{exported.folder}: {exported.num_bytes / 1e6:.1f} MB, described in export.json")


COMMANDS: dict[str, Callable[..., object]] = {
    command.__name__: command for command in (onnx, pt2, web)
}
