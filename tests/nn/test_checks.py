"""Checks of numbers: what is wrong is named on a CPU, and nothing is read elsewhere."""

import pytest
import torch

from mergevq.nn.checks import require_all, require_finite, require_range


def message(low: int, high: int) -> str:
    return f"values ({low} to {high})"


@pytest.mark.parametrize("values", [[0, 5], [5], [], [[1, 2], [3, 0]]])
def test_numbers_in_the_range_pass(values):
    require_range(torch.tensor(values, dtype=torch.int64), 5, message)


@pytest.mark.parametrize(
    ("values", "highest", "named"), [([0, 6], 5, "0 to 6"), ([-1], 5, "-1 to -1")]
)
def test_a_number_beyond_the_range_is_named(values, highest, named):
    with pytest.raises(ValueError, match=rf"values \({named}\)"):
        require_range(torch.tensor(values), highest, message)


def test_the_largest_range_is_that_of_the_type():
    require_range(torch.tensor([2**63 - 1]), 2**63 - 1, message)
    with pytest.raises(ValueError, match=r"-9223372036854775808 to"):
        require_range(torch.tensor([-(2**63)]), 2**63 - 1, message)


def test_a_condition_holds_everywhere():
    require_all(torch.tensor([True, True]), "wrong")
    with pytest.raises(ValueError, match="wrong"):
        require_all(torch.tensor([True, False]), "wrong")


def test_a_device_is_not_waited_for():
    require_range(torch.empty(3, dtype=torch.int64, device="meta"), 5, message)
    require_all(torch.empty(3, dtype=torch.bool, device="meta"), "wrong")
    require_finite("codes", torch.empty(3, device="meta"))


def test_a_network_that_gives_nan_is_broken():
    require_finite("codes", torch.ones(2))
    with pytest.raises(RuntimeError, match="codes are not finite"):
        require_finite("codes", torch.tensor([1.0, torch.nan]))
