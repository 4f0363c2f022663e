"""Drafted tokens against one token in each pass: passes and seconds of the same images, in turns.

    OMP_NUM_THREADS=1 python -m benchmarks.drafts digits32_ar --batch-size 1 --rounds 16

With `--draft-generator DIR` a smaller generator drafts too. Every way samples the same images of
the same seed in every round; images that differ are counted. CPU seconds of an image are the least,
the median and the most of the rounds.
"""

import argparse
import statistics
import time

import torch

from mergevq.config.generator import Drafted, OneByOne, Passes, SamplingSettings
from mergevq.generator.build import load_generator
from mergevq.generator.drafts.pairing import with_draft
from mergevq.generator.sampling import sample
from mergevq.runtime.artefacts import resolve


def arguments() -> argparse.Namespace:
    """Options of the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("generator", help="directory, or name in `mergevq models`")
    parser.add_argument("--draft-generator", help="the same of one that drafts")
    parser.add_argument("--batch-size", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=16)
    parser.add_argument("--guidance", type=float, default=1.0)
    parser.add_argument("--num-drafted", type=int, nargs="+", default=[4, 8])
    return parser.parse_args()


def main() -> None:
    """Print a line for each way of decoding."""
    given = arguments()
    generator = load_generator(resolve(given.generator)).eval()
    if given.draft_generator is not None:
        draft = load_generator(resolve(given.draft_generator)).eval()
        generator = with_draft(generator, draft)
    drafts = ("previous", "left", "above") + ("model",) * (given.draft_generator is not None)
    ways: dict[str, Passes] = {"one": OneByOne()}
    for draft in drafts:
        for count in given.num_drafted:
            ways[f"{draft} {count}"] = Drafted(draft=draft, num_drafted=count)
    passes, differ = (dict.fromkeys(ways, 0.0) for _ in range(2))
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(given.rounds):
        ids = range(number * given.batch_size, (number + 1) * given.batch_size)
        labels = torch.tensor(ids) % max(1, generator.config.num_classes)
        indices = {}
        for name, way in ways.items():
            began = time.process_time()
            found = sample(
                generator,
                labels=labels,
                num_kept=generator.config.num_kept,
                seed=0,
                image_ids=ids,
                settings=SamplingSettings(passes=way, guidance_scale=given.guidance),
            )
            seconds[name].append((time.process_time() - began) / given.batch_size)
            passes[name] += found.num_forward
            indices[name] = found.indices
            differ[name] += int((found.indices != indices["one"]).any(-1).sum())
    for name in ways:
        accepted = passes["one"] / passes[name] - 1
        took = [f"{each(seconds[name]):.4f}" for each in (min, statistics.median, max)]
        share = sum(seconds[name]) / sum(seconds["one"])
        print(
            f"{name}: {passes[name] / given.rounds:.1f} passes, {accepted:.2f} drafted tokens kept "
            f"in each, {' '.join(took)} CPU seconds an image (least, median, most), {share:.2f} of "
            f"the time, {differ[name]:g} images differ"
        )


if __name__ == "__main__":
    main()
