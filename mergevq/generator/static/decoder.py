"""Decoding in steps of one shape, each of which a GPU can take as one captured graph.

Source: Li et al. 2025, "MergeVQ", section 3.4 and figure 6 (arXiv:2504.00999).

The place in the sequence, the tokens, the slots of a cache and its tables are tensors on the
device. A step writes into them, attends to the whole cache under a mask, and reads nothing on the
host. It chooses what `decoding.SequenceDecoder` does, whose views of the cache grow: on a CPU those
are faster, as a masked slot costs there as much as any other.

Shape letters: B images, R rows (B, or 2B with guidance: conditional ones first), T tokens of a
sequence, P parts of a token, C channels.
"""

import logging
from collections.abc import Callable
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from mergevq.config.generator import (
    SamplingSettings,
)
from mergevq.config.parts.heads import Bits
from mergevq.generator.decoding import (
    SequenceDecoder,
    TokenByToken,
    prefill,
    put_in,
)
from mergevq.generator.network import Cache, Network, Restriction
from mergevq.generator.sampling import guidance_scales
from mergevq.generator.seams import Decoder, Draws
from mergevq.nn.llama import Rotation
from mergevq.runtime.device import decodes_in_one_shape, send

logger = logging.getLogger("mergevq")

_WARM_UP = 3
"""Steps before the captured one, in which libraries choose kernels and allocate what they need."""


@runtime_checkable
class StaticRules(Protocol):
    """Which values the tokens of a batch may have, from tensors on the device."""

    def at(self, token: Int64[Tensor, "1"], previous: Int64[Tensor, "b p"]) -> Restriction:
        """Rules for a token, after another; before the first token there are zeros."""
        ...


@runtime_checkable
class StaticOrder(TokenByToken, Protocol):
    """An order that decodes token by token, in steps of one shape too."""

    def static_cache(
        self, network: Network, *, batch: int, num_kept: int, settings: SamplingSettings
    ) -> Cache:
        """An empty cache for `batch` rows and all tokens, the last one too."""
        ...

    def static_rules(
        self,
        network: Network,
        cache: Cache,
        *,
        batch: int,
        num_kept: int,
        settings: SamplingSettings,
    ) -> StaticRules | None:
        """Rules for a batch of images, the first rows of the cache; None if there are none."""
        ...

    def static_turns(
        self, cache: Cache, parts: Int64[Tensor, "r p"], token: Int64[Tensor, "1"]
    ) -> Rotation:
        """Turns of the position of a token of each row."""
        ...


def token_decoder(
    network: Network,
    order: StaticOrder,
    labels: Int64[Tensor, "b"],
    num_kept: int,
    draws: Draws,
    settings: SamplingSettings,
    targets: Float[Tensor, "t c"] | None = None,
) -> Decoder:
    """A decoder of one token in each step, as the network's device is faster.

    A head of bits sends numbers of the host to the device in each step, which no graph can.
    """
    is_static = decodes_in_one_shape(network.device) and not isinstance(network.config.head, Bits)
    make = StaticDecoder if is_static else SequenceDecoder
    return make(network, order, labels, num_kept, draws, settings, targets)


def capture(step: Callable[[], None], device: torch.device) -> Callable[[], None]:
    """Let a step of one shape be captured once as a CUDA graph, and then be replayed.

    Elsewhere it is the step itself. The lines below the first are the only ones of decoding that
    no CPU can run: the first calls take the step on a stream of its own, as capturing demands. A
    step that cannot be captured is launched each time, with a warning.
    """
    if device.type != "cuda":
        return step
    graph, side, calls = torch.cuda.CUDAGraph(), torch.cuda.Stream(device), 0
    take = step

    def replayed() -> None:
        nonlocal calls, take
        if calls < _WARM_UP:
            side.wait_stream(torch.cuda.current_stream(device))
            with torch.cuda.stream(side):
                step()
            torch.cuda.current_stream(device).wait_stream(side)
        elif calls == _WARM_UP:
            try:
                with torch.cuda.graph(graph):
                    step()
                take = graph.replay
            except RuntimeError as error:
                logger.warning("decoding is slower: a step could not be captured (%s)", error)
        if calls >= _WARM_UP:
            take()
        calls += 1

    return replayed


