"""Settings and records of comparisons of tokenizers at equal training, `mergevq compare`; no torch.

A comparison has arms, which are runs of tokenizers, and seeds: every arm is trained with every
seed.
"""

import re
from dataclasses import dataclass, replace
from functools import reduce
from pathlib import Path
from typing import Any, Literal, TypedDict

from mergevq.config.base import require
from mergevq.config.evaluation import TrunkName
from mergevq.config.ranges import check_numbers
from mergevq.config.records import EvaluationRecord, Numbers
from mergevq.config.training import TokenizerRun

_EQUAL = (
    "model.image_size",
    "data.path",
    "data.val_path",
    "data.val_fraction",
    "data.max_images",
    "data.max_pixels",
    "train.num_steps",
    "train.batch_size",
)
"""Settings that arms share: those of training that is equal, and of the same held-out images."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Arm:
    """One contestant."""

    name: str
    """Name in tables, and of its folder."""
    run: TokenizerRun
    """How it is trained; seed and directory are those of the comparison."""

    def __post_init__(self) -> None:
        """Reject a name that no folder can have."""
        require(
            re.fullmatch(r"[\w=+-][\w .=+-]*", self.name) is not None,
            f"arm ({self.name}) must have a name of letters, digits, spaces and ._=+- alone: it "
            "is that of its folder",
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class ContestSettings:
    """All that a comparison depends on."""

    arms: tuple[Arm, ...] = ()
    """Contestants, at least one."""
    data: str | None = None
    """Images of all arms, as `data.path` of a run; None is that of the recipes."""
    out: str = "runs/compare"
    """Directory of runs and results; what is finished there is not trained again."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Each arm is trained with each of these."""
    num_kept: tuple[int, ...] = ()
    """Each K to measure at; with neither these nor `bits` each arm has its own."""
    bits: tuple[int, ...] = ()
    """Bits of one image, tokens and layout together, within which each arm has as many tokens as
    it can."""
    against: str | None = None
    """Arm that is the control of verdicts; None gives none."""
    lpips: str | None = None
    """File or folder with the LPIPS weights; None leaves LPIPS out."""
    lpips_trunk: TrunkName = "alex"
    """Network of LPIPS."""
    extractor: str | None = None
    """TorchScript file for Frechet distance and feature cosine; None leaves them out."""
    max_images: int | None = None
    """Only so many held-out images, evenly spaced; None is all."""
    num_yardstick_images: int = 2000
    """Training images, evenly spaced, that yardsticks are made of; 0 leaves yardsticks out."""
    num_shown: int = 8
    """Held-out images in the picture; 0 for none."""

    def __post_init__(self) -> None:
        """Reject arms that cannot be compared, naming what differs."""
        check_numbers(self)
        require(len(self.arms) > 0, "arms () must name at least one recipe")
        for name in ("seeds", "num_kept", "bits"):
            _require_different(name, getattr(self, name))
        _require_different("arms", tuple(arm.name for arm in self.arms))
        require(len(self.seeds) > 0, "seeds () must have at least one")
        names = ", ".join(arm.name for arm in self.arms)
        require(
            self.against in {None, *(arm.name for arm in self.arms)},
            f"against ({self.against}) must be one of the arms: {names}",
        )
        first, *others = self.arms
        for arm in others:
            for name in _EQUAL:
                if name == "data.path" and self.data is not None:
                    continue
                theirs, ours = _setting(arm.run, name), _setting(first.run, name)
                require(
                    theirs == ours,
                    f"{name} of {arm.name} ({theirs}) must be that of {first.name} ({ours}), as "
                    "training and held-out images are the same: set it for all arms",
                )
        for arm in self.arms:
            require(
                arm.run.train.max_minutes is None,
                f"train.max_minutes of {arm.name} ({arm.run.train.max_minutes}) must be none: "
                "training is equal in steps",
            )

    def run_of(self, arm: Arm, seed: int) -> TokenizerRun:
        """The run of an arm with a seed, in a folder of its own."""
        run = arm.run
        data = run.data if self.data is None else replace(run.data, path=self.data)
        return replace(
            run,
            data=data,
            train=replace(run.train, seed=seed),
            out=str(Path(self.out, arm.name, str(seed))),
        )


def _setting(run: TokenizerRun, name: str) -> object:
    """A setting by its dotted name."""
    return reduce(getattr, name.split("."), run)


def _require_different(name: str, values: tuple[object, ...]) -> None:
    """Check that no value is there twice."""
    require(
        len(set(values)) == len(values),
        f"{name} ({', '.join(map(str, values))}) must all be different",
    )


# ----------------------------------------------------------------------------- what is written


class PointRecord(Numbers):
    """Numbers of one trained arm at one K."""

    label: str
    """Request that it answers, such as `K = 20`, `296 bits` or `own K`."""
    num_kept: int
    bits_tokens: float
    bits_layout: float
    bits_layout_coded: float | None
    """Measured, over some of the images; None where nothing is to code or cannot be coded here."""


class SeedRecord(TypedDict):
    """An arm with one seed."""

    seed: int
    run: str
    """Folder in the directory of the comparison."""
    model_hash: str
    images_per_second: float | None
    """In training: median over logged intervals; None where there is none."""
    points: list[PointRecord]


class ArmRecord(TypedDict):
    """An arm with all seeds."""

    name: str
    num_parameters: int
    init_from: str | None
    """Tokenizer that training began at; its training comes on top."""
    seeds: list[SeedRecord]


class YardstickRecord(Numbers):
    """A reconstruction that needs no training by gradients."""

    name: str
    bits: float
    """Bits of one image."""


class VerdictRecord(TypedDict):
    """A metric of an arm beside that of the control."""

    arm: str
    label: str
    metric: str
    gap: float
    """Mean over seeds of the arm minus the control."""
    spread: float
    """Largest minus smallest value of the control over seeds."""
    verdict: Literal["shown", "not shown"]


class ContestRecord(EvaluationRecord):
    """`compare.json`."""

    kind: Literal["comparison"]
    settings: dict[str, Any]
    num_train_images: int
    num_images: int
    """Held-out images."""
    pixels_sha256: str
    """Over the held-out images after the crop."""
    arms: list[ArmRecord]
    yardsticks: list[YardstickRecord]
    verdicts: list[VerdictRecord]
    left_out: list[str]
    """Sentences on what was not measured, and why."""
