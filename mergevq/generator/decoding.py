"""Sequences laid out and decoded token by token, for the orders that go that way.

Source: Sun et al. 2024, "Autoregressive Model Beats Diffusion: Llama for Scalable Image
Generation", section 2 (arXiv:2406.06525).

Shape letters: B images, R rows (B, or 2B with guidance: conditional ones first), T tokens of a
sequence, M tokens and drafts, P parts of a token, C channels, N inputs, E inputs looked at, S and Z
each B or 1.
"""

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor
from torch.nn import functional
from torch.nn.attention.flex_attention import BlockMask

from mergevq.config.generator import (
    Drafted,
    SamplingSettings,
)
from mergevq.generator.cache import FullCache, RowCache
from mergevq.generator.network import Cache, Network, Restriction
from mergevq.generator.sampling import guidance_scales
from mergevq.generator.seams import Draws, Layout, Sequences
from mergevq.nn.llama import Rotation


@runtime_checkable
class Rules(Protocol):
    """Which values the tokens of one batch of sequences may have, one token after the other."""

    def next(self, before: Sequence[Int64[Tensor, "b p"]]) -> Restriction | None:
        """Rules for the next token of each image, after those before; None leaves all free."""
        ...


@runtime_checkable
class TokenByToken(Protocol):
    """An order that decodes a sequence from its first token to its last."""

    def cache(
        self, network: Network, *, batch: int, num_kept: int, settings: SamplingSettings
    ) -> Cache:
        """An empty cache for `batch` rows."""
        ...

    def rules(
        self,
        network: Network,
        cache: Cache,
        *,
        batch: int,
        num_kept: int,
        settings: SamplingSettings,
    ) -> Rules | None:
        """Rules for a batch of images, the first rows of the cache; None if there are none."""
        ...

    def turns(self, cache: Cache, parts: Int64[Tensor, "r p"], token: int) -> Rotation:
        """Turns of the position of a token of each row, which is the `token`-th from 0."""
        ...


@runtime_checkable
class CellByCell(Protocol):
    """An order of all cells of which several can be checked in one pass."""

    def seen(
        self,
        network: Network,
        tokens: Int64[Tensor, "b m p"],
        slots: Int64[Tensor, "b n"],
        end: int,
    ) -> Bool[Tensor, "b n e"]:
        """Inputs, the prefix first, that some of them see.

        Args:
            network: of whose tokens these are.
            tokens: of each image, those that are not decoded among them.
            slots: inputs that look, by number.
            end: inputs looked at.
        """
        ...

    def restriction(
        self,
        network: Network,
        tokens: Int64[Tensor, "b m p"],
        cells: Int64[Tensor, "b n"],
        num_kept: int,
        settings: SamplingSettings,
    ) -> Restriction | None:
        """Rules for some cells of each image, one after the other, by the tokens before each.

        None leaves all free.
        """
        ...


def lay_out(
    network: Network,
    sequences: Sequences,
    parts: Int64[Tensor, "b t p"],
    positions: Float[Tensor, "s t 2"],
    mask: Bool[Tensor, "z n n"] | BlockMask | None = None,
) -> Layout:
    """The prefix and all tokens but the last; each input's state predicts the token after it.

    Args:
        network: whose embeddings.
        sequences: the batch.
        parts: its tokens.
        positions: row and column of each token.
        mask: which inputs each sees; None is all up to itself.
    """
    prefix = network.embed_prefix(sequences.class_label, sequences.num_kept)
    # The last token is never an input: nothing comes after it.
    inputs = torch.cat([prefix, network.embed(parts[:, :-1])], dim=1)
    positions = functional.pad(positions[:, :-1], (0, 0, prefix.shape[1], 0))
    reads = torch.arange(prefix.shape[1] - 1, inputs.shape[1], device=inputs.device)
    return Layout(inputs, positions, mask, reads, parts, parts, {}, None)


def add_targets(
    inputs: Float[Tensor, "b n c"], targets: Float[Tensor, "*s t c"]
) -> Float[Tensor, "b n c"]:
    """Inputs with a vector added to each of the last T, for the place of the token it predicts."""
    prefix = inputs.shape[1] - targets.shape[-2]
    return torch.cat([inputs[:, :prefix], inputs[:, prefix:] + targets], dim=1)


