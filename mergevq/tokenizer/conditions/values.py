"""Values of a condition: classes of images, or embeddings of texts about them.

An image without one has class -1, or embeddings of zeros.

Shape letters: B images, T embeddings of a text, C channels of one.
"""

from typing import assert_never

import torch
from jaxtyping import Bool, Int64
from torch import Tensor

from mergevq.config import parts as settings
from mergevq.nn.checks import require_finite
from mergevq.tokenizer.seams import Condition


def checked(
    config: settings.Condition, condition: Tensor | None, num_images: int, like: Tensor
) -> Condition | None:
    """A condition where the parts that see it are.

    Args:
        config: of the tokenizer.
        condition: for each image a class from 0, -1 where it is not known, or the embeddings of a
            text, of zeros where there is none; None where the tokenizer has no condition.
        num_images: B.
        like: a weight of the tokenizer.

    Raises:
        ValueError: a condition is missing, there is none to see it, or it is not one for each image
            in the range of the classes or of the sizes of embeddings.
    """
    match config:
        case settings.NoCondition():
            if condition is not None:
                raise ValueError("this tokenizer has no condition; leave `condition` out")
            return None
        case settings.ClassCondition():
            return _checked_classes(config, condition, num_images).to(like.device)
        case settings.TextCondition():
            return _checked_texts(config, condition, num_images).to(like.device, like.dtype)
        case _:
            assert_never(config)


def _checked_classes(
    config: settings.ClassCondition, condition: Tensor | None, num_images: int
) -> Int64[Tensor, "b"]:
    """Classes that exist."""
    expected = f"classes from 0 to {config.num_classes - 1}, -1 where one is not known"
    if condition is None:
        raise ValueError(
            f"this tokenizer needs the class of each image: pass `condition`, {expected}"
        )
    if condition.dtype != torch.int64 or condition.shape != (num_images,):
        raise ValueError(
            f"condition ({_form(condition)}) must be int64 of shape ({num_images},): {expected}"
        )
    if num_images > 0:
        low, high = torch.stack(condition.aminmax()).tolist()
        if low < -1 or high >= config.num_classes:
            raise ValueError(f"condition ({low} to {high}) must be {expected}")
    return condition


def _checked_texts(
    config: settings.TextCondition, condition: Tensor | None, num_images: int
) -> Tensor:
    """Embeddings that are few enough, and finite."""
    most = config.num_embeddings
    expected = f"at most {most} embeddings of {config.dim} channels for each image, zeros for none"
    if condition is None:
        raise ValueError(f"this tokenizer needs a text of each image: pass `condition`, {expected}")
    fits = condition.ndim == 3 and condition.shape[::2] == (num_images, config.dim)
    if not condition.is_floating_point() or not fits or not 1 <= condition.shape[1] <= most:
        raise ValueError(
            f"condition ({_form(condition)}) must be floats of shape ({num_images}, {most}, "
            f"{config.dim}): {expected}"
        )
    require_finite("condition", condition)
    return condition


def _form(condition: Tensor) -> str:
    """Type and shape."""
    return f"{str(condition.dtype).removeprefix('torch.')} of shape {tuple(condition.shape)}"


def condition_of(
    config: settings.Condition, labels: Int64[Tensor, "b"], what: str
) -> Condition | None:
    """The condition of images that come with their classes alone, -1 where there is none.

    Args:
        config: of the tokenizer.
        labels: classes.
        what: reads the images, for the message.

    Raises:
        ValueError: a text is needed.
    """
    match config:
        case settings.NoCondition():
            return None
        case settings.ClassCondition():
            return labels
        case settings.TextCondition():
            raise ValueError(
                f"{what} has the classes of images and no texts, and this tokenizer has a "
                "condition of kind text: give embeddings to Tokenizer from Python, or take "
                "model.condition.kind class"
            )
        case _:
            assert_never(config)


def require_classes(config: settings.Condition, num_classes: int, where: str) -> None:
    """Check that a condition of classes has those of data or of a generator.

    Args:
        config: of the tokenizer.
        num_classes: of the others; 0 when they have none.
        where: those are.

    Raises:
        ValueError: it has others.
    """
    if isinstance(config, settings.ClassCondition) and config.num_classes != num_classes:
        raise ValueError(
            f"model.condition.num_classes of the tokenizer ({config.num_classes}) must be the "
            f"{num_classes} classes of {where}: take data or a generator with those, or train a "
            "tokenizer with others or with model.condition.kind none"
        )


def unknown(config: settings.Condition, num_images: int, like: Tensor) -> Condition | None:
    """The condition of images about which nothing is known; None without a condition."""
    match config:
        case settings.NoCondition():
            return None
        case settings.ClassCondition():
            return torch.full((num_images,), -1, device=like.device)
        case settings.TextCondition():
            return torch.zeros(num_images, 1, config.dim, device=like.device, dtype=like.dtype)
        case _:
            assert_never(config)


def left_out(condition: Condition, dropped: Bool[Tensor, "b"]) -> Condition:
    """The condition without that of some images."""
    if condition.is_floating_point():
        return condition.masked_fill(dropped[:, None, None], 0)
    return condition.masked_fill(dropped, -1)


def wrong_classes(
    config: settings.ClassCondition, classes: Int64[Tensor, "b"], positions: Int64[Tensor, "b"]
) -> Int64[Tensor, "b"]:
    """Another class for each image, each of the others in turn by its position; -1 stays."""
    step = 1 + positions.to(classes.device) % (config.num_classes - 1)
    return torch.where(classes < 0, classes, (classes + step) % config.num_classes)
