"""From a model and images to a record of what a probe finds: `mergevq probe`.

A probe is a directory: `probe.json` has every setting, hash, version and number, and the pictures
beside it show confusions and neighbours.
"""

import contextlib
import logging
import math
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from jaxtyping import Float, Int64
from PIL import Image
from torch import Tensor

from mergevq.config.base import FORMAT_VERSION
from mergevq.config.probing import FeatureConfig, FinetuneConfig, KnnConfig, LinearConfig, ProbeRun
from mergevq.config.records import (
    FinetuneRow,
    KnnRow,
    LinearRow,
    ProbedData,
    ProbedImages,
    ProbeRecord,
    ScoredRow,
)
from mergevq.config.training import DataConfig
from mergevq.data.batches import eval_batches, open_train_val, train_batches
from mergevq.data.images import ImageDataset, open_images
from mergevq.data.prepare import crop_square
from mergevq.evaluate.probe.features import (
    Extracted,
    FeatureKind,
    extract,
    feature_kinds,
    require_labels,
)
from mergevq.evaluate.probe.finetune import Classifier, finetune, num_steps
from mergevq.evaluate.probe.knn import Neighbours, nearest, vote
from mergevq.evaluate.probe.linear import (
    Labelled,
    accuracy,
    confusion_matrix,
    linear_probe,
    linear_steps,
    standard_error,
    with_pca,
)
from mergevq.report.confusion import Example, confusion_picture, neighbours_picture
from mergevq.report.lettering import shown_names
from mergevq.runtime.artefacts import model_hash, resolve
from mergevq.runtime.device import resolve_device
from mergevq.runtime.files import write_json
from mergevq.runtime.logs import Progress
from mergevq.runtime.random import step_generator
from mergevq.runtime.run import RunDirectory, environment, read_run_record
from mergevq.runtime.settings import to_json
from mergevq.tokenizer.tokenizer import Tokenizer

logger = logging.getLogger("mergevq")

RECORD = "probe.json"
"""The file with everything but the pictures."""
_MAX_QUERIES = 8
"""Rows of the picture of neighbours."""
_MAX_NEIGHBOURS = 8
"""Columns of the picture of neighbours, besides the query."""
_METHODS: dict[type, Literal["linear", "knn", "finetune"]] = {
    LinearConfig: "linear",
    KnnConfig: "knn",
    FinetuneConfig: "finetune",
}


def probe(run: ProbeRun) -> ProbeRecord:
    """Run one probe and write its directory; returns what `probe.json` holds.

    Args:
        run: every setting.

    Raises:
        ValueError: something in `out` is in the way, or model, data and settings do not fit.
        RuntimeError: fine-tuning diverged, or a package is missing.
    """
    out = Path(run.out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"{out} is there already; choose another directory with --out")
    device = resolve_device(run.device)
    directory = resolve(run.model)
    tokenizer = Tokenizer.from_pretrained(directory, precision=run.precision, device=device)
    data = _open(run)
    out.mkdir(parents=True, exist_ok=True)
    features = run.features
    if isinstance(run.method, FinetuneConfig):
        # Beside fine-tuning, the same feature is probed as it was.
        stages, pools = (run.method.stage,), (run.method.pool,)
        features = replace(features, stages=stages, pools=pools, layers=())
    known = _extract(run, features, tokenizer, data)
    described = _describe(data, known)
    match run.method:
        case LinearConfig():
            rows = _linear(run, run.method, known, data)
        case KnnConfig():
            rows = _knn(run, run.method, tokenizer, known, data)
        case FinetuneConfig():
            frozen = _linear(run, run.method.linear, known, data)
            rows = [
                *({**row, "name": f"linear probe: {row['name']}"} for row in frozen),
                *_finetune(run, run.method, feature_kinds(tokenizer, features), data, directory),
            ]
    record: ProbeRecord = {
        "format_version": FORMAT_VERSION,
        "kind": "probe",
        "method": _METHODS[type(run.method)],
        "run": to_json(run),
        "model": {
            "sha256": model_hash(directory),
            "config": to_json(tokenizer.config),
            "teacher": _teacher(directory),
        },
        "data": described,
        "environment": environment(device),
        "rows": rows,
    }
    write_json(out / RECORD, record)
    return record


