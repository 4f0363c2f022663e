"""Teachers of the class token: a frozen vision model, an average of itself, or labels.

Source: Li et al. 2025, "MergeVQ", section 3 and equation 10 (arXiv:2504.00999); Hinton et al. 2015,
"Distilling the Knowledge in a Neural Network", section 2 (`kl`, arXiv:1503.02531); Caron et al.
2021, "Emerging Properties in Self-Supervised Vision Transformers", section 3.1 (`dino` and the
self-teacher, arXiv:2104.14294).

A teacher is a module with one call, `loss(class_token, label, teacher_view, target)`, that reads
what its kind needs. Its parameters are those of its heads; a frozen model is no part of
the module, so no checkpoint, optimizer or data-parallel wrapper sees it. Heads and losses are in
float32 under any autocast.

Differs: DINO subtracts a running mean of the teacher's logits, the self-teacher here the mean of
its features over the batch, before they are compared with prototypes. The class tokens of a young
encoder are nearly the same for all images; subtracting the mean separates them from the first step.

Shape letters: B batch, C channels of the class token, F features, prototypes or classes, H and W
pixels.
"""

import copy
from collections.abc import Callable
from functools import partial
from typing import Literal, assert_never

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn
from torch.nn import functional

from mergevq.config import objective as settings
from mergevq.nn.norm import LayerNorm
from mergevq.runtime import distributed
from mergevq.tokenizer.losses.frozen import FrozenModel, HuggingFaceTeacher, TorchScriptTeacher

Alignment = Callable[[Tensor, Tensor], Tensor]
"""A loss of the student's output and the teacher's, both (B, F)."""
HEAD_RATIO = 4
"""Hidden width of an alignment head as a multiple of the class token's."""
INIT_STD = 0.02
"""Spread of the heads' weights at the start."""
BOTTLENECK_DIM = 256
"""Features that are compared with prototypes (DINO, appendix C)."""


# -------------------------------------------------------------------------------------- losses


def kl_alignment(
    student: Float[Tensor, "b f"], target: Float[Tensor, "b f"], *, temperature: float
) -> Float[Tensor, ""]:
    """KL divergence of the student's softmax over features from the target's, in nats.

    Mean over the batch, times the squared temperature, which keeps the size of the gradient.
    """
    log_student = (student.float() / temperature).log_softmax(-1)
    log_target = (target.detach().float() / temperature).log_softmax(-1)
    divergence = functional.kl_div(log_student, log_target, reduction="batchmean", log_target=True)
    return divergence * temperature**2


def dino_alignment(
    student: Float[Tensor, "b f"],
    target: Float[Tensor, "b f"],
    *,
    student_temperature: float,
    teacher_temperature: float,
) -> Float[Tensor, ""]:
    """Cross-entropy of the student's softmax against the teacher's (paper, equation 10), in nats.

    Args:
        student: logits.
        target: logits; no gradient reaches them.
        student_temperature: divides `student`.
        teacher_temperature: divides `target`; below the student's it sharpens.
    """
    probability = (target.detach().float() / teacher_temperature).softmax(-1)
    log_student = (student.float() / student_temperature).log_softmax(-1)
    return -(probability * log_student).sum(-1).mean()


def cosine_alignment(
    student: Float[Tensor, "b f"], target: Float[Tensor, "b f"]
) -> Float[Tensor, ""]:
    """One minus the cosine of the angle to the target, in [0, 2]; mean over the batch."""
    student = functional.normalize(student.float(), dim=-1)
    target = functional.normalize(target.detach().float(), dim=-1)
    return 1 - (student * target).sum(-1).mean()


def label_alignment(
    logits: Float[Tensor, "b f"], label: Int64[Tensor, " b"], *, smoothing: float
) -> Float[Tensor, ""]:
    """Cross-entropy against the label, of which a share is spread over all classes, in nats.

    An image without a label, which is -1, is a ValueError.
    """
    # Elsewhere the loss itself stops the device, which the host would have to wait for here.
    if label.is_cpu:
        require_labels(int((label < 0).sum()), len(label))
    return functional.cross_entropy(logits.float(), label, label_smoothing=smoothing)


def require_labels(num_unlabelled: int, num_images: int) -> None:
    """Check that every image has a label to be taught by.

    Raises:
        ValueError: some have none.
    """
    if num_unlabelled > 0:
        raise ValueError(
            f"{num_unlabelled} of {num_images} images have no label, and teacher.kind 'labels' "
            "needs one of every image; leave these images out of the data, or choose teacher.kind "
            "'self' or 'none'"
        )


# ------------------------------------------------------------------------------------ teachers