def seen_before(slots: Int64[Tensor, "b n"], end: int) -> Bool[Tensor, "b n e"]:
    """All inputs up to each of some."""
    return torch.arange(end, device=slots.device) <= slots[..., None]


def full_cache(network: Network, batch: int, num_inputs: int) -> FullCache:
    """Room for the prefix and `num_inputs` more inputs."""
    return FullCache(
        network.config,
        batch=batch,
        num_slots=network.config.num_prefix + num_inputs,
        device=network.device,
        dtype=cache_type(network),
    )


def cache_type(network: Network) -> torch.dtype:
    """Type of keys and values; a CPU attends from a few queries 2 to 4 times slower in bf16."""
    return torch.float32 if network.device.type == "cpu" else network.dtype


@torch.no_grad()
def prefill(
    network: Network,
    cache: Cache,
    class_label: Int64[Tensor, "r"],
    num_kept: int,
    target: Float[Tensor, "c"] | None = None,
) -> Float[Tensor, "r c"]:
    """Start a sequence: empty the cache, fill in the prefix, return the state of the first token.

    Args:
        network: what the prefix is put through.
        cache: of any content.
        class_label: classes.
        num_kept: K.
        target: vector of the place of the first token, added to the last input.
    """
    cache.reset()
    prefix = network.embed_prefix(class_label, num_kept)
    if target is not None:
        prefix = add_targets(prefix, target[None])
    positions = torch.zeros(1, prefix.shape[1], 2, device=prefix.device)
    states = network.transform(prefix, network.turns(positions), None, cache)
    cache.advance(prefix.shape[1])
    return states[:, -1]


@torch.no_grad()
def put_in(
    network: Network,
    cache: Cache,
    parts: Int64[Tensor, "r p"],
    turns: Rotation,
    target: Float[Tensor, "c"] | None = None,
) -> Float[Tensor, "r c"]:
    """Put one token of each row in and return the state that predicts the next.

    Args:
        network: what the token is put through.
        cache: holding the prefix and all tokens before.
        parts: the token.
        turns: of its position.
        target: vector of the place of the next token, added to this one.
    """
    visible = cache.place(network.indices(parts))
    inputs = network.embed(parts[:, None])
    if target is not None:
        inputs = add_targets(inputs, target[None])
    states = network.transform(inputs, turns, visible, cache)[:, 0]
    cache.advance(1)
    return states


def turns_at(cache: Cache, token: int) -> Rotation:
    """Turns of the cell that is as far along in raster order as a token in its sequence."""
    return Rotation(*(table[:, :, token : token + 1] for table in cache.turns))


