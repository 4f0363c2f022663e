"""How much a decoder suffers from wrong tokens: `mergevq evaluate robustness`.

Generators make mistakes that encoders do not. Some of an image's tokens are replaced by other codes
nearby before they are decoded, and what comes back is measured as a reconstruction is.

Source: Qiu et al. 2025, "Robust Latent Matters: Boosting Image Generation with Sampling Error
Synthesis", section 3 (arXiv:2503.08354), whose pFID is the mean Frechet distance over 50 to 90 % of
wrong tokens, each one of the 200, 280 or 360 nearest entries of a codebook of 4,096.

Differs: without a codebook there are no nearest entries; the neighbours of a code are those within
a radius of differing bits, so the ball is a share of the codebook and grows with it. Of 18 bits all
three numbers are one radius, 6. The mean is called after its distance, `perturbed_frechet_NAME`.

Shape letters: B batch, K kept tokens, D bits of a token.
"""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from PIL import Image
from torch import Tensor

from mergevq.config.evaluation import RobustnessSettings
from mergevq.config.records import RobustnessRecord
from mergevq.data.codes import require_parts
from mergevq.evaluate.subject import (
    RECORD,
    Opened,
    evaluation_record,
    json_numbers,
    opened,
    require_fresh,
    subject_record,
)
from mergevq.metrics.comparison import Originals, comparison
from mergevq.metrics.image import to_uint8
from mergevq.metrics.references import ImageHashes
from mergevq.report.plots import Curve, Panel, has_plots, line_plot
from mergevq.runtime import distributed
from mergevq.runtime.device import deterministic
from mergevq.runtime.files import write_json
from mergevq.runtime.logs import Progress
from mergevq.runtime.random import step_generator
from mergevq.runtime.settings import to_json
from mergevq.tokenizer.conditions.values import condition_of
from mergevq.tokenizer.flows.decoder import Noise
from mergevq.tokenizer.near import ball_share, choose_bits, radius_of
from mergevq.tokenizer.tokenizer import Tokenizer

AVERAGED_FRACTIONS = (0.5, 0.6, 0.7, 0.8, 0.9)
"""Shares of wrong tokens that the paper's pFID is the mean over."""
NEIGHBOURS = (200, 280, 360)
"""Nearest codes of 4,096 that replace one: the mean is over these too."""


class Point(NamedTuple):
    """Result at one fraction, in one ball."""

    fraction: float
    radius: int | None
    """None where nothing is replaced."""
    num_replaced: int
    """Tokens of each image."""
    numbers: dict[str, float]
    """See `Comparison.compute`."""


class Curves(NamedTuple):
    """Results at every fraction in every ball, over the same images."""

    points: list[Point]
    pixels_sha256: str
    num_images: int


def evaluate_robustness(settings: RobustnessSettings) -> RobustnessRecord | None:
    """Evaluate and write numbers and a plot; on every rank, under `torchrun`.

    Returns:
        What was written to `evaluation.json`; None on ranks other than the main one.

    Raises:
        ValueError: model, data or settings do not fit, or a number is not finite.
        RuntimeError: a file is damaged.
    """
    out = Path(settings.out)
    require_fresh(out)
    plotting = distributed.is_main() and has_plots(out / "robustness.png")
    with opened(settings.subject) as subject:
        num_bits = require_bits(subject.tokenizer)
        radii = [settings.radius] if settings.radius is not None else default_radii(num_bits)
        found = measure_robustness(
            subject,
            subject.tokenizer.config.num_kept if settings.num_kept is None else settings.num_kept,
            settings.fractions,
            radii=radii,
            seed=settings.seed,
        )
        if not distributed.is_main():
            return None
        out.mkdir(parents=True, exist_ok=True)
        if plotting:
            robustness_plot(found.points).save(out / "robustness.png")
        record = _record(settings, subject, radii, found)
        write_json(out / RECORD, record)
        return record


