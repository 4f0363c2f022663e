"""The web page: try a model on pictures, without writing a line.

One tab for each thing a model does. The functions behind the tabs need no browser; the page itself
needs the `demo` extra.
"""

import importlib
import logging
import os
import socket
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import lru_cache, wraps
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple, TypeVar

import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from mergevq.config.base import BUNDLED_GENERATOR, BUNDLED_TOKENIZER, MAX_PIXELS, Precision
from mergevq.config.generator import SampleRun, SamplingSettings
from mergevq.config.parts import bits_of
from mergevq.data.batches import eval_batches
from mergevq.data.images import ImageDataset, open_images
from mergevq.data.prepare import load_picture, load_square, to_rgb
from mergevq.generator.generation import Pair, generate, load_pair
from mergevq.report.pictures import to_pil
from mergevq.runtime.device import resolve_device
from mergevq.runtime.environment import needing
from mergevq.runtime.logs import Progress
from mergevq.tokenizer.codec import EmbeddedImage, embed_image, reconstruct_image
from mergevq.tokenizer.tokenizer import Tokenizer

logger = logging.getLogger("mergevq")

_BATCH_SIZE = 64
"""Images whose features are computed at once."""
_MIN_SHOWN = 256
"""Pixels a side that a picture is enlarged to at least, by a whole factor."""
_ADDRESS = "127.0.0.1"
_MAX_PORT = 2**16 - 1
_MAX_FILE_SIZE = 32 * 2**20
"""Bytes of a picture that is dropped on the page."""
_MAX_WAITING = 64
"""Requests that wait for their turn; more are turned away."""
_DELETE_CACHE = (60, 3600)
"""Seconds between two looks for old pictures, and the age of old ones."""
_MIN_WIDTH = 140
"""Pixels of the page that an answer needs: two fit beside each other on a phone."""
_HEIGHT = 280
"""Pixels of the page that the picture to drop takes, however small it is."""
_STYLE = """.pictures .grid-container {
  grid-template-columns: repeat(auto-fill, minmax(clamp(90px, 18vw, 130px), 1fr)) !important;
}"""
"""As many pictures beside each other as there is room for: three on a phone."""
_BUTTONS = ("download",)
"""On a picture; another of gradio's shares it with the world, and a third hides the label."""

_Shown = TypeVar("_Shown")


class Reconstructed(NamedTuple):
    """Content of the first tab."""

    original: Image.Image
    merge_map: Image.Image
    given: Image.Image
    recovered: Image.Image
    text: str
    """Tokens, bits and PSNR."""


class Neighbours(NamedTuple):
    """Images that a picture is compared with."""

    dataset: ImageDataset
    features: Float[Tensor, "n c"]
    """Class tokens, of length 1."""


def reconstruct(
    tokenizer: Tokenizer, picture: Image.Image | EmbeddedImage, num_kept: int
) -> Reconstructed:
    """Encode a picture, resized as in training, with K tokens and decode it again.

    Raises:
        ValueError: K is not legal for the picture.
    """
    result = reconstruct_image(tokenizer, picture, num_kept, size_policy="resize")
    if result.merge_map is None or result.recovered is None:
        raise ValueError(
            "the page shows merge maps and recovered sources, which this tokenizer does not have; "
            "`mergevq reconstruct` shows what comes back"
        )
    bits = result.bits
    text = (
        f"{result.num_tokens} of {result.num_cells} tokens. {bits.tokens:.0f} bits of tokens and "
        f"{bits.source:.0f} of source map, {result.price}. PSNR "
        f"{result.psnr_given:.2f} dB with the given source, {result.psnr_recovered:.2f} dB with "
        "the recovered one."
    )
    return Reconstructed(
        original=_enlarged(result.original),
        merge_map=_enlarged(result.merge_map),
        given=_enlarged(result.given),
        recovered=_enlarged(result.recovered),
        text=text,
    )


def draw(
    pair: Pair, class_name: str | None, guidance: float, num_images: int, seed: int
) -> list[Image.Image]:
    """Sample pictures of a class.

    Args:
        pair: what samples and what decodes.
        class_name: one of `class_choices`; None takes every class in turn.
        guidance: scale of classifier-free guidance; 1 is none.
        num_images: pictures.
        seed: picture k depends on it and on k.

    Raises:
        ValueError: there is no such class, or a number is out of range.
    """
    choices = class_choices(pair)
    if class_name is not None and class_name not in choices:
        raise ValueError(f"class ({class_name}) must be one of {', '.join(choices)}")
    run = SampleRun(
        classes=() if class_name is None else (choices.index(class_name),),
        num_images=int(num_images),
        seed=int(seed),
        settings=replace(SamplingSettings(), guidance_scale=float(guidance)),
    )
    _, images = generate(pair, run, range(run.num_images))
    return [_enlarged(to_pil(image)) for image in images]


def class_choices(pair: Pair) -> list[str]:
    """Names of a generator's classes, or their numbers; empty without classes."""
    num_classes = pair.generator.config.num_classes
    return [f"{name}" for name in pair.class_names or range(num_classes)]


