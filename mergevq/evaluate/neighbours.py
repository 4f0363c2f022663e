"""Training images nearest to samples, as a check for memorised images.

Source: Brock et al. 2019, "Large Scale GAN Training for High Fidelity Natural Image Synthesis",
appendix (arXiv:1809.11096), for nearest neighbours in features.

Shape letters: N images, F feature channels, M samples to look up.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float, Int64, UInt8
from PIL import Image
from torch import Tensor

from mergevq.data.batches import eval_batches
from mergevq.data.images import ImageDataset
from mergevq.evaluate.samples import Samples
from mergevq.metrics.extractor import FeatureExtractor
from mergevq.metrics.image import to_uint8
from mergevq.report.pictures import contact_sheet, to_pil
from mergevq.runtime import distributed
from mergevq.runtime.logs import Progress

_NUM_NEIGHBOURS = 3
"""Neighbours of each sample in the picture."""


class Neighbours(NamedTuple):
    """Nearest training images of some samples."""

    distance: Float[Tensor, "m n"]
    """Euclidean, of features, ascending."""
    position: Int64[Tensor, "m n"]
    """In the training data."""


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
