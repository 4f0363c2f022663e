"""Tabs of the web page in which a generator draws: pictures of a class, and parts of pictures."""

from collections.abc import Callable, Generator, Sequence
from itertools import zip_longest
from typing import Any

from PIL import Image

from mergevq.demo.drawing import (
    class_choices,
    compared,
    draw,
    draw_with_both_caches,
    edit,
    square,
)
from mergevq.demo.tokens import enlarged
from mergevq.demo.widgets import (
    Place,
    each_or_error,
    gallery,
    mask_editor,
    opened,
    or_error,
    picture_input,
    saved,
)
from mergevq.generator.generation import Pair

_ALL = "all in turn"
_Pictures = list[str]


def generate_tab(place: Place, pairs: Sequence[Pair]) -> None:
    """Pictures out of nothing but a class, shown while they come; orders side by side.

    Args:
        place: in the page.
        pairs: generators of one tokenizer; classes are chosen by the names of the first.
    """
    gradio = place.gradio
    choices = class_choices(pairs[0])

    def shown(
        name: str, guidance: float | int, num_images: float | int, seed: float | int
    ) -> Generator[Any, None, None]:
        chosen = name if name in choices else None
        drawn = [draw(pair, chosen, float(guidance), int(num_images), int(seed)) for pair in pairs]
        latest: list[_Pictures] = [[] for _ in pairs]
        for pictures in zip_longest(*drawn):
            for number, each in enumerate(pictures):
                if each is not None:
                    latest[number] = [saved(picture, place.folder) for picture in each]
            yield latest[0] if len(pairs) == 1 else tuple(latest)

    with gradio.Tab("Generate"):
        name, guidance, num_images, seed = _controls(place, choices, num_images=8)
        with gradio.Row():
            button = gradio.Button("Generate", variant="primary")
            stop = gradio.Button("Stop", variant="stop")
        with gradio.Row():
            shelves = []
            for number, pair in enumerate(pairs, start=1):
                which = f"generator {number}, " if len(pairs) > 1 else ""
                order = pair.generator.config.order.kind
                with gradio.Column(min_width=280):
                    shelves.append(gallery(place, f"{which}order '{order}'"))
        event = button.click(
            each_or_error(gradio, shown),
            [name, guidance, num_images, seed],
            shelves,
            api_name="sample",
            show_progress="minimal",
        )
        stop.click(None, None, None, cancels=[event], api_visibility="private")
        orders = [pair.generator.config.order.kind for pair in pairs]
        if "merge" in orders:
            _caches(place, pairs[orders.index("merge")], [name, guidance, num_images, seed])


def _caches(place: Place, pair: Pair, controls: Sequence[Any]) -> None:
    """Pictures of MergeAR with its compressed cache and with a full one, and what both take."""
    gradio, choices = place.gradio, class_choices(pair)

    def shown(
        name: str, guidance: float | int, num_images: float | int, seed: float | int
    ) -> Generator[tuple[_Pictures, _Pictures, str], None, None]:
        chosen = name if name in choices else None
        for both in draw_with_both_caches(
            pair, chosen, float(guidance), int(num_images), int(seed)
        ):
            small, full = ([saved(each, place.folder) for each in way.pictures] for way in both)
            yield small, full, compared(*both)

    gradio.Markdown(
        "MergeAR keeps one place in its cache for each distinct token, not one for each cell. "
        "The same pictures with its compressed cache and with a full one:"
    )
    with gradio.Row():
        button = gradio.Button("Compare caches")
        stop = gradio.Button("Stop comparing", variant="stop")
    text = gradio.Markdown()
    with gradio.Row():
        shelves = []
        for label in ("compressed cache", "full cache"):
            with gradio.Column(min_width=280):
                shelves.append(gallery(place, label))
    event = button.click(
        each_or_error(gradio, shown),
        list(controls),
        [*shelves, text],
        api_name="caches",
        show_progress="minimal",
    )
    stop.click(None, None, None, cancels=[event], api_visibility="private")


def edit_tab(place: Place, pairs: Sequence[Pair], page: Any) -> None:  # noqa: ANN401 - of an optional extra
    """A picture of which the painted part is made anew, where a generator can do that."""
    gradio = place.gradio
    pair = next((each for each in pairs if each.generator.config.order.fills_in), None)
    if pair is None:
        orders = " and ".join(f"`{each.generator.config.order.kind}`" for each in pairs)
        with gradio.Tab("Edit"):
            gradio.Markdown(
                "Parts of a picture are made anew by a generator of order `random`, which sees "
                f"tokens before and behind; this page has {orders or 'none'}."
            )
        return
    choices = class_choices(pair)
    image_size = pair.tokenizer.config.image_size
    side = enlarged(Image.new("1", (image_size, image_size))).width

    put_up, shown = _editing(place, pair)
    with gradio.Tab("Edit"):
        with gradio.Row():
            picture = picture_input(place)
            editor = mask_editor(place, side)
        controls = _controls(place, choices, num_images=4)
        button = gradio.Button("Make anew what is painted", variant="primary")
        pictures = gallery(place, "the picture with new parts")
        gradio.on(
            [picture.change, page.load],
            or_error(gradio, put_up),
            picture,
            editor,
            api_visibility="private",
            show_progress="hidden",
        )
        button.click(
            or_error(gradio, shown), [picture, editor, *controls], pictures, api_name="edit"
        )


def _editing(
    place: Place, pair: Pair
) -> tuple[Callable[..., dict[str, Any] | None], Callable[..., _Pictures]]:
    """A function that puts a picture up to be painted on, and one that makes parts anew."""
    choices = class_choices(pair)

    def put_up(file: str | None) -> dict[str, Any] | None:
        if file is None:
            return None
        return {
            "background": saved(square(pair, opened(file)), place.folder),
            "layers": [],
            "composite": None,
        }

    def shown(
        file: str | None,
        mask: Image.Image | None,
        *numbers: Any,
    ) -> _Pictures:
        name, guidance, num_images, seed = numbers
        picture = square(pair, opened(file))
        if mask is None:
            mask = Image.new("L", picture.size)
        pictures = edit(
            pair,
            picture,
            mask.resize(picture.size, Image.Resampling.NEAREST),
            name if name in choices else None,
            guidance=float(guidance),
            num_images=int(num_images),
            seed=int(seed),
        )
        return [saved(each, place.folder) for each in pictures]

    return put_up, shown


def _controls(place: Place, choices: Sequence[str], *, num_images: int) -> tuple[Any, ...]:
    """Class, guidance, number of pictures and seed."""
    gradio = place.gradio
    with gradio.Row():
        return (
            gradio.Dropdown([_ALL, *choices], label="class", visible=bool(choices)),
            gradio.Slider(1, 8, value=2 if choices else 1, step=0.5, label="guidance"),
            gradio.Slider(1, 16, value=num_images, step=1, label="pictures"),
            gradio.Number(0, precision=0, label="seed"),
        )
