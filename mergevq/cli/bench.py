"""The commands `mergevq bench tokenizer`, `.. generator` and `.. gpu`: how fast this machine is.

As in `mergevq.cli.main.main`, a signature is the options, a docstring is the help, and what is
heavy is imported inside.
"""

import os
from collections.abc import Callable, Collection
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Literal

import tyro

from mergevq.cli.tables import next_lines, print_table
from mergevq.config.base import Device
from mergevq.config.generator import (
    Weights,
)
from mergevq.config.objective import NoTeacher
from mergevq.config.recipes import GENERATOR_RECIPES, TOKENIZER_RECIPES
from mergevq.config.training import TokenizerRun

Counts = Annotated[str, tyro.conf.arg(metavar="N,N,..")]


def generator(  # noqa: PLR0913 - each is an option
    *,
    recipe: str | None = None,
    size: str = "B",
    grid_tokens: Counts = "256,1024",
    batch_sizes: Counts = "1,8",
    guidance: tuple[float, ...] = (1.0, 4.0),
    repeats: int = 3,
    max_steps: int | None = 32,
    weights: tuple[Weights, ...] = ("bf16", "int8"),
    reference: Path = Path("benchmarks/reference_generator.py"),
    device: Device = "auto",
    out: Path | None = None,
) -> None:
    """Measure how fast generators of all four orders decode, and how large their caches are.

    In a checkout, beside plain loops over the same weights, on a CPU. Needs no trained model. Set
    OMP_NUM_THREADS for the number of threads, and leave the machine alone meanwhile.

    Args:
        recipe: take the architecture of this recipe.
        size: or the architecture of this size: tiny, small, B, L, XL or XXL.
        grid_tokens: cells of the grids, each with its nominal number of kept tokens.
        batch_sizes: images decoded at once.
        guidance: scales of guidance; 1 is none.
        repeats: turns; of each step the median counts.
        max_steps: steps timed of each sequence, evenly spread over it; None times all.
        weights: types of weights, each with all orders. The plain loops have bf16, on devices
            without it float32.
        reference: file of the plain loops; if it is not there, nothing is compared.
        device: where to compute.
        out: JSON file with all numbers and conditions.

    Raises:
        ValueError: there is no such recipe or size, or nothing to time.
    """
    if recipe is not None:
        _require_recipe(recipe, GENERATOR_RECIPES, "generator")
    grids, batches = _numbers("grid_tokens", grid_tokens), _numbers("batch_sizes", batch_sizes)
    from mergevq.generator import bench as benchmark
    from mergevq.runtime.device import resolve_device
    from mergevq.runtime.files import write_json
    from mergevq.training.bench.tokenizer import load_reference

    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
    place = resolve_device(device)
    model = GENERATOR_RECIPES[recipe]().resolved_model if recipe else benchmark.size_config(size)
    configs = [benchmark.grid_config(model, num_cells) for num_cells in grids]
    plain = load_reference(reference) if reference.is_file() else None
    _say_what_is_timed(None if plain else reference, max_steps)
    speeds = []
    for config in configs:
        for speed in benchmark.bench_generator(
            config,
            batch_sizes=batches,
            guidance=guidance,
            num_repeats=repeats,
            max_steps=max_steps,
            weights=weights,
            device=place,
            plain=plain,
        ):
            speeds.append(speed)
            print(benchmark.line(speed), flush=True)
    if out is not None:
        options = {
            "recipe": recipe,
            "size": size if recipe is None else None,
            "grid_tokens": grids,
            "batch_sizes": batches,
            "guidance": list(guidance),
            "repeats": repeats,
            "max_steps": max_steps,
            "weights": list(weights),
            "reference": None if plain is None else str(reference),
            "omp_wait_policy": os.environ.get("OMP_WAIT_POLICY"),
        }
        write_json(out, benchmark.record(place, options, configs, speeds))
        print(f"results: {out}")
    print(next_lines(("sample", "--generator", "GENERATOR", "--weights", weights[-1])))


def tokenizer(  # noqa: PLR0913 - each is an option
    *,
    recipe: str = "tiny64_gr",
    images: int = 16,
    repeats: int = 5,
    lpips: str | None = None,
    subjects: tuple[Literal["merge", "lfq", "images"], ...] = ("merge", "lfq", "images"),
    profile: tyro.conf.FlagCreatePairsOff[bool] = False,
    reference: Path = Path("benchmarks/reference.py"),
    device: Device = "auto",
    out: Path | None = None,
) -> None:
    """Measure how fast this machine encodes, decodes, trains and merges, and in what memory.

    In a checkout, beside plain definitions of the same. Needs no data and no trained model; set
    OMP_NUM_THREADS for the number of threads, and leave the machine alone meanwhile.

    Args:
        recipe: model, losses and precision of the train step.
        images: batch of encode, decode and train step.
        repeats: timed calls; the median counts.
        lpips: file or folder with LPIPS weights; the cache is looked into without.
        subjects: merging, the quantizer's loss, and encode, decode and train step.
        profile: also say which share each part of a train step takes.
        reference: file of the plain definitions; if it is not there, nothing is compared.
        device: where to compute.
        out: JSON file with all numbers and conditions.

    Raises:
        ValueError: there is no such recipe.
    """
    run = _bench_run(recipe, images, lpips, device)
    from mergevq.runtime.files import write_json
    from mergevq.training.bench import tokenizer as benchmark

    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
    conditions = benchmark.conditions(run)
    print_table("conditions", {name: str(value) for name, value in conditions.items()})
    if not reference.is_file():
        print(f"no {reference} here: measuring without comparison")
    measurements, parts = [], []
    for measurement in benchmark.bench_tokenizer(
        run,
        num_repeats=repeats,
        reference=reference if reference.is_file() else None,
        subjects=subjects,
    ):
        measurements.append(measurement)
        print(benchmark.line(measurement), flush=True)
    if profile:
        parts = benchmark.profile_train_step(run, num_repeats=repeats)
        shares = {part.name: f"{part.share:6.1%} {part.seconds:8.3f} s" for part in parts}
        print_table("parts of a train step", shares)
    if out is not None:
        write_json(out, benchmark.record(conditions, measurements, parts))
        print(f"results: {out}")
    print(next_lines(("train", recipe, "--data.path", "FOLDER")))


