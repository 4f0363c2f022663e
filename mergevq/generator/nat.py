"""Masked generators: all cells at once in a few passes, the most confident first.

Source: Chang et al. 2022, "MaskGIT: Masked Generative Image Transformer", section 3
(arXiv:2202.04200), with the masking and decoding of Yu et al. 2024, "An Image is Worth 32 Tokens",
appendix (TiTok, arXiv:2406.07550); Ni et al. 2024, "ENAT: Rethinking Spatial-Temporal Interactions
in Token-Based Image Synthesis", section 4 (arXiv:2411.06959).

    MaskGIT    [class, M, x_1 or mask .. x_L or mask]         every input sees all others
    ENAT       [class, M, visible tokens]                     see each other
               [mask tokens]                                  see visible features, each other

M is the merge instruction, an embedding of K. Each pass predicts all hidden tokens and keeps those
of the highest confidence: the log-probability of the token that was chosen, plus noise. With
`reuse` a pass encodes only the tokens that the pass before kept; these attend to the features of
older ones, which a residual network carries over.

Differs: a mask share is drawn for each sequence, not for a batch; confidence is a log-probability,
of all parts of a token, where TiTok's code ranks raw logits; progress of guidance is the share of
tokens that are known, as in the other orders; the class is an input, where ENAT modulates norms by
it; old features are learned with the rest, where ENAT takes them from an averaged network without
gradient; outputs are not tied to the input table.

Shape letters: B batch, R rows (B, or 2B with guidance: conditional ones first), L grid cells,
P parts of a token, C channels, N inputs, M hidden tokens, V visible tokens, O old features.
"""

import functools
import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from mergevq.config.generator import (
    GeneratorConfig,
    SamplingSettings,
    Several,
)
from mergevq.config.parts.orders import (
    Masked,
)
from mergevq.generator.network import INITIAL_STD, Network, described, fill, make_block
from mergevq.generator.sampling import (
    arccos_schedule,
    draw,
    even_schedule,
    guidance_scales,
    num_passes,
    run,
)
from mergevq.generator.seams import (
    Decoder,
    Draws,
    GeneratorLoss,
    Numbers,
    Sampled,
    Sequences,
)
from mergevq.nn.attention import attend
from mergevq.nn.llama import Block, Projection, Recall, RmsNorm, Rotation, SwiGlu, rotate
from mergevq.runtime.device import send

_BETA = (12, 3)
"""Parameters of the mask share of ENAT."""
_SECOND_VIEW = 0.5
"""Share of sequences of which a part of the visible tokens is older than the rest."""


class Features(NamedTuple):
    """Visible inputs after the transformer."""

    states: Float[Tensor, "r n c"]
    """States of the prefix and of tokens."""
    positions: Float[Tensor, "r n 2"]
    """Row and column of each."""
    is_there: Bool[Tensor, "r n"]
    """Which of them count; the others fill up rows that have fewer."""


class Memory(nn.Module):
    """Keys and values that a block's inputs see besides each other: features from outside."""

    def __init__(self, config: GeneratorConfig) -> None:
        """Make the norm and the projection."""
        super().__init__()
        self.num_heads, self.head_dim = config.key_heads, config.head_dim
        self.norm = RmsNorm(config.dim)
        self.project = Projection(config.dim, 2 * config.key_heads * config.head_dim)

    def forward(
        self, features: Float[Tensor, "b n c"], turns: Rotation
    ) -> tuple[Float[Tensor, "b g n d"], Float[Tensor, "b g n d"]]:
        """Keys, turned to where the features are, and values."""
        heads = self.project(self.norm(features)).unflatten(-1, (-1, self.head_dim))
        key, value = heads.transpose(1, 2).chunk(2, dim=1)
        return rotate(key, turns), value


