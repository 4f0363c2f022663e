"""Losses of every recipe, compared between two commits to the last bit.

    python benchmarks/ledger.py [BASE]

Every recipe is shrunk and trained for three steps on digits with one thread, once by the code of
this checkout and once by the code of BASE, by this one script and on this one machine: numbers
differ between machines, so none are kept. Compared are all logged numbers and the weights, whatever
their names are. BASE is by default where this branch left `origin/main`, or else the first parent.

A commit that is meant to change losses says why, in a line of its message that begins with
"Losses change:"; the differences are then printed and accepted.
"""

import contextlib
import hashlib
import importlib
import io
import json
import logging
import math
import os
import subprocess
import sys
import tempfile
import warnings
from dataclasses import replace
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
NOT_COMPARED = {"images_per_second", "sequences_per_second"}
ACCEPTED = "Losses change:"
LEARNS_FROM = {
    "source": "digits32",
    "ordered": "digits32_causal",
    "holistic": "digits32_holistic",
    "scales": "digits32_scales",
}
"""Recipe of the tokenizer whose tokens a generator learns, by their layout."""


def find(name, *modules):
    """A name of the package, wherever the code of either commit keeps it."""
    for module in modules:
        with contextlib.suppress(ModuleNotFoundError, AttributeError):
            return getattr(importlib.import_module(module), name)
    raise ImportError(f"{name} is in none of {', '.join(modules)}")


RECIPES = ("mergevq.config.recipes", "mergevq.recipes")
SMALL = ("tests.support.small", *RECIPES)
TOKENIZER = ("mergevq.training.tokenizer", "mergevq.train_tokenizer")
GENERATOR = ("mergevq.training.generator", "mergevq.train_generator")
DECODER = ("mergevq.training.decoder.run",)
ENCODE = ("mergevq.tokenizer.encode", "mergevq.encode")


