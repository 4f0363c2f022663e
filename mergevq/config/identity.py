"""The data that a run, a model or tokens were made from, so that others are not taken for them.

Classes are numbers to a network, and a number means another class in other data. So names of
classes and digests are stored with whatever was learned from them, and compared where it is used.
"""

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

_NUM_NAMED = 5
"""Names of classes in a message, from the first that differs."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Identity:
    """Labelled images, by their names and labels."""

    class_names: tuple[str, ...]
    """One name per class, in label order; empty when the data are unlabelled."""
    labels: str = ""
    """SHA-256 over the labels of the images, in order; empty where it was not kept."""
    images: str = ""
    """SHA-256 over the names and labels of the images, in order; empty where it was not kept."""
    num_images: int = 0
    """Number of images; 0 where it was not kept."""
    tokenizer: str = ""
    """Hash of the tokenizer of their tokens (`runtime.artefacts.tokens_hash`); empty for pixels."""


def identify(names: Iterable[str], labels: Sequence[int], class_names: tuple[str, ...]) -> Identity:
    """Identity of images that are open.

    Args:
        names: of the images, in order.
        labels: class of each, -1 for none.
        class_names: one per class, in label order.
    """
    label_digest, image_digest = hashlib.sha256(), hashlib.sha256()
    for name, label in zip(names, labels, strict=True):
        label_digest.update(f"{label}\n".encode())
        image_digest.update(f"{label} {name}\n".encode(errors="surrogateescape"))
    return Identity(
        class_names=class_names,
        labels=label_digest.hexdigest(),
        images=image_digest.hexdigest(),
        num_images=len(labels),
    )


def class_difference(old: Identity, new: Identity) -> str:
    """How labels of two data sets differ in what they mean; empty if they do not.

    More or fewer images of the same classes are no difference.
    """
    if old.class_names != new.class_names:
        pairs = zip(_padded(old, new), _padded(new, old), strict=True)
        first = next(number for number, (a, b) in enumerate(pairs) if a != b)
        return (
            f"classes from number {first} on are {_some(old, first)} there and "
            f"{_some(new, first)} here"
        )
    known = old.labels and new.labels and old.num_images == new.num_images
    if known and old.labels != new.labels:
        return (
            f"labels of the {new.num_images} images have the digest {old.labels[:12]} there and "
            f"{new.labels[:12]} here"
        )
    return ""


def require_same_classes(old: Identity, new: Identity, *, where: str, way_out: str) -> None:
    """Check that labels mean the same in two data sets.

    Args:
        old: what is there.
        new: what is to be used with it.
        where: what is there, for the message.
        way_out: how to go on, for the message.

    Raises:
        ValueError: they do not; names both.
    """
    if difference := class_difference(old, new):
        raise ValueError(f"{where} was made from other classes: {difference}; {way_out}")


def _padded(one: Identity, other: Identity) -> tuple[str | None, ...]:
    """Names of classes, and None up to the number of the other's."""
    missing = len(other.class_names) - len(one.class_names)
    return (*one.class_names, *(None for _ in range(missing)))


def _some(identity: Identity, first: int) -> str:
    """A few names of classes from one on, with the number of all."""
    names = identity.class_names[first : first + _NUM_NAMED]
    more = ", .." if first + _NUM_NAMED < len(identity.class_names) else ""
    return f"{', '.join(names) or 'none'}{more} (of {len(identity.class_names)})"
