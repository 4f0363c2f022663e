"""Pictures that a class token finds alike, as the web page shows them."""

from typing import NamedTuple

import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from mergevq.data.batches import eval_batches
from mergevq.data.images import ImageDataset
from mergevq.data.prepare import load_square, to_rgb
from mergevq.demo.tokens import enlarged
from mergevq.runtime.logs import Progress
from mergevq.tokenizer.tokenizer import Tokenizer

_BATCH_SIZE = 64
"""Images whose features are computed at once."""


class Neighbours(NamedTuple):
    """Images that a picture is compared with."""

    dataset: ImageDataset
    features: Float[Tensor, "n c"]
    """Class tokens, of length 1."""


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
        shown.append((enlarged(image), f"{name} {cosine:.3f}".strip()))
    return shown


@torch.no_grad()
def _class_tokens(tokenizer: Tokenizer, images: Float[Tensor, "n 3 h w"]) -> Float[Tensor, "n c"]:
    """Class tokens of length 1, on the CPU."""
    features = tokenizer.features(images, stage="merged", pool="class")
    return torch.nn.functional.normalize(features.float(), dim=-1).cpu()
