"""Command lines that documents and records hold."""

import re
from collections.abc import Sequence

from mergevq.cli.about import candidates
from mergevq.cli.main import COMMANDS, GROUPS


def unknown_options(words: Sequence[str]) -> list[str]:
    """Options of a command line, as words after `mergevq`, that the command does not have."""
    known = {name[2:] for name in candidates([*words, "--"], COMMANDS, GROUPS)}
    names = [word[2:].partition("=")[0] for word in words if word.startswith("--")]
    return [name for name in names if not {name, re.sub(r"(^|\.)no-", r"\1", name)} & known]
