"""How well images come back, with the given and with the recovered source.

Source: Li et al. 2025, "MergeVQ", section 4 and Table 2 (arXiv:2504.00999).

Differs: every number is reported for the recovered source too, PSNR is per image, and the bits of
the source map are counted beside those of the tokens.

Shape letters: B batch, N all images, H and W pixels, D bits of a token, F feature channels.
"""

import time
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from mergevq.config.evaluation import Protocol
from mergevq.config.parts import ClassCondition, PatchDecoder
from mergevq.data.batches import Batch
from mergevq.data.coding.maps import map_bits
from mergevq.data.layouts import Bits, Source, require_source
from mergevq.metrics.codes import (
    Channels,
    ChannelStatistics,
    CodebookStatistics,
    codebook_statistics,
    source_accuracy,
)
from mergevq.metrics.comparison import Original, Originals, comparison
from mergevq.metrics.extractor import FeatureExtractor
from mergevq.metrics.frechet import Gaussian
from mergevq.metrics.image import Mean, psnr
from mergevq.metrics.lpips import Perceptual
from mergevq.runtime import distributed
from mergevq.tokenizer.conditions.values import condition_of, wrong_classes
from mergevq.tokenizer.encoder import Embedded
from mergevq.tokenizer.flows.decoder import Noise
from mergevq.tokenizer.seams import Condition, Encoded, Reconstruction
from mergevq.tokenizer.tokenizer import Tokenizer


class Outcome(NamedTuple):
    """Reconstruction by one tokenizer at one K, over all images of all ranks."""

    given: dict[str, float]
    """With the encoder's source; see `Comparison.compute`. Where the tokenizer decodes by a class,
    also PSNR with another class and without one; where it decodes by a flow, `token_agreement`;
    where it decodes by patches, `seam_ratio` and `sharpness` (`metrics.comparison.Seams`)."""
    recovered: dict[str, float] | None
    """With the source inferred from the tokens: the same numbers; None where there is no map."""
    source_accuracy: float | None
    """Share of cells whose kept token was recovered."""
    codebook: CodebookStatistics | None
    """Use of the codebook; None of tokens that are real numbers."""
    channels: ChannelStatistics | None
    """Spread of real numbers; None of tokens with indices."""
    bits: Bits
    """Bits of one image; NaN where tokens are real numbers."""
    num_floats: int
    """Real numbers of one image; 0 where tokens have indices."""
    map_bits: float | None
    """Bits of a source map as it is written, by itself: mean over some images; None over none."""
    num_pixels: int
    """Pixels of one image."""
    num_images: int
    images_per_second: float
    """Encoded, stem included, and decoded with the given source, over all ranks."""

    def numbers(self) -> dict[str, float]:
        """Numbers that a training logs, by name.

        `psnr`, `ssim`, `l1`, `lpips` and their `_recovered` twins, `source_accuracy`,
        `codebook_usage`, `perplexity`, `bits` and `bits_per_pixel` of one image, `num_images`;
        `map_bits` where maps were coded; without maps there are no twins and no accuracy. With
        classes `psnr_wrong_class` and `psnr_no_class`: the same tokens decoded with another class,
        and without. With a flow decoder `token_agreement`; with one of patches `seam_ratio` and
        `sharpness`, which have twins too. Of tokens that are real numbers, in
        place of use and bits, `num_floats` of one image and `active_channels`.
        """
        shown = ("psnr", "ssim", "l1", "lpips", "psnr_wrong_class", "psnr_no_class")
        shown += ("token_agreement", "seam_ratio", "sharpness")
        numbers = {
            f"{name}{suffix}": values[name]
            for suffix, values in (("", self.given), ("_recovered", self.recovered or {}))
            for name in shown
            if name in values
        }
        if self.source_accuracy is not None:
            numbers["source_accuracy"] = self.source_accuracy
        if self.codebook is not None:
            numbers |= {
                "codebook_usage": self.codebook.usage,
                "perplexity": self.codebook.perplexity,
                "bits": self.bits.total,
                "bits_per_pixel": self.bits.total / self.num_pixels,
            }
        if self.map_bits is not None:
            numbers["map_bits"] = self.map_bits
        if self.channels is not None:
            numbers |= {
                "num_floats": float(self.num_floats),
                "active_channels": float(self.channels.num_active),
            }
        return numbers | {"num_images": float(self.num_images)}


