"""Ways to have a source map in generation, at equal training: codes and map in bits, and samples.

    python -m benchmarks.contest --tokenizer digits32 --data digits --out runs/contest
    python -m benchmarks.contest --tokenizer photos64 --data train.parquet \
        --recipe photos64_mergear --num-kept 144 --seeds 0 1 --out runs/contest_photos

Every arm is the recipe with another order, trained on the same tokens for as many steps, and
measured on the same held-out images:

    merge       MergeAR: all cells; the map is in their equality, and code bits pay for it
    anchor      kept tokens and the cells they open at; the tokenizer infers the other cells
    stream      codes and map in one stream, one cell a step
    stream4     the same, four cells a step

Arms that are asked for by name have another head over the parts of a token. MergeAR with

    independent the parts of the recipe, each from the state alone
    bits        the bits of a token, in four blocks, each from those before it
    bits1       the same network, all bits at once
    bits_mixed  four blocks, trained by masks at random and not on every block

and, kept tokens with the cells that they open at, in that head of four blocks,

    anchor_code the cell as one number, the token in bits
    anchor_bits the bits of the gap to the next cell, one by one, then those of the token

Rivals are other tokenizers, whose tokens need no map: `--rivals pool=runs/pool/model:42` encodes
images to 42 tokens of that tokenizer and trains the same generator on them, in order `anchor` if
the tokenizer knows which cells they are of, else in order `ordered`.

Every tokenizer's tokens of held-out images are decoded too (`benchmarks/contest_maps.py`).

Bits are of an image: those of codes, and those of the map. Of `anchor` the map's are those of the
cells at which tokens open, and `inferred` what the source predictor needs for the other cells,
given codes and openings. Samples are judged by a support vector machine fitted to real images
(their pixels, grey and small, or features of `--extractor`): the share that it takes for the class
that was asked for, beside that of real images that it has not seen; with `--extractor` also by the
Frechet distance of their features from those of real images. What was measured is in OUT and is not
measured again; what was stopped goes on.
"""

import argparse
import json
import math
import statistics
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from benchmarks.contest_maps import measure_maps
from mergevq.config.generator import (
    GeneratorConfig,
    SampleRun,
    SamplingSettings,
)
from mergevq.config.parts.heads import (
    Bits,
    Head,
    Independent,
)
from mergevq.config.parts.orders import (
    Anchored,
    Merge,
    Order,
    Ordered,
    Stream,
)
from mergevq.config.recipes import GENERATOR_RECIPES
from mergevq.config.training import GeneratorRun
from mergevq.data.batches import eval_batches
from mergevq.data.images import ImageDataset, open_images
from mergevq.data.tokens.batches import split
from mergevq.data.tokens.dataset import TokenBatch, TokenDataset
from mergevq.generator.autoregressive import Autoregressive
from mergevq.generator.generation import Pair, class_labels, generate, load_pair
from mergevq.metrics.extractor import FeatureExtractor
from mergevq.metrics.frechet import FrechetStatistics, Gaussian, frechet_distance
from mergevq.metrics.image import to_uint8
from mergevq.metrics.judge import Judge, fit_judge
from mergevq.metrics.lpips import Perceptual, load_perceptual
from mergevq.report.pictures import contact_sheet, to_pil
from mergevq.runtime.environment import keep_freed_memory
from mergevq.runtime.random import BatchNumbers
from mergevq.runtime.run import environment
from mergevq.tokenizer.encode import encode
from mergevq.tokenizer.expanders.unmerge import Unmerge
from mergevq.tokenizer.tokenizer import Tokenizer
from mergevq.training.generator_step import to_sequences
from mergevq.training.train import finish

ORDERS: dict[str, Order] = {
    "merge": Merge(),
    "anchor": Anchored(),
    "stream": Stream(),
    "stream4": Stream(tokens_per_step=4),
}
"""Arms that differ in their order."""
HEADS: dict[str, Order] = {
    **dict.fromkeys(("independent", "bits", "bits1", "bits_mixed"), Merge()),
    "anchor_code": Anchored(),
    "anchor_bits": Anchored(gap_in_bits=True),
}
"""Arms that differ in their head, and their order."""
HELD_OUT = 0.2
"""Share of the images that no arm is trained on."""
_BATCH = 50
_MAPS = ("relation", "group", "anchor", "gap")
"""Beginnings of the names of parts that are of the map."""


class Entrant(NamedTuple):
    """A tokenizer, its tokens, and the order in which a generator has them."""

    arm: str
    order: Order
    tokenizer: str
    num_kept: int
    tokens: TokenDataset


def encoded(options: argparse.Namespace, tokenizer: str, num_kept: int, name: str) -> TokenDataset:
    """Tokens of all images, under a name in OUT."""
    return encode(
        tokenizer,
        options.data,
        Path(options.out, name),
        num_kept=(num_kept,),
        num_workers=0,
        precision="float32",
    )