@torch.no_grad()
def index(tokenizer: Tokenizer, dataset: ImageDataset) -> Neighbours:
    """Compute the class token of every image that can be read."""
    progress = Progress(len(dataset), unit="image")
    device = next(tokenizer.parameters()).device
    rows, positions = [], []
    for batch in eval_batches(
        dataset,
        image_size=tokenizer.config.image_size,
        batch_size=_BATCH_SIZE,
        num_workers=0,
    ):
        rows.append(_class_tokens(tokenizer, batch.image.to(device)))
        positions.append(batch.index)
        progress.update(len(batch.index))
    progress.close()
    return Neighbours(dataset.subset(torch.cat(positions).tolist()), torch.cat(rows))


def nearest(
    tokenizer: Tokenizer, neighbours: Neighbours, picture: Image.Image, count: int
) -> list[tuple[Image.Image, str]]:
    """The images most like a picture, by the cosine of their class tokens, and what they are.

    Raises:
        ValueError: there are fewer images than asked for.
    """
    count = int(count)
    if not 1 <= count <= len(neighbours.features):
        raise ValueError(
            f"count ({count}) must be between 1 and the {len(neighbours.features)} images there are"
        )
    square = load_square(to_rgb(picture), tokenizer.config.image_size)
    query = _class_tokens(tokenizer, square[None].to(next(tokenizer.parameters()).device))
    cosines, found = (neighbours.features @ query[0]).topk(count)
    shown = []
    for position, cosine in zip(found.tolist(), cosines.tolist(), strict=True):
        label = neighbours.dataset.label(position)
        name = neighbours.dataset.class_names[label] if label >= 0 else ""
        image = neighbours.dataset.read(position)
        shown.append((_enlarged(image), f"{name} {cosine:.3f}".strip()))
    return shown


