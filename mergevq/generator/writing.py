"""Folders of samples: written, gone on with, and made again.

A run of samples is a folder: an image for each number, a grid of the first, and `samples.json`,
which says what makes them; an interrupted run goes on where it was. The last bits of a product may
depend on how many images are computed at once, so an image is made again with the batch it was in.
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image

from mergevq.config.base import FORMAT_VERSION
from mergevq.config.generator import SampleRun
from mergevq.data.prepare import load_picture
from mergevq.data.sample_files import SampleFiles
from mergevq.generator.generation import (
    Origin,
    Pair,
    class_labels,
    generate,
    load_run,
    masked_origin,
)
from mergevq.generator.sampling import image_seed
from mergevq.report.pictures import contact_sheet, to_pil
from mergevq.runtime.device import resolve_device
from mergevq.runtime.files import read_json, require_entries, sha256_of, write_json
from mergevq.runtime.logs import Progress
from mergevq.runtime.migrate import migrate_samples
from mergevq.runtime.run import environment
from mergevq.runtime.settings import from_json, to_json

RECORD = "samples.json"
GRID = "grid.png"

_GRID_COLUMNS = 8
_GRID_IMAGES = 64
"""The first so many images are in the grid."""


class Written(NamedTuple):
    """A folder of samples."""

    images: list[Path]
    """In the order of their numbers."""
    grid: Path
    """The first of them in one picture."""
    logit_error: float | None
    """Logit error of the weights that sampled (`generator.weights.logit_error`); None for those of
    the file."""
    num_made: int
    """Images that were not there before."""
    tokens_per_pass: float | None
    """Tokens of an image in each pass of the transformer; None if none was made."""
    num_passes: float | None
    """Passes of the transformer for a batch of images; None likewise."""


def write_samples(run: SampleRun, out: Path) -> Written:
    """Sample all images of a run into a folder, or those that an interrupted run left out.

    Raises:
        ValueError: the run does not fit, the folder holds something else, or an image there is not
            the one that was made.
        RuntimeError: weights are broken.
    """
    device = resolve_device(run.device)
    is_begun = _require_empty_or_begun(out)
    pair, error = load_run(run, device)
    origin = _origin(pair, run)
    record = _record(pair, run, device, error)
    if is_begun:
        _require_same_run(out, record)
    files = SampleFiles(out, [_file_name(image_id) for image_id in range(run.num_images)])
    there = [image_id for image_id in range(run.num_images) if files.has(image_id)]
    for image_id in there:
        files.read(image_id)  # which checks that it is the one that was made
    progress = Progress(run.num_images, done=len(there), unit="image")
    tokens, passes, batches = 0, 0, 0
    for number in range(-(-run.num_images // run.batch_size)):
        image_ids = _batch(run, number)
        missing = [image_id for image_id in image_ids if not files.has(image_id)]
        if not missing:
            continue
        # The whole batch, whatever is missing of it: its size may decide last bits.
        sampled, images = generate(pair, run, image_ids, origin)
        tokens, passes = tokens + sampled.indices.shape[1], passes + sampled.num_forward
        batches += 1
        if not is_begun:
            # Only now, so that what does not fit leaves nothing behind.
            out.mkdir(parents=True, exist_ok=True)
            write_json(out / RECORD, record)
            is_begun = True
        for image_id in missing:
            files.save(image_id, to_pil(images[image_id - image_ids[0]]))
        progress.update(len(missing))
    progress.close()
    shown = [files.read(image_id) for image_id in range(min(_GRID_IMAGES, run.num_images))]
    rows = [shown[i : i + _GRID_COLUMNS] for i in range(0, len(shown), _GRID_COLUMNS)]
    contact_sheet(rows).save(out / GRID)
    paths = [files.path(image_id) for image_id in range(run.num_images)]
    per_pass, per_batch = (tokens / passes, passes / batches) if passes else (None, None)
    return Written(paths, out / GRID, error, run.num_images - len(there), per_pass, per_batch)


def _require_empty_or_begun(out: Path) -> bool:
    """Whether a folder holds samples, which may be those of an interrupted run.

    Raises:
        ValueError: it holds something else.
    """
    if (out / RECORD).is_file():
        return True
    if out.exists() and any(out.iterdir()):
        raise ValueError(
            f"{out} is not empty and holds no {RECORD}; choose another folder with --out, or "
            "delete it"
        )
    return False


def _require_same_run(out: Path, record: dict[str, Any]) -> None:
    """Check that the samples in a folder are of the run that is to go on.

    Raises:
        ValueError: they are of another.
    """
    there = read_json(out / RECORD)
    known = to_json(read_sample_run(there, where=str(out / RECORD)))
    changed = [
        f"{name} ({known[name]}, now {value})"
        for name, value in record["run"].items()
        if known[name] != value
    ]
    compared = ["generator", "tokenizer", "decoder", "draft_generator"]
    compared += ["keep_from_sha256", "mask_sha256", "images"]
    changed += [name for name in compared if there.get(name) != record.get(name)]
    # Another device computes other last bits.
    environment = there.get("environment")
    device = environment.get("device") if isinstance(environment, dict) else None
    if device != record["environment"]["device"]:
        changed.append(f"device ({device}, now {record['environment']['device']})")
    if changed:
        raise ValueError(
            f"{out} holds samples of another run, which differs in {', '.join(changed)}; choose "
            "another folder with --out, or delete it"
        )


def make_again(
    record: Path, image_ids: Sequence[int], device: str | None = None
) -> list[Image.Image]:
    """Make images of an earlier run again, from its `samples.json`.

    Args:
        record: path of that file.
        image_ids: numbers of the images.
        device: where to compute; None is where they were made, which gives the same bits.

    Raises:
        ValueError: there is no such image, or generator, tokenizer, image or mask are others now.
        RuntimeError: weights are broken.
    """
    written = read_json(record)
    run = read_sample_run(written, where=str(record))
    run = run if device is None else replace(run, device=device)
    for image_id in image_ids:
        if not 0 <= image_id < run.num_images:
            raise ValueError(f"image ({image_id}) must be between 0 and {run.num_images - 1}")
    pair, _ = load_run(run, resolve_device(run.device))
    for name, now in _hashes(pair, run).items():
        if now != written.get(name):
            raise ValueError(
                f"{name} is {now} and was {written.get(name)} when the samples in {record} were "
                "made: the same files are needed to make them again"
            )
    origin = _origin(pair, run)
    made: dict[int, Image.Image] = {}
    for number in sorted({image_id // run.batch_size for image_id in image_ids}):
        batch = _batch(run, number)
        images = generate(pair, run, batch, origin)[1]
        made |= dict(zip(batch, map(to_pil, images), strict=True))
    return [made[image_id] for image_id in image_ids]


def read_sample_run(written: dict[str, Any], *, where: str) -> SampleRun:
    """The run that a `samples.json` records.

    Raises:
        ValueError: it is not of samples, or has a setting that does not exist.
    """
    if written.get("kind") != "samples":
        raise ValueError(f"{where} holds no samples but {written.get('kind')}")
    require_entries(
        written, {"run": dict, "generator": str, "tokenizer": str, "images": list}, Path(where)
    )
    try:
        run = migrate_samples(written)["run"]
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error
    return from_json(SampleRun, run, where=f"{where}: run")


def _batch(run: SampleRun, number: int) -> list[int]:
    """Numbers of the images that are sampled together."""
    first = number * run.batch_size
    return list(range(first, min(first + run.batch_size, run.num_images)))


def _origin(pair: Pair, run: SampleRun) -> Origin | None:
    """Record of the image that is kept, if there is one."""
    if run.keep_from is None or run.mask is None:
        return None
    num_kept = run.num_kept or pair.generator.config.num_kept
    picture, mask = load_picture(run.keep_from), load_picture(run.mask)
    with torch.no_grad():
        return masked_origin(pair.tokenizer, picture, mask, num_kept)


def _record(
    pair: Pair, run: SampleRun, device: torch.device, error: float | None
) -> dict[str, Any]:
    """Content of `samples.json`."""
    labels = class_labels(run, pair.generator.config.num_classes, range(run.num_images)).tolist()
    return {
        "format_version": FORMAT_VERSION,
        "kind": "samples",
        "run": to_json(run),
        **_hashes(pair, run),
        "logit_error": error,
        "environment": environment(device),
        "images": [
            {
                "file": _file_name(image_id),
                "id": image_id,
                "seed": image_seed(run.seed, image_id),
                "class": label if pair.generator.config.num_classes else None,
                "class_name": pair.class_names[label] if pair.class_names else None,
            }
            for image_id, label in enumerate(labels)
        ],
    }


def _hashes(pair: Pair, run: SampleRun) -> dict[str, str | None]:
    """Hashes of the models, which the images depend on besides the settings."""
    files = {"keep_from": run.keep_from, "mask": run.mask}
    hashes = {"generator": pair.generator_hash, "tokenizer": pair.tokenizer_hash}
    if pair.tokenizer.flow is not None:
        hashes["decoder"] = pair.tokenizer.flow.digest
    if pair.draft_hash is not None:
        hashes["draft_generator"] = pair.draft_hash
    return hashes | {
        f"{name}_sha256": None if path is None else sha256_of(Path(path))
        for name, path in files.items()
    }


def _file_name(image_id: int) -> str:
    """File of an image."""
    return f"{image_id:06d}.png"
