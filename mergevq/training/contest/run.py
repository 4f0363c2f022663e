"""Arms and seeds of tokenizers at equal training, measured alike: `mergevq compare`.

A comparison is a directory: `ARM/SEED` are training runs, and `compare.json`, `compare.md` and the
pictures beside them are made of these. Runs that are finished are measured again and not trained
again; one that was stopped goes on.
"""

import contextlib
import json
import logging
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch
from PIL import Image

from mergevq.config.base import FORMAT_VERSION
from mergevq.config.contest import (
    Arm,
    ArmRecord,
    ContestRecord,
    ContestSettings,
    SeedRecord,
    YardstickRecord,
)
from mergevq.config.training import TokenizerRun
from mergevq.data.batches import open_train_val
from mergevq.data.layouts import Source
from mergevq.metrics.extractor import FeatureExtractor
from mergevq.metrics.lpips import load_perceptual
from mergevq.metrics.yardsticks import TrainingImages
from mergevq.report.pictures import contact_sheet, merge_map, to_pil
from mergevq.report.plots import Panel, has_plots, line_plot
from mergevq.runtime.artefacts import model_hash
from mergevq.runtime.device import deterministic, resolve_device
from mergevq.runtime.files import write_json
from mergevq.runtime.logs import Progress, read_metrics
from mergevq.runtime.run import RunDirectory, command_line, environment, read_run_record
from mergevq.runtime.settings import changed_settings, from_json, to_json
from mergevq.tokenizer.tokenizer import Tokenizer
from mergevq.training.contest.measure import (
    HeldOut,
    Points,
    measure_arm,
    measure_components,
    measure_yardsticks,
    points,
    read_images,
)
from mergevq.training.contest.table import rate_distortion, table, verdicts
from mergevq.training.train import finish

logger = logging.getLogger("mergevq")

RECORD, TABLE, PLOT = "compare.json", "compare.md", "rate_distortion.png"
PICTURES, MAPS = "pictures.png", "maps.png"


def compare(settings: ContestSettings) -> ContestRecord:
    """Train what is not trained yet, measure everything, and write record, table and pictures.

    Returns:
        What was written to `compare.json`.

    Raises:
        ValueError: arms do not fit each other or the data, a K or as few bits are of no arm, or the
            directory holds other runs under these names.
        RuntimeError: training was interrupted, or a file is damaged.
    """
    out = Path(settings.out)
    asked = {arm.name: points(settings, arm) for arm in settings.arms}
    left_out = [text for each in asked.values() for text in each.left_out]
    if not any(each.num_kept for each in asked.values()):
        raise ValueError(f"there is nothing to measure: {'; '.join(left_out)}")
    for arm, seed in _turns(settings):
        _require_same_run(settings.run_of(arm, seed))
    plotting = has_plots(out / PLOT)
    opened = _open(settings)
    for arm, seed in _turns(settings):
        logger.info("%s, seed %d", arm.name, seed)
        finish(settings.run_of(arm, seed), brief=True)
    held_out = opened.held_out
    with deterministic(held_out.device):
        total = len(settings.arms) * len(settings.seeds) * len(held_out.pixels)
        with contextlib.closing(Progress(total, unit="image")) as progress:
            arms = [
                _measured(settings, arm, asked[arm.name], held_out, progress)
                for arm in settings.arms
            ]
        yardsticks = _yardsticks(settings, arms, asked, opened)
    record: ContestRecord = {
        "format_version": FORMAT_VERSION,
        "kind": "comparison",
        "settings": to_json(settings),
        "world_size": 1,
        "command": command_line(),
        "environment": environment(held_out.device),
        "num_train_images": opened.num_train_images,
        "num_images": len(held_out.pixels),
        "pixels_sha256": held_out.pixels_sha256,
        "arms": arms,
        "yardsticks": yardsticks,
        "verdicts": verdicts(arms, settings.against),
        "left_out": left_out,
    }
    write_json(out / RECORD, record)
    (out / TABLE).write_text(table(record), encoding="utf-8")
    if plotting:
        _plot(arms, yardsticks).save(out / PLOT)
    if settings.num_shown:
        for name, sheet in _pictures(settings, asked, held_out).items():
            sheet.save(out / name)
    return record


class _Opened(NamedTuple):
    """Images of all arms."""

    held_out: HeldOut
    made_of: TrainingImages | None
    """Training images that yardsticks are made of; None for none."""
    num_train_images: int


def _turns(settings: ContestSettings) -> Iterator[tuple[Arm, int]]:
    """Every arm with every seed: all arms of a seed before the next, so that a stop leaves some."""
    for seed in settings.seeds:
        for arm in settings.arms:
            yield arm, seed


def _require_same_run(run: TokenizerRun) -> None:
    """Check that the directory of a run holds nothing, or this run.

    Raises:
        ValueError: it holds a run of other settings.
    """
    path = RunDirectory(run.out).record
    if not path.is_file():
        return
    # Settings that came after the run was begun have their defaults in it.
    there = to_json(from_json(TokenizerRun, read_run_record(path)["run"], where=str(path)))
    changed = changed_settings(there, json.loads(json.dumps(to_json(run))))
    changed.pop("out", None)  # The directory may have been moved.
    if changed:
        named = ", ".join(f"{name} is {a} there and {b} here" for name, (a, b) in changed.items())
        raise ValueError(
            f"{run.out} holds a run with other settings ({named}); choose another directory with "
            f"--out, give the arm another name, or delete {run.out}"
        )


