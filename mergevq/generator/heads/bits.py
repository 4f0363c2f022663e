"""The head that predicts the bits of a token block by block, each from the blocks before it.

Source: BAR (github.com/noctrog/BAR): masked bits of a token, a few unmasked at a time.

Parts that are not predicted yet are masked: a vector of their own stands for them. One network
takes visible and masked parts and predicts all that are masked, each by itself; the state enters as
scale, shift and gate of its layers. Asked once for each block of a fixed schedule, it gives the
exact probability of a token: the product over blocks, and in a block over parts, given the blocks
before. One block for all parts is the assumption that they are independent, given the state.

Parts that an order puts before the bits (a cell, a relation) are a block each, as an order's rules
for one depend on those before.

Sampling may unmask the bits of the highest confidence first instead, as BAR does; tokens then have
no known probability.

Differs: blocks are in a fixed order by default; confidence is a log-probability, where BAR has a
logit, to which any constant may be added; training is on the probability of the fixed order, all
blocks of the schedule, or, with `masking` set to `mixed`, by BAR's random masks for half of the
tokens and a random block and all after it for the others, as BAR's leave nothing visible in one
token of thousands alone; the number of masked parts is a learned vector, where BAR has a network
over Fourier features of their share; embeddings of parts are those of the transformer; the
condition passes one SiLU, not one more in each layer.

Shape letters: N tokens, B images, P parts of a token, S blocks, C channels, W width, K bits of a
cell, Q random numbers of a token in training, U in sampling, R is B, or 2B with guidance.
"""

from collections.abc import Sequence
from itertools import accumulate

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor, nn
from torch.nn import functional

from mergevq.config.generator import (
    GeneratorConfig,
    SamplingSettings,
)
from mergevq.config.parts import heads as config
from mergevq.generator.network import Chosen, Embed, Predicted, Restriction
from mergevq.generator.sampling import choose_part, choose_parts, of_part
from mergevq.nn.llama import Projection, RmsNorm, SwiGlu

_NUM_DRAWS = 3
"""Random numbers of a token besides one for each bit: block, way of masking, masked share."""
_SHARE = 0.5
"""Tokens of which a block and all after it are masked, and no other bits."""
_LOGIT_STD = 0.8
"""Spread of the logit of the masked share, as in BAR's code."""


