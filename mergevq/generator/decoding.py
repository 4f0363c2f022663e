"""Sequences and slots, sampled: prefill, decode, and the cache between them.

Source: Pang et al. 2024, "RandAR", sections 3.3 and 4 (parallel decoding, in-painting,
arXiv:2412.01827).

Differs: tokens that RandAR decodes in one pass do not see each other's instructions, so each has
exactly the distribution that training gave it; RandAR's code lets later ones see earlier ones.

Shape letters: B images, R rows (B, or 2B with guidance: conditional ones first), L grid cells,
K kept tokens, T tokens of a sequence, P parts of a token, C channels, S slots of a cache, N new
inputs, M tokens decoded in one pass.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from mergevq.config.generator import SamplingSettings
from mergevq.generator.autoregressive import Generator
from mergevq.generator.cache import FullCache, SlotCache
from mergevq.generator.orders.merge import first_occurrence, leaders
from mergevq.generator.sampling import (
    Draws,
    Restrictions,
    Sampled,
    arccos_schedule,
    check_finite,
    choose,
    draw,
    guidance_scales,
)
from mergevq.nn.llama import Rotation


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
    """Type of keys and values; a CPU attends from a few queries 2 to 4 times slower in bf16."""
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
    check_finite(finite)
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
    check_finite(finite)
    return Sampled(generator.indices(parts), None, None, len(counts), cache.num_bytes)


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
