"""End-to-end fine-tuning: the encoder and a linear classifier, trained on labels together.

Source: Xie et al. 2022, "SimMIM: A Simple Framework for Masked Image Modeling", appendix A
(arXiv:2111.09886) for optimizer, layer decay and augmentation, which Li et al. 2025, "MergeVQ",
appendix A.4 (arXiv:2504.00999) follows; Zhang et al. 2018, "mixup" (arXiv:1710.09412); Yun et al.
2019, "CutMix", section 3.1 (arXiv:1905.04899); Huang et al. 2016, "Deep Networks with Stochastic
Depth", section 3 (arXiv:1603.09382).

Differs: the last epoch is reported, never the best one; tokens may be merged (the paper fine-tunes
without merging).

Shape letters: B batch, Y classes, H and W pixels, M validation images.
"""

import functools
import math
from collections.abc import Iterator
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.hooks import RemovableHandle

from mergevq.config.base import ImagePool, Stage
from mergevq.config.probing import FinetuneConfig
from mergevq.config.training import DataConfig, OptimConfig
from mergevq.data.batches import eval_batches, train_batches
from mergevq.data.images import ImageDataset
from mergevq.data.prepare import Loaded
from mergevq.evaluate.probe.augment import RandAugment, erase
from mergevq.nn.blocks import NORM_EPS
from mergevq.nn.norm import LayerNorm
from mergevq.runtime.device import autocast, resolve_precision, send
from mergevq.runtime.logs import Progress
from mergevq.runtime.optim import (
    check_coverage,
    clip,
    gradient_scaler,
    guard_on,
    learning_rate,
    parameter_groups,
)
from mergevq.runtime.random import step_generator
from mergevq.tokenizer.encoder import Encoder
from mergevq.tokenizer.features import pool_features, run_layers
from mergevq.tokenizer.reducers.merge import MergeBlock
from mergevq.tokenizer.tokenizer import Tokenizer

_MAX_NONFINITE = 20
"""Steps in a row with a loss or gradient that is not finite, after which training stops."""


