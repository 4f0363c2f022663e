"""Merging of which training finds how many tokens each block merges, at a cost that is given.

Each block but the last has a distribution over numbers of tokens that it may leave; its mean,
rounded up, is the number. In training all tokens stay, and attention weighs each by whether it is
there: in the gradient, by the probability that it is. Outside of training the schedule is fixed and
merges as `merge` does; after the last block K tokens are left in any case.

The numbers are shapes of what follows, so the host reads the distributions, in one read a pass: a
step of training waits for the device, as with no other reducer.

Source: Chen et al. 2023, "DiffRate: Differentiable Compression Rate for Efficient Vision
Transformers", section 3 (arXiv:2305.17997).

Differs: tokens are merged alone, none is pruned, in the order of their similarity and not of the
class token's attention; merged tokens are means by size; the target is a share of the products of a
fixed schedule with the same K, where the authors' is a number of products; numbers are shares of
the grid, so that one schedule serves every K and size; the network is trained with it.

Shape letters: B batch, L grid tokens, N present tokens, K kept tokens, C channels, J candidates.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar, cast

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mergevq.config import parts as settings
from mergevq.data.layouts import Source, canonicalize, merge
from mergevq.nn.blocks import Attended, Attention
from mergevq.nn.rows import take_rows
from mergevq.tokenizer.reducers.matching import (
    legal_schedule,
    match,
    merge_schedule,
    merge_step,
    merging_order,
)
from mergevq.tokenizer.reducers.merge import MergeBlock, MergeState
from mergevq.tokenizer.seams import TokenSet

Number = TypeVar("Number", int, Float[Tensor, ""])
_MAX_LOGIT = 20.0
"""Largest logit of a token that is absent above those that are there: only gradients see it."""
_ROUNDING = 1e-6
"""Share of a token that counts as none when a mean is rounded up."""


@dataclass(frozen=True, slots=True)
class SearchState:
    """State that a block passes on in training, where no token leaves."""

    places: Int64[Tensor, "b n"]
    """Place of each present token among the L, in the order of merging."""
    index: Int64[Tensor, "b l"]
    """Present token of each grid cell."""
    sizes: Float[Tensor, "b m"]
    """Grid cells per token, class token first."""
    present: Float[Tensor, "b m"]
    """1 of a token that is there, 0 of a merged one; the gradient is that of the probability."""


class LearnedMerge(nn.Module):
    """Blocks that merge, and a distribution over the number of tokens that each leaves."""

    def __init__(self, config: settings.LearnedMerge, dim: int) -> None:
        """Make the blocks; the encoder initialises them after its projection."""
        super().__init__()
        self.dim, self.cost = dim, config.cost
        self.blocks = nn.ModuleList(
            MergeBlock(dim, config.num_heads, config.layer_scale, config.norm_eps)
            for _ in range(config.num_layers)
        )
        # Vectors, which no weight decay draws to an even distribution.
        self.logits = nn.ParameterList(
            nn.Parameter(torch.zeros(config.num_candidates)) for _ in range(config.num_layers - 1)
        )
        self.checkpointing = False

    def forward(
        self,
        grid: Float[Tensor, "b l c"],
        class_token: Float[Tensor, "b 1 c"],
        grid_shape: tuple[int, int],  # noqa: ARG002 - merging compares tokens, not places
        num_kept: int,
        *,
        num_layers: int | None = None,
        taps: tuple[int, ...] = (),
    ) -> TokenSet:
        """Run the first `num_layers` blocks (None: all); in training with the loss `cost`."""
        x = torch.cat([class_token, grid], dim=1)
        wanted = self._wanted(grid.shape[1])
        counts = legal_schedule([*wanted, num_kept], grid.shape[1], num_kept)
        if self.training:
            return self._search(x, counts, wanted, num_layers, taps)
        cells = torch.arange(grid.shape[1], device=grid.device).expand(len(x), -1)
        state = MergeState(index=cells, sizes=None)
        tapped = dict.fromkeys(taps, take_rows(x[:, 1:], state.index))
        blocks = list(zip(self.blocks, counts, strict=True))[:num_layers]
        for number, (block, count) in enumerate(blocks, 1):
            x, state = block(x, state, count)
            if number in tapped:
                tapped[number] = take_rows(x[:, 1:], state.index)
        source, order = canonicalize(Source(state.index, x.shape[1] - 1))
        means = tuple(merge(tapped[tap], source) for tap in taps)
        return TokenSet(take_rows(x[:, 1:], order), x[:, 0], source, means)

    def schedule(self, num_tokens: int, num_kept: int) -> list[int]:
        """Tokens that each block merges, so that exactly `num_kept` remain after the last.

        Raises:
            ValueError: K is out of range, or so many blocks cannot get that low.
        """
        return legal_schedule([*self._wanted(num_tokens), num_kept], num_tokens, num_kept)

    def _wanted(self, num_tokens: int) -> list[int]:
        """Tokens that each block but the last is to leave; waits for the device, once."""
        logits = list(self.logits)
        rows = torch.stack(logits).tolist() if logits else []
        return [rounded_mean(row, num_tokens) for row in rows]

    def implied(self, grid_shape: tuple[int, int], num_kept: int, num_images: int) -> None:
        """Nothing: which cells join depends on the image."""

    def _search(
        self,
        x: Float[Tensor, "b m c"],
        counts: list[int],
        wanted: list[int],
        num_layers: int | None,
        taps: tuple[int, ...],
    ) -> TokenSet:
        """Forward pass of training, in which all tokens stay."""
        batch, num_tokens = len(x), x.shape[1] - 1
        cells = torch.arange(num_tokens, device=x.device).expand(batch, -1)
        ones = torch.ones(x.shape[:2], device=x.device)
        state = SearchState(places=cells, index=cells, sizes=ones, present=ones)
        chances = [keep_probability(logits, num_tokens) for logits in self.logits]
        blocks = [cast("MergeBlock", block) for block in self.blocks]
        steps = zip(blocks, counts, [*chances, None], strict=True)
        tapped = dict.fromkeys(taps, x[:, 1:])
        for number, (block, count, chance) in enumerate(list(steps)[:num_layers], 1):
            if self.checkpointing:
                x, state = checkpoint(
                    search_block, block, x, state, count, chance, use_reentrant=False
                )
            else:
                x, state = search_block(block, x, state, count, chance)
            if number in tapped:
                tapped[number] = take_rows(x[:, 1:], state.places.gather(1, state.index))
        source, order = canonicalize(Source(state.index, state.places.shape[1]))
        tokens = take_rows(x[:, 1:], state.places.gather(1, order))
        loss = self.cost_loss(num_tokens, counts, wanted, x.device)
        means = tuple(merge(tapped[tap], source) for tap in taps)
        return TokenSet(tokens, x[:, 0], source, means, {"cost": loss})

    def cost_loss(
        self, num_tokens: int, counts: list[int], wanted: list[int], device: torch.device
    ) -> Float[Tensor, ""]:
        """Squared distance of the cost, over that of the schedule `linear`, from the target.

        Args:
            num_tokens: L.
            counts: tokens that each block merges.
            wanted: tokens that each block but the last is to leave, where halves and K allow it.
            device: of the result.
        """
        remaining = _remaining(num_tokens, counts)
        num_kept, found = remaining[-1], []
        for logits, number, want in zip(self.logits, remaining, wanted, strict=False):
            mean = mean_number(logits.float(), num_tokens)
            # No gradient where halves, K or a block before decide.
            slope = float(number == want)
            found.append(number + slope * (mean - mean.detach()))
        fixed = merge_schedule(num_tokens, num_kept, len(counts))
        linear = products(_remaining(num_tokens, fixed), num_tokens, self.dim)
        last = torch.tensor(float(num_kept)).to(device, non_blocking=True)
        share = products([*found, last], num_tokens, self.dim) / linear
        return (share - self.cost).square()


def _remaining(num_tokens: int, counts: Sequence[int]) -> list[int]:
    """Tokens after each block."""
    return [num_tokens - sum(counts[: layer + 1]) for layer in range(len(counts))]


def candidate_numbers(num_candidates: int, num_tokens: int) -> list[int]:
    """Numbers of tokens that a block may leave, from all down in even steps.

    Args:
        num_candidates: J.
        num_tokens: L.
    """
    steps = range(num_candidates, 0, -1)
    return [-(-num_tokens * step // num_candidates) for step in steps]  # rounded up


def mean_number(logits: Float[Tensor, "j"], num_tokens: int) -> Float[Tensor, ""]:
    """Mean of the distribution over numbers of tokens that are left of L."""
    numbers = logits.new_tensor(candidate_numbers(len(logits), num_tokens))
    return (numbers * logits.softmax(-1)).sum()


def rounded_mean(logits: Sequence[float], num_tokens: int) -> int:
    """The mean of `mean_number`, rounded up: the same number on every device."""
    highest = max(logits)
    shares = [math.exp(logit - highest) for logit in logits]
    numbers = candidate_numbers(len(logits), num_tokens)
    total = math.fsum(share * number for share, number in zip(shares, numbers, strict=True))
    return math.ceil(total / math.fsum(shares) - _ROUNDING)


def keep_probability(logits: Float[Tensor, "j"], num_tokens: int) -> Float[Tensor, "l"]:
    """Probability that the i-th token, counted from 1, is among those that are left of L."""
    numbers = torch.tensor(candidate_numbers(len(logits), num_tokens)).to(
        logits.device, non_blocking=True
    )
    ranks = torch.arange(1, num_tokens + 1, device=logits.device)
    return (logits.float().softmax(-1) * (numbers >= ranks[:, None])).sum(-1)


def products(remaining: Sequence[Number], num_tokens: int, dim: int) -> Number:
    """Products of blocks which leave so many tokens each, in their attention and MLPs.

    Args:
        remaining: tokens after each block, the class token not counted.
        num_tokens: L, before the first.
        dim: channels.
    """
    before = [num_tokens + 1, *(number + 1 for number in remaining[:-1])]
    each = [
        4 * first * dim**2 + 2 * first**2 * dim + 8 * (number + 1) * dim**2
        for first, number in zip(before, remaining, strict=True)
    ]
    return sum(each[1:], start=each[0])


def search_block(
    block: MergeBlock,
    x: Float[Tensor, "b m c"],
    state: SearchState,
    num_merged: int,
    chance: Float[Tensor, "l"] | None,
) -> tuple[Float[Tensor, "b m c"], SearchState]:
    """One block of training: as `MergeBlock`, with all tokens.

    Args:
        block: its weights.
        x: class token and L others, of which some are merged away.
        state: which are there.
        num_merged: tokens to merge away.
        chance: of the i-th token to be left by this block (`keep_probability`); None is certain.
    """
    attended = attend_present(block.attn, block.norm1(x), state.sizes, state.present)
    x = x + block.ls1(attended.tokens)
    keys = take_rows(attended.keys[:, 1:], state.places)
    present = state.present
    if chance is not None:
        present = present * _gates(keys, state.places, num_merged, chance, x.shape[1])
    state = SearchState(state.places, state.index, state.sizes, present)
    if num_merged > 0:
        x, state = _merge(x, keys, state, num_merged)
    return x + block.ls2(block.mlp(block.norm2(x))), state


def attend_present(
    attn: Attention,
    x: Float[Tensor, "b m c"],
    sizes: Float[Tensor, "b m"],
    present: Float[Tensor, "b m"],
) -> Attended:
    """Attention to tokens by size, and by whether they are there; each always sees itself.

    Args:
        attn: its weights.
        x: tokens.
        sizes: grid tokens in each.
        present: 0 or 1; gradients pass to it, from tokens that are absent too.
    """
    batch, num_tokens, dim = x.shape
    heads = (3, attn.num_heads, dim // attn.num_heads)
    query, key, value = attn.qkv(x).reshape(batch, num_tokens, *heads).permute(2, 0, 3, 1, 4)
    logits = (query @ key.mT).float() / math.sqrt(query.shape[-1])
    own = torch.eye(num_tokens, dtype=torch.bool, device=x.device)
    seen = torch.where(own, 1.0, present[:, None, None, :])
    highest = logits.detach().masked_fill(seen.detach() == 0, -torch.inf).amax(-1, keepdim=True)
    shares = (logits - highest).clamp_max(_MAX_LOGIT).exp() * sizes[:, None, None, :] * seen
    shares = shares / shares.sum(-1, keepdim=True)
    mixed = shares.to(value.dtype) @ value
    tokens = attn.proj(mixed.transpose(1, 2).reshape(batch, num_tokens, dim))
    return Attended(tokens, key.mean(1))


def _gates(
    keys: Float[Tensor, "b n d"],
    places: Int64[Tensor, "b n"],
    num_merged: int,
    chance: Float[Tensor, "l"],
    num_tokens: int,
) -> Float[Tensor, "b m"]:
    """1 of each token that a block leaves and 0 of others, with gradients of the probabilities."""
    order = merging_order(keys)
    # The token that is merged first is the last to be kept.
    probability = chance[keys.shape[1] - 1 - order]
    stays = (order >= num_merged).float()
    gates = stays + (probability - probability.detach())
    ones = gates.new_ones(len(keys), num_tokens)
    return ones.scatter(1, places[:, 1::2] + 1, gates)


def _merge(
    x: Float[Tensor, "b m c"], keys: Float[Tensor, "b n d"], state: SearchState, num_merged: int
) -> tuple[Float[Tensor, "b m c"], SearchState]:
    """Write merged tokens where their destinations are; what was merged away stays where it is."""
    batch, num_present, _ = keys.shape
    num_left = num_present - num_merged
    destination = match(keys, num_merged)
    inside = state.places + 1
    tokens, sizes = merge_step(
        take_rows(x, inside), state.sizes.gather(1, inside), destination, num_left
    )
    is_merged = torch.zeros_like(destination, dtype=torch.bool)
    is_merged[:, 1::2] = destination[:, 1::2] >= num_present // 2 - num_merged
    staying = destination.masked_fill(is_merged, num_present).argsort(-1)[:, :num_left]
    places = state.places.gather(1, staying)
    inside = places + 1
    x = x.scatter(1, inside[..., None].expand(batch, num_left, x.shape[2]), tokens)
    return x, SearchState(
        places=places,
        index=destination.gather(1, state.index),
        sizes=state.sizes.scatter(1, inside, sizes),
        present=state.present,
    )
