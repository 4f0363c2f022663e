"""The command line: `mergevq COMMAND`.

Each command is a function whose signature is its options and whose docstring is its help. What is
heavy is imported inside, so that help, recipes and mistyped options never wait for torch.
"""

import inspect
import logging
import os
import platform
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Generic, Literal, TypeVar

import tyro

from mergevq.config import (
    Device,
    GeneratorRun,
    GuidanceSchedule,
    SampleRun,
    SamplingSettings,
    SizePolicy,
    Weights,
)
from mergevq.recipes import RECIPES, TOKENIZER_RECIPES

if TYPE_CHECKING:
    import torch

    from mergevq.codec import ImageReconstruction
    from mergevq.config import TokenizerRun
    from mergevq.estimate import Estimate

Run = TypeVar("Run")
Number = TypeVar("Number", int, float)

_TRAIN_USAGE = "usage: mergevq train RECIPE [--section.field VALUE ..]"

EXTRAS = {
    "data": ("pyarrow", "webdataset"),
    "demo": ("gradio",),
    "eval": ("matplotlib", "torchmetrics"),
    "export": ("onnx", "onnxruntime", "onnxscript"),
    "hub": ("huggingface_hub",),
    "log": ("tensorboard",),
    "quickstart": ("matplotlib", "scikit-learn"),
    "teacher": ("transformers",),
}
"""Packages of each extra a user may want, as in pyproject.toml."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; options that cannot be parsed end in `SystemExit(2)`.

    Args:
        argv: command and options; None takes those of the process.

    Returns:
        0 when done, 1 for an error whose message says what to do, 2 for an unknown command or
        recipe, 130 when interrupted.
    """
    name, *arguments = (sys.argv[1:] if argv is None else argv) or ["--help"]
    if name in {"-h", "--help"}:
        print(_usage())
        return 0
    if name not in COMMANDS:
        print(f"mergevq: no command {name!r}\n\n{_usage()}", file=sys.stderr)
        return 2
    logging.basicConfig(format="mergevq: %(message)s")
    with warnings.catch_warnings():
        warnings.showwarning = _show_warning
        try:
            if name == "train":
                return train(arguments)
            tyro.cli(COMMANDS[name], args=arguments, prog=f"mergevq {name}")
        except KeyboardInterrupt:
            return 130
        except Exception as error:
            if not _speaks_for_itself(error):
                raise
            print(f"mergevq: error: {error}", file=sys.stderr)
            return 1
    return 0


# ----------------------------------------------------------------------------------- commands


@dataclass(frozen=True, kw_only=True)
class _TrainOptions(Generic[Run]):
    """What `mergevq train RECIPE` takes: the recipe's fields, and how to run it."""

    run: Annotated[Run, tyro.conf.arg(name="")]
    dry_run: tyro.conf.FlagCreatePairsOff[bool] = False
    """Only print what the run would take, from a few small steps of it; nothing is written."""
    resume: tyro.conf.FlagCreatePairsOff[bool] = False
    """Go on from the newest checkpoint in `--out`."""


def train(arguments: list[str]) -> int:
    """Train a recipe, with any of its fields changed."""
    name, *overrides = arguments or [""]
    if name in {"-h", "--help"}:
        print(f"{_TRAIN_USAGE}\n\n{_recipe_list()}")
        return 0
    if name not in RECIPES:
        problem = f"mergevq train: no recipe {name!r}" if name else _TRAIN_USAGE
        print(f"{problem}\n\n{_recipe_list()}", file=sys.stderr)
        return 2
    run = RECIPES[name]()
    options = tyro.cli(
        _TrainOptions[type(run)],
        default=_TrainOptions(run=run),
        args=overrides,
        prog=f"mergevq train {name}",
        description=inspect.getdoc(RECIPES[name]),
        config=(tyro.conf.AvoidSubcommands,),
    )
    _let_threads_sleep()
    if isinstance(options.run, GeneratorRun):
        return _train_generator(options.run, dry_run=options.dry_run, resume=options.resume)
    if options.dry_run:
        from mergevq.estimate import estimate

        _print_estimate(options.run, estimate(options.run))
        return 0
    from mergevq.train_tokenizer import train as train_tokenizer

    model = train_tokenizer(options.run, resume=options.resume)
    if os.environ.get("RANK", "0") == "0":
        print(f"trained tokenizer: {model}")
    return 0