class Nat(nn.Module):
    """A class-conditional model of all cells in parallel (`seams.Generator`)."""

    def __init__(self, config: GeneratorConfig, order: Masked, network: Network) -> None:
        """Put it together, and draw its weights from torch's default generator.

        Args:
            config: all settings; `generator.build.build_generator` makes the rest from it.
            order: those of this family.
            network: embeddings, transformer and head.
        """
        super().__init__()
        self.config, self.order = config, order
        self.mask = nn.Parameter(torch.empty(config.dim))
        self.network = network
        self.cells = nn.Embedding(config.num_tokens, config.dim)
        num_layers = order.num_decoder_layers if order.disentangle else 0
        self.decoder_blocks = nn.ModuleList(make_block(config) for _ in range(num_layers))
        self.memories = nn.ModuleList(Memory(config) for _ in range(num_layers))
        if order.reuse:
            self.carry_norm = RmsNorm(config.dim)
            self.carry = SwiGlu(config.dim, config.hidden_dim)
        self.reset_parameters()

    def __repr__(self) -> str:
        """Order, tokens and parameters in a few lines, not the tree of modules."""
        return described(self, self.config)

    @torch.no_grad()
    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Draw all weights anew; the outputs become zero, so that training starts uniform."""
        if self.device.type == "meta":
            return  # There is nothing to fill, and torch would load its compiler to find that out.
        fill(self, generator)
        self.network.reset_parameters(generator)
        nn.init.normal_(self.mask, std=INITIAL_STD, generator=generator)

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.network.device

    @property
    def blocks(self) -> list[nn.Module]:
        """All transformer blocks but the head's."""
        return [*self.network.blocks, *self.decoder_blocks]

    @property
    def layers(self) -> list[nn.ModuleList]:
        """Blocks and projections, which decoding may replace by faster ones.

        With `reuse` keys and values of old features come from the blocks' own layers, which stay.
        """
        kept = [self.network.blocks] if self.order.reuse else []
        return [stack for stack in (*self.network.layers, self.decoder_blocks) if stack not in kept]

    # ---------------------------------------------------------------------------------- learning

    def draw(self, sequences: Sequences, numbers: Numbers) -> Sequences:
        """Fill in what is random about a batch: dropped labels, and which tokens are hidden.

        In evaluation the number of hidden tokens is evenly distributed from 1 to L, so that the
        loss is an estimate of a bound (`log_likelihood`).
        """
        label = sequences.class_label
        if self.training:
            label = self.network.drop_classes(label, numbers.uniform("dropped classes"))
        num_tokens = self.config.num_tokens
        places = numbers.uniform("hidden tokens", num_tokens).argsort(-1).argsort(-1)
        if not self.training:
            counts = 1 + (numbers.uniform("hidden share") * num_tokens).long()
        elif self.order.masking == "arccos":
            share = numbers.uniform("hidden share").arccos() / (math.pi / 2)
            counts = (share * num_tokens).round().long()
        else:
            # The a-th smallest of a + b - 1 even numbers has the distribution Beta(a, b).
            a, b = _BETA
            share = numbers.uniform("hidden share", a + b - 1).sort(-1).values[:, a - 1]
            counts = (share * num_tokens).round().long()
        counts = counts.clamp(1, num_tokens)[:, None]
        stages = 1 + (places < counts).long()
        if self.order.reuse:
            second = numbers.uniform("second view", 2)
            num_visible = num_tokens - counts
            # Of the visible tokens, the last ones in the order of their places are old.
            num_new = (second[:, :1] * (num_visible + 1)).long()
            is_old = (places >= counts + num_new) & (second[:, 1:] < _SECOND_VIEW)
            stages = stages - is_old.long()
        return sequences._replace(class_label=label, stages=send(stages, label.device))

    def forward(self, sequences: Sequences) -> GeneratorLoss:
        """Cross-entropy of the tokens of a batch; `nll` is that of the hidden ones.

        Raises:
            ValueError: a shape, a token, a label or K is not this generator's, or nothing is
                hidden.
        """
        parts, hidden, logits = self._predict(sequences)
        weights = hidden + self.order.visible_weight * ~hidden
        smoothing, counts = self.config.label_smoothing, hidden.sum(1)
        losses, hits = [], []
        for part, target in zip(logits, parts.unbind(-1), strict=True):
            log_probs = part.log_softmax(-1)
            hit = -log_probs.gather(-1, target[..., None])[..., 0]
            smoothed = (1 - smoothing) * hit - smoothing * log_probs.mean(-1)
            losses.append((weights * smoothed).sum() / weights.sum())
            hits.append(((hidden * hit.detach()).sum(1) / counts).mean())
        losses = torch.stack(losses)
        return GeneratorLoss(total=losses.sum(), parts=losses, nll=torch.stack(hits).sum())

    def logits(self, sequences: Sequences) -> list[Float[Tensor, "b t _"]]:
        """Logits of each part of each token, given the visible ones and the parts before it.

        Raises:
            ValueError: a shape, a token, a label or K is not this generator's, or no `stages` say
                which tokens are hidden.
        """
        return self._predict(sequences)[2]

    def log_likelihood(self, sequences: Sequences) -> Float[Tensor, "b"]:
        """Estimate of a lower bound of the log-likelihood of each sequence, in nats.

        For a number m of hidden tokens that is even from 1 to L and hidden ones that are any m, the
        mean of L / m times their log-probability is the mean over all orders of decoding token by
        token, and so at most the logarithm of their mean.

        Raises:
            ValueError: a shape, a token, a label or K is not this generator's, or no `stages` say
                which tokens are hidden.
        """
        parts, hidden, logits = self._predict(sequences)
        found = [
            (hidden * part.log_softmax(-1).gather(-1, target[..., None])[..., 0]).sum(1)
            for part, target in zip(logits, parts.unbind(-1), strict=True)
        ]
        return torch.stack(found).sum(0) * hidden.shape[1] / hidden.sum(1)

    def parts(self, sequences: Sequences) -> Int64[Tensor, "b t p"]:
        """Cut the tokens of a batch into their parts.

        Raises:
            ValueError: an index is no code, or their number is not that of the cells.
        """
        length, expected = sequences.indices.shape[1], self.config.num_tokens
        if length != expected:
            raise ValueError(
                f"a sequence of {length} tokens must have {expected}: all cells in order 'masked'"
            )
        return self.network.codes(sequences.indices)

    def num_inputs(self, num_kept: int) -> int:  # noqa: ARG002 - all cells, whatever K is
        """The prefix and all cells."""
        return self.config.num_prefix + self.config.num_tokens

    def _predict(
        self, sequences: Sequences
    ) -> tuple[Int64[Tensor, "b t p"], Bool[Tensor, "b t"], list[Float[Tensor, "b t _"]]]:
        """Parts, which tokens are hidden, and logits; with `disentangle` of hidden ones alone.

        Raises:
            ValueError: a shape, a token, a label or K is not this generator's, or there are no
                stages.
        """
        stages = sequences.stages
        if stages is None:
            raise ValueError("order 'masked' needs stages, the tokens hidden: see Generator.draw")
        parts, hidden = self.parts(sequences), stages == 2
        prefix = self.network.embed_prefix(sequences.class_label, sequences.num_kept)
        if self.order.disentangle:
            features = self.encode(prefix, parts, stages < (1 if self.order.reuse else 2))
            if self.order.reuse:
                features = self.encode_more(features, parts, stages == 1)
            # Every cell asks, as rows hide different numbers of tokens; no visible one is seen.
            cells = torch.arange(hidden.shape[1], device=hidden.device).expand_as(hidden)
            states = self.decode(features, cells, hidden)
        else:
            states = self.mixed(prefix, parts, hidden)
        return parts, hidden, self.network.part_logits(states, parts)

    # ----------------------------------------------------------------------------------- passes

    def mixed(
        self,
        prefix: Float[Tensor, "r n c"],
        parts: Int64[Tensor, "r l p"],
        hidden: Bool[Tensor, "r l"],
    ) -> Float[Tensor, "r l c"]:
        """States of all cells, which see the prefix and each other (MaskGIT).

        Args:
            prefix: class and K, embedded.
            parts: tokens of all cells; those that are hidden are not looked at.
            hidden: which cells have the mask in place of their token.
        """
        tokens = torch.where(hidden[..., None], self.mask, self.network.embed(parts))
        inputs = torch.cat([prefix, tokens + self.cells.weight], dim=1)
        positions = self.network.cell_positions()[None]
        positions = functional.pad(positions, (0, 0, prefix.shape[1], 0))
        length = inputs.shape[1]
        # Without a mask the transformer is causal.
        everything = torch.ones(1, length, length, dtype=torch.bool, device=inputs.device)
        states = self.network.transform(inputs, self.network.turns(positions), everything)
        return states[:, prefix.shape[1] :]

    def encode(
        self,
        prefix: Float[Tensor, "r n c"],
        parts: Int64[Tensor, "r l p"],
        visible: Bool[Tensor, "r l"],
    ) -> Features:
        """Features of the prefix and of visible tokens, which see each other alone (ENAT)."""
        tokens = self._tokens(parts, visible)
        before = prefix.shape[1]
        inputs = torch.cat([prefix, tokens.states], dim=1)
        positions = functional.pad(tokens.positions, (0, 0, before, 0))
        is_there = functional.pad(tokens.is_there, (before, 0), value=True)
        mask = is_there[:, None].expand(-1, inputs.shape[1], -1)
        states = self.network.transform(inputs, self.network.turns(positions), mask)
        return Features(states, positions, is_there)

    def encode_more(
        self, old: Features, parts: Int64[Tensor, "r l p"], visible: Bool[Tensor, "r l"]
    ) -> Features:
        """Old features, carried over, and those of tokens that see them and each other."""
        carried = old.states + self.carry(self.carry_norm(old.states))
        if not bool(visible.any()):
            return old._replace(states=carried)
        tokens = self._tokens(parts, visible)
        x = self.network.dropout(tokens.states).float()
        turns, old_turns = self.network.turns(tokens.positions), self.network.turns(old.positions)
        is_seen = torch.cat([old.is_there, tokens.is_there], dim=1)[:, None, None]
        for block in self.network.blocks:
            if not isinstance(block, Block):
                raise TypeError("reuse needs the blocks as they were trained: weights in float32")
            keys, values = block.attention.keys_values(block.attention_norm(old.states), old_turns)
            recall = functools.partial(_beside, keys, values, is_seen)
            x = self._run(block, x, turns, recall)
        states = torch.cat([carried, x.to(carried.dtype)], dim=1)
        positions = torch.cat([old.positions, tokens.positions], dim=1)
        return Features(states, positions, is_seen[:, 0, 0])

    def decode(
        self, features: Features, cells: Int64[Tensor, "r m"], hidden: Bool[Tensor, "r m"]
    ) -> Float[Tensor, "r m c"]:
        """States of some cells, which see visible features and those of them that are hidden."""
        x = self.network.dropout(self.mask + self.cells(cells)).float()
        turns = self.network.turns(self.network.cell_positions()[cells])
        feature_turns = self.network.turns(features.positions)
        is_seen = torch.cat([features.is_there, hidden], dim=1)[:, None, None]
        for block, memory in zip(self.decoder_blocks, self.memories, strict=True):
            keys, values = memory(features.states, feature_turns)
            x = self._run(block, x, turns, functools.partial(_beside, keys, values, is_seen))
        return x.to(self.mask.dtype)

    def _tokens(self, parts: Int64[Tensor, "r l p"], visible: Bool[Tensor, "r l"]) -> Features:
        """Inputs of visible tokens, first in each row; as many as the row that has most."""
        count = int(visible.sum(1).max())
        cells = (~visible).int().argsort(dim=1, stable=True)[:, :count]
        tokens = parts.gather(1, cells[..., None].expand(-1, -1, parts.shape[-1]))
        return Features(
            self.network.embed(tokens) + self.cells(cells),
            self.network.cell_positions()[cells],
            visible.gather(1, cells),
        )

    def _run(
        self, block: nn.Module, x: Float[Tensor, "r n c"], turns: Rotation, recall: Recall
    ) -> Float[Tensor, "r n c"]:
        """One block whose attention is `recall`."""
        if self.network.checkpointing and self.training:
            return checkpoint(block, x, turns, None, recall, use_reentrant=False)
        return block(x, turns, None, recall)

    # --------------------------------------------------------------------------------- sampling

    def draws(
        self, seed: int, image_ids: Sequence[int], num_kept: int, settings: SamplingSettings
    ) -> Draws:
        """Numbers for every part of every token, and its confidence, in each pass."""
        del num_kept
        num_tokens, num_parts = self.config.num_tokens, len(self.config.part_names)
        passes = num_passes(settings, num_tokens)
        return draw(seed, image_ids, num_tokens, num_parts, self.device, num_passes=passes)

    def decoder(
        self,
        labels: Int64[Tensor, "b"],
        num_kept: int,
        draws: Draws,
        settings: SamplingSettings,
    ) -> "MaskedDecoder":
        """Sequences of these classes, none of whose tokens is decoded."""
        return MaskedDecoder(self, labels, num_kept, draws, settings)

    def sampled(self, decoder: Decoder) -> Sampled:
        """Cells in raster order."""
        indices = self.network.indices(decoder.parts())
        return Sampled(indices, None, None, decoder.num_steps, decoder.kv_bytes)

    def sample(
        self,
        labels: Int64[Tensor, "b"],
        num_kept: int,
        draws: Draws,
        settings: SamplingSettings,
    ) -> Sampled:
        """Sample one sequence for each label; see `seams.Generator.sample`."""
        decoder = self.decoder(labels, num_kept, draws, settings)
        run(decoder)
        return self.sampled(decoder)

    def inpaint(
        self,
        indices: Int64[Tensor, "b k"],  # noqa: ARG002
        keep: Bool[Tensor, "b k"],  # noqa: ARG002
        labels: Int64[Tensor, "b"],  # noqa: ARG002
        draws: Draws,  # noqa: ARG002
        settings: SamplingSettings,  # noqa: ARG002
    ) -> Sampled:
        """Refuse: kept tokens are no cells.

        Raises:
            ValueError: always.
        """
        raise ValueError("order 'masked' cannot keep tokens")


