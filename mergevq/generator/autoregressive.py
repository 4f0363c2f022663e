"""Autoregressive generators over a tokenizer's indices: one transformer in several orders.

Source: Li et al. 2025, "MergeVQ", section 3.4 and figure 6 (MergeAR, arXiv:2504.00999); Sun et al.
2024, "Autoregressive Model Beats Diffusion: Llama for Scalable Image Generation", section 2
(arXiv:2406.06525); Pang et al. 2024, "RandAR", section 3 (arXiv:2412.01827).

An order (`generator/orders`) lays a batch out as inputs of the network and decodes it step by step;
the network's head gives the probabilities of the parts of each token.

Shape letters: B batch, K kept tokens, T tokens of a sequence (K, or all L cells), P parts of a
token.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor, nn

from mergevq.config.generator import (
    Drafted,
    GeneratorConfig,
    SamplingSettings,
)
from mergevq.generator.drafts.decoder import DraftDecoder, Drafter
from mergevq.generator.drafts.reader import CellByCell
from mergevq.generator.network import Network, Predicted, described
from mergevq.generator.sampling import draw, run, uniforms_of_token
from mergevq.generator.seams import (
    Decoder,
    Draws,
    FillsIn,
    GeneratorLoss,
    Layout,
    Numbers,
    Order,
    Sampled,
    Sequences,
)


class Autoregressive(nn.Module):
    """A class-conditional autoregressive model of token sequences (`seams.Generator`)."""

    def __init__(self, config: GeneratorConfig, order: Order, network: Network) -> None:
        """Put it together, and draw its weights from torch's default generator.

        Args:
            config: all settings; `generator.build.build_generator` makes the rest from it.
            order: one of `generator/orders`.
            network: embeddings, transformer and head.
        """
        super().__init__()
        self.config = config
        # First, so that the order's own weights are the first of the parameters.
        self.order = order
        self.network = network
        self.drafter: Drafter | None = None
        """Model of the draft `model` of passes `drafted`; see `drafts.pairing.with_draft`."""
        self.reset_parameters()

    def __repr__(self) -> str:
        """Order, tokens and parameters in a few lines, not the tree of modules."""
        return described(self, self.config)

    @torch.no_grad()
    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Draw all weights anew; the outputs become zero, so that training starts uniform."""
        if self.device.type == "meta":
            return  # There is nothing to fill, and torch would load its compiler to find that out.
        self.network.reset_parameters(generator)
        self.order.reset_parameters(generator)

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.network.device

    @property
    def blocks(self) -> list[nn.Module]:
        """All transformer blocks but the head's."""
        return [*self.network.blocks]

    @property
    def layers(self) -> list[nn.ModuleList]:
        """Blocks and projections, which decoding may replace by faster ones."""
        return self.network.layers

    def draw(self, sequences: Sequences, numbers: Numbers) -> Sequences:
        """Fill in what is random about a batch: its order, in training dropped labels and masks."""
        if self.training:
            dropped = numbers.uniform("dropped classes")
            label = self.network.drop_classes(sequences.class_label, dropped)
            sequences = sequences._replace(class_label=label)
            if self.network.num_uniforms:
                shape = self.config.num_states(sequences.num_kept), self.network.num_uniforms
                sequences = sequences._replace(masking=numbers.uniform("masked parts", *shape))
        return self.order.draw(sequences, numbers)

    def forward(self, sequences: Sequences) -> GeneratorLoss:
        """Cross-entropy of a batch of sequences for which everything is drawn.

        With `masking` it is that of masked parts, and of visible ones by their weight; `nll` is
        then no likelihood but the sum over parts of the mean over tokens that have them masked.
        Dropout alone draws from torch's default generator.

        Raises:
            ValueError: a shape, a token, a label or K is not this generator's.
        """
        layout = self.layout(sequences)
        predicted = self._predict(layout, sequences.masking)
        targets = layout.targets.unbind(-1)
        weights: Sequence[Tensor | None] = [None] * len(targets)
        if predicted.weights is not None:
            weights = predicted.weights.unbind(-1)
        smoothed, hits = [], []
        for logits, target, weight in zip(predicted.logits, targets, weights, strict=True):
            log_probs = logits.log_softmax(-1)
            hit = -log_probs.gather(-1, target[..., None])[..., 0]
            # Illegal values have no probability and take no share of the smoothing.
            legal = log_probs > -torch.inf
            spread = -log_probs.masked_fill(~legal, 0).sum(-1) / legal.sum(-1)
            smoothing = self.config.label_smoothing
            smoothed.append(_mean((1 - smoothing) * hit + smoothing * spread, weight))
            hits.append(_mean(hit.detach(), None if weight is None else weight == 1))
        losses = torch.stack(smoothed)
        return GeneratorLoss(total=losses.sum(), parts=losses, nll=torch.stack(hits).sum())

    def logits(self, sequences: Sequences) -> list[Float[Tensor, "b t _"]]:
        """Logits of each part of each token given all that comes before, in one full forward.

        They are at the positions of `indices`, whatever the order of decoding is; those of illegal
        values are -inf.

        Raises:
            ValueError: a shape, a token, a label or K is not this generator's.
        """
        layout = self.layout(sequences)
        logits = self._layout_logits(layout)
        if layout.slots is None:
            return logits
        where = layout.slots.argsort(-1)[..., None]
        return [part.gather(1, where.expand_as(part)) for part in logits]

    def log_likelihood(self, sequences: Sequences) -> Float[Tensor, "b"]:
        """Exact log-likelihood of each sequence in nats, given the order of its tokens.

        Anchors count too, if they are parts of a token.

        Raises:
            ValueError: a shape, a token, a label or K is not this generator's.
        """
        layout = self.layout(sequences)
        hits = [
            logits.log_softmax(-1).gather(-1, target[..., None])[..., 0].sum(-1)
            for logits, target in zip(
                self._layout_logits(layout), layout.targets.unbind(-1), strict=True
            )
        ]
        return torch.stack(hits).sum(0)

    def parts(self, sequences: Sequences) -> Int64[Tensor, "b t p"]:
        """Cut the tokens of a batch into their parts.

        Raises:
            ValueError: an index is no code, their number is not that of a sequence, or something
                that the order needs is missing.
        """
        length, expected = sequences.indices.shape[1], self.config.length(sequences.num_kept)
        if length != expected:
            raise ValueError(
                f"a sequence of {length} tokens must have {expected}: "
                + ("all cells" if self.config.order.reads == "cells" else "the kept tokens")
                + f" in order '{self.config.order.kind}'"
            )
        codes = self.network.codes(sequences.indices)
        return self.order.parts(codes, sequences, self.config)

    def layout(self, sequences: Sequences) -> Layout:
        """A batch as the transformer sees it.

        Raises:
            ValueError: a shape, a token, a label or K is not this generator's.
        """
        return self.order.layout(self.network, self.parts(sequences), sequences)

    def num_inputs(self, num_kept: int) -> int:
        """Inputs of the transformer in training."""
        return self.order.num_inputs(self.config, num_kept)

    def draws(
        self,
        seed: int,
        image_ids: Sequence[int],
        num_kept: int,
        settings: SamplingSettings,
    ) -> Draws:
        """Uniform numbers for every part of every token, and an order, of each image."""
        count = uniforms_of_token(self.config, settings)
        return draw(seed, image_ids, self.config.num_states(num_kept), count, self.device)

    def decoder(
        self,
        labels: Int64[Tensor, "b"],
        num_kept: int,
        draws: Draws,
        settings: SamplingSettings,
    ) -> Decoder:
        """Sequences of these classes, none of whose tokens is decoded."""
        order, passes = self.order, settings.passes
        if isinstance(passes, Drafted) and isinstance(order, CellByCell):
            return DraftDecoder(
                self.network, order, labels, num_kept, draws, settings, passes, self.drafter
            )
        return order.decoder(self.network, labels, num_kept, draws, settings)

    def sampled(self, decoder: Decoder) -> Sampled:
        """The tokens that a decoder has by now; see `seams.Generator.sampled`."""
        return self.order.sampled(self.network, decoder)

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
        indices: Int64[Tensor, "b k"],
        keep: Bool[Tensor, "b k"],
        labels: Int64[Tensor, "b"],
        draws: Draws,
        settings: SamplingSettings,
    ) -> Sampled:
        """Keep some tokens and sample the others; see `seams.Generator.inpaint`.

        Raises:
            ValueError: the order does not let tokens see what comes after them.
        """
        if not isinstance(self.order, FillsIn):
            raise ValueError(f"order '{self.config.order.kind}' cannot keep tokens")
        return self.order.inpaint(self.network, indices, keep, labels, draws, settings)

    def _layout_logits(self, layout: Layout) -> list[Float[Tensor, "b t _"]]:
        """Logits of all parts, each given the true parts before it; illegal ones are -inf."""
        return self._predict(layout, None).logits

    def _predict(self, layout: Layout, masking: Float[Tensor, "b t q"] | None) -> Predicted:
        """The same, or with numbers for it, logits given the parts that these leave visible."""
        network = self.network
        states = network.transform(layout.inputs, network.turns(layout.positions), layout.mask)
        states = states[:, layout.reads]
        if masking is None:
            predicted = Predicted(network.part_logits(states, layout.parts), None)
        else:
            predicted = network.masked(states, layout.parts, masking)
        for part, allowed in layout.allowed.items():
            predicted.logits[part] = predicted.logits[part].masked_fill(~allowed, -torch.inf)
        return predicted


def _mean(
    values: Float[Tensor, "b t"], weights: Float[Tensor, "b t"] | Bool[Tensor, "b t"] | None
) -> Float[Tensor, ""]:
    """Mean by some weights, 0 where all are 0; None is the plain mean."""
    if weights is None:
        return values.mean()
    return (weights * values).sum() / weights.sum().clamp_min(torch.finfo(values.dtype).tiny)
