"""Sampling from a generator: prefill, decode, guidance, and the numbers that decide a draw.

Source: Li et al. 2025, "MergeVQ", section 3.4 (arXiv:2504.00999); Pang et al. 2024, "RandAR",
sections 3.3 and 4 (parallel decoding, in-painting, arXiv:2412.01827); Ho and Salimans 2022,
"Classifier-Free Diffusion Guidance", section 3.2 (arXiv:2207.12598).

Image k of a run depends on (seed, k) alone: its uniform numbers are drawn before the batch it is
in is known, and a value is the place of such a number in the distribution function.

Differs: tokens that RandAR decodes in one pass do not see each other's instructions, so each has
exactly the distribution that training gave it; RandAR's code lets later ones see earlier ones.

Shape letters: B images, R rows (B, or 2B with guidance: conditional ones first), L grid cells,
K kept tokens, T tokens of a sequence, P parts of a token, C channels, S slots of a cache, N new
inputs, M tokens decoded in one pass, V values of a part.
"""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple, TypeVar

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from mergevq.config.generator import SamplingSettings
from mergevq.data.codes import indices_to_subindices
from mergevq.generator.autoregressive import Generator, legal_gaps
from mergevq.generator.cache import FullCache, SlotCache
from mergevq.runtime.random import numbered_seed

Number = TypeVar("Number", int, float)

Restriction = Callable[[int, list[Tensor]], Tensor | None]
"""Given a part and the parts chosen before it, which of its values are allowed; None is all."""


class Sampled(NamedTuple):
    """Token sequences from a generator."""

    indices: Int64[Tensor, "b t"]
    """All cells in raster order (`raster`, `merge`) or the kept tokens in canonical order."""
    source_index: Int64[Tensor, "b l"] | None
    """In order `merge` which of its distinct tokens, in canonical order, each cell is."""
    anchors: Int64[Tensor, "b t"] | None
    """In order `anchor` the cell at which each kept token opens."""
    num_forward: int
    """Passes through the transformer, each for the whole batch."""
    kv_bytes: int
    """Memory of the cache."""


class Draws(NamedTuple):
    """The random numbers of a batch of images."""

    uniforms: Float[Tensor, "b t p"]
    """In [0, 1), one for each part of each token."""
    order: Int64[Tensor, "b t"]
    """A permutation of the tokens."""


def image_seed(seed: int, image_id: int) -> int:
    """Seed of one image of a run, in [0, 2**32): distinct for the first 2**32 images."""
    return numbered_seed(f"{seed}", image_id) % 2**32


def draw(
    seed: int, image_ids: Sequence[int], num_tokens: int, num_parts: int, device: torch.device
) -> Draws:
    """All random numbers of some images of a run, each image's from its own seed."""
    uniforms, orders = [], []
    for image_id in image_ids:
        numbers = torch.Generator().manual_seed(image_seed(seed, image_id))
        uniforms.append(torch.rand(num_tokens, num_parts, generator=numbers))
        orders.append(torch.randperm(num_tokens, generator=numbers))
    return Draws(torch.stack(uniforms).to(device), torch.stack(orders).to(device))


def guidance_scales(
    settings: SamplingSettings, starts: Sequence[int], num_tokens: int
) -> list[float]:
    """Guidance scale of each pass.

    Progress is the share of the sequence that is decoded before the pass, as in RandAR's code; a
    scale that rises is therefore a little below the end of its schedule at the last token.

    Args:
        settings: scale, schedule and interval.
        starts: tokens decoded before each pass.
        num_tokens: of the sequence.
    """
    low, high = settings.guidance_interval
    scales = []
    for start in starts:
        progress = start / num_tokens
        rise = {
            "constant": 1.0,
            "linear": progress,
            "cosine": (1 - math.cos(math.pi * progress)) / 2,
            "power": progress**settings.guidance_power,
        }[settings.guidance_schedule]
        guided = low <= progress <= high
        scales.append(1 + (settings.guidance_scale - 1) * rise if guided else 1.0)
    return scales