def _open(settings: ContestSettings) -> _Opened:
    """Read the images that arms are measured on and yardsticks are made of."""
    run = settings.run_of(settings.arms[0], settings.seeds[0])
    device = resolve_device(run.train.device)
    train, val = open_train_val(run.data)
    side, workers = run.model.image_size, run.data.num_workers
    shown = read_images(val, side, settings.max_images, workers)
    perceptual = None
    if settings.lpips is not None:
        perceptual = load_perceptual(settings.lpips_trunk, settings.lpips)
    held_out = HeldOut(
        pixels=shown.pixels,
        label=shown.label,
        device=device,
        perceptual=None if perceptual is None else perceptual.to(device),
        extractor=None
        if settings.extractor is None
        else FeatureExtractor(settings.extractor, device),
    )
    limit = settings.num_yardstick_images
    made_of = read_images(train, side, limit, workers) if limit else None
    return _Opened(held_out, made_of, len(train))


def _load(run: TokenizerRun, device: torch.device) -> Tokenizer:
    """The trained tokenizer of a run."""
    model = RunDirectory(run.out).model
    return Tokenizer.from_pretrained(model, precision=run.train.precision, device=device)


def _measured(
    settings: ContestSettings, arm: Arm, asked: Points, held_out: HeldOut, progress: Progress
) -> ArmRecord:
    """An arm with every seed."""
    num_parameters, seeds = 0, list[SeedRecord]()
    for seed in settings.seeds:
        run = settings.run_of(arm, seed)
        directory = RunDirectory(run.out)
        tokenizer = _load(run, held_out.device)
        num_parameters = sum(each.numel() for each in tokenizer.parameters())
        log = read_metrics(directory.metrics)
        speeds = [line["images_per_second"] for line in log if "images_per_second" in line]
        # The first interval also waits for the first images.
        speeds = speeds[1:] or speeds
        seeds.append(
            {
                "seed": seed,
                "run": str(Path(arm.name, str(seed))),
                "model_hash": model_hash(directory.model),
                "images_per_second": statistics.median(speeds) if speeds else None,
                "points": measure_arm(tokenizer, run, asked, held_out, progress),
            }
        )
    return {
        "name": arm.name,
        "num_parameters": num_parameters,
        "init_from": arm.run.init_from,
        "seeds": seeds,
    }


def _yardsticks(
    settings: ContestSettings,
    arms: list[ArmRecord],
    asked: dict[str, Points],
    opened: _Opened,
) -> list[YardstickRecord]:
    """Yardsticks, the linear codec at the bits of each arm and at those asked for, in whole bits.

    Codes that learned nothing are at each K of the first arm that has such.
    """
    if opened.made_of is None:
        return []
    first = [arm["seeds"][0]["points"] for arm in arms]
    totals = {int(p["bits_tokens"] + p["bits_layout"]) for points in first for p in points}
    budgets = sorted(totals | set(settings.bits))
    found = measure_yardsticks(opened.made_of, opened.held_out, budgets)
    for arm in settings.arms:
        num_kept = list(asked[arm.name].num_kept.values())
        components = measure_components(arm.run.model, opened.held_out, num_kept)
        if components:
            return found + components
    return found


def _plot(arms: Sequence[ArmRecord], yardsticks: Sequence[YardstickRecord]) -> Image.Image:
    """PSNR over bits: of the arms, then beside yardsticks, which may be far above them."""
    curves = rate_distortion(arms, yardsticks)
    names = {arm["name"] for arm in arms}
    alone = [curve for curve in curves if curve.label in names]
    beside = [replace(curve, label="" if curve in alone else curve.label) for curve in curves]
    panels = [
        Panel(title="PSNR in dB, given source", curves=alone),
        Panel(title="beside yardsticks", curves=beside),
    ]
    return line_plot(
        panels if yardsticks else panels[:1],
        x_label="bits of an image, tokens and layout",
        size=(5.4, 3.8),
    )


@torch.no_grad()
def _pictures(
    settings: ContestSettings, asked: dict[str, Points], held_out: HeldOut
) -> dict[str, Image.Image]:
    """Some held-out images as each arm with the first seed has them, by name of the picture.

    Decoded from given layouts, and the source maps of the arms that have any.
    """
    count = min(settings.num_shown, len(held_out.pixels))
    chosen = [i * len(held_out.pixels) // count for i in range(count)]
    image = held_out.pixels[chosen].float() / 127.5 - 1
    originals = [to_pil(each) for each in image]
    sheets = {PICTURES: [originals], MAPS: [originals]}
    titles = {name: ["original"] for name in sheets}
    for arm in settings.arms:
        for num_kept in list(asked[arm.name].num_kept.values())[:1]:
            tokenizer = _load(settings.run_of(arm, settings.seeds[0]), held_out.device)
            made = tokenizer.reconstruct(image.to(held_out.device), num_kept)
            columns = {PICTURES: [to_pil(each) for each in made.image.float().clamp(-1, 1)]}
            if isinstance(made.layout, Source):
                columns[MAPS] = [
                    merge_map(each, index, made.encoded.grid_shape)
                    for each, index in zip(image, made.layout.index.cpu(), strict=True)
                ]
            for name, column in columns.items():
                sheets[name].append(column)
                titles[name].append(f"{arm.name}\nK = {num_kept}")
    return {
        name: contact_sheet([list(row) for row in zip(*columns, strict=True)], titles[name])
        for name, columns in sheets.items()
        if len(columns) > 1
    }
