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

from mergevq.cache import FullCache, SlotCache
from mergevq.config_generator import SamplingSettings
from mergevq.generator import Generator, legal_gaps
from mergevq.quantize import indices_to_subindices
from mergevq.seeds import numbered_seed
from mergevq.transformer import Rotation, first_occurrence, leaders

Number = TypeVar("Number", int, float)

Restriction = Callable[[int, list[Tensor]], Tensor | None]
"""Given a part and the parts chosen before it, which of its values are allowed; None is all."""


class Sampled(NamedTuple):
    """Token sequences from a generator."""

    indices: Int64[Tensor, "b t"]
    """All cells in raster order (`raster`, `merge`) or the kept tokens in canonical order."""
    source_index: Int64[Tensor, "b l"] | None
    """Of order `merge`: which of its distinct tokens, in canonical order, each cell is."""
    anchors: Int64[Tensor, "b t"] | None
    """Of order `anchor`: cell at which each kept token opens."""
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


@torch.no_grad()
def sample(
    generator: Generator,
    *,
    labels: Int64[Tensor, "b"],
    num_kept: int,
    seed: int,
    image_ids: Sequence[int],
    settings: SamplingSettings,
) -> Sampled:
    """Sample one sequence for each label.

    Args:
        generator: in evaluation mode.
        labels: classes; `null_class` for none.
        num_kept: K, one of those the generator was trained on.
        seed: of the run.
        image_ids: number of each image in the run.
        settings: guidance, temperature and so on.

    Raises:
        ValueError: the settings do not fit the generator, or a class or K is unknown to it.
        RuntimeError: a cache overflowed, or a state was not finite.
    """
    _check(generator, labels, image_ids, settings)
    config = generator.config
    length = num_kept if config.order in {"random", "anchor"} else config.num_tokens
    draws = draw(seed, image_ids, length, len(config.part_names), generator.device)
    labels = labels.to(generator.device)
    if config.order == "random":
        num_steps = length if settings.num_steps is None else settings.num_steps
        counts = arccos_schedule(length, num_steps)
        sampled = _sample_slots(generator, draws, labels, settings, counts)
    else:
        sampled = _sample_sequence(generator, draws, labels, settings, num_kept)
    # Tensors of inference mode cannot be learned from.
    return sampled._replace(
        indices=sampled.indices.clone(),
        source_index=None if sampled.source_index is None else sampled.source_index.clone(),
        anchors=None if sampled.anchors is None else sampled.anchors.clone(),
    )


@torch.no_grad()
def inpaint(
    generator: Generator,
    *,
    indices: Int64[Tensor, "b k"],
    keep: Bool[Tensor, "b k"],
    labels: Int64[Tensor, "b"],
    seed: int,
    image_ids: Sequence[int],
    settings: SamplingSettings,
) -> Sampled:
    """Keep some tokens of each image and sample the others, given those and the label.

    Args:
        generator: of order `random`, in evaluation mode.
        indices: tokens in canonical order; those not kept are ignored.
        keep: which tokens stay.
        labels: classes; another one than the image's edits it.
        seed: of the run.
        image_ids: number of each image in the run.
        settings: guidance, temperature and so on; fewer tokens than `num_steps` take fewer passes.

    Raises:
        ValueError: the generator has another order, or the settings do not fit it.
        RuntimeError: a state was not finite.
    """
    _check(generator, labels, image_ids, settings)
    if generator.config.order != "random":
        raise ValueError(
            f"tokens can only be kept in order 'random', not '{generator.config.order}': the "
            "others do not see what comes later"
        )
    num_kept, num_parts = indices.shape[1], len(generator.config.part_names)
    draws = draw(seed, image_ids, num_kept, num_parts, generator.device)
    labels, keep = labels.to(generator.device), keep.to(generator.device)
    indices = indices.to(generator.device).where(keep, 0)
    num_forward = kv_bytes = 0
    # Images that keep equally many tokens decode together, so that none depends on its batch.
    for num_given in sorted(set(keep.sum(1).tolist()) - {num_kept}):
        rows = (keep.sum(1) == num_given).nonzero()[:, 0]
        order = draws.order[rows]
        is_given = keep[rows].gather(1, order).int()
        given_first = is_given.sort(dim=1, descending=True, stable=True).indices
        missing = num_kept - num_given
        sampled = _sample_slots(
            generator,
            Draws(draws.uniforms[rows], order.gather(1, given_first)),
            labels[rows],
            settings,
            arccos_schedule(missing, min(missing, settings.num_steps or missing)),
            generator.parts(indices[rows]),
        )
        indices[rows] = sampled.indices
        num_forward += sampled.num_forward
        kv_bytes = max(kv_bytes, sampled.kv_bytes)
    return Sampled(indices, None, None, num_forward, kv_bytes)


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
        _check_finite(found)
    else:
        finite += found
    return torch.stack(chosen, dim=-1)


