"""Commands that train: `mergevq train`, `recipes`, `compare` and those that fine-tune.

As in `mergevq.cli.main`, a signature is the options, a docstring is the help, and heavy modules are
imported inside.
"""

import inspect
import os
import re
import shlex
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Generic, Literal, TypeVar, get_args

import tyro

from mergevq.cli.errors import parsed
from mergevq.cli.options import MAY_BE_EMPTY, Counts, as_text, whole_numbers
from mergevq.cli.tables import next_lines, print_table, summary
from mergevq.config.base import Device, Precision, nearest
from mergevq.config.contest import Arm, ContestSettings
from mergevq.config.evaluation import TrunkName
from mergevq.config.kinds import with_kinds
from mergevq.config.recipes import RECIPES, SOURCE_RECIPES, TOKENIZER_RECIPES
from mergevq.config.training import (
    DecoderRun,
    GeneratorRun,
    PostTraining,
    SourceRun,
    TokenizerRun,
)
from mergevq.runtime.environment import prepare_to_compute

Run = TypeVar("Run")
_TRAIN_USAGE = "usage: mergevq train RECIPE [--section.field VALUE ..]"
_ABOUT_KINDS = (
    "`--model.PART.kind KIND` takes another kind of part, with its own defaults; "
    "`mergevq parts` lists the kinds."
)
_KINDS = {TokenizerRun: "tokenizer", GeneratorRun: "generator", DecoderRun: "decoder"}
_REGISTRY = tyro.constructors.ConstructorRegistry()


@_REGISTRY.primitive_rule
def _kind(
    type_info: tyro.constructors.PrimitiveTypeInfo,
) -> tyro.constructors.PrimitiveConstructorSpec[str] | None:
    """How a part's `kind` looks in the help: its one value is not all that can be typed."""
    if type_info.type_origin is not Literal or len(get_args(type_info.type)) != 1:
        return None
    return tyro.constructors.PrimitiveConstructorSpec(
        nargs=1,
        metavar="KIND",
        instance_from_str="".join,
        is_instance=lambda value: value in get_args(type_info.type),
        str_from_instance=lambda kind: [kind],
    )


@dataclass(frozen=True, kw_only=True)
class _TrainOptions(Generic[Run]):
    """Options of `mergevq train RECIPE`: the recipe's fields, and how to run it."""

    run: Annotated[Run, tyro.conf.arg(name="")]
    dry_run: tyro.conf.FlagCreatePairsOff[bool] = False
    """Only print what the run would take, from a few small steps of it; nothing is written."""
    resume: tyro.conf.FlagCreatePairsOff[bool] = False
    """Go on from the newest checkpoint in `--out`."""


def train(arguments: list[str]) -> int:
    """Train a recipe, with any of its fields changed."""
    name, *overrides = arguments or [""]
    if name in {"-h", "--help"}:
        print(f"{_TRAIN_USAGE}\n\n{_recipe_list()}\n\n{_ABOUT_KINDS}")
        return 0
    if name not in RECIPES:
        problem = _TRAIN_USAGE
        if name:
            problem = f"mergevq train: no recipe {name!r}{nearest(name, RECIPES)}"
        print(f"{problem}\n\n{_recipe_list()}", file=sys.stderr)
        return 2
    run, overrides = with_kinds(RECIPES[name](), overrides)
    options = parsed(
        lambda: tyro.cli(
            _TrainOptions[type(run)],
            default=_TrainOptions(run=run),
            args=overrides,
            prog=f"mergevq train {name}",
            description=f"{inspect.getdoc(RECIPES[name])}\n\n{_ABOUT_KINDS}",
            config=(tyro.conf.AvoidSubcommands,),
            registry=_REGISTRY,
        )
    )
    prepare_to_compute()
    if options.dry_run:
        run = options.run
        if isinstance(run, DecoderRun):
            raise ValueError(
                "--dry-run estimates tokenizers and generators; for a decoder take a short run, "
                "with --train.num-steps 20"
            )
        from mergevq.training.estimate import describe, estimate

        print_table("dry run", describe(run, estimate(run)))
        return 0
    from mergevq.training.train import train as train_run

    model = train_run(options.run, resume=options.resume)
    if os.environ.get("RANK", "0") == "0":
        print(f"trained {_KINDS[type(options.run)]}: {model}")
        print(_after_training(options.run, model))
    return 0