class Evaluation:
    """Measures a tokenizer at one K, batch by batch; see `Evaluations`.

    Args:
        tokenizer: in evaluation mode, where it is to run.
        num_kept: K.
        perceptual: network for LPIPS; None leaves it out.
        extractor: network for feature cosine and Frechet distance; None leaves them out.
        autocast: precision of encoder and decoder; metrics are always float32.
        protocol: how images are compared.
        coded: positions of the images whose source maps are written, to know their bits.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        num_kept: int,
        *,
        perceptual: Perceptual | None,
        extractor: FeatureExtractor | None,
        autocast: torch.autocast,
        protocol: Protocol,
        coded: frozenset[int],
    ) -> None:
        self.tokenizer, self.num_kept, self.autocast = tokenizer, num_kept, autocast
        patch_size = drawn_patch_size(tokenizer)
        self.given, recovered = (
            comparison(perceptual, extractor, protocol, patch_size) for _ in range(2)
        )
        self.recovered = recovered if tokenizer.has_maps else None
        """None where grid and K imply the layout, so that nothing is to recover."""
        self.accuracy = Mean("source_accuracy")
        self.coded = coded if tokenizer.has_maps else frozenset()
        self.map_bits = Mean("map_bits")
        self.told = {}
        """PSNR with another class, and without one, where the tokenizer decodes by a class;
        agreement of tokens where it decodes by a flow."""
        if isinstance(tokenizer.config.condition, ClassCondition):
            names = ("psnr_wrong_class", "psnr_no_class")
            self.told = {name: Mean(name, infinite=True) for name in names}
        if tokenizer.flow is not None and not tokenizer.quantizer.spec.is_continuous:
            self.told["token_agreement"] = Mean("token_agreement")
        self.bits = Bits(0.0, 0.0)
        """Bits of one image; a rank that got none does not count."""
        self.tokens: list[Int64[Tensor, "n p"]] = []
        """Every token of every image of this rank, on the CPU; none that is real numbers."""
        self.channels = Channels(tokenizer.quantizer.spec.dim)
        """Those that are."""
        self.seconds = 0.0
        self.image_size = (0, 0)

    @torch.no_grad()
    def update(
        self,
        original: Original,
        embedded: Embedded,
        positions: Int64[Tensor, "b"],
        seconds: float,
        condition: Condition | None = None,
    ) -> None:
        """Reconstruct a batch and add it.

        Args:
            original: images.
            embedded: the same after the stem.
            positions: of the images among all images.
            seconds: time of the stem, which a reconstruction at this K alone takes too.
            condition: of the images, where the tokenizer has one.
        """
        image = original.image
        with _Clock(image.device) as clock, self.autocast:
            noise = Noise(0, positions.tolist())
            given = self.tokenizer.reconstruct(
                embedded, self.num_kept, noise=noise, condition=condition
            )
        self.seconds += seconds + clock.seconds
        encoded = given.encoded
        self.bits = self.tokenizer.bits(self.num_kept, encoded.grid_shape)
        if self.tokenizer.quantizer.spec.is_continuous:
            self.channels.update(encoded.codes)
        else:
            self.tokens.append(encoded.parts.flatten(0, 1).cpu())
        self.given.update(original, given.image, positions)
        self.image_size = (image.shape[2], image.shape[3])
        self._update_told(original, given.encoded, condition, positions)
        if "token_agreement" in self.told:
            self._update_agreement(given, condition, positions)
        if self.recovered is None:
            return
        with self.autocast:
            layout = self.tokenizer.recover(encoded.codes, encoded.grid_shape)
            recovered = self.tokenizer.decode(encoded.codes, layout, encoded.grid_shape, noise)
        source = require_source(layout, "the recovered source")
        self.accuracy.update(source_accuracy(source.index, given.source.index))
        chosen = [i for i, position in enumerate(positions.tolist()) if position in self.coded]
        if chosen:
            maps = Source(given.source.index[chosen].cpu(), given.source.num_kept)
            self.map_bits.update(torch.tensor(map_bits(maps, encoded.grid_shape)).double())
        self.recovered.update(original, recovered, positions)

    def _update_told(
        self,
        original: Original,
        encoded: Encoded,
        condition: Condition | None,
        positions: Int64[Tensor, "b"],
    ) -> None:
        """Decode the same tokens with another class, and without one."""
        config = self.tokenizer.config.condition
        if not isinstance(config, ClassCondition) or condition is None:
            return
        told = {
            "psnr_wrong_class": wrong_classes(config, condition, positions),
            "psnr_no_class": torch.full_like(condition, -1),
        }
        for name, other in told.items():
            with self.autocast:
                decoded = self.tokenizer.decode(
                    encoded.codes, encoded.layout, encoded.grid_shape, condition=other
                )
            self.told[name].update(psnr(original.image, decoded))

    def _update_agreement(
        self, given: Reconstruction, condition: Condition | None, positions: Int64[Tensor, "b"]
    ) -> None:
        """Encode what a flow drew, by two draws of noise, and compare the tokens."""
        encoded = given.encoded
        noise = Noise(1, positions.tolist())
        with self.autocast:
            other = self.tokenizer.decode(
                encoded.codes, encoded.layout, encoded.grid_shape, noise, condition
            )
            for image in (given.image, other):
                again = self.tokenizer.encode(image.clamp(-1, 1), self.num_kept, condition)
                self.told["token_agreement"].update(token_agreement(encoded, again))

    def compute(self, reference: Gaussian | None = None) -> Outcome:
        """Everything, over all ranks; every rank must call.

        Args:
            reference: of the original images, for the Frechet distance; None leaves it out.
        """
        # The largest of all ranks: one that got no image has zeros.
        found = torch.tensor([[*self.image_size, *self.bits]], dtype=torch.float64)
        height, width, *bits = distributed.gather(found).amax(0).tolist()
        # A rank that got no image takes part with no token.
        spec = self.tokenizer.quantizer.spec
        codebook, channels = None, None
        if spec.is_continuous:
            channels = self.channels.compute()
        else:
            none = torch.empty(0, len(spec.sizes), dtype=torch.int64)
            tokens = torch.cat([none, *self.tokens])
            codebook = codebook_statistics(distributed.gather(tokens), spec)
        num_images = self.given.num_images
        return Outcome(
            given=self.given.compute(reference)
            | {name: mean.compute().mean for name, mean in self.told.items()},
            recovered=None if self.recovered is None else self.recovered.compute(reference),
            source_accuracy=None if self.recovered is None else self.accuracy.compute().mean,
            codebook=codebook,
            channels=channels,
            bits=Bits(*bits),
            num_floats=self.num_kept * spec.dim if spec.is_continuous else 0,
            map_bits=self.map_bits.compute().mean if self.coded else None,
            num_pixels=round(height * width),
            num_images=int(distributed.sum(num_images)),
            images_per_second=float(distributed.sum(num_images / max(self.seconds, 1e-9))),
        )


def drawn_patch_size(tokenizer: Tokenizer) -> int | None:
    """Pixels per side of the patches that are decoded each at once; None where pixels are not."""
    if tokenizer.flow is not None:
        return tokenizer.flow.patch_size
    is_patchwise = isinstance(tokenizer.config.decoder, PatchDecoder)
    return tokenizer.config.patch_size if is_patchwise else None


def token_agreement(first: Encoded, second: Encoded) -> Float[Tensor, "b"]:
    """Share of each image's cells whose token is the same in two encodings.

    Where tokens have no source map, it is the share of the tokens. A generative decoder that
    invents what its tokens do not say is seen here and not in a Frechet distance.
    """
    ours, theirs = (
        each.parts
        if not isinstance(each.layout, Source)
        else torch.take_along_dim(each.parts, each.layout.index[..., None], dim=1)
        for each in (first, second)
    )
    return (ours == theirs).all(-1).float().mean(-1)


class Evaluations:
    """Measures a tokenizer at several K, batch by batch; what they share is computed once.

    Args:
        tokenizer: in evaluation mode, where it is to run.
        num_kept: each K.
        perceptual: network for LPIPS; None leaves it out.
        extractor: network for feature cosine and Frechet distance; None leaves them out.
        autocast: precision of encoder and decoder; metrics are always float32.
        protocol: how images are compared.
        coded: positions of the images whose source maps are written, to know their bits.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        num_kept: Sequence[int],
        *,
        perceptual: Perceptual | None,
        extractor: FeatureExtractor | None = None,
        autocast: torch.autocast,
        protocol: Protocol = "own",
        coded: Iterable[int] = (),
    ) -> None:
        self.tokenizer, self.autocast = tokenizer, autocast
        self.originals = Originals(perceptual, extractor)
        self.each = [
            Evaluation(
                tokenizer,
                count,
                perceptual=perceptual,
                extractor=extractor,
                autocast=autocast,
                protocol=protocol,
                coded=frozenset(coded),
            )
            for count in dict.fromkeys(num_kept)
        ]
        """One for each K, in the order given."""

    @torch.no_grad()
    def update(
        self,
        image: Float[Tensor, "b 3 h w"],
        positions: Int64[Tensor, "b"],
        labels: Int64[Tensor, "b"],
    ) -> None:
        """Reconstruct a batch at every K and add it.

        Args:
            image: originals, in [-1, 1], where the tokenizer is.
            positions: of the images among all images.
            labels: classes, -1 for none, of which a condition may be made.

        Raises:
            ValueError: the tokenizer needs a text of each image.
        """
        original = self.originals.update(image)
        condition = condition_of(self.tokenizer.config.condition, labels, "an evaluation")
        with _Clock(image.device) as clock, self.autocast:
            embedded = self.tokenizer.embed(image)
        for evaluation in self.each:
            evaluation.update(original, embedded, positions, clock.seconds, condition)