def entrants(options: argparse.Namespace) -> list[Entrant]:
    """All arms, those of other tokenizers last."""
    tokens = encoded(options, options.tokenizer, options.num_kept, "tokens")
    found = [
        Entrant(arm, (ORDERS | HEADS)[arm], options.tokenizer, options.num_kept, tokens)
        for arm in options.arms
    ]
    for arm, tokenizer, num_kept in options.rivals:
        tokens = encoded(options, tokenizer, num_kept, f"tokens_{arm}")
        order: Order = Anchored() if tokens.record.layout == "source" else Ordered()
        found.append(Entrant(arm, order, tokenizer, num_kept, tokens))
    return found


def rival(text: str) -> tuple[str, str, int]:
    """Name, tokenizer and K of NAME=TOKENIZER:K."""
    name, _, rest = text.partition("=")
    tokenizer, _, num_kept = rest.rpartition(":")
    if not (name and tokenizer and num_kept.isdecimal()):
        raise argparse.ArgumentTypeError(f"{text} must be NAME=TOKENIZER:K")
    return name, tokenizer, int(num_kept)


def arm_run(options: argparse.Namespace, entrant: Entrant, seed: int) -> GeneratorRun:
    """The recipe with an arm's tokens, order and head."""
    run = GENERATOR_RECIPES[options.recipe]()
    head = head_of(run.model, entrant.arm) if entrant.arm in HEADS else run.model.head
    kept = (entrant.num_kept,)
    train_config = replace(run.train, seed=seed, eval_num_kept=kept, device=options.device)
    if options.steps is not None:
        train_config = replace(train_config, num_steps=options.steps)
    return replace(
        run,
        model=replace(
            run.model,
            order=entrant.order,
            head=head,
            num_kept=entrant.num_kept,
            kept_candidates=kept,
        ),
        tokens=replace(
            run.tokens,
            path=str(entrant.tokens.directory),
            tokenizer=entrant.tokenizer,
            val_fraction=HELD_OUT,
        ),
        kept=replace(run.kept, candidates=kept),
        train=train_config,
        out=str(Path(options.out, f"{entrant.arm}-{seed}")),
    )


def head_of(model: GeneratorConfig, arm: str) -> Head:
    """The head of an arm, over the tokens of a recipe and with as many layers."""
    if arm == "independent":
        return Independent(sizes=model.head.sizes, num_layers=model.head.num_layers)
    num_bits = model.num_codes.bit_length() - 1
    schedule = (num_bits,) if arm == "bits1" else ()
    return Bits(
        sizes=(2,) * num_bits,
        schedule=schedule,
        num_layers=model.head.num_layers,
        masking="mixed" if arm == "bits_mixed" else "schedule",
    )


class Critic(NamedTuple):
    """All that samples and decoded tokens are measured by."""

    images: ImageDataset
    judge: Judge
    real_accuracy: float
    """The judge's, on real images that it has not seen."""
    extractor: FeatureExtractor | None
    real: Gaussian | None
    """Features of real images; None without an extractor."""
    perceptual: Perceptual | None
    """LPIPS of decoded tokens; None leaves it out."""


def measure(
    entrant: Entrant, seed: int, critic: Critic, options: argparse.Namespace
) -> dict[str, float]:
    """Train an arm and measure it; what a generator draws is written as a picture."""
    run, tokens = arm_run(options, entrant, seed), entrant.tokens
    started = time.process_time()
    finish(run, brief=True)
    seconds = time.process_time() - started
    pair = load_pair(Path(run.out, "model"), entrant.tokenizer, torch.device("cpu"))
    if not isinstance(pair.generator, Autoregressive):
        raise TypeError(f"order ({run.model.order.kind}) must be autoregressive")
    found = bits(pair.generator, tokens, entrant.num_kept)
    if run.model.order.is_anchored and pair.tokenizer.has_maps:
        found["inferred_bits"] = inferred_bits(pair.tokenizer, tokens, entrant.num_kept)
    return {
        "parameters": sum(each.numel() for each in pair.generator.parameters()),
        "training_cpu_seconds": seconds,
        **found,
        **judged_samples(pair, run, critic, options.num_samples),
    }


def held_out_batches(tokens: TokenDataset, num_kept: int) -> Iterator[TokenBatch]:
    """Tokens of the images that no arm has seen."""
    _, held_out = split(tokens, HELD_OUT)
    for first in range(0, len(held_out), _BATCH):
        yield held_out.batch(range(first, min(first + _BATCH, len(held_out))), num_kept)


