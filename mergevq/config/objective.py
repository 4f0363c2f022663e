"""Settings of the tokenizer's losses and of its teacher; no torch."""

from dataclasses import dataclass
from typing import Literal

from mergevq.config.base import require
from mergevq.config.ranges import check_numbers


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


@dataclass(frozen=True, kw_only=True, slots=True)
class TeacherConfig:
    """Alignment of the class token with a teacher."""

    kind: Literal["none", "labels", "self", "dinov2", "huggingface"] = "self"
    """`dinov2` and `huggingface` are frozen vision models, `self` is an EMA of the encoder,
    `labels` the data's classes."""
    path: str | None = None
    """Local folder, or owner/name@revision on Hugging Face; None is DINOv2 ViT-B for `dinov2`."""
    loss: Literal["kl", "dino", "cosine"] = "kl"
    """Against a frozen model: `kl` at `temperature` over its features (authors' code), `dino` the
    cross-entropy of the paper's equation 10, `cosine` one minus the cosine."""
    temperature: float = 4.0
    """Temperature of `kl`."""
    view_size: int | None = None
    """Side of the augmented view the student sees, in pixels; None is the tokenizer's size."""
    teacher_size: int = 224
    """Side of the view a frozen model sees, in pixels."""
    num_head_layers: Literal[2, 3] = 3
    """Linear layers of the alignment head (2 in G, 3 in G+R and R)."""
    num_prototypes: int = 1024
    """Output dimension of the heads of `self`."""
    momentum: float = 0.996
    """EMA of the `self` teacher per step."""
    student_temperature: float = 0.1
    """Temperature of the student in `self` and `dino`."""
    teacher_temperature: float = 0.04
    """Temperature of the teacher in `self` and `dino`; sharpens it."""
    label_smoothing: float = 0.1
    """Label smoothing of `labels`."""

    def __post_init__(self) -> None:
        """Reject a frozen model without a name and temperatures that are not positive."""
        check_numbers(self)
        require(
            self.kind != "huggingface" or self.path is not None,
            "teacher kind 'huggingface' needs path: a local folder, or owner/name@revision",
        )
