"""What a generator's images are worth: `mergevq evaluate generation`.

Images are sampled into a folder, image k of class k mod C, and compared with a training set. An
interrupted run goes on where it was: images are made in batches of fixed numbers, each by one rank,
so they are the same however many ranks there were and wherever it stopped.

Source: Brock et al. 2019, "Large Scale GAN Training for High Fidelity Natural Image Synthesis",
appendix (arXiv:1809.11096), for nearest neighbours in features as a check for memorised images.

Shape letters: B batch, N images, H and W pixels, F feature channels, M samples to look up.
"""

import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int64, UInt8
from PIL import Image
from torch import Tensor

from mergevq import distributed
from mergevq.checkpoint import read_json, to_json, write_json
from mergevq.config import FORMAT_VERSION
from mergevq.config_evaluate import GenerationRecord, GenerationSettings
from mergevq.config_generator import SampleRun
from mergevq.data import eval_batches
from mergevq.evaluate import (
    RECORD,
    evaluation_record,
    extractor_record,
    json_numbers,
    reference_record,
    require_fresh,
)
from mergevq.extractor import FeatureExtractor
from mergevq.frechet import (
    FrechetStatistics,
    Gaussian,
    Rows,
    frechet_distance,
    inception_score,
    kernel_distance,
    precision_recall,
)
from mergevq.generation import Pair, class_labels, generate, load_run
from mergevq.image_arrays import ImageArray, ImageArrayWriter
from mergevq.images import ImageDataset, open_images
from mergevq.metrics import to_uint8
from mergevq.pictures import contact_sheet, to_pil
from mergevq.references import ImageHashes, open_reference, reference_features
from mergevq.run import Progress, deterministic, resolve_device, step_generator
from mergevq.sample_files import SUMS, SampleFiles, is_sample_folder

SAMPLES = "samples"
SAMPLING = "sampling.json"
ARRAY = "samples.npz"

_SUBSET_SIZE = 1000
"""Images of each kind in a subset of the kernel distance, as in published numbers."""
_NUM_NEIGHBOURS = 3
"""Of each sample, in the picture."""
_PRECISION_NEIGHBOURS = 3
"""That reach to the edge of a ball, as in published numbers."""


class Samples(NamedTuple):
    """Images to evaluate, in order."""

    source: ImageDataset | ImageArray | SampleFiles
    num_images: int
    size: tuple[int, int]
    """Height and width in pixels."""

    def batches(
        self, batch_size: int, world: distributed.World
    ) -> Iterator[tuple[UInt8[Tensor, "b 3 h w"], Int64[Tensor, "b"]]]:
        """This rank's images and their numbers; whole batches go to the ranks in turn.

        Raises:
            ValueError: an image has another size.
        """
        numbers = range(0, self.num_images, batch_size)
        if isinstance(self.source, ImageArray):
            # A file is read through from its start: other ranks' images are skipped, not seen.
            for turn, pixels in enumerate(self.source.batches(batch_size)):
                if turn % world.world_size == world.rank:
                    yield pixels, torch.arange(numbers[turn], numbers[turn] + len(pixels))
            return
        for first in numbers[world.rank :: world.world_size]:
            chosen = range(first, min(first + batch_size, self.num_images))
            yield torch.stack([self._read(self.source, i) for i in chosen]), torch.tensor(chosen)

    def _read(self, images: ImageDataset | SampleFiles, number: int) -> UInt8[Tensor, "3 h w"]:
        """One image of the folder, as it is."""
        image = images.read(number)
        if (image.height, image.width) != self.size:
            raise ValueError(
                f"sample {images.name(number)} has {image.width} x {image.height} pixels and the "
                f"first has {self.size[1]} x {self.size[0]}; all must have one size"
            )
        return torch.from_numpy(np.array(image)).permute(2, 0, 1)


class Neighbours(NamedTuple):
    """Nearest training images of some samples."""

    distance: Float[Tensor, "m n"]
    """Euclidean, of features, ascending."""
    position: Int64[Tensor, "m n"]
    """In the training data."""


class GenerationScores(NamedTuple):
    """What was found about a set of samples."""

    numbers: dict[str, float]
    left_out: list[str]
    """What could not be measured, and why."""
    pixels_sha256: str
    """Over all samples."""
    features: Float[Tensor, "n f"]
    """Of all samples."""


# ----------------------------------------------------------------------------- the evaluation


