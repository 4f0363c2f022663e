"""How much faster the package is than plain definitions of the same, and whether it still is.

    python -m benchmarks.ratios [NAME ..]          measure, and print a table
    python -m benchmarks.ratios --write [NAME ..]  and keep the ratios in docs/results/ratios.json
    python -m benchmarks.ratios --check [NAME ..]  and fail where one fell by more than a fifth

NAME selects the entries whose names contain it; without one all are measured. Both ways take turns
in one process, and what counts is its CPU time, so that other work on the machine counts little.
Ratios are kept for each kind of machine and are compared on that kind alone.

To add some: a module with `ENTRIES`, named in `ENTRIES` here; then `--write` with their names.
"""

import argparse
import datetime
import json
import os
import platform
import sys
from pathlib import Path

import torch

from benchmarks import (
    ratios_data,
    ratios_decoding,
    ratios_evaluation,
    ratios_images,
    ratios_tokenizer,
)
from benchmarks.entry import Entry, Ratio, measure
from mergevq.runtime.environment import keep_freed_memory

KEPT = Path(__file__).resolve().parents[1] / "docs" / "results" / "ratios.json"
ENTRIES: tuple[Entry, ...] = (
    *ratios_images.ENTRIES,
    *ratios_evaluation.ENTRIES,
    *ratios_data.ENTRIES,
    *ratios_tokenizer.ENTRIES,
    *ratios_decoding.ENTRIES,
)
SMALLEST_SHARE = 0.8
"""Share of a kept median that a ratio must still have."""
NUM_TURNS = 5


def machine() -> str:
    """The kind of machine, as far as it decides ratios."""
    name = platform.processor() or platform.machine()
    processors = Path("/proc/cpuinfo")
    if processors.is_file():
        lines = processors.read_text(encoding="utf-8").splitlines()
        found = dict(line.split(":", 1) for line in lines if ":" in line)
        found = {key.strip(): value.strip() for key, value in found.items()}
        name = f"{found.get('model name', name)} {found.get('cpu family')}.{found.get('model')}"
    threads = torch.get_num_threads()
    return f"{name}, {threads} of {os.cpu_count()} cores, torch {torch.__version__}"


def table(ratios: dict[str, Ratio]) -> str:
    """Ratios as Markdown."""
    lines = [
        "| plain over ours, CPU time | minimum | median | maximum | plain, ms | ours, ms |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for name, ratio in ratios.items():
        columns = [f"{value:.2f}" for value in (ratio.minimum, ratio.median, ratio.maximum)]
        columns += [f"{value:.3g}" for value in (ratio.plain_ms, ratio.ours_ms)]
        lines.append(f"| {' | '.join([name, *columns])} |")
    return "\n".join(lines)


def read_kept() -> dict[str, dict[str, dict[str, float | str]]]:
    """Kept ratios by machine and name."""
    return json.loads(KEPT.read_text(encoding="utf-8")) if KEPT.is_file() else {}


def write(ratios: dict[str, Ratio]) -> None:
    """Keep ratios of this kind of machine, beside those that were not measured now."""
    kept = read_kept()
    date = datetime.datetime.now(tz=datetime.UTC).date().isoformat()
    entries = {name: {**ratio._asdict(), "date": date} for name, ratio in ratios.items()}
    kept[machine()] = dict(sorted((kept.get(machine(), {}) | entries).items()))
    KEPT.write_text(json.dumps(kept, indent=1) + "\n", encoding="utf-8")


def fallen(name: str, found: float, kept: dict[str, dict[str, float | str]]) -> bool:
    """Whether a ratio is below its share of what was kept; one that was not kept is not."""
    return name in kept and found < SMALLEST_SHARE * float(kept[name]["median"])


def check(entries: list[Entry], ratios: dict[str, Ratio]) -> int:
    """Number of ratios that fell, each measured again before it counts."""
    kept = read_kept().get(machine())
    if kept is None:
        print(f"nothing is kept for {machine()}: nothing to compare; --write keeps these ratios")
        return 0
    num_fallen = 0
    for entry in entries:
        found = ratios[entry.name].median
        if fallen(entry.name, found, kept):
            found = max(found, measure(entry, 2 * NUM_TURNS).median)
        if fallen(entry.name, found, kept):
            num_fallen += 1
            print(
                f"{entry.name}: {found:.2f}, and {float(kept[entry.name]['median']):.2f} on "
                f"{kept[entry.name]['date']}: more than a fifth is lost. Find what made it slow, "
                "or, if it is meant, keep the new ratio with --write"
            )
        elif entry.name not in kept:
            print(f"{entry.name}: {found:.2f}, new; --write keeps it")
    return num_fallen


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("names", nargs="*", metavar="NAME")
    parser.add_argument("--turns", type=int, default=NUM_TURNS)
    parser.add_argument("--write", action="store_true")
    parser.add_argument("--check", action="store_true")
    options = parser.parse_args(argv)
    wanted = options.names or [""]
    entries = [entry for entry in ENTRIES if any(name in entry.name for name in wanted)]
    if not entries:
        names = "\n  ".join(entry.name for entry in ENTRIES)
        raise SystemExit(f"no entry's name contains any of {options.names}; there are\n  {names}")
    # As every command does.
    keep_freed_memory()
    ratios = {}
    for entry in entries:
        ratios[entry.name] = measure(entry, options.turns)
        print(f"{entry.name}: {ratios[entry.name].median:.2f}", file=sys.stderr, flush=True)
        if options.write:
            write({entry.name: ratios[entry.name]})
    print(f"{machine()}; {options.turns} turns\n\n{table(ratios)}")
    return check(entries, ratios) if options.check else 0


if __name__ == "__main__":
    sys.exit(min(1, main(sys.argv[1:])))
