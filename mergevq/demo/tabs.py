"""Tabs of the web page about pictures that are there: their tokens, two of them, and their like."""

from collections.abc import Callable
from functools import lru_cache
from typing import Any

from mergevq.demo.merge_svg import SCRIPT
from mergevq.demo.merge_svg import STYLE as MAP_STYLE
from mergevq.demo.neighbours import Neighbours, nearest
from mergevq.demo.tokens import AMPLIFIED, decoded, show
from mergevq.demo.widgets import (
    Place,
    gallery,
    opened,
    or_error,
    picture_input,
    saved,
    saved_bytes,
    still,
)
from mergevq.metrics.lpips import Perceptual
from mergevq.runtime.environment import missing
from mergevq.tokenizer.codec import EmbeddedImage, embed_image
from mergevq.tokenizer.compressed import ENDING, PictureCodec
from mergevq.tokenizer.tokenizer import Tokenizer


def tokens_tab(place: Place, page: Any, codec: PictureCodec, perceptual: Perceptual | None) -> None:  # noqa: ANN401 - of an optional extra
    """A picture, a slider, and what comes back, at once and whenever one of them changes."""
    gradio = place.gradio
    shown, nothing = _tokens_of(place, codec, perceptual)
    has_maps = codec.tokenizer.has_maps
    with gradio.Tab("Tokens"):
        with gradio.Row():
            picture = picture_input(place)
            with gradio.Column(min_width=280):
                num_kept = _kept_slider(place, codec.tokenizer, "tokens")
                text = gradio.Markdown()
                times = gradio.Markdown()
                download = gradio.DownloadButton(
                    f"Download the tokens as {ENDING}",
                    interactive=False,
                    visible=not missing("codec"),
                    size="md",
                )
        with gradio.Row(elem_classes="answers"):
            original = still(place, "as the model sees it")
            with gradio.Column(min_width=140, visible=has_maps):
                drawing = gradio.HTML(
                    label="merge map: point at it",
                    show_label=True,
                    container=True,
                    js_on_load=SCRIPT,
                    css_template=MAP_STYLE,
                    elem_classes="drawn",
                )
            given = still(place, "given source")
            recovered = still(place, "recovered source")
            recovered.visible = has_maps
            difference = still(place, f"difference, {AMPLIFIED} times")
        outputs = [original, given, recovered, difference, drawing, text, times, download]
        asked = gradio.on(
            [picture.change, num_kept.change, page.load],
            or_error(gradio, shown),
            [picture, num_kept],
            outputs,
            api_name="reconstruct",
            trigger_mode="always_last",
            show_progress="hidden",
        )
        asked.failure(nothing, None, outputs, api_visibility="private", show_progress="hidden")


def _tokens_of(
    place: Place, codec: PictureCodec, perceptual: Perceptual | None
) -> tuple[Callable[..., list[Any]], Callable[[], list[Any]]]:
    """A function that fills the first tab, and one that empties it."""
    gradio = place.gradio
    embedded = _stem(codec)

    def shown(file: str | None, num_kept: float | int) -> list[Any]:
        if file is None:
            return nothing()
        found = show(codec, embedded(file), int(num_kept), perceptual)
        pictures = [found.original, found.given, found.recovered, found.difference]
        name = f"picture_{int(num_kept)}{ENDING}"
        download = gradio.DownloadButton(
            value=None if found.file is None else saved_bytes(found.file, place.folder, name),
            interactive=found.file is not None,
        )
        return [
            *(None if each is None else saved(each, place.folder) for each in pictures),
            found.merge_map,
            found.text,
            found.times,
            download,
        ]

    def nothing() -> list[Any]:
        # What was shown is not of the picture that is there now, or is not.
        download = gradio.DownloadButton(value=None, interactive=False)
        return [None, None, None, None, "", "", "", download]

    return shown, nothing