def _teacher(directory: Path) -> str | None:
    """Teacher that the class token was aligned with; None if its training run is not there."""
    record = RunDirectory(directory.parent).record
    if directory.name != RunDirectory("").model.name or not record.is_file():
        return None
    teacher = read_run_record(record)["run"].get("teacher")
    return teacher.get("kind") if isinstance(teacher, dict) else None


# ----------------------------------------------------------------------------------------- data


class _Data(NamedTuple):
    """Images to learn from and images to be tested on; the same ones when one is left out."""

    train: ImageDataset
    val: ImageDataset
    leave_one_out: bool
    num_unseen_class: int
    """Validation images of classes that no training image has."""
    most_frequent_class_accuracy: float


def _open(run: ProbeRun) -> _Data:
    """Open labelled images.

    Raises:
        ValueError: labels are missing or of one class, or the two sets are the same one.
    """
    leave_one_out = isinstance(run.method, KnnConfig) and run.method.leave_one_out
    path, val_path = run.data.path, run.data.val_path
    if leave_one_out:
        if val_path is not None:
            raise ValueError(
                "leave_one_out classifies the training images by each other, without validation "
                f"images; leave out one of it and val_data ({val_path})"
            )
        train = val = open_images(path, max_images=run.max_images, max_pixels=run.data.max_pixels)
    else:
        if val_path is not None and Path(val_path).resolve() == Path(path).resolve():
            raise ValueError(
                f"val_data ({val_path}) must be other images than data; without it a share of "
                "data is held out"
            )
        train, val = open_train_val(run.data)
        if run.max_images is not None:
            train, val = train.spread(run.max_images), val.spread(run.max_images)
    labels = [_labels(part) for part in (train, val)]
    require_labels(labels[0], f"data ({path})")
    require_labels(labels[1], f"val_data ({val_path or f'held out of {path}'})")
    num_unseen_class = int((~torch.isin(labels[1], labels[0])).sum())
    if num_unseen_class:
        logger.warning(
            "%d validation images are of classes that no training image has", num_unseen_class
        )
    share = float((labels[1] == labels[0].mode().values).double().mean())
    return _Data(train, val, leave_one_out, num_unseen_class, share)


def _labels(images: ImageDataset) -> Int64[Tensor, "n"]:
    """Class of each image, -1 for none."""
    return torch.tensor([images.label(index) for index in range(len(images))])


class _Known(NamedTuple):
    """Features of both sets by name, and their classes."""

    train: Extracted
    val: Extracted
    banks: dict[str, Float[Tensor, "n _c"]]
    queries: dict[str, Float[Tensor, "m _c"]]
    crops: list[dict[str, Float[Tensor, "n _c"]]]
    """Features of random crops of the training images, each in their order."""


def _extract(run: ProbeRun, features: FeatureConfig, tokenizer: Tokenizer, data: _Data) -> _Known:
    """Take the features of all images."""
    kinds = feature_kinds(tokenizer, features)
    parts = [data.train] if data.leave_one_out else [data.train, data.val]
    with contextlib.closing(Progress(sum(map(len, parts)), unit="image")) as progress:
        extracted = [
            extract(
                tokenizer,
                eval_batches(
                    part,
                    image_size=tokenizer.config.image_size,
                    batch_size=features.batch_size,
                    num_workers=run.data.num_workers,
                ),
                kinds,
                pixel_side=features.pixel_side,
                progress=progress,
            )
            for part in parts
        ]
    train, val = extracted[0], extracted[-1]
    dim = features.pca_dim or tokenizer.config.dim
    crops = _crops(run, features, kinds, tokenizer, data.train, train.index)
    banks, queries, *others = with_pca(train, [val, *crops], dim, seed=run.seed)
    return _Known(train, val, banks, queries, others)