class _Clock:
    """Wall time of a block, in which a GPU finishes what it was given."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.seconds = 0.0

    def __enter__(self) -> "_Clock":
        self._wait()
        self.seconds = -time.perf_counter()
        return self

    def __exit__(self, *_: object) -> None:
        self._wait()
        self.seconds += time.perf_counter()

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def measure(
    tokenizer: Tokenizer,
    batches: Iterable[Batch],
    num_kept: Sequence[int],
    *,
    perceptual: Perceptual | None,
    autocast: torch.autocast,
    coded: Iterable[int] = (),
) -> dict[int, Outcome]:
    """Reconstruct images at several K; gives what was measured, by K.

    Args:
        tokenizer: in evaluation mode, where it is to run.
        batches: each image once over all ranks; see `mergevq.data.batches.eval_batches`.
        num_kept: each K.
        perceptual: network for LPIPS; None leaves it out.
        autocast: precision of encoder and decoder; metrics are always float32.
        coded: positions of the images whose source maps are written, to know their bits.
    """
    evaluations = Evaluations(
        tokenizer, num_kept, perceptual=perceptual, autocast=autocast, coded=coded
    )
    device = next(tokenizer.parameters()).device
    for batch in batches:
        evaluations.update(batch.image.to(device), batch.index, batch.label)
    return {evaluation.num_kept: evaluation.compute() for evaluation in evaluations.each}
