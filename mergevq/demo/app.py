"""The web page: try a model on pictures, without writing a line.

One tab for each thing a model does. The functions behind the tabs need no browser; the page itself
needs the `demo` extra.
"""

import importlib
import os
import re
import socket
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mergevq.config.base import BUNDLED_GENERATOR, BUNDLED_TOKENIZER, MAX_PIXELS, Precision
from mergevq.config.parts import per_token
from mergevq.data.images import open_images
from mergevq.demo.draw_tabs import edit_tab, generate_tab
from mergevq.demo.neighbours import index
from mergevq.demo.specimens import specimens
from mergevq.demo.tabs import compare_tab, search_tab, tokens_tab
from mergevq.demo.widgets import STYLE, Place, saved
from mergevq.generator.generation import load_pair
from mergevq.metrics.lpips import load_perceptual
from mergevq.runtime.artefacts import read_record, resolve
from mergevq.runtime.device import resolve_device
from mergevq.runtime.environment import needing
from mergevq.tokenizer.compressed import PictureCodec
from mergevq.tokenizer.tokenizer import Tokenizer

_ADDRESS = "127.0.0.1"
_MAX_PORT = 2**16 - 1
_MAX_FILE_SIZE = 32 * 2**20
"""Bytes of a picture that is dropped on the page."""
_MAX_WAITING = 64
"""Requests that wait for their turn; more are turned away."""
_DELETE_CACHE = (60, 3600)
"""Seconds between two looks for old pictures, and the age of old ones."""
_MAX_TITLE = 160
"""Characters of a card's title that are shown."""


@contextmanager
def serve(
    model: str | Path | None,
    *,
    generator: Sequence[str | Path] = (),
    compare: str | Path | None = None,
    data: str | None = None,
    device: str,
    port: int,
    max_pixels: int = MAX_PIXELS,
    precision: Precision = "auto",
) -> Iterator[Any]:
    """Serve the page to this machine, and to no other, until the block ends.

    Pictures that come and go lie in a folder that only this user can read, for at most an hour,
    and end with the page. Settings of gradio in the environment do not count.

    Args:
        model: as for `build_page`.
        generator: likewise.
        compare: likewise.
        data: likewise.
        device: likewise.
        port: of the page; it must be free.
        max_pixels: as for `build_page`.
        precision: as for `build_page`.

    Yields:
        What gradio calls the page: `local_url` is its address, `block_thread` waits for its end.

    Raises:
        ValueError: a model or the data are not there, or the port cannot be had.
        RuntimeError: the `demo` extra cannot be imported.
    """
    _require_free(port)
    with (
        tempfile.TemporaryDirectory(prefix="mergevq-", ignore_cleanup_errors=True) as folder,
        # It reads the first when it is imported, launched and in trouble, and would ask its
        # makers' server for messages and newer versions, and report.
        _only_these_settings({"GRADIO_ANALYTICS_ENABLED": "False", "GRADIO_TEMP_DIR": folder}),
    ):
        page = build_page(
            model,
            generator=generator,
            compare=compare,
            data=data,
            device=device,
            precision=precision,
            folder=Path(folder),
            max_pixels=max_pixels,
        )
        trusted = importlib.import_module("starlette.middleware.trustedhost").TrustedHostMiddleware
        middleware = importlib.import_module("starlette.middleware").Middleware
        page.queue(max_size=_MAX_WAITING, api_open=False)
        page.launch(
            server_name=_ADDRESS,
            server_port=port,
            share=False,
            max_file_size=_MAX_FILE_SIZE,
            # A page of another site whose name was made to mean this machine is turned away.
            app_kwargs={"middleware": [middleware(trusted, allowed_hosts=[_ADDRESS, "localhost"])]},
            prevent_thread_lock=True,
            quiet=True,
            css=STYLE,
            run_history=False,
            footer_links=["api"],
        )
        try:
            yield page
        finally:
            page.close(verbose=False)


