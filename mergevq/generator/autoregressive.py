"""Autoregressive generators over a tokenizer's indices: four orders of one transformer.

Source: Li et al. 2025, "MergeVQ", section 3.4 and figure 6 (MergeAR, arXiv:2504.00999); Sun et al.
2024, "Autoregressive Model Beats Diffusion: Llama for Scalable Image Generation", section 2
(arXiv:2406.06525); Pang et al. 2024, "RandAR", section 3 (arXiv:2412.01827); Luo et al. 2024,
"Open-MAGVIT2", section 3.2 (sub-indices, arXiv:2409.04410).

    raster   [class, (M), x_1 .. x_L]                 all cells, one after the other (LlamaGen)
    merge    [class, M, x_1 .. x_L]                   the same; old duplicates are hidden (MergeAR)
    random   [class, M, P_1, x_1, P_2, x_2 ..]        the K kept tokens in any order (RandAR)
    anchor   [class, M, (a_1, x_1) .. (a_K, x_K)]     the K kept tokens and the cells they open at

M is the merge instruction, an embedding of K; P_i says which slot is next, x_i is that slot's
token. A token has several *parts*, its sub-indices (and before them its anchor): inputs sum their
embeddings, and a small causal transformer over them, the head, predicts each from those before it.

Differs: groups of order `merge` are tokens of equal code, in training as in sampling, where the
paper trains on the tokenizer's groups (`merge_groups="source"` is the paper); the prefix is rotated
by the cell (0, 0) and image cells count from (1, 1), where LlamaGen zeroes the prefix's queries and
keys; slot k of K is rotated by the cell k L / K, where RandAR needs a square number of slots.
Order `anchor` is this project's own.

Shape letters: B batch, L grid cells, K kept tokens, T tokens of a sequence (L or K), P parts of a
token, C channels, N inputs, M keys, H heads, D channels of a head, R and S each B or 1.
"""

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.attention.flex_attention import BlockMask
from torch.utils.checkpoint import checkpoint

from mergevq.config.generator import GeneratorConfig
from mergevq.data.codes import indices_to_subindices, subindices_to_indices
from mergevq.generator.heads.subindices import INITIAL_STD, Head, make_block
from mergevq.generator.orders.merge import first_occurrence, merge_block_mask, merge_mask
from mergevq.nn.attention import additive_mask
from mergevq.nn.llama import Dropout, RmsNorm, Rotation, cell_positions, rotate, rotation
from mergevq.runtime.artefacts import SavedModel, build_for, load_model, resolve, save_model
from mergevq.runtime.settings import from_json


@runtime_checkable
class Cache(Protocol):
    """Memory of keys and values between forward passes (see `mergevq.generator.cache`)."""

    keys: Tensor
    """Keys of all layers, in the type that is remembered."""

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


class GeneratorLoss(NamedTuple):
    """Cross-entropy of a batch, float32 scalars in nats."""

    total: Float[Tensor, ""]
    """Sum of `parts`: what is minimised."""
    parts: Float[Tensor, "p"]
    """Label-smoothed mean over tokens, for each of `GeneratorConfig.part_names`."""
    nll: Float[Tensor, ""]
    """Mean negative log-likelihood of a token: all parts, no smoothing, no gradient."""


class Layout(NamedTuple):
    """A batch as the transformer sees it."""

    inputs: Float[Tensor, "b n c"]
    """Embedded sequence."""
    positions: Float[Tensor, "r n 2"]
    """Row and column of each input."""
    mask: Bool[Tensor, "s n n"] | BlockMask | None
    """Which inputs (last axis) each sees; None is all up to itself."""
    reads: Int64[Tensor, "t"]
    """Inputs whose states predict the tokens."""
    parts: Int64[Tensor, "b t p"]
    """The tokens predicted, in the order of `reads`."""


def legal_gaps(
    previous: Int64[Tensor, "b t"], tokens: Int64[Tensor, "t"], num_kept: int, num_tokens: int
) -> Bool[Tensor, "b t l"]:
    """Gaps that lead from the previous anchor to a cell from which the tokens left still fit.

    Args:
        previous: anchor of the token before; 0 for the first.
        tokens: positions in the sequence, from 0. The first token opens at cell 0, by a gap of 0.
        num_kept: K.
        num_tokens: L.
    """
    gaps = torch.arange(num_tokens, device=previous.device)
    largest = num_tokens - num_kept + tokens - previous
    later = (gaps >= 1) & (gaps <= largest[..., None])
    return torch.where((tokens == 0)[:, None], gaps == 0, later)


