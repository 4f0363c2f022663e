"""Tokens that a flow decoder sees at each time, by their rank.

Source: Gao and Shou 2025, "D-AR: Diffusion via Autoregressive Models" (groups open one after the
other as noise falls, arXiv:2505.23660); Selftok team 2025, "Selftok: Discrete Visual Tokens of
Autoregression, by Diffusion, and for Reasoning" (the first tokens up to a number that rises with
noise, as its code has it, arXiv:2505.07538).

Differs: a hidden token is a learned vector, where D-AR and Selftok leave it out of attention;
groups of any number of tokens are as even as may be.

Shape letters: B batch, N tokens.
"""

import math
from typing import assert_never

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from mergevq.config.parts.flows import Always, Groups, Knots, Schedule

_ROUNDING = 1e-3
"""Added before rounding down: shares of a table are no exact numbers."""


def group_at(time: Float[Tensor, "b"], num_groups: int) -> Int64[Tensor, "b"]:
    """Group that is read at a noise level: the first in noise, the last near the image.

    The first has half the time of others, and the last one and a half times as much.
    """
    return ((1 - time) * num_groups + 0.5).floor().long().clamp(0, num_groups - 1)


def count_at(time: Float[Tensor, "b"], knots: Knots, num_tokens: int) -> Int64[Tensor, "b"]:
    """Tokens that are seen at a noise level, at least one."""
    shares = torch.tensor(knots.shares).to(time.device, non_blocking=True)
    place = time.float() * (len(shares) - 1)
    before = place.floor().clamp(max=len(shares) - 2).long()
    share = torch.lerp(shares[before], shares[before + 1], place - before)
    return 1 + (share * (num_tokens - 1) + _ROUNDING).floor().long()


def visible(
    schedule: Schedule, ranks: Int64[Tensor, "b n"], time: Float[Tensor, "b"]
) -> Bool[Tensor, "b n"] | None:
    """Tokens that are seen; None is all.

    Args:
        schedule: its settings.
        ranks: place of each token among the N of its image.
        time: noise levels without a shift.
    """
    num_tokens = ranks.shape[1]
    match schedule:
        case Always():
            return None
        case Groups():
            groups = ranks * schedule.num_groups // num_tokens
            current = group_at(time, schedule.num_groups)[:, None]
            return groups == current if schedule.current_only else groups <= current
        case Knots():
            return ranks < count_at(time, schedule, num_tokens)[:, None]
        case _:
            assert_never(schedule)


def num_readable(schedule: Groups, times: list[float], num_shown: int, num_tokens: int) -> int:
    """Times, falling from noise, at which all tokens that are read are among the first ones.

    Args:
        schedule: its settings.
        times: noise levels without a shift.
        num_shown: the first tokens that there are.
        num_tokens: N.
    """
    # Tokens of a group g are those of ranks from ceil(g N / G) on.
    count = schedule.num_groups
    ends = [math.ceil((group + 1) * num_tokens / count) for group in range(count)]
    return sum(ends[group] <= num_shown for group in group_at(torch.tensor(times), count))
