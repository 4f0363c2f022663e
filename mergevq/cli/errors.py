"""Errors of the command line: what is one, and how it is said in one line.

As in `mergevq.cli.main.main`, nothing here needs torch.
"""

import contextlib
import errno
import inspect
import io
import os
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass
from functools import partial, update_wrapper
from itertools import zip_longest
from typing import TypeVar, get_args

import tyro

Parsed = TypeVar("Parsed")

RENAMED = {
    "guidance_scale": "guidance",
    "num_images": "num",
    "num_steps": "steps",
    "num_shown": "show",
    "num_baseline_images": "baseline_images",
    "num_yardstick_images": "yardstick_images",
    "num_features": "features",
    "num_looked_up": "neighbours",
    "write_array": "npz",
    "num_neighbours": "k",
    "num_epochs": "epochs",
    "num_passes": "passes",
    "num_eval_images": "val_images",
    "val_path": "val_data",
}
"""Options by the library's name of a setting, of commands that call it otherwise."""


def speaks_for_itself(error: Exception) -> bool:
    """Whether an error's message is enough: one we raised, or one about a file."""
    if as_file_error(error) is not None:
        return True
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    raised_in = trace.tb_frame.f_globals.get("__name__", "") if trace else ""
    return isinstance(error, ValueError | RuntimeError) and raised_in.startswith("mergevq.")


def command_line(
    command: Callable[..., object], arguments: Sequence[str], *, prog: str
) -> Callable[[], object]:
    """A command with its options, ready to run: errors of one are not errors of the other.

    Raises:
        ValueError: settings refused a value.
    """
    # Called with the options it gives the command with them; it looks as the command does.
    ready = update_wrapper(partial(partial, command), command)
    about = re.split(r"\n\n(?:Args|Raises):", inspect.getdoc(command) or "")[0]
    return parsed(lambda: tyro.cli(ready, args=arguments, prog=prog, description=about))


def parsed(parse: Callable[[], Parsed]) -> Parsed:
    """Result of a parser; its own errors are printed and end in `SystemExit`.

    Raises:
        ValueError: settings refused a value.
    """
    try:
        # The parser would put a box around the settings' words; nothing is lost: see below.
        with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
            return parse()
    except SystemExit as stop:
        error = stop.__context__
        section = str(error.args[-1]) if error is not None and error.args else ""
        while error is not None:
            if isinstance(error, ValueError) and speaks_for_itself(error):
                raise ValueError(_in_section(str(error), section)) from error
            error = error.__context__
    return parse()


def _in_section(message: str, section: str) -> str:
    """A message of settings, whose first word is a setting, with their section, as `run.train`."""
    section = section.removeprefix("run").removeprefix(".")
    return f"{section}.{message}" if section and re.match(r"\w+ \(", message) else message


def problem(
    error: Exception, arguments: Sequence[str], options: Mapping[str, str], out: str | None
) -> str:
    """An error's message in the words of the command line.

    Args:
        error: one that speaks for itself.
        arguments: of the command.
        options: option by the library's name of a setting.
        out: where the command writes if it is not told; None if it then writes nothing.
    """
    file_error = as_file_error(error)
    if file_error is None:
        return in_options(str(error), options)
    given = [
        value.partition("=")[2] or after
        for value, after in zip_longest(arguments, arguments[1:], fillvalue="")
        if value == "--out" or value.startswith("--out=")
    ]
    return file_problem(file_error, given[-1] if given else out)


def options_of_settings(settings: object) -> dict[str, str]:
    """Option by dotted name of each setting of a run, and by every end that only one name has."""
    names = list(_setting_names(settings))
    ends = Counter(end for name in names for end in _ends(name))
    return {end: _option(name) for name in names for end in _ends(name) if ends[end] == 1}


def _ends(name: str) -> list[str]:
    """A dotted name, and what is left of it without its first parts: `a.b.c`, `b.c`, `c`."""
    parts = name.split(".")
    return [".".join(parts[first:]) for first in range(len(parts))]


