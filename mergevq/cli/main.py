"""The command line: `mergevq COMMAND`.

Each command is a function whose signature is its options and whose docstring is its help. What is
heavy is imported inside, so that help, recipes and mistyped options never wait for torch.
"""

import contextlib
import inspect
import io
import logging
import os
import signal
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated

from mergevq.cli import bench as cli_bench
from mergevq.cli import evaluate as cli_evaluate
from mergevq.cli import export as cli_export
from mergevq.cli import probe as cli_probe
from mergevq.cli import train as cli_source
from mergevq.cli.about import COMPLETE, candidates, completion, doctor, models, parts, publish
from mergevq.cli.compress import compress, decompress
from mergevq.cli.errors import command_line, options_of_command, options_of_settings, problem
from mergevq.cli.errors import speaks_for_itself as _speaks_for_itself
from mergevq.cli.images import convert, encode, quantize, reconstruct, sample
from mergevq.cli.options import MAY_BE_EMPTY
from mergevq.cli.tables import next_lines, summary
from mergevq.cli.train import recipes, train
from mergevq.config.base import MAX_PIXELS, Device, Precision, nearest
from mergevq.config.kinds import with_kinds
from mergevq.config.recipes import RECIPES
from mergevq.runtime.environment import installed_version, let_products_repeat, prepare_to_compute


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; options that cannot be parsed end in `SystemExit(2)`.

    Args:
        argv: command and options; None takes those of the process.

    Returns:
        0 when done, 1 for an error whose message says what to do, 2 for an unknown command or
        recipe, 130 when interrupted.
    """
    given = sys.argv[1:] if argv is None else argv
    if given and given[0] == COMPLETE:
        print("\n".join(candidates(given[1:], COMMANDS, GROUPS)))
        return 0
    name, *arguments = map(_at_home, given or [""])
    if name in _ABOUT:
        print(_ABOUT[name]())
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


def quickstart(*, out: Path = Path("runs/quickstart"), num_steps: int | None = None) -> None:
    """Train a small tokenizer and generator on handwritten digits and write a report, in minutes.

    What is in OUT is kept: an interrupted training goes on, a finished one is reported on again.

    Args:
        out: where training, report and pictures go.
        num_steps: optimizer steps of the tokenizer, for a shorter or longer training of both.
    """
    prepare_to_compute()
    from mergevq.demo.quickstart import quickstart as run_quickstart

    done = run_quickstart(out, num_steps)
    print("reached:")
    for number in done.reached:
        print(f"  {number.value:<14} {number.label}")
    print(f"report: {done.report} (open it in a browser; its pictures are beside it)")
    print(_after_quickstart(done.tokenizer, done.generator))


def _after_quickstart(tokenizer: Path, generator: Path) -> str:
    """Commands to go on with."""
    models = ("--model", tokenizer, "--generator", generator)
    return next_lines(
        ("sample", "--generator", generator, "--guidance", 2, "--out", "samples"),
        ("reconstruct", "PICTURE", "--model", tokenizer, "--size-policy", "resize"),
        ("demo", *models, "--data", "digits"),
        ("train", "photos64", "--data.path", "FOLDER"),
    )


def demo(
    *,
    model: str | None = None,
    generator: Annotated[tuple[str, ...], MAY_BE_EMPTY] = (),
    compare: str | None = None,
    data: str | None = None,
    max_pixels: int = MAX_PIXELS,
    port: int = 7860,
    device: Device = "auto",
    precision: Precision = "auto",
) -> None:
    """Serve a web page to try a model on: tokens of pictures, samples, neighbours, comparisons.

    Args:
        model: a tokenizer's directory, a name of `mergevq models`, or owner/name@revision on
            Hugging Face; without one, the tokenizer and the generator that come with the package.
        generator: a generator trained on its tokens; of several the samples are side by side, and
            without one there are none.
        compare: another tokenizer, to compare its pictures with.
        data: images to find neighbours among, in any form that training reads.
        max_pixels: largest of these images that is read, as width times height.
        port: of this machine, where the page is; nobody else can reach it.
        device: where to compute.
        precision: of the tokenizer; auto is bf16 where the device gains from it, else float32.
    """
    prepare_to_compute()
    from mergevq.demo.app import serve

    # Ended by either signal, the page takes its pictures with it.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    served = serve(
        model,
        generator=generator,
        compare=compare,
        data=data,
        max_pixels=max_pixels,
        device=device,
        precision=precision,
        port=port,
    )
    # The page waits for a signal, and one may come before it does.
    with served as page, contextlib.suppress(KeyboardInterrupt):
        print(f"page: {page.local_url} (Ctrl-C ends it)")
        page.block_thread()


COMMANDS: dict[str, Callable[..., object]] = {
    command.__name__: command
    for command in (
        quickstart,
        train,
        recipes,
        models,
        publish,
        parts,
        reconstruct,
        compress,
        decompress,
        encode,
        quantize,
        sample,
        convert,
        demo,
        doctor,
        completion,
    )
}
COMMANDS |= cli_source.COMMANDS
GROUPS = {
    "evaluate": cli_evaluate.COMMANDS,
    "probe": cli_probe.COMMANDS,
    "bench": cli_bench.COMMANDS,
    "export": cli_export.COMMANDS,
}
"""Commands of two words."""
ALONE: set[Callable[..., object]] = {
    reconstruct,
    compress,
    decompress,
    quantize,
    sample,
    publish,
    cli_evaluate.selftest,
    cli_evaluate.correlation,
    cli_evaluate.text,
    cli_evaluate.masks,
    *cli_probe.COMMANDS.values(),
    *cli_export.COMMANDS.values(),
    *cli_source.COMMANDS.values(),
}
"""Commands that several processes would only do several times over, into one folder."""


# -------------------------------------------------------------------------------- what is said


_FIRST_STEPS = {
    "see a picture as tokens": "reconstruct PICTURE --size-policy resize",
    "make pictures": "sample --out samples",
    "try a model on a web page": "demo",
    "keep a picture in a few hundred bytes": "compress PICTURE --out compressed",
    "train on your own pictures": "train photos64 --data.path FOLDER",
    "measure a model": "evaluate reconstruction --data FOLDER",
}
"""The six things that people do, with a command for each."""


def _first_steps() -> str:
    """The six things that people do, one example each."""
    width = max(map(len, _FIRST_STEPS))
    lines = [f"  {purpose:<{width}}  mergevq {line}" for purpose, line in _FIRST_STEPS.items()]
    return "\n".join(
        [
            "mergevq: images as a few discrete tokens, and images of new tokens",
            "",
            *lines,
            "",
            "Without --model these use models that come with the package (`mergevq models`).",
            "`mergevq --help` lists all commands, `mergevq COMMAND --help` the options of one.",
        ]
    )


def _version() -> str:
    """Name and version."""
    return f"mergevq {installed_version('mergevq') or 'not installed'}"


def _usage() -> str:
    """The commands, one line each."""
    commands = COMMANDS | {
        f"{group} {name}": command
        for group, members in GROUPS.items()
        for name, command in members.items()
    }
    return _listed("mergevq", commands)


_ABOUT = {"": _first_steps, "--version": _version, "-h": _usage, "--help": _usage}
"""Texts to print where no command is named."""


def _listed(prog: str, commands: Mapping[str, Callable[..., object]]) -> str:
    """Some commands, one line each."""
    width = max(map(len, commands))
    lines = [f"  {name:<{width}}  {summary(command)}" for name, command in commands.items()]
    return "\n".join(
        [
            f"usage: {prog} COMMAND [OPTIONS]",
            "",
            *lines,
            "",
            f"`{prog} COMMAND --help` lists the options of a command.",
        ]
    )


def _show_warning(message: Warning | str, *_: object) -> None:
    """Print a warning as one line, without the code that gave it."""
    print(f"mergevq: warning: {message}", file=sys.stderr)


def _problem(error: Exception, command: Callable[..., object], arguments: Sequence[str]) -> str:
    """An error's message in the words of the command line."""
    if command is train:
        run = RECIPES[arguments[0]]()
        with contextlib.suppress(ValueError):
            run, _ = with_kinds(run, arguments[1:])
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
