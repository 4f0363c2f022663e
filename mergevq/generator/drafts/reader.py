"""A network that reads cells of each image in any number, and again where they were wrong.

Source: Leviathan et al. 2023, "Fast Inference from Transformers via Speculative Decoding",
section 2 (arXiv:2211.17192).

Shape letters: B images, R rows (B, or 2B with guidance: conditional ones first), M tokens and
drafts, P parts of a token, U uniform numbers of a token, C channels, N cells of each image, T
tokens of a sequence, E inputs looked at.
"""

from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from mergevq.config.generator import SamplingSettings
from mergevq.generator.cache import RowCache
from mergevq.generator.decoding import add_targets, cache_type, prefill
from mergevq.generator.network import Chosen, Network, Restriction
from mergevq.generator.sampling import guidance_scales
from mergevq.nn.llama import Rotation


@runtime_checkable
class CellByCell(Protocol):
    """An order of all cells of which several can be checked in one pass."""

    @property
    def targets(self) -> Float[Tensor, "t c"] | None:
        """Vector of the place of each token, added to the input before it."""
        ...

    def seen(
        self,
        network: Network,
        tokens: Int64[Tensor, "b m p"],
        slots: Int64[Tensor, "b n"],
        end: int,
    ) -> Bool[Tensor, "b n e"]:
        """Inputs, the prefix first, that some of them see.

        Args:
            network: of whose tokens these are.
            tokens: of each image, those that are not decoded among them.
            slots: inputs that look, by number.
            end: inputs looked at.
        """
        ...

    def restriction(
        self,
        network: Network,
        tokens: Int64[Tensor, "b m p"],
        cells: Int64[Tensor, "b n"],
        num_kept: int,
        settings: SamplingSettings,
    ) -> Restriction | None:
        """Rules for some cells of each image, one after the other, by the tokens before each.

        None leaves all free.
        """
        ...


class Reader:
    """A network with a cache of the cells that it has read of each image.

    A cell can be read again, with another token: what was read of it is overwritten.
    """

    def __init__(
        self,
        network: Network,
        order: CellByCell,
        labels: Int64[Tensor, "b"],
        num_kept: int,
        num_cells: int,
        settings: SamplingSettings,
    ) -> None:
        """Allocate the cache.

        Args:
            network: what reads.
            order: whose sequences these are.
            labels: classes.
            num_kept: K.
            num_cells: room in each row; rows that are ahead go on past their end.
            settings: guidance, temperature and so on.
        """
        self.network, self.order, self.num_kept, self.settings = network, order, num_kept, settings
        self.num_tokens, self.num_prefix = network.config.num_tokens, network.config.num_prefix
        scales = guidance_scales(settings, range(self.num_tokens), self.num_tokens)
        self.labels = network.with_unconditional(labels, scales)
        self.repeats = len(self.labels) // len(labels)
        self.images = torch.arange(len(labels), device=network.device)[:, None]
        self.scale = scales[0] if len(set(scales)) == 1 else None
        self.scales = torch.tensor(scales, device=network.device)
        self.cache = RowCache(
            network.config,
            batch=len(self.labels),
            num_slots=self.num_prefix + num_cells,
            device=network.device,
            dtype=cache_type(network),
        )

    def start(self) -> Float[Tensor, "r c"]:
        """Forget everything, read the prefix, and give the state that predicts the first token."""
        target = None if self.order.targets is None else self.order.targets[0]
        return prefill(self.network, self.cache, self.labels, self.num_kept, target)

    def read(
        self, tokens: Int64[Tensor, "b m p"], cells: Int64[Tensor, "b n"], end: int
    ) -> Float[Tensor, "r n c"]:
        """Read some cells of each image, and give the states that predict those after them.

        Args:
            tokens: of each image.
            cells: their numbers, below `end`; all cells before them have been read.
            end: cells that are looked at.
        """
        repeats, targets = self.repeats, self.order.targets
        inputs = self.network.embed(tokens[self.images, cells].repeat(repeats, 1, 1))
        if targets is not None:
            following = (cells + 1).clamp_max(self.num_tokens - 1)
            inputs = add_targets(inputs, targets[following].repeat(repeats, 1, 1))
        slots, end = self.num_prefix + cells, self.num_prefix + end
        self.cache.put_at(slots.repeat(repeats, 1), end)
        places = cells.clamp_max(self.num_tokens - 1)
        turns = Rotation(
            *(table[0, 0, places][:, None].repeat(repeats, 1, 1, 1) for table in self.cache.turns)
        )
        seen = self.order.seen(self.network, tokens, slots, end).repeat(repeats, 1, 1)
        return self.network.transform(inputs, turns, seen, self.cache)

    def choose(
        self,
        states: Float[Tensor, "r n c"],
        tokens: Int64[Tensor, "b m p"],
        cells: Int64[Tensor, "b n"],
        uniforms: Float[Tensor, "b t u"],
    ) -> Chosen:
        """Choose the tokens of some cells of each image, by the numbers of their places.

        Args:
            states: that predict them.
            tokens: of each image, those before each cell among them.
            cells: their numbers; beyond the last cell they are chosen as there.
            uniforms: numbers that decide.

        Returns:
            The tokens of all cells in one row after the other.
        """
        places = cells.clamp_max(self.num_tokens - 1)
        scale = self.scales[places].flatten()[:, None] if self.scale is None else self.scale
        return self.network.choose(
            states.flatten(0, 1),
            uniforms[self.images, places].flatten(0, 1),
            scale,
            self.settings,
            self.order.restriction(self.network, tokens, cells, self.num_kept, self.settings),
        )