def evaluate_generation(settings: GenerationSettings) -> GenerationRecord | None:
    """Sample what is missing, measure, and write the results; on every rank, under `torchrun`.

    Returns:
        What was written to `evaluation.json`; None on ranks other than the main one.

    Raises:
        ValueError: generator, reference or settings do not fit, or a number is not finite.
        RuntimeError: a file is damaged.
    """
    out = Path(settings.out)
    require_fresh(out)
    world = distributed.init(resolve_device(settings.device))
    try:
        extractor = FeatureExtractor(settings.extractor, world.device)
        pair, logit_error = None, None
        if settings.run is not None:
            pair, logit_error = load_run(settings.run, world.device)
        size = _sample_size(settings, pair)
        # Before any sampling, which may take days: an unfit reference is not worth them.
        reference = open_reference(
            Path(settings.reference), "generation", extractor=extractor, image_size=size
        )
        classifier = _classifier(settings, pair, world.device)
        unscored = _without_probabilities(extractor)
        if distributed.is_main():
            _warn(settings, pair, unscored)
        if settings.run is not None and pair is not None:
            sample_missing(pair, settings.run, out, world)
        distributed.barrier()
        samples = _open_samples(settings, out)
        if settings.write_array and distributed.is_main():
            out.mkdir(parents=True, exist_ok=True)
            write_array(samples, out / ARRAY, settings.batch_size)
        labels = None
        if settings.run is not None and pair is not None and classifier is not None:
            numbers = range(samples.num_images)
            labels = class_labels(settings.run, pair.generator.config.num_classes, numbers)
        scores = measure_generation(
            samples,
            world,
            extractor=extractor,
            reference=reference.statistics,
            reference_features=_reference_features(settings, extractor),
            unscored=unscored,
            classifier=classifier,
            labels=labels,
            batch_size=settings.batch_size,
        )
        neighbours = _look_up(settings, scores, extractor, size, world)
        if not distributed.is_main():
            return None
        out.mkdir(parents=True, exist_ok=True)
        if neighbours is not None and settings.data is not None:
            images = open_images(settings.data, max_pixels=settings.max_pixels)
            picture = neighbour_picture(samples, images, neighbours, size)
            picture.save(out / "nearest_neighbours.png")
        record: GenerationRecord = {
            "kind": "generation evaluation",
            "settings": to_json(settings),
            **evaluation_record(world),
            "generator": None if pair is None else pair.generator_hash,
            "tokenizer": None if pair is None else pair.tokenizer_hash,
            "logit_error": logit_error,
            "samples": {
                "num_images": samples.num_images,
                "size": list(samples.size),
                "pixels_sha256": scores.pixels_sha256,
                "array": str(out / ARRAY) if settings.write_array else None,
            },
            "extractor": extractor_record(extractor),
            "classifier": None if classifier is None else extractor_record(classifier),
            "reference": reference_record(settings.reference, reference),
            **json_numbers(scores.numbers),
            "left_out": scores.left_out,
            "nearest_distances": None if neighbours is None else neighbours.distance.tolist(),
        }
        write_json(out / RECORD, record)
        return record
    finally:
        distributed.shutdown()


def _without_probabilities(extractor: FeatureExtractor) -> str | None:
    """Why an extractor has no class score, which is of probabilities; None if it has one."""
    # Not of one colour, whose features may by chance be a distribution.
    pixels = (torch.arange(2 * 3 * 32 * 32) % 251).to(torch.uint8).view(2, 3, 32, 32)
    try:
        inception_score(extractor.probabilities(pixels), num_splits=1)
    except (ValueError, RuntimeError, torch.jit.Error) as error:
        # The last line of TorchScript's is the file's own message.
        return str(error).strip().splitlines()[-1]
    return None


def _warn(settings: GenerationSettings, pair: Pair | None, unscored: str | None) -> None:
    """Say before any sampling what will be missing or uneven."""
    if unscored is not None:
        warnings.warn(
            f"extractor {settings.extractor} gives no class probabilities, so the class score is "
            f"left out: {unscored}",
            stacklevel=3,
        )
    if settings.run is None or pair is None:
        return
    count = len(settings.run.classes) or max(1, pair.generator.config.num_classes)
    rest = settings.run.num_images % count
    if rest:
        above = settings.run.num_images - rest + count
        warnings.warn(
            f"{settings.run.num_images} images are not as many of each of {count} classes: {rest} "
            f"of these have one more. Published numbers have as many of each: --num {above}",
            stacklevel=3,
        )


