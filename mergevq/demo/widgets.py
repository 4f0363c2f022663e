"""Pieces that several tabs of the web page have: places for pictures, and what lies behind them."""

import os
import re
import tempfile
from collections.abc import Callable, Generator, Sequence
from functools import wraps
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple, TypeVar, no_type_check

from PIL import Image, ImageChops

from mergevq.data.prepare import decode, load_picture

_MAX_MASK_PIXELS = 2**24
"""Pixels of a mask, width times height."""
_MIN_WIDTH = 140
"""Pixels of the page that an answer needs: two fit beside each other on a phone."""
_HEIGHT = 280
"""Pixels of the page that the picture to drop takes, however small it is."""
_THUMBNAIL = 64
"""Pixels of the page that a side of a picture to click on takes."""
_BUTTONS = ("download",)
"""On a picture; another of gradio's shares it with the world, and a third hides the label."""
_LABEL = 30
"""Pixels of the page that a label takes, so that it covers no picture."""
STYLE = f"""
.pictures .grid-wrap, .specimens .grid-wrap {{
  min-height: 0 !important; max-height: none !important; height: auto !important;
}}
.pictures .grid-container, .specimens .grid-container {{ padding-top: {_LABEL}px !important; }}
.pictures .grid-container {{
  grid-template-columns: repeat(auto-fill, minmax(clamp(90px, 18vw, 130px), 1fr)) !important;
}}
.pictures {{ min-height: 160px; }}
.still img, .pictures img, .specimens img, .dropped img, .swipe img {{
  image-rendering: pixelated;
}}
.answers {{
  display: grid !important; gap: var(--layout-gap); align-items: start;
  grid-template-columns: repeat(auto-fill, minmax(max({_MIN_WIDTH}px, 18%), 1fr));
}}
.still .image-container {{ padding-top: {_LABEL}px; }}
.still img {{ width: 100%; aspect-ratio: 1; object-fit: contain; }}
.dropped img {{ height: 100%; width: 100%; object-fit: contain; }}
.specimens .grid-container {{
  grid-template-columns: repeat(4, {_THUMBNAIL}px) !important; gap: 8px;
  grid-auto-rows: {_THUMBNAIL}px !important; height: auto !important;
}}
.specimens .thumbnail-item, .specimens .gallery-item {{
  width: {_THUMBNAIL}px; height: {_THUMBNAIL}px;
}}
.specimens img {{ width: {_THUMBNAIL}px; height: {_THUMBNAIL}px; object-fit: cover; }}
.swipe {{ max-width: 520px; }}
.drawn .html-container {{ padding: {_LABEL}px 0 8px !important; }}
@media (max-width: 480px) {{
  .tab-container button {{ padding: 0 6px !important; }}
}}
"""
"""As many pictures beside each other as there is room for: three on a phone."""

_Shown = TypeVar("_Shown")


class Place(NamedTuple):
    """Parts of the page that every tab takes."""

    gradio: ModuleType
    folder: Path
    """Where pictures lie that the page shows."""
    specimens: Sequence[str]
    """Files of the pictures to click on."""


def picture_input(place: Place) -> Any:  # noqa: ANN401 - of an optional extra
    """A place to drop a picture or click on one, of which a tab gets the file as it is."""
    gradio = place.gradio
    with gradio.Column(min_width=2 * _MIN_WIDTH):
        picture = gradio.Image(
            place.specimens[0] if place.specimens else None,
            type="filepath",
            image_mode=None,
            label="picture",
            height=_HEIGHT,
            sources=["upload", "clipboard"],
            elem_classes="dropped",
        )
        gallery = gradio.Gallery(
            list(place.specimens),
            label="or one of these pictures",
            columns=len(place.specimens) or 1,
            height="auto",
            allow_preview=False,
            interactive=False,
            buttons=[],
            elem_classes="specimens",
        )

    def path_of(payload: Any) -> str | None:  # noqa: ANN401 - of an optional extra
        return None if payload is None else payload.path

    # Gradio would open the file, in any format that Pillow knows and with pixels of its own.
    picture.preprocess = path_of

    def clicked(event: Any) -> str:  # noqa: ANN401 - of an optional extra
        number: int = event.index
        return place.specimens[number]

    # Gradio gives an event only to a parameter that it can see is one.
    clicked.__annotations__["event"] = gradio.SelectData
    gallery.select(clicked, None, picture, api_visibility="private", show_progress="hidden")
    return picture


