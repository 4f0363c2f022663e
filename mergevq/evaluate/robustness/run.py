"""How much a decoder suffers from wrong tokens: `mergevq evaluate robustness`.

Generators make mistakes that encoders do not. Some of an image's tokens are replaced by other codes
nearby before they are decoded, and what comes back is measured as a reconstruction is. So are
images whose source map is wrong: some cells are in the group of another cell.

Source: Qiu et al. 2025, "Robust Latent Matters: Boosting Image Generation with Sampling Error
Synthesis", section 3 (arXiv:2503.08354), whose pFID is the mean Frechet distance over 50 to 90 % of
wrong tokens, each one of the 200, 280 or 360 nearest entries of a codebook of 4,096.

Differs: without a codebook there are no nearest entries; the neighbours of a code are those within
a radius of differing bits, so the ball is a share of the codebook and grows with it. Of 18 bits all
three numbers are one radius, 6. The mean is called after its distance, `perturbed_frechet_NAME`.
Wrong maps are this project's own: its tokens have a map, given by the encoder or recovered.

Shape letters: B batch, K kept tokens, D bits of a token.
"""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple, get_args

import torch
from jaxtyping import Bool, Float, Int64
from PIL import Image
from torch import Tensor

from mergevq.config.base import RecoverySource
from mergevq.config.evaluation import Groups, RobustnessSettings
from mergevq.config.records import RobustnessRecord
from mergevq.data.codes import require_parts
from mergevq.data.layouts import Source, require_source
from mergevq.evaluate.robustness.maps import Moved, move_cells
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
from mergevq.metrics.image import Mean, to_uint8
from mergevq.metrics.references import ImageHashes
from mergevq.nn.rows import take_rows
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
from mergevq.tokenizer.seams import Condition, Encoded
from mergevq.tokenizer.tokenizer import Tokenizer

AVERAGED_FRACTIONS = (0.5, 0.6, 0.7, 0.8, 0.9)
"""Shares of wrong tokens that the paper's pFID is the mean over."""
NEIGHBOURS = (200, 280, 360)
"""Nearest codes of 4,096 that replace one: the mean is over these too."""


class Wrong(NamedTuple):
    """Mistakes in the tokens of an image and in their map."""

    fraction: float
    """Share of the tokens that are replaced."""
    radius: int | None
    """Ball that their codes are replaced in; None where nothing is replaced."""
    source: RecoverySource = "given"
    """Source map: the encoder's, or the one recovered from the tokens, wrong ones among them."""
    map_fraction: float = 0.0
    """Share of the cells that are put into another group of it."""
    groups: Groups | None = None
    """Where the other groups come from; None where no cell is moved."""


class Point(NamedTuple):
    """Result for one kind of mistakes."""

    wrong: Wrong
    num_replaced: int
    """Tokens of each image."""
    num_moved: float
    """Cells of an image, mean over images."""
    numbers: dict[str, float]
    """See `Comparison.compute`."""


class Curves(NamedTuple):
    """Results for every kind of mistakes, over the same images."""

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
            mistakes(settings, radii),
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
    missing, map_missing = _missing(settings, subject), _map_missing(settings, subject)
    means = {} if missing else mean_distance(found.points, num_bits)
    if settings.map_fractions and not map_missing:
        means |= mean_map_distances(found.points)
    left_out = [f"the mean of the Frechet distances: it needs {missing}"] if missing else []
    if settings.map_fractions and map_missing:
        left_out.append(f"the means of the Frechet distances of wrong maps: {map_missing}")
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
                "fraction": point.wrong.fraction,
                "radius": point.wrong.radius,
                "source": point.wrong.source,
                "map_fraction": point.wrong.map_fraction,
                "groups": point.wrong.groups,
                "num_replaced": point.num_replaced,
                "num_moved": point.num_moved,
                **json_numbers(point.numbers),
            }
            for point in found.points
        ],
        **json_numbers(means),
        "left_out": left_out,
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


def _map_missing(settings: RobustnessSettings, subject: Opened) -> str | None:
    """Thing that the means over wrong maps lack; None if everything is there."""
    if subject.extractor is None:
        return "they need --extractor"
    if not set(AVERAGED_FRACTIONS) <= set(settings.map_fractions):
        return f"they need --map-fractions {','.join(map(str, AVERAGED_FRACTIONS))} at least"
    return None


def mean_distance(points: Sequence[Point], num_bits: int) -> dict[str, float]:
    """The mean of the Frechet distances that the paper's pFID is of, by its name.

    Args:
        points: those of `AVERAGED_FRACTIONS` in the balls of `default_radii`, among others.
        num_bits: D.
    """
    (name,) = filter(_is_distance, points[0].numbers)
    found = {point.wrong: point.numbers[name] for point in points}
    distances = [
        found[Wrong(fraction, radius)]
        for fraction in AVERAGED_FRACTIONS
        for radius in default_radii(num_bits)
    ]
    return {f"perturbed_{name}": sum(distances) / len(distances)}