def options_of_command(command: Callable[..., object]) -> dict[str, str]:
    """Option by the library's name for what it sets."""
    own = {name: name for name in parameters(command)}
    own |= {theirs: mine for theirs, mine in RENAMED.items() if mine in own and theirs not in own}
    return {name: _option(of) for name, of in own.items()}


def _option(name: str) -> str:
    """As it is typed."""
    return f"--{name.replace('_', '-')}"


def _setting_names(settings: object, section: str = "") -> Iterator[str]:
    """Dotted names of the settings of a run."""
    for item in fields(settings):  # pyright: ignore[reportArgumentType]
        value = getattr(settings, item.name)
        if is_dataclass(value):
            yield from _setting_names(value, f"{section}{item.name}.")
        else:
            yield f"{section}{item.name}"


def parameters(command: Callable[..., object]) -> Iterator[str]:
    """Names of a command's options, those of groups of options among them."""
    for name, parameter in inspect.signature(command, eval_str=True).parameters.items():
        kind, *_ = get_args(parameter.annotation) or (parameter.annotation,)
        if is_dataclass(kind):
            yield from (item.name for item in fields(kind))
        elif parameter.kind is parameter.KEYWORD_ONLY:
            yield name


_FULL = "no space is left to write {place}: make room{elsewhere}"
_FOLDER = "{place} needs a folder where there is a file: move the file away{elsewhere}"
_FORBIDDEN = "{place} may not be read or written by this user: change that{elsewhere}"
_FILE_PROBLEMS = {
    errno.ENOSPC: _FULL,
    errno.EDQUOT: _FULL,
    errno.EFBIG: _FULL,
    errno.EEXIST: _FOLDER,
    errno.ENOTDIR: _FOLDER,
    errno.EACCES: _FORBIDDEN,
    errno.EPERM: _FORBIDDEN,
    errno.EISDIR: "{place} is a folder, and a file is needed there",
    errno.EROFS: "{place} is where nothing can be written: make it writable{elsewhere}",
    errno.ENOENT: "{place} is not there: check the path",
}


def as_file_error(error: Exception) -> OSError | None:
    """The error of the system behind another one; None if it is about no file.

    Libraries in Rust, as safetensors is, give no `OSError` but its number in words.
    """
    if isinstance(error, OSError):
        return error
    found = re.search(r"\(os error (\d+)\)", str(error))
    return OSError(int(found[1]), os.strerror(int(found[1]))) if found else None


def file_problem(error: OSError, out: str | None) -> str:
    """The file, its problem and a way out, in one line.

    Args:
        error: of the system, or a library's that says all itself.
        out: where the command writes, for errors that name no file; None where it does not.
    """
    if error.errno is None or (error.filename is None and out is None):
        return str(error)
    place = error.filename if error.filename is not None else out
    elsewhere = "" if out is None else ", or choose another place with --out"
    if error.errno not in _FILE_PROBLEMS:
        return f"{place}: {os.strerror(error.errno)}"
    return _FILE_PROBLEMS[error.errno].format(place=place, elsewhere=elsewhere)


def in_options(message: str, options: Mapping[str, str]) -> str:
    """A message in which settings are called as on the command line.

    A setting's name is one with `_` or a dot in it, or any before ` (VALUE)` at the beginning.
    What may be a part of a path or of an option stays.

    Args:
        message: in the library's words, such as "num_kept (0) must be at least 1".
        options: option by name of a setting, such as `--model.num-kept` by `num_kept`.
    """
    if not options:
        return message
    known = "|".join(sorted(map(re.escape, options), key=len, reverse=True))

    def said(found: re.Match[str]) -> str:
        name = found[0]
        is_first = re.fullmatch(r"(.*[:;] )?", message[: found.start()], re.DOTALL)
        is_setting = "_" in name or "." in name
        if is_setting or (is_first and message[found.end() :].startswith(" (")):
            return options[name]
        return name

    return re.sub(rf"(?<![\w./\\'\"-])({known})(?![\w/\\'\"=-]|\.\w)", said, message)
