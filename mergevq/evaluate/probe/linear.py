"""Probes of frozen features for classes: a linear classifier, and a vote of nearest neighbours.

Source: He et al. 2022, "Masked Autoencoders Are Scalable Vision Learners", appendix A.1
(arXiv:2111.06377) for normalising features without parameters before the linear layer; Li et al.
2025, "MergeVQ", appendix A.4 (arXiv:2504.00999) for optimizer and length; Caron et al. 2021,
"Emerging Properties in Self-Supervised Vision Transformers", appendix F.1 (arXiv:2104.14294), after
Wu et al. 2018 (arXiv:1805.01978), for the weighted vote.

Differs: features are kept, so the statistics of the normalisation are those of all training images
and not a running average over batches; a channel that is constant in training is 0 from then on
instead of being divided by almost nothing; the learning rate is chosen on held-out training images,
never on those that the accuracy is of.

Shape letters: N training images, M images to classify, C channels, Y classes, K neighbours.
"""

import contextlib
import math
from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor, nn
from torch.nn import functional

from mergevq.config.probing import FeatureConfig, KnnConfig, LinearConfig
from mergevq.config.training import OptimConfig
from mergevq.data.batches import Batch
from mergevq.evaluate.probe.features import (
    PIXELS,
    Extracted,
    extract,
    feature_kinds,
    fit_pca,
    require_labels,
)
from mergevq.evaluate.probe.knn import nearest, vote
from mergevq.runtime.device import has_fused_optimizers
from mergevq.runtime.logs import Progress
from mergevq.runtime.optim import learning_rate
from mergevq.runtime.random import step_generator
from mergevq.tokenizer.tokenizer import Tokenizer

_LEAST_BATCHES = 8
"""Fewest batches of an epoch of the linear probe, unless it takes all images at once."""
_CONSTANT = 1e-5
"""A channel that varies less than this share of the one that varies most is constant."""


class Labelled(NamedTuple):
    """Features of some images, and their classes."""

    values: Float[Tensor, "n c"]
    label: Int64[Tensor, "n"]


# --------------------------------------------------------------------------------------- scores


def accuracy(scores: Float[Tensor, "m y"], label: Int64[Tensor, "m"], top: int = 1) -> float:
    """Share of images whose class is among the `top` with the highest scores.

    A class of score minus infinity is no candidate.
    """
    own = scores.gather(1, label[:, None])
    best = scores.topk(min(top, scores.shape[1]), dim=1)
    hit = (best.indices == label[:, None]).any(1) & own[:, 0].isfinite()
    return float(hit.double().mean())


def confusion_matrix(
    label: Int64[Tensor, "m"], predicted: Int64[Tensor, "m"], num_classes: int
) -> Int64[Tensor, "y y"]:
    """How many images of each class (row) were taken for each class (column)."""
    cells = label * num_classes + predicted
    return cells.bincount(minlength=num_classes**2).view(num_classes, num_classes)


def standard_error(share: float, count: int) -> float:
    """Standard error of an accuracy over so many independent images."""
    return math.sqrt(share * (1 - share) / count)


# --------------------------------------------------------------------------------------- linear


class RateResult(NamedTuple):
    """One learning rate of the sweep."""

    rate: float
    held_out_accuracy: float
    """On the part of the training images that chooses."""
    accuracy: float
    """Accuracy on the validation images of the classifier trained on all training images."""


class LinearResult(NamedTuple):
    """A linear probe."""

    sweep: tuple[RateResult, ...]
    """Every rate, in the order of the settings."""
    chosen: int
    """The one with the best held-out accuracy; among equals the lowest held-out loss."""
    scores: Float[Tensor, "m y"]
    """Logits of the validation images, of the chosen rate."""

    @property
    def rate(self) -> float:
        """The chosen rate."""
        return self.sweep[self.chosen].rate

    @property
    def at_edge(self) -> bool:
        """Whether the lowest or the highest rate beats all between, so others might be better."""
        by_rate = sorted(self.sweep)
        best = self.sweep[self.chosen].held_out_accuracy
        inner = [result.held_out_accuracy for result in by_rate[1:-1]]
        return (
            len(by_rate) > 1
            and self.rate in (by_rate[0].rate, by_rate[-1].rate)
            and (best not in inner)
        )