class AlignmentHead(nn.Module):
    """Map the class token to the teacher's features, prototypes or classes.

    Three layers are Linear, GELU, Linear, GELU, Linear; two are Linear, GELU, LayerNorm, Linear:
    the numbering of the authors' `dist_head`.

    Args:
        dim: channels of the class token.
        out_dim: features, prototypes or classes.
        num_layers: linear layers.
    """

    def __init__(self, dim: int, out_dim: int, num_layers: Literal[2, 3]) -> None:
        super().__init__()
        self.out_dim = out_dim
        hidden = HEAD_RATIO * dim
        is_long = num_layers == 3
        middle = [nn.Linear(hidden, hidden), nn.GELU()] if is_long else [LayerNorm(hidden)]
        self.layers = nn.Sequential(
            nn.Linear(dim, hidden), nn.GELU(), *middle, nn.Linear(hidden, out_dim)
        )
        for layer in self.layers:
            if isinstance(layer, nn.Linear):
                nn.init.trunc_normal_(layer.weight, std=INIT_STD)
                nn.init.zeros_(layer.bias)

    def forward(self, class_token: Float[Tensor, "b c"]) -> Float[Tensor, "b f"]:
        """Project, in float32: one token per image is cheap, and float16 may overflow here."""
        with torch.autocast(class_token.device.type, enabled=False):
            return self.layers(class_token.float())


class PrototypeHead(nn.Module):
    """Compare the class token with learned prototypes, as the head of DINO does (appendix C).

    Args:
        dim: channels of the class token.
        num_prototypes: outputs.
        num_layers: linear layers before the prototypes.
    """

    def __init__(self, dim: int, num_prototypes: int, num_layers: Literal[2, 3]) -> None:
        super().__init__()
        self.bottleneck = AlignmentHead(dim, BOTTLENECK_DIM, num_layers)
        self.prototypes = nn.Parameter(torch.empty(num_prototypes, BOTTLENECK_DIM))
        nn.init.trunc_normal_(self.prototypes, std=INIT_STD)

    def forward(self, class_token: Float[Tensor, "b c"]) -> Float[Tensor, "b f"]:
        """Cosine of the class token's features with each prototype, in float32."""
        return self.compare(self.bottleneck(class_token))

    def compare(self, features: Float[Tensor, "b d"]) -> Float[Tensor, "b f"]:
        """Cosine of features with each prototype, in float32; those of 0 are 0."""
        with torch.autocast(features.device.type, enabled=False):
            directions = functional.normalize(features.float(), dim=-1)
            return functional.linear(directions, functional.normalize(self.prototypes, dim=-1))


class LabelTeacher(nn.Module):
    """The data's classes teach: label-smoothed cross-entropy.

    Args:
        head: to one logit per class.
        smoothing: share of each label spread evenly over all classes.
    """

    def __init__(self, head: AlignmentHead, *, smoothing: float) -> None:
        super().__init__()
        self.head = head
        self.smoothing = smoothing

    def loss(
        self,
        class_token: Float[Tensor, "b c"],
        label: Int64[Tensor, " b"] | None,
        _teacher_view: Float[Tensor, "b 3 h w"] | None,
        _target: Float[Tensor, "b f"] | None,
        /,
    ) -> Float[Tensor, ""]:
        """Judge the student's class token by the labels.

        Raises:
            ValueError: there is no label.
        """
        if label is None:
            raise ValueError("teacher kind 'labels' needs the label of every image")
        return label_alignment(self.head(class_token), label, smoothing=self.smoothing)


class SelfTeacher(nn.Module):
    """An average of the student's own past teaches it, from another view of the image.

    The averaged encoder belongs to the training loop, which brings its class tokens; the averaged
    head is here. The target is computed from the deviation of an image's features from their mean
    over all images of the step, which keeps images from choosing the same prototype: deviations are
    compared with the prototypes.

    Args:
        head: the student's; the teacher's starts as its copy.
        student_temperature: divides the student's logits.
        teacher_temperature: divides the teacher's logits.
    """

    def __init__(
        self, head: PrototypeHead, *, student_temperature: float, teacher_temperature: float
    ) -> None:
        super().__init__()
        self.head = head
        self.teacher_head = copy.deepcopy(head).requires_grad_(requires_grad=False)
        self.student_temperature = student_temperature
        self.teacher_temperature = teacher_temperature

    @torch.no_grad()
    def target(self, teacher_class_token: Float[Tensor, "b c"]) -> Float[Tensor, "b f"]:
        """Logits that the student is to have for the images of one step.

        Every rank must call it with as many images, and with all of its step at once: each image
        is compared with the mean of them. An image alone has no others to differ from, and its
        target is even.

        Args:
            teacher_class_token: of the averaged encoder.
        """
        features = self.teacher_head.bottleneck(teacher_class_token)
        center = distributed.mean(features.mean(0))
        return self.teacher_head.compare(features - center)

    def loss(
        self,
        class_token: Float[Tensor, "b c"],
        _label: Int64[Tensor, " b"] | None,
        _teacher_view: Float[Tensor, "b 3 h w"] | None,
        target: Float[Tensor, "b f"] | None,
        /,
    ) -> Float[Tensor, ""]:
        """Compare the student's prototypes with the teacher's; no gradient reaches the teacher.

        Raises:
            ValueError: there is no target.
        """
        if target is None:
            raise ValueError("teacher kind 'self' needs the target that its average makes")
        return dino_alignment(
            self.head(class_token),
            target,
            student_temperature=self.student_temperature,
            teacher_temperature=self.teacher_temperature,
        )

    @torch.no_grad()
    def update(self, momentum: float) -> None:
        """Move the teacher's head after the student's, of which it keeps `momentum`."""
        pairs = zip(self.teacher_head.parameters(), self.head.parameters(), strict=True)
        for teacher, student in pairs:
            teacher.lerp_(student, 1 - momentum)