def _crops(
    run: ProbeRun,
    features: FeatureConfig,
    kinds: Sequence[FeatureKind],
    tokenizer: Tokenizer,
    images: ImageDataset,
    index: Int64[Tensor, "n"],
) -> list[Extracted]:
    """Features of the random crops that a linear probe learns from, in the order of `index`."""
    method = run.method.linear if isinstance(run.method, FinetuneConfig) else run.method
    num_crops = method.num_crops if isinstance(method, LinearConfig) else 0
    count, size = len(images), tokenizer.config.image_size
    num_seen = num_crops * count
    if num_crops == 0:
        return []
    batches = train_batches(
        images,
        DataConfig(reduced_jpeg=False),
        image_size=size,
        batch_size=features.batch_size,
        num_steps=math.ceil(num_seen / features.batch_size),
        seed=run.seed,
        student_size=size,
        teacher_size=None,
        num_workers=run.data.num_workers,
    )
    with contextlib.closing(Progress(num_seen, unit="crop")) as progress:
        seen = extract(
            tokenizer,
            (batch._replace(image=_present(batch.student_view)) for batch in batches),
            kinds,
            pixel_side=features.pixel_side,
            progress=progress,
        )
    parts: list[Extracted] = []
    for first in range(0, num_seen, count):
        # Each image is once in an epoch, in another order.
        place = {each: first + row for row, each in enumerate(seen.index[first:][:count].tolist())}
        rows = torch.tensor([place[each] for each in index.tolist()])
        parts.append(
            Extracted(
                features={name: values[rows] for name, values in seen.features.items()},
                label=seen.label[rows],
                index=index,
                digests=tuple(seen.digests[row] for row in rows.tolist()),
            )
        )
    return parts


def _present(view: Float[Tensor, "b 3 h w"] | None) -> Float[Tensor, "b 3 h w"]:
    """The view that was asked for."""
    if view is None:
        raise RuntimeError("a batch has no view of its images")
    return view


def _describe(data: _Data, known: _Known) -> ProbedData:
    """Describe the images for `probe.json`; warns of those in both sets."""
    num_in_both = None
    if not data.leave_one_out:
        digests = set(known.train.digests)
        num_in_both = sum(digest in digests for digest in known.val.digests)
        if num_in_both:
            logger.warning(
                "%d of %d validation images are also training images, pixel by pixel: the "
                "accuracies are too high",
                num_in_both,
                len(known.val.digests),
            )
    train, val = (
        ProbedImages(
            num_images=len(part.label),
            num_broken=len(images) - len(part.label),
            sha256=part.sha256,
        )
        for part, images in ((known.train, data.train), (known.val, data.val))
    )
    return {
        "class_names": list(data.train.class_names),
        "num_unseen_class": data.num_unseen_class,
        "most_frequent_class_accuracy": data.most_frequent_class_accuracy,
        "train": train,
        "val": val,
        "num_in_both": num_in_both,
    }


# --------------------------------------------------------------------------------------- probes


def _linear(run: ProbeRun, config: LinearConfig, known: _Known, data: _Data) -> list[LinearRow]:
    """A linear probe of every feature, with its picture."""
    device = resolve_device(run.device)
    steps = linear_steps(known.train.label, config, seed=run.seed)
    rows: list[LinearRow] = []
    with contextlib.closing(Progress(steps * len(known.banks))) as progress:
        for name, bank in known.banks.items():
            probed = linear_probe(
                Labelled(bank.to(device), known.train.label.to(device)),
                Labelled(known.queries[name], known.val.label),
                data.train.num_classes,
                config,
                crops=[crop[name].to(device) for crop in known.crops],
                seed=run.seed,
                progress=progress,
            )
            scored = _scored(run, name, probed.scores, known.val.label, data, bank.shape[1])
            rows.append(
                {
                    **scored,
                    "rate": probed.rate,
                    "rate_at_edge": probed.at_edge,
                    "sweep": [
                        {
                            "rate": result.rate,
                            "held_out_accuracy": result.held_out_accuracy,
                            "accuracy": result.accuracy,
                        }
                        for result in probed.sweep
                    ],
                }
            )
    return rows