def build_page(
    model: str | Path | None,
    *,
    generator: Sequence[str | Path] = (),
    compare: str | Path | None = None,
    data: str | None = None,
    device: str,
    folder: Path,
    max_pixels: int = MAX_PIXELS,
    precision: Precision = "auto",
) -> Any:  # noqa: ANN401 - of an optional extra
    """The page, not yet served.

    Args:
        model: a tokenizer's directory, its name in the package, or owner/name@revision on Hugging
            Face; None is the one that commands take by default, with its generator.
        generator: the same of generators trained on its tokens, which draw side by side; none
            leaves that tab out.
        compare: the same of a tokenizer to compare with; None compares numbers of tokens.
        data: images to find neighbours among; None leaves that tab out.
        device: where to compute.
        folder: where the pictures lie that it shows.
        max_pixels: largest image of the data that is read, as width times height.
        precision: of the tokenizer's calls; see `Tokenizer.from_pretrained`.

    Raises:
        ValueError: a model or the data are not there.
        RuntimeError: the `demo` extra cannot be imported.
    """
    with needing("demo", "the web page"):
        gradio = importlib.import_module("gradio")
    device_found = resolve_device(device)
    dataset = None if data is None else open_images(data, max_pixels=max_pixels)
    if model is None:
        model, generator = BUNDLED_TOKENIZER, generator or (BUNDLED_GENERATOR,)
    codec = PictureCodec.from_pretrained(model, precision=precision, device=device_found)
    tokenizer = codec.tokenizer
    other = None
    if compare is not None:
        other = PictureCodec.from_pretrained(compare, precision=precision, device=device_found)
    pairs = [load_pair(each, model, device_found, precision=precision) for each in generator]
    neighbours = None if dataset is None else index(tokenizer, dataset)
    directory = resolve(model)
    pictures = specimens(
        tokenizer.config.image_size, dataset, are_digits="digits" in seen(directory).lower()
    )
    place = Place(gradio, folder, [saved(each, folder) for each in pictures])
    with gradio.Blocks(
        title="MergeVQ", analytics_enabled=False, delete_cache=_DELETE_CACHE
    ) as page:
        gradio.Markdown(f"# MergeVQ\n{_introduction(tokenizer, directory)}")
        tokens_tab(place, page, codec, load_perceptual("alex", None))
        if pairs:
            generate_tab(place, pairs)
        edit_tab(place, pairs, page)
        if neighbours is not None:
            search_tab(place, tokenizer, neighbours)
        compare_tab(place, page, codec, other)
    return page


# ------------------------------------------------------------------------------------ text


def seen(directory: Path) -> str:
    """Name what a model has seen: the title of its card, or what training wrote down.

    Args:
        directory: of the model.
    """
    card = directory / "README.md"
    if card.is_file():
        title = card.read_text(encoding="utf-8", errors="replace").partition("\n")[0]
        # A stranger's title must be words on the page, not a link or a picture.
        words = re.sub(r"[^\w\s.,;:()%'+-]", "", title).strip()
        if words:
            return words[:_MAX_TITLE]
    made_from = read_record(directory).get("extra", {}).get("made_from")
    if isinstance(made_from, dict) and isinstance(made_from.get("num_images"), int):
        classes = made_from.get("class_names") or ()
        of_classes = f" of {len(classes)} classes" if classes else ""
        return f"trained on {made_from['num_images']:,} images{of_classes}"
    return "trained on pictures that its record does not name"


def _introduction(tokenizer: Tokenizer, directory: Path) -> str:
    """Explain in three sentences what there is to see, and name the model in one line."""
    config = tokenizer.config
    sentences = (
        f"A picture of about {config.image_size} x {config.image_size} pixels becomes up to "
        f"{config.num_tokens} **tokens** of {per_token(config.quantizer)}, "
        f"{config.num_kept} as a rule, and a decoder makes a picture of them again."
    )
    if tokenizer.has_maps:
        sentences += (
            " Each token stands for a group of cells that the encoder found alike; the **merge "
            "map** shows which. With the **given source** the decoder is told that map, which "
            "costs bits of its own; with the **recovered source** it infers the map from the "
            "tokens alone."
        )
    return f"{sentences}\n\nThe model: {seen(directory)}."


# ------------------------------------------------------------------------------------ pieces


def _require_free(port: int) -> None:
    """Check that the page can be served on a port, before anything is loaded.

    Raises:
        ValueError: it cannot.
    """
    if not 1 <= port <= _MAX_PORT:
        raise ValueError(f"port ({port}) must be between 1 and {_MAX_PORT}")
    try:
        socket.create_server((_ADDRESS, port)).close()
    except OSError as error:
        raise ValueError(f"port ({port}) cannot be had ({error.strerror}); try another") from error


@contextmanager
def _only_these_settings(settings: dict[str, str]) -> Iterator[None]:
    """Take all of gradio's settings out of the environment but some, and put them back after."""
    before = {name: text for name, text in os.environ.items() if name.startswith("GRADIO_")}
    for name in before:
        del os.environ[name]
    os.environ.update(settings)
    try:
        yield
    finally:
        for name in settings:
            del os.environ[name]
        os.environ.update(before)