def _train_generator(run: GeneratorRun, *, dry_run: bool, resume: bool) -> int:
    """Train a generator, or say what that would take.

    Raises:
        ValueError: a dry run was asked for.
    """
    if dry_run:
        raise ValueError("--dry-run is for tokenizers only; leave it out")
    from mergevq.train_generator import train as train_generator

    model = train_generator(run, resume=resume)
    if os.environ.get("RANK", "0") == "0":
        print(f"trained generator: {model}")
    return 0


def quickstart(*, out: Path = Path("runs/quickstart"), num_steps: int | None = None) -> None:
    """Train a small tokenizer on handwritten digits and write a report: minutes on a CPU.

    What is in OUT is kept: an interrupted training goes on, a finished one is reported on again.

    Args:
        out: where training, report and pictures go.
        num_steps: optimizer steps, for a shorter or longer training.
    """
    _let_threads_sleep()
    from mergevq.quickstart import quickstart as run_quickstart

    report = run_quickstart(out, num_steps)
    for picture in sorted(report.parent.glob("*.png")):
        print(f"picture: {picture}")
    print(f"report: {report} (open it in a browser)")


def recipes() -> None:
    """List the recipes of `train`."""
    print(_recipe_list())


def reconstruct(
    images: tyro.conf.Positional[tuple[Path, ...]],
    *,
    model: str,
    tokens: tuple[int, ...] = (),
    out: Path = Path("reconstructions"),
    size_policy: SizePolicy = "error",
    device: Device = "auto",
) -> None:
    """Show what a tokenizer makes of images, and what that costs.

    Writes OUT/NAME.png: original, merge map, and reconstruction with the given and with the
    recovered source map, a row for each number of tokens.

    Args:
        images: files of any format and mode that Pillow reads.
        model: directory of a tokenizer, or its Hugging Face id.
        tokens: K, one or several; the tokenizer's own if there are none.
        out: where the pictures go.
        size_policy: for images of another size than trained: `error` takes multiples of the patch
            size as they are, `resize` keeps the aspect ratio and about the trained number of
            pixels, `tile` blends overlapping tiles of the trained size.
        device: where to compute.
    """
    outputs = _output_paths(images, out)
    _let_threads_sleep()
    from mergevq.codec import load_picture, reconstruct_image, reconstruction_figure
    from mergevq.run import resolve_device
    from mergevq.tokenizer import Tokenizer

    tokenizer = Tokenizer.from_pretrained(model).to(resolve_device(device))
    out.mkdir(parents=True, exist_ok=True)
    for path, output in zip(images, outputs, strict=True):
        picture = load_picture(path)
        results = []
        for num_kept in tokens or (None,):
            with _naming(path):
                result = reconstruct_image(tokenizer, picture, num_kept, size_policy=size_policy)
            print(f"{path}: {_result_line(result)}")
            results.append(result)
        reconstruction_figure(results).save(output)
        print(f"{path}: -> {output}")


def encode(
    *,
    model: str,
    data: str,
    out: Path,
    tokens: tuple[int, ...] = (),
    flip: tyro.conf.FlagCreatePairsOff[bool] = False,
    batch_size: int = 64,
    device: Device = "auto",
    num_workers: int = 2,
) -> None:
    """Write the tokens of all images of a data set, for training generators.

    Stopped and started again it goes on where it was, and writes the same bytes. Under torchrun the
    processes share the work.

    Args:
        model: directory of a tokenizer, or its Hugging Face id.
        data: a folder of images, parquet files, WebDataset shards, or `digits`.
        out: folder of the tokens.
        tokens: K, one or several; the tokenizer's own if there are none.
        flip: also encode the mirror image of each image.
        batch_size: images encoded at once, a divisor of the 1024 of a shard.
        device: where to compute.
        num_workers: loader processes; 0 loads in this one.
    """
    _let_threads_sleep()
    # Without a fixed workspace the products of a GPU may differ from one time to the next.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    from mergevq.encode import encode as encode_data

    written = encode_data(
        model,
        data,
        out,
        num_kept=tokens,
        flip=flip,
        batch_size=batch_size,
        device=device,
        num_workers=num_workers,
    )
    record = written.record
    kept = " and ".join(map(str, record.num_kept))
    broken = f"; {len(written.broken)} cannot be read" if written.broken else ""
    print(
        f"{out}: {kept} tokens of {record.num_bits} bits for each of {len(written)} rows, from "
        f"{record.num_images} images{broken}"
    )