def _scored(
    run: ProbeRun,
    name: str,
    scores: Float[Tensor, "m y"],
    label: Int64[Tensor, "m"],
    data: _Data,
    dim: int,
) -> ScoredRow:
    """Accuracies and confusions of some scores of a feature of `dim` channels; with a picture."""
    share = accuracy(scores, label)
    matrix = confusion_matrix(label, scores.argmax(1), data.train.num_classes)
    title = f"{name}: {share:.1%} of {len(label)} images"
    picture = f"confusion-{_slug(name)}.png"
    confusion_picture(matrix, data.train.class_names, title).save(Path(run.out) / picture)
    return {
        "name": name,
        "accuracy": share,
        "standard_error": standard_error(share, len(label)),
        "top5_accuracy": accuracy(scores, label, top=5) if data.train.num_classes > 5 else None,
        "confusion": [" ".join(map(str, row)) for row in matrix.tolist()],
        "pictures": [picture],
        "dim": dim,
    }


def _slug(name: str) -> str:
    """A name that a file can have."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def _knn(
    run: ProbeRun, config: KnnConfig, tokenizer: Tokenizer, known: _Known, data: _Data
) -> list[KnnRow]:
    """A vote of neighbours in every feature, with a picture of some of them."""
    device = resolve_device(run.device)
    most = max(config.num_neighbours)
    shown = min(_MAX_NEIGHBOURS, len(known.train.label) - data.leave_one_out)
    own = torch.arange(len(known.train.label)) if data.leave_one_out else None
    rows: list[KnnRow] = []
    for name, bank in known.banks.items():
        found = nearest(known.queries[name], bank.to(device), max(most, shown), own=own)
        votes = {
            k: vote(found, known.train.label, data.train.num_classes, k, config.temperature)
            for k in config.num_neighbours
        }
        first = votes[config.num_neighbours[0]]
        scored = _scored(run, name, first, known.val.label, data, bank.shape[1])
        picture = f"neighbours-{_slug(name)}.png"
        _picture(tokenizer, found, known, data, shown).save(Path(run.out) / picture)
        rows.append(
            {
                **scored,
                "pictures": [*scored["pictures"], picture],
                "by_k": [
                    {"k": k, "accuracy": accuracy(scores, known.val.label)}
                    for k, scores in votes.items()
                ],
            }
        )
    return rows


def _picture(
    tokenizer: Tokenizer, found: Neighbours, known: _Known, data: _Data, shown: int
) -> Image.Image:
    """The first image of each of some classes and its neighbours."""
    size, names = tokenizer.config.image_size, shown_names(data.train.class_names)

    def example(images: ImageDataset, part: Extracted, row: int, similarity: float | None = None):  # noqa: ANN202 - an Example
        image = crop_square(images.read(int(part.index[row])), size)
        return Example(image, names[int(part.label[row])], similarity)

    rows = []
    for query in _first_of_classes(known.val.label):
        near = zip(found.position[query, :shown], found.similarity[query, :shown], strict=True)
        neighbours = [
            example(data.train, known.train, int(row), float(similarity))
            for row, similarity in near
        ]
        rows.append((example(data.val, known.val, query), neighbours))
    return neighbours_picture(rows)


def _first_of_classes(label: Int64[Tensor, "m"]) -> list[int]:
    """Where the first image of each of the classes is, evenly spaced among these."""
    classes = label.unique().tolist()
    count = min(_MAX_QUERIES, len(classes))
    chosen = [classes[place * len(classes) // count] for place in range(count)]
    return [int((label == each).nonzero()[0, 0]) for each in chosen]


def _finetune(
    run: ProbeRun,
    config: FinetuneConfig,
    kinds: Sequence[FeatureKind],
    data: _Data,
    directory: Path,
) -> list[FinetuneRow]:
    """Fine-tune at every K."""
    device = resolve_device(run.device)
    rows: list[FinetuneRow] = []
    steps = num_steps(len(data.train), config)
    with contextlib.closing(Progress(steps * len(kinds))) as progress:
        for kind in kinds:
            model = Classifier(
                Tokenizer.from_pretrained(directory, precision="float32", device=device),
                data.train.num_classes,
                num_kept=kind.num_kept,
                stage=kind.stage,
                pool=kind.pool,
                generator=step_generator(run.seed, "classifier", 0),
            )
            tuned = finetune(
                model,
                data.train,
                data.val,
                config,
                num_workers=run.data.num_workers,
                seed=run.seed,
                progress=progress,
            )
            name = f"fine-tuned: {kind.name}"
            scored = _scored(run, name, tuned.scores, tuned.label, data, model.weight.shape[1])
            rows.append(
                {
                    **scored,
                    "rate": tuned.rate,
                    "num_steps": tuned.num_steps,
                    "batch_size": tuned.batch_size,
                    "num_skipped_steps": tuned.num_skipped,
                    "losses": tuned.losses,
                }
            )
    return rows


# ------------------------------------------------------------------------------------ in words


def summary(record: ProbeRecord) -> list[str]:
    """A record as lines to read: the data, a table, and how to take it."""
    data, method = record["data"], record["method"]
    num_val = data["val"]["num_images"]
    options = record["run"]["method"]
    if method == "knn" and options["leave_one_out"]:
        tested = f"{num_val} images, each classified by the others"
    else:
        given = record["run"]["data"]["val_path"] is not None
        held = "" if given else ", held out of the data by a hash of their names"
        tested = f"{data['train']['num_images']} training images, {num_val} test images{held}"
    lines = [
        f"{tested}; {len(data['class_names'])} classes; always the most frequent class: "
        f"{data['most_frequent_class_accuracy']:.1%}",
        "",
        *_aligned(_table(record)),
    ]
    if record["model"]["teacher"] == "labels":
        lines += ["", "this tokenizer was trained with labels: its features are not unsupervised"]
    edge = [row["name"] for row in record["rows"] if row.get("rate_at_edge")]
    if any("sweep" in row for row in record["rows"]):
        lines += [
            "",
            "learning rate: chosen on held-out training images, not on the test images; "
            f"{RECORD} has the accuracies of all",
        ]
    if edge:
        lines.append(f"lower or higher rates may be better for: {'; '.join(edge)}")
    if method == "finetune":
        lines.append("fine-tuned: accuracy after the last epoch, not the best one")
    return lines


def _table(record: ProbeRecord) -> list[list[str]]:
    """Header and rows."""
    rows = record["rows"]
    by_k = [entry["k"] for entry in rows[0].get("by_k", [])]
    titles = [f"k = {k}" for k in by_k] or ["accuracy"]
    with_rate = any("rate" in row for row in rows)
    with_top5 = rows[0]["top5_accuracy"] is not None
    header = ["features", "channels", *titles, "+-"]
    table = [[*header, *["top 5"] * with_top5, *["rate"] * with_rate]]
    for row in rows:
        shares = [entry["accuracy"] for entry in row.get("by_k", [])] or [row["accuracy"]]
        cells = [row["name"], str(row["dim"]), *(f"{share:.1%}" for share in shares)]
        cells.append(f"{row['standard_error']:.1%}")
        cells += [f"{row['top5_accuracy']:.1%}"] if with_top5 else []
        table.append(cells + ([f"{row['rate']:.2g}"] if "rate" in row else []))
    return table


def _aligned(table: Sequence[Sequence[str]]) -> list[str]:
    """Columns as wide as their longest text, numbers to the right."""
    widths = [max(len(row[column]) for row in table) for column in range(len(table[0]))]
    return [
        "  ".join(
            [row[0].ljust(widths[0])]
            + [text.rjust(width) for text, width in zip(row[1:], widths[1:], strict=True)]
        )
        for row in table
    ]
