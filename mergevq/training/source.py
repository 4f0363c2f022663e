"""Fine-tuning the source predictor on the mistakes of a generator.

Source: Li et al. 2025, "MergeVQ", section 3.2 and table A2 (arXiv:2504.00999), which fine-tunes
source recovery for generation as an option and does not say on what.

Differs: sampled tokens have no source map of their own to learn from. Here a part of an image's
tokens is made anew by the generator, given the others, the class and where the token goes, and the
predictor has to find the image's own source map all the same. It sees what a generator gets wrong,
and what stays tells it where things are.

Encoder, decoder and so the tokens' meaning are left as they are: tokens and generators of the
tokenizer are those of the result too.

Shape letters: B images of a batch, K kept tokens.
"""

import contextlib
import logging
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from mergevq.config.generator import (
    SamplingSettings,
    Several,
)
from mergevq.config.identity import Identity, require_same_classes
from mergevq.config.training import PostTraining, SourceRun
from mergevq.data.codes import join
from mergevq.data.codes import split as split_index
from mergevq.data.layouts import Source
from mergevq.data.tokens.batches import split, token_batches
from mergevq.data.tokens.dataset import TokenDataset, open_tokens
from mergevq.data.tokens.files import require_tokenizer
from mergevq.generator.generation import Pair, load_pair
from mergevq.generator.sampling import inpaint
from mergevq.runtime.artefacts import load_model, resolve, save_model, tokens_hash
from mergevq.runtime.device import autocast, resolve_device, resolve_precision
from mergevq.runtime.logs import Progress
from mergevq.runtime.optim import (
    Ema,
    NonFiniteGuard,
    build_optimizer,
    clip,
    learning_rate,
    set_learning_rate,
)
from mergevq.runtime.random import step_generator
from mergevq.runtime.run import environment
from mergevq.runtime.settings import to_json
from mergevq.tokenizer.expanders.unmerge import SourcePredictor, Unmerge
from mergevq.tokenizer.losses.terms import source_loss

logger = logging.getLogger("mergevq")

_MAX_NONFINITE = 20
"""Steps in a row with a non-finite loss or gradient after which the run stops."""
_EVAL_BATCH = 64
"""Images looked at at once."""


class Recovery(NamedTuple):
    """How well a predictor finds the source maps of some images."""

    loss: float
    """Cross-entropy, in nats per cell."""
    accuracy: float
    """Share of cells whose token is found."""


class Finetuned(NamedTuple):
    """Results of fine-tuning, by `clean@K` and `new@K` as in `evaluate`."""

    directory: Path
    """Directory of the tokenizer with the new predictor."""
    before: dict[str, Recovery]
    """On held-out images."""
    after: dict[str, Recovery]
    """On the same images with the same new tokens."""


def finetune_source(run: SourceRun) -> Finetuned:
    """Train a tokenizer's source predictor on tokens of which a generator made a part.

    One process trains; nothing is resumed. The random numbers of step n depend on (seed, n) alone.

    Raises:
        ValueError: tokenizer, generator, tokens and settings do not fit each other, or there is
            something in `out`.
        RuntimeError: losses stayed non-finite, or a file of tokens is damaged.
    """
    out = Path(run.out)
    if out.exists() and any(out.iterdir()):
        raise ValueError(f"{out} is not empty; choose another directory with --out, or delete it")
    device = resolve_device(run.device)
    pair = load_pair(run.generator, run.tokenizer, device, precision="float32")
    dataset = open_tokens(run.tokens)
    require_tokenizer(dataset.record, tokens_hash(resolve(run.tokenizer)))
    if pair.class_names:
        require_same_classes(
            Identity(class_names=pair.class_names),
            Identity(class_names=dataset.record.class_names),
            where=f"the generator in {run.generator}",
            way_out=f"give the tokens that it was trained on, not {run.tokens}",
        )
    counts = _counts(run, pair, dataset)
    train_set, val_set = split(dataset, run.val_fraction)
    pair.generator.requires_grad_(requires_grad=False)
    pair.tokenizer.requires_grad_(requires_grad=False)
    predictor = _predictor(pair).requires_grad_(requires_grad=True)
    ema = Ema(predictor, run.optim.ema_decay)
    before = evaluate(run, pair, val_set, counts)
    _learn(run, pair, train_set, counts, ema)
    with ema.swap():
        after = evaluate(run, pair, val_set, counts)
        _save(run, pair, dataset, before, after)
    return Finetuned(out, before, after)