def compare_tab(place: Place, page: Any, first: PictureCodec, second: PictureCodec | None) -> None:  # noqa: ANN401 - of an optional extra
    """A picture at two numbers of tokens, or by two models, one over the other."""
    gradio = place.gradio
    left_stem = _stem(first)
    right_codec = second or first
    right_stem = left_stem if second is None else _stem(second)

    def shown(
        file: str | None, left_kept: float | int, right_kept: float | int
    ) -> tuple[tuple[str, str] | None, str]:
        if file is None:
            return nothing()
        left, left_text = decoded(first, left_stem(file), int(left_kept))
        right, right_text = decoded(right_codec, right_stem(file), int(right_kept))
        pair = saved(left, place.folder), saved(right.resize(left.size, 0), place.folder)
        return pair, f"Left: {left_text}.\n\nRight: {right_text}."

    def nothing() -> tuple[None, str]:
        return None, ""

    with gradio.Tab("Compare"), gradio.Row():
        picture = picture_input(place)
        with gradio.Column(min_width=280):
            least, most, nominal = _kept_range(first.tokenizer)
            left_kept = gradio.Slider(least, most, value=least, step=1, label="tokens on the left")
            least, most, nominal = _kept_range(right_codec.tokenizer)
            right_kept = gradio.Slider(
                least,
                most,
                value=nominal,
                step=1,
                label="tokens on the right"
                + ("" if second is None else ", of the model to compare with"),
            )
            text = gradio.Markdown()
        swipe = gradio.ImageSlider(
            label="left and right, with the given source: drag the line",
            type="filepath",
            interactive=False,
            buttons=["download"],
            elem_classes="swipe",
        )
        outputs = [swipe, text]
        asked = gradio.on(
            [picture.change, left_kept.change, right_kept.change, page.load],
            or_error(gradio, shown),
            [picture, left_kept, right_kept],
            outputs,
            api_name="compare",
            trigger_mode="always_last",
            show_progress="hidden",
        )
        asked.failure(nothing, None, outputs, api_visibility="private", show_progress="hidden")


def search_tab(place: Place, tokenizer: Tokenizer, neighbours: Neighbours) -> None:
    """Pictures that the class token finds alike."""
    gradio = place.gradio

    def shown(file: str | None, count: float | int) -> list[tuple[str, str]]:
        found = nearest(tokenizer, neighbours, opened(file), int(count))
        return [(saved(picture, place.folder), caption) for picture, caption in found]

    num_images = len(neighbours.features)
    with gradio.Tab("Search"):
        with gradio.Row():
            picture = picture_input(place)
            with gradio.Column(min_width=280):
                count = gradio.Slider(
                    1, min(32, num_images), value=min(8, num_images), step=1, label="neighbours"
                )
                button = gradio.Button("Find", variant="primary")
        found = gallery(place, f"of {num_images:,} images, with their cosine")
        button.click(or_error(gradio, shown), [picture, count], found, api_name="neighbours")


def _stem(codec: PictureCodec) -> Any:  # noqa: ANN401 - a cached function
    """A function of a file that runs the stem once, not again for each number of tokens."""

    @lru_cache(1)
    def embedded(file: str | None) -> EmbeddedImage:
        return embed_image(codec.tokenizer, opened(file), size_policy="resize")

    return embedded


def _kept_slider(place: Place, tokenizer: Tokenizer, label: str) -> Any:  # noqa: ANN401 - of an optional extra
    """A slider of the K that are legal."""
    least, most, nominal = _kept_range(tokenizer)
    return place.gradio.Slider(least, most, value=nominal, step=1, label=label)


def _kept_range(tokenizer: Tokenizer) -> tuple[int, int, int]:
    """Least K that is legal and that the tokenizer was trained with, largest and nominal K."""
    config = tokenizer.config
    shape = (config.grid_size, config.grid_size)
    least = config.kept_by.least_kept(shape)
    if config.kept_range is not None:
        least = max(least, config.kept_range[0])
    return least, config.most_kept(shape), config.num_kept