def linear_probe(
    train: Labelled,
    val: Labelled,
    num_classes: int,
    config: LinearConfig,
    *,
    crops: Sequence[Float[Tensor, "n c"]] = (),
    seed: int = 0,
    progress: Progress | None = None,
) -> LinearResult:
    """Train a linear classifier at each learning rate, choose one, and classify other images.

    Each rate is trained twice: without the held-out part, whose accuracy chooses, and with it.

    Args:
        train: labelled features, on the device to compute on.
        val: the same of other images, anywhere.
        num_classes: Y.
        config: how.
        crops: features of random crops of the training images, in their order, from which epochs
            learn in turn; without any they learn from `train`, which in any case gives the
            statistics of the normalisation and is what chooses.
        seed: of the held-out part, the first weights and the orders.
        progress: counts as many steps as `linear_steps` says.

    Raises:
        ValueError: the training images have fewer than two classes or too few images of each, or
            a loss is not finite.
    """
    require_labels(train.label, "the training data")
    device = train.values.device
    chooses = held_out(train.label.cpu(), config.held_out_fraction, step_generator(seed, "held", 0))
    fitted, other = _split(train, chooses.to(device))
    cut = [crop[~chooses.to(device)] for crop in crops]
    trained = _train(fitted, cut, num_classes, config, seed, progress)
    logits = _classify(trained, fitted.values, other.values)
    choices = [(accuracy(own, other.label), -_loss(own, other.label)) for own in logits]
    _require_finite(config.rates, [loss for _, loss in choices])
    chosen = choices.index(max(choices))
    trained = _train(train, crops, num_classes, config, seed, progress)
    logits = _classify(trained, train.values, val.values.to(device)).cpu()
    _require_finite(config.rates, [_loss(own, val.label) for own in logits])
    sweep = tuple(
        RateResult(rate, choice[0], accuracy(own, val.label))
        for rate, choice, own in zip(config.rates, choices, logits, strict=True)
    )
    return LinearResult(sweep, chosen, logits[chosen])


def linear_steps(label: Int64[Tensor, "n"], config: LinearConfig, *, seed: int = 0) -> int:
    """Optimizer steps of one `linear_probe` on training images of these classes."""
    chooses = held_out(label, config.held_out_fraction, step_generator(seed, "held", 0))
    return sum(_num_steps(count, config) for count in (len(label), int((~chooses).sum())))


def held_out(
    label: Int64[Tensor, "n"], fraction: float, generator: torch.Generator
) -> Bool[Tensor, "n"]:
    """Choose about this share of each class at random; at least one, and never all, of two or more.

    Raises:
        ValueError: no class has two images.
    """
    order = torch.randperm(len(label), generator=generator)
    chosen = torch.zeros(len(label), dtype=torch.bool)
    for each in label.unique():
        members = order[label[order] == each]
        count = min(len(members) - 1, max(1, round(fraction * len(members))))
        chosen[members[:count]] = True
    if not chosen.any():
        raise ValueError(
            f"each of the {len(label)} classes has one training image, and none can be held out "
            "to choose the learning rate; use more images"
        )
    return chosen


def _split(data: Labelled, chosen: Bool[Tensor, "n"]) -> tuple[Labelled, Labelled]:
    """Those that are not chosen, and those that are."""
    return (
        Labelled(data.values[~chosen], data.label[~chosen]),
        Labelled(data.values[chosen], data.label[chosen]),
    )


class _Heads(NamedTuple):
    """One linear layer for each learning rate."""

    weights: Float[Tensor, "r c y"]
    biases: Float[Tensor, "r y"]


def _num_steps(num_images: int, config: LinearConfig) -> int:
    """Optimizer steps on so many images."""
    return config.num_epochs * math.ceil(num_images / _batch_size(num_images, config))


def _batch_size(num_images: int, config: LinearConfig) -> int:
    """Images per step; so many that an epoch has several, else few images are few steps."""
    if config.batch_size is None:
        return num_images
    return min(config.batch_size, math.ceil(num_images / _LEAST_BATCHES))


def _train(
    data: Labelled,
    crops: Sequence[Float[Tensor, "n c"]],
    num_classes: int,
    config: LinearConfig,
    seed: int,
    progress: Progress | None,
) -> _Heads:
    """Train a linear layer at each rate, all on the same batches."""
    views = [standardize(data.values, each) for each in (crops or [data.values])]
    device, (num_images, dim) = views[0].device, views[0].shape
    batch_size = _batch_size(num_images, config)
    num_steps = _num_steps(num_images, config)
    first = torch.empty(dim, num_classes)
    nn.init.trunc_normal_(first, std=0.01, generator=step_generator(seed, "linear", 0))
    weights = [nn.Parameter(first.to(device, copy=True)) for _ in config.rates]
    biases = [nn.Parameter(torch.zeros(num_classes, device=device)) for _ in config.rates]
    optimizer = torch.optim.AdamW(
        [{"params": [weight], "weight_decay": config.weight_decay} for weight in weights]
        + [{"params": [bias], "weight_decay": 0.0} for bias in biases],
        fused=True if has_fused_optimizers(device) else None,
    )
    schedule = OptimConfig(
        lr=1.0, schedule="cosine", warmup_steps=int(config.warmup_fraction * num_steps)
    )
    step = 0
    for epoch in range(config.num_epochs):
        values = views[epoch % len(views)]
        order = torch.randperm(num_images, generator=step_generator(seed, "order", epoch))
        for rows in order.to(device).split(batch_size):
            share = learning_rate(step, schedule, num_steps, batch_size)
            for group, rate in zip(optimizer.param_groups, config.rates * 2, strict=True):
                group["lr"] = share * rate
            batch, label = values[rows], data.label[rows]
            # The rates share nothing, so the gradients of the sum are those of each.
            losses = [
                functional.cross_entropy(batch @ weight + bias, label)
                for weight, bias in zip(weights, biases, strict=True)
            ]
            optimizer.zero_grad()
            torch.stack(losses).sum().backward()
            optimizer.step()
            step += 1
            if progress is not None:
                progress.update()
    return _Heads(*(torch.stack([p.detach() for p in each]) for each in (weights, biases)))