class Classifier(nn.Module):
    """A tokenizer's encoder with a normalised linear layer on one of its features."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        num_classes: int,
        *,
        num_kept: int,
        stage: Stage,
        pool: ImagePool,
        generator: torch.Generator,
    ) -> None:
        """Put a fresh classifier on a tokenizer, which is trained in place.

        Args:
            tokenizer: its decoder and source predictor are frozen, and so is the way to the codes
                when the stage is before it.
            num_classes: Y.
            num_kept: K; as many as there are cells turns merging off.
            stage: where the classifier is attached.
            pool: how tokens become one vector.
            generator: draws the weights of the linear layer, on the CPU.
        """
        super().__init__()
        self.tokenizer = tokenizer
        self.num_kept = num_kept
        self.stage: Stage = stage
        self.pool: ImagePool = pool
        to_codes = stage in {"latents", "quantized"} and pool != "class"
        config = tokenizer.config
        dims = {"latents": config.latent_dim, "quantized": config.quantizer.dim}
        dim = dims[stage] if to_codes else config.dim
        self.norm = LayerNorm(dim, eps=NORM_EPS)
        weight = torch.empty(num_classes, dim)
        nn.init.trunc_normal_(weight, std=0.01, generator=generator)
        self.weight = nn.Parameter(weight)
        self.bias = nn.Parameter(torch.zeros(num_classes))
        tokenizer.requires_grad_(False)
        encoder = tokenizer.encoder
        used = [
            encoder.stem,
            encoder.reducer.blocks,
            *(encoder.projections * to_codes),
        ]
        for module in used:
            module.requires_grad_(True)
        encoder.class_token.requires_grad_(True)
        self.to(encoder.class_token.device)

    def forward(self, image: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b y"]:
        """Logits of images of a loader."""
        tokenizer = self.tokenizer
        out = run_layers(tokenizer, Loaded(image), self.num_kept)
        values = pool_features(tokenizer.encoder, tokenizer.quantizer, out, self.stage, self.pool)
        values = self.norm(values)
        return functional.linear(values, self.weight, self.bias)


def layer_decay_groups(
    model: Classifier, weight_decay: float, layer_decay: float
) -> list[dict[str, Any]]:
    """Trainable parameters in groups, each with a `scale` for its learning rate.

    The classifier has 1, and so has what lies between the last block and it; each block has
    `layer_decay` times the scale of the next one; the stem and the class token come before the
    first block.
    """
    encoder = model.tokenizer.encoder
    num_layers = len(encoder.reducer.blocks)
    depth: dict[nn.Parameter, int] = dict.fromkeys(model.parameters(), num_layers + 1)
    depth |= dict.fromkeys([*encoder.stem.parameters(), encoder.class_token], 0)
    for number, block in enumerate(encoder.reducer.blocks, start=1):
        depth |= dict.fromkeys(block.parameters(), number)
    groups: dict[tuple[int, float], dict[str, Any]] = {}
    for group in parameter_groups(model, weight_decay):
        for parameter in group["params"]:
            place, decay = depth[parameter], group["weight_decay"]
            scale = layer_decay ** (num_layers + 1 - place)
            empty = {"params": [], "weight_decay": decay, "scale": scale}
            groups.setdefault((place, decay), empty)["params"].append(parameter)
    return [groups[key] for key in sorted(groups)]


# --------------------------------------------------------------------------------------- mixing


class Mixed(NamedTuple):
    """Images that may each be made of two, and what they show."""

    image: Float[Tensor, "b 3 h w"]
    target: Float[Tensor, "b y"]
    """Share of each class; a row sums to 1."""


def mixup(mixed: Mixed, share: float, order: Int64[Tensor, "b"]) -> Mixed:
    """Blend each image with another: `share` of itself, the rest of the one in `order`."""
    image, target = mixed
    return Mixed(
        share * image + (1 - share) * image[order], share * target + (1 - share) * target[order]
    )


def cutmix(
    mixed: Mixed, share: float, order: Int64[Tensor, "b"], centre: tuple[float, float]
) -> Mixed:
    """Paste a rectangle of another image over each.

    Args:
        mixed: images.
        share: of the area that is kept, before the rectangle is cut at the border; the target
            counts the pixels that are.
        order: which image the rectangle comes from.
        centre: of the rectangle, in (height, width) from 0 to 1.
    """
    image, target = mixed
    height, width = image.shape[2:]
    side = math.sqrt(1 - share)
    top, bottom = _cut_at(centre[0], side, height)
    left, right = _cut_at(centre[1], side, width)
    pasted = image.clone()
    pasted[..., top:bottom, left:right] = image[order][..., top:bottom, left:right]
    kept = 1 - (bottom - top) * (right - left) / (height * width)
    return Mixed(pasted, kept * target + (1 - kept) * target[order])


def _cut_at(centre: float, side: float, length: int) -> tuple[int, int]:
    """First pixel and the one after the last of an interval, cut at the borders."""
    half = side * length / 2
    first, last = (round(centre * length + sign * half) for sign in (-1, 1))
    return max(0, first), min(length, last)


def mix(mixed: Mixed, config: FinetuneConfig, generator: torch.Generator) -> Mixed:
    """Mixup or cutmix a batch, each half of the time if both are on; one share for all of it.

    Args:
        mixed: images and their classes.
        config: the beta distributions that shares are drawn from.
        generator: draws everything, on the CPU.
    """
    if config.mixup == config.cutmix == 0:
        return mixed
    order = send(torch.randperm(len(mixed.image), generator=generator), mixed.image.device)
    pick, row, column = torch.rand(3, generator=generator).tolist()
    if config.cutmix == 0 or (config.mixup > 0 and pick < 0.5):
        return mixup(mixed, draw_beta(config.mixup, generator), order)
    return cutmix(mixed, draw_beta(config.cutmix, generator), order, (row, column))


def draw_beta(alpha: float, generator: torch.Generator) -> float:
    """A number in [0, 1] from the beta distribution with both parameters `alpha`."""
    # Rejection by torch's uniform numbers never ends for large parameters; numpy's sampler does.
    seed = torch.randint(2**62, (), generator=generator)
    return float(np.random.default_rng(int(seed)).beta(alpha, alpha))


# --------------------------------------------------------------------------------- dropped blocks


class DropPath:
    """Skips blocks of an encoder at random, each for some images of a batch.

    A skipped block's attention and MLP, each drawn apart, add nothing; where they are not skipped
    they count for more, so that their mean stays. Inside `with`, it acts in training mode.
    """

    def __init__(self, encoder: Encoder, probability: float) -> None:
        """Choose the probabilities: from 0 for the first block, in even steps, to the last one's.

        Args:
            encoder: its weights and their names stay.
            probability: of skipping the last block, in [0, 1).
        """
        self._blocks = [cast("MergeBlock", block) for block in encoder.reducer.blocks]
        last = max(1, len(self._blocks) - 1)
        self.probabilities = [probability * n / last for n in range(len(self._blocks))]
        """Probability of each block to be skipped."""
        self._factors: Float[Tensor, "n b"] | None = None
        self._hooks: list[RemovableHandle] = []

    def draw(self, batch: int, generator: torch.Generator, device: torch.device) -> None:
        """Choose what is skipped for the images of the next pass; draws on the CPU."""
        skipped = torch.tensor(self.probabilities).repeat_interleave(2)[:, None]
        kept = torch.rand(len(skipped), batch, generator=generator) >= skipped
        self._factors = send(kept / (1 - skipped), device)

    def __enter__(self) -> "DropPath":
        """Begin."""
        for number, block in enumerate(self._blocks):
            for place, branch in enumerate((block.ls1, block.ls2)):
                hook = functools.partial(self._scale, row=2 * number + place)
                self._hooks.append(branch.register_forward_hook(hook))
        return self

    def __exit__(self, *_: object) -> None:
        """End."""
        while self._hooks:
            self._hooks.pop().remove()

    def _scale(self, branch: nn.Module, _inputs: object, out: Tensor, *, row: int) -> Tensor:
        """Scale what a branch adds, image by image."""
        if not branch.training or self._factors is None:
            return out
        return out * self._factors[row, :, None, None].to(out.dtype)


# ------------------------------------------------------------------------------------- training


class FinetuneResult(NamedTuple):
    """A fine-tuned encoder's verdict."""

    scores: Float[Tensor, "m y"]
    """Logits of the validation images, after the last step."""
    label: Int64[Tensor, "m"]
    losses: list[float]
    """Mean training loss of each epoch."""
    num_steps: int
    batch_size: int
    """Images per step: of the settings, or all if they are fewer."""
    rate: float
    """Peak learning rate of the classifier, scaled to the batch."""
    num_skipped: int
    """Steps that were left out because something was not finite."""


