"""Training a decoder on, with tokens of which a generator made a part.

A decoder has seen tokens of real images alone, and a generator's mistakes are new to it. Here a
part of an image's tokens is made by the generator, given the others and the class, and the decoder
learns to give back the image all the same. Encoder and codes stay, so tokens and generators stay
valid.

Source: Qiu et al. 2025, RobusTok's post-training (arXiv:2509.12474): 70 % of the tokens stay.

Differs: the authors draw for each token whether it stays, and their generator goes on from the
mixture in its own order; here as many tokens stay in every image, and all others are made given
these. They encode the pictures of the mixture again before training; here the mixture itself is
decoded, by the image's own source map. There is no adversarial loss.

Shape letters: B images of a batch, K kept tokens, P parts of a token, H and W pixels.
"""

import logging
from pathlib import Path
from typing import NamedTuple

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from mergevq.config.identity import Identity, require_same_classes
from mergevq.config.parts import require_no_condition
from mergevq.config.training import PostTraining
from mergevq.data.batches import Batch, eval_batches, open_train_val, train_batches
from mergevq.data.images import ImageDataset
from mergevq.data.prepare import Loaded
from mergevq.generator.generation import Pair
from mergevq.metrics.image import psnr
from mergevq.metrics.lpips import Perceptual, load_perceptual
from mergevq.runtime.device import send
from mergevq.runtime.optim import Ema
from mergevq.runtime.random import step_generator
from mergevq.tokenizer.losses.terms import reconstruction_loss
from mergevq.tokenizer.seams import Encoded
from mergevq.training.posthoc.part import open_pair, replace_tokens, save_part, train_part

logger = logging.getLogger("mergevq")

_EVAL_BATCH = 64
"""Images looked at at once."""


class PostTrained(NamedTuple):
    """Results, PSNR in dB by `own@K` and `mixed@K`: of an image's own tokens, and of mixtures."""

    directory: Path
    """Directory of the tokenizer with the new decoder."""
    before: dict[str, float]
    """On held-out images."""
    after: dict[str, float]
    """On the same images with the same new tokens."""


def finetune_decoder(run: PostTraining) -> PostTrained:
    """Train a tokenizer's decoder on, with tokens of which a generator made a part.

    One process trains; nothing is resumed. The random numbers of step n depend on (seed, n) alone.

    Raises:
        ValueError: tokenizer, generator, images and settings do not fit each other, or there is
            something in `out`.
        RuntimeError: losses stayed non-finite.
    """
    pair = open_pair(run)
    require_no_condition(pair.tokenizer.config.condition, "mergevq finetune-decoder")
    train_set, val_set = open_train_val(run.data)
    if pair.class_names:
        require_same_classes(
            Identity(class_names=pair.class_names),
            Identity(class_names=train_set.class_names),
            where=f"the generator in {run.generator}",
            way_out=f"give the images that its tokens are of, not {run.data.path}",
        )
    counts = _counts(run, pair)
    perceptual = load_perceptual("vgg", run.perceptual_path) if run.perceptual_weight > 0 else None
    if perceptual is None:
        logger.warning("no LPIPS weights: the loss is the absolute difference alone")
    decoder = pair.tokenizer.decoder.requires_grad_(requires_grad=True)
    ema = Ema(decoder, run.optim.ema_decay)
    before = evaluate(run, pair, val_set, counts)
    if perceptual is not None:
        perceptual = perceptual.to(pair.generator.device)
    _learn(run, pair, train_set, counts, ema, perceptual)
    with ema.swap():
        after = evaluate(run, pair, val_set, counts)
        save_part(run, pair, "decoder_finetuning", {"before": before, "after": after})
    return PostTrained(Path(run.out), before, after)


