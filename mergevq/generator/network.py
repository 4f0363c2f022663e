"""The network that all generators share: embeddings, transformer, and a head over parts.

Source: Sun et al. 2024, "Autoregressive Model Beats Diffusion: Llama for Scalable Image
Generation", section 2 (arXiv:2406.06525); Li et al. 2025, "MergeVQ", section 3.4 (merge
instruction, arXiv:2504.00999).

A token has several parts, its sub-indices (and before them its anchor): inputs sum the embeddings
of the parts, and the head predicts each part from those before it.

What it calls is here too: a cache of keys and values, and a head.

Shape letters: B batch, L grid cells, T tokens of a sequence, P parts of a token, C channels,
N inputs, M keys, H and G heads of queries and of keys, D channels of a head, V values of a part,
Q random numbers of a
token, R and S each B or 1 (states of a head: R is 2B with guidance, conditional ones first).
"""

import functools
import math
from collections.abc import Sequence
from typing import NamedTuple, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask
from torch.utils.checkpoint import checkpoint

from mergevq.config.generator import (
    GeneratorConfig,
    SamplingSettings,
)
from mergevq.data.codes import CodeSpec
from mergevq.nn.attention import additive_mask
from mergevq.nn.checks import require_range
from mergevq.nn.llama import Block, Dropout, RmsNorm, Rotation, cell_positions, rotation
from mergevq.runtime.device import send

INITIAL_STD = 0.02
"""Spread of every matrix at the start but the outputs, which start at zero, as in LlamaGen."""


class Chosen(NamedTuple):
    """Tokens that a head chose."""

    parts: Int64[Tensor, "b p"]
    """Their parts."""
    finite: list[Tensor]
    """Whether states and logits were finite, one scalar each: asked of the device at the end."""
    log_prob: Float[Tensor, "b"] | None
    """Log-probability of the token by the guided logits at temperature 1, if it was asked for."""


@runtime_checkable
class Cache(Protocol):
    """Memory of keys and values between forward passes (see `mergevq.generator.cache`)."""

    keys: Tensor
    """Keys of all layers, in the cache's dtype."""
    values: Tensor
    """Values, likewise."""
    turns: Rotation
    """Turns of all cells of the grid."""

    @property
    def num_bytes(self) -> int:
        """Memory of keys and values."""
        ...

    def reset(self) -> None:
        """Forget everything; the next inputs are the prefix."""
        ...

    def place(self, codes: Int64[Tensor, "b"]) -> Bool[Tensor, "b 1 m"] | None:
        """Give the next token of each row, an index, its place; what it sees, None being all."""
        ...

    def advance(self, count: int) -> None:
        """Keep the first `count` of the inputs last attended to."""
        ...

    def attend(
        self,
        layer: int,
        query: Float[Tensor, "b h n d"],
        key: Float[Tensor, "b g n d"],
        value: Float[Tensor, "b g n d"],
        mask: Bool[Tensor, "r n m"] | Float[Tensor, "r n m"] | None,
    ) -> Float[Tensor, "b h n d"]:
        """Attend to these inputs and to older ones, and remember these."""
        ...


@runtime_checkable
class Restriction(Protocol):
    """Rules for the next token of each image: which values it may have, and what they mean."""

    def allowed(self, part: int, chosen: Sequence[Tensor]) -> Bool[Tensor, "b v"] | None:
        """Values that a part may have after the parts chosen before it; None is all."""
        ...

    def part(
        self, part: int, choice: Int64[Tensor, "b"], chosen: Sequence[Tensor]
    ) -> Int64[Tensor, "b"]:
        """The part of the token that a choice of the head, after others, stands for."""
        ...


@runtime_checkable
class Embed(Protocol):
    """Embeddings of the values of one part, as `Network.embed_part` looks them up."""

    def __call__(self, part: int, values: Int64[Tensor, "*shape"]) -> Float[Tensor, "*shape c"]:
        """Vectors of the values of a part."""
        ...