def _record(
    settings: RobustnessSettings, subject: Opened, radii: Sequence[int], found: Curves
) -> RobustnessRecord:
    """Content of `evaluation.json`."""
    num_bits = require_bits(subject.tokenizer)
    missing = _missing(settings, subject)
    return {
        "kind": "robustness evaluation",
        "settings": to_json(settings),
        **evaluation_record(subject.world),
        **subject_record(subject, found.pixels_sha256, found.num_images),
        "balls": [
            {
                "radius": radius,
                "share": ball_share(num_bits, radius),
                "neighbours": [n for n in NEIGHBOURS if radius_of(num_bits, n) == radius],
            }
            for radius in sorted(set(radii))
        ],
        "results": [
            {
                "fraction": point.fraction,
                "radius": point.radius,
                "num_replaced": point.num_replaced,
                **json_numbers(point.numbers),
            }
            for point in found.points
        ],
        **json_numbers({} if missing else mean_distance(found.points, num_bits)),
        "left_out": [f"the mean of the Frechet distances: it needs {missing}"] if missing else [],
    }


def _missing(settings: RobustnessSettings, subject: Opened) -> str | None:
    """Thing that the mean of the distances lacks; None if everything is there."""
    if subject.extractor is None:
        return "--extractor"
    if settings.radius is not None:
        return "the balls of its definition: leave --radius out"
    if not set(AVERAGED_FRACTIONS) <= set(settings.fractions):
        return f"--fractions {','.join(map(str, AVERAGED_FRACTIONS))} at least"
    return None


def mean_distance(points: Sequence[Point], num_bits: int) -> dict[str, float]:
    """The mean of the Frechet distances that the paper's pFID is of, by its name.

    Args:
        points: those of `AVERAGED_FRACTIONS` in the balls of `default_radii`, among others.
        num_bits: D.
    """
    (name,) = filter(_is_distance, points[0].numbers)
    found = {(point.fraction, point.radius): point.numbers[name] for point in points}
    distances = [
        found[fraction, radius]
        for fraction in AVERAGED_FRACTIONS
        for radius in default_radii(num_bits)
    ]
    return {f"perturbed_{name}": sum(distances) / len(distances)}


