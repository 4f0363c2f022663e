"""The seams of a generator: a family of generators, an order of tokens, a head over their parts.

    Generator   sequences of tokens <-> their probabilities; several families
    Order       of the autoregressive family: what a sequence is, and how it is decoded
    Head        one token's parts, from a state of the transformer; in `generator/network.py`, which
                calls it

The values that pass between them are here too. Each part is a class of its own in
`generator/orders`, `generator/heads` or beside this file; `generator/build.py` lists them all.

Source: Li et al. 2025, "MergeVQ", section 3.4 (arXiv:2504.00999); Pang et al. 2024, "RandAR",
section 3 (arXiv:2412.01827); Luo et al. 2024, "Open-MAGVIT2", section 3.2 (sub-indices,
arXiv:2409.04410).

Shape letters: B batch, L grid cells, K kept tokens, T tokens of a sequence (L or K), P parts of a
token, F sub-indices of a token, U uniform numbers of a token, C channels, N inputs, S passes, Q
numbers of a token, R and Z each B or 1.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

from mergevq.config.generator import (
    GeneratorConfig,
    SamplingSettings,
)
from mergevq.generator.network import Network


class Sequences(NamedTuple):
    """A batch of token sequences; a generator takes the fields that it needs."""

    indices: Int64[Tensor, "b t"]
    """All L cells in raster order, or the K kept tokens in canonical order
    (`GeneratorConfig.order.reads`)."""
    class_label: Int64[Tensor, "b"]
    """In [0, num_classes]; the last, `null_class`, is no class."""
    num_kept: int
    """K of every sequence."""
    anchors: Int64[Tensor, "b t"] | None = None
    """Cell at which each kept token opens."""
    source_index: Int64[Tensor, "b l"] | None = None
    """Which kept token each cell is."""
    slots: Int64[Tensor, "b t"] | None = None
    """Positions of `indices` in the order in which they are decoded or, in training, learned;
    `Generator.draw` draws it for a generator of any order. None is from the first to the last."""
    stages: Int64[Tensor, "b t"] | None = None
    """Pass in which each token becomes known, for a generator that decodes in parallel: 0 before
    the last one, 1 in the last one, 2 in one to come; tokens of stage 2 are predicted."""
    masking: Float[Tensor, "b s q"] | None = None
    """Q numbers in [0, 1) for each of S states, by which a head that masks parts at random
    (`network.RandomHead`) learns; None outside of training and for other heads."""

    def cut(self, num_parts: int) -> list["Sequences"]:
        """Equal shares of the batch, one after the other."""
        columns = [
            column.chunk(num_parts) if isinstance(column, Tensor) else [column] * num_parts
            for column in self
        ]
        return [Sequences(*share) for share in zip(*columns, strict=True)]


class GeneratorLoss(NamedTuple):
    """Cross-entropy of a batch, float32 scalars in nats."""

    total: Float[Tensor, ""]
    """Sum of `parts`: what is minimised."""
    parts: Float[Tensor, "p"]
    """Label-smoothed mean over tokens, for each of `GeneratorConfig.part_names`."""
    nll: Float[Tensor, ""]
    """Mean negative log-likelihood of a token: all parts, no smoothing, no gradient."""


class Draws(NamedTuple):
    """The random numbers of a batch of images."""

    uniforms: Float[Tensor, "b t u"]
    """In [0, 1), one for each part of each token; more for bits chosen by confidence."""
    order: Int64[Tensor, "b t"]
    """A permutation of the tokens."""
    passes: Float[Tensor, "b s t q"] | None = None
    """In [0, 1), Q numbers for each token in each of S passes, for a generator that chooses a token
    anew in every pass."""


class Sampled(NamedTuple):
    """Token sequences from a generator."""

    indices: Int64[Tensor, "b t"]
    """All cells in raster order or the kept tokens in canonical order."""
    source_index: Int64[Tensor, "b l"] | None
    """Which of its distinct tokens, in canonical order, each cell is; None if the order merges
    none."""
    anchors: Int64[Tensor, "b t"] | None
    """Cell at which each kept token opens; None if the order leaves that open."""
    num_forward: int
    """Passes through the transformer, each for the whole batch."""
    kv_bytes: int
    """Memory of the cache."""


class Layout(NamedTuple):
    """A batch as the transformer sees it."""

    inputs: Float[Tensor, "b n c"]
    """Embedded sequence."""
    positions: Float[Tensor, "r n 2"]
    """Row and column of each input."""
    mask: Bool[Tensor, "z n n"] | BlockMask | None
    """Which inputs (last axis) each sees; None is all up to itself."""
    reads: Int64[Tensor, "t"]
    """Inputs whose states predict the tokens."""
    parts: Int64[Tensor, "b t p"]
    """The tokens predicted, in the order of `reads`."""
    targets: Int64[Tensor, "b t p"]
    """The same as the head predicts them."""
    allowed: Mapping[int, Bool[Tensor, "b t _"]]
    """Values that a part may have, by the part's number; a part that is absent may have all."""
    slots: Int64[Tensor, "b t"] | None
    """Positions of the tokens predicted in `Sequences.indices`; None is one after the other."""


@runtime_checkable
class Numbers(Protocol):
    """Random numbers of the rows of a batch at hand, drawn as one process would for all rows."""

    @property
    def progress(self) -> float:
        """Share of the run, from 0 to 1, that is over."""
        ...

    def uniform(self, purpose: str, *shape: int) -> Float[Tensor, "b *shape"]:
        """Uniform numbers in [0, 1), on the CPU; the same for the same purpose."""
        ...


