"""Sampling from a generator: the numbers that decide a draw, guidance, schedules of passes.

Source: Li et al. 2025, "MergeVQ", section 3.4 (arXiv:2504.00999); Pang et al. 2024, "RandAR",
sections 3.3 and 4 (parallel decoding, in-painting, arXiv:2412.01827); Ho and Salimans 2022,
"Classifier-Free Diffusion Guidance", section 3.2 (arXiv:2207.12598).

Image k of a run depends on (seed, k) alone: its uniform numbers are drawn before the batch it is
in is known, and a value is the place of such a number in the distribution function.

Shape letters: B images, K kept tokens, T tokens of a sequence, P parts of a token, N tokens,
V values of a part.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple, TypeVar

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from mergevq.config.generator import (
    GeneratorConfig,
    SamplingSettings,
    Several,
    check_sampling,
)
from mergevq.config.parts.heads import Bits
from mergevq.generator.network import Chosen, Restriction
from mergevq.generator.seams import Decoder, Draws, Generator, Sampled, Sequences
from mergevq.runtime.random import numbered_seed

Number = TypeVar("Number", int, float)


class Partial(NamedTuple):
    """Sequences of which some tokens are decoded."""

    sampled: Sampled
    """As from `sample`; of orders that decode one token after the other those so far, and of the
    others all, with index 0 where there is none yet."""
    known: Bool[Tensor, "b t"]
    """Which of them are decoded."""
    share: float
    """Steps that are done, of all: in (0, 1]."""


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
    labels, count = labels.to(generator.device), settings.candidates
    found, ratios = [], []
    for number in range(count):
        # Numbers of their own, so that more candidates are others beside the same ones.
        ids = [count * image_id + number for image_id in image_ids]
        draws = generator.draws(seed, ids, num_kept, settings)
        found.append(_usable(generator.sample(labels, num_kept, draws, settings)))
        if count > 1:
            ratios.append(class_ratio(generator, found[-1], labels, num_kept, draws.order))
    return found[0] if count == 1 else _best(found, torch.stack(ratios))


@torch.no_grad()
def class_ratio(
    generator: Generator,
    sampled: Sampled,
    labels: Int64[Tensor, "b"],
    num_kept: int,
    order: Int64[Tensor, "b t"],
) -> Float[Tensor, "b"]:
    """Log-likelihood of sequences with their class, less that without a class, in nats.

    Likelihood alone is highest of flat images. Each sequence is looked at by itself: its number
    does not depend on the others.

    Args:
        generator: whose samples these are; its likelihoods are exact.
        sampled: sequences.
        labels: their classes.
        num_kept: K.
        order: that they were decoded in, where the generator has one.
    """
    ratios = []
    for row in range(len(labels)):
        both = torch.tensor([int(labels[row]), generator.config.null_class], device=labels.device)
        sequences = Sequences(
            indices=sampled.indices[row].expand(2, -1),
            class_label=both,
            num_kept=num_kept,
            anchors=None if sampled.anchors is None else sampled.anchors[row].expand(2, -1),
            source_index=(
                None if sampled.source_index is None else sampled.source_index[row].expand(2, -1)
            ),
            slots=order[row].expand(2, -1),
        )
        conditional, unconditional = generator.log_likelihood(sequences)
        ratios.append(conditional - unconditional)
    return torch.stack(ratios)


def _best(found: Sequence[Sampled], ratios: Float[Tensor, "n b"]) -> Sampled:
    """Sample of the highest number among those of each image, the first of equal ones."""
    best, rows = ratios.argmax(0), torch.arange(ratios.shape[1], device=ratios.device)

    def chosen(columns: Sequence[Tensor | None]) -> Tensor | None:
        there = [column for column in columns if column is not None]
        return torch.stack(there)[best, rows] if there else None

    return found[0]._replace(
        indices=torch.stack([one.indices for one in found])[best, rows],
        source_index=chosen([one.source_index for one in found]),
        anchors=chosen([one.anchors for one in found]),
        # Each is looked at twice, with the class and without.
        num_forward=sum(one.num_forward + 2 for one in found),
    )


@torch.no_grad()
def sample_in_steps(
    generator: Generator,
    *,
    labels: Int64[Tensor, "b"],
    num_kept: int,
    seed: int,
    image_ids: Sequence[int],
    settings: SamplingSettings,
    every: int,
) -> Iterator[Partial]:
    """Sample as `sample` does, and show the sequences while they are decoded.

    Args:
        generator: as for `sample`, like all that follow but the last.
        labels: likewise.
        num_kept: likewise.
        seed: likewise.
        image_ids: likewise.
        settings: likewise.
        every: steps from one look to the next.

    Yields:
        The sequences after every so many steps, and after the last: what `sample` returns.

    Raises:
        ValueError: as `sample`, or `every` is below 1.
        RuntimeError: as `sample`.
    """
    _check(generator, labels, image_ids, settings)
    if every < 1:
        raise ValueError(f"every ({every}) must be at least 1")
    _require_one(settings, "are shown while they are decoded")
    draws = generator.draws(seed, image_ids, num_kept, settings)
    decoder = generator.decoder(labels.to(generator.device), num_kept, draws, settings)
    decoder.seek(0)
    step = 0
    while step < decoder.num_steps:
        decoder.step()
        step += 1
        if step == decoder.num_steps:
            check_finite(decoder.finite)
        if step % every == 0 or step == decoder.num_steps:
            sampled = _usable(generator.sampled(decoder))
            yield Partial(sampled, decoder.known(), step / decoder.num_steps)


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
        generator: one that fills in (`GeneratorConfig.order.fills_in`), in evaluation mode.
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
    order = generator.config.order
    if not order.fills_in:
        raise ValueError(
            f"tokens can only be kept in order 'random', not '{order.kind}': the others do not see "
            "what comes later, or have no kept tokens"
        )
    _check(generator, labels, image_ids, settings)
    _require_one(settings, "keep tokens")
    draws = generator.draws(seed, image_ids, indices.shape[1], settings)
    device = generator.device
    return generator.inpaint(
        indices.to(device), keep.to(device), labels.to(device), draws, settings
    )


def _require_one(settings: SamplingSettings, purpose: str) -> None:
    """Raise `ValueError` where several candidates are drawn, which `sample` alone ranks."""
    if settings.candidates != 1:
        raise ValueError(f"candidates ({settings.candidates}) must be 1 where samples {purpose}")


def run(decoder: Decoder) -> None:
    """Decode sequences from the first step to the last.

    Raises:
        RuntimeError: a cache overflowed, or a state was not finite.
    """
    decoder.seek(0)
    step = 0
    while step < decoder.num_steps:  # It may fall as steps are done.
        decoder.step()
        step += 1
    check_finite(decoder.finite)


def image_seed(seed: int, image_id: int) -> int:
    """Seed of one image of a run, in [0, 2**32): distinct for the first 2**32 images."""
    return numbered_seed(f"{seed}", image_id) % 2**32


def draw(
    seed: int,
    image_ids: Sequence[int],
    num_tokens: int,
    num_uniforms: int,
    device: torch.device,
    *,
    num_passes: int = 0,
) -> Draws:
    """All random numbers of some images of a run, each image's from its own seed.

    Args:
        seed: of the run.
        image_ids: numbers of the images.
        num_tokens: of a sequence.
        num_uniforms: that decide the parts of a token.
        device: where the numbers are used.
        num_passes: passes in each of which every part of every token is chosen anew, and a token
            needs one number more; 0 draws none of these.
    """
    uniforms, orders, passes = [], [], []
    for image_id in image_ids:
        numbers = torch.Generator().manual_seed(image_seed(seed, image_id))
        uniforms.append(torch.rand(num_tokens, num_uniforms, generator=numbers))
        orders.append(torch.randperm(num_tokens, generator=numbers))
        if num_passes:
            shape = (num_passes, num_tokens, num_uniforms + 1)
            passes.append(torch.rand(shape, generator=numbers))
    return Draws(
        torch.stack(uniforms).to(device),
        torch.stack(orders).to(device),
        torch.stack(passes).to(device) if num_passes else None,
    )


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


def even_schedule(num_tokens: int, num_steps: int) -> list[int]:
    """Tokens to decode in each pass: nearly even, but for many at the end; none is empty.

    After a share s of the passes floor(L arccos(s) / (pi / 2)) of L tokens are left, as in TiTok's
    generator.

    Raises:
        ValueError: there are more passes than tokens, or none.
    """
    if not 1 <= num_steps <= num_tokens:
        raise ValueError(f"num_steps ({num_steps}) must be between 1 and the {num_tokens} tokens")
    counts, left = [], num_tokens
    for step in range(1, num_steps + 1):
        share = math.acos(step / num_steps) / (math.pi / 2)
        # At least one token in this pass, and one for each of those to come.
        after = max(num_steps - step, min(left - 1, math.floor(num_tokens * share)))
        counts.append(left - after)
        left = after
    return counts


def num_passes(settings: SamplingSettings, num_tokens: int) -> int:
    """Passes in which a sequence of some tokens is decoded."""
    passes = settings.passes
    return passes.num_steps if isinstance(passes, Several) else num_tokens


def uniforms_of_token(config: GeneratorConfig, settings: SamplingSettings) -> int:
    """U: uniform numbers that decide the parts of one token.

    One for each part. Of bits chosen by confidence, two for each bit in each block: one decides the
    value, one is noise on its confidence, and none serves twice, as which bits are masked again
    depends on both.
    """
    head, num_parts = config.head, len(config.part_names)
    if settings.bits_order == "schedule" or not isinstance(head, Bits):
        return num_parts
    more = (2 * len(head.block_sizes) - 1) * len(head.sizes)
    return num_parts + config.order.tokens_per_step * more


def choose_parts(
    logits_of: Callable[[int, Sequence[Tensor]], Float[Tensor, "r v"]],
    uniforms: Float[Tensor, "b p"],
    scale: float | Float[Tensor, "b 1"],
    settings: SamplingSettings,
    restriction: Restriction | None,
    *,
    scored: bool,
) -> Chosen:
    """Choose the parts of one token for each image, in turn.

    Args:
        logits_of: logits, float32, of a part after the parts chosen before it; with twice as many
            rows as images the second half is unconditional.
        uniforms: numbers that decide.
        scale: of guidance, if there are unconditional logits.
        settings: temperature, top-k and top-p.
        restriction: rules of the order; None leaves all values free.
        scored: also give the token's log-probability.
    """
    batch, num_parts = uniforms.shape
    chosen: list[Tensor] = []
    finite: list[Tensor] = []
    log_prob = torch.zeros(batch, device=uniforms.device) if scored else None
    for part in range(num_parts):
        logits = logits_of(part, chosen)
        finite.append(logits.isfinite().all())
        value, logits = choose_part(
            part, logits, uniforms[:, part], scale, settings, restriction, chosen
        )
        if log_prob is not None:
            log_prob = log_prob + logits.log_softmax(-1).gather(1, value[:, None])[:, 0]
        if restriction is not None:
            value = restriction.part(part, value, chosen)
        chosen.append(value)
    return Chosen(torch.stack(chosen, dim=-1), finite, log_prob)


def choose_part(
    part: int,
    logits: Float[Tensor, "r v"],
    uniforms: Float[Tensor, "b"],
    scale: float | Float[Tensor, "b 1"],
    settings: SamplingSettings,
    restriction: Restriction | None,
    chosen: Sequence[Int64[Tensor, "b"]],
    *,
    warmth: float = 1.0,
) -> tuple[Int64[Tensor, "b"], Float[Tensor, "b v"]]:
    """Choose one part of a token for each image.

    Args:
        part: its number.
        logits: float32, as `choose_parts` asks for them.
        uniforms: numbers that decide.
        scale: of guidance, if there are unconditional logits.
        settings: temperature, top-k and top-p.
        restriction: rules of the order; None leaves all values free.
        chosen: the parts before.
        warmth: share of the temperature.

    Returns:
        The values, before the order's rule turns them into parts, and the guided logits of those
        that may be, at temperature 1.
    """
    if len(logits) > len(uniforms):
        conditional, unconditional = logits.chunk(2)
        logits = guided(conditional, unconditional, scale)
    allowed = None if restriction is None else restriction.allowed(part, chosen)
    if allowed is not None:
        logits = logits.masked_fill(~allowed, -torch.inf)
    value = pick(
        logits,
        uniforms,
        temperature=of_part(settings.temperature, part) * warmth,
        top_k=of_part(settings.top_k, part),
        top_p=of_part(settings.top_p, part),
    )
    return value, logits


def guided(
    conditional: Float[Tensor, "n v"],
    unconditional: Float[Tensor, "n v"],
    scale: float | Float[Tensor, "n 1"],
) -> Float[Tensor, "n v"]:
    """Logits of classifier-free guidance; of scale 1 the conditional ones themselves."""
    mixed = unconditional + scale * (conditional - unconditional)
    if isinstance(scale, Tensor):
        return torch.where(scale == 1, conditional, mixed)
    return conditional if scale == 1 else mixed


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


def of_part(setting: Number | tuple[Number, ...], part: int) -> Number:
    """A setting's number for one part."""
    return setting[part] if isinstance(setting, tuple) else setting


def check_finite(finite: list[Tensor]) -> None:
    """Raise `RuntimeError` unless all that was chosen from was finite; asked once, at the end."""
    if not torch.stack(finite).all():
        raise RuntimeError(
            "the generator's states or logits are not finite: its weights are broken"
        )


def _usable(sampled: Sampled) -> Sampled:
    """The same outside of inference mode, whose tensors cannot be learned from."""
    return sampled._replace(
        indices=sampled.indices.clone(),
        source_index=None if sampled.source_index is None else sampled.source_index.clone(),
        anchors=None if sampled.anchors is None else sampled.anchors.clone(),
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
    if settings.candidates != 1 and generator.config.num_classes == 0:
        raise ValueError(
            f"candidates ({settings.candidates}) must be 1 for a generator without classes, by "
            "which samples are ranked"
        )
    check_sampling(generator.config, settings)
    num_parts = len(generator.config.part_names)
    for name in ("temperature", "top_k", "top_p"):
        setting = getattr(settings, name)
        if isinstance(setting, tuple) and len(setting) != num_parts:
            raise ValueError(
                f"{name} has {len(setting)} numbers and must have 1 or {num_parts}, one for each "
                f"of {', '.join(generator.config.part_names)}"
            )
