"""Commands about models and the installation: `mergevq parts`, `models`, `publish` and `doctor`.

As in `mergevq.cli.main`, a signature is the options and a docstring is the help; torch is imported
by `publish` and `doctor` alone.
"""

import ast
import dataclasses
import inspect
import itertools
import os
import platform
import textwrap
import typing
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from mergevq.cli.errors import options_of_command, options_of_settings
from mergevq.cli.options import MAY_BE_EMPTY
from mergevq.cli.tables import print_table
from mergevq.cli.train import train
from mergevq.config.base import BUNDLED_GENERATOR, BUNDLED_TOKENIZER, nearest
from mergevq.config.kinds import Union, kind_of, members_of, unions, with_kinds
from mergevq.config.recipes import RECIPES
from mergevq.config.training import DecoderRun, GeneratorRun, TokenizerRun
from mergevq.runtime.environment import (
    EXTRAS,
    bundled_models,
    install_command,
    installed_version,
    missing,
)

if TYPE_CHECKING:
    import torch

_RUNS = {"tokenizer": TokenizerRun, "generator": GeneratorRun, "decoder": DecoderRun}
_WIDTH = 100
"""Columns of the text."""
_DEFAULTS = {BUNDLED_TOKENIZER, BUNDLED_GENERATOR}
Commands = Mapping[str, Callable[..., object]]
COMPLETE = "--complete"
"""First word with which a shell asks `mergevq` how the others can go on."""
_SCRIPTS = {
    "bash": f"""_mergevq() {{
  local IFS=$'\\n'
  COMPREPLY=($(mergevq {COMPLETE} "${{COMP_WORDS[@]:1:COMP_CWORD}}" 2>/dev/null))
}}
complete -o default -F _mergevq mergevq""",
    "zsh": f"""_mergevq() {{
  local -a found
  found=(${{(f)"$(mergevq {COMPLETE} "${{(@)words[2,CURRENT]}}" 2>/dev/null)"}})
  if (( $#found )); then compadd -- $found; else _files; fi
}}
compdef _mergevq mergevq""",
    "fish": f"""complete -c mergevq -a \
'(mergevq {COMPLETE} (commandline -opc)[2..-1] (commandline -ct) 2>/dev/null)'""",
}
_MODELS = {"--model", "--generator"}
_OF_TRAINING = ("--dry-run", "--resume", "--help")


def parts(seam: tyro.conf.Positional[str] = "", kind: tyro.conf.Positional[str] = "") -> None:
    """List the kinds of every part of a model, or the settings of some.

    `mergevq train RECIPE --model.quantizer.kind KIND` takes another kind of quantizer, with the
    defaults that are shown here.

    Args:
        seam: place of a part, such as `quantizer`: its kinds are shown with their settings.
        kind: show only this one.

    Raises:
        ValueError: there is no such place, or no such kind in it.
    """
    found = {model: list(unions(run)) for model, run in _RUNS.items()}
    if not seam:
        print("\n\n".join(_listed(model, seams) for model, seams in found.items() if seams))
        print("\n`mergevq parts SEAM` shows the settings of each kind.")
        return
    seams = [union for seams in found.values() for union in seams]
    chosen = [union for union in seams if seam in {union.name, _place(union)}]
    if not chosen:
        known = list(dict.fromkeys(map(_place, seams)))
        raise ValueError(f"no part {seam!r}{nearest(seam, known)}; there are {', '.join(known)}")
    kinds = list(dict.fromkeys(kind for union in chosen for kind in union.members))
    if kind and kind not in kinds:
        raise ValueError(
            f"no {seam} of kind {kind!r}{nearest(kind, kinds)}; there are {', '.join(kinds)}"
        )
    # A kind of two parts whose names end alike is that of the whole name.
    named = [union for union in chosen if seam == union.name and kind in union.members]
    described = [
        _described(union.name, name, member)
        for union in named or chosen
        for name, member in union.members.items()
        if kind in {"", name}
    ]
    print("\n\n".join(described))