def sample(  # noqa: PLR0913 - each is an option
    *,
    out: Path,
    model: str = "",
    tokenizer: str = "",
    classes: str = "",
    num: int = 16,
    guidance: float = 1.0,
    guidance_schedule: GuidanceSchedule = "constant",
    guidance_interval: tuple[float, float] = (0.0, 1.0),
    temperature: tuple[float, ...] = (1.0,),
    top_k: tuple[int, ...] = (0,),
    top_p: tuple[float, ...] = (1.0,),
    steps: int | None = None,
    tokens: int | None = None,
    budget: bool = True,
    seed: int = 0,
    batch_size: int = 16,
    weights: Weights = "float32",
    keep_from: Path | None = None,
    mask: Path | None = None,
    again: Path | None = None,
    images: tuple[int, ...] = (),
    device: Device = "auto",
) -> None:
    """Sample images from a generator, or make earlier ones again.

    Writes OUT/000000.png and so on, OUT/grid.png, and OUT/samples.json, from which
    `mergevq sample --again OUT/samples.json --images 3 --out DIR` makes image 3 again. An image
    depends on the seed and its number, not on how many there are.

    Args:
        out: folder of the images; must be empty.
        model: directory of the generator, or its Hugging Face id.
        tokenizer: directory of the tokenizer of its tokens, or its Hugging Face id.
        classes: class ids separated by commas, one for each image in turn; all there are if empty.
        num: images.
        guidance: scale of classifier-free guidance; 1 is none.
        guidance_schedule: how it rises from 1 as an image grows.
        guidance_interval: part of the sequence that is guided.
        temperature: one number, or one for each part of a token; 0 takes the most likely value.
        top_k: sample among the so many most likely values; 0 is all.
        top_p: sample among the most likely values that together have this probability.
        steps: of random order: forward passes, several tokens in each; one token each by default.
        tokens: K, one of those trained on; the generator's own by default.
        budget: of merge order: hold an image to K distinct tokens.
        seed: of the run.
        batch_size: images sampled at once.
        weights: bf16 and int8 are faster, and change what is sampled a little.
        keep_from: image to keep tokens of; of random order only, with `--mask`.
        mask: image as large, white where that one is made anew.
        again: `samples.json` of earlier images, which says all but `--out` and `--images`.
        images: numbers of the images to make again.
        device: where to compute.
    """
    _let_threads_sleep()
    from mergevq.generation import make_again, write_samples

    if again is not None:
        out.mkdir(parents=True, exist_ok=True)
        for number, picture in zip(images, make_again(again, images), strict=True):
            path = _unused(out / f"{number:06d}.png")
            picture.save(path)
            print(f"image: {path}")
        return
    run = SampleRun(
        model=_required("model", model),
        tokenizer=_required("tokenizer", tokenizer),
        classes=_class_ids(classes),
        num_images=num,
        num_kept=tokens,
        seed=seed,
        batch_size=batch_size,
        weights=weights,
        device=device,
        settings=SamplingSettings(
            guidance_scale=guidance,
            guidance_schedule=guidance_schedule,
            guidance_interval=guidance_interval,
            temperature=_one_or_several(temperature),
            top_k=_one_or_several(top_k),
            top_p=_one_or_several(top_p),
            budget=budget,
            num_steps=steps,
        ),
        keep_from=None if keep_from is None else str(keep_from),
        mask=None if mask is None else str(mask),
    )
    written = write_samples(run, out)
    if written.logit_error is not None:
        print(f"{weights} weights: logits are off by {written.logit_error:.2%} of their spread")
    print(f"{len(written.images)} images: {out}")
    print(f"grid: {written.grid}")


