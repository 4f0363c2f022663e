"""Seeds that are distinct by construction, and random numbers tied to purpose and step.

Shape letters: B rows of a batch at hand.
"""

import hashlib
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from mergevq.config.tokenizer import KeptConfig

DataPurpose = Literal["order", "image", "student", "teacher", "augment"]
"""Order of an epoch; crop and flip of a training image, of its two views, and its augmentation."""


def numbered_seed(key: str, number: int) -> int:
    """Seed in [0, 2**64): under one key, numbers less than 2**32 apart have different low 32 bits.

    The number is added, not hashed: torch's CPU generator keeps 32 bits of a seed, and among
    100,000 hashes of 32 bits two are equal more often than not.
    """
    digest = hashlib.sha256(key.encode()).digest()
    return (int.from_bytes(digest[:8], "little") + number) % 2**64


def data_seed(purpose: DataPurpose, seed: int, number: int) -> int:
    """Seed of an epoch's order or of a training sample of a run.

    All purposes of one run together have different ones for the first 2**30 samples.
    """
    purposes = get_args(DataPurpose)
    return numbered_seed(f"data/{seed}", len(purposes) * number + purposes.index(purpose))


def step_generator(seed: int, *ids: int | str) -> torch.Generator:
    """Random numbers that depend on `seed` and `ids` alone: not on order, batch, rank or device.

    Args:
        seed: of the run.
        ids: what the numbers are for; the last is a number such as the step or the image. Two last
            ids closer than 2**32 have different numbers if all before them agree.

    Raises:
        ValueError: there is no last number.
    """
    *purpose, number = ids or ("",)
    if not isinstance(number, int):
        raise ValueError(f"ids {ids} must end with a number")
    return torch.Generator().manual_seed(numbered_seed(repr((seed, *purpose)), number))


def draw_num_kept(kept: KeptConfig, seed: int, step: int) -> int:
    """K of a step of training: the same on every rank, and again after a resume.

    Args:
        kept: candidates and their probabilities.
        seed: of the run.
        step: from 0.
    """
    probabilities = torch.tensor(kept.probabilities, dtype=torch.float64)
    chosen = torch.multinomial(probabilities, 1, generator=step_generator(seed, "kept", step))
    return kept.candidates[int(chosen)]


@dataclass(frozen=True, kw_only=True)
class BatchNumbers:
    """Random numbers of some rows of a batch: those that one process would draw for all rows."""

    seed: int
    """Seed of the run."""
    step: int
    """Number of the batch."""
    num_rows: int
    """Rows of the whole batch."""
    rows: slice
    """Rows at hand."""
    prefix: str = ""
    """Put before every purpose."""
    progress: float = 0.0
    """Share of the run that is over."""

    def uniform(self, purpose: str, *shape: int) -> Float[Tensor, "b *shape"]:
        """Uniform numbers in [0, 1) on the CPU, which depend on seed, purpose and step alone."""
        return torch.rand(self.num_rows, *shape, generator=self._generator(purpose))[self.rows]

    def normal(self, purpose: str, *shape: int) -> Float[Tensor, "b *shape"]:
        """Normal numbers on the CPU, which depend on seed, purpose and step alone."""
        return torch.randn(self.num_rows, *shape, generator=self._generator(purpose))[self.rows]

    def even(self, purpose: str) -> Float[Tensor, "b"]:
        """Numbers in [0, 1), of which all rows have equal distances, in random order, on the CPU.

        For each row a number is uniform; as many of all rows are below a share as it is of them,
        rounded up or down.
        """
        generator = self._generator(purpose)
        order = torch.randperm(self.num_rows, generator=generator)
        offset = torch.rand((), generator=generator, dtype=torch.float64)
        numbers = ((order + offset) / self.num_rows).float()
        # The largest may round up to 1.
        return numbers.clamp(max=1 - 2**-24)[self.rows]

    def _generator(self, purpose: str) -> torch.Generator:
        """Random numbers of a purpose in this step."""
        return step_generator(self.seed, f"{self.prefix}{purpose}", self.step)