def models() -> None:
    """List the trained models that come with the package.

    Their names are taken wherever a command or `from_pretrained` takes the directory of a model.
    """
    found = bundled_models()
    width = max(len(each.name) for each in found)
    for each in found:
        chosen = "*" if each.name in _DEFAULTS else " "
        size = f"{each.num_bytes / 1e6:.1f} MB"
        print(f"{chosen} {each.name:<{width}}  {size:>8}  {each.summary}")
    print("\n* taken where a command names no model. Cards with data, licence and numbers:")
    print(found[0].directory.parent)


def publish(
    model: tyro.conf.Positional[str],
    name: tyro.conf.Positional[str],
    *,
    licence: str,
    run: Path | None = None,
    evaluation: Path | None = None,
    pictures: Annotated[tuple[Path, ...], MAY_BE_EMPTY] = (),
    dry_run: tyro.conf.FlagCreatePairsOff[bool] = False,
    out: Path = Path("published"),
) -> None:
    """Put a model on Hugging Face, with a card made from its run.

    Writes weights, settings, card and pictures into OUT first. Places on this machine stay out of
    all of them.

    Args:
        model: directory of a tokenizer or generator.
        name: owner/name on Hugging Face.
        licence: of the weights, as the hub names licences: apache-2.0, cc-by-nc-4.0, other.
        run: directory of the training; none is the one that the model lies in, if any.
        evaluation: evaluation.json of this model, whose numbers the card gets.
        pictures: image files to show on the card.
        dry_run: upload nothing.
        out: folder to write.
    """
    from mergevq.report.publication import Facts, upload, write_publication

    facts = Facts(licence=licence, run=run, evaluation=evaluation, pictures=pictures)
    print(f"{write_publication(model, name, facts, out)}: model and card")
    if not dry_run:
        print(f"published: {upload(out, name)}")


def _place(union: Union) -> str:
    """Last part of a union's dotted name: `quantizer` of `model.quantizer`."""
    return union.name.rpartition(".")[2]


def _listed(model: str, seams: Sequence[Union]) -> str:
    """Kinds of the parts of a model, one line each."""
    rows = [(_place(union), kind, about) for union in seams for kind, about in union.describe()]
    places, kinds = (max(len(row[column]) for row in rows) for column in (0, 1))
    lines = [f"  {place:<{places}}  {kind:<{kinds}}  {about}" for place, kind, about in rows]
    return "\n".join([f"parts of a {model}:", *lines])


def _described(where: str, kind: str, member: type) -> str:
    """One kind of part: its docstring, and each setting as an option with its default."""
    lines = [f"--{where.replace('_', '-')}.kind {kind}", *_wrapped(inspect.getdoc(member) or "", 4)]
    docs, hints = _field_docs(member), typing.get_type_hints(member)
    for field in dataclasses.fields(member):
        if field.name == "kind":
            continue
        option, default = _options(where, field.name, hints[field.name]), _default(field)
        # A default that is too long for the line goes before the text.
        fits = len(f"  {option} {default}") <= _WIDTH
        lines.append(f"  {option} {default}" if fits else f"  {option}")
        choices = typing.get_args(hints[field.name])
        named = typing.get_origin(hints[field.name]) is typing.Literal
        about = docs.get(field.name, "") + f" One of {', '.join(map(str, choices))}." * named
        about = about if fits else f"{default} {about}"
        lines += _wrapped(about, 8)
    return "\n".join(lines)


def _options(where: str, name: str, hint: object) -> str:
    """A setting as it is typed; a switch has two ways, a part inside has a kind."""
    section, option = where.replace("_", "-"), name.replace("_", "-")
    if hint is bool:
        return f"--{section}.{option}, --{section}.no-{option}"
    return f"--{section}.{option}{'.kind' * bool(members_of(hint))}"


def _default(field: dataclasses.Field[Any]) -> str:
    """Default of a setting as it is typed; the kind where it is a part itself."""
    value = field.default
    if field.default_factory is not dataclasses.MISSING:
        value = field.default_factory()
    shown = " ".join(map(str, value)) if isinstance(value, tuple) else str(value)
    shown = kind_of(type(value)) or shown
    return f"(default: {shown})" if shown else "(default: none)"


