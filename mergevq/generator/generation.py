"""Images from a generator and its tokenizer: sampling, and in-painting.

Image k depends on (seed, k) alone; but the last bits of a product may depend on how many images are
computed at once, and with weights of fewer bits they decide more often. `generator/writing.py`
writes folders of them.

Shape letters: B images, L grid cells, K kept tokens, S image side.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int64
from PIL import Image
from torch import Tensor
from torch.nn import functional

from mergevq.config.base import Precision
from mergevq.config.generator import SampleRun, SamplingSettings
from mergevq.data.layouts import Source
from mergevq.data.prepare import crop_square, load_square, to_tensor
from mergevq.generator.build import AnyGenerator, saved_generator
from mergevq.generator.drafts.pairing import with_draft
from mergevq.generator.sampling import inpaint, sample
from mergevq.generator.seams import Sampled, Sequences
from mergevq.generator.weights import as_weights, logit_error
from mergevq.runtime.artefacts import load_model, model_hash, read_record, resolve, tokens_hash
from mergevq.runtime.device import decoded_at_once
from mergevq.runtime.random import BatchNumbers
from mergevq.tokenizer.conditions.values import condition_of, require_classes
from mergevq.tokenizer.flows.decoder import Noise
from mergevq.tokenizer.tokenizer import Tokenizer

_COMPARED = 4
"""Sequences on which weights of fewer bits are compared with those of the file."""


class Pair(NamedTuple):
    """A generator and the tokenizer of its tokens."""

    generator: AnyGenerator
    """With the weights that sample."""
    tokenizer: Tokenizer
    """In the precision that it was loaded with."""
    generator_hash: str
    tokenizer_hash: str
    class_names: tuple[str, ...]
    """In label order; empty without classes."""
    draft_hash: str | None = None
    """Hash of the generator that drafts for the other, if one does."""


class Origin(NamedTuple):
    """An image of which some tokens stay."""

    indices: Int64[Tensor, "1 k"]
    """Its tokens in canonical order."""
    source: Source
    """Which of them each cell copies."""
    keep: Bool[Tensor, "1 k"]
    """Which of them stay."""


def require_same_tokenizer(wanted: object, tokenizer: str, *, generator: str | Path) -> None:
    """Check that a generator's tokens are those of a tokenizer.

    Args:
        wanted: hash of the tokenizer that the generator was saved with.
        tokenizer: hash of the one at hand (`runtime.artefacts.tokens_hash`).
        generator: where the generator is, for the message.

    Raises:
        ValueError: they are another's.
    """
    if wanted != tokenizer:
        raise ValueError(
            f"the generator in {generator} was trained on tokens of tokenizer {wanted} and this is "
            f"{tokenizer}: a number means another thing to each; give the tokenizer whose tokens "
            "it was trained on"
        )


def known_tokenizer(model: str | Path) -> str:
    """Where the tokenizer of a generator's tokens is, as training wrote it down.

    Args:
        model: directory of the generator, its name in the package, or owner/name@revision on
            Hugging Face.

    Raises:
        ValueError: there is no generator, training wrote nothing, or the tokenizer is not there, or
            is another one now.
    """
    directory = resolve(model)
    extra = read_record(directory).get("extra", {})
    path = extra.get("tokenizer_path")
    if not isinstance(path, str):
        raise ValueError(
            f"the generator in {directory} does not say where its tokenizer is; name it with "
            "--model"
        )
    try:
        require_same_tokenizer(
            extra.get("tokenizer"), tokens_hash(resolve(path)), generator=directory
        )
    except (ValueError, RuntimeError) as error:
        raise ValueError(
            f"{path}, where the generator in {directory} had its tokenizer, has it no longer "
            f"({error}); name it with --model"
        ) from error
    return path


def load_pair(
    model: str | Path,
    tokenizer: str | Path,
    device: torch.device,
    *,
    precision: Precision = "auto",
    decoder: str | Path | None = None,
) -> Pair:
    """Load a generator, with float32 weights, and its tokenizer.

    Args:
        model: directory of the generator, its name in the package, or owner/name@revision on
            Hugging Face.
        tokenizer: the same of the tokenizer of its tokens.
        device: where to compute.
        precision: of the tokenizer's calls; see `Tokenizer.from_pretrained`.
        decoder: what decodes in the place of the tokenizer's own decoder, likewise.

    Raises:
        ValueError: one of them is not there, or the tokenizer is another one's.
    """
    model, tokenizer = resolve(model), resolve(tokenizer)
    saved = load_model(model, kind="generator")
    extra = saved.record["extra"]
    require_same_tokenizer(extra.get("tokenizer"), tokens_hash(tokenizer), generator=model)
    generator = saved_generator(saved).to(device)
    loaded = Tokenizer.from_pretrained(
        tokenizer, precision=precision, device=device, decoder=decoder
    )
    require_classes(
        loaded.config.condition, generator.config.num_classes, f"the generator in {model}"
    )
    return Pair(
        generator=generator,
        tokenizer=loaded,
        generator_hash=model_hash(model),
        tokenizer_hash=model_hash(tokenizer),
        class_names=class_names(extra, generator.config.num_classes, where=model),
    )


def class_names(extra: dict[str, Any], num_classes: int, *, where: Path) -> tuple[str, ...]:
    """Names of the classes, as training wrote them down.

    Raises:
        ValueError: there are some, but not one for each class.
    """
    names = extra.get("class_names", [])
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ValueError(f"class_names of the generator in {where} must be a list of names")
    if len(names) not in (0, num_classes):
        raise ValueError(
            f"class_names of the generator in {where} has {len(names)} names and must have one for "
            f"each of its {num_classes} classes"
        )
    return tuple(names)


def load_run(run: SampleRun, device: torch.device) -> tuple[Pair, float | None]:
    """Load what a run samples with: generator and tokenizer, with the weights it asks for.

    Returns:
        The pair, and the logit error of weights of fewer bits; None for those of the file.

    Raises:
        ValueError: one of them is not there, or the tokenizer is another one's.
        RuntimeError: weights are broken.
    """
    pair = load_pair(run.model, run.tokenizer, device, precision=run.precision, decoder=run.decoder)
    exact = pair.generator
    pair = pair._replace(generator=as_weights(exact, run.weights))
    if run.draft_generator is not None:
        pair = _with_draft(pair, run, device)
    if run.weights == "float32":
        return pair, None
    return pair, _weights_error(exact, pair.generator, run)


def _with_draft(pair: Pair, run: SampleRun, device: torch.device) -> Pair:
    """The same pair, in which another generator, with weights of the same type, drafts."""
    path, other = resolve(run.model), resolve(str(run.draft_generator))
    saved = load_model(other, kind="generator")
    tokenizer = tokens_hash(resolve(run.tokenizer))
    require_same_tokenizer(saved.record["extra"].get("tokenizer"), tokenizer, generator=other)
    draft = as_weights(saved_generator(saved).to(device), run.weights)
    generator = with_draft(pair.generator, draft, names=(path, other))
    return pair._replace(generator=generator, draft_hash=model_hash(other))


def decode_sampled(
    tokenizer: Tokenizer,
    sampled: Sampled,
    grid_shape: tuple[int, int],
    source: Source | None = None,
    noise: Noise | None = None,
    labels: Int64[Tensor, "b"] | None = None,
) -> Float[Tensor, "b 3 h w"]:
    """Turn sampled tokens into images, in [-1, 1].

    A layout that grid and K imply is that one. Otherwise all cells in raster order are decoded as
    they are; kept tokens get the source map that the tokenizer recovers from them and, where there
    are any, their anchors.

    Args:
        tokenizer: in evaluation mode, on any device.
        sampled: what a generator gave.
        grid_shape: rows and columns of the generator's grid.
        source: of the kept tokens, where it is known.
        noise: for a decoder that begins from noise; None is of seed 0 and places in the batch.
        labels: classes that the tokens were sampled for, of a tokenizer that decodes by a class.
    """
    noise = noise or Noise(0, range(len(sampled.indices)))
    device = next(tokenizer.parameters()).device
    indices = sampled.indices.to(device)
    num_cells = grid_shape[0] * grid_shape[1]
    size = decoded_at_once(num_cells * tokenizer.config.patch_size**2, device)
    images = []
    for first in range(0, len(indices), size):
        # As many at once whatever the batch, so that an image is the same to the last bit in any:
        # where images run out, the last is decoded several times.
        rows = torch.arange(first, first + size, device=device).clamp_max(len(indices) - 1)
        tokens = indices[rows]
        if source is not None:
            known = Source(source.index.to(device)[rows], source.num_kept)
        elif tokenizer.has_maps and tokens.shape[1] == num_cells and sampled.anchors is None:
            known = Source(torch.arange(num_cells, device=device).expand(size, -1), num_cells)
        else:
            anchors = sampled.anchors
            anchors = None if anchors is None else anchors.to(device)[rows]
            known = tokenizer.recover(tokens, grid_shape, anchors)
        own = Noise(noise.seed, [noise.image_ids[row] for row in rows.tolist()])
        told = None
        if labels is not None:
            told = condition_of(tokenizer.config.condition, labels.to(device)[rows], "sampling")
        image = tokenizer.decode(tokens, known, grid_shape, own, told)
        images.append(image[: len(indices) - first])
    return torch.cat(images).clamp(-1, 1)


def class_labels(run: SampleRun, num_classes: int, image_ids: Sequence[int]) -> Int64[Tensor, "b"]:
    """Classes of some images of a run: those named, or all there are, in turn.

    Raises:
        ValueError: a class does not exist.
    """
    for label in run.classes:
        if num_classes == 0:
            raise ValueError(
                f"class {label} was asked for, and the generator was trained without classes"
            )
        if not 0 <= label < num_classes:
            raise ValueError(
                f"class ({label}) must be between 0 and {num_classes - 1}: the generator was "
                f"trained on {num_classes} classes"
            )
    # Without classes the only id is that of no class, which is 0.
    classes = run.classes or tuple(range(max(1, num_classes)))
    labels = [classes[image_id % len(classes)] for image_id in image_ids]
    return torch.tensor(labels, dtype=torch.int64)


def masked_origin(
    tokenizer: Tokenizer, image: Image.Image, mask: Image.Image, num_kept: int
) -> Origin:
    """Find the tokens of an image that a mask leaves alone.

    Image and mask are cut to the centre square of the tokenizer's size alike.

    Args:
        tokenizer: in evaluation mode.
        image: RGB.
        mask: as large as the image; white where the image is made anew. A token stays if none of
            the cells that copy it has any white.
        num_kept: K.

    Raises:
        ValueError: image and mask differ in size, or nothing or all of the image is masked.
    """
    if image.size != mask.size:
        raise ValueError(
            f"mask ({mask.width} x {mask.height}) must be as large as the image "
            f"({image.width} x {image.height})"
        )
    config, device = tokenizer.config, next(tokenizer.parameters()).device
    pixels = load_square(image, config.image_size)[None].to(device)
    white = to_tensor(crop_square(mask.convert("RGB"), config.image_size))[None, :1].to(device)
    encoded = tokenizer.encode(pixels, num_kept)
    touched = functional.max_pool2d(white, config.patch_size).flatten() > 0
    counts = torch.zeros(num_kept, dtype=torch.int64, device=device)
    counts.scatter_add_(0, encoded.source.index[0], touched.long())
    keep = (counts == 0)[None]
    if keep.all():
        raise ValueError("the mask leaves all tokens; make it white where the image is to change")
    return Origin(encoded.indices, encoded.source, keep)


@torch.no_grad()
def generate(
    pair: Pair,
    run: SampleRun,
    image_ids: Sequence[int],
    origin: Origin | None = None,
) -> tuple[Sampled, Float[Tensor, "b 3 h w"]]:
    """Sample some images of a run, as one batch.

    Args:
        pair: what samples and what decodes.
        run: how.
        image_ids: numbers of the images.
        origin: an image to keep tokens of, for all of them; None keeps nothing.

    Raises:
        ValueError: the run does not fit the generator.
        RuntimeError: weights are broken.
    """
    config = pair.generator.config
    labels = class_labels(run, config.num_classes, image_ids)
    num_kept, noise = run.num_kept or config.num_kept, Noise(run.seed, image_ids)
    tokenizer, shape = pair.tokenizer, config.grid_size
    if origin is None:
        sampled = sample(
            pair.generator,
            labels=labels,
            num_kept=num_kept,
            seed=run.seed,
            image_ids=image_ids,
            settings=run.settings,
        )
        return sampled, decode_sampled(tokenizer, sampled, shape, None, noise, labels)
    sampled = inpaint(
        pair.generator,
        indices=origin.indices.expand(len(labels), -1),
        keep=origin.keep.expand(len(labels), -1),
        labels=labels,
        seed=run.seed,
        image_ids=image_ids,
        settings=run.settings,
    )
    # New tokens take the places of those they replace, so that what is kept stays where it is.
    index = origin.source.index.expand(len(labels), -1)
    source = Source(index, origin.source.num_kept)
    return sampled, decode_sampled(tokenizer, sampled, shape, source, noise, labels)


def _weights_error(exact: AnyGenerator, lighter: AnyGenerator, run: SampleRun) -> float:
    """How far the lighter generator's logits are off, on sequences that it samples."""
    config = exact.config
    num_kept = config.num_kept if run.num_kept is None else run.num_kept
    ids = range(min(_COMPARED, run.num_images))
    labels = class_labels(run, config.num_classes, ids)
    sampled = sample(
        lighter,
        labels=labels,
        num_kept=num_kept,
        seed=run.seed,
        image_ids=ids,
        settings=SamplingSettings(),
    )
    sequences = Sequences(
        indices=sampled.indices,
        class_label=labels.to(exact.device),
        num_kept=num_kept,
        anchors=sampled.anchors,
        source_index=sampled.source_index,
    )
    numbers = BatchNumbers(
        seed=run.seed, step=0, num_rows=len(labels), rows=slice(None), prefix="weights "
    )
    return logit_error(exact, lighter, exact.draw(sequences, numbers))
