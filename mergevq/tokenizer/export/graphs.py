"""Graphs of a tokenizer: encoders of one K each, the decoder, and the recovery of sources.

Shape letters: B batch, L grid cells, K kept tokens, C channels, D bits, H and W pixels.
"""

from typing import NamedTuple

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from mergevq.config.parts import require_no_condition
from mergevq.config.tokenizer import TokenizerConfig
from mergevq.data.codes import require_parts
from mergevq.data.layouts import Layout, Ordered, Source, require_source
from mergevq.tokenizer.encoder import Embedded, Encoder
from mergevq.tokenizer.expanders.unmerge import Unmerge
from mergevq.tokenizer.export import dense
from mergevq.tokenizer.reducers.matching import merge_schedule
from mergevq.tokenizer.reducers.merge import Merge, MergeBlock, Nearness, nearness
from mergevq.tokenizer.seams import TokenSet
from mergevq.tokenizer.tokenizer import Tokenizer

_EXAMPLES = 2
"""Images that a graph is traced with; its batch is of any size."""


class Graph(NamedTuple):
    """A module with tensors in and out, and what is needed to trace it."""

    name: str
    """File name without its ending."""
    module: nn.Module
    inputs: dict[str, Tensor]
    """Examples by name, in the order of the arguments."""
    outputs: tuple[str, ...]
    """Names of the results, in their order."""
    free: dict[str, dict[int, str]]
    """Axes of inputs that may have any length, by input; axes of one name have one length."""
    lengths: dict[str, tuple[int, int]]
    """Least and greatest length of such axes, by name."""


def is_exportable(tokenizer: Tokenizer) -> bool:
    """Whether an exporter can take the tokenizer's batch as one of any size.

    Merging has a form in products of matrices (`dense`); of other reducers the exporters take the
    batch of the example.
    """
    return isinstance(tokenizer.encoder.reducer, Merge)


def tokenizer_graphs(tokenizer: Tokenizer, num_kept: tuple[int, ...]) -> list[Graph]:
    """Graphs of a tokenizer, for images of the size that it was trained at.

    Args:
        tokenizer: in evaluation mode, in float32 on the CPU.
        num_kept: values of K, each with an encoder of its own.

    Raises:
        ValueError: no K is given, the reducer does not give one of them, or tokens have no index.
    """
    config = tokenizer.config
    require_parts(tokenizer.quantizer.spec.sizes, "a graph")
    require_no_condition(config.condition, "a graph")
    if not num_kept:
        raise ValueError("num_kept has no value and must have one or more: --num-kept 36,64")
    grid_shape = (config.grid_size, config.grid_size)
    for count in num_kept:
        config.kept_by.check_kept(grid_shape, count)
    image = _pictures(config.image_size)
    encoders = [
        Graph(
            f"encoder_{count}",
            _Encoder(tokenizer, count),
            {"image": image},
            ("indices", "source")[: 1 + _has_source(config)],
            {"image": {0: "batch"}},
            {},
        )
        for count in sorted(set(num_kept))
    ]
    return [*encoders, *_of_tokens(tokenizer, image, max(num_kept))]


def _pictures(side: int) -> Float[Tensor, "b 3 h w"]:
    """Waves of another colour, length and direction in each channel of each image."""
    numbers = torch.rand(_EXAMPLES, 3, 3, 1, 1, generator=torch.Generator().manual_seed(0))
    down, along, phase = numbers.unbind(2)
    places = torch.linspace(0, 12, side)
    return torch.sin(down * places[:, None] + along * places + 6 * phase)


def _has_source(config: TokenizerConfig) -> bool:
    """Whether tokens have a source map."""
    return config.kept_by.gives == "source"


def _of_tokens(tokenizer: Tokenizer, image: Float[Tensor, "b 3 h w"], num_kept: int) -> list[Graph]:
    """Graphs that take tokens: of any K, where the grid does not imply their places."""
    config = tokenizer.config
    if tokenizer.has_maps:
        # As many tokens as cells would be traced as one length.
        num_kept = min(num_kept, config.num_tokens - 1)
    with torch.no_grad():
        names: tuple[str, ...] = ("indices", "source")
        tokens: tuple[Tensor, ...] = _Encoder(tokenizer, num_kept)(image)
    inputs: dict[str, Tensor] = dict(zip(names, tokens, strict=False))
    indices = inputs["indices"]
    kept = {1: "kept"} if tokenizer.has_maps else {}
    lengths = {"kept": (1, config.num_tokens)} if tokenizer.has_maps else {}
    free = {"indices": {0: "batch"} | kept, "source": {0: "batch"}}
    free = {name: free[name] for name in inputs}
    graphs = [Graph("decoder", _Decoder(tokenizer), inputs, ("image",), free, lengths)]
    if isinstance(tokenizer.expander, Unmerge) and tokenizer.has_maps:
        only = {"indices": free["indices"]}
        recovery = _Recovery(tokenizer, tokenizer.expander)
        graphs.append(Graph("recovery", recovery, {"indices": indices}, ("source",), only, lengths))
    return graphs