def arccos_schedule(num_tokens: int, num_steps: int) -> list[int]:
    """Tokens to decode in each pass: few at first, more when more is known; none is empty.

    Raises:
        ValueError: there are more passes than tokens, or none.
    """
    if not 1 <= num_steps <= num_tokens:
        raise ValueError(f"num_steps ({num_steps}) must be between 1 and the {num_tokens} tokens")
    counts, decoded = [], 0
    for step in range(1, num_steps + 1):
        share = 1 - math.cos(math.pi / 2 * step / num_steps)
        after = min(num_tokens, max(decoded + 1, int(share * num_tokens + 1)))
        counts.append(after - decoded)
        decoded = after
    return counts


def pick(
    logits: Float[Tensor, "n v"],
    uniforms: Float[Tensor, "n"],
    *,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
) -> Int64[Tensor, "n"]:
    """Choose a value from each distribution, by inverting its distribution function.

    Args:
        logits: unnormalised; -inf is impossible.
        uniforms: in [0, 1).
        temperature: 0 takes the most likely value.
        top_k: only the so many most likely values (and equals of the last); 0 is all.
        top_p: only the most likely values that together have this probability; 1 is all.
    """
    if temperature == 0:
        return logits.argmax(-1)
    if temperature != 1:
        logits = (logits - logits.amax(-1, keepdim=True)) / temperature
    if 0 < top_k < logits.shape[-1]:
        least = logits.topk(top_k, dim=-1).values[:, -1:]
        logits = logits.masked_fill(logits < least, -torch.inf)
    probabilities = logits.softmax(-1)
    if top_p < 1:
        ordered, order = probabilities.sort(dim=-1, descending=True, stable=True)
        before = ordered.cumsum(-1) - ordered
        ordered = ordered.masked_fill(before >= top_p, 0)
        probabilities = torch.zeros_like(ordered).scatter(-1, order, ordered)
    reached = probabilities.cumsum(-1)
    # A float32 below 1 times the total rounds to less than the total, so some value is above it.
    return (reached <= uniforms[:, None] * reached[:, -1:]).sum(-1)