@torch.no_grad()
def prefill(
    generator: Generator,
    cache: FullCache | SlotCache,
    class_label: Int64[Tensor, "r"],
    num_kept: int,
) -> Float[Tensor, "r c"]:
    """Start a sequence: empty the cache, fill in the prefix, return the state of the first token.

    Not of order `random`, whose first states are those of `decode_slots`.
    """
    cache.reset()
    prefix = generator.embed_prefix(class_label, num_kept)
    positions = torch.zeros(1, prefix.shape[1], 2, device=prefix.device)
    states = generator.transform(prefix, generator.turns(positions), None, cache)
    if isinstance(cache, FullCache):
        cache.advance(prefix.shape[1])
    return states[:, -1]


@torch.no_grad()
def decode(
    generator: Generator,
    cache: FullCache | SlotCache,
    parts: Int64[Tensor, "r p"],
    token: int,
) -> Float[Tensor, "r c"]:
    """Put one token of each row in and return the state that predicts the next.

    Args:
        generator: of any order but `random`.
        cache: holding the prefix and all tokens before.
        parts: the token.
        token: its position in the sequence, from 0.
    """
    if generator.config.order == "anchor":
        turns = Rotation(*(table[0, 0, parts[:, None, :1]] for table in cache.turns))
    else:
        turns = Rotation(*(table[:, :, token : token + 1] for table in cache.turns))
    inputs = generator.embed(parts[:, None])
    if isinstance(cache, SlotCache):
        visible = cache.place(generator.indices(parts))
        return generator.transform(inputs, turns, visible, cache)[:, 0]
    states = generator.transform(inputs, turns, None, cache)[:, 0]
    cache.advance(1)
    return states


@torch.no_grad()
def decode_slots(
    generator: Generator,
    cache: FullCache,
    inputs: Float[Tensor, "r n c"],
    positions: Float[Tensor, "r n 2"],
    wanted: Float[Tensor, "r m 2"],
) -> Float[Tensor, "r m c"]:
    """Put inputs of order `random` in and return states that predict the slots wanted next.

    One pass does both. What is asked about sees all inputs and itself, not each other, and leaves
    nothing in the cache: it goes in again with its token, at its place in the sequence.

    Args:
        generator: of order `random`.
        cache: holding all inputs before.
        inputs: the prefix, or instructions and tokens decoded by the pass before.
        positions: of the inputs.
        wanted: positions of the slots to predict.
    """
    num_new, num_wanted = inputs.shape[1], wanted.shape[1]
    block = torch.ones(num_new + num_wanted, num_new + num_wanted, device=inputs.device).tril()
    block[num_new:, num_new:] = torch.eye(num_wanted, device=inputs.device)
    mask = torch.nn.functional.pad(block.bool(), (cache.length, 0), value=True)[None]
    inputs = torch.cat([inputs, generator.embed_instruction(wanted)], dim=1)
    turns = generator.turns(torch.cat([positions, wanted], dim=1))
    states = generator.transform(inputs, turns, mask, cache)
    cache.advance(num_new)
    return states[:, num_new:]