@runtime_checkable
class Head(Protocol):
    """The distribution of one token's parts, given a state of the transformer; an `nn.Module`."""

    @property
    def layers(self) -> list[nn.ModuleList]:
        """Blocks and projections, which decoding may replace by faster ones."""
        ...

    def reset_outputs(self) -> None:
        """Make all values equally likely, as training starts."""
        ...

    def __call__(
        self, states: Float[Tensor, "n c"], parts: Int64[Tensor, "n p"], embed: Embed
    ) -> list[Float[Tensor, "n _"]]:
        """Logits, float32, of each part given the true parts before it."""
        ...

    def choose(
        self,
        states: Float[Tensor, "r c"],
        uniforms: Float[Tensor, "b u"],
        scale: float | Float[Tensor, "b 1"],
        settings: SamplingSettings,
        embed: Embed,
        restriction: Restriction | None = None,
        *,
        scored: bool = False,
    ) -> Chosen:
        """Choose the parts of one token for each image.

        Args:
            states: of the transformer; with twice as many rows as images the second half is
                unconditional.
            uniforms: numbers that decide (`sampling.uniforms_of_token`).
            scale: of guidance, if there are unconditional states; one, or one for each image.
            settings: temperature, top-k and top-p.
            embed: embeddings of the parts chosen before.
            restriction: rules of the order; None leaves all values free.
            scored: also give the token's log-probability.
        """
        ...


class Predicted(NamedTuple):
    """Logits of each part of some tokens, from which a network learns."""

    logits: list[Float[Tensor, "*b _"]]
    """Float32, given the parts before it, or those that are visible."""
    weights: Float[Tensor, "*b p"] | None
    """Weight of each part in the loss; 1 is a masked part. None is the mean over all."""


@runtime_checkable
class RandomHead(Protocol):
    """A head that can learn from parts masked at random (`Head` is the rest of it)."""

    num_uniforms: int
    """Q: random numbers of a token; 0 is a head that learns as others do."""

    def masked(
        self,
        states: Float[Tensor, "n c"],
        parts: Int64[Tensor, "n p"],
        embed: Embed,
        uniforms: Float[Tensor, "n q"],
    ) -> Predicted:
        """Mask some parts of each token and predict all.

        Args:
            states: of the transformer, one for each token.
            parts: of the tokens.
            embed: embeddings of one part.
            uniforms: numbers in [0, 1) that decide.
        """
        ...