def _after_training(run: TokenizerRun | GeneratorRun | DecoderRun, model: Path) -> str:
    """Commands to go on with."""
    if isinstance(run, GeneratorRun):
        return next_lines(("sample", "--generator", model, "--out", "samples"))
    if isinstance(run, DecoderRun):
        return next_lines(
            ("reconstruct", "PICTURE", "--model", run.tokenizer, "--decoder", model),
        )
    given = ("--model", model, "--data", run.data.path)
    return next_lines(
        ("evaluate", "reconstruction", *given), ("encode", *given, "--out", f"{run.out}/tokens")
    )


def recipes() -> None:
    """List the recipes of `train`."""
    print(_recipe_list())


def _recipe_list() -> str:
    """The recipes, one line each."""
    lines = [f"  {name:<22} {summary(recipe)}" for name, recipe in RECIPES.items()]
    return "\n".join(["recipes:", *lines])


def compare(  # noqa: PLR0913 - each is an option
    arms: Annotated[tyro.conf.Positional[tuple[str, ...]], MAY_BE_EMPTY],
    *,
    seeds: tuple[int, ...] = (0, 1, 2),
    settings: Annotated[tuple[str, ...], MAY_BE_EMPTY] = (),
    data: str | None = None,
    out: Path = Path("runs/compare"),
    num_kept: Counts = (),
    bits: Counts = (),
    against: str | None = None,
    lpips: Path | None = None,
    lpips_trunk: TrunkName = "alex",
    extractor: Path | None = None,
    max_images: int | None = None,
    yardstick_images: int = 2000,
    show: int = 8,
) -> None:
    """Train tokenizers alike, each with several seeds, and measure all on the same held-out images.

    Writes OUT/compare.json with every number of every seed, compare.md (the table), pictures.png,
    maps.png (which cells share a token, of arms with source maps) and rate_distortion.png (PSNR
    over total bits, all arms and yardsticks in one plot). Runs are in OUT/ARM/SEED: what is
    finished there is not trained again, and what was stopped goes on.

    Yardsticks take no training by gradients: mean image, class mean, nearest training image,
    principal components of whole images with scalar quantizers, and `components`.

    Args:
        arms: each a recipe of a tokenizer, or in quotes a recipe and options of `mergevq train`, as
            in "digits32 --model.quantizer.kind fsq"; NAME=RECIPE gives an arm a shorter name.
        seeds: each arm is trained with each; they replace train.seed.
        settings: of `mergevq train`, for all arms, as in train.num-steps=120; those of an arm count
            more.
        data: images of all arms, in any form that training reads; the recipes' own by default.
        out: where runs and results go.
        num_kept: K, one or several (36,64,144), at which all arms that have it are measured.
        bits: of an image, one or several: each arm is measured at the K whose bits, tokens and
            layout together, are nearest below. With neither these nor K each arm has its own K.
        against: arm that is the control. A gap to it is shown if it has the same sign with every
            seed and is wider than the spread of the control; else it is not shown.
        lpips: file or folder with LPIPS weights; without them LPIPS is left out.
        lpips_trunk: network of LPIPS.
        extractor: TorchScript file for Frechet distance and feature cosine, which are left out
            without. Only the Inception-2015 file gives a distance called FID.
        max_images: only so many held-out images, evenly spaced.
        yardstick_images: training images that yardsticks are made of; 0 leaves yardsticks out.
        show: held-out images in pictures.png and maps.png; 0 for none.
    """
    contest = ContestSettings(
        arms=tuple(_arm(text, settings) for text in arms),
        data=data,
        out=str(out),
        seeds=seeds,
        num_kept=whole_numbers("num_kept", num_kept),
        bits=whole_numbers("bits", bits),
        against=against,
        lpips=as_text(lpips),
        lpips_trunk=lpips_trunk,
        extractor=as_text(extractor),
        max_images=max_images,
        num_yardstick_images=yardstick_images,
        num_shown=show,
    )
    prepare_to_compute()
    from mergevq.training.contest import run
    from mergevq.training.contest.table import table

    print(table(run.compare(contest)))
    print(f"results: {out}")
    first = Path(contest.run_of(contest.arms[0], contest.seeds[0]).out, "model")
    print(next_lines(("evaluate", "reconstruction", "--model", first)))