class SequenceDecoder:
    """Sequences that are decoded token by token (`seams.Decoder`), with guidance."""

    def __init__(
        self,
        network: Network,
        order: TokenByToken,
        labels: Int64[Tensor, "b"],
        num_kept: int,
        draws: Draws,
        settings: SamplingSettings,
        targets: Float[Tensor, "t c"] | None = None,
    ) -> None:
        """Allocate the cache.

        Args:
            network: what decodes.
            order: whose sequences these are.
            labels: classes.
            num_kept: K.
            draws: uniform numbers for every token of a sequence.
            settings: guidance, temperature and so on.
            targets: vector of the place of each token, added to the input before it.
        """
        self.network, self.order, self.num_kept = network, order, num_kept
        self.targets = targets
        self.draws, self.settings = draws, settings
        self.num_steps = draws.uniforms.shape[1]
        self.scales = guidance_scales(settings, range(self.num_steps), self.num_steps)
        self.rows = network.with_unconditional(labels, self.scales)
        self.cache = order.cache(
            network, batch=len(self.rows), num_kept=num_kept, settings=settings
        )
        self.kv_bytes = self.cache.num_bytes
        self.memory = (self.cache.keys, self.cache.values)
        self.token = 0
        self.tokens: list[Tensor] = []
        self.finite: list[Tensor] = []

    def parts(self) -> Int64[Tensor, "b t p"]:
        """Tokens decoded so far."""
        return torch.stack(self.tokens, dim=1)

    def known(self) -> Bool[Tensor, "b t"]:
        """All of `parts`."""
        per_step = self.network.config.order.tokens_per_step
        shape = len(self.draws.uniforms), len(self.tokens) * per_step
        return torch.ones(shape, dtype=torch.bool, device=self.network.device)

    @torch.inference_mode()
    def seek(self, step: int, history: Int64[Tensor, "b t p"] | None = None) -> None:
        """Fill in the prefix and take the tokens before a step as decoded (`seams.Decoder`)."""
        self.states = prefill(self.network, self.cache, self.rows, self.num_kept, self._target(0))
        batch = len(self.draws.uniforms)
        self.rules = self.order.rules(
            self.network,
            self.cache,
            batch=batch,
            num_kept=self.num_kept,
            settings=self.settings,
        )
        self.tokens = [] if history is None else list(history[:, :step].unbind(1))
        for parts in self.tokens:
            self.cache.place(self.network.indices(parts.repeat(len(self.rows) // batch, 1)))
            self.cache.advance(1)
        self.token = step

    @torch.inference_mode()
    def step(self) -> None:
        """Choose the next token of each image and put it in."""
        token, batch = self.token, len(self.draws.uniforms)
        chosen = self.network.choose(
            self.states,
            self.draws.uniforms[:, token],
            self.scales[token],
            self.settings,
            None if self.rules is None else self.rules.next(self.tokens),
        )
        self.finite += chosen.finite
        self.tokens.append(chosen.parts)
        self.token = token + 1
        if self.token < self.num_steps:
            parts = chosen.parts.repeat(len(self.rows) // batch, 1)
            turns = self.order.turns(self.cache, parts, token)
            target = self._target(self.token)
            self.states = put_in(self.network, self.cache, parts, turns, target)

    def _target(self, token: int) -> Float[Tensor, "c"] | None:
        """Vector of the place of a token, if there are such vectors."""
        return None if self.targets is None else self.targets[token]


class DraftDecoder:
    """Sequences of which several tokens are drafted and checked in each pass (`seams.Decoder`).

    One pass gives the state of each drafted token; the head chooses all of them by the numbers of
    their places, as if the drafts before were right. Those up to the first that is not its draft
    are what decoding token by token gives, and are kept. Images of a batch go on each by itself.

    Source: Leviathan et al. 2023, "Fast Inference from Transformers via Speculative Decoding",
    section 2 (arXiv:2211.17192), for samples that share their random numbers; FLASH
    (github.com/ZihuaEvan/FlashSD).
    """

    def __init__(
        self,
        network: Network,
        order: CellByCell,
        labels: Int64[Tensor, "b"],
        num_kept: int,
        draws: Draws,
        settings: SamplingSettings,
        passes: Drafted,
        targets: Float[Tensor, "t c"] | None = None,
    ) -> None:
        """Allocate the cache.

        Args:
            network: what decodes.
            order: whose sequences these are.
            labels: classes.
            num_kept: K.
            draws: uniform numbers for every token of a sequence.
            settings: guidance, temperature and so on.
            passes: what drafts, and how much.
            targets: vector of the place of each token, added to the input before it.
        """
        self.network, self.order, self.num_kept, self.targets = network, order, num_kept, targets
        self.uniforms, self.settings, self.passes = draws.uniforms, settings, passes
        config, batch, device = network.config, len(draws.uniforms), network.device
        self.num_tokens = config.num_tokens
        scales = guidance_scales(settings, range(self.num_tokens), self.num_tokens)
        self.labels = network.with_unconditional(labels, scales)
        self.scale = scales[0] if len(set(scales)) == 1 else None
        self.scales = torch.tensor(scales, device=device)
        # Rows that are ahead go on past their end, where nothing is read.
        most = self.num_tokens + passes.num_drafted + 1
        self.cache = RowCache(
            config,
            batch=len(self.labels),
            num_slots=config.num_prefix + most,
            device=device,
            dtype=cache_type(network),
        )
        self.kv_bytes = self.cache.num_bytes
        self.memory = (self.cache.keys, self.cache.values)
        self.images = torch.arange(batch, device=device)[:, None]
        self.tokens = torch.zeros(
            batch, most, len(config.part_sizes), dtype=torch.int64, device=device
        )
        self.back = _back(config.grid_size, most, above=passes.draft == "above").to(device)
        self.finite: list[Tensor] = []
        self._restart(0)

    @property
    def num_steps(self) -> int:
        """Passes so far, and one for each token that the image furthest behind lacks."""
        return self.num_passes + self.num_tokens - self.shortest

    def parts(self) -> Int64[Tensor, "b t p"]:
        """Tokens decoded so far of every image."""
        return self.tokens[:, : self.shortest]

    def known(self) -> Bool[Tensor, "b t"]:
        """All of `parts`."""
        return torch.ones_like(self.tokens[:, : self.shortest, 0], dtype=torch.bool)

    @torch.inference_mode()
    def seek(self, step: int, history: Int64[Tensor, "b t p"] | None = None) -> None:
        """Fill in the prefix and take the tokens before a step as decoded (`seams.Decoder`)."""
        target = None if self.targets is None else self.targets[0]
        self.states = prefill(self.network, self.cache, self.labels, self.num_kept, target)
        if history is not None:
            self.tokens[:, :step] = history[:, :step]
        self._restart(step)

    @torch.inference_mode()
    def step(self) -> None:
        """Check a draft of each image; keep what is right of it and the token after."""
        if self.shortest == self.num_tokens:
            return
        count = min(self.passes.num_drafted, self.num_tokens - self.shortest - 1)
        if self.shortest == 0:
            states, count = self.states[:, None], 0
        else:
            self._draft(count)
            states = self._states(count)
        cells = self.lengths[:, None] + torch.arange(count + 1, device=self.lengths.device)
        drafts = self.tokens[self.images, cells]
        places = cells.clamp_max(self.num_tokens - 1)
        scale = self.scales[places].flatten()[:, None] if self.scale is None else self.scale
        chosen = self.network.choose(
            states.flatten(0, 1),
            self.uniforms[self.images, places].flatten(0, 1),
            scale,
            self.settings,
            self.order.restriction(self.network, self.tokens, cells, self.num_kept, self.settings),
        )
        self.finite += chosen.finite
        parts = chosen.parts.unflatten(0, cells.shape)
        self.tokens[self.images, cells] = parts
        right = (parts == drafts).all(-1)[:, :-1].long().cumprod(1).sum(1)
        self.lengths = (self.lengths + right + 1).clamp_max(self.num_tokens)
        self.filled = cells[:, -1] + 1 if self.passes.draft == "previous" else self.lengths
        self.num_passes += 1
        # One read of the device in each pass.
        ahead = (self.filled - self.lengths).min()
        bounds = torch.stack([*self.lengths.aminmax(), ahead]).tolist()
        self.shortest, self.longest, self.ahead = bounds

    def _restart(self, step: int) -> None:
        """Take all before a step as decoded, one token in each."""
        self.num_passes = self.shortest = self.longest = step
        self.lengths = torch.full_like(self.images[:, 0], step)
        self.filled, self.ahead = self.lengths, 0

    def _draft(self, count: int) -> None:
        """Write drafts of the next tokens of each image after those decoded."""
        images = self.images[:, 0]
        for number in range(min(self.ahead, count), count):
            cells = self.lengths + number
            copied = self.tokens[images, cells - self.back[cells]]
            is_old = (cells < self.filled)[:, None]
            self.tokens[images, cells] = torch.where(is_old, self.tokens[images, cells], copied)

    def _states(self, count: int) -> Float[Tensor, "r n c"]:
        """States that predict the next token of each image, and those after its drafts."""
        network, cache = self.network, self.cache
        repeats = len(self.labels) // len(self.images)
        cells = self.lengths[:, None] - 1 + torch.arange(count + 1, device=self.lengths.device)
        inputs = network.embed(self.tokens[self.images, cells].repeat(repeats, 1, 1))
        if self.targets is not None:
            following = (cells + 1).clamp_max(self.num_tokens - 1)
            inputs = add_targets(inputs, self.targets[following].repeat(repeats, 1, 1))
        slots = network.config.num_prefix + cells
        end = network.config.num_prefix + self.longest + count
        cache.put_at(slots.repeat(repeats, 1), end)
        where = cells.clamp_max(self.num_tokens - 1)
        turns = Rotation(
            *(table[0, 0, where][:, None].repeat(repeats, 1, 1, 1) for table in cache.turns)
        )
        seen = self.order.seen(network, self.tokens, slots, end).repeat(repeats, 1, 1)
        return network.transform(inputs, turns, seen, cache)


def _back(grid_size: tuple[int, int], count: int, *, above: bool) -> Int64[Tensor, "m"]:
    """Cells from each back to that which its draft copies; beyond the grid as in the last row."""
    cells = torch.arange(count)
    columns = grid_size[1]
    has_left, has_above = cells % columns > 0, cells >= columns
    is_above = has_above if above else has_above & ~has_left
    return torch.where(is_above, columns, 1)
