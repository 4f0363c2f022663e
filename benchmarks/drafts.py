"""Drafted tokens against one token in each pass: passes and seconds of the same images, in turns.

    OMP_NUM_THREADS=1 python -m benchmarks.drafts digits32_ar --batch-size 1 --rounds 16

Every way samples the same images of the same seed in every round; images that differ are counted.
"""

import argparse
import time

import torch

from mergevq.config.generator import Drafted, OneByOne, Passes, SamplingSettings
from mergevq.generator.build import load_generator
from mergevq.generator.sampling import sample
from mergevq.runtime.artefacts import resolve


def main() -> None:
    """Print a line for each way of decoding."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("generator", help="directory, or name in `mergevq models`")
    parser.add_argument("--batch-size", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=16)
    parser.add_argument("--guidance", type=float, default=1.0)
    parser.add_argument("--num-drafted", type=int, nargs="+", default=[4, 8])
    given = parser.parse_args()
    generator = load_generator(resolve(given.generator)).eval()
    ways: dict[str, Passes] = {"one": OneByOne()} | {
        f"{draft} {count}": Drafted(draft=draft, num_drafted=count)
        for draft in ("previous", "left", "above")
        for count in given.num_drafted
    }
    seconds, passes, differ = (dict.fromkeys(ways, 0.0) for _ in range(3))
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
            seconds[name] += time.process_time() - began
            passes[name] += found.num_forward
            indices[name] = found.indices
            differ[name] += int((found.indices != indices["one"]).any(-1).sum())
    images = given.rounds * given.batch_size
    for name in ways:
        print(
            f"{name}: {passes['one'] / passes[name]:.2f} tokens in each pass, "
            f"{seconds[name] / images:.4f} CPU seconds an image, "
            f"{seconds[name] / seconds['one']:.2f} of the time, {differ[name]:g} images differ"
        )


if __name__ == "__main__":
    main()
