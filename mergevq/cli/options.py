"""Options that several commands share, and how their text is read."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal, TypeVar

import tyro

from mergevq.config.base import BUNDLED_GENERATOR, Device, Precision
from mergevq.config.generator import (
    AnyWeights,
    Drafted,
    GuidanceSchedule,
    OneByOne,
    Passes,
    SampleRun,
    SamplingSettings,
    Several,
)


def shown_default(default: str) -> str:
    """End of an option's help: its default, and nothing where that is empty."""
    return f"(default: {default})" if default else ""


MAY_BE_EMPTY = tyro.conf.arg(help_behavior_hint=shown_default)
"""For options whose empty default their help explains."""

Number = TypeVar("Number", int, float)

Counts = Annotated[
    tuple[str, ...], tyro.conf.arg(metavar="K,K,..", help_behavior_hint=shown_default)
]
"""An option that takes numbers with commas or spaces between them; see `whole_numbers`."""
_PLAIN = SamplingSettings()
_SEVERAL = Several()
_CONFIDENCE = _SEVERAL.confidence_temperature
_NUM_DRAFTED = Drafted().num_drafted


@dataclass(frozen=True, kw_only=True, slots=True)
class SamplingOptions:
    """Sampling: options of `mergevq sample` and of `mergevq evaluate generation`."""

    generator: str = ""
    """directory of the generator, its name in `mergevq models`, or owner/name@revision on Hugging
    Face; by default one that comes with the package."""
    model: str = ""
    """the same of the tokenizer of its tokens; by default where it was when the generator was
    trained."""
    decoder: str | None = None
    """directory of a decoder that was trained for the tokenizer, or its id; by default the
    tokenizer's own."""
    num_kept: int | None = None
    """K, one of those trained on; the generator's own by default."""
    guidance: float = _PLAIN.guidance_scale
    """scale of classifier-free guidance; 1 is none."""
    guidance_schedule: GuidanceSchedule = _PLAIN.guidance_schedule
    """how it rises from 1 as an image grows."""
    guidance_power: float = _PLAIN.guidance_power
    """exponent of the schedule `power`."""
    guidance_interval: tuple[float, float] = _PLAIN.guidance_interval
    """part of the sequence that is guided."""
    temperature: tuple[float, ...] = (1.0,)
    """one number, or one for each part of a token; 0 takes the most likely value."""
    top_k: tuple[int, ...] = (0,)
    """sample among the so many most likely values; 0 is all; one number, or one for each part."""
    top_p: tuple[float, ...] = (1.0,)
    """sample among the most likely values that together have this probability; one number, or one
    for each part."""
    steps: int | None = None
    """forward passes of random or masked order, several tokens in each; one token each by
    default."""
    schedule: Literal["cosine", "arccos"] = _SEVERAL.schedule
    """growth of the tokens that are known with these passes; `arccos` of masked order alone."""
    confidence: float = _CONFIDENCE
    """in masked order, scale of the noise on the confidence by which tokens are kept."""
    draft: Literal["previous", "left", "above", "model"] | None = None
    """in raster and merge order, draft tokens and check several in each pass, which gives the same
    images: what was chosen there in the pass before, copies of the token to the left or above, or
    what a smaller generator chooses; none by default."""
    draft_generator: str | None = None
    """directory of that smaller generator, its name, or owner/name@revision, trained on the same
    tokens in the same order; with `--draft model`."""
    num_drafted: int = _NUM_DRAFTED
    """tokens drafted for each pass."""
    bits_order: Literal["schedule", "confidence"] = _PLAIN.bits_order
    """with a head of bits, choose them block by block or the surest first."""
    budget: bool = True
    """in merge order, hold an image to K distinct tokens."""
    candidates: int = 1
    """samples drawn for each image, of which the one that its class makes likeliest is kept."""
    seed: int = 0
    """seed of the run."""
    weights: AnyWeights = "auto"
    """fewer bits are faster, and change what is sampled a little: fp16 the least, and on a CPU the
    faster one for lone images, bf16 for several at once, int8 the most; auto is bf16 where the
    device gains from it, on other processors fp16, else float32."""
    device: Device = "auto"
    """where to compute."""
    precision: Precision = "auto"
    """precision of the tokenizer that decodes; auto is bf16 where the device gains from it, else
    float32."""

    def run(self, *, num_images: int, batch_size: int) -> SampleRun:
        """The run that these options ask for.

        Raises:
            ValueError: the generator's tokenizer is not known, or a setting is wrong.
        """
        from mergevq.generator.weights import resolve_weights
        from mergevq.runtime.device import precision_name, resolve_device, resolve_precision

        # By their names, so that the same images can be made again elsewhere.
        device = resolve_device(self.device)
        dtype = resolve_precision(self.precision, device)
        model, tokenizer = self.generator or BUNDLED_GENERATOR, self.model
        if not tokenizer:
            from mergevq.generator.generation import known_tokenizer

            tokenizer = known_tokenizer(model)
        return SampleRun(
            model=model,
            tokenizer=tokenizer,
            decoder=self.decoder,
            draft_generator=self.draft_generator,
            num_images=num_images,
            num_kept=self.num_kept,
            seed=self.seed,
            batch_size=batch_size,
            weights=resolve_weights(self.weights, device),
            device=self.device,
            precision=precision_name(dtype),
            settings=SamplingSettings(
                guidance_scale=self.guidance,
                guidance_schedule=self.guidance_schedule,
                guidance_power=self.guidance_power,
                guidance_interval=self.guidance_interval,
                temperature=_one_or_several(self.temperature),
                top_k=_one_or_several(self.top_k),
                top_p=_one_or_several(self.top_p),
                passes=self._passes(),
                bits_order=self.bits_order,
                candidates=self.candidates,
            ),
        )

    def _passes(self) -> Passes:
        """Tokens of a pass.

        Raises:
            ValueError: an option is not of this way of decoding.
        """
        if self.draft is None and self.num_drafted != _NUM_DRAFTED:
            raise ValueError("--num-drafted is of drafted tokens: give --draft too")
        if (self.draft == "model") != (self.draft_generator is not None):
            raise ValueError("--draft model and --draft-generator DIR must be given together")
        if self.steps is None:
            if (self.schedule, self.confidence) != (_SEVERAL.schedule, _CONFIDENCE):
                raise ValueError(
                    "--schedule and --confidence are of several tokens a pass: give --steps too"
                )
            if self.draft is not None:
                return Drafted(draft=self.draft, num_drafted=self.num_drafted, budget=self.budget)
            return OneByOne(budget=self.budget)
        if self.draft is not None:
            raise ValueError("--draft is of one token after the other: leave out --steps")
        if not self.budget:
            raise ValueError("--no-budget is of one token a pass: leave out --steps")
        return Several(
            num_steps=self.steps,
            schedule=self.schedule,
            confidence_temperature=self.confidence,
        )