def gpu(  # noqa: PLR0913 - each is an option
    *,
    recipes: tuple[str, ...] = ("images128_gr", "photos64"),
    images: int = 64,
    size: str = "B",
    grid_tokens: int = 256,
    batch_sizes: Counts = "1,64",
    minutes: float = 3.0,
    compiled: bool = True,
    reference: Path = Path("benchmarks/reference_generator.py"),
    device: Device = "auto",
    out: Path = Path("bench-gpu.json"),
) -> None:
    """Measure in a few minutes what a GPU makes of encoding, decoding, training and sampling.

    For a machine that is lent for a short time: one command, JSON with all numbers and conditions,
    what failed and what was left out for want of time. Model FLOPs utilisation is against the rate
    of a large product in bf16 that is measured first; on a GPU images are also measured in the
    contiguous layout. It runs on a CPU too.

    Args:
        recipes: model, losses and precision of each tokenizer.
        images: batch of encode, decode and train step.
        size: of the generators: tiny, small, B, L, XL or XXL.
        grid_tokens: cells of their grid.
        batch_sizes: images sampled at once.
        minutes: it ends within these, whatever is left to do.
        compiled: also time the compiled train step, which takes longest.
        reference: file of the plain loops; if it is not there, nothing is compared.
        device: where to compute.
        out: JSON file.

    Raises:
        ValueError: there is no such recipe or size.
    """
    if not recipes:
        raise ValueError("recipes () must name at least one recipe for a tokenizer")
    runs = {recipe: _bench_run(recipe, images, None, device) for recipe in recipes}
    from mergevq.generator.bench import grid_config, size_config
    from mergevq.training.bench.device import bench_device
    from mergevq.training.bench.tokenizer import load_reference

    out.parent.mkdir(parents=True, exist_ok=True)
    bench_device(
        runs,
        grid_config(size_config(size), grid_tokens),
        batch_sizes=_numbers("batch_sizes", batch_sizes),
        minutes=minutes,
        plain=load_reference(reference) if reference.is_file() else None,
        compiled=compiled,
        out=out,
        say=_say,
    )
    print(f"results: {out}")
    print(next_lines(("train", recipes[0], "--data.path", "FOLDER")))


def _say(line: str) -> None:
    """Print a line at once."""
    print(line, flush=True)


def _say_what_is_timed(missing: Path | None, max_steps: int | None) -> None:
    """Print which plain loops are missing, and which steps of a sequence are timed."""
    if missing is not None:
        print(f"no {missing} here: measuring without comparison")
    if max_steps is None:
        print("every step is timed")
    else:
        print(f"{max_steps} steps of a sequence are timed, in runs that are evenly spread over it")


def _require_recipe(recipe: str, known: Collection[str], model: str) -> None:
    """Check that a recipe is one for this kind of model.

    Raises:
        ValueError: it is not.
    """
    if recipe not in known:
        raise ValueError(f"recipe ({recipe}) must be a recipe for a {model}: {', '.join(known)}")


def _bench_run(recipe: str, images: int, lpips: str | None, device: Device) -> TokenizerRun:
    """A recipe's run, with nothing that needs data or another code's networks.

    Raises:
        ValueError: there is no such recipe.
    """
    _require_recipe(recipe, TOKENIZER_RECIPES, "tokenizer")
    run = TOKENIZER_RECIPES[recipe]()
    if "teacher" in run.teacher.views:
        print(f"teacher {run.teacher.kind}, which is not this code, is left out")
        run = replace(run, teacher=NoTeacher())
    return replace(
        run,
        init_vit=None,
        init_codes="random",
        loss=replace(run.loss, perceptual_path=lpips or run.loss.perceptual_path),
        train=replace(run.train, batch_size=images, accumulation=1, device=device),
    )


COMMANDS: dict[str, Callable[..., object]] = {
    command.__name__: command for command in (tokenizer, generator, gpu)
}


def _numbers(name: str, text: str) -> list[int]:
    """Whole numbers separated by commas.

    Raises:
        ValueError: something else, or a number below 1.
    """
    items = text.split(",")
    if not all(item.strip().isdecimal() and int(item) > 0 for item in items):
        raise ValueError(f"{name} ({text}) must be whole numbers from 1, as in 256,1024")
    return [int(item) for item in items]
