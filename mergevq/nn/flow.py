"""Rectified flow: the path between data and noise, times to train at, and solvers along the path.

Source: Liu et al. 2023, "Flow Straight and Fast: Learning to Generate and Transfer Data with
Rectified Flow", section 2 (arXiv:2209.03003); Esser et al. 2024, "Scaling Rectified Flow
Transformers for High-Resolution Image Synthesis", section 3.1 (times and shift, arXiv:2403.03206);
Ren et al. 2025, "Beyond Next-Token: Next-X Prediction for Autoregressive Visual Generation",
section 3 (the stochastic solver, arXiv:2502.20388); Sadat et al. 2025, "Eliminating Oversaturation
and Artifacts of High Guidance Scales in Diffusion Models", section 4 (arXiv:2410.02416).

A time is a noise level everywhere, whatever the source has: x_t = (1 - t) x + t e with noise e, and
the velocity is dx_t/dt = e - x. At 1 there is noise alone.

Differs: two steps of Adams and Bashforth weigh velocities by the lengths of both steps, where D-AR
has 3/2 and -1/2 on uneven steps too, which is of first order; projected guidance is computed in
single precision, and its largest difference grows with the number of elements.

Shape letters: B images, S steps.
"""

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

Solver = Literal["euler", "heun", "ab2", "sde"]
Velocity = Callable[[Float[Tensor, "b *d"], float], Float[Tensor, "b *d"]]
"""Velocity at a point of each image, all at one time."""

_LAST_NOISY_TIME = 0.04
"""Time from which the stochastic solver takes one step without noise."""
_PROJECTED_NORM = 2.5
"""Largest norm of the difference in projected guidance, for `_PROJECTED_ELEMENTS` elements."""
_PROJECTED_ELEMENTS = 16 * 32 * 32
_PROJECTED_MOMENTUM = -0.5
"""Share of the difference before that projected guidance adds."""


def mix(
    data: Float[Tensor, "b *d"], noise: Float[Tensor, "b *d"], time: Float[Tensor, "b"]
) -> Float[Tensor, "b *d"]:
    """Points on the straight path from data (time 0) to noise (time 1)."""
    share = _per_image(time, data)
    return (1 - share) * data + share * noise


def clean(
    x: Float[Tensor, "b *d"], velocity: Float[Tensor, "b *d"], time: Float[Tensor, "b"]
) -> Float[Tensor, "b *d"]:
    """The data that points and their velocities lead to in one straight step."""
    return x - _per_image(time, x) * velocity


def flow_loss(
    velocity: Float[Tensor, "b *d"], data: Float[Tensor, "b *d"], noise: Float[Tensor, "b *d"]
) -> Float[Tensor, ""]:
    """Mean squared error of predicted velocities over all elements, in float32."""
    return (velocity.float() - (noise - data).float()).square().mean()


# ----------------------------------------------------------------------------------------- times


def logit_normal(
    uniforms: Float[Tensor, "b"], mean: float = 0.0, std: float = 1.0
) -> Float[Tensor, "b"]:
    """Times whose logits are normal, by uniform numbers in [0, 1)."""
    return (mean + std * torch.special.ndtri(uniforms)).sigmoid()


def shift_time(time: Float[Tensor, "*b"], shift: float) -> Float[Tensor, "*b"]:
    """Times moved towards noise: s t / (1 + (s - 1) t) for a shift s of 1 or more; 1 is none."""
    return shift * time / (1 + (shift - 1) * time)


def unshift_time(time: Float[Tensor, "*b"], shift: float) -> Float[Tensor, "*b"]:
    """Inverse of `shift_time`."""
    return time / (shift - (shift - 1) * time)


def time_grid(num_steps: int, solver: Solver, shift: float = 1.0) -> list[float]:
    """Times of a solver from 1 to 0, one more than steps, at even distances before the shift.

    The stochastic solver goes to 0.04 by all steps but the last.
    """
    low = _LAST_NOISY_TIME if solver == "sde" else 0.0
    count = num_steps - 1 if solver == "sde" else num_steps
    even = [1 - (1 - low) * i / count for i in range(count)]
    even += [low, 0.0] if solver == "sde" else [0.0]
    return [shift * t / (1 + (shift - 1) * t) for t in even]


# --------------------------------------------------------------------------------------- solvers


def solve(
    velocity: Velocity,
    x: Float[Tensor, "b *d"],
    times: Sequence[float],
    solver: Solver,
    noise: Sequence[Float[Tensor, "b *d"]] = (),
) -> Float[Tensor, "b *d"]:
    """Follow the flow along falling times.

    Args:
        velocity: at a point and a time.
        x: points at the first time.
        times: `time_grid`.
        solver: `euler` and `ab2` ask for one velocity a step, `heun` for two. `sde` adds noise on
            the way, of which one step to 0 is free.
        noise: for each step but the last, of `sde` alone.
    """
    before: tuple[Tensor, float] | None = None
    for i, (time, then) in enumerate(itertools.pairwise(times)):
        step, v = then - time, velocity(x, time)
        if solver == "heun":
            v = (v + velocity(x + step * v, then)) / 2
        elif solver == "sde" and then > 0:
            x = x + step * ((2 - time) * v + x) + math.sqrt(-2 * time * step) * noise[i]
            continue
        own = v
        if solver == "ab2" and before is not None:
            ratio = step / before[1] / 2
            v = (1 + ratio) * v - ratio * before[0]
        x, before = x + step * v, (own, step)
    return x


# -------------------------------------------------------------------------------------- guidance


class Guidance:
    """Velocities with a condition, pushed away from those without; one object for one solution.

    Args:
        scale: 1 is no push.
        projected: leave out the part of the difference that is parallel to the conditional
            velocity, limit the rest, and take off half of the difference of the step before
            (adaptive projected guidance): large scales then do not saturate.
    """

    def __init__(
        self,
        scale: float,
        *,
        projected: bool = False,
        momentum: float = _PROJECTED_MOMENTUM,
        max_norm: float = _PROJECTED_NORM,
    ) -> None:
        self.scale, self.projected = scale, projected
        self.momentum, self.max_norm = momentum, max_norm
        self.difference: Tensor | None = None

    def __call__(
        self, conditional: Float[Tensor, "b *d"], unconditional: Float[Tensor, "b *d"]
    ) -> Float[Tensor, "b *d"]:
        """The velocity to follow."""
        difference = conditional - unconditional
        if not self.projected:
            return unconditional + self.scale * difference
        if self.difference is not None:
            difference = difference + self.momentum * self.difference
        self.difference = difference
        rows = difference.flatten(1)
        most = self.max_norm * math.sqrt(rows.shape[1] / _PROJECTED_ELEMENTS)
        rows = rows * (most / rows.norm(dim=1, keepdim=True).clamp_min(most))
        along = torch.nn.functional.normalize(conditional.flatten(1), dim=1)
        rows = rows - (rows * along).sum(1, keepdim=True) * along
        return conditional + (self.scale - 1) * rows.reshape(conditional.shape)


def _per_image(time: Float[Tensor, "b"], x: Float[Tensor, "b *d"]) -> Tensor:
    """Times with an axis for each axis of points."""
    return time.reshape(-1, *[1] * (x.ndim - 1))
