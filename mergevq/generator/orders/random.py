"""Random order: the kept tokens in any order, each after an instruction that names its slot.

Source: Pang et al. 2024, "RandAR", sections 3 and 4 (arXiv:2412.01827).

    [class, M, P_1, x_1, P_2, x_2 ..]

M is the merge instruction, an embedding of K; P_i says which slot is next, x_i is that slot's
token.

Differs: slot k of K is rotated by the cell k L / K, where RandAR needs a square number of slots;
tokens that RandAR decodes in one pass do not see each other's instructions, so each has exactly the
distribution that training gave it; RandAR's code lets later ones see earlier ones.

Shape letters: B images, R rows (B, or 2B with guidance: conditional ones first), K kept tokens,
T tokens of a sequence (K), P parts of a token, C channels, N new inputs, M tokens decoded in one
pass.
"""

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor, nn
from torch.nn import functional

from mergevq.config.generator import (
    GeneratorConfig,
    SamplingSettings,
)
from mergevq.config.parts import orders as config
from mergevq.generator.cache import FullCache
from mergevq.generator.decoding import full_cache
from mergevq.generator.network import INITIAL_STD, Network
from mergevq.generator.sampling import (
    arccos_schedule,
    guidance_scales,
    num_passes,
    run,
)
from mergevq.generator.seams import Decoder, Draws, Layout, Numbers, Sampled, Sequences
from mergevq.nn.llama import rotate
from mergevq.runtime.device import send


