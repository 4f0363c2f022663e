"""Tests of `mergevq.nn.flow`."""

import math

import pytest
import torch

from mergevq.nn.flow import (
    Guidance,
    clean,
    flow_loss,
    logit_normal,
    mix,
    shift_time,
    solve,
    time_grid,
    unshift_time,
)

MEAN, STD = 1.0, 2.0


def gaussian_velocity(x, time):
    """The exact velocity where data are normal."""
    variance = STD**2 * (1 - time) ** 2 + time**2
    away = (x - (1 - time) * MEAN) / variance
    return time * away - (MEAN + STD**2 * (1 - time) * away)


# ------------------------------------------------------------------------------------------ path


def test_the_path_goes_from_data_to_noise_in_a_straight_line():
    data, noise = torch.randn(2, 3, 4, 4), torch.randn(2, 3, 4, 4)
    assert torch.equal(mix(data, noise, torch.tensor([0.0, 0.0])), data)
    assert torch.equal(mix(data, noise, torch.tensor([1.0, 1.0])), noise)
    time = torch.tensor([0.25, 0.75])
    x = mix(data, noise, time)
    assert torch.allclose(clean(x, noise - data, time), data, atol=1e-6)
    step = (mix(data, noise, time + 1e-2) - x) / 1e-2
    assert torch.allclose(step, noise - data, atol=1e-3)


def test_the_velocity_of_a_gaussian_by_hand():
    x = torch.tensor([2.0])
    velocity = gaussian_velocity(x, 0.5)
    assert float(velocity) == pytest.approx(-2.8)
    assert float(clean(x, velocity, torch.tensor([0.5]))) == pytest.approx(3.4)


def test_the_loss_without_a_prediction_is_the_variance_of_noise_and_data(generator):
    data = 0.5 * torch.randn(64, 3, 16, 16, generator=generator)
    noise = torch.randn(64, 3, 16, 16, generator=generator)
    assert float(flow_loss(torch.zeros_like(data), data, noise)) == pytest.approx(1.25, rel=0.02)
    assert float(flow_loss(noise - data, data, noise)) == 0


# ----------------------------------------------------------------------------------------- times


def test_logit_normal_times_have_the_median_and_the_quartiles_of_their_law():
    uniforms = torch.tensor([0.25, 0.5, 0.75])
    logits = logit_normal(uniforms, -0.8, 2.0).logit()
    assert torch.allclose(logits, torch.tensor([-0.8 - 1.34898, -0.8, -0.8 + 1.34898]), atol=1e-4)
    assert torch.isfinite(logit_normal(torch.tensor([0.0]))).all()


def test_a_shift_moves_times_towards_noise_and_back():
    times = torch.tensor([0.0, 0.25, 0.5, 1.0])
    assert torch.equal(shift_time(times, 1.0), times)
    assert torch.allclose(shift_time(times, 2.0), torch.tensor([0, 0.4, 2 / 3, 1.0]))
    assert torch.allclose(unshift_time(shift_time(times, 2.0), 2.0), times)


def test_the_grid_of_eight_shifted_steps_is_that_of_d_ar():
    data_times = [1 - time for time in time_grid(8, "euler", 2.0)]
    expected = [0, 0.0667, 0.1429, 0.2308, 0.3333, 0.4545, 0.6, 0.7778, 1.0]
    assert data_times == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("solver", ["euler", "sde"])
def test_a_grid_falls_from_one_to_nought_in_as_many_steps(solver):
    grid = time_grid(5, solver)
    assert (grid[0], grid[-1], len(grid)) == (1.0, 0.0, 6)
    assert grid == sorted(grid, reverse=True)


# --------------------------------------------------------------------------------------- solvers


def largest_error(solver, num_steps):
    noise = torch.linspace(-3, 3, 61, dtype=torch.float64)
    made = solve(gaussian_velocity, noise, time_grid(num_steps, solver), solver)
    return float((made - (MEAN + STD * noise)).abs().max())