class StaticDecoder:
    """Sequences that are decoded token by token in steps of one shape (`seams.Decoder`)."""

    def __init__(
        self,
        network: Network,
        order: StaticOrder,
        labels: Int64[Tensor, "b"],
        num_kept: int,
        draws: Draws,
        settings: SamplingSettings,
        targets: Float[Tensor, "t c"] | None = None,
    ) -> None:
        """Allocate everything; arguments are those of `decoding.SequenceDecoder`."""
        self.network, self.order, self.num_kept = network, order, num_kept
        self.settings, self.targets, device = settings, targets, network.device
        self.uniforms = draws.uniforms
        batch, self.num_steps = self.uniforms.shape[:2]
        scales = guidance_scales(settings, range(self.num_steps), self.num_steps)
        self.rows = network.with_unconditional(labels, scales)
        self.scale = scales[0] if len(set(scales)) == 1 else None
        self.scales = send(torch.tensor(scales), device)
        options = {"num_kept": num_kept, "settings": settings}
        self.cache = order.static_cache(network, batch=len(self.rows), **options)
        self.rules = order.static_rules(network, self.cache, batch=batch, **options)
        self.kv_bytes = self.cache.num_bytes
        self.memory = (self.cache.keys, self.cache.values)
        num_parts = len(network.config.part_sizes)
        self.tokens = torch.zeros(
            batch, self.num_steps, num_parts, dtype=torch.int64, device=device
        )
        self.token = torch.zeros(1, dtype=torch.int64, device=device)
        """Number of the next token."""
        self.is_finite = torch.ones((), dtype=torch.bool, device=device)
        self.finite = [self.is_finite]
        self.states = torch.zeros(len(self.rows), network.config.dim, device=device).to(
            network.dtype
        )
        self.num_done = 0
        self._take = capture(self._advance, device)

    def parts(self) -> Int64[Tensor, "b t p"]:
        """Tokens decoded so far."""
        return self.tokens[:, : self.num_done]

    def known(self) -> Bool[Tensor, "b t"]:
        """All of `parts`."""
        shape = len(self.tokens), self.num_done * self.network.config.order.tokens_per_step
        return torch.ones(shape, dtype=torch.bool, device=self.network.device)

    @torch.inference_mode()
    def seek(self, step: int, history: Int64[Tensor, "b t p"] | None = None) -> None:
        """Fill in the prefix and take the tokens before a step as decoded (`seams.Decoder`)."""
        target = None if self.targets is None else self.targets[0]
        states = prefill(self.network, self.cache, self.rows, self.num_kept, target)
        self.states.copy_(states)
        self.is_finite.fill_(value=True)
        if history is not None:
            self.tokens[:, :step] = history[:, :step]
        for parts in self.tokens[:, :step].unbind(1):
            repeats = len(self.rows) // len(self.tokens)
            self.cache.place(self.network.indices(parts.repeat(repeats, 1)))
            self.cache.advance(1)
        self.token.fill_(step)
        self.num_done = step

    @torch.inference_mode()
    def step(self) -> None:
        """Choose the next token of each image and put it in."""
        self._take()
        self.num_done += 1

    def _advance(self) -> None:
        """The same on the device alone; all that a graph of it has to repeat.

        The last token is put in too, where nothing comes after it.
        """
        network, token, batch = self.network, self.token, len(self.tokens)
        scale = self.scale
        if scale is None:
            scale = self.scales.index_select(0, token)[:, None].expand(batch, 1)
        restriction = None
        if self.rules is not None:
            previous = self.tokens.index_select(1, (token - 1).clamp_min(0))[:, 0]
            restriction = self.rules.at(token, torch.where(token == 0, 0, previous))
        uniforms = self.uniforms.index_select(1, token)[:, 0]
        chosen = network.choose(self.states, uniforms, scale, self.settings, restriction)
        self.is_finite.logical_and_(torch.stack(chosen.finite).all())
        self.tokens.index_copy_(1, token, chosen.parts[:, None])
        parts = chosen.parts.repeat(len(self.rows) // batch, 1)
        turns = self.order.static_turns(self.cache, parts, token)
        following = (token + 1).clamp_max(self.num_steps - 1)
        target = None if self.targets is None else self.targets.index_select(0, following)[0]
        self.states.copy_(put_in(network, self.cache, parts, turns, target))
        token.add_(1)