def make_cache(
    generator: Generator, *, batch: int, num_kept: int, settings: SamplingSettings
) -> FullCache | SlotCache:
    """The cache for `prefill` and `decode`.

    Args:
        generator: whose order, type and device decide.
        batch: rows.
        num_kept: K.
        settings: whether the budget holds.
    """
    config = generator.config
    if config.order != "merge":
        # The last token of a sequence is never an input.
        length = num_kept if config.order == "anchor" else config.num_tokens
        return _full_cache(generator, batch, length - 1)
    num_distinct = num_kept if settings.budget else config.num_tokens
    return SlotCache(
        config,
        batch=batch,
        num_slots=SlotCache.slots_for(config, num_distinct),
        device=generator.device,
        dtype=_cache_type(generator),
    )


def make_random_cache(generator: Generator, *, batch: int, num_kept: int) -> FullCache:
    """The cache for `decode_slots`: an instruction and a token for each slot but the last token."""
    return _full_cache(generator, batch, 2 * num_kept - 1)


def _cache_type(generator: Generator) -> torch.dtype:
    """Of keys and values: on CPUs attention of a few queries is 2 to 4 times slower in bf16."""
    return torch.float32 if generator.device.type == "cpu" else generator.dtype


def _full_cache(generator: Generator, batch: int, num_inputs: int) -> FullCache:
    """Room for the prefix and so many inputs."""
    return FullCache(
        generator.config,
        batch=batch,
        num_slots=generator.config.num_prefix + num_inputs,
        device=generator.device,
        dtype=_cache_type(generator),
    )


@torch.inference_mode()
def _sample_sequence(
    generator: Generator,
    draws: Draws,
    labels: Int64[Tensor, "b"],
    settings: SamplingSettings,
    num_kept: int,
) -> Sampled:
    """Sample token by token: orders `raster`, `merge` and `anchor`."""
    config = generator.config
    batch, length, _ = draws.uniforms.shape
    scales = guidance_scales(settings, range(length), length)
    rows = _with_unconditional(generator, labels, scales)
    num_branches = len(rows) // batch
    cache = make_cache(generator, batch=len(rows), num_kept=num_kept, settings=settings)
    states = prefill(generator, cache, rows, num_kept)
    restrictions = Restrictions(generator, cache, settings, batch=batch, num_kept=num_kept)
    previous = torch.zeros_like(labels) if config.order == "anchor" else None
    tokens: list[Tensor] = []
    finite: list[Tensor] = []
    for token in range(length):
        restrict = restrictions.of(token, previous)
        uniforms = draws.uniforms[:, token]
        parts = choose(
            generator, states, uniforms, scales[token], settings, restrict, previous, finite=finite
        )
        previous = None if previous is None else parts[:, 0]
        tokens.append(parts)
        if token + 1 < length:
            states = decode(generator, cache, parts.repeat(num_branches, 1), token)
    _check_finite(finite)
    sequence = torch.stack(tokens, dim=1)
    indices = generator.indices(sequence)
    return Sampled(
        indices=indices,
        source_index=_groups(indices) if config.order == "merge" else None,
        anchors=sequence[..., 0] if config.order == "anchor" else None,
        num_forward=length,
        kv_bytes=cache.num_bytes,
    )