class Random(nn.Module):
    """Kept tokens in any order (`seams.Order`), some of which may be given (`seams.FillsIn`)."""

    def __init__(self, order: config.Random, sizes: GeneratorConfig) -> None:
        """Make the instruction."""
        super().__init__()
        self.config = order
        self.instruction = nn.Parameter(torch.empty(sizes.dim))

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Draw the instruction anew."""
        nn.init.normal_(self.instruction, std=INITIAL_STD, generator=generator)

    def draw(self, sequences: Sequences, numbers: Numbers) -> Sequences:
        """A random permutation of the slots for each sequence."""
        slots = numbers.uniform("orders", sequences.indices.shape[1])
        return sequences._replace(slots=send(slots, sequences.indices.device).argsort(-1))

    def num_inputs(self, config: GeneratorConfig, num_kept: int) -> int:
        """The prefix, and an instruction and a token for each slot; the last token is left out."""
        return config.num_prefix + 2 * num_kept - 1

    def parts(
        self,
        codes: Int64[Tensor, "b t f"],
        sequences: Sequences,  # noqa: ARG002
        config: GeneratorConfig,  # noqa: ARG002
    ) -> Int64[Tensor, "b t p"]:
        """The sub-indices alone."""
        return codes

    def layout(
        self, network: Network, parts: Int64[Tensor, "b t p"], sequences: Sequences
    ) -> Layout:
        """Interleave instructions and tokens; states of the instructions predict."""
        slots = sequences.slots
        if slots is None:
            raise ValueError("order 'random' needs slots, as they are decoded: see Generator.draw")
        prefix = network.embed_prefix(sequences.class_label, sequences.num_kept)
        parts = parts.gather(1, slots[..., None].expand_as(parts))
        where = slot_positions(network, slots.shape[1])[slots]
        inputs, positions = self.pairs(network, parts, where)
        inputs = torch.cat([prefix, inputs[:, :-1]], dim=1)
        positions = functional.pad(positions[:, :-1], (0, 0, prefix.shape[1], 0))
        reads = torch.arange(prefix.shape[1], inputs.shape[1], 2, device=inputs.device)
        return Layout(inputs, positions, None, reads, parts, parts, {}, slots)

    def embed_instruction(
        self, network: Network, positions: Float[Tensor, "b n 2"]
    ) -> Float[Tensor, "b n c"]:
        """Position instructions: one shared vector, turned by where the next token goes."""
        batch, length, _ = positions.shape
        vector = self.instruction.expand(batch, length, -1)
        if not self.config.rotate_instruction:
            return vector
        heads = vector.unflatten(-1, (network.config.num_heads, -1)).transpose(1, 2)
        turned = rotate(heads, network.turns(positions)).to(vector.dtype)
        return turned.transpose(1, 2).flatten(2)

    def pairs(
        self, network: Network, parts: Int64[Tensor, "b t p"], positions: Float[Tensor, "b t 2"]
    ) -> tuple[Float[Tensor, "b n c"], Float[Tensor, "b n 2"]]:
        """Inputs P_1, x_1, P_2, x_2 .., and their positions."""
        instructions = self.embed_instruction(network, positions)
        both = torch.stack([instructions, network.embed(parts)], dim=2)
        return both.flatten(1, 2), positions.repeat_interleave(2, dim=1)

    @torch.no_grad()
    def put(
        self,
        network: Network,
        cache: FullCache,
        inputs: Float[Tensor, "r n c"],
        positions: Float[Tensor, "r n 2"],
        wanted: Float[Tensor, "r m 2"],
    ) -> Float[Tensor, "r m c"]:
        """Put inputs in and return states that predict the slots wanted next.

        One pass does both. The instructions of the slots wanted see all inputs and themselves, not
        each other, and leave nothing in the cache: each goes in again with its token, at its place
        in the sequence.

        Args:
            network: what the inputs are put through.
            cache: holding all inputs before.
            inputs: the prefix, or instructions and tokens decoded by the pass before.
            positions: of the inputs.
            wanted: positions of the slots to predict.
        """
        num_new, num_wanted = inputs.shape[1], wanted.shape[1]
        block = torch.ones(num_new + num_wanted, num_new + num_wanted, device=inputs.device).tril()
        block[num_new:, num_new:] = torch.eye(num_wanted, device=inputs.device)
        mask = functional.pad(block.bool(), (cache.length, 0), value=True)[None]
        inputs = torch.cat([inputs, self.embed_instruction(network, wanted)], dim=1)
        turns = network.turns(torch.cat([positions, wanted], dim=1))
        states = network.transform(inputs, turns, mask, cache)
        cache.advance(num_new)
        return states[:, num_new:]

    def decoder(
        self,
        network: Network,
        labels: Int64[Tensor, "b"],
        num_kept: int,
        draws: Draws,
        settings: SamplingSettings,
    ) -> "SlotsDecoder":
        """Several slots in each step."""
        counts = arccos_schedule(num_kept, num_passes(settings, num_kept))
        return SlotsDecoder(network, self, labels, draws, settings, counts)

    def sampled(self, network: Network, decoder: Decoder) -> Sampled:
        """Kept tokens in canonical order."""
        indices = network.indices(decoder.parts())
        return Sampled(indices, None, None, decoder.num_steps, decoder.kv_bytes)

    def inpaint(
        self,
        network: Network,
        indices: Int64[Tensor, "b k"],
        keep: Bool[Tensor, "b k"],
        labels: Int64[Tensor, "b"],
        draws: Draws,
        settings: SamplingSettings,
    ) -> Sampled:
        """Decode the slots that are not kept after those that are."""
        num_kept = indices.shape[1]
        indices = indices.where(keep, 0)
        num_forward = kv_bytes = 0
        # Images that keep equally many tokens decode together, so that none depends on its batch.
        for num_given in sorted(set(keep.sum(1).tolist()) - {num_kept}):
            rows = (keep.sum(1) == num_given).nonzero()[:, 0]
            order = draws.order[rows]
            is_given = keep[rows].gather(1, order).int()
            given_first = is_given.sort(dim=1, descending=True, stable=True).indices
            missing = num_kept - num_given
            decoder = SlotsDecoder(
                network,
                self,
                labels[rows],
                draws._replace(uniforms=draws.uniforms[rows], order=order.gather(1, given_first)),
                settings,
                arccos_schedule(missing, min(missing, num_passes(settings, missing))),
                network.codes(indices[rows]),
            )
            run(decoder)
            indices[rows] = network.indices(decoder.parts())
            num_forward += decoder.num_steps
            kv_bytes = max(kv_bytes, decoder.kv_bytes)
        return Sampled(indices, None, None, num_forward, kv_bytes)


class SlotsDecoder:
    """Sequences of which several slots are decoded in each step (`seams.Decoder`)."""

    def __init__(
        self,
        network: Network,
        order: Random,
        labels: Int64[Tensor, "b"],
        draws: Draws,
        settings: SamplingSettings,
        counts: list[int],
        given: Int64[Tensor, "b t p"] | None = None,
    ) -> None:
        """Allocate the cache.

        Args:
            network: what decodes.
            order: whose sequences these are.
            labels: classes.
            draws: uniform numbers by slot, and the slots in the order in which they are decoded.
            settings: guidance, temperature and so on.
            counts: slots decoded in each step.
            given: tokens in canonical order; the slots not counted come first, and have theirs.
        """
        self.network, self.order, self.settings, self.draws = network, order, settings, draws
        batch, num_kept, _ = draws.uniforms.shape
        self.counts, self.num_steps = counts, len(counts)
        starts = [sum(counts[:step]) for step in range(len(counts))]
        self.scales = guidance_scales(settings, starts, sum(counts))
        self.rows = network.with_unconditional(labels, self.scales)
        self.num_branches = len(self.rows) // batch
        self.cache = full_cache(network, len(self.rows), 2 * num_kept - 1)
        self.kv_bytes = self.cache.num_bytes
        self.memory = (self.cache.keys, self.cache.values)
        self.slots = draws.order.repeat(self.num_branches, 1)
        self.where = slot_positions(network, num_kept)
        self.num_given = num_kept - sum(counts)
        empty = torch.zeros_like(draws.uniforms, dtype=torch.int64)
        self.given = empty if given is None else given
        self.finite: list[Tensor] = []

    def parts(self) -> Int64[Tensor, "b t p"]:
        """Tokens in canonical order; zeros where none is decoded yet."""
        return self.tokens

    def known(self) -> Bool[Tensor, "b t"]:
        """The slots that came first."""
        slots = self.slots[: len(self.tokens), : self.done]
        return torch.zeros_like(self.tokens[..., 0], dtype=torch.bool).scatter(1, slots, value=True)

    @torch.inference_mode()
    def seek(self, step: int, history: Int64[Tensor, "b t p"] | None = None) -> None:
        """Take the tokens before a step as decoded, and but for those of the last as put in."""
        network = self.network
        self.cache.reset()
        self.tokens = (self.given if history is None else history).clone()
        self.number, self.done = step, self.num_given + sum(self.counts[:step])
        self.inputs = network.embed_prefix(self.rows, self.slots.shape[1])
        self.positions = torch.zeros(*self.inputs.shape[:2], 2, device=self.inputs.device)
        first, prefix = 0, self.inputs.shape[1]
        if step:
            first = self.done - self.counts[step - 1]
            self.cache.advance(prefix + 2 * first)
        if self.done:
            before = self.slots[:, first : self.done]
            more, where = self._pairs(
                _at(self.tokens.repeat(self.num_branches, 1, 1), before), before
            )
            if step:
                self.inputs, self.positions = more, where
            else:
                self.inputs = torch.cat([self.inputs, more], dim=1)
                self.positions = torch.cat([self.positions, where], dim=1)

    @torch.inference_mode()
    def step(self) -> None:
        """Put in what the step before decoded and decode some more slots."""
        count, batch = self.counts[self.number], len(self.draws.uniforms)
        wanted = self.slots[:, self.done : self.done + count]
        states = self.order.put(
            self.network, self.cache, self.inputs, self.positions, self.where[wanted]
        )
        chosen = self.network.choose(
            states.flatten(0, 1),
            _at(self.draws.uniforms, wanted[:batch]).flatten(0, 1),
            self.scales[self.number],
            self.settings,
        )
        self.finite += chosen.finite
        tokens = chosen.parts.unflatten(0, (batch, count))
        self.tokens.scatter_(1, wanted[:batch, :, None].expand_as(tokens), tokens)
        self.inputs, self.positions = self._pairs(tokens.repeat(self.num_branches, 1, 1), wanted)
        self.done, self.number = self.done + count, self.number + 1

    def _pairs(
        self, tokens: Int64[Tensor, "r m p"], slots: Int64[Tensor, "r m"]
    ) -> tuple[Float[Tensor, "r n c"], Float[Tensor, "r n 2"]]:
        """Instructions and tokens of some slots, and where they are."""
        return self.order.pairs(self.network, tokens, self.where[slots])


def slot_positions(network: Network, num_kept: int) -> Float[Tensor, "k 2"]:
    """Where slot k of K is: at the cell k L / K, near which it opens in canonical order."""
    slots = torch.arange(num_kept, device=network.device)
    return network.cell_positions()[slots * network.config.num_tokens // num_kept]


def _at(values: Tensor, index: Int64[Tensor, "b m"]) -> Tensor:
    """Rows of each image's (T, P) table at some of its T positions."""
    return values.gather(1, index[..., None].expand(-1, -1, values.shape[-1]))