@torch.no_grad()
def bits(generator: Autoregressive, tokens: TokenDataset, num_kept: int) -> dict[str, float]:
    """Bits of a held-out image, of its codes and of its map, and passes that it takes."""
    sums, count = {"code_bits": 0.0, "map_bits": 0.0}, 0
    for batch in held_out_batches(tokens, num_kept):
        sequences = to_sequences(generator, batch)
        rows = len(sequences.indices)
        drawn = BatchNumbers(seed=0, step=0, num_rows=rows, rows=slice(None))
        sequences = generator.draw(sequences, drawn)
        targets = generator.layout(sequences).targets.unbind(-1)
        parts = zip(generator.config.part_names, generator.logits(sequences), targets, strict=True)
        for name, logits, target in parts:
            hit = logits.log_softmax(-1).gather(-1, target[..., None]).sum().item()
            sums["map_bits" if name.startswith(_MAPS) else "code_bits"] -= hit / math.log(2)
        count += rows
    return {name: total / count for name, total in sums.items()} | {
        "passes": float(generator.config.num_states(num_kept))
    }


@torch.no_grad()
def inferred_bits(tokenizer: Tokenizer, tokens: TokenDataset, num_kept: int) -> float:
    """Bits of the cells at which nothing opens, by the source predictor, given all else."""
    if not isinstance(tokenizer.expander, Unmerge):
        raise TypeError(f"expander ({tokenizer.config.expander.kind}) must be unmerge")
    predictor = tokenizer.expander.predictor
    total, count = 0.0, 0
    for batch in held_out_batches(tokens, num_kept):
        codes = tokenizer.codes_of_parts(batch.parts)
        side = tokenizer.config.grid_size
        logits = predictor(codes, (side, side)).float()
        index = batch.source.index
        total -= copied_log_prob(logits, index, batch.source.anchors()).sum().item() / math.log(2)
        count += len(index)
    return total / count


def copied_log_prob(
    logits: Float[Tensor, "b l k"], index: Int64[Tensor, "b l"], anchors: Int64[Tensor, "b k"]
) -> Float[Tensor, "b"]:
    """Log-probability of the cells that are copies, each of a token that is open there."""
    cells = torch.arange(logits.shape[1])
    is_open = anchors[:, None, :] < cells[:, None]
    log_probs = logits.masked_fill(~is_open, -torch.inf).log_softmax(-1)
    hits = log_probs.gather(-1, index[..., None])[..., 0]
    opens = (anchors[:, None, :] == cells[:, None]).any(-1)
    return hits.masked_fill(opens, 0).sum(1)


def judged_samples(
    pair: Pair, run: GeneratorRun, critic: Critic, num_samples: int
) -> dict[str, float]:
    """Share of samples taken for the class asked for, distance from real images, and time."""
    settings = SamplingSettings(guidance_scale=run.sampling.guidance_scale)
    samples = SampleRun(num_images=num_samples, settings=settings)
    classes = pair.generator.config.num_classes
    asked = class_labels(samples, classes, range(num_samples))
    images, started = [], time.process_time()
    for first in range(0, num_samples, _BATCH):
        ids = range(first, min(first + _BATCH, num_samples))
        images.append(generate(pair, samples, ids)[1])
    seconds = time.process_time() - started
    image = torch.cat(images)
    shown = [to_pil(one) for one in image[: 4 * classes]]
    rows = [shown[first : first + classes] for first in range(0, len(shown), classes)]
    contact_sheet(rows).save(Path(run.out, "samples.png"))
    found = {
        "class_accuracy": critic.judge.accuracy(image, asked),
        "sampling_cpu_seconds": seconds / num_samples,
    }
    if critic.extractor is not None and critic.real is not None:
        drawn = statistics_of(critic.extractor, images)
        found[critic.extractor.metric_name("frechet")] = frechet_distance(critic.real, drawn)
    return found


def statistics_of(
    extractor: FeatureExtractor, images: Iterable[Float[Tensor, "_ 3 _ _"]]
) -> Gaussian:
    """Mean and covariance of the features of images in [-1, 1]."""
    found = FrechetStatistics(extractor.dim)
    for image in images:
        found.update(extractor.features(to_uint8(image)))
    return found.compute()


def make_critic(options: argparse.Namespace, image_size: int) -> Critic:
    """A judge that is fitted to four fifths of the images and tried on the others."""
    dataset = open_images(options.data)
    seen = eval_batches(
        dataset,
        image_size=image_size,
        batch_size=_BATCH,
        max_images=min(len(dataset), options.num_judged),
        num_workers=0,
    )
    pairs = [(batch.image, batch.label) for batch in seen]
    image, label = (torch.cat(part) for part in zip(*pairs, strict=True))
    # Data may be sorted by class: every fifth image is of all of them.
    held_out = torch.arange(len(image)) % 5 == 0
    real = [(image[~held_out], label[~held_out])]
    if options.extractor is None:
        extractor, features, judge = None, None, fit_judge(real)
    else:
        extractor = FeatureExtractor(options.extractor)
        features = statistics_of(extractor, image.split(_BATCH))
        judge = fit_judge(real, lambda image: extractor.features(to_uint8(image)))
    accuracy = judge.accuracy(image[held_out], label[held_out])
    perceptual = None if options.lpips is None else load_perceptual("alex", options.lpips)
    return Critic(dataset, judge, accuracy, extractor, features, perceptual)


