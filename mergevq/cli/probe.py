"""The commands of `mergevq probe`: what a representation knows of classes.

As in `mergevq.cli.main.main`, a signature is the options, a docstring is the help, and what is
heavy is imported inside.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from mergevq.cli.options import MAY_BE_EMPTY, shown_default
from mergevq.cli.tables import next_lines
from mergevq.config.base import BUNDLED_TOKENIZER, MAX_PIXELS, Device, ImagePool, Precision, Stage
from mergevq.config.probing import FeatureConfig, FinetuneConfig, KnnConfig, LinearConfig, ProbeRun
from mergevq.config.training import DataConfig

Counts = Annotated[
    tuple[str, ...], tyro.conf.arg(metavar="K,K,..", help_behavior_hint=shown_default)
]
"""An option that takes numbers with commas or spaces between them; see `_counts`."""
_FEATURES = FeatureConfig()


@dataclass(frozen=True, kw_only=True, slots=True)
class SubjectOptions:
    """Model and images of a probe: options of every one."""

    model: str = BUNDLED_TOKENIZER
    """directory of a tokenizer, a name of `mergevq models`, or owner/name@revision on Hugging
    Face."""
    data: str
    """labelled images: a folder with a sub-folder per class, parquet files, WebDataset shards, or
    `digits`."""
    val_data: str | None = None
    """the same for testing; without it a share of `data` is held out."""
    val_fraction: float = 0.2
    """share of `data` to test on, without `val_data`; by default as the small recipes hold out."""
    max_images: int | None = None
    """use only so many training and so many test images, evenly spaced."""
    max_pixels: int = MAX_PIXELS
    """largest picture that is read, as width times height; larger ones count as unreadable."""
    num_kept: Counts = ()
    """K, one or several, as in 36,144; the tokenizer's own if there are none. Merging off is always
    added."""
    seed: int = 0
    """seed of every random number."""
    device: Device = "auto"
    """where to compute."""
    precision: Precision = "auto"
    """precision of features and of fine-tuning; auto is bf16 where the device gains from it, else
    float32."""
    num_workers: int = 2
    """loader processes; 0 loads in this one."""

    def run(
        self, method: LinearConfig | KnnConfig | FinetuneConfig, features: FeatureConfig, out: Path
    ) -> ProbeRun:
        """The probe that these options ask for."""
        return ProbeRun(
            model=self.model,
            out=str(out),
            method=method,
            data=DataConfig(
                path=self.data,
                val_path=self.val_data,
                val_fraction=self.val_fraction,
                max_pixels=self.max_pixels,
                num_workers=self.num_workers,
            ),
            features=features,
            max_images=self.max_images,
            seed=self.seed,
            device=self.device,
            precision=self.precision,
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class FeatureOptions:
    """Which frozen features are probed: options of the linear and of the k-NN probe."""

    stages: tuple[Stage, ...] = _FEATURES.stages
    """where features are taken: before merging, merged, copied back to the grid, before
    quantization, codes."""
    pools: tuple[ImagePool, ...] = _FEATURES.pools
    """class token, mean over tokens, mean over grid cells."""
    layers: Annotated[tuple[int, ...], MAY_BE_EMPTY] = ()
    """encoder blocks to run; all if there are none."""
    pixel_side: int = _FEATURES.pixel_side
    """raw pixels are averaged until images are at most this wide and high."""
    pca_dim: int | None = None
    """principal components; as many as the encoder has channels if not given."""
    image_batch_size: int = _FEATURES.batch_size
    """images encoded at once."""

    def config(self, tokens: tuple[str, ...]) -> FeatureConfig:
        """The features that these options ask for, at each K."""
        return FeatureConfig(
            num_kept=_counts(tokens),
            stages=self.stages,
            pools=self.pools,
            layers=self.layers,
            pixel_side=self.pixel_side,
            pca_dim=self.pca_dim,
            batch_size=self.image_batch_size,
        )


Subject = Annotated[SubjectOptions, tyro.conf.arg(name="")]
Features = Annotated[FeatureOptions, tyro.conf.arg(name="")]


def linear(  # noqa: PLR0913 - each is an option
    *,
    subject: Subject,
    features: Features,
    out: Path = Path("probes/linear"),
    rates: tuple[float, ...] = LinearConfig().rates,
    epochs: int = 90,
    batch_size: int | None = 1024,
    weight_decay: float = 0.0,
    warmup_fraction: float = LinearConfig().warmup_fraction,
    crops: int = 0,
    held_out_fraction: float = 0.2,
) -> None:
    """Train a linear classifier on frozen features, beside raw pixels and their PCA.

    Features are normalised with the mean and deviation of the training images, without parameters.
    Each learning rate is tried; held-out training images choose, and OUT/probe.json has all.

    Args:
        subject: what is probed, on which images.
        features: which features.
        out: new directory for the record and the confusion matrices.
        rates: peak learning rates of AdamW.
        epochs: passes over the training images.
        batch_size: images per step, but at least 8 steps an epoch; None is all images at once.
        weight_decay: on the weights.
        warmup_fraction: share of the steps in which the rate rises, before it falls to 0.
        crops: random crops of each training image, from which epochs learn in turn; 0 learns from
            the centre squares. Features of all crops are kept in memory.
        held_out_fraction: share of the training images that chooses the rate.
    """
    method = LinearConfig(
        rates=rates,
        held_out_fraction=held_out_fraction,
        num_epochs=epochs,
        batch_size=batch_size,
        weight_decay=weight_decay,
        warmup_fraction=warmup_fraction,
        num_crops=crops,
    )
    _run(subject.run(method, features.config(subject.num_kept), out))


def knn(
    *,
    subject: Subject,
    features: Features,
    out: Path = Path("probes/knn"),
    k: tuple[int, ...] = KnnConfig().num_neighbours,
    temperature: float = 0.07,
    leave_one_out: tyro.conf.FlagCreatePairsOff[bool] = False,
) -> None:
    """Classify by a vote of the nearest training images, beside raw pixels and their PCA.

    Neighbours are those of the highest cosine similarity s, and have exp(s / temperature) votes.
    Writes confusion matrices, and pictures of queries beside their neighbours.

    Args:
        subject: what is probed, on which images.
        features: which features.
        out: new directory for the record and the pictures.
        k: number of neighbours that vote, one or several.
        temperature: low lets the nearest decide.
        leave_one_out: classify each image of `data` by all others, instead of testing on others.
    """
    method = KnnConfig(num_neighbours=k, temperature=temperature, leave_one_out=leave_one_out)
    _run(subject.run(method, features.config(subject.num_kept), out))


def finetune(  # noqa: PLR0913 - each is an option
    *,
    subject: Subject,
    out: Path = Path("probes/finetune"),
    stage: Stage = "merged",
    pool: ImagePool = "mean",
    epochs: int = 100,
    batch_size: int = 1024,
    rate: float = 1.25e-3,
    layer_decay: float = FinetuneConfig().layer_decay,
    weight_decay: float = 0.05,
    warmup_fraction: float = FinetuneConfig().warmup_fraction,
    label_smoothing: float = 0.1,
    mixup: float = 0.8,
    cutmix: float = 1.0,
    augmentation: Literal["none", "crop", "resized_crop"] = "resized_crop",
    randaugment: float = FinetuneConfig().randaugment,
    erasing: float = FinetuneConfig().erasing,
    drop_path: float = FinetuneConfig().drop_path,
    linear_epochs: int = 90,
) -> None:
    """Train encoder and classifier on labels end to end, once for each K.

    A linear probe of the same features, frozen, and of raw pixels and their PCA comes beside it.
    The fine-tuned weights are not kept.

    Args:
        subject: what is probed, on which images.
        out: new directory for the record and the confusion matrices.
        stage: where the classifier is attached: before merging, merged, copied back to the grid,
            before quantization, codes.
        pool: class token, mean over tokens, mean over grid cells.
        epochs: passes over the training images.
        batch_size: images per step.
        rate: peak learning rate of the classifier for 512 images, scaled to the batch.
        layer_decay: rate of a block over that of the next one.
        weight_decay: on matrices.
        warmup_fraction: share of the steps in which the rate rises, before it falls to 0.
        label_smoothing: share of the target that is spread over all classes.
        mixup: parameter of the beta distribution of mixup; 0 is off.
        cutmix: parameter of the beta distribution of cutmix; 0 is off.
        augmentation: centre squares, squares at random places, or random rectangles; the last two
            are mirrored half of the time, which letters and digits do not bear.
        randaugment: mean strength of RandAugment, up to 10; 0 is off, as digits need.
        erasing: share of the images of which a rectangle becomes noise; 0 is off.
        drop_path: probability that the last block is skipped in training; it falls to 0 at the
            first.
        linear_epochs: passes of the linear probes beside it.
    """
    method = FinetuneConfig(
        stage=stage,
        pool=pool,
        num_epochs=epochs,
        batch_size=batch_size,
        rate=rate,
        layer_decay=layer_decay,
        weight_decay=weight_decay,
        warmup_fraction=warmup_fraction,
        label_smoothing=label_smoothing,
        mixup=mixup,
        cutmix=cutmix,
        augmentation=augmentation,
        randaugment=randaugment,
        erasing=erasing,
        drop_path=drop_path,
        precision=subject.precision,
        linear=LinearConfig(num_epochs=linear_epochs),
    )
    _run(subject.run(method, FeatureConfig(num_kept=_counts(subject.num_kept)), out))


COMMANDS: dict[str, Callable[..., object]] = {
    command.__name__: command for command in (linear, knn, finetune)
}


def _run(run: ProbeRun) -> None:
    """Probe, and print what came out."""
    from mergevq.evaluate.probe.run import RECORD, probe, summary

    record = probe(run)
    print("\n".join(summary(record)))
    pictures = sum(len(row["pictures"]) for row in record["rows"])
    print(f"{pictures} pictures and all numbers: {run.out} ({RECORD})")
    print(next_lines(("demo", "--model", run.model, "--data", run.data.path)))


def _counts(texts: tuple[str, ...]) -> tuple[int, ...]:
    """Numbers separated by commas or spaces.

    Raises:
        ValueError: something else is among them.
    """
    parts = [part for text in texts for part in text.split(",") if part.strip()]
    try:
        return tuple(int(part) for part in parts)
    except ValueError:
        raise ValueError(f"tokens ({' '.join(texts)}) must be numbers, as in 36,144") from None
