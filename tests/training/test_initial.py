from dataclasses import replace

import pytest
import torch

from mergevq.config.recipes.tiny64 import tiny64_gr
from mergevq.tokenizer.tokenizer import Tokenizer
from mergevq.training.initial import initialize_from
from tests.support.small import shrink


@pytest.mark.parametrize(
    ("name", "value", "needed"),
    [
        ("num_heads", 4, 2),
        ("num_decoder_heads", 4, 2),
        ("num_source_heads", 4, 2),
        ("merge_shape", "square", "linear"),
        ("position_embedding", True, False),
        ("transformer_norm_eps", 1e-05, 1e-06),
        ("patch_norm_eps", 1e-06, 1e-05),
    ],
)
def test_starting_from_another_architecture_is_refused_where_shapes_agree(
    tmp_path, name, value, needed
):
    run = shrink(tiny64_gr())
    Tokenizer(run.model).save_pretrained(tmp_path)
    mine = Tokenizer(replace(run.model, **{name: value}))
    before = {name: tensor.clone() for name, tensor in mine.state_dict().items()}
    with pytest.raises(ValueError, match=rf"model.{name} \({value}\) must be {needed}, as in"):
        initialize_from(mine, tmp_path)
    after = mine.state_dict()
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())


def test_starting_from_another_width_is_refused_with_the_weights_that_do_not_fit(tmp_path):
    run = shrink(tiny64_gr())
    Tokenizer(replace(run.model, num_bits=7)).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"do not fit Tokenizer:\n.*to_latents.weight: saved \(7"):
        initialize_from(Tokenizer(run.model), tmp_path)
