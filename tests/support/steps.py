"""Steps of one side of a tokenizer's training, and runs that have both."""

from dataclasses import replace

from torch import Tensor

from mergevq.config.training import TokenizerRun
from mergevq.data.batches import Batch
from mergevq.runtime.optim import take_steps
from mergevq.training.fit import Number
from mergevq.training.tokenizer_step import TokenizerLearner


def update_tokenizer(
    learner: TokenizerLearner, parts: list[Batch], num_kept: int
) -> tuple[dict[str, Number], list[Tensor]]:
    """Take a step of the tokenizer's side; its numbers, and reconstructions of each part."""
    numbers, proposal, reconstructions = learner.propose_tokenizer(parts, num_kept)
    take_steps(learner.state.step, [proposal])
    return numbers, reconstructions


def update_discriminator(
    learner: TokenizerLearner, parts: list[Batch], fakes: list[Tensor]
) -> dict[str, Number]:
    """Take a step of the discriminator; its numbers."""
    numbers, proposal = learner.propose_discriminator(parts, fakes)
    take_steps(learner.state.step, [proposal])
    return numbers


def judged(run: TokenizerRun) -> TokenizerRun:
    """With an adversary from the first step."""
    loss = replace(
        run.loss,
        perceptual_weight=0.0,
        adversarial_weight=0.1,
        discriminator_start_step=0,
        adversarial_start_step=0,
    )
    return replace(run, loss=loss)