class Generator(nn.Module):
    """A class-conditional autoregressive model of token sequences in one of four orders."""

    def __init__(self, config: GeneratorConfig) -> None:
        """Build it, with random weights from torch's default generator."""
        super().__init__()
        self.config = config
        self.class_embedding = nn.Embedding(config.num_classes + 1, config.dim)
        if config.kept_candidates:
            self.kept_embedding = nn.Embedding(len(config.kept_candidates), config.dim)
        self.part_embeddings = nn.ModuleList(
            nn.Embedding(size, config.dim) for size in config.part_sizes
        )
        if config.order == "random":
            self.instruction = nn.Parameter(torch.empty(config.dim))
        self.dropout = Dropout(config.dropout)
        self.blocks = nn.ModuleList(make_block(config) for _ in range(config.num_layers))
        self.head = Head(config)
        self.checkpointing = False
        """Recompute the blocks in the backward pass."""
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Draw all weights anew; the outputs become zero, so that training starts uniform."""
        if self.device.type == "meta":
            return  # There is nothing to fill, and torch would load its compiler to find that out.
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=INITIAL_STD, generator=generator)
            elif isinstance(module, RmsNorm):
                nn.init.ones_(module.weight)
        for output in self.head.outputs:
            nn.init.zeros_(output.get_parameter("weight"))
        if self.config.order == "random":
            nn.init.normal_(self.instruction, std=INITIAL_STD, generator=generator)

    @classmethod
    def from_pretrained(cls, path: str | Path) -> "Generator":
        """Load from a directory that `save_pretrained` or training wrote, or from the hub.

        A directory never touches the network; on the hub, a model is `owner/name@revision`.
        The generator comes back in evaluation mode.

        Raises:
            ValueError: the artefact is of another kind or format, or its weights do not fit.
        """
        return cls.from_saved(load_model(resolve(path), kind="generator"))

    @classmethod
    def from_saved(cls, saved: SavedModel) -> "Generator":
        """Build what was read from disk, in evaluation mode.

        Raises:
            ValueError: its weights do not fit.
        """
        config = from_json(GeneratorConfig, saved.record["config"])
        layers = {
            "num_layers": config.num_layers,
            "num_head_layers": config.num_head_layers,
            "the number of parts of a token": len(config.part_names),
        }
        return build_for(lambda: cls(config), saved.state, layers=layers).eval()

    def save_pretrained(
        self, path: str | Path, *, tokenizer: str, class_names: Sequence[str] = ()
    ) -> None:
        """Write `model.safetensors` and `config.json` into a directory.

        Args:
            path: of the directory.
            tokenizer: hash of the tokenizer (`runtime.artefacts.tokens_hash`) whose tokens these
                are.
            class_names: of the classes, in order.
        """
        extra = {"tokenizer": tokenizer, "class_names": list(class_names)}
        save_model(path, self.state_dict(), self.config, kind="generator", extra=extra)

    def set_share(self, index: int, count: int) -> None:
        """Say which of `count` equal shares of the batch comes next, for dropout."""
        for module in self.modules():
            if isinstance(module, Dropout):
                module.share = (index, count)

    def set_checkpointing(self, *, enabled: bool) -> None:
        """Trade time for memory in training: recompute activations in the backward pass."""
        self.checkpointing = enabled

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.class_embedding.weight.device

    @property
    def dtype(self) -> torch.dtype:
        """Type of embeddings, activations and caches."""
        return self.class_embedding.weight.dtype

    def forward(
        self,
        indices: Int64[Tensor, "b t"],
        class_label: Int64[Tensor, "b"],
        num_kept: int,
        generator: torch.Generator | None,
        *,
        anchors: Int64[Tensor, "b t"] | None = None,
        source_index: Int64[Tensor, "b l"] | None = None,
        order: Int64[Tensor, "b t"] | None = None,
    ) -> GeneratorLoss:
        """`loss`, under the name that wrappers such as DDP call."""
        return self.loss(
            indices,
            class_label,
            num_kept,
            generator,
            anchors=anchors,
            source_index=source_index,
            order=order,
        )

    def loss(
        self,
        indices: Int64[Tensor, "b t"],
        class_label: Int64[Tensor, "b"],
        num_kept: int,
        generator: torch.Generator | None,
        *,
        anchors: Int64[Tensor, "b t"] | None = None,
        source_index: Int64[Tensor, "b l"] | None = None,
        order: Int64[Tensor, "b t"] | None = None,
    ) -> GeneratorLoss:
        """Cross-entropy of a batch of sequences.

        Args:
            indices: all L cells in raster order (`raster`, `merge`), or the K kept tokens in
                canonical order (`random`, `anchor`).
            class_label: in [0, num_classes]; the last, `null_class`, is no class.
            num_kept: K of every sequence.
            generator: of dropped labels (in training mode only) and random orders; None where the
                caller has dropped labels and gives orders. Dropout itself draws from torch's
                default generator.
            anchors: cell at which each kept token opens; order `anchor` needs them.
            source_index: the tokenizer's source map; `merge_groups="source"` needs it.
            order: slots in the order in which they are decoded, for order `random`; None draws it.

        Raises:
            ValueError: a shape, a token, a label or K is not this generator's.
        """
        if self.training and generator is not None:
            numbers = uniform(class_label.shape, generator, class_label.device)
            class_label = self.drop_classes(class_label, numbers)
        if self.config.order == "random" and order is None and generator is not None:
            order = random_orders(indices.shape, generator, indices.device)
        parts = self.parts(indices, anchors)
        layout = self._layout(parts, class_label, num_kept, order, source_index)
        smoothed, hits = [], []
        for log_probs, target in zip(
            self._log_probs(layout, num_kept), self._targets(layout.parts), strict=True
        ):
            hit = -log_probs.gather(-1, target[..., None])[..., 0]
            # Illegal gaps have no probability and take no share of the smoothing.
            legal = log_probs > -torch.inf
            spread = -log_probs.masked_fill(~legal, 0).sum(-1) / legal.sum(-1)
            smoothing = self.config.label_smoothing
            smoothed.append(((1 - smoothing) * hit + smoothing * spread).mean())
            hits.append(hit.detach().mean())
        losses = torch.stack(smoothed)
        return GeneratorLoss(total=losses.sum(), parts=losses, nll=torch.stack(hits).sum())

    def drop_classes(
        self, class_label: Int64[Tensor, "b"], numbers: Float[Tensor, "b"]
    ) -> Int64[Tensor, "b"]:
        """Labels, with `null_class` where a uniform number says that the label is dropped."""
        null = torch.full_like(class_label, self.config.null_class)
        return torch.where(numbers < self.config.class_dropout, null, class_label)

    def logits(
        self,
        indices: Int64[Tensor, "b t"],
        class_label: Int64[Tensor, "b"],
        num_kept: int,
        *,
        anchors: Int64[Tensor, "b t"] | None = None,
        source_index: Int64[Tensor, "b l"] | None = None,
        order: Int64[Tensor, "b t"] | None = None,
    ) -> list[Float[Tensor, "b t _"]]:
        """Logits of each part of each token given all that comes before, in one full forward.

        Arguments are those of `loss`; and order `random` needs `order`, the slots in the order in
        which they are decoded. Logits are at the positions of `indices`, whatever that order is.
        """
        parts = self.parts(indices, anchors)
        layout = self._layout(parts, class_label, num_kept, order, source_index)
        logits = self._logits(layout, num_kept)
        if order is None:
            return logits
        where = order.argsort(-1)[..., None]
        return [part.gather(1, where.expand_as(part)) for part in logits]

    def log_likelihood(
        self,
        indices: Int64[Tensor, "b t"],
        class_label: Int64[Tensor, "b"],
        num_kept: int,
        *,
        anchors: Int64[Tensor, "b t"] | None = None,
        source_index: Int64[Tensor, "b l"] | None = None,
        order: Int64[Tensor, "b t"] | None = None,
    ) -> Float[Tensor, "b"]:
        """Exact log-likelihood of each sequence in nats; arguments are those of `logits`.

        Order `anchor` counts anchors and codes, order `random` codes given the order.
        """
        parts = self.parts(indices, anchors)
        layout = self._layout(parts, class_label, num_kept, order, source_index)
        hits = [
            log_probs.gather(-1, target[..., None])[..., 0].sum(-1)
            for log_probs, target in zip(
                self._log_probs(layout, num_kept), self._targets(layout.parts), strict=True
            )
        ]
        return torch.stack(hits).sum(0)

    def parts(
        self, indices: Int64[Tensor, "b t"], anchors: Int64[Tensor, "b t"] | None = None
    ) -> Int64[Tensor, "b t p"]:
        """Cut tokens into their parts.

        Raises:
            ValueError: an index is no code, or anchors are missing, unwanted or out of order.
        """
        codebook_size = 2**self.config.num_bits
        _check_range(
            "indices", indices, codebook_size - 1, f"a code of {self.config.num_bits} bits"
        )
        subindices = indices_to_subindices(indices, self.config.factor_bits)
        if (anchors is None) == (self.config.order == "anchor"):
            raise ValueError(f"anchors go with order 'anchor' alone, not '{self.config.order}'")
        if anchors is None:
            return subindices
        _check_range("anchors", anchors, self.config.num_tokens - 1, "the last cell of the grid")
        _check_anchors(anchors)
        return torch.cat([anchors[..., None], subindices], dim=-1)

    def indices(self, parts: Int64[Tensor, "*shape p"]) -> Int64[Tensor, "*shape"]:
        """Put the sub-indices among the parts together again."""
        first = len(self.config.part_names) - len(self.config.factor_bits)
        return subindices_to_indices(parts[..., first:], self.config.factor_bits)

    def embed_prefix(
        self, class_label: Int64[Tensor, "b"], num_kept: int
    ) -> Float[Tensor, "b n c"]:
        """The class and, where K may vary, the merge instruction M(K).

        Raises:
            ValueError: there is no such class, or no such K.
        """
        null = self.config.null_class
        _check_range("class_label", class_label, null, "which means no class")
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

    def embed_instruction(self, positions: Float[Tensor, "b n 2"]) -> Float[Tensor, "b n c"]:
        """Position instructions: one shared vector, turned by where the next token goes."""
        batch, length, _ = positions.shape
        vector = self.instruction.expand(batch, length, -1)
        if not self.config.rotate_instruction:
            return vector
        heads = vector.unflatten(-1, (self.config.num_heads, -1)).transpose(1, 2)
        turned = rotate(heads, self.turns(positions)).to(vector.dtype)
        return turned.transpose(1, 2).flatten(2)

    def cell_positions(self) -> Float[Tensor, "l 2"]:
        """Row and column of each cell, from (1, 1); (0, 0) is the prefix."""
        return cell_positions(self.config.grid_size, self.device)

    def turns(self, positions: Float[Tensor, "r n 2"]) -> Rotation:
        """Turns of queries and keys at rows and columns."""
        return rotation(positions, self.config.head_dim)

    def slot_positions(self, num_kept: int) -> Float[Tensor, "k 2"]:
        """Where slot k of K is: at the cell k L / K, near which it opens in canonical order."""
        slots = torch.arange(num_kept, device=self.device)
        return self.cell_positions()[slots * self.config.num_tokens // num_kept]

    def transform(
        self,
        inputs: Float[Tensor, "b n c"],
        turns: Rotation,
        mask: Bool[Tensor, "s n m"] | BlockMask | None = None,
        cache: Cache | None = None,
    ) -> Float[Tensor, "b n c"]:
        """Run the trunk.

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

    def _layout(
        self,
        parts: Int64[Tensor, "b t p"],
        class_label: Int64[Tensor, "b"],
        num_kept: int,
        order: Int64[Tensor, "b t"] | None,
        source_index: Int64[Tensor, "b l"] | None,
    ) -> Layout:
        """Lay a batch out as the transformer's inputs, by the rules of the order."""
        expected = self.config.num_tokens if self._is_raster else num_kept
        if parts.shape[1] != expected:
            raise ValueError(
                f"a sequence of {parts.shape[1]} tokens must have {expected}: "
                + ("all cells" if self._is_raster else "the kept tokens")
                + f" in order '{self.config.order}'"
            )
        prefix = self.embed_prefix(class_label, num_kept)
        if self.config.order == "random":
            if order is None:
                raise ValueError("order 'random' needs order: the slots as they are decoded")
            return self._random_layout(parts, prefix, order)
        # The last token is never an input: nothing comes after it.
        inputs = torch.cat([prefix, self.embed(parts[:, :-1])], dim=1)
        cells = parts[:, :-1, 0] if self.config.order == "anchor" else None
        positions = self.cell_positions()
        positions = positions[None, :-1] if cells is None else positions[cells]
        positions = functional.pad(positions, (0, 0, prefix.shape[1], 0))
        mask = self._merge_mask(parts, source_index) if self.config.order == "merge" else None
        reads = torch.arange(prefix.shape[1] - 1, inputs.shape[1], device=inputs.device)
        return Layout(inputs, positions, mask, reads, parts)

    def _random_layout(
        self,
        parts: Int64[Tensor, "b t p"],
        prefix: Float[Tensor, "b n c"],
        order: Int64[Tensor, "b t"],
    ) -> Layout:
        """Interleave instructions and tokens; states of the instructions predict."""
        parts = parts.gather(1, order[..., None].expand_as(parts))
        inputs, positions = self.pairs(parts, self.slot_positions(order.shape[1])[order])
        inputs = torch.cat([prefix, inputs[:, :-1]], dim=1)
        positions = functional.pad(positions[:, :-1], (0, 0, prefix.shape[1], 0))
        reads = torch.arange(prefix.shape[1], inputs.shape[1], 2, device=inputs.device)
        return Layout(inputs, positions, None, reads, parts)

    def pairs(
        self, parts: Int64[Tensor, "b t p"], positions: Float[Tensor, "b t 2"]
    ) -> tuple[Float[Tensor, "b n c"], Float[Tensor, "b n 2"]]:
        """Inputs P_1, x_1, P_2, x_2 .. of order `random`, and their positions."""
        both = torch.stack([self.embed_instruction(positions), self.embed(parts)], dim=2)
        return both.flatten(1, 2), positions.repeat_interleave(2, dim=1)

    def _merge_mask(
        self, parts: Int64[Tensor, "b t p"], source_index: Int64[Tensor, "b l"] | None
    ) -> Bool[Tensor, "b n n"] | BlockMask:
        """Visibility among the prefix and all tokens but the last."""
        if self.config.merge_groups == "code":
            groups = self.indices(parts)
        elif source_index is None:
            raise ValueError("merge_groups 'source' needs source_index, the tokenizer's source map")
        else:
            groups = source_index
        first = functional.pad(
            first_occurrence(groups)[:, :-1], (self.config.num_prefix, 0), value=True
        )
        if self.config.flex_attention and self.training and first.is_cuda:
            return merge_block_mask(first, self.config.window)
        return merge_mask(first, self.config.window)

    def _logits(self, layout: Layout, num_kept: int) -> list[Float[Tensor, "b t _"]]:
        """Logits of all parts, each given the true parts before it; illegal gaps are -inf."""
        states = self.transform(layout.inputs, self.turns(layout.positions), layout.mask)[
            :, layout.reads
        ]
        batch, length, num_parts = layout.parts.shape
        known = [
            self.embed_part(part, layout.parts[..., part]).flatten(0, 1)
            for part in range(num_parts - 1)
        ]
        logits = [
            part.unflatten(0, (batch, length)) for part in self.head(states.flatten(0, 1), known)
        ]
        if self.config.order == "anchor":
            previous = functional.pad(layout.parts[:, :-1, 0], (1, 0))
            tokens = torch.arange(length, device=previous.device)
            legal = legal_gaps(previous, tokens, num_kept, self.config.num_tokens)
            logits[0] = logits[0].masked_fill(~legal, -torch.inf)
        return logits

    def _log_probs(self, layout: Layout, num_kept: int) -> list[Float[Tensor, "b t _"]]:
        """Logarithms of the probabilities of all parts."""
        return [logits.log_softmax(-1) for logits in self._logits(layout, num_kept)]

    def _targets(self, parts: Int64[Tensor, "b t p"]) -> list[Int64[Tensor, "b t"]]:
        """Targets of the head: the parts, an anchor as the gap from the one before."""
        targets = list(parts.unbind(-1))
        if self.config.order == "anchor":
            targets[0] = targets[0] - functional.pad(targets[0][:, :-1], (1, 0))
        return targets

    @property
    def _is_raster(self) -> bool:
        """Whether a sequence is all cells."""
        return self.config.order in {"raster", "merge"}