def convert(
    checkpoint: tyro.conf.Positional[Path],
    *,
    out: Path,
    image_size: int,
    tokens: int,
    num_heads: int,
) -> None:
    """Turn a checkpoint of the authors' code into a model directory of this one.

    What shapes cannot tell has to be said. The source predictor, which the authors' code does not
    train, is left random: only the given source map is of use.

    Args:
        checkpoint: their `.ckpt`, a torch state dict or safetensors.
        out: directory to write.
        image_size: side of the training images in pixels.
        tokens: K the model was trained for.
        num_heads: attention heads of encoder and decoder.
    """
    from mergevq.interop import load_official, official_config, read_official

    state = read_official(checkpoint)
    config = official_config(state, image_size=image_size, num_kept=tokens, num_heads=num_heads)
    load_official(state, config).tokenizer.save_pretrained(out)
    print(
        f"{out}: {config.stem} stem, width {config.dim}, {config.num_layers} encoder and "
        f"{config.num_decoder_layers} decoder blocks, {config.num_bits} bits; its source "
        "predictor is untrained"
    )


def bench(  # noqa: PLR0913 - each is an option
    subject: tyro.conf.Positional[Literal["tokenizer"]],
    *,
    recipe: str = "tiny64_gr",
    images: int = 16,
    repeats: int = 5,
    lpips: str | None = None,
    profile: tyro.conf.FlagCreatePairsOff[bool] = False,
    reference: Path = Path("benchmarks/reference.py"),
    device: Device = "auto",
    out: Path | None = None,
) -> None:
    """Measure how fast this machine encodes, decodes, trains and merges, and in what memory.

    In a checkout, beside plain definitions of the same. Needs no data and no trained model; set
    OMP_NUM_THREADS for the number of threads, and leave the machine alone meanwhile.

    Args:
        subject: what to measure.
        recipe: model, losses and precision of the train step.
        images: batch of encode, decode and train step.
        repeats: timed calls; the median counts.
        lpips: file or folder with LPIPS weights; the cache is looked into without.
        profile: also say which share each part of a train step takes.
        reference: file of the plain definitions; if it is not there, nothing is compared.
        device: where to compute.
        out: JSON file with all numbers and conditions.

    Raises:
        ValueError: there is no such recipe.
    """
    if recipe not in TOKENIZER_RECIPES:
        names = ", ".join(TOKENIZER_RECIPES)
        raise ValueError(f"recipe ({recipe}) must be a recipe for a {subject}: {names}")
    _let_threads_sleep()
    from mergevq import bench as benchmark
    from mergevq.checkpoint import write_json

    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
    run = TOKENIZER_RECIPES[recipe]()
    run = replace(
        run,
        loss=replace(run.loss, perceptual_path=lpips or run.loss.perceptual_path),
        train=replace(run.train, batch_size=images, accumulation=1, device=device),
    )
    conditions = benchmark.conditions(run)
    _print_table("conditions", {name: str(value) for name, value in conditions.items()})
    if not reference.is_file():
        print(f"no {reference} here: measuring without comparison")
    measurements, parts = [], []
    for measurement in benchmark.bench_tokenizer(
        run, num_repeats=repeats, reference=reference if reference.is_file() else None
    ):
        measurements.append(measurement)
        print(benchmark.line(measurement), flush=True)
    if profile:
        parts = benchmark.profile_train_step(run, num_repeats=repeats)
        shares = {part.name: f"{part.share:6.1%} {part.seconds:8.3f} s" for part in parts}
        _print_table("parts of a train step", shares)
    if out is not None:
        write_json(out, benchmark.record(conditions, measurements, parts))


def doctor() -> None:
    """Print what this machine and installation offer, for a bug report or before a long run."""
    import torch

    from mergevq.perceptual import TRUNKS, cache_folder
    from mergevq.run import resolve_device

    core = ("mergevq", "torch", "numpy", "pillow", "safetensors", "tyro", "jaxtyping", "tqdm")
    versions = {name: _version(name) or "not installed" for name in core}
    system = {"python": platform.python_version(), "system": platform.platform()}
    _print_table("versions", system | versions)
    devices = {name: _describe_device(name) for name in ("cpu", "cuda", "mps")}
    _print_table("devices", devices | {"auto": resolve_device("auto").type})
    backends = {
        name: ", ".join(_attention_backends(torch.device(name)))
        for name, description in devices.items()
        if description != "none"
    }
    _print_table("attention backends, with the bias of merged sizes", backends)
    _print_table("extras", {name: _describe_extra(name) for name in EXTRAS})
    folder = cache_folder()
    existing = next(path for path in (folder, *folder.parents) if path.exists())
    writable = "writable" if os.access(existing, os.W_OK) else "NOT writable"
    weights = {
        f"lpips {trunk}": "found" if (folder / f"lpips_{trunk}.safetensors").is_file() else "none"
        for trunk in TRUNKS
    }
    _print_table("cache", {str(folder): writable} | weights)


