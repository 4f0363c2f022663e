"""Command `mergevq completion`, and the words that shells ask for; no torch."""

from collections.abc import Callable, Mapping, Sequence
from typing import Literal

import tyro

from mergevq.cli.errors import options_of_command, options_of_settings
from mergevq.cli.train import train
from mergevq.config.kinds import unions, with_kinds
from mergevq.config.recipes import RECIPES
from mergevq.runtime.environment import bundled_models

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
_MODELS = {"--model", "--generator", "--tokenizer"}
_OF_TRAINING = ("--dry-run", "--resume", "--help")


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
