"""The command line: `mergevq COMMAND`.

Each command is a function whose signature is its options and whose docstring is its help. What is
heavy is imported inside, so that help, recipes and mistyped options never wait for torch.
"""

import inspect
import io
import logging
import os
import platform
import shlex
import signal
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Generic, TypeVar

import tyro

from mergevq import cli_bench, cli_evaluate, cli_probe, cli_source
from mergevq.choices import nearest
from mergevq.cli_errors import (
    command_line,
    options_of_command,
    options_of_settings,
    parsed,
    problem,
)
from mergevq.cli_errors import speaks_for_itself as _speaks_for_itself
from mergevq.cli_evaluate import (
    Counts,
    Sampling,
    logit_error_line,
    whole_numbers,
)
from mergevq.config import MAX_PIXELS, Device, SizePolicy
from mergevq.config_generator import GeneratorRun
from mergevq.extras import EXTRAS, install_command, installed_version, missing
from mergevq.recipes import RECIPES
from mergevq.terminal import MAY_BE_EMPTY, let_products_repeat, prepare_to_compute, print_table

if TYPE_CHECKING:
    import torch

    from mergevq.codec import ImageReconstruction
    from mergevq.config import TokenizerConfig

Run = TypeVar("Run")

_LARGE = 8
"""Times the trained number of pixels from which a picture passed whole gets a warning."""
_TRAIN_USAGE = "usage: mergevq train RECIPE [--section.field VALUE ..]"


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; options that cannot be parsed end in `SystemExit(2)`.

    Args:
        argv: command and options; None takes those of the process.

    Returns:
        0 when done, 1 for an error whose message says what to do, 2 for an unknown command or
        recipe, 130 when interrupted.
    """
    given = (sys.argv[1:] if argv is None else argv) or ["--help"]
    name, *arguments = map(_at_home, given)
    if name == "--version":
        print(f"mergevq {installed_version('mergevq') or 'not installed'}")
        return 0
    if name in {"-h", "--help"}:
        print(_usage())
        return 0
    prog, commands = "mergevq", COMMANDS
    if name in GROUPS:
        prog, commands = f"mergevq {name}", GROUPS[name]
        name, *arguments = arguments or ["--help"]
        if name in {"-h", "--help"}:
            print(_listed(prog, commands))
            return 0
        prepare_to_compute()
        let_products_repeat()
    if name not in commands:
        usage = _usage() if commands is COMMANDS else _listed(prog, commands)
        print(f"{prog}: no command {name!r}{nearest(name, commands)}\n\n{usage}", file=sys.stderr)
        return 2
    return _call(commands[name], arguments, prog=f"{prog} {name}")


def _call(command: Callable[..., object], arguments: list[str], *, prog: str) -> int:
    """Run a command, and say what went wrong; see `main`."""
    logging.basicConfig(format="mergevq: %(message)s")
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            # A name that the console cannot show is escaped, and ends nothing.
            stream.reconfigure(errors="backslashreplace")
    with warnings.catch_warnings():
        warnings.showwarning = _show_warning
        try:
            if command in ALONE:
                _require_one_process(prog)
            if command is train:
                return train(arguments)
            command_line(command, arguments, prog=prog)()
        except KeyboardInterrupt:
            return 130
        except BrokenPipeError:
            # Whoever read the output has seen enough. Python would fail again as it ends.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 1
        except Exception as error:
            if not _speaks_for_itself(error):
                raise
            print(f"mergevq: error: {_problem(error, command, arguments)}", file=sys.stderr)
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
        problem = _TRAIN_USAGE
        if name:
            problem = f"mergevq train: no recipe {name!r}{nearest(name, RECIPES)}"
        print(f"{problem}\n\n{_recipe_list()}", file=sys.stderr)
        return 2
    run = RECIPES[name]()
    options = parsed(
        lambda: tyro.cli(
            _TrainOptions[type(run)],
            default=_TrainOptions(run=run),
            args=overrides,
            prog=f"mergevq train {name}",
            description=inspect.getdoc(RECIPES[name]),
            config=(tyro.conf.AvoidSubcommands,),
        )
    )
    prepare_to_compute()
    if options.dry_run:
        from mergevq.estimate import describe, estimate

        print_table("dry run", describe(options.run, estimate(options.run)))
        return 0
    from mergevq.training import train as train_run

    model = train_run(options.run, resume=options.resume)
    kind = "generator" if isinstance(options.run, GeneratorRun) else "tokenizer"
    if os.environ.get("RANK", "0") == "0":
        print(f"trained {kind}: {model}")
    return 0


def quickstart(*, out: Path = Path("runs/quickstart"), num_steps: int | None = None) -> None:
    """Train a small tokenizer and generator on handwritten digits and write a report, in minutes.

    What is in OUT is kept: an interrupted training goes on, a finished one is reported on again.

    Args:
        out: where training, report and pictures go.
        num_steps: optimizer steps of the tokenizer, for a shorter or longer training of both.
    """
    prepare_to_compute()
    from mergevq.quickstart import quickstart as run_quickstart

    done = run_quickstart(out, num_steps)
    print("reached:")
    for number in done.reached:
        print(f"  {number.value:<14} {number.label}")
    print(f"report: {done.report} (open it in a browser; its pictures are beside it)")
    print("next:")
    for line in _after_quickstart(done.tokenizer, done.generator):
        print(f"  {line}")


def _after_quickstart(tokenizer: Path, generator: Path) -> list[str]:
    """Commands to go on with."""
    models = ["--model", str(tokenizer), "--generator", str(generator)]
    commands = [
        ["sample", "--generator", str(generator), "--guidance", "2", "--out", "samples"],
        ["reconstruct", "PICTURE", "--model", str(tokenizer), "--size-policy", "resize"],
        ["demo", *models, "--data", "digits"],
        ["train", "photos64", "--data.path", "FOLDER"],
    ]
    return [shlex.join(["mergevq", *command]) for command in commands]


def recipes() -> None:
    """List the recipes of `train`."""
    print(_recipe_list())


def reconstruct(
    images: Annotated[tyro.conf.Positional[tuple[Path, ...]], MAY_BE_EMPTY],
    *,
    model: str,
    num_kept: Counts = (),
    out: Path = Path("reconstructions"),
    size_policy: SizePolicy = "error",
    device: Device = "auto",
) -> None:
    """Show what a tokenizer makes of images, and what that costs.

    Writes OUT/NAME.png: original, merge map, and reconstruction with the given and with the
    recovered source map, a row for each number of tokens; and in OUT/NAME the merge map and both
    reconstructions as pictures of their own, in the size of the image.

    Args:
        images: files of any format and mode that Pillow reads.
        model: directory of a tokenizer, or owner/name@revision on Hugging Face.
        num_kept: K, one or several (16,20); the tokenizer's own if there are none.
        out: where the pictures go.
        size_policy: for images of another size than trained: `error` takes multiples of the patch
            size as they are, `resize` keeps the aspect ratio and about the trained number of
            pixels, `tile` blends overlapping tiles of the trained size.
        device: where to compute.

    Raises:
        ValueError: an image could not be done; all others are.
    """
    outputs, num_kepts = _output_paths(images, out), whole_numbers("num_kept", num_kept)
    prepare_to_compute()
    from mergevq.codec import full_pictures, reconstruct_image, reconstruction_figure
    from mergevq.decoding import load_picture
    from mergevq.run import resolve_device
    from mergevq.tokenizer import Tokenizer

    tokenizer = Tokenizer.from_pretrained(model).to(resolve_device(device))
    out.mkdir(parents=True, exist_ok=True)
    failed: list[ValueError] = []
    for path, output in zip(images, outputs, strict=True):
        try:
            picture = load_picture(path)
            if size_policy == "error":
                _warn_if_large(path, picture.size, tokenizer.config)
            with _naming(path):
                results = [
                    reconstruct_image(tokenizer, picture, count, size_policy=size_policy)
                    for count in num_kepts or (None,)
                ]
        except ValueError as error:
            failed.append(error)
            continue
        # Saved first: a console that cannot show a name must not cost the picture.
        reconstruction_figure(results).save(output)
        folder = output.with_suffix("")
        folder.mkdir(exist_ok=True)
        for name, full in full_pictures(results).items():
            full.save(folder / name)
        for result in results:
            print(f"{path}: {_result_line(result)}")
        print(f"{path}: -> {output}, full size in {folder}")
    if len(images) == 1 and failed:
        raise failed[0]
    if failed:
        problems = "; ".join(map(str, failed))
        raise ValueError(f"{len(failed)} of {len(images)} images could not be done: {problems}")


def encode(  # noqa: PLR0913 - each is an option
    *,
    model: str,
    data: str,
    out: Path,
    num_kept: Counts = (),
    flip: tyro.conf.FlagCreatePairsOff[bool] = False,
    max_pixels: int = MAX_PIXELS,
    batch_size: int = 64,
    device: Device = "auto",
    num_workers: int = 2,
) -> None:
    """Write the tokens of all images of a data set, for training generators.

    Stopped and started again it goes on where it was, and writes the same bytes. Under torchrun the
    processes share the work.

    Args:
        model: directory of a tokenizer, or owner/name@revision on Hugging Face.
        data: a folder of images, parquet files, WebDataset shards, or `digits`.
        out: folder of the tokens.
        num_kept: K, one or several (16,20); the tokenizer's own if there are none.
        flip: also encode the mirror image of each image.
        max_pixels: largest picture that is read, as width times height; larger ones count as
            unreadable.
        batch_size: images encoded at once, a divisor of the 1024 of a shard.
        device: where to compute.
        num_workers: loader processes; 0 loads in this one.
    """
    prepare_to_compute()
    let_products_repeat()
    from mergevq.encode import encode as encode_data

    written = encode_data(
        model,
        data,
        out,
        num_kept=whole_numbers("num_kept", num_kept),
        flip=flip,
        max_pixels=max_pixels,
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
    sampling: Sampling,
    classes: str = "",
    num: int = 16,
    batch_size: int = 16,
    keep_from: Path | None = None,
    mask: Path | None = None,
    again: Path | None = None,
    images: Annotated[tuple[int, ...], MAY_BE_EMPTY] = (),
) -> None:
    """Sample images from a generator, or make earlier ones again.

    Writes OUT/000000.png and so on, OUT/grid.png, and OUT/samples.json, from which
    `mergevq sample --again OUT/samples.json --images 3 --out DIR` makes image 3 again. An image
    depends on the seed and its number, not on how many there are.

    Args:
        out: folder of the images; one that the same command left unfinished is completed.
        sampling: what samples, and how.
        classes: class ids separated by commas, one for each image in turn; all there are if empty.
        num: images.
        batch_size: images sampled at once.
        keep_from: image to keep tokens of; of random order only, with `--mask`.
        mask: image as large, white where that one is made anew.
        again: `samples.json` of earlier images, which says all but `--out` and `--images`.
        images: numbers of the images to make again.
    """
    prepare_to_compute()
    from mergevq.generation import make_again, write_samples

    if again is not None:
        out.mkdir(parents=True, exist_ok=True)
        for number, picture in zip(images, make_again(again, images), strict=True):
            path = _unused(out / f"{number:06d}.png")
            picture.save(path)
            print(f"image: {path}")
        return
    run = replace(
        sampling.run(num_images=num, batch_size=batch_size),
        classes=whole_numbers("classes", [classes]),
        keep_from=None if keep_from is None else str(keep_from),
        mask=None if mask is None else str(mask),
    )
    written = write_samples(run, out)
    if written.logit_error is not None:
        print(logit_error_line(run.weights, written.logit_error))
    if written.num_made == 0:
        print("complete already, nothing was sampled")
    print(f"{len(written.images)} images: {out}")
    print(f"grid: {written.grid}")


def convert(
    checkpoint: tyro.conf.Positional[Path | None] = None,
    *,
    out: Path,
    image_size: int | None = None,
    num_kept: int | None = None,
    num_heads: int | None = None,
    num_decoder_heads: int | None = None,
    lpips: tuple[Path, Path] | None = None,
) -> None:
    """Turn a checkpoint of the authors' code into a model directory of this one, or LPIPS weights.

    What shapes cannot tell has to be said. The source predictor, which the authors' code does not
    train, is left random: only the given source map is of use.

    Args:
        checkpoint: their `.ckpt`, a torch state dict or safetensors.
        out: directory to write; of LPIPS, the safetensors file.
        image_size: side of the training images in pixels.
        num_kept: K the model was trained for.
        num_heads: attention heads of the encoder.
        num_decoder_heads: attention heads of the decoder; none is 12 where it is 768 wide (d96),
            else 8.
        lpips: instead of a checkpoint, torchvision's file of a VGG-16, AlexNet or SqueezeNet and
            the LPIPS authors' file of its heads.

    Raises:
        ValueError: neither a checkpoint with all that shapes cannot tell nor LPIPS is named.
    """
    from mergevq.interop import load_official, official_config, read_official, read_state
    from mergevq.perceptual import convert_perceptual_files

    if lpips is not None:
        print(f"LPIPS: {convert_perceptual_files(*lpips, out, read=read_state)}")
        return
    if checkpoint is None or image_size is None or num_kept is None or num_heads is None:
        raise ValueError(
            "name a checkpoint with --image-size, --num-kept and --num-heads, "
            "or --lpips TRUNK HEADS"
        )
    state = read_official(checkpoint)
    config = official_config(
        state,
        image_size=image_size,
        num_kept=num_kept,
        num_heads=num_heads,
        num_decoder_heads=num_decoder_heads,
    )
    load_official(state, config).tokenizer.save_pretrained(out)
    print(
        f"{out}: {config.stem} stem, width {config.dim}, {config.num_layers} encoder and "
        f"{config.num_decoder_layers} decoder blocks, {config.num_bits} bits; its source "
        "predictor is untrained"
    )


def demo(
    *,
    model: str | None = None,
    generator: str | None = None,
    data: str | None = None,
    port: int = 7860,
    device: Device = "auto",
) -> None:
    """Serve a web page to try a model on: reconstruct pictures, draw samples, find neighbours.

    Args:
        model: a tokenizer's directory, or owner/name@revision on Hugging Face; without one,
            the tokenizer and the generator of handwritten digits that come with the package.
        generator: a generator trained on its tokens; samples are left out without.
        data: images to find neighbours among, in any form that training reads; the digits when
            there is no model.
        port: of this machine, where the page is; nobody else can reach it.
        device: where to compute.
    """
    prepare_to_compute()
    from mergevq.app import serve

    # Ended by either signal, the page takes its pictures with it.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with serve(model, generator=generator, data=data, device=device, port=port) as page:
        print(f"page: {page.local_url} (Ctrl-C ends it)")
        page.block_thread()


def doctor() -> None:
    """Print what this machine and installation offer, for a bug report or before a long run."""
    import torch

    from mergevq.perceptual import TRUNKS, cache_folder
    from mergevq.run import resolve_device

    core = ("mergevq", "torch", "numpy", "pillow", "safetensors", "tyro", "jaxtyping", "tqdm")
    versions = {name: installed_version(name) or "not installed" for name in core}
    system = {"python": platform.python_version(), "system": platform.platform()}
    print_table("versions", system | versions)
    devices = {name: _describe_device(name) for name in ("cpu", "cuda", "mps")}
    print_table("devices", devices | {"auto": resolve_device("auto").type})
    backends = {
        name: ", ".join(_attention_backends(torch.device(name)))
        for name, description in devices.items()
        if description != "none"
    }
    print_table("attention backends, with the bias of merged sizes", backends)
    print_table("extras", {name: _describe_extra(name) for name in EXTRAS})
    folder = cache_folder()
    existing = next(path for path in (folder, *folder.parents) if path.exists())
    writable = "writable" if os.access(existing, os.W_OK) else "NOT writable"
    weights = {
        f"lpips {trunk}": "found" if (folder / f"lpips_{trunk}.safetensors").is_file() else "none"
        for trunk in TRUNKS
    }
    print_table("cache", {str(folder): writable} | weights)


COMMANDS: dict[str, Callable[..., object]] = {
    command.__name__: command
    for command in (quickstart, train, recipes, reconstruct, encode, sample, convert, demo, doctor)
}
COMMANDS |= cli_source.COMMANDS
GROUPS = {
    "evaluate": cli_evaluate.COMMANDS,
    "probe": cli_probe.COMMANDS,
    "bench": cli_bench.COMMANDS,
}
"""Commands of two words."""
ALONE: set[Callable[..., object]] = {
    reconstruct,
    sample,
    cli_evaluate.selftest,
    *cli_probe.COMMANDS.values(),
    *cli_source.COMMANDS.values(),
}
"""Commands that several processes would only do several times over, into one folder."""


# -------------------------------------------------------------------------------- what is said


def _usage() -> str:
    """The commands, one line each."""
    commands = COMMANDS | {
        f"{group} {name}": command
        for group, members in GROUPS.items()
        for name, command in members.items()
    }
    return _listed("mergevq", commands)


def _listed(prog: str, commands: Mapping[str, Callable[..., object]]) -> str:
    """Some commands, one line each."""
    width = max(map(len, commands))
    lines = [f"  {name:<{width}}  {_summary(command)}" for name, command in commands.items()]
    return "\n".join(
        [
            f"usage: {prog} COMMAND [OPTIONS]",
            "",
            *lines,
            "",
            f"`{prog} COMMAND --help` lists the options of a command.",
        ]
    )


def _recipe_list() -> str:
    """The recipes, one line each."""
    lines = [f"  {name:<22} {_summary(recipe)}" for name, recipe in RECIPES.items()]
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
        f"{result.bits.source:.0f} source), {result.price}, "
        f"PSNR {result.psnr_given:.2f} dB given source, "
        f"{result.psnr_recovered:.2f} dB recovered source"
    )


def _show_warning(message: Warning | str, *_: object) -> None:
    """Print a warning as one line, without the code that gave it."""
    print(f"mergevq: warning: {message}", file=sys.stderr)


def _problem(error: Exception, command: Callable[..., object], arguments: Sequence[str]) -> str:
    """An error's message in the words of the command line."""
    if command is train:
        run = RECIPES[arguments[0]]()
        return problem(error, arguments, options_of_settings(run), run.out)
    out = inspect.signature(command).parameters.get("out")
    default = str(out.default) if out is not None and isinstance(out.default, Path) else None
    return problem(error, arguments, options_of_command(command), default)


