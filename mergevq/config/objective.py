"""Settings of the tokenizer's losses, and tagged unions of teachers and distillations; no torch."""

from dataclasses import dataclass, field, fields
from typing import ClassVar, Literal

from mergevq.config.base import require
from mergevq.config.ranges import check_numbers


@dataclass(frozen=True, kw_only=True, slots=True)
class Gram:
    """Texture: distance of the Gram matrices of the perceptual trunk's features."""

    weight: float = 0.0
    """Weight of the loss `gram`; without weights for the trunk it is left out, as the perceptual
    loss is. The scale of the matrices is the trunk's: half of the gradient that LPIPS has on
    photographs of 64 pixels at half the resolution is 1.6 with `squeeze` and 1,700 with `alex`."""
    num_taps: int = 3
    """Layers of the trunk that count, from the first; later ones of a small image have too few
    cells for a matrix."""

    def __post_init__(self) -> None:
        """Reject a weight and a number of layers that cannot be."""
        check_numbers(self)


@dataclass(frozen=True, kw_only=True, slots=True)
class LossConfig:
    """Weights of the tokenizer's losses (paper, Table A1; authors' code where they differ)."""

    reconstruction_weight: float = 1.0
    """L1 between image and reconstruction."""
    perceptual_weight: float = 1.0
    """LPIPS; without weights for its trunk training continues at 0 and says so."""
    perceptual_trunk: Literal["vgg", "alex", "squeeze"] = "vgg"
    """Network of the perceptual loss."""
    perceptual_path: str | None = None
    """Local safetensors file or folder with the LPIPS weights; None looks in the cache only."""
    adversarial_weight: float = 0.1
    """Non-saturating generator loss, reached at the end of the ramp."""
    discriminator_channels: int = 64
    """Base width of the patch discriminator."""
    discriminator_start_step: int = 0
    """First step at which the discriminator is trained."""
    adversarial_start_step: int = 1000
    """First step at which the discriminator's verdict enters the tokenizer's loss."""
    adversarial_ramp_steps: int = 1000
    """Steps over which that weight rises linearly to `adversarial_weight`."""
    lecam_weight: float = 0.01
    """LeCam regularisation of the discriminator."""
    commitment_weight: float = 0.25
    """Mean squared distance of latents to their codes."""
    entropy_weight: float = 0.1
    """Token entropy minus codebook entropy."""
    source_weight: float = 0.5
    """Cross-entropy of the source predictor (0.5 for G and G+R, 1.0 for R)."""
    source_gradient: float = 0.0
    """Share of that term's gradient that reaches the codes: 0 leaves them to the pixels, above 0
    teaches them to tell where they lie."""
    recovered_share: float = 0.0
    """Share of a batch decoded with the recovered source, so that training meets its mistakes."""
    recovered_start_step: int = 0
    """First step at which they are. A young predictor's maps are noise, which blurs a decoder that
    began with good codes."""
    alignment_weight: float = 1.0
    """Class token against the teacher (0.1 for G, 1.0 for G+R and R)."""
    gram: Gram = field(default_factory=Gram)
    """Gram loss, beside a perceptual one."""

    @property
    def further_weights(self) -> dict[str, float]:
        """Weights above 0 of the terms with settings of their own, by the names of these."""
        values = {item.name: getattr(self, item.name) for item in fields(self)}
        weights = {name: each.weight for name, each in values.items() if isinstance(each, Gram)}
        return {name: weight for name, weight in weights.items() if weight > 0}

    def recovered_share_at(self, step: int) -> float:
        """Share of a step's images that are decoded with the recovered source."""
        return self.recovered_share if step >= self.recovered_start_step else 0.0

    def __post_init__(self) -> None:
        """Reject negative weights and an impossible order of the adversarial steps."""
        check_numbers(self)
        require(
            self.discriminator_start_step <= self.adversarial_start_step,
            f"discriminator_start_step ({self.discriminator_start_step}) must not be after "
            f"adversarial_start_step ({self.adversarial_start_step}): an untrained discriminator "
            "ruins reconstructions",
        )
        require(
            self.gram.weight == 0 or self.perceptual_weight > 0,
            f"gram.weight ({self.gram.weight}) needs a perceptual_weight "
            f"({self.perceptual_weight}) above 0: Gram matrices tell nothing of where things are",
        )