def _arm(text: str, settings: Sequence[str]) -> Arm:
    """An arm as it is typed.

    Raises:
        ValueError: it names no recipe of a tokenizer, or sets what the comparison sets.
    """
    try:
        first, *own = shlex.split(text) or [""]
    except ValueError:
        raise ValueError(
            f"arms ({text}) must be a recipe and options, with quotes closed"
        ) from None
    name, equals, recipe = first.partition("=")
    if not equals:
        name, recipe = (
            re.sub(r"[^\w.=+-]+", "_", " ".join([first, *(w.lstrip("-") for w in own)])),
            first,
        )
    if recipe not in TOKENIZER_RECIPES:
        raise ValueError(
            f"arms ({text}) must each begin with a recipe for a tokenizer: "
            f"{', '.join(TOKENIZER_RECIPES)}{nearest(recipe, TOKENIZER_RECIPES)}"
        )
    shared = [
        word
        for setting in settings
        for option, _, value in [setting.partition("=")]
        for word in (f"--{option.removeprefix('--')}", *shlex.split(value))
    ]
    start = TOKENIZER_RECIPES[recipe]()
    run, left = with_kinds(start, [*shared, *own])
    run = parsed(
        lambda: tyro.cli(
            TokenizerRun,
            default=run,
            args=left,
            prog=f"mergevq compare: arm {name}",
            config=(tyro.conf.AvoidSubcommands,),
            registry=_REGISTRY,
        )
    )
    if (run.train.seed, run.out) != (start.train.seed, start.out):
        raise ValueError(
            f"arms ({text}) must leave seed and out to the comparison: give --seeds and --out"
        )
    return Arm(name=name, run=run)


Recipe = Literal["none", "imagenet256_g_source", "imagenet256_gr_source"]
"""Names of `SOURCE_RECIPES`, and that of the defaults."""


def finetune_source(  # noqa: PLR0913 - each is an option
    recipe: tyro.conf.Positional[Recipe] = "none",
    *,
    model: str | None = None,
    tokens: str | None = None,
    generator: str | None = None,
    out: Path | None = None,
    num_kept: Annotated[tuple[int, ...], MAY_BE_EMPTY] = (),
    max_replaced: float | None = None,
    passes: int | None = None,
    num_steps: int | None = None,
    batch_size: int | None = None,
    lr: float | None = None,
    val_images: int | None = None,
    val_fraction: float | None = None,
    precision: Precision | None = None,
    device: Device | None = None,
    seed: int | None = None,
) -> None:
    """Teach a tokenizer to find the source map of tokens that a generator made.

    A generator of order `random` makes a part of each image's tokens anew, and the source predictor
    learns to find the image's own source map all the same. Encoder and decoder stay as they are, so
    tokens and generators of the tokenizer go with the result too.

    Args:
        recipe: name of a run; options replace what it says.
        model: directory of the tokenizer, or owner/name@revision on Hugging Face; without a
            recipe runs/tokenizer/model.
        tokens: folder of its tokens (`mergevq encode`); without a recipe runs/tokens.
        generator: directory of the generator, or owner/name@revision on Hugging Face; without a
            recipe runs/generator/model.
        out: where the tokenizer with the new predictor goes; runs/source without a recipe.
        num_kept: each K to train on; all that tokens and generator have if there are none.
        max_replaced: largest share of an image's tokens that is made anew (0.5).
        passes: forward passes of the generator in which they are made (8).
        num_steps: optimizer steps; 1,000 without a recipe, and 25,000 are the paper's 5 epochs.
        batch_size: images per step (256).
        lr: learning rate (1e-4); it falls to a tenth after 85 and 95 % of the steps.
        val_images: held-out images looked at before and after (256).
        val_fraction: share of the images held out, the same ones as in training a generator with
            this share (0.05).
        precision: of the predictor.
        device: where to compute.
        seed: of every random number.
    """
    start = SourceRun() if recipe == "none" else SOURCE_RECIPES[recipe]()
    prepare_to_compute()
    from mergevq.training.posthoc.source import finetune_source as finetune

    given = {
        "tokenizer": model,
        "tokens": tokens,
        "generator": generator,
        "out": None if out is None else str(out),
        "num_kept": num_kept or None,
        "max_replaced": max_replaced,
        "num_passes": passes,
        "num_steps": num_steps,
        "batch_size": batch_size,
        "num_eval_images": val_images,
        "val_fraction": val_fraction,
        "optim": None if lr is None else replace(start.optim, lr=lr),
        "precision": precision,
        "device": device,
        "seed": seed,
    }
    run = replace(start, **{name: value for name, value in given.items() if value is not None})
    done = finetune(run)
    print(f"{'source of':<12} {'nats a cell':>24} {'cells found':>24}")
    for name, before in done.before.items():
        after = done.after[name]
        losses = f"{before.loss:.4f} -> {after.loss:.4f}"
        shares = f"{before.accuracy:.2%} -> {after.accuracy:.2%}"
        print(f"{name:<12} {losses:>24} {shares:>24}")
    print(
        f"clean: an image's own tokens; new: {run.max_replaced:.0%} of them made by the generator"
    )
    print(f"tokenizer: {done.directory}")
    print(next_lines(("sample", "--generator", run.generator, "--model", done.directory)))


