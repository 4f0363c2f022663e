"""Sequences of which several tokens are drafted and checked in each pass.

Source: Leviathan et al. 2023, "Fast Inference from Transformers via Speculative Decoding",
section 2 (arXiv:2211.17192), for samples that share their random numbers; FLASH
(github.com/ZihuaEvan/FlashSD).

Shape letters: B images, R rows (B, or 2B with guidance: conditional ones first), T tokens of a
sequence, M tokens and drafts, P parts of a token, C channels.
"""

from typing import NamedTuple

import torch
from jaxtyping import Bool, Int64
from torch import Tensor

from mergevq.config.generator import Drafted, SamplingSettings
from mergevq.generator.drafts.reader import CellByCell, Reader
from mergevq.generator.network import Network
from mergevq.generator.seams import Draws


class Drafter(NamedTuple):
    """A smaller generator of the same tokens in the same order, which drafts for another."""

    network: Network
    order: CellByCell


class DraftDecoder:
    """Sequences of which several tokens are drafted and checked in each pass (`seams.Decoder`).

    One pass gives the state of each drafted token; the head chooses all of them by the numbers of
    their places, as if the drafts before were right. Those up to the first that is not its draft
    are what decoding token by token gives, and are kept. Images of a batch go on each by itself.

    A model that drafts chooses by the same numbers, so its draft is right wherever both models'
    distributions have the same value at that place of their distribution functions.
    """

    def __init__(
        self,
        network: Network,
        order: CellByCell,
        labels: Int64[Tensor, "b"],
        num_kept: int,
        draws: Draws,
        settings: SamplingSettings,
        passes: Drafted,
        drafter: Drafter | None = None,
    ) -> None:
        """Allocate the caches.

        Args:
            network: what decodes.
            order: whose sequences these are.
            labels: classes.
            num_kept: K.
            draws: uniform numbers for every token of a sequence.
            settings: guidance, temperature and so on.
            passes: what drafts, and how much.
            drafter: the model that drafts, where one does.

        Raises:
            ValueError: a model is to draft, and there is none.
        """
        if passes.draft == "model" and drafter is None:
            raise ValueError(
                "passes.draft (model) needs a second, smaller generator: --draft-generator DIR, in "
                "Python `generator.drafts.pairing.with_draft`"
            )
        config, batch, device = network.config, len(draws.uniforms), network.device
        self.uniforms, self.passes, self.num_tokens = draws.uniforms, passes, config.num_tokens
        # Rows that are ahead go on past their end, where nothing is read.
        most = self.num_tokens + passes.num_drafted + 1
        self.reader = Reader(network, order, labels, num_kept, most, settings)
        self.drafter: Reader | None = None
        if passes.draft == "model" and drafter is not None:
            self.drafter = Reader(*drafter, labels, num_kept, most, settings)
        caches = [each.cache for each in (self.reader, self.drafter) if each is not None]
        self.kv_bytes = sum(cache.num_bytes for cache in caches)
        self.memory = tuple(part for cache in caches for part in (cache.keys, cache.values))
        self.images = torch.arange(batch, device=device)[:, None]
        self.tokens = torch.zeros(
            batch, most, len(config.part_sizes), dtype=torch.int64, device=device
        )
        self.back = _back(config.grid_size, most, above=passes.draft == "above").to(device)
        self.finite: list[Tensor] = []
        self._restart(0)

    @property
    def num_steps(self) -> int:
        """Passes so far, and one for each token that the image furthest behind lacks."""
        return self.num_passes + self.num_tokens - self.shortest

    def parts(self) -> Int64[Tensor, "b t p"]:
        """Tokens decoded so far of every image."""
        return self.tokens[:, : self.shortest]

    def known(self) -> Bool[Tensor, "b t"]:
        """All of `parts`."""
        return torch.ones_like(self.tokens[:, : self.shortest, 0], dtype=torch.bool)

    @torch.inference_mode()
    def seek(self, step: int, history: Int64[Tensor, "b t p"] | None = None) -> None:
        """Fill in the prefix and take the tokens before a step as decoded (`seams.Decoder`)."""
        self.states = self.reader.start()
        if self.drafter is not None:
            self.drafter.start()
        if history is not None:
            self.tokens[:, :step] = history[:, :step]
        self._restart(step)

    @torch.inference_mode()
    def step(self) -> None:
        """Check a draft of each image; keep what is right of it and the token after."""
        if self.shortest == self.num_tokens:
            return
        count = min(self.passes.num_drafted, self.num_tokens - self.shortest - 1)
        numbers = torch.arange(count + 1, device=self.lengths.device)
        if self.shortest == 0:
            states, numbers = self.states[:, None], numbers[:1]
        else:
            self._draft(count)
            read = self.lengths[:, None] - 1 + numbers
            states = self.reader.read(self.tokens, read, self.longest + count)
        cells = self.lengths[:, None] + numbers
        drafts = self.tokens[self.images, cells]
        chosen = self.reader.choose(states, self.tokens, cells, self.uniforms)
        self.finite += chosen.finite
        parts = chosen.parts.unflatten(0, cells.shape)
        self.tokens[self.images, cells] = parts
        right = (parts == drafts).all(-1)[:, :-1].long().cumprod(1).sum(1)
        self.lengths = (self.lengths + right + 1).clamp_max(self.num_tokens)
        self.filled = cells[:, -1] + 1 if self.passes.draft == "previous" else self.lengths
        self.num_passes += 1
        # One read of the device in each pass.
        ahead = (self.filled - self.lengths).min()
        bounds = torch.stack([*self.lengths.aminmax(), ahead]).tolist()
        self.shortest, self.longest, self.ahead = bounds

    def _restart(self, step: int) -> None:
        """Take all before a step as decoded, one token in each."""
        self.num_passes = self.shortest = self.longest = step
        self.lengths = torch.full_like(self.images[:, 0], step)
        self.filled, self.ahead = self.lengths, 0

    def _draft(self, count: int) -> None:
        """Write drafts of the next tokens of each image after those decoded."""
        if self.drafter is not None:
            self._draft_by(self.drafter, count)
            return
        images = self.images[:, 0]
        for number in range(min(self.ahead, count), count):
            cells = self.lengths + number
            copied = self.tokens[images, cells - self.back[cells]]
            is_old = (cells < self.filled)[:, None]
            self.tokens[images, cells] = torch.where(is_old, self.tokens[images, cells], copied)

    def _draft_by(self, drafter: Reader, count: int) -> None:
        """Write drafts by a model, which chooses them one after the other by the same numbers."""
        # The last token, and the one before it: that was the last draft if all were right, which
        # no draft came after. What was read of wrong drafts is overwritten as the cells come up.
        num_read = min(2, self.shortest)
        for number in range(count):
            cells = self.lengths[:, None] + number
            read = cells - torch.arange(num_read, 0, -1, device=cells.device)
            states = drafter.read(self.tokens, read, self.longest + number)
            chosen = drafter.choose(states[:, -1:], self.tokens, cells, self.uniforms)
            self.finite += chosen.finite
            self.tokens[self.images, cells] = chosen.parts[:, None]
            num_read = 1


def _back(grid_size: tuple[int, int], count: int, *, above: bool) -> Int64[Tensor, "m"]:
    """Cells from each back to that which its draft copies; beyond the grid as in the last row."""
    cells = torch.arange(count)
    columns = grid_size[1]
    has_left, has_above = cells % columns > 0, cells >= columns
    is_above = has_above if above else has_above & ~has_left
    return torch.where(is_above, columns, 1)