View = Literal["student", "teacher"]
"""A view of an image beside the one that is reconstructed: an augmented square for the student, a
random square for the teacher."""
DINOV2_BASE = "facebook/dinov2-base@f9e44c814b77203eaa57a6bdbbd535f21ede1415"
"""DINOv2 ViT-B, Apache-2.0: the authors' teacher, and their encoder's first weights."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Kl:
    """KL divergence of softened features (authors' code)."""

    kind: Literal["kl"] = "kl"
    temperature: float = 4.0
    """Temperature of both distributions."""

    def __post_init__(self) -> None:
        """Reject a temperature that is not positive."""
        check_numbers(self)


@dataclass(frozen=True, kw_only=True, slots=True)
class Dino:
    """Cross-entropy of the paper's equation 10 (DINO)."""

    kind: Literal["dino"] = "dino"
    student_temperature: float = 0.1
    """Temperature of the student."""
    teacher_temperature: float = 0.04
    """Temperature of the teacher; sharpens it."""

    def __post_init__(self) -> None:
        """Reject temperatures that are not positive."""
        check_numbers(self)


@dataclass(frozen=True, kw_only=True, slots=True)
class Cosine:
    """One minus the cosine of the angle between features."""

    kind: Literal["cosine"] = "cosine"


FeatureLoss = Kl | Dino | Cosine
"""Loss between a head's output and the features of a frozen model."""


@dataclass(frozen=True, kw_only=True, slots=True)
class NoTeacher:
    """The class token is aligned with nothing."""

    kind: Literal["none"] = "none"

    views: ClassVar[frozenset[View]] = frozenset()
    """Views that training loads."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Labels:
    """The data's classes: cross-entropy against the label."""

    kind: Literal["labels"] = "labels"
    num_head_layers: Literal[2, 3] = 3
    """Linear layers of the alignment head (2 in G, 3 in G+R and R)."""
    label_smoothing: float = 0.1
    """Share of each label that is spread over all classes."""

    views: ClassVar[frozenset[View]] = frozenset()

    def __post_init__(self) -> None:
        """Reject a share that leaves nothing of the label."""
        check_numbers(self)


@dataclass(frozen=True, kw_only=True, slots=True)
class SelfDistillation:
    """A moving average of the encoder, which sees another view of the image (DINO)."""

    kind: Literal["self"] = "self"
    view_size: int | None = None
    """Side of the augmented view the student sees, in pixels; None is the tokenizer's size."""
    num_head_layers: Literal[2, 3] = 3
    """Linear layers of each head before the prototypes."""
    num_prototypes: int = 1024
    """Output dimension of both heads."""
    momentum: float = 0.996
    """Share of the average that a step leaves as it was."""
    student_temperature: float = 0.1
    """Temperature of the student."""
    teacher_temperature: float = 0.04
    """Temperature of the teacher; sharpens it."""

    views: ClassVar[frozenset[View]] = frozenset({"student"})

    def __post_init__(self) -> None:
        """Reject temperatures that are not positive, and impossible counts."""
        check_numbers(self)


@dataclass(frozen=True, kw_only=True, slots=True)
class HuggingFace:
    """A frozen vision model from Hugging Face; DINOv2 ViT-B by default."""

    kind: Literal["huggingface"] = "huggingface"
    path: str = DINOV2_BASE
    """Local folder, or owner/name@revision on Hugging Face."""
    loss: FeatureLoss = field(default_factory=Kl)
    """Loss between the head's output and the model's features."""
    view_size: int | None = None
    """Side of the augmented view the student sees, in pixels; None is the tokenizer's size."""
    teacher_size: int = 224
    """Side of the view the model sees, in pixels."""
    num_head_layers: Literal[2, 3] = 3
    """Linear layers of the alignment head (2 in G, 3 in G+R and R)."""

    views: ClassVar[frozenset[View]] = frozenset({"student", "teacher"})

    def __post_init__(self) -> None:
        """Reject impossible sizes."""
        check_numbers(self)


@dataclass(frozen=True, kw_only=True, slots=True)
class TorchScript:
    """A frozen feature extractor from a TorchScript file, as evaluations have it."""

    kind: Literal["torchscript"] = "torchscript"
    path: str = "extractor.pt"
    """File whose `forward(images, return_features)` takes pixels in 0..255 and normalises them
    itself. It is code that runs here: use files you trust."""
    loss: FeatureLoss = field(default_factory=Kl)
    """Loss between the head's output and the extractor's features."""
    view_size: int | None = None
    """Side of the augmented view the student sees, in pixels; None is the tokenizer's size."""
    teacher_size: int = 224
    """Side of the view the extractor sees, in pixels."""
    num_head_layers: Literal[2, 3] = 3
    """Linear layers of the alignment head (2 in G, 3 in G+R and R)."""

    views: ClassVar[frozenset[View]] = frozenset({"student", "teacher"})

    def __post_init__(self) -> None:
        """Reject impossible sizes."""
        check_numbers(self)


Teacher = NoTeacher | Labels | SelfDistillation | HuggingFace | TorchScript
"""Target that the class token is aligned with."""


def view_sizes(teacher: Teacher, image_size: int) -> dict[View, int]:
    """Side in pixels of each of a teacher's `views`.

    Args:
        teacher: its settings.
        image_size: the tokenizer's.
    """
    match teacher:
        case NoTeacher() | Labels():
            return {}
        case SelfDistillation():
            return {"student": teacher.view_size or image_size}
        case HuggingFace() | TorchScript():
            student = teacher.view_size or image_size
            return {"student": student, "teacher": teacher.teacher_size}


@dataclass(frozen=True, kw_only=True, slots=True)
class VisionModel:
    """Patch features of a frozen vision model from Hugging Face; DINOv2 ViT-B by default."""

    kind: Literal["huggingface"] = "huggingface"
    path: str = DINOV2_BASE
    """Local folder, or owner/name@revision on Hugging Face."""
    teacher_size: int | None = None
    """Side in pixels of the image as the model sees it; None is where its patches are as many as
    the tokenizer's cells. Of another number, features are interpolated to the cells."""

    def __post_init__(self) -> None:
        """Reject impossible sizes."""
        check_numbers(self)


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainedTokenizer:
    """Features of a trained tokenizer's encoder, frozen, with merging off."""

    kind: Literal["tokenizer"] = "tokenizer"
    path: str = "runs/tokenizer/model"
    """Directory of the tokenizer, its name in `mergevq models`, or owner/name@revision on Hugging
    Face."""
    layer: int | None = None
    """Block after which features are taken, 0 is the stem; None is the last."""

    def __post_init__(self) -> None:
        """Reject an impossible block."""
        check_numbers(self)


CellTeacher = VisionModel | TrainedTokenizer
"""Frozen model with features of each place of an image."""


@dataclass(frozen=True, kw_only=True, slots=True)
class NoDistillation:
    """Features of no layer are compared with anything."""

    kind: Literal["none"] = "none"


@dataclass(frozen=True, kw_only=True, slots=True)
class Semantic:
    """Tokens of a decoder block are held near features of a frozen model (GigaTok)."""

    kind: Literal["semantic"] = "semantic"
    semantic_weight: float = 0.5
    """Weight of the loss `semantic`: one minus the cosine, mean over cells."""
    layer: int = 3
    """Block of the decoder whose tokens are compared, from 1; 0 is before the first."""
    teacher: CellTeacher = field(default_factory=VisionModel)
    """Frozen model, which sees the image that is reconstructed."""

    def __post_init__(self) -> None:
        """Reject an impossible weight or block."""
        check_numbers(self)


@dataclass(frozen=True, kw_only=True, slots=True)
class Preserve:
    """Each encoder block is held near its own start, most where it has moved most (UniFlow)."""

    kind: Literal["preserve"] = "preserve"
    preserve_weight: float = 1.0
    """Weight of the loss `preserve`: one minus the cosine, weighted mean over blocks."""
    beta: float = 2.0
    """Growth of a block's weight with its distance: the exponent of e at a distance of 1. At 0 the
    weight is the number of the block over that of all blocks."""
    every: int = 4
    """One of so many images of a process is compared, which takes two more passes of the encoder
    with merging off; 1 compares all."""

    def __post_init__(self) -> None:
        """Reject an impossible weight, exponent or number of images."""
        check_numbers(self)


Distillation = NoDistillation | Semantic | Preserve
"""Loss on features of layers, against a frozen model."""