def choose(
    generator: Generator,
    states: Float[Tensor, "r c"],
    uniforms: Float[Tensor, "b p"],
    scale: float,
    settings: SamplingSettings,
    restrict: Restriction | None = None,
    previous: Int64[Tensor, "b"] | None = None,
    *,
    finite: list[Tensor] | None = None,
) -> Int64[Tensor, "b p"]:
    """Choose the parts of one token for each image, in turn.

    Args:
        generator: whose head is asked.
        states: of the transformer; with twice as many rows as images the second half is
            unconditional.
        uniforms: numbers that decide.
        scale: of guidance, where there are unconditional states.
        settings: temperature, top-k and top-p.
        restrict: which values are allowed.
        previous: anchors of the tokens before, when the first part is a gap from there.
        finite: whether states and logits are finite is added to it, to be asked once in the end,
            where asking waits for the device; None asks here.

    Raises:
        RuntimeError: without `finite`, a state or a logit is not finite.
    """
    batch, num_parts = uniforms.shape
    chosen: list[Tensor] = []
    memory: list[tuple[Tensor, Tensor]] = []
    inputs = states
    found = [states.isfinite().all()]
    for part in range(num_parts):
        logits = generator.head.step(inputs, memory, part)
        found.append(logits.isfinite().all())
        if states.shape[0] > batch:
            conditional, unconditional = logits.chunk(2)
            logits = unconditional + scale * (conditional - unconditional)
            logits = conditional if scale == 1 else logits
        allowed = None if restrict is None else restrict(part, chosen)
        if allowed is not None:
            logits = logits.masked_fill(~allowed, -torch.inf)
        value = pick(
            logits,
            uniforms[:, part],
            temperature=_of_part(settings.temperature, part),
            top_k=_of_part(settings.top_k, part),
            top_p=_of_part(settings.top_p, part),
        )
        if part == 0 and previous is not None:
            value = previous + value
        chosen.append(value)
        if part + 1 < num_parts:
            inputs = generator.embed_part(part, value.repeat(len(states) // batch))
    if finite is None:
        check_finite(found)
    else:
        finite += found
    return torch.stack(chosen, dim=-1)


class Restrictions:
    """Which values the tokens of one batch of sequences may have, one token after the other."""

    def __init__(
        self,
        generator: Generator,
        cache: FullCache | SlotCache,
        settings: SamplingSettings,
        *,
        batch: int,
        num_kept: int,
    ) -> None:
        """Watch a sequence from its beginning.

        Args:
            generator: of any order but `random`.
            cache: that holds all tokens before.
            settings: whether the budget holds.
            batch: images.
            num_kept: K.
        """
        self._generator, self._batch, self._num_kept = generator, batch, num_kept
        self._cache = cache if isinstance(cache, SlotCache) and settings.budget else None
        self._num_distinct: list[int] = []
        self._within_budget: Restriction | None = None

    def of(self, token: int, previous: Int64[Tensor, "b"] | None) -> Restriction | None:
        """Which values the next token of each image may have; None is all.

        Args:
            token: position of the token in the sequence, from 0.
            previous: of order `anchor`, anchors of the tokens before; 0 before the first.
        """
        if previous is not None:
            return self._legal_gap(token, previous)
        if self._cache is None:
            return None
        num_distinct = self._cache.num_distinct[: self._batch]
        # Once all budgets are spent nothing changes any more.
        if num_distinct != self._num_distinct:
            self._num_distinct = num_distinct
            self._within_budget = self._budget(self._cache)
        return self._within_budget

    def _legal_gap(self, token: int, previous: Int64[Tensor, "b"]) -> Restriction:
        """Only gaps after which the tokens left still fit; codes are free."""
        tokens = torch.tensor([token], device=previous.device)
        num_tokens = self._generator.config.num_tokens
        legal = legal_gaps(previous[:, None], tokens, self._num_kept, num_tokens)[:, 0]
        return lambda part, chosen: legal if part == 0 else None  # noqa: ARG005

    def _budget(self, cache: SlotCache) -> Restriction | None:
        """Only tokens that are there already, in images that have K distinct ones; None is all.

        Sub-indices are restricted in turn, each to those of present tokens that agree so far.
        """
        is_spent = [count >= self._num_kept for count in self._num_distinct]
        if not any(is_spent):
            return None
        config, codes = self._generator.config, cache.codes[: self._batch]
        free = ~torch.tensor(is_spent, device=codes.device)[:, None]
        present = codes >= 0
        parts = indices_to_subindices(codes.clamp_min(0), config.factor_bits)

        def of_agreeing(part: int, agrees: Bool[Tensor, "b k"]) -> Bool[Tensor, "b v"]:
            counts = agrees.new_zeros(self._batch, config.part_sizes[part], dtype=torch.int64)
            return (counts.scatter_add(1, parts[..., part], agrees.long()) > 0) | free

        of_first = of_agreeing(0, present)

        def restrict(part: int, chosen: list[Tensor]) -> Tensor:
            if part == 0:
                return of_first
            agrees = present
            for earlier, value in enumerate(chosen):
                agrees = agrees & (parts[..., earlier] == value[:, None])
            return of_agreeing(part, agrees)

        return restrict


def _of_part(setting: Number | tuple[Number, ...], part: int) -> Number:
    """A setting's number for one part."""
    return setting[part] if isinstance(setting, tuple) else setting


def check_finite(finite: list[Tensor]) -> None:
    """Raise `RuntimeError` unless all that was chosen from was finite; asked once, at the end."""
    if not torch.stack(finite).all():
        raise RuntimeError(
            "the generator's states or logits are not finite: its weights are broken"
        )