Sampling = Annotated[SamplingOptions, tyro.conf.arg(name="")]


def as_text(path: Path | None) -> str | None:
    """A path as it is recorded."""
    return None if path is None else str(path)


def whole_numbers(name: str, texts: Sequence[str]) -> tuple[int, ...]:
    """Whole numbers, separated by commas or spaces.

    Raises:
        ValueError: something else is between them.
    """
    try:
        return tuple(int(part) for text in texts for part in text.split(",") if part.strip())
    except ValueError:
        option = name.replace("_", "-")
        raise ValueError(
            f"{name} ({' '.join(texts)}) must be whole numbers: --{option} 16,20"
        ) from None


def _one_or_several(numbers: tuple[Number, ...]) -> Number | tuple[Number, ...]:
    """A single number for all parts of a token, or one for each."""
    return numbers[0] if len(numbers) == 1 else numbers


def read_fractions(name: str, texts: Sequence[str]) -> tuple[float, ...]:
    """Shares, separated by commas or spaces.

    Args:
        name: of the setting, for error messages.
        texts: from the command line.

    Raises:
        ValueError: something else is between them, or there is none.
    """
    try:
        shares = tuple(float(part) for text in texts for part in text.split(",") if part.strip())
    except ValueError:
        shares = ()
    if not shares or not all(map(math.isfinite, shares)):
        raise ValueError(
            f"{name} ({' '.join(texts)}) must be numbers from 0 to 1: "
            f"--{name.replace('_', '-')} 0,0.5"
        )
    return shares