class Network(nn.Module):
    """Embeddings of class, K and tokens, transformer blocks, and a head."""

    head: Head

    def __init__(self, config: GeneratorConfig, head: Head) -> None:
        """Build it, with random weights from torch's default generator.

        Args:
            config: sizes.
            head: one of `generator/heads`.
        """
        super().__init__()
        self.config = config
        self._spec = CodeSpec(sizes=config.head.sizes, dim=config.dim)
        self.class_embedding = nn.Embedding(config.num_classes + 1, config.dim)
        if config.kept_candidates:
            self.kept_embedding = nn.Embedding(len(config.kept_candidates), config.dim)
        self.part_embeddings = nn.ModuleList(
            nn.Embedding(size, config.dim) for size in config.embedded_sizes
        )
        self.dropout = Dropout(config.dropout)
        self.blocks = nn.ModuleList(make_block(config) for _ in range(config.num_layers))
        self.head = head
        self.checkpointing = False
        """Recompute the blocks in the backward pass."""

    @torch.no_grad()
    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Draw all weights anew; the outputs become zero, so that training starts uniform."""
        fill(self, generator)
        self.head.reset_outputs()

    @property
    def layers(self) -> list[nn.ModuleList]:
        """Blocks and projections, which decoding may replace by faster ones."""
        return [self.blocks, *self.head.layers]

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.class_embedding.weight.device

    @property
    def dtype(self) -> torch.dtype:
        """Type of embeddings, activations and caches."""
        return self.class_embedding.weight.dtype

    def codes(self, indices: Int64[Tensor, "*shape"]) -> Int64[Tensor, "*shape p"]:
        """Cut indices into sub-indices.

        Raises:
            ValueError: an index is no code.
        """
        return self._spec.split(indices)

    def indices(self, parts: Int64[Tensor, "*shape p"]) -> Int64[Tensor, "*shape"]:
        """Put the sub-indices among the parts together again."""
        return self._spec.join(parts[..., -len(self._spec.sizes) :])

    def drop_classes(
        self, class_label: Int64[Tensor, "b"], numbers: Float[Tensor, "b"]
    ) -> Int64[Tensor, "b"]:
        """Labels, with `null_class` in place of those whose uniform number is small."""
        null = torch.full_like(class_label, self.config.null_class)
        return torch.where(
            send(numbers, null.device) < self.config.class_dropout, null, class_label
        )

    def embed_prefix(
        self, class_label: Int64[Tensor, "b"], num_kept: int
    ) -> Float[Tensor, "b n c"]:
        """The class and, if K may vary, the merge instruction M(K).

        Raises:
            ValueError: there is no such class, or no such K.
        """
        null = self.config.null_class
        check_range("class_label", class_label, null, "which means no class")
        prefix = self.class_embedding(class_label)[:, None]
        candidates = self.config.kept_candidates
        if not candidates:
            return prefix
        if num_kept not in candidates:
            raise ValueError(f"num_kept ({num_kept}) must be one of those trained on: {candidates}")
        row = torch.full_like(class_label, candidates.index(num_kept))
        return torch.cat([prefix, self.kept_embedding(row)[:, None]], dim=1)

    def embed(self, parts: Int64[Tensor, "b t p"]) -> Float[Tensor, "b t c"]:
        """Sum of the embeddings of a token's parts."""
        embedded = [self.embed_part(part, parts[..., part]) for part in range(parts.shape[-1])]
        return torch.stack(embedded).sum(0)

    def embed_part(self, part: int, values: Int64[Tensor, "*shape"]) -> Float[Tensor, "*shape c"]:
        """Embed one part; an anchor goes in as its cell, and comes out of the head as a gap."""
        return self.part_embeddings[part](values)

    def cell_positions(self) -> Float[Tensor, "l 2"]:
        """Row and column of each cell, from (1, 1); (0, 0) is the prefix."""
        return cell_positions(self.config.grid_size, self.device)

    def turns(self, positions: Float[Tensor, "r n 2"]) -> Rotation:
        """Turns of queries and keys at rows and columns."""
        return rotation(positions, self.config.head_dim)

    def transform(
        self,
        inputs: Float[Tensor, "b n c"],
        turns: Rotation,
        mask: Bool[Tensor, "s n m"] | BlockMask | None = None,
        cache: Cache | None = None,
    ) -> Float[Tensor, "b n c"]:
        """Run the transformer.

        Args:
            inputs: embedded tokens; with a cache only those it has not seen.
            turns: of each input.
            mask: which keys each input sees; None is all up to itself.
            cache: keys and values of earlier inputs; those of these are added.
        """
        added = None
        if cache is not None and isinstance(mask, Tensor):
            # Once, and not in the attention of every layer.
            added = additive_mask(mask, cache.keys.dtype)
        # Sums over many layers need more than bf16's 8 bits.
        x = self.dropout(inputs).float()
        for layer, block in enumerate(self.blocks):
            if self.checkpointing and self.training:
                x = checkpoint(block, x, turns, mask, use_reentrant=False)
                continue
            recall = None if cache is None else functools.partial(cache.attend, layer, mask=added)
            x = block(x, turns, mask, recall)
        return x.to(inputs.dtype)

    def part_logits(
        self, states: Float[Tensor, "b t c"], parts: Int64[Tensor, "b t p"]
    ) -> list[Float[Tensor, "b t _"]]:
        """Logits, float32, of each part of each token, given the true parts before it."""
        logits = self.head(states.flatten(0, 1), parts.flatten(0, 1), self.embed_part)
        return [part.unflatten(0, parts.shape[:2]) for part in logits]

    @property
    def num_uniforms(self) -> int:
        """Random numbers by which the head masks the parts of a token in training."""
        return self.head.num_uniforms if isinstance(self.head, RandomHead) else 0

    def masked(
        self,
        states: Float[Tensor, "b t c"],
        parts: Int64[Tensor, "b t p"],
        uniforms: Float[Tensor, "b t q"],
    ) -> Predicted:
        """Predictions of tokens some of whose parts are masked; see `RandomHead.masked`."""
        if not isinstance(self.head, RandomHead):
            raise TypeError(f"head ({self.config.head.kind}) must be one that masks parts")
        numbers = send(uniforms.flatten(0, 1), states.device)
        found = self.head.masked(
            states.flatten(0, 1), parts.flatten(0, 1), self.embed_part, numbers
        )
        shape = parts.shape[:2]
        logits = [part.unflatten(0, shape) for part in found.logits]
        weights = None if found.weights is None else found.weights.unflatten(0, shape)
        return Predicted(logits, weights)

    def choose(
        self,
        states: Float[Tensor, "r c"],
        uniforms: Float[Tensor, "b u"],
        scale: float | Float[Tensor, "b 1"],
        settings: SamplingSettings,
        restriction: Restriction | None = None,
        *,
        scored: bool = False,
    ) -> Chosen:
        """Choose the parts of one token for each image; see `Head.choose`."""
        return self.head.choose(
            states, uniforms, scale, settings, self.embed_part, restriction, scored=scored
        )

    def with_unconditional(
        self, labels: Int64[Tensor, "b"], scales: list[float]
    ) -> Int64[Tensor, "r"]:
        """Labels, and as many null classes after them if any pass is guided."""
        if all(scale == 1 for scale in scales):
            return labels
        return torch.cat([labels, torch.full_like(labels, self.config.null_class)])