COMMANDS: dict[str, Callable[..., object]] = {
    command.__name__: command
    for command in (quickstart, train, recipes, reconstruct, encode, sample, convert, bench, doctor)
}


# -------------------------------------------------------------------------------- what is said


def _usage() -> str:
    """The commands, one line each."""
    lines = [f"  {name:<12} {_summary(command)}" for name, command in COMMANDS.items()]
    return "\n".join(
        [
            "usage: mergevq COMMAND [OPTIONS]",
            "",
            *lines,
            "",
            "`mergevq COMMAND --help` lists the options of a command.",
        ]
    )


def _recipe_list() -> str:
    """The recipes, one line each."""
    lines = [f"  {name:<16} {_summary(recipe)}" for name, recipe in RECIPES.items()]
    return "\n".join(["recipes:", *lines])


def _summary(function: Callable[..., object]) -> str:
    """First line of a docstring."""
    return (inspect.getdoc(function) or "").partition("\n")[0]


def _result_line(result: "ImageReconstruction") -> str:
    """Tokens, bits and quality of one reconstruction."""
    tiles = f"{result.num_tiles} tiles x " if result.num_tiles > 1 else ""
    return (
        f"{tiles}{result.num_kept} of {result.num_cells} tokens, "
        f"{result.bits.total:.0f} bits ({result.bits.tokens:.0f} tokens + "
        f"{result.bits.source:.0f} source), {result.bits_per_pixel:.3f} bits per pixel, "
        f"PSNR {result.psnr_given:.2f} dB given source, "
        f"{result.psnr_recovered:.2f} dB recovered source"
    )


def _print_estimate(run: "TokenizerRun", found: "Estimate") -> None:
    """Print what a run would take."""
    parameters = sum(found.num_parameters.values())
    parts = ", ".join(f"{count:,} {name}" for name, count in found.num_parameters.items())
    candidates = run.kept.candidates
    kept = f"{min(candidates)} to " if len(candidates) > 1 else ""
    num_images = run.train.num_steps * run.train.batch_size
    classes = f"{found.num_classes} classes" if found.num_classes else "no labels"
    precision = str(found.dtype).removeprefix("torch.")
    hours, rest = divmod(num_images / found.images_per_second, 3600)
    rows = {
        "parameters": f"{parameters:,} ({parts})",
        "tokens": f"{kept}{max(candidates)} of {run.model.num_tokens} per image, "
        f"{run.model.num_bits} bits each",
        "data": f"{found.num_train_images:,} training and {found.num_val_images:,} validation "
        f"images, {classes}",
        "steps": f"{run.train.num_steps:,} of {run.train.batch_size} images: every image "
        f"{num_images / found.num_train_images:.3g} times",
        "device": f"{found.device.type}, {precision}",
        "memory": f"{found.memory_bytes / 2**30:.3g} GiB of tensors with {found.pass_images} "
        "images at once (estimate)",
        "speed": f"{found.images_per_second:.3g} images per second without loading (measured with "
        f"{found.timed_images} at once)",
        "time": f"{hours:.0f} h {rest / 60:.0f} min at that speed",
        "out": f"{run.out}",
    }
    _print_table("dry run", rows)


def _show_warning(message: Warning | str, *_: object) -> None:
    """Print a warning as one line, without the code that gave it."""
    print(f"mergevq: warning: {message}", file=sys.stderr)


def _speaks_for_itself(error: Exception) -> bool:
    """Whether an error's message is enough: one we raised, or one about a file."""
    if isinstance(error, OSError):
        return True
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    raised_in = trace.tb_frame.f_globals.get("__name__", "") if trace else ""
    return isinstance(error, ValueError | RuntimeError) and raised_in.startswith("mergevq.")


def _print_table(title: str, rows: dict[str, str]) -> None:
    """Print a title, and names and values in two columns."""
    print(title)
    for name, value in rows.items():
        print(f"  {name:<14} {value}")


