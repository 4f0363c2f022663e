import pytest
import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile, record_function
from torch.utils.checkpoint import checkpoint

from mergevq.training.profile import by_part, labelled, named_parts, profile_parts

CPU = torch.device("cpu")


class Apply(nn.Module):
    """A function, and another module after it."""

    def __init__(self, function, then=None):
        super().__init__()
        self.function = function
        self.then = then or nn.Identity()

    def forward(self, x):
        return self.then(self.function(x))


def parts_of(step, modules) -> dict[str, list[str]]:
    """Parts of each operation of a step, by its name."""
    found: dict[str, list[str]] = {}
    with labelled(modules), profile(activities=[ProfilerActivity.CPU]) as profiler:
        step()
    for event, part in by_part(profiler.events()):
        found.setdefault(event.name.removeprefix("aten::"), []).append(part)
    return found


def test_an_operation_is_of_the_innermost_part_in_both_passes():
    inner, after = Apply(torch.sigmoid), Apply(torch.erf)
    outer = Apply(torch.tanh, inner)
    x = torch.ones(1, requires_grad=True)
    found = parts_of(
        lambda: after(outer(x)).backward(), {"inner": [inner], "outer": [outer], "after": [after]}
    )
    assert found["tanh"] == found["tanh_backward"] == ["outer"]
    assert found["sigmoid"] == found["sigmoid_backward"] == ["inner"]
    assert found["erf"] == found["exp"] == ["after"]  # The derivative of erf is an exponential.
    assert set(found["torch::autograd::AccumulateGrad"]) == {"other"}


def test_a_recorded_block_is_a_part_and_a_module_in_it_is_another():
    module = Apply(torch.sigmoid)
    x = torch.ones(1, requires_grad=True)

    def step():
        with record_function("block"):
            module(x.tanh()).backward()

    found = parts_of(step, {"module": [module]})
    assert found["tanh"] == found["tanh_backward"] == ["block"]
    assert found["sigmoid"] == found["sigmoid_backward"] == ["module"]


def test_what_is_computed_again_in_the_backward_pass_is_of_its_part():
    first, second = Apply(torch.tanh), Apply(torch.sigmoid)
    x = torch.ones(1, requires_grad=True)

    def step():
        checkpoint(lambda y: second(first(y)), x, use_reentrant=False).backward()

    found = parts_of(step, {"first": [first], "second": [second]})
    assert found["tanh"] == ["first", "first"]
    assert set(found["sigmoid"]) == {"second"}
    assert found["tanh_backward"] == ["first"]


def test_shares_sum_to_one_and_the_longest_part_is_first():
    small, large = Apply(torch.tanh), Apply(lambda x: x @ x)
    x = torch.ones(200, 200)
    parts = profile_parts(
        lambda: large(small(x)), {"small": [small], "large": [large]}, CPU, num_repeats=2
    )
    assert sum(part.share for part in parts) == pytest.approx(1)
    assert {part.name for part in parts} == {"small", "large", "other"}
    assert [part.seconds for part in parts] == sorted((p.seconds for p in parts), reverse=True)


def test_hooks_are_gone_afterwards():
    module = nn.Identity()
    profile_parts(lambda: module(torch.ones(1)), {"module": [module]}, CPU, num_repeats=1)
    assert not module._forward_hooks
    assert not module._forward_pre_hooks


def test_parts_of_a_model_have_at_most_two_names():
    model = nn.Module()
    model.encoder = nn.Module()
    model.encoder.stem = nn.Sequential(nn.Linear(1, 1))
    model.encoder.blocks = nn.ModuleList([nn.Sequential(nn.Linear(1, 1)) for _ in range(2)])
    found = named_parts(model)
    blocks = {"encoder.blocks", "encoder.blocks, between layers"}
    assert set(found) == {"encoder", "encoder.stem", *blocks}
    assert found["encoder.blocks"] == [block[0] for block in model.encoder.blocks]