def standardize(train: Float[Tensor, "n c"], values: Float[Tensor, "m c"]) -> Float[Tensor, "m c"]:
    """Shift and scale each channel so that it has mean 0 and deviation 1 over the training images.

    A channel that is constant there becomes 0.
    """
    deviation, mean = torch.std_mean(train, dim=0, correction=0)
    varies = deviation > _CONSTANT * deviation.max()
    return (values - mean) * torch.where(varies, 1 / deviation, 0.0)


def _classify(
    heads: _Heads, train: Float[Tensor, "n c"], values: Float[Tensor, "m c"]
) -> Float[Tensor, "r m y"]:
    """Logits of every rate."""
    return standardize(train, values) @ heads.weights + heads.biases[:, None]


def _loss(logits: Float[Tensor, "m y"], label: Int64[Tensor, "m"]) -> float:
    """Mean cross-entropy."""
    return float(functional.cross_entropy(logits, label))


def _require_finite(rates: Sequence[float], losses: Sequence[float]) -> None:
    """Raise `ValueError` naming the learning rates at which the loss is not finite."""
    bad = [rate for rate, loss in zip(rates, losses, strict=True) if not math.isfinite(loss)]
    if bad:
        raise ValueError(f"the linear probe diverged at the rates {bad}; leave them out")


# ------------------------------------------------------------------------------------ comparison


def with_pca(
    train: Extracted, others: Sequence[Extracted], dim: int, *, seed: int = 0
) -> list[dict[str, Tensor]]:
    """Features of training images and of others by name, with the principal components of pixels.

    The components are those of the training pixels.
    """
    pca = fit_pca(train.features[PIXELS], dim, step_generator(seed, "pca", 0))
    name = f"PCA of pixels, {pca.directions.shape[1]} components"
    return [each.features | {name: pca.project(each.features[PIXELS])} for each in (train, *others)]


class ProbeRow(NamedTuple):
    """One representation and what two probes find in it."""

    name: str
    dim: int
    """C."""
    linear_accuracy: float
    """In [0, 1], of the learning rate chosen on held-out training images."""
    knn_accuracy: float
    """In [0, 1], of the first k of the settings."""


def probe_rows(
    tokenizer: Tokenizer,
    train: Sequence[Batch],
    val: Sequence[Batch],
    num_kept: Sequence[int] = (),
    *,
    features: FeatureConfig | None = None,
    linear: LinearConfig | None = None,
    knn: KnnConfig | None = None,
    seed: int = 0,
) -> list[ProbeRow]:
    """Probe a tokenizer, the raw pixels, and the principal components of the pixels.

    Args:
        tokenizer: in evaluation mode, where it is to run.
        train: labelled images of the trained size, each once; see
            `mergevq.data.batches.eval_batches`.
        val: other images of the same classes.
        num_kept: each K, besides merging off; none is the tokenizer's own.
        features: which features; its K are not used. None is the default.
        linear: the linear probe; None is the default.
        knn: the vote, without leaving one out; None is the default.
        seed: of every random number.

    Returns:
        The tokenizer's features, then the two baselines; the same numbers for the same seed.

    Raises:
        ValueError: labels are missing or of one class, or a feature is not finite.
    """
    features, linear, knn = (
        features or FeatureConfig(),
        linear or LinearConfig(),
        knn or KnnConfig(),
    )
    kinds = feature_kinds(tokenizer, replace(features, num_kept=tuple(num_kept)))
    side = features.pixel_side
    num_images = sum(len(batch.label) for batch in (*train, *val))
    with contextlib.closing(Progress(num_images, unit="image")) as progress:
        known, asked = (
            extract(tokenizer, each, kinds, pixel_side=side, progress=progress)
            for each in (train, val)
        )
    require_labels(known.label, "the training data")
    require_labels(asked.label, "the validation data")
    num_classes = 1 + int(max(known.label.max(), asked.label.max()))
    banks, queries = with_pca(known, [asked], features.pca_dim or tokenizer.config.dim, seed=seed)
    steps = linear_steps(known.label, linear, seed=seed) * len(banks)
    rows = []
    with contextlib.closing(Progress(steps, unit="probe step")) as progress:
        for name, bank in banks.items():
            probed = linear_probe(
                Labelled(bank, known.label),
                Labelled(queries[name], asked.label),
                num_classes,
                linear,
                seed=seed,
                progress=progress,
            )
            count = min(knn.num_neighbours[0], len(bank))
            neighbours = nearest(queries[name], bank, count)
            votes = vote(neighbours, known.label, num_classes, count, knn.temperature)
            rows.append(
                ProbeRow(
                    name=name,
                    dim=bank.shape[1],
                    linear_accuracy=accuracy(probed.scores, asked.label),
                    knn_accuracy=accuracy(votes, asked.label),
                )
            )
    return rows