def mixture(
    run: PostTraining, pair: Pair, batch: Batch, encoded: Encoded, image_ids: range, purpose: str
) -> Int64[Tensor, "b k p"]:
    """Tokens of images of which the generator made a part.

    Args:
        run: its share of tokens that stay, passes and seed.
        pair: generator and tokenizer.
        batch: images with their classes.
        encoded: their tokens.
        image_ids: numbers that the draws of these images are tied to.
        purpose: what else they are tied to.
    """
    num_kept = encoded.parts.shape[1]
    # A generator without classes takes images of any.
    has_classes = pair.generator.config.num_classes > 0
    label = batch.label if has_classes else torch.full_like(batch.label, -1)
    return replace_tokens(
        *(run, pair, encoded.parts.cpu(), label),
        num_replaced=num_kept - round(run.preserve * num_kept),
        image_ids=image_ids,
        purpose=purpose,
    ).to(encoded.parts.device)


def evaluate(
    run: PostTraining, pair: Pair, dataset: ImageDataset, counts: tuple[int, ...]
) -> dict[str, float]:
    """PSNR in dB of held-out images, from their own tokens and from mixtures."""
    found: dict[str, list[Tensor]] = {f"{n}@{k}": [] for k in counts for n in ("own", "mixed")}
    batches = eval_batches(
        dataset,
        image_size=pair.tokenizer.config.image_size,
        batch_size=_EVAL_BATCH,
        max_images=min(run.num_eval_images, len(dataset)),
        num_workers=run.data.num_workers,
    )
    for number, batch in enumerate(batches):
        image = send(batch.image, pair.generator.device)
        first = number * _EVAL_BATCH
        ids = range(first, first + len(image))
        for num_kept in counts:
            encoded = pair.tokenizer.encode(image, num_kept)
            mixed = mixture(run, pair, batch, encoded, ids, f"evaluation {num_kept}")
            for name, parts in (("own", encoded.parts), ("mixed", mixed)):
                with torch.no_grad():
                    decoded = _decode(pair, parts, encoded)
                found[f"{name}@{num_kept}"].append(psnr(image, decoded.clamp(-1, 1)))
    return {name: torch.cat(values).mean().item() for name, values in found.items()}


def _decode(
    pair: Pair, parts: Int64[Tensor, "b k p"], encoded: Encoded
) -> Float[Tensor, "b 3 h w"]:
    """Images of tokens at the places of an image's own."""
    tokenizer = pair.tokenizer
    codes = tokenizer.decoded(tokenizer.codes_of_parts(parts))
    return tokenizer.decoder(tokenizer.expander(codes, encoded.layout, encoded.grid_shape))


def _learn(
    run: PostTraining,
    pair: Pair,
    dataset: ImageDataset,
    counts: tuple[int, ...],
    ema: Ema,
    perceptual: Perceptual | None,
) -> None:
    """Train the decoder in place."""
    tokenizer = pair.tokenizer
    batches = train_batches(
        dataset,
        run.data,
        image_size=tokenizer.config.image_size,
        batch_size=run.batch_size,
        num_steps=run.num_steps,
        seed=run.seed,
        student_size=None,
        teacher_size=None,
        num_workers=run.data.num_workers,
        device=pair.generator.device,
    )

    def loss_of(step: int, batch: Batch) -> Float[Tensor, ""]:
        drawn = torch.rand((), generator=step_generator(run.seed, "kept", step))
        encoded = tokenizer.encode(Loaded(batch.image), counts[int(drawn * len(counts))])
        ids = range(step * run.batch_size, (step + 1) * run.batch_size)
        decoded = _decode(pair, mixture(run, pair, batch, encoded, ids, "training"), encoded)
        loss = reconstruction_loss(batch.image, decoded)
        if perceptual is not None:
            loss = loss + run.perceptual_weight * perceptual(decoded, batch.image).mean()
        return loss

    train_part(run, tokenizer.decoder, ema, batches, loss_of)


def _counts(run: PostTraining, pair: Pair) -> tuple[int, ...]:
    """Each K to train on.

    Raises:
        ValueError: the generator lacks one.
    """
    config = pair.generator.config
    counts = run.num_kept or config.kept_candidates
    if not set(counts) <= set(config.kept_candidates):
        raise ValueError(
            f"num_kept {counts} must be among the K of the generator, {config.kept_candidates}"
        )
    return counts