@torch.inference_mode()
def _sample_slots(
    generator: Generator,
    draws: Draws,
    labels: Int64[Tensor, "b"],
    settings: SamplingSettings,
    counts: list[int],
    given: Int64[Tensor, "b t p"] | None = None,
) -> Sampled:
    """Sample several slots in each pass: order `random`.

    Args:
        generator: of that order.
        draws: uniform numbers by slot, and the slots in the order in which they are decoded.
        labels: classes.
        settings: guidance, temperature and so on.
        counts: slots decoded in each pass.
        given: tokens in canonical order; the slots not counted come first, and have theirs.
    """
    batch, num_kept, _ = draws.uniforms.shape
    num_missing = sum(counts)
    num_given = num_kept - num_missing
    starts = [sum(counts[:step]) for step in range(len(counts))]
    scales = guidance_scales(settings, starts, num_missing)
    rows = _with_unconditional(generator, labels, scales)
    num_branches = len(rows) // batch
    cache = make_random_cache(generator, batch=len(rows), num_kept=num_kept)
    order, slots = draws.order.repeat(num_branches, 1), generator.slot_positions(num_kept)
    parts = torch.zeros_like(draws.uniforms, dtype=torch.int64) if given is None else given.clone()

    inputs = generator.embed_prefix(rows, num_kept)
    positions = torch.zeros(*inputs.shape[:2], 2, device=inputs.device)
    if num_given:
        first = order[:, :num_given]
        tokens = _at(parts.repeat(num_branches, 1, 1), first)
        more, where = generator.pairs(tokens, slots[first])
        inputs, positions = torch.cat([inputs, more], dim=1), torch.cat([positions, where], dim=1)
    finite: list[Tensor] = []
    for start, count, scale in zip(starts, counts, scales, strict=True):
        wanted = order[:, num_given + start : num_given + start + count]
        states = decode_slots(generator, cache, inputs, positions, slots[wanted])
        uniforms = _at(draws.uniforms, wanted[:batch]).flatten(0, 1)
        flat = states.flatten(0, 1)
        tokens = choose(generator, flat, uniforms, scale, settings, finite=finite)
        tokens = tokens.unflatten(0, (batch, count))
        parts.scatter_(1, wanted[:batch, :, None].expand_as(tokens), tokens)
        inputs, positions = generator.pairs(tokens.repeat(num_branches, 1, 1), slots[wanted])
    _check_finite(finite)
    return Sampled(generator.indices(parts), None, None, len(counts), cache.num_bytes)


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


def _with_unconditional(
    generator: Generator, labels: Int64[Tensor, "b"], scales: list[float]
) -> Int64[Tensor, "r"]:
    """Labels, and as many null classes after them when any pass is guided."""
    if all(scale == 1 for scale in scales):
        return labels
    return torch.cat([labels, torch.full_like(labels, generator.config.null_class)])


def _groups(indices: Int64[Tensor, "b l"]) -> Int64[Tensor, "b l"]:
    """Source map of tokens grouped by equality, in canonical order."""
    opened = first_occurrence(indices).cumsum(1) - 1
    return opened.gather(1, leaders(indices))


def _at(values: Tensor, index: Int64[Tensor, "b m"]) -> Tensor:
    """Rows of each image's (T, P) table at some of its T positions."""
    return values.gather(1, index[..., None].expand(-1, -1, values.shape[-1]))


def _of_part(setting: Number | tuple[Number, ...], part: int) -> Number:
    """A setting's number for one part."""
    return setting[part] if isinstance(setting, tuple) else setting


def _check_finite(finite: list[Tensor]) -> None:
    """Raise `RuntimeError` unless all that was chosen from was finite; asked once, at the end."""
    if not torch.stack(finite).all():
        raise RuntimeError(
            "the generator's states or logits are not finite: its weights are broken"
        )


def _check(
    generator: Generator,
    labels: Int64[Tensor, "b"],
    image_ids: Sequence[int],
    settings: SamplingSettings,
) -> None:
    """Raise `ValueError` when a call does not fit its generator."""
    if generator.training:
        raise ValueError("the generator must be in evaluation mode: call generator.eval()")
    if len(labels) != len(image_ids):
        raise ValueError(f"{len(labels)} labels must go with as many image_ids ({len(image_ids)})")
    if settings.guidance_scale != 1 and generator.config.num_classes == 0:
        raise ValueError(
            f"guidance_scale ({settings.guidance_scale}) must be 1 for a generator without classes"
        )
    num_parts = len(generator.config.part_names)
    for name in ("temperature", "top_k", "top_p"):
        setting = getattr(settings, name)
        if isinstance(setting, tuple) and len(setting) != num_parts:
            raise ValueError(
                f"{name} has {len(setting)} numbers and must have 1 or {num_parts}, one for each "
                f"of {', '.join(generator.config.part_names)}"
            )