def finetune(
    model: Classifier,
    train: ImageDataset,
    val: ImageDataset,
    config: FinetuneConfig,
    *,
    num_workers: int,
    seed: int = 0,
    progress: Progress | None = None,
) -> FinetuneResult:
    """Train on labelled images and classify others.

    Args:
        model: trained in place, where it is; left in evaluation mode.
        train: labelled images.
        val: other images of the same classes.
        config: how.
        num_workers: loading processes; 0 loads in this one.
        seed: of orders, augmentation, mixing and skipped blocks.
        progress: counts as many steps as `num_steps` says.

    Raises:
        RuntimeError: loss or gradient are not finite for many steps in a row.
        ValueError: an image cannot be used.
    """
    device = model.weight.device
    batch_size = min(config.batch_size, len(train))
    total = num_steps(len(train), config)
    schedule = _schedule(config, total)
    groups = layer_decay_groups(model, config.weight_decay, config.layer_decay)
    guard = guard_on(device, _MAX_NONFINITE)
    # Only a fused one skips a step on the device.
    optimizer = torch.optim.AdamW(groups, fused=True if guard.read_every > 1 else None)
    check_coverage([model], [optimizer])
    dtype = resolve_precision(config.precision, device)
    scaler = gradient_scaler(device, dtype)
    losses: list[Tensor] = []
    model.train()
    batches = _batches(train, config, model, total, batch_size, num_workers=num_workers, seed=seed)
    with DropPath(model.tokenizer.encoder, config.drop_path) as depth:
        for step, (image, label) in enumerate(batches):
            target = functional.one_hot(send(label, device), len(model.weight)).float()
            image = erase(image, config.erasing, step_generator(seed, "erase", step))
            mixed = mix(
                Mixed(send(image, device), target), config, step_generator(seed, "mix", step)
            )
            depth.draw(len(image), step_generator(seed, "depth", step), device)
            for group in optimizer.param_groups:
                group["lr"] = group["scale"] * learning_rate(step, schedule, total, batch_size)
            with autocast(device, dtype):
                logits = model(mixed.image)
            loss = functional.cross_entropy(
                logits.float(), mixed.target, label_smoothing=config.label_smoothing
            )
            optimizer.zero_grad()
            scaler.scale(loss).backward()
            scaler.unscale_(optimizer)
            norm = clip(model.parameters(), config.clip_norm)
            verdict = guard.check(step, {"loss": loss, "gradient norm": norm})
            verdict.step(optimizer)
            losses.append(torch.where(verdict.skip > 0, torch.nan, loss.detach()))
            scaler.update()
            if progress is not None:
                progress.update()
        guard.read()
    scores, labels = classify(model, val, batch_size=min(64, batch_size), num_workers=num_workers)
    return FinetuneResult(
        scores=scores,
        label=labels,
        losses=_epoch_means(torch.stack(losses).tolist(), config.num_epochs),
        num_steps=total,
        batch_size=batch_size,
        rate=learning_rate(schedule.warmup_steps, schedule, total, batch_size),
        num_skipped=guard.num_skipped,
    )