# ------------------------------------------------------------------------- what is looked up


def _let_threads_sleep() -> None:
    """Make OpenMP's idle threads sleep, unless the user chose; before torch is loaded."""
    # By default they spin for a while after every operator, and a decoder is hundreds of small
    # ones. On two busy cores reconstructing was 3 to 7 times faster so, at a quarter of the work.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


def _output_paths(images: Sequence[Path], out: Path) -> list[Path]:
    """OUT/NAME.png for every image, numbered where names are equal.

    Raises:
        ValueError: there are no images, or one would be overwritten.
    """
    if not images:
        raise ValueError("name at least one image: mergevq reconstruct IMAGE.. --model DIR")
    outputs: list[Path] = []
    for image in images:
        candidates = [out / f"{image.stem}.png"]
        candidates += [out / f"{image.stem}-{number}.png" for number in range(2, len(images) + 1)]
        outputs.append(next(path for path in candidates if path not in outputs))
    overwritten = {path.resolve() for path in images} & {path.resolve() for path in outputs}
    if overwritten:
        raise ValueError(f"out ({out}) would overwrite {overwritten.pop()}; choose another folder")
    return outputs


def _required(name: str, value: str) -> str:
    """An option that `--again` would do without.

    Raises:
        ValueError: it was not given.
    """
    if not value:
        raise ValueError(f"--{name} is missing: the directory of the {name}")
    return value


def _class_ids(text: str) -> tuple[int, ...]:
    """Numbers separated by commas.

    Raises:
        ValueError: something else is between them.
    """
    try:
        return tuple(int(part) for part in text.split(",") if part.strip())
    except ValueError:
        raise ValueError(f"classes ({text}) must be numbers separated by commas: 3,7") from None


def _one_or_several(numbers: tuple[Number, ...]) -> Number | tuple[Number, ...]:
    """A single number for all parts of a token, or one for each."""
    return numbers[0] if len(numbers) == 1 else numbers


def _unused(path: Path) -> Path:
    """A path where nothing is.

    Raises:
        ValueError: there is something.
    """
    if path.exists():
        raise ValueError(f"{path} is there already; choose another folder with --out")
    return path


@contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Put the file that an error is about before its message.

    Raises:
        ValueError: whatever was raised inside.
    """
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def _version(distribution: str) -> str | None:
    """Version of an installed package; None without it."""
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def _describe_extra(extra: str) -> str:
    """Whether an extra is installed, and how to install it if not."""
    missing = [package for package in EXTRAS[extra] if _version(package) is None]
    if not missing:
        return "installed"
    return f"without {', '.join(missing)}: pip install 'mergevq[{extra}]'"


def _describe_device(name: str) -> str:
    """What a kind of device is on this machine, and the precision it would train in."""
    import torch

    from mergevq.run import resolve_device, resolve_precision

    try:
        device = resolve_device(name)
    except ValueError:
        return "none"
    precision = "float32" if resolve_precision("auto", device) is None else "bf16"
    if name == "cpu":
        return f"{torch.get_num_threads()} threads of {os.cpu_count()} cores, {precision}"
    if name == "mps":
        return f"{platform.machine()}, {precision}"
    names = [torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count())]
    return f"{', '.join(names)}, {precision}"


def _attention_backends(device: "torch.device") -> list[str]:
    """Kernels of scaled dot-product attention that run with an additive bias."""
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel

    from mergevq.run import resolve_precision

    dtype = resolve_precision("auto", device)
    query = torch.zeros(1, 1, 16, 64, device=device, dtype=dtype)
    bias = torch.zeros(1, 1, 1, 16, device=device, dtype=dtype)
    usable = []
    for name, backend in (
        ("flash", SDPBackend.FLASH_ATTENTION),
        ("efficient", SDPBackend.EFFICIENT_ATTENTION),
        ("cudnn", SDPBackend.CUDNN_ATTENTION),
        ("math", SDPBackend.MATH),
    ):
        try:
            with warnings.catch_warnings(action="ignore"), sdpa_kernel(backend):
                torch.nn.functional.scaled_dot_product_attention(query, query, query, bias)
        except RuntimeError:
            continue
        usable.append(name)
    return usable