def replace_tokens(
    run: SourceRun | PostTraining,
    pair: Pair,
    parts: Int64[Tensor, "b k p"],
    label: Int64[Tensor, "b"],
    *,
    num_replaced: int,
    image_ids: range,
    purpose: str,
) -> Int64[Tensor, "b k p"]:
    """Let the generator make a part of each image's tokens anew, given the others.

    Args:
        run: its seed and number of passes.
        pair: the generator, in evaluation mode, and its tokenizer.
        parts: tokens of images.
        label: their classes; -1 is none.
        num_replaced: tokens to make anew, of every image as many.
        image_ids: numbers that the draws of these images are tied to.
        purpose: what else they are tied to.
    """
    batch_size, num_kept = parts.shape[:2]
    if num_replaced == 0:
        return parts
    sizes = pair.tokenizer.quantizer.spec.sizes
    keep = torch.ones(batch_size, num_kept, dtype=torch.bool)
    for row, image_id in enumerate(image_ids):
        numbers = step_generator(run.seed, "replaced", purpose, image_id)
        keep[row, torch.randperm(num_kept, generator=numbers)[:num_replaced]] = False
    null = pair.generator.config.null_class
    sampled = inpaint(
        pair.generator,
        indices=join(parts, sizes),
        keep=keep,
        labels=torch.where(label < 0, null, label),
        seed=step_generator(run.seed, "new tokens", purpose, 0).initial_seed(),
        image_ids=image_ids,
        settings=SamplingSettings(passes=Several(num_steps=run.num_passes)),
    )
    return split_index(sampled.indices.cpu(), sizes)


def evaluate(
    run: SourceRun, pair: Pair, dataset: TokenDataset, counts: tuple[int, ...]
) -> dict[str, Recovery]:
    """Recovery from an image's own tokens (`clean@K`), and with as many new as may be (`new@K`)."""
    rows = range(min(run.num_eval_images, len(dataset)))
    found: dict[str, Recovery] = {}
    for num_kept in counts:
        for name, share in (("clean", 0.0), ("new", run.max_replaced)):
            loss = right = 0.0
            for start in rows[::_EVAL_BATCH]:
                own = rows[start : start + _EVAL_BATCH]
                batch = dataset.batch(own, num_kept)
                parts = replace_tokens(
                    *(run, pair, batch.parts, batch.label),
                    num_replaced=int(share * num_kept),
                    image_ids=own,
                    purpose="evaluation",
                )
                part = _recovery(pair, parts, batch.source)
                loss += part.loss * len(own)
                right += part.accuracy * len(own)
            found[f"{name}@{num_kept}"] = Recovery(loss / len(rows), right / len(rows))
    return found


def _predictor(pair: Pair) -> SourcePredictor:
    """The source predictor of a pair's tokenizer.

    Raises:
        ValueError: it has none.
    """
    expander = pair.tokenizer.expander
    if isinstance(expander, Unmerge):
        return expander.predictor
    raise ValueError(
        "there is no source predictor to train: model.expander.kind of the tokenizer is "
        f"{pair.tokenizer.config.expander.kind} and must be unmerge"
    )


def _seen(
    pair: Pair, parts: Int64[Tensor, "b k p"], device: torch.device
) -> Float[Tensor, "b k d"]:
    """Channels of codes that the predictor is given, in float32."""
    return pair.tokenizer.decoded(pair.tokenizer.codes_of_parts(parts.to(device)).float())