class Bits(nn.Module):
    """Predicts the parts of one token block by block, from the state and the blocks before."""

    def __init__(self, sizes: GeneratorConfig, head: config.Bits) -> None:
        """Build the layers and one output layer for each part."""
        super().__init__()
        width = head.width or sizes.dim
        num_parts = len(sizes.part_sizes)
        self.starts = block_starts(sizes, head)
        """First part of each block."""
        self.num_bits, self.visible_weight = len(head.sizes), head.visible_weight
        self.block_sizes = head.block_sizes
        self.per_cell = num_parts // sizes.order.tokens_per_step
        self.num_uniforms = _NUM_DRAWS + self.num_bits if head.masking == "mixed" else 0
        """Random numbers of a token in training (`network.RandomHead`)."""
        self.masks = nn.Embedding(num_parts, sizes.dim)
        self.counts = nn.Embedding(num_parts, width)
        self.inputs = nn.ModuleList(Projection(sizes.dim, width) for _ in range(2))
        self.state_norm = RmsNorm(sizes.dim)
        self.input_norm = RmsNorm(width)
        self.blocks = nn.ModuleList(Modulated(width) for _ in range(head.num_layers))
        self.norm = RmsNorm(width)
        self.modulations = nn.ModuleList([Projection(width, 2 * width)])
        self.outputs = nn.ModuleList(Projection(width, size) for size in sizes.part_sizes)

    @property
    def layers(self) -> list[nn.ModuleList]:
        """Projections, which decoding may replace by faster ones."""
        return [self.inputs, self.modulations, self.outputs]

    @torch.no_grad()
    def reset_outputs(self) -> None:
        """Make all values equally likely, and every layer the identity, as training starts."""
        projections = [block.get_submodule("modulation") for block in self.blocks]
        for projection in (*projections, *self.modulations, *self.outputs):
            nn.init.zeros_(projection.get_parameter("weight"))

    def forward(
        self, states: Float[Tensor, "n c"], parts: Int64[Tensor, "n p"], embed: Embed
    ) -> list[Float[Tensor, "n _"]]:
        """Logits, float32, of each part given the true blocks before its own.

        Args:
            states: of the transformer, one for each token.
            parts: of the tokens.
            embed: embeddings of one part.
        """
        known = [embed(part, parts[:, part]) for part in range(self.starts[-1])]
        inputs = torch.stack([self._input(known[:start], states) for start in self.starts], dim=1)
        num_known = torch.tensor(self.starts).to(inputs.device, non_blocking=True)
        found = self._predict(inputs, states[:, None], num_known)
        blocks = [sum(start <= part for start in self.starts) - 1 for part in range(parts.shape[1])]
        return [
            output(found[:, block]).float()
            for output, block in zip(self.outputs, blocks, strict=True)
        ]

    def masked(
        self,
        states: Float[Tensor, "n c"],
        parts: Int64[Tensor, "n p"],
        embed: Embed,
        uniforms: Float[Tensor, "n q"],
    ) -> Predicted:
        """Mask some parts of each token and predict all; see `network.RandomHead.masked`."""
        masks = self.draw_masks(uniforms)
        known = [embed(part, values) for part, values in enumerate(parts.unbind(-1))]
        chosen = torch.where(masks[..., None], self.masks.weight, torch.stack(known, dim=1))
        num_known = (~masks).sum(-1, keepdim=True)
        found = self._predict(chosen.sum(1, keepdim=True), states[:, None], num_known)[:, 0]
        weights = masks + self.visible_weight * ~masks
        return Predicted([output(found).float() for output in self.outputs], weights)

    def draw_masks(self, uniforms: Float[Tensor, "n q"]) -> Bool[Tensor, "n p"]:
        """Parts of each token to mask, by its numbers; at least one.

        A block is drawn, and all after it is masked: for half of the tokens with the whole block,
        for the others with some bits of the block's cell, of which a number is drawn as BAR does
        and any are as likely.
        """
        device = uniforms.device
        starts = torch.tensor(self.starts).to(device, non_blocking=True)
        parts = torch.arange(len(self.outputs), device=device)
        start = starts[(uniforms[:, :1] * len(starts)).long()]
        # Of a logit that is normal, as the share of visible parts in BAR: either is as likely.
        share = (_LOGIT_STD * torch.special.ndtri(uniforms[:, 2:3])).sigmoid()
        count = (share * self.num_bits).round().clamp(1, self.num_bits)
        some = uniforms[:, _NUM_DRAWS:].argsort(-1).argsort(-1) < count
        end = (start // self.per_cell + 1) * self.per_cell
        place = (parts - end + self.num_bits).clamp(0, self.num_bits - 1)
        is_bit = (parts >= end - self.num_bits) & (parts < end)
        at_random = (parts >= end) | (is_bit & some.gather(1, place))
        return torch.where(uniforms[:, 1:2] < _SHARE, parts >= start, at_random)

    def choose(
        self,
        states: Float[Tensor, "r c"],
        uniforms: Float[Tensor, "b p"],
        scale: float | Float[Tensor, "b 1"],
        settings: SamplingSettings,
        embed: Embed,
        restriction: Restriction | None = None,
        *,
        scored: bool = False,
    ) -> Chosen:
        """Choose the parts of one token for each image; see `network.Head.choose`.

        Raises:
            ValueError: a log-probability was asked for, which bits by confidence do not have.
        """
        if settings.bits_order == "confidence":
            if scored:
                raise ValueError(
                    f"bits_order ({settings.bits_order}) must be 'schedule' where the probability "
                    "of a token is needed: it is not known of bits chosen by confidence"
                )
            return self._choose_surest(states, uniforms, scale, settings, embed, restriction)
        repeats = len(states) // len(uniforms)
        # What the network found for the block at hand.
        found: list[Tensor] = []

        def logits_of(part: int, chosen: Sequence[Tensor]) -> Tensor:
            if part in self.starts:
                known = [embed(number, part) for number, part in enumerate(chosen)]
                inputs = self._input([each.repeat(repeats, 1) for each in known], states)
                num_known = torch.tensor([part]).to(inputs.device, non_blocking=True)
                found[:] = [self._predict(inputs[:, None], states[:, None], num_known)[:, 0]]
            return self.outputs[part](found[0]).float()

        return choose_parts(logits_of, uniforms, scale, settings, restriction, scored=scored)

    def _choose_surest(
        self,
        states: Float[Tensor, "r c"],
        uniforms: Float[Tensor, "b u"],
        scale: float | Float[Tensor, "b 1"],
        settings: SamplingSettings,
        embed: Embed,
        restriction: Restriction | None,
    ) -> Chosen:
        """Choose the bits of each cell in as many passes as there are blocks, the surest first.

        A pass chooses all bits that are masked. Those of the highest confidence stay, with earlier
        ones as many as all blocks so far have; the others are masked again. Confidence is the
        log-probability of the value with Gumbel noise. Temperature and noise fall over the passes.
        Parts of the order are chosen before, one by one.
        """
        values = torch.zeros(
            len(uniforms), len(self.outputs), dtype=torch.int64, device=states.device
        )
        visible = torch.zeros_like(values, dtype=torch.bool)
        finite: list[Tensor] = []
        numbers = iter(uniforms.unbind(-1))

        def choose(parts: range, start: int, warmth: float) -> tuple[Tensor, Tensor]:
            """Values of some parts, and logits of theirs, by what is visible."""
            found = self._found(values, visible, states, embed)
            before = values[:, :start].unbind(-1)
            fresh, log_probs = [], []
            for part in parts:
                logits = self.outputs[part](found).float()
                finite.append(logits.isfinite().all())
                value, logits = choose_part(
                    part, logits, next(numbers), scale, settings, restriction, before, warmth=warmth
                )
                log_probs.append(logits.log_softmax(-1).gather(1, value[:, None])[:, 0])
                fresh.append(
                    value if restriction is None else restriction.part(part, value, before)
                )
            return torch.stack(fresh, dim=-1), torch.stack(log_probs, dim=-1)

        for end in range(self.per_cell, len(self.outputs) + 1, self.per_cell):
            bits = range(end - self.num_bits, end)
            for part in range(end - self.per_cell, bits.start):
                values[:, part] = choose(range(part, part + 1), part, 1.0)[0][:, 0]
                visible[:, part] = True
            for block, count in enumerate(accumulate(self.block_sizes)):
                warmth = 1 - block / len(self.block_sizes)
                fresh, confidence = choose(bits, bits.start, warmth)
                noise = gumbel(torch.stack([next(numbers) for _ in bits], dim=-1))
                scales = [of_part(settings.temperature, part) * warmth for part in bits]
                confidence = confidence + noise * noise.new_tensor(scales)
                own = slice(bits.start, end)
                values[:, own] = torch.where(visible[:, own], values[:, own], fresh)
                visible[:, own] = surest(confidence, visible[:, own], count)
        return Chosen(values, finite, None)

    def _found(
        self,
        values: Int64[Tensor, "b p"],
        visible: Bool[Tensor, "b p"],
        states: Float[Tensor, "r c"],
        embed: Embed,
    ) -> Float[Tensor, "r w"]:
        """Input of the output layers, by the parts that are visible."""
        repeats = len(states) // len(values)
        known = torch.stack([embed(part, each) for part, each in enumerate(values.unbind(-1))], 1)
        inputs = torch.where(visible[..., None], known, self.masks.weight).sum(1, keepdim=True)
        num_known = visible.sum(-1, keepdim=True).repeat(repeats, 1)
        return self._predict(inputs.repeat(repeats, 1, 1), states[:, None], num_known)[:, 0]

    def _input(
        self, known: Sequence[Float[Tensor, "n c"]], states: Float[Tensor, "n c"]
    ) -> Float[Tensor, "n c"]:
        """Sum of the embeddings of the first parts and of the vectors of the masked ones."""
        masked = self.masks.weight[len(known) :].sum(0).expand_as(states)
        return torch.stack([*known, masked], dim=0).sum(0)

    def _predict(
        self,
        inputs: Float[Tensor, "n s c"],
        states: Float[Tensor, "n 1 c"],
        num_known: Int64[Tensor, "*_ s"],
    ) -> Float[Tensor, "n s w"]:
        """Input of the output layers, by the number of parts that each row of inputs has."""
        to_inputs, to_condition = self.inputs
        condition = to_condition(self.state_norm(states)) + self.counts(num_known)
        condition = functional.silu(condition)
        x = self.input_norm(to_inputs(inputs))
        for block in self.blocks:
            x = block(x, condition)
        scale, shift = self.modulations[0](condition).chunk(2, dim=-1)
        return self.norm(x) * (1 + scale) + shift


class Modulated(nn.Module):
    """A residual feed-forward layer whose scale, shift and gate are functions of a condition."""

    def __init__(self, width: int) -> None:
        """Make the projections; the gated layer has 8/3 of the width."""
        super().__init__()
        self.norm = RmsNorm(width)
        self.modulation = Projection(width, 3 * width)
        self.ffn = SwiGlu(width, 8 * width // 3)

    def forward(
        self, x: Float[Tensor, "n s w"], condition: Float[Tensor, "n s w"]
    ) -> Float[Tensor, "n s w"]:
        """Apply to each row alone."""
        scale, shift, gate = self.modulation(condition).chunk(3, dim=-1)
        return x + gate * self.ffn(self.norm(x) * (1 + scale) + shift)


def gumbel(uniforms: Float[Tensor, "*b"]) -> Float[Tensor, "*b"]:
    """Numbers of the standard Gumbel distribution, at the places of uniform ones."""
    smallest = torch.finfo(uniforms.dtype).tiny
    return -(-uniforms.clamp_min(smallest).log()).log()


def surest(
    confidence: Float[Tensor, "b k"], visible: Bool[Tensor, "b k"], count: int
) -> Bool[Tensor, "b k"]:
    """The `count` bits of the highest confidence, all visible ones among them; no more than that.

    Of equal ones the first.
    """
    confidence = confidence.masked_fill(visible, torch.inf)
    ranks = confidence.argsort(dim=-1, descending=True, stable=True).argsort(-1)
    return ranks < count


def block_starts(sizes: GeneratorConfig, head: config.Bits) -> tuple[int, ...]:
    """First part of each block: parts of the order one by one, bits by the schedule."""
    per_cell = len(sizes.part_sizes) // sizes.order.tokens_per_step
    blocks = (1,) * (per_cell - len(head.sizes)) + head.block_sizes
    return tuple(accumulate(blocks * sizes.order.tokens_per_step, initial=0))[:-1]