@contextmanager
def serve(
    model: str | Path | None,
    *,
    generator: str | Path | None,
    data: str | None,
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
            css=_STYLE,
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
    generator: str | Path | None,
    data: str | None,
    device: str,
    folder: Path,
    max_pixels: int = MAX_PIXELS,
    precision: Precision = "auto",
) -> Any:  # noqa: ANN401 - of an optional extra
    """The page, not yet served.

    Args:
        model: a tokenizer's directory, its name in the package, or owner/name@revision on Hugging
            Face; None is the one that commands take by default, with its generator.
        generator: the same of a generator trained on its tokens; None leaves that tab out.
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
    place = resolve_device(device)
    dataset = None if data is None else open_images(data, max_pixels=max_pixels)
    if model is None:
        model, generator = BUNDLED_TOKENIZER, generator or BUNDLED_GENERATOR
    tokenizer = Tokenizer.from_pretrained(model, precision=precision, device=place)
    pair = None if generator is None else load_pair(generator, model, place, precision=precision)
    neighbours = None if dataset is None else index(tokenizer, dataset)
    with gradio.Blocks(
        title="MergeVQ", analytics_enabled=False, delete_cache=_DELETE_CACHE
    ) as page:
        gradio.Markdown(f"# MergeVQ\n{_description(tokenizer)}")
        _reconstruction_tab(gradio, tokenizer, folder)
        if pair is not None:
            _sample_tab(gradio, pair, folder)
        if neighbours is not None:
            _neighbour_tab(gradio, tokenizer, neighbours, folder)
    return page


# --------------------------------------------------------------------------------------- tabs


def _reconstruction_tab(gradio: ModuleType, tokenizer: Tokenizer, folder: Path) -> None:
    """A picture, a slider, and what comes back."""

    # The slider does not run the stem again.
    @lru_cache(1)
    def embedded(file: str | None) -> EmbeddedImage:
        return embed_image(tokenizer, _opened(file), size_policy="resize")

    def shown(file: str | None, num_kept: float | int) -> list[str]:
        *pictures, text = reconstruct(tokenizer, embedded(file), int(num_kept))
        return [*(_saved(picture, folder) for picture in pictures), text]

    config = tokenizer.config
    least = config.reducer.least_kept((config.grid_size, config.grid_size))
    with gradio.Tab("Reconstruct"):
        with gradio.Row():
            picture = _picture_input(gradio)
            with gradio.Column():
                num_kept = gradio.Slider(
                    least, config.num_tokens, value=config.num_kept, step=1, label="tokens"
                )
                button = gradio.Button("Reconstruct", variant="primary")
                text = gradio.Markdown()
        names = ("as the model sees it", "merge map", "given source", "recovered source")
        with gradio.Row():
            outputs = [
                gradio.Image(
                    label=name,
                    type="filepath",
                    interactive=False,
                    buttons=_BUTTONS,
                    min_width=_MIN_WIDTH,
                )
                for name in names
            ]
        call = _or_error(gradio, shown)
        button.click(call, [picture, num_kept], [*outputs, text], api_name="reconstruct")
        num_kept.release(call, [picture, num_kept], [*outputs, text], api_visibility="private")


def _sample_tab(gradio: ModuleType, pair: Pair, folder: Path) -> None:
    """Pictures out of nothing but a class."""
    choices = class_choices(pair)

    def shown(
        name: str, guidance: float | int, num_images: float | int, seed: float | int
    ) -> list[str]:
        chosen = name if name in choices else None
        pictures = draw(pair, chosen, float(guidance), int(num_images), int(seed))
        return [_saved(picture, folder) for picture in pictures]

    with gradio.Tab("Sample"):
        with gradio.Row():
            name = gradio.Dropdown(["all in turn", *choices], label="class")
            guidance = gradio.Slider(1, 8, value=2, step=0.5, label="guidance")
            num_images = gradio.Slider(1, 16, value=8, step=1, label="pictures")
            seed = gradio.Number(0, precision=0, label="seed")
        button = gradio.Button("Sample", variant="primary")
        gallery = _gallery(gradio, "samples")
        inputs = [name, guidance, num_images, seed]
        button.click(_or_error(gradio, shown), inputs, gallery, api_name="sample")


def _neighbour_tab(
    gradio: ModuleType, tokenizer: Tokenizer, neighbours: Neighbours, folder: Path
) -> None:
    """Tab of what the class token finds alike."""

    def shown(file: str | None, count: float | int) -> list[tuple[str, str]]:
        found = nearest(tokenizer, neighbours, _opened(file), int(count))
        return [(_saved(picture, folder), caption) for picture, caption in found]

    num_images = len(neighbours.features)
    with gradio.Tab("Neighbours"):
        with gradio.Row():
            picture = _picture_input(gradio)
            with gradio.Column():
                count = gradio.Slider(
                    1, min(32, num_images), value=min(8, num_images), step=1, label="neighbours"
                )
                button = gradio.Button("Find", variant="primary")
        gallery = _gallery(gradio, f"of {num_images:,} images, with their cosine")
        button.click(_or_error(gradio, shown), [picture, count], gallery, api_name="neighbours")


def _picture_input(gradio: ModuleType) -> Any:  # noqa: ANN401 - of an optional extra
    """A place to drop a picture, of which a tab gets the file as it is."""
    picture = gradio.Image(type="filepath", image_mode=None, label="picture", height=_HEIGHT)

    def path_of(payload: Any) -> str | None:  # noqa: ANN401 - of an optional extra
        return None if payload is None else payload.path

    # Gradio would open the file, in any format that Pillow knows and with pixels of its own.
    picture.preprocess = path_of
    return picture


def _gallery(gradio: ModuleType, label: str) -> Any:  # noqa: ANN401 - of an optional extra
    """A place for many pictures."""
    return gradio.Gallery(
        elem_classes="pictures",
        height="auto",
        label=label,
        interactive=False,
        buttons=_BUTTONS,
    )


def _or_error(gradio: ModuleType, shown: Callable[..., _Shown]) -> Callable[..., _Shown]:
    """A function of a tab that shows on the page what is wrong with its input."""

    @wraps(shown)
    def call(*values: Any) -> _Shown:
        try:
            return shown(*values)
        except ValueError as error:
            raise gradio.Error(str(error), print_exception=False) from error

    return call


def _description(tokenizer: Tokenizer) -> str:
    """One line about a model."""
    config = tokenizer.config
    return (
        f"A tokenizer of {config.image_size} x {config.image_size} pixels: up to "
        f"{config.num_tokens} tokens of {bits_of(config.quantizer.sizes):g} bits, "
        f"{config.num_kept} as a rule."
    )


# ------------------------------------------------------------------------------------- pieces


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


def _opened(file: str | None) -> Image.Image:
    """The picture in a file that was dropped on the page, as every command reads it.

    Raises:
        ValueError: none was, or it cannot be read.
    """
    if file is None:
        raise ValueError("no picture was given; drop one on the page first")
    try:
        return load_picture(file)
    except ValueError as error:
        # The path on this machine says nothing to a reader of the page.
        raise ValueError(str(error).replace(file, Path(file).name)) from error


def _saved(picture: Image.Image, folder: Path) -> str:
    """Path of a picture in a file of its own, which no other answer shares or writes again."""
    descriptor, path = tempfile.mkstemp(suffix=".png", dir=folder)
    with os.fdopen(descriptor, "wb") as file:
        picture.save(file, format="PNG")
    return path


@torch.no_grad()
def _class_tokens(tokenizer: Tokenizer, images: Float[Tensor, "n 3 h w"]) -> Float[Tensor, "n c"]:
    """Class tokens of length 1, on the CPU."""
    features = tokenizer.features(images, stage="merged", pool="class")
    return torch.nn.functional.normalize(features.float(), dim=-1).cpu()


def _enlarged(image: Image.Image) -> Image.Image:
    """A small picture by a whole factor, each pixel a square."""
    factor = max(1, _MIN_SHOWN // max(image.size))
    return image.resize((factor * image.width, factor * image.height), Image.Resampling.NEAREST)
