"""Settings of the probes of a representation, and the keys of their records; without torch.

Source: Li et al. 2025, "MergeVQ", appendix A.4 (arXiv:2504.00999), which names a linear probe of 90
epochs of AdamW at batch 1024 and fine-tuning of 100 epochs at the same batch, both without merging;
Caron et al. 2021, "Emerging Properties in Self-Supervised Vision Transformers", appendix F.1
(arXiv:2104.14294) for k-NN; Xie et al. 2022, "SimMIM", appendix A (arXiv:2111.09886) for the rest
of fine-tuning.
"""

from dataclasses import dataclass, field
from typing import Literal

from mergevq.config.base import Device, ImagePool, Precision, Stage, require
from mergevq.config.ranges import check_numbers
from mergevq.config.training import DataConfig


@dataclass(frozen=True, kw_only=True, slots=True)
class FeatureConfig:
    """Which features are probed, and what they are compared with."""

    num_kept: tuple[int, ...] = ()
    """Each K; empty is the tokenizer's own. Merging off, K = L, is always probed too."""
    stages: tuple[Stage, ...] = ("merged", "quantized")
    """Where features are taken; see `Stage`."""
    pools: tuple[ImagePool, ...] = ("class", "mean")
    """How tokens become one vector; see `Pool`."""
    layers: tuple[int, ...] = ()
    """Encoder blocks to run, from 0 (the stem) to all; empty is all."""
    pixel_side: int = 32
    """Raw pixels are averaged over squares until an image is at most this wide and high."""
    pca_dim: int | None = None
    """Principal components of the pixels; None is as many as the encoder has channels."""
    batch_size: int = 64
    """Images encoded at once."""

    def __post_init__(self) -> None:
        """Reject an empty choice and counts below 1."""
        check_numbers(self)
        for name in ("stages", "pools"):
            require(len(getattr(self, name)) > 0, f"{name} must name at least one")


@dataclass(frozen=True, kw_only=True, slots=True)
class LinearConfig:
    """A linear classifier on frozen features, trained once for each of several learning rates."""

    rates: tuple[float, ...] = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1)
    """Peak learning rates; the one that is best on held-out training images is reported."""
    held_out_fraction: float = 0.2
    """Share of each class of the training images that chooses the rate; then all are trained on."""
    num_epochs: int = 90
    """Passes over the training images."""
    batch_size: int | None = 1024
    """Images per step; fewer than 8 such batches are cut into 8. None is all images at once."""
    weight_decay: float = 0.0
    """On the weights, not on the biases."""
    warmup_fraction: float = 0.1
    """Share of the steps in which the rate rises; then it falls to 0 as a cosine."""
    num_crops: int = 0
    """Random crops of each training image, mirrored half of the time, from which epochs learn in
    turn; 0 learns from the centre squares, and as many as there are epochs is a new one in each."""

    def __post_init__(self) -> None:
        """Reject settings that cannot train or choose."""
        check_numbers(self)
        require(len(self.rates) > 0, "rates must name at least one learning rate")
        require(len(set(self.rates)) == len(self.rates), f"rates {self.rates} must differ")


@dataclass(frozen=True, kw_only=True, slots=True)
class KnnConfig:
    """A weighted vote of the nearest training images."""

    num_neighbours: tuple[int, ...] = (20,)
    """Each k; all are reported."""
    temperature: float = 0.07
    """A neighbour of cosine similarity s has exp(s / temperature) votes."""
    leave_one_out: bool = False
    """Classify every training image by the others; validation images then take no part at all."""

    def __post_init__(self) -> None:
        """Reject impossible numbers."""
        check_numbers(self)
        require(len(self.num_neighbours) > 0, "num_neighbours must name at least one k")


@dataclass(frozen=True, kw_only=True, slots=True)
class FinetuneConfig:
    """End-to-end training of the encoder with a linear classifier on top."""

    stage: Stage = "merged"
    """Where the classifier is attached; through `quantized` gradients go straight."""
    pool: ImagePool = "mean"
    """How tokens become one vector."""
    num_epochs: int = 100
    """Passes over the training images."""
    batch_size: int = 1024
    """Images per step; a smaller data set is one step."""
    rate: float = 1.25e-3
    """Peak learning rate of the classifier for 512 images, scaled linearly to the batch."""
    layer_decay: float = 0.65
    """Rate of a block over that of the block after it; 0.65 is SimMIM's for ViT-B, and 1 gives all
    the same rate."""
    weight_decay: float = 0.05
    """On matrices only."""
    warmup_fraction: float = 0.2
    """Share of the steps in which the rate rises; then it falls to 0 as a cosine."""
    clip_norm: float | None = 5.0
    """Largest gradient norm; None does not clip."""
    label_smoothing: float = 0.1
    """Share of the target that is spread over all classes."""
    mixup: float = 0.8
    """Parameter of the beta distribution of mixup's shares; 0 is off."""
    cutmix: float = 1.0
    """The same for cutmix; with both, each has half of the batches."""
    augmentation: Literal["none", "crop", "resized_crop"] = "resized_crop"
    """`none` takes centre squares, `crop` squares at random places, mirrored half of the time,
    `resized_crop` random rectangles of 8 % to 100 % of the area, mirrored half of the time."""
    randaugment: float = 9.0
    """Mean strength of RandAugment's two operations, up to 10; 0 is off."""
    erasing: float = 0.25
    """Share of the images of which a random rectangle becomes noise; 0 is off."""
    drop_path: float = 0.1
    """Probability that the last block is skipped for an image in training; it falls to 0 at the
    first block."""
    precision: Precision = "auto"
    """Precision of training; evaluation is in float32."""
    linear: LinearConfig = field(default_factory=LinearConfig)
    """The linear probe of frozen features and of pixels that is reported beside it."""

    def __post_init__(self) -> None:
        """Reject settings that cannot train."""
        check_numbers(self)


@dataclass(frozen=True, kw_only=True, slots=True)
class ProbeRun:
    """One probe: of which model, on which images, how."""

    model: str
    """Directory of a tokenizer, a name of `mergevq models`, or owner/name@revision on Hugging
    Face."""
    out: str
    """Directory of the record and the pictures."""
    method: LinearConfig | KnnConfig | FinetuneConfig
    """The probe."""
    data: DataConfig = field(default_factory=DataConfig)
    """Training and validation images, with labels."""
    features: FeatureConfig = field(default_factory=FeatureConfig)
    """Features that are probed."""
    max_images: int | None = None
    """Use only so many training and so many validation images, evenly spaced; None is all."""
    seed: int = 0
    """Seed of every random number."""
    device: Device = "auto"
    """Where to compute."""
    precision: Precision = "auto"
    """Precision of features; probes are in float32, and fine-tuning has its own."""

    def __post_init__(self) -> None:
        """Reject a cut that leaves nothing."""
        check_numbers(self)
        require(
            self.max_images is None or self.max_images >= 2,
            f"max_images ({self.max_images}) must be at least 2, or None for all",
        )
        require(
            self.data.crop == "center" and not self.data.flip,
            f"data.crop ({self.data.crop}) must be center and data.flip ({self.data.flip}) False: "
            "a probe sees centre squares, and fine-tuning has method.augmentation",
        )
        require(
            self.data.cache == "none" and self.data.reduced_jpeg,
            f"data.cache ({self.data.cache}) must be none and data.reduced_jpeg "
            f"({self.data.reduced_jpeg}) True, as they are without being named: both are for "
            "training a tokenizer, and a probe decodes whole pictures each time",
        )