def entry(out):
    """Log of a run, and a digest of its weights that does not depend on their names."""
    import torch
    from safetensors.torch import load_file

    state = load_file(out / "model" / "model.safetensors")
    digests = sorted(
        hashlib.sha256(value.contiguous().flatten().view(torch.uint8).numpy().tobytes()).hexdigest()
        for value in state.values()
    )
    lines = (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    log = [
        {
            key: value.hex() if isinstance(value, float) else value
            for key, value in json.loads(line).items()
            if key not in NOT_COMPARED
        }
        for line in lines
    ]
    return {"log": log, "weights": hashlib.sha256("".join(digests).encode()).hexdigest()}


def short(train):
    """Three steps that log, validate and save."""
    return replace(
        train,
        num_steps=3,
        precision="float32",
        device="cpu",
        image_every=3,
        eval_every=3,
        save_every=3,
    )


def without_a_file(teacher):
    """An average of the encoder in the place of a frozen model, as either commit writes it."""
    if teacher.kind not in {"dinov2", "huggingface"}:
        return teacher
    if hasattr(teacher, "momentum"):
        return replace(teacher, kind="self")
    itself = find("SelfDistillation", "mergevq.config.objective")
    size, layers = teacher.view_size, teacher.num_head_layers
    return itself(view_size=size, num_head_layers=layers, num_prototypes=16)


def tokenizer_run(run, out):
    """A recipe as a run of three steps on digits, in which every loss that needs no file counts."""
    run = find("shrink", *SMALL)(run)
    adversarial = run.loss.adversarial_weight > 0
    loss = replace(
        run.loss,
        perceptual_weight=0.0,
        discriminator_start_step=0,
        adversarial_start_step=1 if adversarial else run.loss.adversarial_start_step,
        discriminator_channels=8,
    )
    return replace(
        run,
        teacher=without_a_file(run.teacher),
        init_vit=None,
        loss=loss,
        data=replace(run.data, path="digits", val_path=None, num_workers=0),
        train=short(run.train),
        out=str(out),
    )


def on_generator(model):
    """A generator of the 8 bits of the digits tokenizer, as either commit writes its settings."""
    if not hasattr(model, "head"):
        return replace(model, num_bits=8, factor_bits=(4, 4), flex_attention=False)
    order = model.order
    if hasattr(order, "flex_attention"):
        order = replace(order, flex_attention=False)
    head = model.head
    if math.prod(head.sizes) != 256:
        head = replace(head, sizes=(16, 16))
    return replace(model, head=head, order=order)


def generator_run(run, tokenizer, folder, out):
    """A recipe as a run of three steps on tokens of the small digits tokenizer."""
    run = find("shrink_generator", *SMALL)(run)
    candidates = run.kept.candidates
    tokens = folder / "-".join(["tokens", tokenizer.parent.name, *map(str, candidates)])
    if not tokens.exists():
        find("encode", *ENCODE)(
            tokenizer, "digits", tokens, num_kept=candidates, num_workers=0, device="cpu"
        )
    model = on_generator(run.model)
    data = replace(run.tokens, path=str(tokens), tokenizer=str(tokenizer), val_fraction=0.05)
    return replace(run, model=model, tokens=data, train=short(run.train), out=str(out))


def decoder_run(run, folder, out):
    """A recipe of a decoder as a run of three steps, for the small tokenizer of its recipe."""
    run = find("shrink_decoder", *SMALL)(run)
    tokenizer = folder / Path(run.tokenizer).parent.name / "model"
    return replace(run, tokenizer=str(tokenizer), train=short(run.train), out=str(out))


def write(path):
    """Train every recipe with the package on the path, and write the ledger."""
    import torch

    torch.set_num_threads(1)
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    ledger = {}
    with tempfile.TemporaryDirectory() as temporary, contextlib.redirect_stderr(io.StringIO()):
        folder = Path(temporary)
        for name, make in find("TOKENIZER_RECIPES", *RECIPES).items():
            find("train", *TOKENIZER)(tokenizer_run(make(), folder / name))
            ledger[name] = entry(folder / name)
        for name, make in find("GENERATOR_RECIPES", *RECIPES).items():
            run = make()
            layout = getattr(getattr(run.model, "order", None), "layout", "source")
            of = LEARNS_FROM[layout]
            run = generator_run(run, folder / of / "model", folder, folder / name)
            find("train", *GENERATOR)(run)
            ledger[name] = entry(folder / name)
        with contextlib.suppress(ImportError):  # A base from before there were decoders has none.
            for name, make in find("DECODER_RECIPES", *RECIPES).items():
                find("train", *DECODER)(decoder_run(make(), folder, folder / name))
                ledger[name] = entry(folder / name)
    Path(path).write_text(json.dumps(ledger), encoding="utf-8")


def git(*arguments):
    """Output of a git command; None where it fails."""
    command = ["git", "-C", str(ROOT), *arguments]
    finished = subprocess.run(command, check=False, capture_output=True, text=True)
    return finished.stdout.strip() if finished.returncode == 0 else None


def default_base():
    """Where this branch left `origin/main`, or the first parent if it did not leave it."""
    left = git("merge-base", "origin/main", "HEAD")
    if left and left != git("rev-parse", "HEAD"):
        return left
    return git("rev-parse", "--verify", "--quiet", "HEAD^1")


def differences(base, here):
    """One line for each number that differs, at most the first five of a recipe."""
    for name in sorted(base.keys() ^ here.keys()):
        yield f"{name}: only {'at the base' if name in base else 'here'}"
    for name in sorted(base.keys() & here.keys()):
        before, after = base[name], here[name]
        found = []
        if len(before["log"]) != len(after["log"]):
            found.append(f"{len(before['log'])} lines of log, now {len(after['log'])}")
        for old, new in zip(before["log"], after["log"], strict=False):
            found += [
                f"step {old.get('step')}, {key}: {old.get(key)}, now {new.get(key)}"
                for key in sorted(old.keys() | new.keys())
                if old.get(key) != new.get(key)
            ]
        if before["weights"] != after["weights"]:
            found.append("weights differ")
        yield from (f"{name}: {line}" for line in found[:5])


def measure(base, folder):
    """The ledgers of BASE and of this checkout, each by a process of its own."""
    tree = folder / "base"
    if git("worktree", "add", "--detach", str(tree), base) is None:
        sys.exit(f"ledger: cannot check out {base}")
    try:
        running = []
        for name, place in (("base", tree), ("here", ROOT)):
            out = folder / f"{name}.json"
            environment = os.environ | {"PYTHONPATH": str(place), "OMP_NUM_THREADS": "1"}
            command = [sys.executable, __file__, "--write", str(out)]
            running.append((out, subprocess.Popen(command, cwd=place, env=environment)))
        ended = [process.wait() for _, process in running]
        if any(ended):
            sys.exit("ledger: a recipe could not be trained")
        return [json.loads(out.read_text(encoding="utf-8")) for out, _ in running]
    finally:
        git("worktree", "remove", "--force", str(tree))


def compare(base):
    """0 when all recipes agree or a commit says that they should not, else 1."""
    with tempfile.TemporaryDirectory() as folder:
        before, here = measure(base, Path(folder))
    found = list(differences(before, here))
    print("\n".join(found) or f"ledger: {len(here)} recipes equal those of {base[:12]}")
    if not found:
        return 0
    messages = git("log", "--format=%B", f"{base}..HEAD") or ""
    return 0 if any(line.startswith(ACCEPTED) for line in messages.splitlines()) else 1


def main(arguments):
    """Write one ledger, or compare two."""
    if arguments[:1] == ["--write"]:
        write(arguments[1])
        return 0
    base = git("rev-parse", "--verify", f"{arguments[0]}^{{commit}}") if arguments else None
    if arguments and base is None:
        sys.exit(f"ledger: {arguments[0]} is no commit of this repository")
    base = base or default_base()
    if base is None:
        print("ledger: this commit has no parent here; nothing to compare with")
        return 0
    return compare(base)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
