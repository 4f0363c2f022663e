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
    SamplingSettings,
)
from mergevq.generator.cache import FullCache
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
