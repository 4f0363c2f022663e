"""Metrics of codes: use of the codebook, collapse, agreement of source maps.

Differs: codebook usage is of a window of tokens as long as the codebook, up to 2**18, not of a
batch.

Source: Li et al. 2025, "MergeVQ", section 3 (arXiv:2504.00999).

Shape letters: B batch, L grid cells, D bits of a token, P parts of a token.
"""

import math
from collections.abc import Mapping
from typing import NamedTuple

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from mergevq.data.codes import CodeSpec, require_parts
from mergevq.runtime import distributed

USAGE_FLOOR = 0.05
"""Share of the attainable codes below which a codebook counts as collapsing."""
MAX_SHORTEST_WINDOW = 2**18
"""Tokens beyond which no window has to be as long as the codebook, whose codes may be countless."""
ACTIVE_VARIANCE = 0.01
"""Variance above which a channel of real numbers counts as used."""
BIT_ENTROPY_FLOOR = 0.1
"""Entropy, in bits, below which one bit of the tokens counts as collapsing."""


def source_accuracy(
    predicted_index: Int64[Tensor, "b l"], true_index: Int64[Tensor, "b l"]
) -> Float[Tensor, "b"]:
    """Share of each image's grid cells whose kept token was recovered."""
    return (predicted_index == true_index).float().mean(-1)


class CodebookStatistics(NamedTuple):
    """How a window of tokens uses the codebook."""

    num_tokens: int
    """Tokens in the window, over all ranks."""
    num_distinct: int
    """Different codes among them."""
    perplexity: float
    """Exponential of the entropy of the codes' frequencies: the number of codes in even use."""
    num_values: int
    """Codes of the codebook."""
    bit_probs: Float[Tensor, "d"]
    """P(bit = 1) of each bit of a token, part 0 and its lowest bit first; none where parts are not
    made of bits."""

    @property
    def usage(self) -> float:
        """Share of the whole codebook that occurs."""
        return self.num_distinct / self.num_values

    @property
    def attained(self) -> float:
        """Share of what could occur: of the codebook, or of the tokens where they are fewer."""
        return self.num_distinct / min(self.num_values, self.num_tokens)

    @property
    def bit_entropies(self) -> Float[Tensor, "d"]:
        """Entropy of each bit, in bits: 1 where it is a fair coin, 0 where it is constant."""
        ones, zeros = self.bit_probs, 1 - self.bit_probs
        return -(torch.xlogy(ones, ones) + torch.xlogy(zeros, zeros)) / math.log(2)

    @property
    def num_dead_bits(self) -> int:
        """Bits that are the same in every token of the window."""
        return int(((self.bit_probs == 0) | (self.bit_probs == 1)).sum())


def codebook_statistics(parts: Int64[Tensor, "n p"], spec: CodeSpec) -> CodebookStatistics:
    """How tokens use the codebook.

    Raises:
        ValueError: there is no token, or tokens are real numbers.
    """
    require_parts(spec.sizes, "codebook usage")
    if len(parts) == 0:
        raise ValueError("codebook usage has seen no token; there is nothing to count")
    codes, counts = _distinct(parts.cpu(), spec)
    frequencies = counts.double() / len(parts)
    ones = [
        int(counts[(part >> bit) & 1 == 1].sum())
        for part, size in zip(codes.unbind(-1), spec.sizes, strict=True)
        for bit in range((size - 1).bit_length() if spec.is_binary else 0)
    ]
    return CodebookStatistics(
        num_tokens=len(parts),
        num_distinct=len(codes),
        num_values=spec.num_values,
        perplexity=math.exp(-float(torch.xlogy(frequencies, frequencies).sum())),
        bit_probs=torch.tensor(ones, dtype=torch.float64) / len(parts),
    )


def _distinct(
    parts: Int64[Tensor, "n p"], spec: CodeSpec
) -> tuple[Int64[Tensor, "m p"], Int64[Tensor, "m"]]:
    """Different tokens, and how often each occurs."""
    if not spec.has_index:
        return parts.unique(dim=0, return_counts=True)
    # Sorting numbers takes a fraction of the time of sorting rows.
    indices, counts = spec.join(parts).unique(return_counts=True)
    return spec.split(indices), counts


class ChannelStatistics(NamedTuple):
    """How real numbers are spread, channel by channel."""

    mean: Float[Tensor, "d"]
    variance: Float[Tensor, "d"]
    num_tokens: int
    """Tokens, over all ranks."""

    @property
    def num_active(self) -> int:
        """Channels that tell tokens apart, of a variance above 0.01.

        In training a mean is drawn with a deviation near 1 where it varies less, and says nothing
        (posterior collapse).
        """
        return int((self.variance > ACTIVE_VARIANCE).sum())


