"""Groups, schedule, clipping and averages against hand-computed values."""

import math

import pytest
import torch
from torch import nn

from mergevq.config.training import OptimConfig
from mergevq.runtime import optim as module
from mergevq.runtime.optim import (
    Budget,
    Ema,
    NonFiniteGuard,
    build_optimizer,
    check_coverage,
    clip,
    gradient_scaler,
    learning_rate,
    parameter_groups,
    set_learning_rate,
)
from tests.support.reads import host_reads

CPU = torch.device("cpu")
CHANNELS_LAST = torch.channels_last


class Mixed(nn.Module):
    """Every kind of parameter there is."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 2)
        self.conv = nn.Conv2d(3, 2, 1)
        self.norm = nn.LayerNorm(3)
        self.embedding = nn.Embedding(4, 3)
        self.scale = nn.Parameter(torch.ones(3))
        self.frozen = nn.Linear(3, 3).requires_grad_(False)


def one_weight(value: float, dtype: torch.dtype = torch.float32) -> nn.Linear:
    """A module whose only weight has this value."""
    module = nn.Linear(1, 1, bias=False, dtype=dtype)
    nn.init.constant_(module.weight, value)
    return module


def set_weight(module: nn.Linear, value: float) -> None:
    nn.init.constant_(module.weight, value)


# ------------------------------------------------------------------------------------ optimizer


def test_only_matrices_decay_and_frozen_parameters_are_left_out():
    module = Mixed()
    decay, rest = parameter_groups(module, 0.1)
    assert (decay["weight_decay"], rest["weight_decay"]) == (0.1, 0.0)
    assert decay["params"] == [module.linear.weight, module.conv.weight]
    expected = [module.scale, module.linear.bias, module.conv.bias]
    expected += [module.norm.weight, module.norm.bias, module.embedding.weight]
    assert {id(p) for p in rest["params"]} == {id(p) for p in expected}


def test_without_decay_there_is_one_group_with_every_parameter_once():
    module = Mixed()
    (group,) = parameter_groups(nn.ModuleList([module, module.linear]), 0.0)
    assert len(group["params"]) == len({id(p) for p in group["params"]}) == 8


def test_one_optimizer_takes_several_modules():
    first, second = nn.Linear(2, 2), nn.Linear(2, 2)
    optimizer = build_optimizer([first, second], OptimConfig(betas=(0.5, 0.9)), batch_size=8)
    check_coverage([first, second], [optimizer])
    assert optimizer.defaults["betas"] == (0.5, 0.9)


def test_a_step_decays_matrices_towards_zero_and_nothing_else():
    module = nn.Linear(2, 2)
    before = [parameter.detach().clone() for parameter in (module.weight, module.bias)]
    config = OptimConfig(lr=0.1, base_batch_size=4, weight_decay=0.5)
    optimizer = build_optimizer([module], config, batch_size=8)
    module.weight.grad, module.bias.grad = torch.zeros(2, 2), torch.zeros(2)
    optimizer.step()
    # With no gradient AdamW only multiplies by 1 - lr * decay, here 1 - 0.2 * 0.5.
    torch.testing.assert_close(module.weight.detach(), 0.9 * before[0])
    assert torch.equal(module.bias, before[1])


def test_every_trainable_parameter_is_in_exactly_one_optimizer():
    first, second = nn.Linear(2, 2), nn.Bilinear(2, 2, 2)
    optimizers = [build_optimizer([m], OptimConfig(), batch_size=8) for m in (first, second)]
    check_coverage([first, second], optimizers)
    with pytest.raises(RuntimeError, match=r"in none: Bilinear\.weight, Bilinear\.bias; in sev"):
        check_coverage([first, second], optimizers[:1])
    with pytest.raises(RuntimeError, match=r"in several: Linear\.weight, Linear\.bias; of no"):
        check_coverage([first, second], [optimizers[0], *optimizers])
    with pytest.raises(RuntimeError, match=r"of no given module or frozen: 2"):
        check_coverage([first], optimizers)


# ------------------------------------------------------------------------------------- schedule


def test_the_rate_scales_with_the_batch_only_if_it_has_a_base():
    assert learning_rate(0, OptimConfig(lr=1.0), 10, 64) == 1.0
    assert learning_rate(0, OptimConfig(lr=1.0, base_batch_size=256), 10, 64) == 0.25
    assert learning_rate(0, OptimConfig(lr=1.0, base_batch_size=32), 10, 64) == 2.0


def test_warmup_rises_in_equal_parts_from_above_zero_to_the_peak():
    config = OptimConfig(lr=1.0, warmup_steps=4)
    rates = [learning_rate(step, config, 10, 64) for step in range(6)]
    assert rates == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0, 1.0])


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("constant", [1, 1, 1, 1, 1]),
        ("linear", [1, 0.8, 0.6, 0.4, 0.2]),
        ("cosine", [1, 0.6 + 0.4 * math.sqrt(0.5), 0.6, 0.6 - 0.4 * math.sqrt(0.5), 0.2]),
        ("step", [1, 1, 1, 0.1, 0.01]),
    ],
)
def test_schedules_by_hand(schedule, expected):
    config = OptimConfig(
        lr=1.0, schedule=schedule, milestones=(0.5, 0.8), final_lr_ratio=0.2, warmup_steps=0
    )
    assert [learning_rate(s, config, 5, 64) for s in range(5)] == pytest.approx(expected)


@pytest.mark.parametrize("schedule", ["cosine", "linear"])
def test_decay_starts_after_warmup_and_stays_at_its_end(schedule):
    config = OptimConfig(lr=2.0, schedule=schedule, warmup_steps=3, final_lr_ratio=0.1)
    rates = [learning_rate(step, config, 10, 64) for step in range(12)]
    assert rates[3] == max(rates) == 2.0
    assert rates[4] < 2.0
    assert rates[9:] == pytest.approx([0.2, 0.2, 0.2])


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine", "step"])
def test_a_run_shorter_than_its_warmup_has_rates(schedule):
    config = OptimConfig(lr=1.0, schedule=schedule, warmup_steps=5)
    rates = [learning_rate(step, config, 2, 64) for step in range(2)]
    assert rates == pytest.approx([1 / 6, 2 / 6])


def test_setting_the_rate_reaches_every_group():
    optimizer = build_optimizer([Mixed()], OptimConfig(weight_decay=0.1), batch_size=8)
    set_learning_rate(optimizer, 0.25)
    assert [group["lr"] for group in optimizer.param_groups] == [0.25, 0.25]


def test_a_part_with_a_ratio_learns_at_its_share_of_the_rate():
    whole = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 2))
    optimizer = build_optimizer([whole], OptimConfig(weight_decay=0.1), 8, {whole[0]: 0.1})
    check_coverage([whole], [optimizer])
    set_learning_rate(optimizer, 0.5)
    rates = {
        parameter: (group["lr"], group["weight_decay"])
        for group in optimizer.param_groups
        for parameter in group["params"]
    }
    assert rates[whole[0].weight] == (pytest.approx(0.05), 0.1)
    assert rates[whole[0].bias] == (pytest.approx(0.05), 0.0)
    assert rates[whole[1].weight] == (0.5, 0.1)
    assert rates[whole[1].bias] == (0.5, 0.0)


def test_a_ratio_of_1_leaves_the_groups_as_they_are():
    whole = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 2))
    optimizer = build_optimizer([whole], OptimConfig(), 8, {whole[0]: 1.0})
    (group,) = optimizer.param_groups
    assert "lr_ratio" not in group
    assert list(map(id, group["params"])) == list(map(id, whole.parameters()))


# ------------------------------------------------------------------------------------ gradients


def parameters_with_gradients(*gradients: list[float]) -> list[nn.Parameter]:
    parameters = [nn.Parameter(torch.zeros(len(gradient))) for gradient in gradients]
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad = torch.tensor(gradient)
    return [*parameters, nn.Parameter(torch.zeros(3))]


def test_clipping_scales_all_gradients_together():
    parameters = parameters_with_gradients([3.0], [0.0, 4.0])
    assert clip(iter(parameters), 1.0).item() == pytest.approx(5.0)
    assert parameters[0].grad.tolist() == pytest.approx([0.6])
    assert parameters[1].grad.tolist() == pytest.approx([0.0, 0.8])


@pytest.mark.parametrize("max_norm", [None, 6.0])
def test_gradients_below_the_limit_or_without_one_stay(max_norm):
    parameters = parameters_with_gradients([3.0], [0.0, 4.0])
    assert clip(parameters, max_norm).item() == pytest.approx(5.0)
    assert parameters[1].grad.tolist() == [0.0, 4.0]


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_norm_that_is_not_finite_is_returned(bad):
    assert not clip(parameters_with_gradients([1.0], [bad]), 1.0).isfinite()


def terms(**values: float) -> dict[str, torch.Tensor]:
    return {name: torch.tensor(value) for name, value in values.items()}


def test_the_guard_counts_skipped_steps_and_forgives_after_a_good_one():
    guard = NonFiniteGuard(limit=3)
    verdicts = [
        guard.check(step, terms(loss=1.0, norm=norm))
        for step, norm in enumerate([1.0, math.nan, math.inf, 1.0, math.nan, -math.inf])
    ]
    skipped = [verdict.is_skipped for verdict in verdicts]
    assert skipped == [False, True, True, False, True, True]
    assert [bool(verdict.skip) for verdict in verdicts] == skipped
    assert guard.state_dict() == {"num_skipped": 4, "num_in_a_row": 2}


def test_the_guard_gives_up_naming_step_and_terms():
    guard = NonFiniteGuard(limit=2)
    bad = terms(reconstruction_loss=1.0, entropy_loss=math.nan, norm=math.inf)
    guard.check(6, bad)
    message = r"2 steps in a row .* up to step 7: entropy_loss \(nan .*\), norm \(inf .*\); lower"
    with pytest.raises(RuntimeError, match=message):
        guard.check(7, bad)


def test_the_guard_remembers_across_a_restart():
    guard, resumed = NonFiniteGuard(limit=2), NonFiniteGuard(limit=2)
    guard.check(0, terms(loss=math.nan))
    resumed.load_state_dict(guard.state_dict())
    with pytest.raises(RuntimeError, match="2 steps in a row"):
        resumed.check(1, terms(loss=math.nan))


def test_a_guard_reads_every_few_steps_and_when_asked():
    guard, warned = NonFiniteGuard(limit=9, read_every=3), []
    verdicts = []
    with host_reads() as reads:
        for step, norm in enumerate([1.0, math.nan]):
            verdicts.append(guard.check(step, terms(norm=norm), warned.append))
    assert reads == []
    assert [verdict.is_skipped for verdict in verdicts] == [None, None]
    assert (guard.num_skipped, warned) == (0, [])
    verdicts.append(guard.check(2, terms(norm=math.inf), warned.append))
    assert [verdict.is_skipped for verdict in verdicts] == [False, True, True]
    assert [verdict.skip.item() for verdict in verdicts] == [0.0, 1.0, 1.0]
    assert (guard.num_skipped, guard.num_in_a_row, warned) == (2, 2, [1, 2])
    guard.check(3, terms(norm=1.0))
    guard.read()
    assert (guard.num_skipped, guard.num_in_a_row) == (2, 0)


def check_all(guard: NonFiniteGuard, steps: list[dict[str, torch.Tensor]]) -> None:
    for step, each in enumerate(steps):
        guard.check(step, each)


def test_reading_late_gives_up_at_the_same_step_with_the_same_words():
    bad = [terms(loss=1.0, norm=1.0), *[terms(loss=math.nan, norm=math.inf)] * 5]
    said = []
    for read_every in (1, 4):
        guard = NonFiniteGuard(limit=2, read_every=read_every)
        with pytest.raises(RuntimeError) as caught:
            check_all(guard, bad)
        said.append(str(caught.value))
    assert said[0] == said[1]
    assert "2 steps in a row were not finite, up to step 2: loss (nan" in said[0]


def weights_and_state(optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    """Everything that a step of an optimizer changes."""
    return [
        tensor
        for weight, moments in optimizer.state.items()
        for tensor in (weight.detach(), *(moments[name] for name in sorted(moments)))
    ]


@pytest.mark.parametrize("read_every", [1, 10])
def test_a_skipped_step_leaves_the_bits_of_weights_moments_and_averages(read_every):
    layer = nn.Sequential(nn.Linear(33, 7), nn.Conv2d(2, 3, 3).to(memory_format=CHANNELS_LAST))
    optimizer = build_optimizer([layer], OptimConfig(lr=0.1), 1)
    guard, ema = NonFiniteGuard(limit=9, read_every=read_every), Ema(layer, decay=0.5)

    def step(gradient: float) -> list[torch.Tensor]:
        for number, weight in enumerate(layer.parameters()):
            weight.grad = torch.full_like(weight, gradient + number)
        norm = clip(layer.parameters(), 1.0)
        verdict = guard.check(0, {"norm": norm})
        verdict.step(optimizer)
        ema.update(verdict)
        return [each.clone() for each in (*weights_and_state(optimizer), *ema.shadow.values())]

    first = step(1.0)
    assert all(map(torch.equal, first, step(math.nan)))
    second = step(2.0)
    assert not any(map(torch.equal, first, second))
    guard.read()
    assert ema.state_dict()["num_updates"] == 2


@pytest.mark.parametrize("read_every", [1, 10])
def test_any_change_is_undone_to_the_bit(read_every):
    extremes = [math.nan, math.inf, -math.inf, -0.0, 0.0, 3e38, 1e-45, 1.0]
    tensors = [
        torch.tensor(extremes),
        torch.tensor(extremes, dtype=torch.bfloat16),
        torch.tensor(extremes, dtype=torch.float64)[::2],
        torch.tensor([-(2**31), 2**31 - 1, 0], dtype=torch.int32),
        torch.tensor([-(2**63), 2**63 - 1, 0]),
        torch.tensor([True, False]),
        torch.zeros(()),
    ]
    before = [each.clone() for each in tensors]
    guard = NonFiniteGuard(limit=9, read_every=read_every)

    def change() -> None:
        for each in tensors:
            each.copy_(each.flip(0) if each.ndim else each + 1)

    guard.check(0, terms(loss=math.nan)).change(tensors, change)
    assert [bits(each) for each in tensors] == [bits(each) for each in before]
    guard.check(1, terms(loss=0.0)).change(tensors, change)
    assert [bits(each) for each in tensors] == [
        bits(each.flip(0) if each.ndim else each + 1) for each in before
    ]


def bits(tensor: torch.Tensor) -> bytes:
    """Memory of a tensor, which tells NaN and the two zeros apart."""
    return tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes()


def test_an_optimizer_that_does_not_skip_by_itself_is_refused():
    optimizer = torch.optim.AdamW([nn.Parameter(torch.ones(1))])
    verdict = NonFiniteGuard(limit=9, read_every=2).check(0, terms(loss=1.0))
    with pytest.raises(ValueError, match=r"AdamW must be fused .* read_every=1"):
        verdict.step(optimizer)
    NonFiniteGuard(limit=9).check(0, terms(loss=1.0)).step(optimizer)


def test_only_float16_scales_the_loss():
    assert gradient_scaler(CPU, torch.float16).is_enabled()
    assert not gradient_scaler(CPU, torch.bfloat16).is_enabled()
    assert not gradient_scaler(CPU, None).is_enabled()
    assert gradient_scaler(CPU, None).scale(torch.tensor(2.0)).item() == 2.0


# ------------------------------------------------------------------------------ weight averages


def test_the_average_by_hand():
    module = one_weight(0.0)
    ema = Ema(module, decay=0.15)
    set_weight(module, 1.0)
    ema.update()  # keeps min(0.15, 1/10)
    assert ema.shadow["weight"].item() == pytest.approx(0.9)
    set_weight(module, 2.0)
    ema.update()  # keeps min(0.15, 2/11)
    assert ema.shadow["weight"].item() == pytest.approx(0.15 * 0.9 + 0.85 * 2)
    assert module.weight.item() == 2.0


def test_a_short_run_forgets_its_start():
    module = one_weight(100.0)
    ema = Ema(module, decay=0.9999)
    set_weight(module, 1.0)
    for _ in range(100):
        ema.update()
    assert ema.shadow["weight"].item() == pytest.approx(1.0, abs=1e-3)


def test_a_low_precision_module_is_averaged_in_float32():
    module = one_weight(1.0, torch.bfloat16)
    ema = Ema(module, decay=0.999)
    ema.num_updates = 10**6
    set_weight(module, 1.0078125)  # the next bfloat16
    ema.update()
    assert ema.shadow["weight"].dtype == torch.float32
    assert ema.shadow["weight"].item() == pytest.approx(1 + 0.0078125e-3, abs=1e-7)


def test_buffers_are_averaged_and_counters_are_not():
    module = nn.BatchNorm1d(1)
    ema = Ema(module, decay=0.5)
    module.running_mean = torch.tensor([10.0])  # replaced, not filled
    module.num_batches_tracked.fill_(7)
    ema.update()
    assert ema.shadow["running_mean"].item() == pytest.approx(9.0)
    assert "num_batches_tracked" not in ema.shadow


def test_swapping_lends_the_averages_and_gives_the_weights_back():
    module = one_weight(0.0)
    ema = Ema(module, decay=0.999)
    set_weight(module, 1.0)
    ema.update()
    set_weight(module, 3.0)
    with ema.swap():
        assert module(torch.ones(1, 1)).item() == pytest.approx(0.9)
    assert module.weight.item() == 3.0
    assert ema.shadow["weight"].item() == pytest.approx(0.9)


def test_a_failed_evaluation_gives_the_weights_back():
    module = one_weight(0.0)
    ema = Ema(module, decay=0.999)
    set_weight(module, 3.0)

    def evaluate() -> None:
        with ema.swap():
            raise KeyError

    with pytest.raises(KeyError):
        evaluate()
    assert module.weight.item() == 3.0


def test_averages_continue_after_a_restart():
    module = one_weight(0.0)
    ema, resumed = Ema(module, decay=0.9), Ema(module, decay=0.9)
    set_weight(module, 1.0)
    ema.update()
    resumed.load_state_dict(ema.state_dict())
    set_weight(module, 5.0)
    ema.update()
    resumed.update()
    assert resumed.num_updates == 2
    assert torch.equal(resumed.shadow["weight"], ema.shadow["weight"])
    with pytest.raises(ValueError, match=r"the averaged weights:\n.*missing \(1\): weight"):
        ema.load_state_dict({"num_updates": 1, "shadow": {}})


# --------------------------------------------------------------------------- time as a budget


@pytest.fixture
def clock(monkeypatch):
    """The time that is shown, in a list of one number."""
    now = [100.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    return now


def test_without_a_limit_places_are_the_steps(clock):
    budget = Budget(num_steps=10)
    budget.start()
    clock[0] += 1e9
    budget.update()
    assert [budget.place(step) for step in (0, 4, 9)] == [0, 4, 9]
    assert (budget.seconds, budget.share, budget.numbers()) == (0.0, 0.0, {})
    assert not budget.is_used(9)
    assert budget.is_used(10)


@pytest.mark.parametrize(
    ("seconds", "step", "place"),
    [(0, 0, 0), (0, 7, 7), (59, 3, 49), (60, 3, 50), (60, 70, 70), (119.9, 3, 99), (500, 3, 99)],
)
def test_the_place_is_the_larger_share_of_time_and_of_steps(seconds, step, place):
    budget = Budget(num_steps=100, max_minutes=2.0, seconds=float(seconds))
    assert budget.place(step) == place
    assert budget.is_used(step) == (seconds >= 120)
    assert budget.numbers() == {"time_used": seconds / 120}


def test_time_is_counted_over_stops_and_not_between_them(clock):
    first = Budget(num_steps=100, max_minutes=1.0)
    first.start()
    clock[0] += 12.0
    first.update()
    assert first.share == 0.2
    second = Budget(num_steps=100, max_minutes=1.0)
    second.load_state_dict(first.state_dict())
    clock[0] += 1e6
    second.start()
    clock[0] += 3.0
    second.update()
    assert second.seconds == 15.0


def test_every_rank_has_the_main_ranks_time(clock, monkeypatch):
    asked = []
    monkeypatch.setattr(module.distributed, "is_main", lambda: False)
    monkeypatch.setattr(
        module.distributed, "sum", lambda own: (asked.append(float(own)), own + 15.0)[1]
    )
    budget = Budget(num_steps=100, max_minutes=1.0)
    budget.start()
    clock[0] += 45.0
    budget.update()
    assert (asked, budget.place(0)) == ([0.0], 25)