# ------------------------------------------------------------------------- what is looked up


def _at_home(argument: str) -> str:
    """A word of a command line, with the user's folder for `~` as shells put it for a whole word.

    They leave that of `--out=~/x` as it is.
    """
    option, equals, value = argument.partition("=")
    if option.startswith("--") and equals:
        return f"{option}={os.path.expanduser(value)}"
    return os.path.expanduser(argument)


def _require_one_process(prog: str) -> None:
    """Refuse to be one of several processes.

    Raises:
        ValueError: there are several.
    """
    world_size = os.environ.get("WORLD_SIZE", "1")
    if world_size != "1":
        raise ValueError(
            f"{prog} runs in one process, and there are {world_size} (WORLD_SIZE); start it "
            "without torchrun"
        )


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


def _warn_if_large(path: Path, size: tuple[int, int], config: "TokenizerConfig") -> None:
    """Say how much more a picture of (width, height) takes than one of the trained size."""
    times = size[0] * size[1] / config.image_size**2
    if times >= _LARGE:
        cells = size[0] * size[1] // config.patch_size**2
        print(
            f"mergevq: {path}: {size[0]} x {size[1]} pixels are {cells} tokens at once, "
            f"{times:.0f} times the {config.grid_size**2} trained on, "
            "which may take minutes and much memory; "
            "--size-policy tile or resize takes less",
            file=sys.stderr,
        )


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


def _describe_extra(extra: str) -> str:
    """Whether an extra is installed, and how to install it if not."""
    absent = missing(extra)
    return f"without {', '.join(absent)}: {install_command(extra)}" if absent else "installed"


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