def measure_robustness(
    subject: Opened,
    num_kept: int,
    fractions: Sequence[float],
    *,
    radii: Sequence[int],
    seed: int,
) -> Curves:
    """Go through the images once and measure at every fraction in every ball; on every rank.

    The tokens replaced at a small fraction are replaced at a larger one too, by the same codes, and
    the encoder's source map is used throughout: a fraction of 0 is the reconstruction, once.

    Args:
        subject: what is evaluated.
        num_kept: K.
        fractions: shares of the tokens to replace, from 0 to 1.
        radii: of each ball: most bits that differ.
        seed: of the draws; those of an image depend on it and on the image's position.

    Raises:
        ValueError: K or a radius is not legal, or a number is not finite.
    """
    tokenizer, world = subject.tokenizer, subject.world
    config, num_bits = tokenizer.config, require_bits(tokenizer)
    balls = sorted(set(radii))
    for radius in balls:
        ball_share(num_bits, radius)
    tokenizer.num_tokens(torch.empty(1, 3, config.image_size, config.image_size), num_kept)
    comparisons = {
        (fraction, radius): comparison(
            subject.perceptual, subject.extractor, subject.subject.protocol
        )
        for fraction in sorted(set(fractions))
        for radius in (balls if fraction else [None])
    }
    originals, hashes = Originals(subject.perceptual, subject.extractor), ImageHashes()
    total = -(-subject.num_images // world.world_size) * len(comparisons)
    progress = Progress(total, unit="reconstruction")
    with deterministic(world.device), torch.no_grad():
        for batch in subject.batches():
            image = batch.image.to(world.device)
            hashes.update(to_uint8(batch.image), batch.index)
            original = originals.update(image)
            with subject.autocast():
                condition = condition_of(config.condition, batch.label, "robustness")
                encoded = tokenizer.encode(image, num_kept, condition)
            ids = batch.index.tolist()
            flips = {r: draw_flips(num_kept, num_bits, r, seed, ids) for r in balls}
            for (fraction, radius), compared in comparisons.items():
                codes = encoded.codes
                if radius is not None:
                    codes = perturb(codes, flips[radius], num_replaced(num_kept, fraction))
                with subject.autocast():
                    noise = Noise(0, ids)
                    decoded = tokenizer.decode(
                        codes, encoded.layout, encoded.grid_shape, noise, condition
                    )
                compared.update(original, decoded, batch.index)
                progress.update(len(image))
    progress.close()
    statistics = originals.compute()
    points = [
        Point(fraction, radius, num_replaced(num_kept, fraction), compared.compute(statistics))
        for (fraction, radius), compared in comparisons.items()
    ]
    num_images = int(distributed.sum(next(iter(comparisons.values())).num_images))
    return Curves(points=points, pixels_sha256=hashes.compute(), num_images=num_images)


# ------------------------------------------------------------------------------- the perturbation


class Flips(NamedTuple):
    """For every token of some images: when it is replaced, and by what."""

    rank: Float[Tensor, "b k"]
    """Place of each token in the order of replacement, from 0."""
    bits: Bool[Tensor, "b k d"]
    """Which bits of it change; at least one."""


def draw_flips(
    num_kept: int, num_bits: int, radius: int, seed: int, image_ids: Sequence[int]
) -> Flips:
    """Draw a code for every token, uniformly from the ball around it without its centre.

    Args:
        num_kept: K.
        num_bits: D.
        radius: of the ball, in bits.
        seed: of the run.
        image_ids: an image's draws depend on the seed and on its number here.
    """
    # As many codes differ in d bits as there are ways to choose d of D.
    ways = torch.tensor([float(math.comb(num_bits, d)) for d in range(1, radius + 1)])
    ranks, flips = [], []
    for image_id in image_ids:
        generator = step_generator(seed, "robustness", image_id)
        ranks.append(torch.randperm(num_kept, generator=generator).argsort())
        counts = 1 + torch.multinomial(ways, num_kept, replacement=True, generator=generator)
        numbers = torch.rand(num_kept, num_bits, generator=generator)
        flips.append(choose_bits(numbers, counts))
    return Flips(torch.stack(ranks).float(), torch.stack(flips))


def perturb(codes: Float[Tensor, "b k d"], flips: Flips, num_tokens: int) -> Float[Tensor, "b k d"]:
    """Change the first so many tokens of each image, in the order of replacement."""
    replaced = (flips.rank < num_tokens)[..., None] & flips.bits
    return torch.where(replaced.to(codes.device), -codes, codes)


def num_replaced(num_kept: int, fraction: float) -> int:
    """Tokens that a fraction of K is, to the nearest."""
    return math.floor(fraction * num_kept + 0.5)


def require_bits(tokenizer: Tokenizer) -> int:
    """Bits of a token, each of them one channel of its code.

    Raises:
        ValueError: tokens are real numbers, or channels are not bits, so that near codes are not
            those of few flips.
    """
    spec = tokenizer.quantizer.spec
    require_parts(spec.sizes, "robustness")
    if spec.is_binary:
        return spec.dim
    raise ValueError(
        f"codes of {spec.dim} channels with {spec.sizes} values have no bits to flip; robustness "
        "is measured for quantizers of bits, such as model.quantizer.kind lfq"
    )


def default_radii(num_bits: int) -> list[int]:
    """Radii of the paper's three balls; several may be one, and count as often in the mean.

    Examples:
        >>> default_radii(18), default_radii(12)
        ([6, 6, 6], [3, 3, 4])
    """
    return [radius_of(num_bits, count) for count in NEIGHBOURS]


# ---------------------------------------------------------------------------------- what is drawn


def robustness_plot(points: Sequence[Point]) -> Image.Image:
    """PSNR, and where it was measured the Frechet distance, over the fraction replaced."""
    radii = sorted({point.radius for point in points if point.radius is not None})
    # What nothing was replaced in is where every curve begins.
    curves = {r: [p for p in points if p.radius in {None, r}] for r in radii} or {0: list(points)}
    names = {"psnr": "PSNR in dB"}
    names |= {name: name for name in points[0].numbers if _is_distance(name)}
    panels = [
        Panel(
            title=title,
            curves=[
                Curve(
                    x=[point.fraction for point in curve],
                    y=[point.numbers[name] for point in curve],
                    label=f"up to {radius} other bits" if len(curves) > 1 else "",
                    colour=number,
                )
                for number, (radius, curve) in enumerate(curves.items())
            ],
        )
        for name, title in names.items()
    ]
    return line_plot(panels, x_label="fraction of tokens replaced")


def _is_distance(name: str) -> bool:
    """Whether a number is a Frechet distance."""
    return name == "fid" or name.startswith("frechet_")