def maps(entrant: Entrant, critic: Critic) -> dict[str, dict[str, float]]:
    """Tokens of held-out images by their map, and the bits that tokens and maps can take."""
    tokenizer = Tokenizer.from_pretrained(entrant.tokenizer, precision="float32", device="cpu")
    _, held_out = split(entrant.tokens, HELD_OUT)
    position = held_out.origin(range(len(held_out))).position
    pixels = {
        place: image
        for batch in eval_batches(
            critic.images,
            image_size=tokenizer.config.image_size,
            batch_size=_BATCH,
            num_workers=0,
        )
        for place, image in zip(batch.index.tolist(), batch.image, strict=True)
        if place in set(position.tolist())
    }
    batches = (
        (batch, torch.stack([pixels[place] for place in places.tolist()]))
        for batch, places in zip(
            held_out_batches(entrant.tokens, entrant.num_kept),
            position.split(_BATCH),
            strict=True,
        )
    )
    found = measure_maps(tokenizer, batches, critic.extractor, critic.perceptual)
    bits = tokenizer.bits(entrant.num_kept)
    told = {"num_kept": entrant.num_kept, "code_bits": bits.tokens}
    return {
        name: {**told, "map_bits": bits.source if name == "given" else 0.0, **numbers}
        for name, numbers in found.items()
    }


def table(found: dict[str, dict[str, dict[str, float]]]) -> str:
    """A row for each arm, mean over seeds and each seed's value, in Markdown."""
    names = list(
        dict.fromkeys(name for arm in found.values() for one in arm.values() for name in one)
    )
    lines = [f"| arm | {' | '.join(names)} |", f"|---|{'---:|' * len(names)}"]
    for arm, seeds in found.items():
        cells = []
        for name in names:
            values = [one[name] for one in seeds.values() if name in one]
            each = ", ".join(f"{value:.4g}" for value in values)
            cells.append(f"{statistics.fmean(values):.4g} ({each})" if values else "-")
        lines.append(f"| {arm} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main(arguments: Sequence[str]) -> None:
    """Run what is not measured yet, and print the table."""
    parser = argparse.ArgumentParser(description="Ways to have a source map in generation.")
    parser.add_argument("--tokenizer", required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--recipe", default="digits32_ar")
    parser.add_argument("--num-kept", type=int, default=20)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--arms", nargs="+", default=list(ORDERS), choices=[*ORDERS, *HEADS])
    parser.add_argument("--steps", type=int)
    parser.add_argument("--rivals", type=rival, nargs="+", default=[], metavar="NAME=TOKENIZER:K")
    parser.add_argument("--lpips", help="folder or file of LPIPS (alex)")
    parser.add_argument("--extractor")
    parser.add_argument("--num-judged", type=int, default=2000)
    parser.add_argument("--num-samples", type=int, default=200)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", required=True)
    options = parser.parse_args(arguments)
    out = Path(options.out)
    out.mkdir(parents=True, exist_ok=True)
    # As every command does.
    keep_freed_memory()
    fighting = entrants(options)
    image_size = Tokenizer.from_pretrained(options.tokenizer).config.image_size
    critic = make_critic(options, image_size)
    result: dict[str, Any] = {
        "kind": "contest",
        "settings": vars(options),
        "environment": environment(torch.device("cpu")),
        "real_accuracy": critic.real_accuracy,
        "arms": {},
        "maps": {},
    }
    written = out / "contest.json"
    if written.is_file():
        before = json.loads(written.read_text(encoding="utf-8"))
        result |= {name: before.get(name, {}) for name in ("arms", "maps")}

    def keep() -> None:
        written.write_text(json.dumps(result, indent=2), encoding="utf-8")

    for entrant in fighting:
        # Arms of the same tokens have the same maps.
        name = entrant.tokens.directory.name
        if name not in result["maps"]:
            result["maps"][name] = maps(entrant, critic)
            keep()
    for seed in options.seeds:
        for entrant in fighting:
            seeds = result["arms"].setdefault(entrant.arm, {})
            if str(seed) not in seeds:
                seeds[str(seed)] = measure(entrant, seed, critic, options)
                keep()
    real = critic.real_accuracy
    print(f"real images: {100 * real:.1f} % taken for their class\n\n{table(result['arms'])}")


if __name__ == "__main__":
    main(sys.argv[1:])