def still(place: Place, label: str) -> Any:  # noqa: ANN401 - of an optional extra
    """A place for one picture of an answer."""
    return place.gradio.Image(
        label=label,
        type="filepath",
        interactive=False,
        buttons=_BUTTONS,
        min_width=_MIN_WIDTH,
        elem_classes="still",
    )


def gallery(place: Place, label: str) -> Any:  # noqa: ANN401 - of an optional extra
    """A place for many pictures."""
    return place.gradio.Gallery(
        elem_classes="pictures",
        height="auto",
        label=label,
        interactive=False,
        buttons=_BUTTONS,
    )


def mask_editor(place: Place, side: int) -> Any:  # noqa: ANN401 - of an optional extra
    """A place to paint on a picture, of which a tab gets what was painted: white on black.

    Args:
        place: in the page.
        side: of the picture in pixels.
    """
    gradio = place.gradio
    editor = gradio.ImageEditor(
        label="paint on it",
        sources=(),
        transforms=(),
        layers=False,
        format="png",
        canvas_size=(side, side),
        fixed_canvas=True,
        brush=gradio.Brush(default_size=side // 8, colors=["#d6006e"], color_mode="fixed"),
        buttons=[],
        elem_classes="editor",
    )

    def painted(payload: Any) -> Image.Image | None:  # noqa: ANN401 - of an optional extra
        if payload is None:
            return None
        # The browser sends the layers in a message before, and then the name of that message.
        parts = editor.blob_storage.pop(payload.id, None) if payload.id else payload
        layers = [] if parts is None else parts.layers
        contents = [
            each if isinstance(each, bytes) else Path(each.path).read_bytes()
            for each in layers
            if each is not None
        ]
        return painted_mask(contents)

    editor.preprocess = painted
    return editor


def painted_mask(layers: Sequence[bytes]) -> Image.Image | None:
    """Which pixels of transparent layers are painted, in any colour but white: white on black.

    Raises:
        ValueError: a layer is no picture, or far too large.
    """
    mask, painted_or_not = None, [0] + 255 * [255]
    for layer in layers:
        # What is transparent becomes white.
        picture = decode(layer, max_pixels=_MAX_MASK_PIXELS)
        white = Image.new("RGB", picture.size, (255, 255, 255))
        painted = ImageChops.difference(picture, white).convert("L").point(painted_or_not)
        mask = painted if mask is None else ImageChops.lighter(mask, painted)
    return mask


def or_error(gradio: ModuleType, shown: Callable[..., _Shown]) -> Callable[..., _Shown]:
    """A function of a tab that shows on the page what is wrong with its input."""

    @wraps(shown)
    def call(*values: Any) -> _Shown:
        try:
            return shown(*values)
        except ValueError as error:
            raise gradio.Error(str(error), print_exception=False) from error

    return call


def each_or_error(
    gradio: ModuleType, shown: Callable[..., Generator[_Shown, None, None]]
) -> Callable[..., Generator[_Shown, None, None]]:
    """The same of a function that has several answers, one after the other."""

    # Gradio looks whether it is a generator; a checker of types would hide that.
    @no_type_check
    @wraps(shown)
    def call(*values: Any) -> Generator[_Shown, None, None]:
        try:
            yield from shown(*values)
        except ValueError as error:
            raise gradio.Error(str(error), print_exception=False) from error

    return call


def opened(file: str | None) -> Image.Image:
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


def saved(picture: Image.Image, folder: Path) -> str:
    """Path of a picture in a file of its own, which no other answer shares or writes again."""
    descriptor, path = tempfile.mkstemp(suffix=".png", dir=folder)
    with os.fdopen(descriptor, "wb") as file:
        picture.save(file, format="PNG")
    return path


def saved_bytes(content: bytes, folder: Path, name: str) -> str:
    """Path of a file of this name, alone in a folder.

    Args:
        content: of the file.
        folder: where its folder is made.
        name: anything; characters that a file's name may lack are left out.
    """
    place = Path(tempfile.mkdtemp(dir=folder)) / (re.sub(r"[^\w.-]", "", name) or "file")
    place.write_bytes(content)
    return str(place)