@runtime_checkable
class Decoder(Protocol):
    """A batch of sequences that is being decoded, some tokens of each in every step."""

    @property
    def num_steps(self) -> int:
        """Passes through the transformer from the first token to the last, or the most so far.

        It may fall with each step where it depends on what is drawn.
        """
        ...

    kv_bytes: int
    """Memory of the cache."""
    memory: tuple[Tensor, ...]
    """Keys and values of the cache; empty without one."""
    finite: list[Tensor]
    """Whether states and logits were finite, one scalar for each that was looked at."""

    def parts(self) -> Int64[Tensor, "b t p"]:
        """Tokens decoded so far, in the order of `Sequences.indices`."""
        ...

    def known(self) -> Bool[Tensor, "b t"]:
        """Which tokens of `parts` are decoded: as many of each image."""
        ...

    def seek(self, step: int, history: Int64[Tensor, "b t p"] | None = None) -> None:
        """Get ready for a step.

        Args:
            step: from 0. Before a later one the cache keeps what is in it: only times, not tokens,
                are then of any use.
            history: tokens taken as decoded before; None only for step 0.
        """
        ...

    def step(self) -> None:
        """Decode some more tokens."""
        ...


@runtime_checkable
class Order(Protocol):
    """The order of an autoregressive generator: what a sequence is, and how it is decoded.

    An order with weights of its own is an `nn.Module`; the generator registers it first.
    """

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Draw the order's own weights anew, if it has any."""
        ...

    def draw(self, sequences: Sequences, numbers: Numbers) -> Sequences:
        """Fill in what is random about the order of a batch."""
        ...

    def num_inputs(self, config: GeneratorConfig, num_kept: int) -> int:
        """Inputs of the transformer in training, the prefix among them."""
        ...

    def parts(
        self, codes: Int64[Tensor, "b t f"], sequences: Sequences, config: GeneratorConfig
    ) -> Int64[Tensor, "b t p"]:
        """The parts of the tokens of a batch, in the order of `GeneratorConfig.part_names`.

        Args:
            codes: their sub-indices.
            sequences: the batch.
            config: of the generator.

        Raises:
            ValueError: something that the order needs is missing or out of range.
        """
        ...

    def layout(
        self, network: Network, parts: Int64[Tensor, "b t p"], sequences: Sequences
    ) -> Layout:
        """A batch as the transformer sees it.

        Raises:
            ValueError: something that the order needs is missing.
        """
        ...

    def decoder(
        self,
        network: Network,
        labels: Int64[Tensor, "b"],
        num_kept: int,
        draws: Draws,
        settings: SamplingSettings,
    ) -> Decoder:
        """Sequences of these classes, none of whose tokens is decoded."""
        ...

    def sampled(self, network: Network, decoder: Decoder) -> Sampled:
        """The sequences of a decoder that is done."""
        ...


@runtime_checkable
class FillsIn(Protocol):
    """An order that can decode any tokens of a sequence given the others."""

    def inpaint(
        self,
        network: Network,
        indices: Int64[Tensor, "b k"],
        keep: Bool[Tensor, "b k"],
        labels: Int64[Tensor, "b"],
        draws: Draws,
        settings: SamplingSettings,
    ) -> Sampled:
        """Keep some tokens of each image and sample the others; see `Generator.inpaint`."""
        ...


@runtime_checkable
class Generator(Protocol):
    """A class-conditional model of token sequences; an `nn.Module`."""

    config: GeneratorConfig
    training: bool
    """Whether labels and activations are dropped, as `nn.Module.train` sets it."""

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        ...

    def draw(self, sequences: Sequences, numbers: Numbers) -> Sequences:
        """Fill in all that is random about a batch but dropout: in training, dropped labels."""
        ...

    def __call__(self, sequences: Sequences) -> GeneratorLoss:
        """Cross-entropy of sequences for which everything is drawn.

        Raises:
            ValueError: a shape, a token, a label or K is not this generator's.
        """
        ...

    def logits(self, sequences: Sequences) -> list[Float[Tensor, "b t _"]]:
        """Logits of each part of each token, at the positions of `indices`; illegal ones -inf."""
        ...

    def log_likelihood(self, sequences: Sequences) -> Float[Tensor, "b"]:
        """Log-likelihood of each sequence in nats."""
        ...

    def num_inputs(self, num_kept: int) -> int:
        """Inputs of the transformer in training."""
        ...

    def draws(
        self, seed: int, image_ids: Sequence[int], num_kept: int, settings: SamplingSettings
    ) -> Draws:
        """All random numbers of some images of a run; each image's depend on (seed, id) alone."""
        ...

    def decoder(
        self,
        labels: Int64[Tensor, "b"],
        num_kept: int,
        draws: Draws,
        settings: SamplingSettings,
    ) -> Decoder:
        """Sequences of these classes, none of whose tokens is decoded."""
        ...

    def sampled(self, decoder: Decoder) -> Sampled:
        """The tokens that one of this generator's decoders has by now."""
        ...

    def sample(
        self,
        labels: Int64[Tensor, "b"],
        num_kept: int,
        draws: Draws,
        settings: SamplingSettings,
    ) -> Sampled:
        """Sample one sequence for each label; `generator.sampling.sample` checks and draws.

        Raises:
            RuntimeError: a cache overflowed, or a state was not finite.
        """
        ...

    def inpaint(
        self,
        indices: Int64[Tensor, "b k"],
        keep: Bool[Tensor, "b k"],
        labels: Int64[Tensor, "b"],
        draws: Draws,
        settings: SamplingSettings,
    ) -> Sampled:
        """Keep some tokens of each image and sample the others, given those and the label.

        Raises:
            ValueError: this generator cannot (`GeneratorConfig.order.fills_in`).
            RuntimeError: a state was not finite.
        """
        ...
