"""Classes of images by a support vector machine that was fitted to real ones.

It judges what a tokenizer or a generator made: the share of images that it takes for what they
should be, beside that of real images which it has not seen.

Shape letters: B images, H and W pixels, F numbers of an image.
"""

import importlib
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int64
from torch import Tensor
from torch.nn import functional

_GREY_SIDE = 8
"""Side of the grey images that are compared, in pixels: that of scikit-learn's digits."""
_AT_ONCE = 64
"""Images whose features are computed at once: a network's layers take hundreds of megabytes."""
Features = Callable[[Float[Tensor, "b 3 h w"]], Float[Tensor, "b f"]]
"""Numbers of images in [-1, 1]."""


def grey_pixels(image: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b f"]:
    """Images as 8 x 8 grey pixels in rows."""
    grey = image.mean(1, keepdim=True)
    return functional.adaptive_avg_pool2d(grey, _GREY_SIDE).flatten(1)


class Judge(NamedTuple):
    """A fitted classifier."""

    features: Features
    machine: Any
    """scikit-learn's, fitted."""

    def accuracy(self, image: Float[Tensor, "b 3 h w"], label: Int64[Tensor, "b"]) -> float:
        """Share of images in [-1, 1] that are taken for their classes."""
        rows = _rows(self.features, image).numpy()
        return float((self.machine.predict(rows) == label.cpu().numpy()).mean())


def fit_judge(
    images: Iterable[tuple[Float[Tensor, "_ 3 _ _"], Int64[Tensor, "_"]]],
    features: Features = grey_pixels,
) -> Judge:
    """Fit a classifier to real images, with scikit-learn's own settings.

    Args:
        images: batches of any size in [-1, 1], with their classes.
        features: numbers by which images are compared.
    """
    batches = [(_rows(features, image), label.cpu()) for image, label in images]
    rows, labels = (torch.cat(part).numpy() for part in zip(*batches, strict=True))
    return Judge(features, importlib.import_module("sklearn.svm").SVC().fit(rows, labels))


def _rows(features: Features, image: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b f"]:
    """Numbers of images, on the CPU."""
    return torch.cat([features(part).float().cpu() for part in image.split(_AT_ONCE)])