@pytest.mark.parametrize(
    ("solver", "errors", "order"),
    [
        ("euler", (0.831, 0.429, 0.218, 0.110), 1),
        ("heun", (0.035, 0.0079, 0.0019, 0.00045), 2),
        ("ab2", (0.064, 0.0143, 0.0034, 0.0008), 2),
    ],
)
def test_a_solver_converges_with_its_order(solver, errors, order):
    found = [largest_error(solver, n) for n in (10, 20, 40, 80)]
    assert found == pytest.approx(errors, rel=0.07)
    assert math.log2(found[2] / found[3]) == pytest.approx(order, abs=0.15)


def test_two_steps_of_adams_and_bashforth_weigh_by_the_lengths_of_steps():
    times = [0.0, 0.2, 0.5, 1.0]
    made = solve(lambda _, time: torch.tensor([2 * time]), torch.zeros(1), times, "ab2")
    assert float(made) == pytest.approx(0.96)


@pytest.mark.parametrize("solver", ["euler", "heun", "ab2"])
def test_a_straight_flow_arrives_in_one_step(solver):
    data, noise = torch.randn(2, 3), torch.randn(2, 3)
    made = solve(lambda _x, _t: noise - data, noise, [1.0, 0.0], solver)
    assert torch.allclose(made, data, atol=1e-6)


def test_the_stochastic_solver_gives_the_distribution_of_the_data(generator):
    noise = torch.randn(201, 20_000, generator=generator)
    made = solve(gaussian_velocity, noise[0], time_grid(200, "sde"), "sde", noise[1:].unbind())
    assert float(made.mean()) == pytest.approx(MEAN, abs=0.05)
    assert float(made.std()) == pytest.approx(STD, abs=0.05)


def test_noise_on_the_way_matters_to_the_stochastic_solver_alone():
    x, times = torch.randn(2, 3), [1.0, 0.5, 0.0]
    noise = [torch.zeros(2, 3)], [torch.ones(2, 3)]
    for solver in ("sde", "euler"):
        first, second = (solve(gaussian_velocity, x, times, solver, own) for own in noise)
        assert torch.equal(first, second) == (solver == "euler")


def test_one_step_of_the_best_velocity_is_the_mean_of_the_data():
    noise = torch.linspace(-3, 3, 7)
    made = solve(gaussian_velocity, noise, [1.0, 0.0], "euler")
    assert torch.allclose(made, torch.full((7,), MEAN), atol=1e-6)


# -------------------------------------------------------------------------------------- guidance

CONDITIONAL, UNCONDITIONAL = torch.tensor([[1.0, 1.0]]), torch.tensor([[1.0, 0.0]])


def test_guidance_by_hand():
    plain = Guidance(3.0)(CONDITIONAL, UNCONDITIONAL)
    assert plain.tolist() == [[1, 3]]
    free = Guidance(3.0, projected=True, momentum=0.0, max_norm=1e9)
    assert torch.allclose(free(CONDITIONAL, UNCONDITIONAL), torch.tensor([[0.0, 2.0]]), atol=1e-6)
    assert torch.equal(Guidance(1.0)(CONDITIONAL, UNCONDITIONAL), CONDITIONAL)


def test_projected_guidance_is_limited_and_remembers_the_step_before():
    limited = Guidance(3.0, projected=True, momentum=0.0, max_norm=0.5 * math.sqrt(16384 / 2))
    assert torch.allclose(limited(CONDITIONAL, UNCONDITIONAL), torch.tensor([[0.5, 1.5]]))
    guidance = Guidance(3.0, projected=True, max_norm=1e9)
    guidance(CONDITIONAL, UNCONDITIONAL)
    # Half of the first difference is taken off the second.
    again = guidance(CONDITIONAL, UNCONDITIONAL)
    assert torch.allclose(again, torch.tensor([[0.5, 1.5]]))
