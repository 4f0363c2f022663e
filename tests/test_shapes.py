"""The check of shapes that all tests run under."""

import jaxtyping
import pytest
import torch
from beartype import beartype
from jaxtyping import Float
from torch import Tensor

from mergevq.tokenizer.features import require_stage
from mergevq.tokenizer.losses.terms import reconstruction_loss
from tests.support.shapes import NUM_CHECKED, check_first


def of_arrays(first: Float[Tensor, "b c"], other: list[Float[Tensor, "c"]] | None) -> int:
    """A function with shapes."""
    return len(first)


def test_a_wrong_shape_in_the_package_is_an_error():
    with pytest.raises(jaxtyping.TypeCheckError, match="reconstruction_loss"):
        reconstruction_loss(torch.zeros(2, 3, 4, 4), torch.zeros(2, 3, 4, 5))
    assert hasattr(reconstruction_loss, "__wrapped__")
    # Without an array there is nothing to check.
    assert not hasattr(require_stage, "__wrapped__")


def test_the_first_calls_of_a_test_are_checked():
    checked = check_first(of_arrays, typechecker=beartype)
    right, wrong = torch.zeros(2, 3), [torch.zeros(4)]
    with pytest.raises(jaxtyping.TypeCheckError):
        checked(right, wrong)
    for _ in range(NUM_CHECKED - 2):
        assert checked(right, None) == 2
    with pytest.raises(jaxtyping.TypeCheckError):
        checked(right, wrong)
    assert checked(right, wrong) == 2