def random_orders(
    shape: Sequence[int], generator: torch.Generator, device: torch.device
) -> Int64[Tensor, "b t"]:
    """A random permutation of the slots for each sequence."""
    return uniform(shape, generator, device).argsort(-1)


def uniform(
    shape: Sequence[int], generator: torch.Generator, device: torch.device
) -> Float[Tensor, "*shape"]:
    """Uniform numbers in [0, 1), drawn where the generator lives."""
    return torch.rand(*shape, generator=generator, device=generator.device).to(device)


def _check_range(name: str, values: Int64[Tensor, "*shape"], highest: int, meaning: str) -> None:
    """Raise `ValueError` when a value is not in [0, highest]."""
    if values.numel() == 0 or torch.compiler.is_compiling():
        return
    low, high = values.aminmax()
    if low < 0 or high > highest:
        raise ValueError(
            f"{name} ({int(low)} to {int(high)}) must be between 0 and {highest}, {meaning}"
        )


def _check_anchors(anchors: Int64[Tensor, "b t"]) -> None:
    """Raise `ValueError` unless each row starts at cell 0 and rises."""
    if not torch.compiler.is_compiling() and (
        anchors[:, 0].any() or (anchors.diff(dim=1) < 1).any()
    ):
        raise ValueError("anchors must start at cell 0 and increase: tokens in canonical order")