def finetune_decoder(  # noqa: PLR0913 - each is an option
    *,
    model: str,
    generator: str,
    data: str,
    out: Path,
    num_kept: Annotated[tuple[int, ...], MAY_BE_EMPTY] = (),
    preserve: float = 0.7,
    passes: int = 8,
    num_steps: int = 1000,
    batch_size: int = 64,
    lr: float = 5e-5,
    lpips: str | None = None,
    val_images: int = 256,
    val_data: str | None = None,
    num_workers: int = 2,
    device: Device = "auto",
    seed: int = 0,
) -> None:
    """Train a tokenizer's decoder on, with tokens of which a generator made a part.

    A generator of order `random` makes some of each image's tokens anew, and the decoder learns to
    give back the image all the same. Encoder and codes stay as they are, so tokens and generators
    of the tokenizer go with the result too. Measure samples before and after: rFID may get worse.

    Args:
        model: directory of the tokenizer, or owner/name@revision on Hugging Face.
        generator: directory of the generator, or owner/name@revision on Hugging Face.
        data: images that the tokenizer was trained on, as `mergevq train --data.path` takes them.
        out: where the tokenizer with the new decoder goes.
        num_kept: each K to train on; all that the generator has if there are none.
        preserve: share of an image's own tokens that stay.
        passes: forward passes of the generator in which the others are made.
        num_steps: optimizer steps.
        batch_size: images per step.
        lr: learning rate.
        lpips: file or folder with LPIPS weights (VGG); without them the loss is the absolute
            difference alone.
        val_images: held-out images looked at before and after.
        val_data: held-out images; without it a twentieth of `data`.
        num_workers: loader processes; 0 loads in this one.
        device: where to compute.
        seed: of every random number.
    """
    prepare_to_compute()
    from mergevq.training.posthoc.decoder import finetune_decoder as finetune

    start = PostTraining()
    done = finetune(
        replace(
            start,
            tokenizer=model,
            generator=generator,
            data=replace(start.data, path=data, val_path=val_data, num_workers=num_workers),
            out=str(out),
            num_kept=num_kept,
            preserve=preserve,
            num_passes=passes,
            num_steps=num_steps,
            batch_size=batch_size,
            optim=replace(start.optim, lr=lr),
            perceptual_path=lpips,
            num_eval_images=val_images,
            device=device,
            seed=seed,
        )
    )
    print(f"{'tokens':<12} {'PSNR (dB)':>20}")
    for name, before in done.before.items():
        print(f"{name:<12} {f'{before:.2f} -> {done.after[name]:.2f}':>20}")
    print(f"own: an image's own tokens; mixed: {preserve:.0%} of them, the others are generated")
    print(f"tokenizer: {done.directory}")
    print(next_lines(("sample", "--generator", generator, "--model", done.directory)))


COMMANDS: dict[str, Callable[..., object]] = {
    "compare": compare,
    "finetune-source": finetune_source,
    "finetune-decoder": finetune_decoder,
}
