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

from pathlib import Path
from typing import NamedTuple

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from mergevq.config.identity import Identity, require_same_classes
from mergevq.config.training import SourceRun
from mergevq.data.layouts import Source
from mergevq.data.tokens.batches import split, token_batches
from mergevq.data.tokens.dataset import TokenBatch, TokenDataset, open_tokens
from mergevq.data.tokens.files import require_tokenizer
from mergevq.generator.generation import Pair
from mergevq.runtime.artefacts import resolve, tokens_hash
from mergevq.runtime.device import autocast, resolve_precision, send
from mergevq.runtime.optim import Ema
from mergevq.runtime.random import step_generator
from mergevq.runtime.settings import to_json
from mergevq.tokenizer.expanders.unmerge import SourcePredictor, Unmerge
from mergevq.tokenizer.losses.terms import source_loss
from mergevq.training.posthoc.part import open_pair, replace_tokens, save_part, train_part

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
    pair = open_pair(run)
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
    predictor = _predictor(pair).requires_grad_(requires_grad=True)
    ema = Ema(predictor, run.optim.ema_decay)
    before = evaluate(run, pair, val_set, counts)
    _learn(run, pair, train_set, counts, ema)
    with ema.swap():
        after = evaluate(run, pair, val_set, counts)
        results = {
            "tokens": to_json(dataset.record),
            "before": {name: part._asdict() for name, part in before.items()},
            "after": {name: part._asdict() for name, part in after.items()},
        }
        save_part(run, pair, "source_finetuning", results)
    return Finetuned(Path(run.out), before, after)


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
    return pair.tokenizer.decoded(pair.tokenizer.codes_of_parts(send(parts, device)).float())


@torch.no_grad()
def _recovery(pair: Pair, parts: Int64[Tensor, "b k p"], source: Source) -> Recovery:
    """Recovery of one batch, in float32."""
    device = pair.generator.device
    codes = _seen(pair, parts, device)
    own = Source(send(source.index, device), source.num_kept)
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
    batches = token_batches(
        dataset,
        batch_size=run.batch_size,
        num_steps=run.num_steps,
        seed=run.seed,
        num_kept=lambda step: counts[int(_uniform(run, "kept", step) * len(counts))],
    )

    def loss_of(step: int, batch: TokenBatch) -> Float[Tensor, ""]:
        share = run.max_replaced * _uniform(run, "share", step)
        ids = range(step * run.batch_size, (step + 1) * run.batch_size)
        parts = replace_tokens(
            *(run, pair, batch.parts, batch.label),
            num_replaced=int(share * batch.parts.shape[1]),
            image_ids=ids,
            purpose="training",
        )
        codes = _seen(pair, parts, device)
        own = Source(send(batch.source.index, device), batch.source.num_kept)
        with autocast(device, dtype):
            return source_loss(predictor(codes, shape), own)

    train_part(run, predictor, ema, batches, loss_of)


def _uniform(run: SourceRun, purpose: str, step: int) -> float:
    """A number in [0, 1) of one step."""
    return float(torch.rand((), generator=step_generator(run.seed, purpose, step)))


def _counts(run: SourceRun, pair: Pair, dataset: TokenDataset) -> tuple[int, ...]:
    """Each K to train on.

    Raises:
        ValueError: there is none, or the tokens or the generator lack one.
    """
    config = pair.generator.config
    common = tuple(sorted(set(dataset.num_kept) & set(config.kept_candidates)))
    counts = run.num_kept or common
    if not counts or not set(counts) <= set(common):
        raise ValueError(
            f"num_kept {counts} must be among the K that both the tokens {dataset.num_kept} and "
            f"the generator {config.kept_candidates} have, {common}"
        )
    return counts
