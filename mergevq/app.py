"""The web page: try a model on pictures, without writing a line.

One tab for each thing a model does. The functions behind the tabs need no browser; the page itself
needs the `demo` extra.
"""

import importlib
import logging
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from mergevq.codec import reconstruct_image
from mergevq.config_generator import SampleRun, SamplingSettings
from mergevq.data import eval_batches, load_square
from mergevq.decoding import to_rgb
from mergevq.extras import needing
from mergevq.generation import Pair, generate, load_pair
from mergevq.images import ImageDataset, open_images
from mergevq.pictures import to_pil
from mergevq.run import Progress, resolve_device
from mergevq.tokenizer import Tokenizer

logger = logging.getLogger("mergevq")

TOY = Path(__file__).parent / "toy"
"""What `make quickstart` trained: a tokenizer of handwritten digits and its generator."""
TOY_DATA = "digits"
"""What they were trained on, which scikit-learn brings: nothing is fetched."""
_BATCH_SIZE = 64
"""Images whose features are computed at once."""
_MIN_SHOWN = 256
"""Pixels a side that a picture is enlarged to at least, by a whole factor."""


class Reconstructed(NamedTuple):
    """What the first tab shows."""

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


def reconstruct(tokenizer: Tokenizer, picture: Image.Image | None, num_kept: int) -> Reconstructed:
    """Encode a picture, resized as in training, with K tokens and decode it again.

    Raises:
        ValueError: there is no picture, or K is not legal for it.
    """
    result = reconstruct_image(tokenizer, _given(picture), num_kept, size_policy="resize")
    bits = result.bits
    text = (
        f"{result.num_tokens} of {result.num_cells} tokens. {bits.tokens:.0f} bits of tokens and "
        f"{bits.source:.0f} of source map, {result.bits_per_pixel:.3f} per pixel. PSNR "
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
    tokenizer: Tokenizer, neighbours: Neighbours, picture: Image.Image | None, count: int
) -> list[tuple[Image.Image, str]]:
    """The images most like a picture, by the cosine of their class tokens, and what they are.

    Raises:
        ValueError: there is no picture, or fewer images than asked for.
    """
    count = int(count)
    if not 1 <= count <= len(neighbours.features):
        raise ValueError(
            f"count ({count}) must be between 1 and the {len(neighbours.features)} images there are"
        )
    square = load_square(to_rgb(_given(picture)), tokenizer.config.image_size)
    query = _class_tokens(tokenizer, square[None].to(next(tokenizer.parameters()).device))
    cosines, found = (neighbours.features @ query[0]).topk(count)
    shown = []
    for position, cosine in zip(found.tolist(), cosines.tolist(), strict=True):
        label = neighbours.dataset.label(position)
        name = neighbours.dataset.class_names[label] if label >= 0 else ""
        image = neighbours.dataset.read(position)
        shown.append((_enlarged(image), f"{name} {cosine:.3f}".strip()))
    return shown


def build_page(
    model: str | Path | None, *, generator: str | Path | None, data: str | None, device: str
) -> Any:  # noqa: ANN401 - of an optional extra
    """The page, not yet served: call `launch` of what is returned.

    Args:
        model: a tokenizer's directory, or owner/name@revision on Hugging Face; None is the
            quickstart's, which comes with the package, its generator and its digits.
        generator: the same of a generator trained on its tokens; None leaves that tab out.
        data: images to find neighbours among; None leaves that tab out. The quickstart's digits
            are left out, and a warning says so, where scikit-learn is not installed.
        device: where to compute.

    Raises:
        ValueError: a model or the data are not there.
        RuntimeError: the `demo` extra is not installed.
    """
    gradio = _gradio()
    place = resolve_device(device)
    dataset = None if data is None else open_images(data)
    if model is None:
        model, generator = TOY / "tokenizer", generator or TOY / "generator"
        dataset = _toy_dataset() if dataset is None else dataset
    tokenizer = Tokenizer.from_pretrained(model).to(place).eval()
    pair = None if generator is None else load_pair(generator, model, place)
    neighbours = None if dataset is None else index(tokenizer, dataset)
    with gradio.Blocks(title="MergeVQ", analytics_enabled=False) as page:
        gradio.Markdown(f"# MergeVQ\n{_description(tokenizer)}")
        _reconstruction_tab(gradio, tokenizer)
        if pair is not None:
            _sample_tab(gradio, pair)
        if neighbours is not None:
            _neighbour_tab(gradio, tokenizer, neighbours)
    return page


# --------------------------------------------------------------------------------------- tabs