def mean_map_distances(points: Sequence[Point]) -> dict[str, float]:
    """Means over `AVERAGED_FRACTIONS` of the cells, by the kind of other groups and the map."""
    (name,) = filter(_is_distance, points[0].numbers)
    found = {point.wrong: point.numbers[name] for point in points}
    return {
        f"moved_{groups}_{source}_{name}": sum(
            found[Wrong(0.0, None, source, fraction, groups)] for fraction in AVERAGED_FRACTIONS
        )
        / len(AVERAGED_FRACTIONS)
        for source in get_args(RecoverySource)
        for groups in get_args(Groups)
    }


def mistakes(settings: RobustnessSettings, radii: Sequence[int]) -> list[Wrong]:
    """The kinds of mistakes that are measured: wrong tokens, wrong maps, and both.

    Both are as large a share of the tokens as of the cells, and, with the map recovered from the
    wrong tokens, no cells beside those that recovery gets wrong.
    """
    balls, kinds = sorted(set(radii)), get_args(Groups)
    found = [
        Wrong(fraction, radius)
        for fraction in sorted(set(settings.fractions))
        for radius in (balls if fraction else [None])
    ]
    shares = sorted(set(settings.map_fractions))
    found += [
        Wrong(0.0, None, source, share, groups)
        for source in get_args(RecoverySource)
        for share in shares
        for groups in (kinds if share else [None])
    ]
    if settings.joint:
        for radius in balls:
            for share in filter(None, shares):
                found += [Wrong(share, radius, "given", share, groups) for groups in kinds]
                found.append(Wrong(share, radius, "recovered"))
    return list(dict.fromkeys(found))


