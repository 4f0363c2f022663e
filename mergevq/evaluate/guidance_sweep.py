"""Which guidance scale samples best: `mergevq evaluate guidance`.

A generator is evaluated at each scale of a range, in a folder of its own, as
`mergevq evaluate generation` does it. A scale that is finished is not done again, so a sweep that
was stopped goes on where it was.

Source: paper, section on class-conditional generation, which sweeps the scale in steps of 0.1 with
a linear schedule.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from PIL import Image

from mergevq.config.records import BestScale, GenerationRecord, GuidanceRecord, GuidanceSettings
from mergevq.evaluate.generation import evaluate_generation
from mergevq.evaluate.subject import RECORD, evaluation_record, require_fresh
from mergevq.metrics.extractor import MetricKind, metric_name, sha256_of
from mergevq.report.plots import Curve, Panel, has_plots, line_plot
from mergevq.runtime import distributed
from mergevq.runtime.artefacts import model_hash, resolve
from mergevq.runtime.device import resolve_device
from mergevq.runtime.files import read_json, write_json
from mergevq.runtime.logs import Progress
from mergevq.runtime.settings import to_json

PLOT = "guidance.png"
_CHOOSING: dict[MetricKind, bool] = {"frechet": False, "class_score": True}
"""Metrics that choose a scale, and whether more is better."""
_PLACES = ("out", "reference", "run.model", "run.tokenizer")
"""Settings that say where files lie, which hashes tell apart: they may have been moved."""
_DRAWN: tuple[MetricKind, ...] = ("frechet", "class_score", "precision", "recall")


def evaluate_guidance(settings: GuidanceSettings) -> GuidanceRecord | None:
    """Evaluate each scale that is not finished, and write the sweep; on every rank.

    Returns:
        What was written to `evaluation.json`; None on ranks other than the main one.

    Raises:
        ValueError: generator, reference or settings do not fit, or what is in the folder of a scale
            is another evaluation.
        RuntimeError: a file is damaged.
    """
    out = Path(settings.evaluation.out)
    require_fresh(out)
    with _among_ranks(settings):
        plotting = distributed.is_main() and has_plots(out / PLOT)
        finished = _finished(settings)
    progress = Progress(
        len(settings.scales), done=len(finished), unit="scale", interval_seconds=0.0
    )
    for scale in settings.scales:
        if scale not in finished and evaluate_generation(settings.at(scale)) is not None:
            progress.update()
    progress.close()
    with _among_ranks(settings) as world:
        if not distributed.is_main():
            return None
        records = _finished(settings)
        record = _record(settings, records, world)
        if plotting:
            guidance_plot(record).save(out / PLOT)
        write_json(out / RECORD, record)
        return record


@contextmanager
def _among_ranks(settings: GuidanceSettings) -> Iterator[distributed.World]:
    """This process's place, for as long as it does not evaluate."""
    try:
        yield distributed.init(resolve_device(settings.evaluation.device))
    finally:
        distributed.shutdown()


# --------------------------------------------------------------------------- what is there already


def _finished(settings: GuidanceSettings) -> dict[float, GenerationRecord]:
    """Records of each scale that is finished.

    Raises:
        ValueError: another evaluation lies there: of other settings, or of files that have changed.
    """
    paths = {scale: Path(settings.at(scale).out) / RECORD for scale in settings.scales}
    there: dict[float, Any] = {s: read_json(path) for s, path in paths.items() if path.is_file()}
    identities = _identities(settings) if there else {}
    for scale, record in there.items():
        wanted = _leaves({"settings": to_json(settings.at(scale))}) | identities
        for name in _PLACES:
            del wanted[f"settings.{name}"]
        found = _leaves(record)
        changed = [
            f"{name.removeprefix('settings.')} ({found.get(name)}, now {value})"
            for name, value in wanted.items()
            if name not in found or found[name] != value
        ]
        if changed:
            raise ValueError(
                f"{paths[scale]} is another evaluation, which differs in {', '.join(changed)}; "
                f"choose another directory with --out, or delete {paths[scale].parent}"
            )
    return there


def _identities(settings: GuidanceSettings) -> dict[str, str]:
    """Hashes of the files that are compared and that compare, as records of evaluations have them.

    A path may lead to another file than it did when a scale was evaluated.
    """
    evaluation, run = settings.evaluation, settings.run
    identities = {
        "kind": "generation evaluation",
        "generator": model_hash(resolve(run.model)),
        "tokenizer": model_hash(resolve(run.tokenizer)),
        "extractor.sha256": sha256_of(Path(evaluation.extractor)),
        "reference.sha256": sha256_of(Path(evaluation.reference)),
    }
    if evaluation.classifier is not None:
        identities["classifier.sha256"] = sha256_of(Path(evaluation.classifier))
    return identities


def _leaves(value: object, where: str = "") -> dict[str, Any]:
    """The values of a JSON object by dotted name; a list is one."""
    if not isinstance(value, dict):
        return {where: value}
    return {
        name: leaf
        for key, part in value.items()  # pyright: ignore[reportUnknownVariableType]
        for name, leaf in _leaves(part, f"{where}.{key}".removeprefix(".")).items()
    }


# ---------------------------------------------------------------------------- what is made of it


def _record(
    settings: GuidanceSettings, records: dict[float, GenerationRecord], world: distributed.World
) -> GuidanceRecord:
    """Content of `evaluation.json`."""
    first = records[settings.scales[0]]
    return {
        "kind": "guidance evaluation",
        "settings": to_json(settings),
        **evaluation_record(world),
        "generator": first["generator"],
        "tokenizer": first["tokenizer"],
        "extractor": first["extractor"],
        "classifier": first["classifier"],
        "reference": first["reference"],
        "results": [
            {
                "scale": scale,
                "folder": Path(settings.at(scale).out).name,
                "pixels_sha256": record["samples"]["pixels_sha256"],
                "metrics": record["metrics"],
                "infinite": record["infinite"],
            }
            for scale, record in records.items()
        ],
        "best": best_scales(records),
        "left_out": first["left_out"],
    }


def best_scales(records: dict[float, GenerationRecord]) -> list[BestScale]:
    """The scale of the lowest Frechet distance and that of the highest class score, if measured.

    Of equal ones the lowest scale is the best.

    Args:
        records: evaluations with one extractor, by scale.
    """
    best: list[BestScale] = []
    for kind, more in _CHOOSING.items():
        name = _name(kind, next(iter(records.values())))
        found = {s: record["metrics"].get(name) for s, record in sorted(records.items())}
        values = {scale: value for scale, value in found.items() if value is not None}
        if values:
            scale = (max if more else min)(values, key=values.__getitem__)
            best.append({"metric": name, "scale": scale, "value": values[scale]})
    return best


def guidance_plot(record: GuidanceRecord) -> Image.Image:
    """Frechet distance over the scale, and what else was measured."""
    results = record["results"]
    panels = [
        Panel(
            title=name,
            curves=[
                Curve(
                    x=[result["scale"] for result in results],
                    y=[result["metrics"][name] for result in results],
                )
            ],
        )
        for name in (_name(kind, record) for kind in _DRAWN)
        if name in results[0]["metrics"]
    ]
    return line_plot(panels, x_label="guidance scale")


def _name(kind: MetricKind, record: GenerationRecord | GuidanceRecord) -> str:
    """A metric's name over the extractor of a record."""
    return metric_name(kind, record["extractor"]["name"], record["extractor"]["sha256"])