def measure_generation(  # noqa: PLR0913 - what is compared, by what
    samples: Samples,
    world: distributed.World,
    *,
    extractor: FeatureExtractor,
    reference: Gaussian,
    reference_features: Float[Tensor, "r f"] | None,
    unscored: str | None = None,
    classifier: FeatureExtractor | None = None,
    labels: Int64[Tensor, "n"] | None = None,
    batch_size: int,
    seed: int = 0,
) -> GenerationScores:
    """Compare samples with a training set; on every rank.

    Args:
        samples: what is evaluated.
        world: this process.
        extractor: what sees the images.
        reference: statistics of the training set.
        reference_features: of some training images, on the main rank; None leaves out what needs
            needs them.
        unscored: why the extractor has no class score; None measures it.
        classifier: gives class probabilities; None leaves class accuracy out.
        labels: classes of the samples, where there is a classifier.
        batch_size: images at once.
        seed: of the subsets of the kernel distance.
    """
    statistics, hashes = FrechetStatistics(extractor.dim), ImageHashes()
    features, probabilities = Rows("features"), Rows("class probabilities")
    correct = Rows("class accuracy")
    progress = Progress(-(-samples.num_images // world.world_size), unit="image")
    with deterministic(world.device):
        for pixels, positions in samples.batches(batch_size, world):
            found = extractor.features(pixels)
            statistics.update(found)
            features.update(found, positions)
            if unscored is None:
                probabilities.update(extractor.probabilities(pixels), positions)
            hashes.update(pixels, positions)
            if classifier is not None and labels is not None:
                chosen = classifier.probabilities(pixels).argmax(1).cpu()
                correct.update((chosen == labels[positions]).float()[:, None], positions)
            progress.update(len(positions))
    progress.close()
    everything = features.compute()
    numbers = {
        extractor.metric_name("frechet"): frechet_distance(reference, statistics.compute()),
        "num_images": float(len(everything)),
    }
    left_out = []
    name = extractor.metric_name("class_score")
    if unscored is None:
        score = inception_score(probabilities.compute(), min(10, len(everything)))
        numbers |= {name: score.mean, f"{name}_std": score.std}
    else:
        left_out.append(f"{name}: the extractor gives no class probabilities ({unscored})")
    if reference_features is None:
        left_out.append(
            "kernel distance, precision and recall: the reference holds no features or images"
        )
    else:
        numbers |= _feature_scores(everything, reference_features, extractor, seed)
    if classifier is None:
        left_out.append("class accuracy: no classifier was given")
    else:
        numbers["class_accuracy"] = float(correct.compute().double().mean())
    return GenerationScores(numbers, left_out, hashes.compute(), everything)


def _reference_features(
    settings: GenerationSettings, extractor: FeatureExtractor
) -> Float[Tensor, "r f"] | None:
    """Those of the reference, on the main rank."""
    if not distributed.is_main():
        return None
    return reference_features(Path(settings.reference), extractor, settings.batch_size)


def _feature_scores(
    fake: Float[Tensor, "n f"],
    real: Float[Tensor, "r f"],
    extractor: FeatureExtractor,
    seed: int,
) -> dict[str, float]:
    """Kernel distance, precision and recall."""
    smaller = min(len(fake), len(real))
    kernel = kernel_distance(
        real,
        fake,
        subset_size=min(_SUBSET_SIZE, smaller),
        generator=step_generator(seed, "kernel distance", 0),
    )
    covered = precision_recall(real, fake, k=_PRECISION_NEIGHBOURS)
    name = extractor.metric_name("kernel")
    return {
        name: kernel.mean,
        f"{name}_std": kernel.std,
        extractor.metric_name("precision"): covered.precision,
        extractor.metric_name("recall"): covered.recall,
        "num_reference_features": float(len(real)),
    }


# ---------------------------------------------------------------------------------- sampling


def sample_missing(pair: Pair, run: SampleRun, out: Path, world: distributed.World) -> None:
    """Sample the images of a run that are not there yet; on every rank.

    Args:
        pair: what samples and what decodes.
        run: how. More images than before may be asked for.
        out: directory of `samples/` and of `sampling.json`, which says what made them.
        world: this process.

    Raises:
        ValueError: the samples there are of another run, or the run does not fit the generator.
    """
    if distributed.is_main():
        _claim(pair, run, out)
        (out / SAMPLES).mkdir(parents=True, exist_ok=True)
    distributed.barrier()
    files = SampleFiles(out / SAMPLES, _names(run), rank=world.rank)
    firsts = range(0, run.num_images, run.batch_size)[world.rank :: world.world_size]
    batches = [list(range(first, first + run.batch_size)) for first in firsts]
    missing = [
        [number for number in batch if number < run.num_images and not files.has(number)]
        for batch in batches
    ]
    num_missing = sum(map(len, missing))
    total = sum(len(range(first, min(first + run.batch_size, run.num_images))) for first in firsts)
    progress = Progress(total, done=total - num_missing, unit="sample")
    with deterministic(world.device):
        for batch, wanted in zip(batches, missing, strict=True):
            if not wanted:
                continue
            # A batch is made in full whatever is missing of it: its size may decide last bits.
            _, images = generate(pair, run, batch)
            for number in wanted:
                files.save(number, to_pil(images[number - batch[0]]))
            progress.update(len(wanted))
    progress.close()


def _claim(pair: Pair, run: SampleRun, out: Path) -> None:
    """Write what makes the samples, or check that it is what made those that are there.

    Raises:
        ValueError: it is not.
    """
    record = {
        "format_version": FORMAT_VERSION,
        "kind": "sampling",
        "generator": pair.generator_hash,
        "tokenizer": pair.tokenizer_hash,
        # Where models lie decides no pixel, nor how many images there are or are made at once.
        "run": {
            name: value
            for name, value in to_json(run).items()
            if name not in {"model", "tokenizer", "num_images", "batch_size"}
        },
    }
    path = out / SAMPLING
    if path.is_file():
        there = read_json(path)
        changed = [name for name in record if there.get(name) != record[name]]
        changed += [
            f"{name} ({there['run'].get(name)}, now {value})"
            for name, value in record["run"].items()
            if "run" in changed and there["run"].get(name) != value
        ]
        if changed:
            raise ValueError(
                f"{out} holds samples of another run, which differs in "
                f"{', '.join(name for name in changed if name != 'run')}; choose another directory "
                "with --out, or delete it"
            )
        return
    if (out / SAMPLES).exists():
        raise ValueError(f"{out / SAMPLES} holds images of unknown origin; choose another --out")
    out.mkdir(parents=True, exist_ok=True)
    write_json(path, record)


def _names(run: SampleRun) -> list[str]:
    """Files of a run's samples."""
    return [f"{number:08d}.png" for number in range(run.num_images)]


def _open_samples(settings: GenerationSettings, out: Path) -> Samples:
    """The images that were made, or that were there.

    Raises:
        ValueError: there are none.
    """
    if settings.samples is not None and settings.samples.endswith(".npz"):
        array = ImageArray(Path(settings.samples))
        return Samples(array, len(array), array.size)
    images = _sample_images(settings, out)
    first = images.read(0)
    return Samples(images, len(images), (first.height, first.width))


def _sample_images(settings: GenerationSettings, out: Path) -> ImageDataset | SampleFiles:
    """The files of the run and no others, or all images of a folder that is of no run.

    Raises:
        ValueError: there are none.
    """
    if settings.run is not None:
        files = SampleFiles(out / SAMPLES, _names(settings.run))
    elif settings.samples is not None and is_sample_folder(Path(settings.samples)):
        files = SampleFiles(Path(settings.samples))
    else:
        return open_images(str(settings.samples), max_pixels=settings.max_pixels)
    strangers = files.strangers()
    if strangers and distributed.is_main():
        warnings.warn(
            f"{len(strangers)} pictures in {files.folder} were not made by the run and are not "
            f"evaluated: {strangers[0]} is the first",
            stacklevel=2,
        )
    if not len(files):
        raise ValueError(f"{files.folder / SUMS} names no samples; choose another folder")
    return files


def _sample_size(settings: GenerationSettings, pair: Pair | None) -> int:
    """Side of the samples in pixels.

    Raises:
        ValueError: they are not square.
    """
    if pair is not None:
        return pair.tokenizer.config.image_size
    height, width = _open_samples(settings, Path(settings.out)).size
    if height != width:
        raise ValueError(f"samples of {width} x {height} pixels must be square")
    return height


def write_array(samples: Samples, path: Path, batch_size: int) -> None:
    """Write samples as the ADM evaluator reads them."""
    alone = distributed.World(rank=0, world_size=1, local_rank=0, device=torch.device("cpu"))
    with ImageArrayWriter(path, samples.num_images, samples.size) as array:
        for pixels, _ in samples.batches(batch_size, alone):
            array.write(pixels)


def _classifier(
    settings: GenerationSettings, pair: Pair | None, device: torch.device
) -> FeatureExtractor | None:
    """The classifier that was asked for.

    Raises:
        ValueError: its classes are not the generator's.
    """
    if settings.classifier is None or pair is None:
        return None
    classifier = FeatureExtractor(settings.classifier, device)
    num_classes = pair.generator.config.num_classes
    found = classifier.probabilities(torch.zeros(1, 3, 32, 32, dtype=torch.uint8)).shape[1]
    if found != num_classes:
        raise ValueError(
            f"classifier {settings.classifier} tells {found} classes and the generator has "
            f"{num_classes}; give one of the same classes in the same order"
        )
    return classifier


# --------------------------------------------------------------------------------- memorisation


def nearest_neighbours(
    features: Float[Tensor, "m f"],
    images: ImageDataset,
    extractor: FeatureExtractor,
    world: distributed.World,
    *,
    image_size: int,
    batch_size: int,
) -> Neighbours:
    """Find the training images nearest to some samples; on every rank.

    Args:
        features: of the samples.
        images: training images.
        extractor: what gave the features.
        world: this process.
        image_size: side the training images are cropped to, in pixels.
        batch_size: images at once, over all ranks.
    """
    samples = features.double()
    num_wanted = min(_NUM_NEIGHBOURS, len(images))
    distance = torch.full((len(samples), 0), torch.inf, dtype=torch.float64)
    position = torch.zeros(len(samples), 0, dtype=torch.int64)
    progress = Progress(-(-len(images) // world.world_size), unit="training image")
    for batch in eval_batches(
        images,
        image_size=image_size,
        batch_size=-(-batch_size // world.world_size) * world.world_size,
        rank=world.rank,
        world_size=world.world_size,
        num_workers=0,
    ):
        found = extractor.features(to_uint8(batch.image)).cpu().double()
        distance = torch.cat([distance, _distances(samples, found)], dim=1)
        position = torch.cat([position, batch.index.expand(len(samples), -1)], dim=1)
        distance, position = _closest(distance, position, num_wanted)
        progress.update(len(batch.index))
    progress.close()
    distance, position = (distributed.gather(part.T).T for part in (distance, position))
    distance, position = _closest(distance, position, num_wanted)
    return Neighbours(distance.float(), position)


def _distances(first: Float[Tensor, "m f"], second: Float[Tensor, "b f"]) -> Float[Tensor, "m b"]:
    """Euclidean, and exactly 0 between equal rows."""
    return torch.cdist(first, second, compute_mode="donot_use_mm_for_euclid_dist")


def _closest(
    distance: Float[Tensor, "m n"], position: Int64[Tensor, "m n"], count: int
) -> tuple[Float[Tensor, "m k"], Int64[Tensor, "m k"]]:
    """The nearest few of each row; equal ones in the order of the data."""
    by_position = position.argsort(1)
    distance, position = distance.gather(1, by_position), position.gather(1, by_position)
    order = distance.sort(dim=1, stable=True).indices[:, :count]
    return distance.gather(1, order), position.gather(1, order)


def _look_up(
    settings: GenerationSettings,
    scores: GenerationScores,
    extractor: FeatureExtractor,
    image_size: int,
    world: distributed.World,
) -> Neighbours | None:
    """Neighbours of the first samples, where there are training images."""
    if settings.data is None:
        return None
    return nearest_neighbours(
        scores.features[: settings.num_looked_up],
        open_images(settings.data, max_pixels=settings.max_pixels),
        extractor,
        world,
        image_size=image_size,
        batch_size=settings.batch_size,
    )


def neighbour_picture(
    samples: Samples, images: ImageDataset, neighbours: Neighbours, image_size: int
) -> Image.Image:
    """Each sample beside the training images that are nearest to it."""
    alone = distributed.World(rank=0, world_size=1, local_rank=0, device=torch.device("cpu"))
    shown, _ = next(iter(samples.batches(len(neighbours.position), alone)))
    rows, captions = [], []
    for number, pixels in enumerate(shown):
        places = neighbours.position[number].tolist()
        rows.append([_picture(pixels), *_training_pictures(images, places, image_size)])
        distances = neighbours.distance[number].tolist()
        captions.append([f"sample {number}", *(f"distance {value:.3g}" for value in distances)])
    nearest = [f"nearest {place}" for place in range(1, neighbours.position.shape[1] + 1)]
    return contact_sheet(rows, ["sample", *nearest], captions=captions)


def _training_pictures(
    images: ImageDataset, positions: Sequence[int], image_size: int
) -> list[Image.Image]:
    """Training images as they were compared."""
    batch = next(
        eval_batches(
            images.subset(positions),
            image_size=image_size,
            batch_size=len(positions),
            num_workers=0,
        )
    )
    return [to_pil(image) for image in batch.image]


def _picture(pixels: UInt8[Tensor, "3 h w"]) -> Image.Image:
    """Bytes as a picture."""
    return Image.fromarray(pixels.permute(1, 2, 0).contiguous().numpy())
