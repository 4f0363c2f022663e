"""The command that fine-tunes a source predictor.

As in `mergevq.cli`, a signature is the options, a docstring is the help, and what is heavy is
imported inside.
"""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import tyro

from mergevq.config import Device, Precision
from mergevq.config_source import SourceRun
from mergevq.recipes import SOURCE_RECIPES
from mergevq.terminal import prepare_to_compute


def finetune_source(  # noqa: PLR0913 - each is an option
    recipe: tyro.conf.Positional[str | None] = None,
    *,
    tokenizer: str | None = None,
    tokens: str | None = None,
    generator: str | None = None,
    out: Path | None = None,
    num_kept: tuple[int, ...] = (),
    max_replaced: float = 0.5,
    passes: int = 8,
    num_steps: int | None = None,
    batch_size: int = 256,
    lr: float = 1e-4,
    val_images: int = 256,
    val_fraction: float = 0.05,
    precision: Precision = "auto",
    device: Device = "auto",
    seed: int = 0,
) -> None:
    """Teach a tokenizer to find the source map of tokens that a generator made.

    A generator of order `random` makes a part of each image's tokens anew, and the source predictor
    learns to find the image's own source map all the same. Encoder and decoder stay as they are, so
    tokens and generators of the tokenizer go with the result too.

    Args:
        recipe: name of a run, such as imagenet256_gr_source; options replace what it says.
        tokenizer: directory of the tokenizer, or owner/name@revision on Hugging Face.
        tokens: folder of its tokens (`mergevq encode`).
        generator: directory of the generator, or owner/name@revision on Hugging Face.
        out: where the tokenizer with the new predictor goes; runs/source without a recipe.
        num_kept: each K to train on; all that tokens and generator have if there are none.
        max_replaced: largest share of an image's tokens that is made anew.
        passes: forward passes of the generator in which they are made.
        num_steps: optimizer steps; 1,000 without a recipe, and 25,000 are the paper's 5 epochs.
        batch_size: images per step.
        lr: learning rate; it falls to a tenth after 85 and 95 % of the steps.
        val_images: held-out images looked at before and after.
        val_fraction: share of the images held out, the same ones as in training a generator with
            this share.
        precision: of the predictor.
        device: where to compute.
        seed: of every random number.

    Raises:
        ValueError: there is no such recipe, or neither a recipe nor the options name a tokenizer,
            tokens and a generator.
    """
    start = _recipe(recipe)
    if recipe is None:
        needed = {"tokenizer": tokenizer, "tokens": tokens, "generator": generator}
        if missing := [f"--{name}" for name, value in needed.items() if value is None]:
            raise ValueError(
                f"{', '.join(missing)} must be given, or a recipe: {', '.join(SOURCE_RECIPES)}"
            )
    prepare_to_compute()
    from mergevq.train_source import finetune_source as finetune

    optim = replace(SourceRun().optim, lr=lr)
    done = finetune(
        SourceRun(
            tokenizer=tokenizer or start.tokenizer,
            tokens=tokens or start.tokens,
            generator=generator or start.generator,
            out=start.out if out is None else str(out),
            num_kept=num_kept or start.num_kept,
            max_replaced=max_replaced,
            num_passes=passes,
            num_steps=start.num_steps if num_steps is None else num_steps,
            batch_size=batch_size,
            num_eval_images=val_images,
            val_fraction=val_fraction,
            optim=optim,
            precision=precision,
            device=device,
            seed=seed,
        )
    )
    print(f"{'source of':<12} {'nats a cell':>24} {'cells found':>24}")
    for name, before in done.before.items():
        after = done.after[name]
        losses = f"{before.loss:.4f} -> {after.loss:.4f}"
        shares = f"{before.accuracy:.2%} -> {after.accuracy:.2%}"
        print(f"{name:<12} {losses:>24} {shares:>24}")
    print(f"clean: an image's own tokens; new: {max_replaced:.0%} of them made by the generator")
    print(f"tokenizer: {done.directory}")


def _recipe(name: str | None) -> SourceRun:
    """The run of a name; the defaults without one.

    Raises:
        ValueError: there is no such recipe.
    """
    if name is None:
        return SourceRun()
    if name not in SOURCE_RECIPES:
        raise ValueError(f"recipe ({name}) must be one of {', '.join(SOURCE_RECIPES)}")
    return SOURCE_RECIPES[name]()


COMMANDS: dict[str, Callable[..., object]] = {"finetune-source": finetune_source}