class MaskedDecoder:
    """Sequences of which the most confident tokens are kept in each step (`seams.Decoder`)."""

    memory: tuple[Tensor, ...] = ()

    def __init__(
        self,
        model: Nat,
        labels: Int64[Tensor, "b"],
        num_kept: int,
        draws: Draws,
        settings: SamplingSettings,
    ) -> None:
        """Plan the steps.

        Args:
            model: what decodes.
            labels: classes.
            num_kept: K.
            draws: numbers of every step.
            settings: guidance, temperature, and how many steps.

        Raises:
            ValueError: there are more steps than tokens, or no numbers for them.
        """
        self.model, self.num_kept, self.settings = model, num_kept, settings
        num_tokens = model.config.num_tokens
        self.num_steps = num_passes(settings, num_tokens)
        passes = settings.passes if isinstance(settings.passes, Several) else Several()
        schedule = even_schedule if passes.schedule == "arccos" else arccos_schedule
        self.counts = schedule(num_tokens, self.num_steps)
        self.noise = passes.confidence_temperature
        starts = [sum(self.counts[:step]) for step in range(self.num_steps)]
        self.scales = guidance_scales(settings, starts, num_tokens)
        self.rows = model.network.with_unconditional(labels, self.scales)
        if draws.passes is None:
            raise ValueError("order 'masked' needs numbers for every pass: see Generator.draws")
        self.numbers = draws.passes
        self.num_branches = len(self.rows) // len(labels)
        num_states = len(self.rows) * model.num_inputs(num_kept) if model.order.reuse else 0
        self.kv_bytes = num_states * model.config.dim * model.network.dtype.itemsize
        self.finite: list[Tensor] = []

    def parts(self) -> Int64[Tensor, "b t p"]:
        """Tokens in raster order; zeros where none is decoded yet."""
        return self.tokens

    def known(self) -> Bool[Tensor, "b t"]:
        """Cells that are no longer hidden."""
        return self.stages < 2

    @torch.inference_mode()
    def seek(self, step: int, history: Int64[Tensor, "b t p"] | None = None) -> None:
        """Take tokens before a step as decoded: none, or the first cells of `history`."""
        network, (batch, _, num_tokens, num_numbers) = self.model.network, self.numbers.shape
        zeros = torch.zeros(batch, num_tokens, num_numbers - 1, dtype=torch.int64)
        self.tokens = zeros.to(network.device) if history is None else history.clone()
        self.prefix = network.embed_prefix(self.rows, self.num_kept)
        cells = torch.arange(num_tokens, device=network.device).expand(batch, -1)
        known, older = sum(self.counts[:step]), sum(self.counts[: max(step - 1, 0)])
        self.stages = 2 - (cells < known).long() - (cells < older).long()
        self.features: Features | None = None
        self.number = step

    @torch.inference_mode()
    def step(self) -> None:
        """Predict all hidden tokens and keep the most confident."""
        network, batch, count = self.model.network, len(self.tokens), self.counts[self.number]
        hidden = self.stages == 2
        num_hidden = sum(self.counts[self.number :])
        # The same number in every image.
        cells = (~hidden).int().argsort(dim=1, stable=True)[:, :num_hidden]
        index = cells[..., None]
        numbers = self.numbers[:, self.number]
        numbers = numbers.gather(1, index.expand(-1, -1, numbers.shape[-1])).flatten(0, 1)
        chosen = network.choose(
            self._states(cells).flatten(0, 1),
            numbers[:, :-1],
            self.scales[self.number],
            self.settings,
            scored=True,
        )
        self.finite += chosen.finite
        tokens = chosen.parts.unflatten(0, (batch, num_hidden))
        score = chosen.log_prob
        if score is None:
            raise RuntimeError("the head gave no log-probability")
        scale = self.noise * (1 - (self.number + 1) / self.num_steps)
        if scale:
            score = score + scale * _gumbel(numbers[:, -1])
        order = score.unflatten(0, (batch, num_hidden)).sort(dim=1, descending=True, stable=True)
        best = order.indices[:, :count]
        kept = tokens.gather(1, best[..., None].expand(-1, -1, tokens.shape[-1]))
        where = cells.gather(1, best)
        self.tokens = self.tokens.scatter(1, where[..., None].expand_as(kept), kept)
        self.stages = self.stages.where(self.stages == 2, 0).scatter(1, where, 1)
        self.number += 1

    def _states(self, cells: Int64[Tensor, "b m"]) -> Float[Tensor, "r m c"]:
        """States that predict the tokens of hidden cells."""
        model, times = self.model, self.num_branches
        parts, stages = self.tokens.repeat(times, 1, 1), self.stages.repeat(times, 1)
        cells = cells.repeat(times, 1)
        if not model.order.disentangle:
            states = model.mixed(self.prefix, parts, stages == 2)
            return states.gather(1, cells[..., None].expand(-1, -1, states.shape[-1]))
        if not model.order.reuse:
            features = model.encode(self.prefix, parts, stages < 2)
        elif self.features is None:
            # In the first step, where nothing is visible, or one that was jumped to.
            features = model.encode(self.prefix, parts, stages == 0)
            if self.number:
                features = model.encode_more(features, parts, stages == 1)
        else:
            features = model.encode_more(self.features, parts, stages == 1)
        self.features = features if model.order.reuse else None
        return model.decode(features, cells, torch.ones_like(cells, dtype=torch.bool))


def _beside(
    keys: Float[Tensor, "b g m d"],
    values: Float[Tensor, "b g m d"],
    is_seen: Bool[Tensor, "b 1 1 k"],
    query: Float[Tensor, "b h n d"],
    key: Float[Tensor, "b g n d"],
    value: Float[Tensor, "b g n d"],
) -> Float[Tensor, "b h n d"]:
    """Attend to keys and values from outside and to the inputs' own, as far as they count."""
    value = torch.cat([values.to(value.dtype), value], dim=2)
    key = torch.cat([keys, key], dim=2).to(value.dtype)
    return attend(query.to(value.dtype), key, value, is_seen.expand(-1, -1, query.shape[2], -1))


def _gumbel(numbers: Float[Tensor, "n"]) -> Float[Tensor, "n"]:
    """Gumbel noise of even numbers."""
    tiny = torch.finfo(numbers.dtype).tiny
    return -(-numbers.clamp_min(tiny).log()).clamp_min(tiny).log()
