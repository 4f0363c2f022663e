"""One step of a generator as graphs whose cache goes in and comes out.

Source: Li et al. 2025, "MergeVQ", section 3.4 and figure 6 (arXiv:2504.00999).

    start: class, row of K            -> state, keys, values
    step:  token, cell, keys, values,
           past inputs that it sees   -> state, keys, values
    head:  state, parts before        -> logits of each part

A cache grows by one with each step. Whoever runs them keeps the rules of MergeAR: an input of the
past is seen if it is of the prefix, among the last `window`, or the first of its token; one that
will not be seen again may be cut off.

Shape letters: B batch, S layers, G heads of keys and values, M inputs of the past, N new inputs,
H heads of queries, D channels of a head, C channels, P parts of a token.
"""

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor, nn
from torch.nn import functional

from mergevq.generator.autoregressive import Autoregressive
from mergevq.generator.build import AnyGenerator
from mergevq.generator.network import Network
from mergevq.generator.orders.merge import Merge
from mergevq.nn.attention import attend
from mergevq.tokenizer.export.graphs import Graph

_EXAMPLES = 2


def generator_graphs(generator: AnyGenerator) -> list[Graph]:
    """Graphs of a generator: start, step and head.

    Args:
        generator: in evaluation mode, in float32 on the CPU.

    Raises:
        ValueError: it does not decode in merge order.
    """
    if not isinstance(generator, Autoregressive) or not isinstance(generator.order, Merge):
        raise ValueError(
            f"order ({generator.config.order.kind}) must be merge: only the step of a MergeAR "
            "generator can be exported; leave out --generator"
        )
    network = generator.network
    config = network.config
    label = torch.arange(_EXAMPLES) % config.num_classes
    row = torch.zeros(_EXAMPLES, dtype=torch.int64)
    start, step = _Start(network), _Step(network)
    begin = {"label": label, "row": row} if config.kept_candidates else {"label": label}
    with torch.no_grad():
        state, keys, values = start(*begin.values())
        token = torch.arange(_EXAMPLES)
        for cell in (0, 1):
            visible = torch.ones(_EXAMPLES, keys.shape[3], dtype=torch.bool)
            past = {"keys": keys, "values": values, "visible": visible}
            inputs = {"token": token, "cell": torch.tensor(cell), **past}
            state, keys, values = step(*inputs.values())
    parts = network.codes(token)
    cache = {1: "batch", 3: "past"}
    free = {
        "token": {0: "batch"},
        "keys": cache,
        "values": cache,
        "visible": {0: "batch", 1: "past"},
    }
    most = config.num_prefix + config.num_tokens
    outputs = ("state", "new_keys", "new_values")
    logits = tuple(f"logits_{part}" for part in range(parts.shape[-1]))
    return [
        Graph("generator_start", start, begin, outputs, {name: {0: "batch"} for name in begin}, {}),
        Graph("generator_step", step, inputs, outputs, free, {"past": (2, most)}),
        Graph(
            "generator_head",
            _Head(network),
            {"state": state, "parts": parts},
            logits,
            {"state": {0: "batch"}, "parts": {0: "batch"}},
            {},
        ),
    ]


class _Grown:
    """A cache that hands out what it was given with the new inputs behind it (`seams.Cache`)."""

    def __init__(
        self,
        keys: Float[Tensor, "s b g m d"] | None = None,
        values: Float[Tensor, "s b g m d"] | None = None,
    ) -> None:
        """Begin with inputs of the past; None is none."""
        self._past = None if keys is None or values is None else (keys, values)
        self._grown: list[tuple[Tensor, Tensor]] = []

    def attend(
        self,
        layer: int,
        query: Float[Tensor, "b h n d"],
        key: Float[Tensor, "b g n d"],
        value: Float[Tensor, "b g n d"],
        mask: Float[Tensor, "b 1 m"] | None,
    ) -> Float[Tensor, "b h n d"]:
        """Attend to the past and to the new inputs, several of which see those up to themselves."""
        if self._past is not None:
            keys, values = self._past
            key, value = torch.cat([keys[layer], key], 2), torch.cat([values[layer], value], 2)
        self._grown.append((key, value))
        several = mask is None and query.shape[2] > 1
        return attend(query, key, value, None if mask is None else mask[:, None], is_causal=several)

    def grown(self) -> tuple[Float[Tensor, "s b g m d"], Float[Tensor, "s b g m d"]]:
        """Keys and values of all layers, the new ones last."""
        keys, values = zip(*self._grown, strict=True)
        return torch.stack(keys), torch.stack(values)


def _transform(
    network: Network,
    inputs: Float[Tensor, "b n c"],
    positions: Float[Tensor, "1 n 2"],
    mask: Float[Tensor, "b 1 m"] | None,
    cache: _Grown,
) -> tuple[Float[Tensor, "b c"], Float[Tensor, "s b g m d"], Float[Tensor, "s b g m d"]]:
    """State of the last input, and the cache with all: `Network.transform` with explicit memory."""
    turns = network.turns(positions)
    x = inputs
    for layer, block in enumerate(network.blocks):

        def recall(query: Tensor, key: Tensor, value: Tensor, layer: int = layer) -> Tensor:
            """Attention of one layer."""
            return cache.attend(layer, query, key, value, mask)

        x = block(x, turns, None, recall)
    return x[:, -1], *cache.grown()


class _Start(nn.Module):
    """The prefix: class, and K where it may vary."""

    def __init__(self, network: Network) -> None:
        """Take the network; weights are shared."""
        super().__init__()
        self.network = network

    def forward(
        self, label: Int64[Tensor, "b"], row: Int64[Tensor, "b"] | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """State of the first token, keys and values.

        Args:
            label: class; the number of classes means none.
            row: place of K among those trained on.
        """
        prefix = self.network.class_embedding(label)[:, None]
        if row is not None:
            prefix = torch.cat([prefix, self.network.kept_embedding(row)[:, None]], dim=1)
        positions = torch.zeros(1, prefix.shape[1], 2)
        return _transform(self.network, prefix, positions, None, _Grown())


class _Step(nn.Module):
    """One token into the network."""

    def __init__(self, network: Network) -> None:
        """Take the network; weights are shared."""
        super().__init__()
        self.network = network

    def forward(
        self,
        token: Int64[Tensor, "b"],
        cell: Int64[Tensor, ""],
        keys: Float[Tensor, "s b g m d"],
        values: Float[Tensor, "s b g m d"],
        visible: Bool[Tensor, "b m"],
    ) -> tuple[Tensor, Tensor, Tensor]:
        """State of the next token, and the cache with this one.

        Args:
            token: index.
            cell: number of its cell in raster order, of all images.
            keys: of the past.
            values: of the past.
            visible: inputs of the past that it sees.
        """
        network = self.network
        inputs = network.embed(network.codes(token)[:, None])
        positions = network.cell_positions().index_select(0, cell[None])[None]
        hidden = torch.zeros_like(visible, dtype=torch.float32).masked_fill(~visible, -torch.inf)
        mask = functional.pad(hidden, (0, 1))[:, None]
        return _transform(network, inputs, positions, mask, _Grown(keys, values))


class _Head(nn.Module):
    """Logits of the parts of one token."""

    def __init__(self, network: Network) -> None:
        """Take the network; weights are shared."""
        super().__init__()
        self.network = network

    def forward(
        self, state: Float[Tensor, "b c"], parts: Int64[Tensor, "b p"]
    ) -> tuple[Tensor, ...]:
        """Logits of each part given those before it: the last of `parts` has no effect."""
        return tuple(self.network.head(state, parts, self.network.embed_part))