def _reconstruction_tab(gradio: ModuleType, tokenizer: Tokenizer) -> None:
    """A picture, a slider, and what comes back."""

    def shown(picture: Image.Image | None, num_kept: float | int) -> Sequence[Image.Image | str]:
        return _or_error(gradio, lambda: reconstruct(tokenizer, picture, int(num_kept)))

    config = tokenizer.config
    least = -(-config.num_tokens // 2**config.num_layers)
    with gradio.Tab("Reconstruct"):
        with gradio.Row():
            picture = gradio.Image(type="pil", label="picture")
            num_kept = gradio.Slider(
                least, config.num_tokens, value=config.num_kept, step=1, label="tokens"
            )
        names = ("as the model sees it", "merge map", "given source", "recovered source")
        with gradio.Row():
            outputs = [gradio.Image(type="pil", label=name) for name in names]
        text = gradio.Markdown()
        button = gradio.Button("Reconstruct", variant="primary")
        button.click(shown, [picture, num_kept], [*outputs, text], api_name="reconstruct")
        num_kept.release(shown, [picture, num_kept], [*outputs, text], api_name=False)


def _sample_tab(gradio: ModuleType, pair: Pair) -> None:
    """Pictures out of nothing but a class."""
    choices = class_choices(pair)

    def shown(
        name: str, guidance: float | int, num_images: float | int, seed: float | int
    ) -> list[Image.Image]:
        chosen = name if name in choices else None
        return _or_error(
            gradio, lambda: draw(pair, chosen, float(guidance), int(num_images), int(seed))
        )

    with gradio.Tab("Sample"):
        with gradio.Row():
            name = gradio.Dropdown(["all in turn", *choices], label="class")
            guidance = gradio.Slider(1, 8, value=2, step=0.5, label="guidance")
            num_images = gradio.Slider(1, 16, value=8, step=1, label="pictures")
            seed = gradio.Number(0, precision=0, label="seed")
        gallery = gradio.Gallery(columns=8, label="samples")
        button = gradio.Button("Sample", variant="primary")
        button.click(shown, [name, guidance, num_images, seed], gallery, api_name="sample")


def _neighbour_tab(gradio: ModuleType, tokenizer: Tokenizer, neighbours: Neighbours) -> None:
    """What the class token finds alike."""

    def shown(picture: Image.Image | None, count: float | int) -> list[tuple[Image.Image, str]]:
        return _or_error(gradio, lambda: nearest(tokenizer, neighbours, picture, int(count)))

    num_images = len(neighbours.features)
    with gradio.Tab("Neighbours"):
        with gradio.Row():
            picture = gradio.Image(type="pil", label="picture")
            count = gradio.Slider(
                1, min(32, num_images), value=min(8, num_images), step=1, label="neighbours"
            )
        gallery = gradio.Gallery(columns=8, label=f"of {num_images:,} images, with their cosine")
        button = gradio.Button("Find", variant="primary")
        button.click(shown, [picture, count], gallery, api_name="neighbours")


def _or_error(gradio: ModuleType, call: Any) -> Any:  # noqa: ANN401 - whatever a tab shows
    """What is wrong with the input is shown on the page."""
    try:
        return call()
    except ValueError as error:
        raise gradio.Error(str(error)) from error


def _description(tokenizer: Tokenizer) -> str:
    """One line about a model."""
    config = tokenizer.config
    return (
        f"A tokenizer of {config.image_size} x {config.image_size} pixels: up to "
        f"{config.num_tokens} tokens of {config.num_bits} bits, {config.num_kept} as a rule."
    )


# ------------------------------------------------------------------------------------- pieces


def _gradio() -> ModuleType:
    """The package of the `demo` extra, told to keep to this machine.

    Raises:
        RuntimeError: it is not installed.
    """
    # It reads this when it is imported, launched and in trouble, and would ask its makers' server
    # for messages and newer versions, and report.
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # noqa: TID251 - it has no other switch
    with needing("demo", "the web page"):
        return importlib.import_module("gradio")


def _toy_dataset() -> ImageDataset | None:
    """The digits that the models of the package know; None without scikit-learn."""
    try:
        return open_images(TOY_DATA)
    except RuntimeError as error:
        logger.warning("the page has no neighbours: %s", error)
        return None


def _given(picture: Image.Image | None) -> Image.Image:
    """A picture that may have been forgotten.

    Raises:
        ValueError: it was.
    """
    if picture is None:
        raise ValueError("no picture was given; drop one on the page first")
    return picture


@torch.no_grad()
def _class_tokens(tokenizer: Tokenizer, images: Float[Tensor, "n 3 h w"]) -> Float[Tensor, "n c"]:
    """Class tokens of length 1, on the CPU."""
    features = tokenizer.features(images, stage="merged", pool="class")
    return torch.nn.functional.normalize(features.float(), dim=-1).cpu()


def _enlarged(image: Image.Image) -> Image.Image:
    """A small picture by a whole factor, each pixel a square."""
    factor = max(1, _MIN_SHOWN // max(image.size))
    return image.resize((factor * image.width, factor * image.height), Image.Resampling.NEAREST)
