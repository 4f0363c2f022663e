"""Models of photographs in a given time on one device: tokenizer, tokens, two generators.

    python -m benchmarks.photographs DATA --minutes 8 --out runs/photographs

The tokenizer takes `TOKENIZER_SHARE` of the time, encoding what it needs, and the generators share
the device for the rest. Every step is a command of `mergevq`, shown before it runs; what it prints
is kept in OUT/NAME.log. Models are written in float16 to OUT/models, each below 16 MB: the tokens
are those of the rounded tokenizer, which is the one that ships.

With options of `mergevq train` in quotes after `--tokenizer-options` or `--generator-options`,
other models take the same way.
"""

import argparse
import json
import shlex
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

from mergevq.config.generator import (
    GeneratorConfig,
)
from mergevq.config.tokenizer import TokenizerConfig
from mergevq.runtime.artefacts import load_model, save_model, tokens_hash
from mergevq.runtime.settings import from_json

TOKENIZER_SHARE = 0.6
"""Share of the time for the tokenizer."""
LARGEST_FILE = 16 * 2**20
"""Bytes of one artefact."""
_ENDING_SECONDS = 25
"""Kept free after the generators' last step: checkpoints, pictures, artefacts."""


class Step(NamedTuple):
    """A command that runs, and where its output goes."""

    name: str
    process: subprocess.Popen[bytes]
    started: float


def start(out: Path, name: str, command: list[str]) -> Step:
    """Start a command of `mergevq`."""
    print(f"{name}: mergevq {shlex.join(command)}", flush=True)
    with (out / f"{name}.log").open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "mergevq", *command], stdout=log, stderr=subprocess.STDOUT
        )
    return Step(name, process, time.monotonic())


def finish(out: Path, step: Step) -> float:
    """Wait for a command; returns its seconds.

    Raises:
        SystemExit: it failed; the end of its output is shown.
    """
    code = step.process.wait()
    seconds = time.monotonic() - step.started
    if code != 0:
        log = (out / f"{step.name}.log").read_text(encoding="utf-8", errors="replace")
        raise SystemExit(f"{step.name} failed with {code}:\n{log[-4000:]}")
    print(f"{step.name}: {seconds:.0f} s", flush=True)
    return seconds


def release(model: Path, out: Path, kind: str, made_by: dict[str, str]) -> None:
    """Write a trained model in float16, with what made it.

    Raises:
        SystemExit: its weights are too large to be sent.
    """
    saved = load_model(model, kind)
    config_class = TokenizerConfig if kind == "tokenizer" else GeneratorConfig
    config = from_json(config_class, saved.record["config"])
    state = {name: tensor.half() for name, tensor in saved.state.items()}
    save_model(out, state, config, kind=kind, extra=saved.record["extra"] | made_by)
    size = (out / "model.safetensors").stat().st_size
    if size > LARGEST_FILE:
        raise SystemExit(f"{out} has {size:,} bytes and must have at most {LARGEST_FILE:,}")


def evaluations(options: argparse.Namespace, out: Path) -> list[tuple[str, list[str]]]:
    """Commands that measure the tokenizer, and each generator where there is an extractor."""
    if options.val is None:
        return []
    shared = ["--num-workers", options.num_workers]
    lpips = [] if options.lpips is None else ["--lpips", options.lpips, "--lpips-trunk", "squeeze"]
    seen = [] if options.extractor is None else ["--extractor", options.extractor]
    tokenizer = str(out / "models" / "tokenizer")
    steps = [
        (
            "reconstruction",
            [
                *("evaluate", "reconstruction", "--model", tokenizer, "--data", options.val),
                *("--num-kept", options.num_kept, "--max-images", options.num_images),
                *(*lpips, *seen, *shared, "--out", str(out / "reconstruction")),
            ],
        )
    ]
    if not seen:
        return steps
    side = from_json(TokenizerConfig, load_model(Path(tokenizer), "tokenizer").record["config"])
    reference = str(out / "reference.npz")
    steps.append(
        (
            "reference",
            [
                *("evaluate", "reference", "--data", options.val, "--out", reference, *seen),
                *("--kind", "generation", "--image-size", str(side.image_size), *shared),
            ],
        )
    )
    for name in options.generators:
        steps.append(
            (
                f"generation-{name}",
                [
                    *("evaluate", "generation", "--reference", reference, *seen),
                    *("--generator", str(out / "models" / name), "--model", tokenizer),
                    *("--num-images", options.num_images, "--out", str(out / f"samples-{name}")),
                ],
            )
        )
    return steps


