"""Every term against its definition, worked by hand."""

import math

import pytest
import torch

from mergevq.config.objective import Gram, LossConfig
from mergevq.data.layouts import Source
from mergevq.tokenizer.losses.terms import reconstruction_loss, source_loss, term_weights, total


def test_reconstruction_loss_is_the_mean_absolute_difference():
    image, reconstruction = torch.zeros(1, 3, 2, 2), torch.full((1, 3, 2, 2), 0.25)
    assert reconstruction_loss(image, reconstruction) == 0.25


def test_source_loss_of_even_logits_is_log_k():
    source = Source(torch.tensor([[0, 1, 1, 0]]), 2)
    assert source_loss(torch.zeros(1, 4, 2), source).item() == pytest.approx(math.log(2))


def test_source_loss_of_a_certain_right_answer_is_zero():
    source = Source(torch.tensor([[0, 1, 1, 0]]), 2)
    logits = 100 * torch.nn.functional.one_hot(source.index, 2).float()
    assert source_loss(logits, source).item() == pytest.approx(0, abs=1e-6)


def test_every_weight_of_the_total_has_an_effect():
    config = LossConfig(
        reconstruction_weight=1.0,
        perceptual_weight=10.0,
        commitment_weight=1e3,
        entropy_weight=1e4,
        source_weight=1e5,
        alignment_weight=1e6,
        gram=Gram(weight=0.5),
    )
    weights = term_weights(config, {"confidence": 2.0}, adversarial_weight=100.0)
    losses = {name: torch.tensor(float(i + 1)) for i, name in enumerate(weights)}
    assert list(losses)[-3:] == ["alignment", "confidence", "gram"]
    assert total(losses, weights) == 1 + 20 + 300 + 4e3 + 5e4 + 6e5 + 7e6 + 16 + 4.5


def test_a_term_without_a_weight_is_an_error_that_names_it():
    with pytest.raises(ValueError, match=r"spread has none; give the settings .* spread_weight"):
        total({"source": torch.tensor(1.0), "spread": torch.tensor(1.0)}, {"source": 1.0})