def _wrapped(text: str, indent: int) -> list[str]:
    """Lines of a text, each so many columns in."""
    space = " " * indent
    return textwrap.wrap(
        " ".join(text.split()), _WIDTH, initial_indent=space, subsequent_indent=space
    )


def _field_docs(cls: type) -> dict[str, str]:
    """Text under each field of a dataclass."""
    (tree,) = ast.parse(textwrap.dedent(inspect.getsource(cls))).body
    body = tree.body if isinstance(tree, ast.ClassDef) else []
    return {
        field.target.id: text.value.value
        for field, text in itertools.pairwise(body)
        if isinstance(field, ast.AnnAssign)
        and isinstance(field.target, ast.Name)
        and isinstance(text, ast.Expr)
        and isinstance(text.value, ast.Constant)
        and isinstance(text.value.value, str)
    }


def doctor() -> None:
    """Print what this machine and installation offer, for a bug report or before a long run."""
    import torch

    from mergevq.metrics.lpips import TRUNKS, cache_folder
    from mergevq.runtime.device import resolve_device

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


def _describe_extra(extra: str) -> str:
    """Whether an extra is installed, and how to install it if not."""
    absent = missing(extra)
    return f"without {', '.join(absent)}: {install_command(extra)}" if absent else "installed"


def _describe_device(name: str) -> str:
    """Describe a kind of device on this machine, and the precision it would train in."""
    import torch

    from mergevq.runtime.device import resolve_device, resolve_precision

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

    from mergevq.runtime.device import resolve_precision

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


def completion(shell: tyro.conf.Positional[Literal["bash", "zsh", "fish"]]) -> None:
    """Print the lines that make a shell complete commands, recipes and options.

    In ~/.bashrc: eval "$(mergevq completion bash)"; in ~/.zshrc after compinit the same with zsh;
    in ~/.config/fish/config.fish: mergevq completion fish | source.

    Args:
        shell: the shell.
    """
    print(_SCRIPTS[shell])


def candidates(
    words: Sequence[str], commands: Commands, groups: Mapping[str, Commands]
) -> list[str]:
    """Words that can stand in place of the last one; none where it is a file's name.

    Args:
        words: of the command line after `mergevq`, up to the one that is being typed.
        commands: by name.
        groups: commands of two words, by the first.
    """
    *before, typed = words or [""]
    found = _all_candidates(before, commands, groups)
    return [word for word in found if word.startswith(typed)]


def _all_candidates(
    before: Sequence[str], commands: Commands, groups: Mapping[str, Commands]
) -> list[str]:
    """Words that can follow others."""
    if not before:
        return [*commands, *groups]
    name, *rest = before
    if name in groups:
        commands = groups[name]
        if not rest:
            return [*commands]
        name, *rest = rest
    if name not in commands:
        return []
    if commands[name] is train:
        return _of_training(rest)
    if rest and rest[-1] in _MODELS:
        return [each.name for each in bundled_models()]
    return [*dict.fromkeys(options_of_command(commands[name]).values()), "--help"]


def _of_training(rest: Sequence[str]) -> list[str]:
    """Words that can follow `mergevq train` and some more."""
    if not rest:
        return [*RECIPES]
    recipe, *options = rest
    if recipe not in RECIPES:
        return []
    run = RECIPES[recipe]()
    asks_for_kind = bool(options) and options[-1].endswith(".kind")
    try:
        run, _ = with_kinds(run, list(options[:-1] if asks_for_kind else options))
    except ValueError:
        return []
    kinds = {
        f"--{union.name.replace('_', '-')}.kind": [*union.members] for union in unions(type(run))
    }
    if asks_for_kind:
        return kinds.get(options[-1], [])
    return [*dict.fromkeys([*options_of_settings(run).values(), *kinds, *_OF_TRAINING])]