def num_steps(num_images: int, config: FinetuneConfig) -> int:
    """Optimizer steps of the whole training."""
    return config.num_epochs * math.ceil(num_images / config.batch_size)


def _schedule(config: FinetuneConfig, total: int) -> OptimConfig:
    """Course of the rate over `total` steps."""
    return OptimConfig(
        lr=config.rate,
        base_batch_size=512,
        schedule="cosine",
        warmup_steps=int(config.warmup_fraction * total),
    )


def _batches(
    train: ImageDataset,
    config: FinetuneConfig,
    model: Classifier,
    total: int,
    batch_size: int,
    *,
    num_workers: int,
    seed: int,
) -> Iterator[tuple[Float[Tensor, "b 3 h w"], Int64[Tensor, "b"]]]:
    """Augmented images and their classes."""
    size = model.tokenizer.config.image_size
    moved = config.augmentation == "crop"
    crop = "random" if moved else "center"
    data = DataConfig(crop=crop, flip=moved, reduced_jpeg=False)
    for batch in train_batches(
        train,
        data,
        image_size=size,
        batch_size=batch_size,
        num_steps=total,
        seed=seed,
        student_size=size if config.augmentation == "resized_crop" else None,
        teacher_size=None,
        num_workers=num_workers,
        augment=RandAugment(config.randaugment) if config.randaugment > 0 else None,
    ):
        view = batch.student_view
        yield batch.image if view is None else view, batch.label


def _epoch_means(losses: list[float], num_epochs: int) -> list[float]:
    """Mean of each epoch's steps, as far as there are any; NaN is a step that was skipped."""
    losses = [each for each in losses if not math.isnan(each)]
    size = max(1, math.ceil(len(losses) / num_epochs))
    parts = [losses[start : start + size] for start in range(0, len(losses), size)]
    return [sum(part) / len(part) for part in parts]


@torch.no_grad()
def classify(
    model: Classifier, images: ImageDataset, *, batch_size: int, num_workers: int
) -> tuple[Float[Tensor, "m y"], Int64[Tensor, "m"]]:
    """Logits and classes of images, in float32; the model is left in evaluation mode."""
    model.eval()
    device, scores, labels = model.weight.device, [], []
    size = model.tokenizer.config.image_size
    for batch in eval_batches(
        images, image_size=size, batch_size=batch_size, num_workers=num_workers
    ):
        scores.append(model(batch.image.to(device)).cpu())
        labels.append(batch.label)
    return torch.cat(scores), torch.cat(labels)