def described(generator: nn.Module, config: GeneratorConfig) -> str:
    """Order, tokens, size and parameters of a generator in a few lines, for its `repr`."""
    rows, columns = config.grid_size
    kept = config.kept_candidates or (config.num_kept,)
    weights = list(generator.parameters())
    parts = zip(config.part_names, config.part_sizes, strict=True)
    lines = (
        f"order {config.order.kind}, grid of {rows} x {columns}",
        f"K {config.num_kept}, trained on {', '.join(map(str, kept))}",
        f"tokens of {config.num_codes:,} values, {math.log2(config.num_codes):g} bits, as "
        + ", ".join(f"{name} of {size}" for name, size in parts),
        f"{config.num_classes} classes",
        f"{config.num_layers} blocks of width {config.dim}",
        f"{sum(each.numel() for each in weights):,} parameters, "
        f"{str(weights[0].dtype).removeprefix('torch.')} on {weights[0].device}",
    )
    return "\n  ".join([f"{type(generator).__name__}(", *lines]) + "\n)"


def make_block(config: GeneratorConfig) -> Block:
    """One block, of the transformer or of a head."""
    return Block(
        dim=config.dim,
        hidden_dim=config.hidden_dim,
        num_heads=config.num_heads,
        key_heads=config.key_heads,
        qk_norm=config.qk_norm,
        dropout=config.dropout,
    )


@torch.no_grad()
def fill(module: nn.Module, generator: torch.Generator | None = None) -> None:
    """Draw all matrices and tables of a module anew, and set the gains of its norms to 1."""
    for part in module.modules():
        if isinstance(part, nn.Linear | nn.Embedding):
            nn.init.normal_(part.weight, std=INITIAL_STD, generator=generator)
        elif isinstance(part, RmsNorm):
            nn.init.ones_(part.weight)


def check_range(name: str, values: Int64[Tensor, "*shape"], highest: int, meaning: str) -> None:
    """Check numbers of a batch.

    Raises:
        ValueError: one is not in [0, highest].
    """
    require_range(
        values,
        highest,
        lambda low, high: f"{name} ({low} to {high}) must be between 0 and {highest}, {meaning}",
    )