class _Encoder(nn.Module):
    """Images to tokens at one K."""

    def __init__(self, tokenizer: Tokenizer, num_kept: int) -> None:
        """Take the tokenizer's parts; weights are shared."""
        super().__init__()
        self.encoder, self.quantizer = tokenizer.encoder, tokenizer.quantizer
        self.num_kept = num_kept
        self.num_reduced = tokenizer.config.num_reduced(
            (tokenizer.config.grid_size, tokenizer.config.grid_size), num_kept
        )

    def forward(self, image: Float[Tensor, "b 3 h w"]) -> tuple[Tensor, ...]:
        """Indices (B, K), and the source index (B, L) where tokens have one."""
        embedded = self.encoder.embed(image)
        if isinstance(self.encoder.reducer, Merge):
            reduced, index = _merged(self.encoder, self.encoder.reducer, embedded, self.num_reduced)
        else:
            reduced = self.encoder.reduce(embedded, self.num_kept)
            index = None
            if isinstance(reduced.layout, Source):
                index = require_source(reduced.layout, "exporting").index.expand(len(image), -1)
        parts = self.quantizer(self.encoder.latents(reduced)).parts[:, : self.num_kept]
        indices = self.quantizer.spec.join(parts)
        if index is None or not _has_source(self.encoder.config):
            return (indices,)
        return indices, index


def _merged(
    encoder: Encoder, reducer: Merge, embedded: Embedded, num_kept: int
) -> tuple[TokenSet, Int64[Tensor, "b l"]]:
    """Kept tokens and source index: `Merge.forward` with merging in dense form."""
    grid = embedded.tokens
    batch, num_tokens, _ = grid.shape
    x = torch.cat([encoder.class_token.expand(batch, 1, -1), grid], dim=1)
    index = torch.arange(num_tokens, device=grid.device).expand(batch, -1)
    sizes: Tensor | None = None
    counts = merge_schedule(num_tokens, num_kept, len(reducer.blocks), reducer.shape)
    near = nearness(reducer.locality, embedded.grid_shape)
    taps = encoder.config.branches.taps
    tapped = dict.fromkeys(taps, grid)
    for number, (block, count) in enumerate(zip(reducer.blocks, counts, strict=True), 1):
        if isinstance(block, MergeBlock):
            x, index, sizes = _run(block, x, index, sizes, count, near)
        if number in tapped:
            tapped[number] = dense.copied(x[:, 1:], index)
    index, rank = dense.canonicalize(index, num_kept)
    ones = torch.ones_like(grid[..., 0])
    means = tuple(dense.merge_step(tapped[tap], ones, index, num_kept)[0] for tap in taps)
    tokens = dense.ordered(x[:, 1:], rank)
    return TokenSet(tokens, x[:, 0], Source(index, num_kept), means), index


def _run(
    block: MergeBlock,
    x: Float[Tensor, "b n c"],
    index: Int64[Tensor, "b l"],
    sizes: Float[Tensor, "b n"] | None,
    num_merged: int,
    near: Nearness | None,
) -> tuple[Float[Tensor, "b m c"], Int64[Tensor, "b l"], Float[Tensor, "b m"] | None]:
    """One block; arguments and results are those of `MergeBlock.forward`."""
    attended = block.attn(block.norm1(x), sizes)
    x = x + block.ls1(attended.tokens)
    if num_merged > 0:
        places = None
        if near is not None:
            places = near.per_cell * dense.centres(index, x.shape[1] - 1, near.width)
        destination = dense.match(attended.keys[:, 1:], num_merged, places)
        groups = torch.nn.functional.pad(destination + 1, (1, 0))
        sizes = torch.ones_like(x[..., 0]) if sizes is None else sizes
        x, sizes = dense.merge_step(x, sizes, groups, x.shape[1] - num_merged)
        index = destination.gather(1, index)
    return x + block.ls2(block.mlp(block.norm2(x))), index, sizes


class _Decoder(nn.Module):
    """Tokens to images."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        """Take the tokenizer's parts; weights are shared."""
        super().__init__()
        self.codes = _Codes(tokenizer)
        self.expander, self.decoder = tokenizer.expander, tokenizer.decoder
        self.grid_shape = (tokenizer.config.grid_size, tokenizer.config.grid_size)

    def forward(
        self, indices: Int64[Tensor, "b k"], source: Int64[Tensor, "b l"] | None = None
    ) -> Float[Tensor, "b 3 h w"]:
        """Image in about [-1, 1], not clamped."""
        num_kept = indices.shape[1]
        layout: Layout = Ordered(num_kept) if source is None else Source(source, num_kept)
        return self.decoder(self.expander(self.codes(indices), layout, self.grid_shape))


class _Recovery(nn.Module):
    """Tokens to the source index that they imply."""

    def __init__(self, tokenizer: Tokenizer, expander: Unmerge) -> None:
        """Take the tokenizer's parts; weights are shared."""
        super().__init__()
        self.codes, self.predictor = _Codes(tokenizer), expander.predictor
        self.grid_shape = (tokenizer.config.grid_size, tokenizer.config.grid_size)

    def forward(self, indices: Int64[Tensor, "b k"]) -> Int64[Tensor, "b l"]:
        """Index of the most likely source."""
        logits = self.predictor(self.codes(indices), self.grid_shape)
        return dense.most_likely_source(logits.float())


class _Codes(nn.Module):
    """Indices to the channels of codes that the expander is given, in float32."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        """Take the quantizer; weights are shared."""
        super().__init__()
        self.quantizer = tokenizer.quantizer
        self.num_left_out = tokenizer.config.quantizer.dim - tokenizer.config.decoded_dim

    def forward(self, indices: Int64[Tensor, "b k"]) -> Float[Tensor, "b k d"]:
        """Codes of tokens."""
        codes = self.quantizer.decode(self.quantizer.spec.split(indices)).float()
        return codes[..., self.num_left_out :]