class Channels:
    """Mean and variance of each channel of real numbers, however they come in batches.

    Args:
        dim: channels.
    """

    def __init__(self, dim: int) -> None:
        self.sums = torch.zeros(2, dim, dtype=torch.float64)
        """Sum and sum of squares of each channel, of this rank."""
        self.num_tokens = 0

    def update(self, codes: Float[Tensor, "*b d"]) -> None:
        """Add tokens."""
        values = codes.detach().flatten(0, -2).double().cpu()
        self.sums += torch.stack([values.sum(0), values.square().sum(0)])
        self.num_tokens += len(values)

    def compute(self) -> ChannelStatistics:
        """Statistics over all ranks; every rank must call.

        Raises:
            ValueError: there was no token.
        """
        count = int(distributed.gather(torch.tensor([self.num_tokens])).sum())
        if count == 0:
            raise ValueError("channel statistics have seen no token; there is nothing to measure")
        first, second = distributed.gather(self.sums[None]).sum(0) / count
        return ChannelStatistics(first, (second - first.square()).clamp(min=0), count)


class CodebookUsage:
    """The last tokens of each rank, counted exactly, however they came in batches.

    Args:
        spec: form of the tokens.
        window: tokens remembered on each rank, at least as many as there are codes; None is as
            many. Above 2**18 codes 2**18 tokens, of 2 MiB for each part, are enough.
        device: where tokens are kept and counted.

    Raises:
        ValueError: the window is shorter than the codebook, or tokens are real numbers.
    """

    def __init__(
        self, spec: CodeSpec, window: int | None = None, device: torch.device | str = "cpu"
    ) -> None:
        require_parts(spec.sizes, "codebook usage")
        shortest = min(spec.num_values, MAX_SHORTEST_WINDOW)
        if window is not None and window < shortest:
            raise ValueError(
                f"window ({window}) must be at least {shortest} tokens for {spec.num_values} "
                "codes: a shorter one cannot tell an unused code from one that had no turn"
            )
        self.spec = spec
        shape = (window or shortest, len(spec.sizes))
        self.window = torch.full(shape, -1, dtype=torch.int64, device=device)
        self.num_seen = 0
        # Not sizes, and `>=`: 2**63 does not fit the tensor's type.
        self._last = torch.tensor([size - 1 for size in spec.sizes], device=device)
        # Place of the first part without such a value, among all parts seen, and that value.
        self._outside = torch.full((2,), -1, dtype=torch.int64, device=device)

    def update(self, parts: Int64[Tensor, "*shape p"]) -> None:
        """Add tokens, in order; the oldest ones leave.

        It does not wait for the device: a part that has no such value is an error of `compute` and
        `state_dict`, which read.
        """
        self._add(parts)

    def _add(self, parts: Int64[Tensor, "*shape p"]) -> None:
        """Put tokens into the window."""
        tokens = parts.detach().flatten(0, -2).to(self.window.device)
        if len(tokens) == 0:
            return
        is_outside = ((tokens < 0) | (tokens > self._last)).flatten()
        first = is_outside.int().argmax(0, keepdim=True)
        found = torch.cat([first + self.num_seen * tokens.shape[1], tokens.take(first)])
        is_first = is_outside.any() & (self._outside[0] < 0)
        self._outside = torch.where(is_first, found, self._outside)
        self.num_seen += len(tokens)
        tokens = tokens[-len(self.window) :]
        start = self.num_seen - len(tokens)
        positions = torch.arange(start, self.num_seen, device=tokens.device) % len(self.window)
        self.window[positions] = tokens

    def compute(self) -> CodebookStatistics:
        """Statistics of the windows of all ranks together; sorts them: not for every step.

        Raises:
            ValueError: there was no token, or a part of one had no such value.
        """
        self._require_codes()
        tokens = distributed.gather(self.window).cpu()
        return codebook_statistics(tokens[tokens[:, 0] >= 0], self.spec)

    def state_dict(self) -> dict[str, Tensor]:
        """The windows of all ranks as one list of tokens, the oldest first; every rank must call.

        In this order they say which one leaves next.

        Raises:
            ValueError: a part of a token had no such value.
        """
        self._require_codes()
        by_age = self.window.roll(-(self.num_seen % len(self.window)), 0)
        tokens = distributed.gather(by_age[None]).transpose(0, 1).flatten(0, 1)
        return {"tokens": tokens[tokens[:, 0] >= 0]}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Go on from saved windows, or from their newest tokens if they were longer than this one.

        The main process has the tokens of all ranks from then on, and the others none. A token
        outside the codebook is a ValueError.
        """
        self.window.fill_(-1)
        self._outside.fill_(-1)
        self.num_seen = 0
        tokens = state["tokens"]
        if tokens.ndim == 1:
            # Older checkpoints have indices.
            tokens = self.spec.split(tokens)
        self._add(tokens if distributed.is_main() else tokens[:0])
        self._require_codes()

    def _require_codes(self) -> None:
        """Raise `ValueError` if a part seen had no such value; waits for the device."""
        place, value = self._outside.tolist()
        if place >= 0:
            token, part = divmod(place, len(self.spec.sizes))
            raise ValueError(
                f"codebook usage: part {part} ({value}) of token {token} must be in "
                f"[0, {self.spec.sizes[part]})"
            )


class SharedUsage(CodebookUsage):
    """Use of the codebook in batches that all ranks share evenly, as one process would count it.

    Each rank keeps its own tokens, and they are sent only when the counts are asked for: `update`
    is no collective. Arguments as of `CodebookUsage`; the window is of all ranks together.
    """

    def __init__(
        self, spec: CodeSpec, window: int | None = None, device: torch.device | str = "cpu"
    ) -> None:
        super().__init__(spec, window, device)
        self._own: list[Int64[Tensor, "n p"]] = []
        """This rank's tokens of each batch that is not in the window yet."""

    def update(self, parts: Int64[Tensor, "*shape p"]) -> None:
        """Add this rank's share of a batch, as many tokens as of every other rank."""
        num_ranks = distributed.place()[1]
        if num_ranks == 1:
            self._add(parts)
            return
        self._own.append(parts.detach().flatten(0, -2).to(self.window.device))
        # The window will have nothing of batches before others that fill it.
        while num_ranks * sum(map(len, self._own[1:])) >= len(self.window):
            del self._own[0]

    def compute(self) -> CodebookStatistics:
        """Statistics of the window; every rank must call. Errors as of `CodebookUsage`."""
        self._join()
        return super().compute()

    def state_dict(self) -> dict[str, Tensor]:
        """The window, oldest token first; every rank must call. Errors as of `CodebookUsage`."""
        self._join()
        return super().state_dict()

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Go on from a saved window; see `CodebookUsage`."""
        super().load_state_dict(state)
        self._own.clear()

    def _join(self) -> None:
        """Put all ranks' tokens into the main process's window, batch after batch."""
        if not self._own:
            return
        every = distributed.gather(torch.cat(self._own)[None], equal=True)
        for batch in every.split(list(map(len, self._own)), dim=1):
            tokens = batch.flatten(0, 1)
            self._add(tokens if distributed.is_main() else tokens[:0])
        self._own.clear()


class CollapseMonitor:
    """Says once that the codebook collapses, after several bad reports in a row.

    Args:
        num_reports: bad reports in a row that make a collapse.
    """

    def __init__(self, num_reports: int) -> None:
        self.num_reports = num_reports
        self.num_bad = 0
        """Bad reports in a row so far; stays at `num_reports` once the warning is given."""

    def update(self, statistics: CodebookStatistics) -> str | None:
        """Take the next report; the text of the warning comes back the first time it is due."""
        if self.num_bad == self.num_reports:
            return None
        bits = (statistics.bit_entropies < BIT_ENTROPY_FLOOR).nonzero()[:, 0].tolist()
        low_usage = statistics.attained < USAGE_FLOOR
        self.num_bad = self.num_bad + 1 if bits or low_usage else 0
        if self.num_bad < self.num_reports:
            return None
        symptoms = []
        if low_usage:
            symptoms.append(
                f"{statistics.num_distinct} codes occur in {statistics.num_tokens} tokens, "
                f"{100 * statistics.attained:.2g} % of what is attainable"
            )
        if bits:
            symptoms.append(f"bits {bits} are nearly constant")
        return (
            f"the codebook collapses: {' and '.join(symptoms)}, {self.num_reports} reports in a "
            "row; raise loss.entropy_weight or lower optim.lr"
        )

    def state_dict(self) -> dict[str, int]:
        """The count of bad reports."""
        return {"num_bad": self.num_bad}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Continue counting; a warning that was given is not given again."""
        self.num_bad = state["num_bad"]