def measure_robustness(
    subject: Opened, num_kept: int, wrongs: Sequence[Wrong], *, seed: int
) -> Curves:
    """Go through the images once and measure each kind of mistakes; on every rank.

    The tokens replaced at a small fraction are replaced at a larger one too, by the same codes, and
    likewise cells are moved; with neither it is the reconstruction.

    Args:
        subject: what is evaluated.
        num_kept: K.
        wrongs: kinds of mistakes; no two alike.
        seed: of the draws; those of an image depend on it and on the image's position.

    Raises:
        ValueError: K or a radius is not legal, a tokenizer without maps should have wrong ones, or
            a number is not finite.
    """
    tokenizer, world = subject.tokenizer, subject.world
    config, num_bits = tokenizer.config, require_bits(tokenizer)
    for wrong in wrongs:
        if wrong.radius is not None:
            ball_share(num_bits, wrong.radius)
    _require_maps(tokenizer, wrongs)
    tokenizer.num_tokens(torch.empty(1, 3, config.image_size, config.image_size), num_kept)
    compared = [
        comparison(subject.perceptual, subject.extractor, subject.subject.protocol) for _ in wrongs
    ]
    moved = [Mean("num_moved") for _ in wrongs]
    originals, hashes = Originals(subject.perceptual, subject.extractor), ImageHashes()
    total = -(-subject.num_images // world.world_size) * len(wrongs)
    progress = Progress(total, unit="reconstruction")
    with deterministic(world.device), torch.no_grad():
        for batch in subject.batches():
            image = batch.image.to(world.device)
            hashes.update(to_uint8(batch.image), batch.index)
            original = originals.update(image)
            with subject.autocast():
                condition = condition_of(config.condition, batch.label, "robustness")
                encoded = tokenizer.encode(image, num_kept, condition)
            spoilt = _Spoilt(subject, encoded, wrongs, seed, batch.index.tolist())
            for number, wrong in enumerate(wrongs):
                decoded, num_moved = spoilt.decode(wrong, condition)
                compared[number].update(original, decoded, batch.index)
                moved[number].update(num_moved.double())
                progress.update(len(image))
    progress.close()
    statistics = originals.compute()
    points = [
        Point(
            wrong,
            num_replaced(num_kept, wrong.fraction),
            moved[number].compute().mean,
            compared[number].compute(statistics),
        )
        for number, wrong in enumerate(wrongs)
    ]
    num_images = int(distributed.sum(compared[0].num_images))
    return Curves(points=points, pixels_sha256=hashes.compute(), num_images=num_images)


class _Spoilt:
    """Decodes the tokens of a batch with any of the mistakes; what they share is drawn once."""

    def __init__(
        self,
        subject: Opened,
        encoded: Encoded,
        wrongs: Sequence[Wrong],
        seed: int,
        image_ids: Sequence[int],
    ) -> None:
        self.subject, self.encoded, self.image_ids, self.seed = subject, encoded, image_ids, seed
        self.wrongs = wrongs
        _, num_kept, num_bits = encoded.codes.shape
        self.flips = {
            radius: draw_flips(num_kept, num_bits, radius, seed, image_ids)
            for radius in {wrong.radius for wrong in wrongs}
            if radius is not None
        }
        self.maps: dict[Wrong, dict[int, Moved]] = {}
        """Wrong maps by the count of cells, for mistakes that differ in it alone."""

    def decode(
        self, wrong: Wrong, condition: Condition | None
    ) -> tuple[Float[Tensor, "b 3 h w"], Int64[Tensor, "b"]]:
        """Images, and how many cells of each were moved."""
        encoded, tokenizer = self.encoded, self.subject.tokenizer
        codes, layout = encoded.codes, encoded.layout
        num_moved = torch.zeros(len(codes), dtype=torch.int64)
        if wrong.radius is not None:
            count = num_replaced(codes.shape[1], wrong.fraction)
            codes = perturb(codes, self.flips[wrong.radius], count)
        with self.subject.autocast():
            if wrong.source == "recovered":
                layout = tokenizer.recover(codes, encoded.grid_shape)
            if wrong.groups is not None:
                moved = self._moved(wrong, wrong.groups, require_source(layout, "moving cells"))
                codes, layout = take_rows(codes, moved.order), moved.source
                num_moved = moved.num_moved
            noise = Noise(0, self.image_ids)
            image = tokenizer.decode(codes, layout, encoded.grid_shape, noise, condition)
        return image, num_moved

    def _moved(self, wrong: Wrong, groups: Groups, source: Source) -> Moved:
        """Maps with as many cells moved.

        The given map is the same with any tokens, a recovered one is of the tokens it is from.
        """
        kind, num_cells = _map_kind(wrong), source.index.shape[1]
        if kind not in self.maps:
            shares = [each.map_fraction for each in self.wrongs if _map_kind(each) == kind]
            self.maps[kind] = move_cells(
                source,
                self.encoded.grid_shape,
                groups,
                [num_replaced(num_cells, share) for share in shares],
                seed=self.seed,
                image_ids=self.image_ids,
            )
        return self.maps[kind][num_replaced(num_cells, wrong.map_fraction)]


def _map_kind(wrong: Wrong) -> Wrong:
    """Mistakes whose wrong maps come from the same draw, at any share: see `_Spoilt`."""
    if wrong.source == "given":
        return Wrong(0.0, None, groups=wrong.groups)
    return wrong._replace(map_fraction=0.0)


def _require_maps(tokenizer: Tokenizer, wrongs: Sequence[Wrong]) -> None:
    """Raise `ValueError` if maps should be wrong that grid and K imply."""
    if tokenizer.has_maps or all(wrong == Wrong(*wrong[:2]) for wrong in wrongs):
        return
    raise ValueError(
        "map_fractions need a map that each image has of its own, and of this tokenizer grid and "
        f"K imply it (model.reducer.kind {tokenizer.config.reducer.kind}); leave --map-fractions "
        "out, or take a tokenizer whose model.reducer.kind is merge"
    )


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
    curves = _curves(points)
    names = {"psnr": "PSNR in dB"}
    names |= {name: name for name in points[0].numbers if _is_distance(name)}
    panels = [
        Panel(
            title=title,
            curves=[
                Curve(
                    x=[max(point.wrong.fraction, point.wrong.map_fraction) for point in curve],
                    y=[point.numbers[name] for point in curve],
                    label=label if len(curves) > 1 else "",
                    colour=number,
                )
                for number, (label, curve) in enumerate(curves.items())
            ],
        )
        for name, title in names.items()
    ]
    return line_plot(panels, x_label="fraction of tokens, or of cells")


def _curves(points: Sequence[Point]) -> dict[str, list[Point]]:
    """Points by the name of their curve, each from the one in which nothing is wrong."""
    curves: dict[str, list[Point]] = {}
    for point in points:
        wrong = point.wrong
        parts = [] if wrong.radius is None else [f"up to {wrong.radius} other bits"]
        if wrong.groups is not None:
            parts.append(f"groups of {wrong.groups} cells")
        if wrong.source == "recovered":
            parts.append("recovered map")
        if wrong.radius is not None or wrong.groups is not None:
            curves.setdefault(", ".join(parts), []).append(point)
    starts = {p.wrong.source: p for p in points if p.wrong == Wrong(0.0, None, p.wrong.source)}
    begun = {
        name: [*filter(None, [starts.get(curve[0].wrong.source)]), *curve]
        for name, curve in curves.items()
    }
    return begun or {"": list(points)}


def _is_distance(name: str) -> bool:
    """Whether a number is a Frechet distance."""
    return name == "fid" or name.startswith("frechet_")