class FeatureTeacher(nn.Module):
    """A frozen vision model teaches its features.

    Args:
        head: to the model's features.
        model: frozen; held, but not registered.
        alignment: loss of the head's output, then the model's features, as `kl_alignment`.
    """

    def __init__(self, head: AlignmentHead, model: FrozenModel, alignment: Alignment) -> None:
        super().__init__()
        self.head = head
        self.model = model
        self.alignment = alignment

    def loss(
        self,
        class_token: Float[Tensor, "b c"],
        _label: Int64[Tensor, " b"] | None,
        teacher_view: Float[Tensor, "b 3 h w"] | None,
        _target: Float[Tensor, "b f"] | None,
        /,
    ) -> Float[Tensor, ""]:
        """Compare the student's class token with the features of the teacher's view.

        Raises:
            ValueError: there is no view for the teacher.
        """
        if teacher_view is None:
            raise ValueError(f"teacher {self.model.path!r} needs its own view of every image")
        return self.alignment(self.head(class_token), self.model.features(teacher_view))


Teacher = LabelTeacher | SelfTeacher | FeatureTeacher


def build_teacher(config: settings.Teacher, *, dim: int, num_classes: int) -> Teacher | None:
    """Make the teacher a configuration asks for.

    Args:
        config: kind and settings.
        dim: channels of the class token.
        num_classes: of the training data; 0 when it has no labels.

    Returns:
        A module on the CPU in training mode, or None for kind `none`.

    Raises:
        ValueError: kind `labels` without labels.
    """
    match config:
        case settings.NoTeacher():
            return None
        case settings.Labels():
            return _label_teacher(config, dim, num_classes)
        case settings.SelfDistillation():
            return SelfTeacher(
                PrototypeHead(dim, config.num_prototypes, config.num_head_layers),
                student_temperature=config.student_temperature,
                teacher_temperature=config.teacher_temperature,
            )
        case settings.HuggingFace():
            return _feature_teacher(config, HuggingFaceTeacher(config.path), dim)
        case settings.TorchScript():
            return _feature_teacher(config, TorchScriptTeacher(config.path), dim)
        case _:
            assert_never(config)


def _label_teacher(config: settings.Labels, dim: int, num_classes: int) -> LabelTeacher:
    """The data's classes as a teacher.

    Raises:
        ValueError: there are none.
    """
    if num_classes < 1:
        raise ValueError(
            f"num_classes ({num_classes}) must be at least 1 for teacher kind 'labels'; give the "
            "data class folders or a label column, or choose teacher kind 'self' or 'none'"
        )
    head = AlignmentHead(dim, num_classes, config.num_head_layers)
    return LabelTeacher(head, smoothing=config.label_smoothing)


def _feature_teacher(
    config: settings.HuggingFace | settings.TorchScript, model: FrozenModel, dim: int
) -> FeatureTeacher:
    """A frozen model as a teacher."""
    head = AlignmentHead(dim, model.out_dim, config.num_head_layers)
    return FeatureTeacher(head, model, _alignment(config.loss))


def _alignment(loss: settings.FeatureLoss) -> Alignment:
    """The loss against a frozen model."""
    match loss:
        case settings.Kl():
            return partial(kl_alignment, temperature=loss.temperature)
        case settings.Dino():
            return partial(
                dino_alignment,
                student_temperature=loss.student_temperature,
                teacher_temperature=loss.teacher_temperature,
            )
        case settings.Cosine():
            return cosine_alignment
        case _:
            assert_never(loss)