@torch.no_grad()
def _recovery(pair: Pair, parts: Int64[Tensor, "b k p"], source: Source) -> Recovery:
    """Recovery of one batch, in float32."""
    device = pair.generator.device
    codes = _seen(pair, parts, device)
    own = Source(source.index.to(device), source.num_kept)
    predictor, shape = _predictor(pair), pair.generator.config.grid_size
    loss = source_loss(predictor(codes, shape), own)
    right = predictor.predict(codes, shape).index == own.index
    return Recovery(float(loss), float(right.float().mean()))


def _learn(
    run: SourceRun, pair: Pair, dataset: TokenDataset, counts: tuple[int, ...], ema: Ema
) -> None:
    """Train the predictor in place."""
    predictor = _predictor(pair)
    device, shape = pair.generator.device, pair.generator.config.grid_size
    dtype = resolve_precision(run.precision, device)
    optimizer = build_optimizer([predictor], run.optim, run.batch_size)
    guard = NonFiniteGuard(_MAX_NONFINITE)
    batches = token_batches(
        dataset,
        batch_size=run.batch_size,
        num_steps=run.num_steps,
        seed=run.seed,
        num_kept=lambda step: counts[int(_uniform(run, "kept", step) * len(counts))],
    )
    with contextlib.closing(Progress(run.num_steps)) as progress:
        for step, batch in enumerate(batches):
            share = run.max_replaced * _uniform(run, "share", step)
            ids = range(step * run.batch_size, (step + 1) * run.batch_size)
            parts = replace_tokens(
                *(run, pair, batch.parts, batch.label),
                num_replaced=int(share * batch.parts.shape[1]),
                image_ids=ids,
                purpose="training",
            )
            codes = _seen(pair, parts, device)
            own = Source(batch.source.index.to(device), batch.source.num_kept)
            set_learning_rate(
                optimizer, learning_rate(step, run.optim, run.num_steps, run.batch_size)
            )
            optimizer.zero_grad(set_to_none=True)
            with autocast(device, dtype):
                loss = source_loss(predictor(codes, shape), own)
            loss.backward()
            norm = clip(predictor.parameters(), run.optim.clip_norm)
            if guard.check(step, {"loss": loss, "grad_norm": norm}):
                optimizer.step()
                ema.update()
            else:
                logger.warning("step %d is not finite and is skipped", step)
            progress.update()


def _uniform(run: SourceRun, purpose: str, step: int) -> float:
    """A number in [0, 1) of one step."""
    return float(torch.rand((), generator=step_generator(run.seed, purpose, step)))


def _counts(run: SourceRun, pair: Pair, dataset: TokenDataset) -> tuple[int, ...]:
    """Each K to train on.

    Raises:
        ValueError: there is none, the tokens or the generator lack one, or the order needs none.
    """
    config = pair.generator.config
    if not config.order.fills_in:
        raise ValueError(
            f"the generator in {run.generator} must be of order 'random', not "
            f"'{config.order.kind}': only that one makes tokens anew between others and leaves the "
            "source to be found"
        )
    common = tuple(sorted(set(dataset.num_kept) & set(config.kept_candidates)))
    counts = run.num_kept or common
    if not counts or not set(counts) <= set(common):
        raise ValueError(
            f"num_kept {counts} must be among the K that both the tokens {dataset.num_kept} and "
            f"the generator {config.kept_candidates} have, {common}"
        )
    return counts


def _save(
    run: SourceRun,
    pair: Pair,
    dataset: TokenDataset,
    before: dict[str, Recovery],
    after: dict[str, Recovery],
) -> None:
    """Write the tokenizer with its present weights, and where they come from."""
    old = load_model(resolve(run.tokenizer), kind="tokenizer").record["extra"]
    note: dict[str, Any] = {
        "run": to_json(run),
        "tokenizer": pair.tokenizer_hash,
        "generator": pair.generator_hash,
        "tokens": to_json(dataset.record),
        "environment": environment(pair.generator.device),
        "before": {name: part._asdict() for name, part in before.items()},
        "after": {name: part._asdict() for name, part in after.items()},
    }
    save_model(
        run.out,
        pair.tokenizer.state_dict(),
        pair.tokenizer.config,
        kind="tokenizer",
        extra=old | {"source_finetuning": note},
        tokens_id=tokens_hash(resolve(run.tokenizer)),
    )