def parser() -> argparse.ArgumentParser:
    """Options of the script."""
    found = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    found.add_argument("data", help="pictures, as --data of mergevq encode takes them")
    found.add_argument("--minutes", type=float, required=True, help="for all but evaluation")
    found.add_argument("--out", type=Path, default=Path("runs/photographs"))
    found.add_argument("--tokenizer", default="photos64_wide", help="recipe")
    found.add_argument(
        "--generators", nargs="*", default=["photos64_wide_mergear", "photos64_wide_randar"]
    )
    found.add_argument("--num-kept", default="144", help="K of the generators' tokens")
    found.add_argument("--tokenizer-options", default="", help="of mergevq train, quoted")
    found.add_argument("--generator-options", default="", help="of mergevq train, quoted")
    found.add_argument("--num-workers", default="2", help="processes that decode pictures")
    found.add_argument("--val", help="held-out pictures to evaluate on; none are not evaluated")
    found.add_argument("--lpips", help="weights of LPIPS, for the evaluation")
    found.add_argument("--extractor", help="TorchScript file, for Frechet distances")
    found.add_argument("--num-images", default="512", help="pictures and samples evaluated")
    return found


def main(argv: list[str]) -> int:
    options = parser().parse_args(argv)
    end = time.monotonic() + 60 * options.minutes
    out = options.out
    out.mkdir(parents=True)
    seconds = {}
    command = [
        *("train", options.tokenizer, "--data.path", options.data),
        *("--data.num-workers", options.num_workers),
        *("--train.max-minutes", f"{TOKENIZER_SHARE * options.minutes:.3f}"),
        *("--out", str(out / "tokenizer"), *shlex.split(options.tokenizer_options)),
    ]
    seconds["tokenizer"] = finish(out, start(out, "tokenizer", command))
    made_by = {"made_by": f"python -m benchmarks.photographs {shlex.join(argv)}"}
    tokenizer = out / "models" / "tokenizer"
    release(out / "tokenizer" / "model", tokenizer, "tokenizer", made_by)
    command = [
        *("encode", "--model", str(tokenizer), "--data", options.data, "--flip"),
        *("--num-kept", options.num_kept, "--batch-size", "512"),
        *("--num-workers", options.num_workers, "--out", str(out / "tokens")),
    ]
    seconds["encode"] = finish(out, start(out, "encode", command))
    left = end - _ENDING_SECONDS - time.monotonic()
    if options.generators and left <= 0:
        raise SystemExit(
            f"{options.minutes:g} minutes leave none for the generators after tokenizer and "
            f"tokens, with {_ENDING_SECONDS} s for the end: give more --minutes"
        )
    steps = []
    for recipe in options.generators:
        command = [
            *("train", recipe, "--tokens.path", str(out / "tokens")),
            *("--tokens.tokenizer", str(tokenizer), "--train.max-minutes", f"{left / 60:.3f}"),
            *("--out", str(out / recipe), *shlex.split(options.generator_options)),
        ]
        steps.append(start(out, recipe, command))
    for step in steps:
        seconds[step.name] = finish(out, step)
        release(out / step.name / "model", out / "models" / step.name, "generator", made_by)
    for name, command in evaluations(options, out):
        seconds[name] = finish(out, start(out, name, command))
    record = {"seconds": seconds, "tokens_hash": tokens_hash(tokenizer), **made_by}
    (out / "photographs.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
