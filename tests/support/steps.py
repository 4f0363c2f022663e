"""Steps of one side of a tokenizer's training."""

from torch import Tensor

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
