"""Tokenizer and heads of losses as one module.

Source: Li et al. 2025, "MergeVQ", section 3 (arXiv:2504.00999).
"""

import functools
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from mergevq.data.batches import Batch
from mergevq.tokenizer.losses.distillation import Distillation
from mergevq.tokenizer.losses.teachers import Teacher
from mergevq.tokenizer.seams import Condition, Regularizer, StepDraws, TokenizerOutput
from mergevq.tokenizer.tokenizer import Tokenizer


class Pass(NamedTuple):
    """Results of one forward pass of the tokenizer's side."""

    output: TokenizerOutput
    """Reconstruction, tokens, source logits."""
    alignment: Float[Tensor, ""]
    """Class token against the teacher; 0 without one."""
    distilled: dict[str, Float[Tensor, ""]]
    """Loss of the distillation, unweighted, by its name; empty without one."""


class Objective(nn.Module):
    """Tokenizer and heads of losses as one module, so that data parallelism wraps them once."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        teacher: Teacher | None,
        regularizer: Regularizer | None = None,
        distillation: Distillation | None = None,
    ) -> None:
        """Hold them."""
        super().__init__()
        self.tokenizer = tokenizer
        self.teacher = teacher
        self.regularizer = regularizer
        self.distillation = distillation

    def forward(  # noqa: PLR0913 - all that differs between steps
        self,
        batch: Batch,
        num_kept: int,
        target: Float[Tensor, "b f"] | None,
        *,
        quantized: bool,
        source_gradient: float,
        recovers: Bool[Tensor, "b"] | None,
        uniforms: Float[Tensor, "b k d"] | None,
        draws: StepDraws | None,
        condition: Condition | None,
    ) -> Pass:
        """Run the tokenizer on the image, and its encoder on the student's view if there is one.

        `target` is that of `SelfTeacher.target`; without `draws` there is no regularizer.
        """
        regularize = None
        if self.regularizer is not None and draws is not None:
            regularize = functools.partial(
                self.regularizer, quantizer=self.tokenizer.quantizer, draws=draws
            )
        output = self.tokenizer(
            batch.image,
            num_kept,
            batch.student_view,
            quantized=quantized,
            source_gradient=source_gradient,
            recovers=recovers,
            uniforms=uniforms,
            regularize=regularize,
            decoder_layer=None if self.distillation is None else self.distillation.decoder_layer,
            condition=condition,
        )
        distilled = {}
        if self.distillation is not None:
            loss = self.distillation.loss(self.tokenizer.encoder, batch.image, output)
            distilled = {self.distillation.name: loss}
        if self.teacher is None:
            zero = output.reconstruction.new_zeros((), dtype=torch.float32)
            return Pass(output, zero, distilled)
        loss = self.teacher.loss(output.summary, batch.label, batch.teacher_view, target)
        return Pass(output, loss, distilled)
