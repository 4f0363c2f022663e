"""Training of one part of a tokenizer, with tokens of which a generator made some.

Encoder and quantizer stay, so tokens of the tokenizer and generators of them stay valid.

Shape letters: B images of a batch, K kept tokens, P parts of a token.
"""

import contextlib
import logging
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, TypeVar

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from mergevq.config.generator import SamplingSettings, Several
from mergevq.config.training import PostTraining, SourceRun
from mergevq.data.codes import join, split
from mergevq.generator.generation import Pair, load_pair
from mergevq.generator.sampling import inpaint
from mergevq.runtime.artefacts import load_model, resolve, save_model, tokens_hash
from mergevq.runtime.device import resolve_device
from mergevq.runtime.logs import Progress
from mergevq.runtime.optim import (
    Ema,
    build_optimizer,
    clip,
    guard_on,
    learning_rate,
    set_learning_rate,
)
from mergevq.runtime.random import step_generator
from mergevq.runtime.run import environment
from mergevq.runtime.settings import to_json

logger = logging.getLogger("mergevq")
Each = TypeVar("Each")
"""A batch, of images or of tokens."""

_MAX_NONFINITE = 20
"""Steps in a row with a non-finite loss or gradient after which the run stops."""


def open_pair(run: SourceRun | PostTraining) -> Pair:
    """Load the generator and the tokenizer of a run, both with frozen weights.

    Raises:
        ValueError: they do not fit each other, the generator cannot make some of an image's tokens
            anew, or there is something in `out`.
    """
    out = Path(run.out)
    if out.exists() and any(out.iterdir()):
        raise ValueError(f"{out} is not empty; choose another directory with --out, or delete it")
    pair = load_pair(run.generator, run.tokenizer, resolve_device(run.device), precision="float32")
    order = pair.generator.config.order
    if not order.fills_in:
        raise ValueError(
            f"the generator in {run.generator} must be of order 'random', not "
            f"'{order.kind}': only that one makes tokens anew between others and leaves the source "
            "to be found"
        )
    pair.generator.requires_grad_(requires_grad=False)
    pair.tokenizer.requires_grad_(requires_grad=False)
    return pair


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
    """Let the generator make some of each image's tokens anew, given the others.

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
    return split(sampled.indices.cpu(), sizes)


def train_part(
    run: SourceRun | PostTraining,
    part: nn.Module,
    ema: Ema,
    batches: Iterable[Each],
    loss_of: Callable[[int, Each], Float[Tensor, ""]],
) -> None:
    """Train a part in place, and its averaged weights with it.

    Args:
        run: its optimizer, steps and images of a step.
        part: the module; nothing else learns.
        ema: of its weights.
        batches: one for each step.
        loss_of: from a step and its batch.

    Raises:
        RuntimeError: losses or gradients stayed non-finite.
    """
    optimizer = build_optimizer([part], run.optim, run.batch_size)
    guard = guard_on(next(part.parameters()).device, _MAX_NONFINITE)
    with contextlib.closing(Progress(run.num_steps)) as progress:
        for step, batch in enumerate(batches):
            loss = loss_of(step, batch)
            set_learning_rate(
                optimizer, learning_rate(step, run.optim, run.num_steps, run.batch_size)
            )
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            norm = clip(part.parameters(), run.optim.clip_norm)
            verdict = guard.check(step, {"loss": loss, "grad_norm": norm}, _warn_of_skip)
            verdict.step(optimizer)
            ema.update(verdict)
            progress.update()
        guard.read()


def _warn_of_skip(step: int) -> None:
    """Say that nothing was learned in a step."""
    logger.warning("step %d is not finite and is skipped", step)


def save_part(
    run: SourceRun | PostTraining, pair: Pair, name: str, results: dict[str, Any]
) -> None:
    """Write the tokenizer with its present weights, and under a name where they come from."""
    old = load_model(resolve(run.tokenizer), kind="tokenizer").record["extra"]
    note = {
        "run": to_json(run),
        "tokenizer": pair.tokenizer_hash,
        "generator": pair.generator_hash,
        "environment": environment(pair.generator.device),
        **results,
    }
    save_model(
        run.out,
        pair.tokenizer.state_dict(),
        pair.tokenizer.config,
        kind="tokenizer",
        extra=old | {name: note},
        tokens_id=tokens_hash(resolve(run.tokenizer)),
    )
