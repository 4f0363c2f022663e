"""Checks of the metrics against inputs whose results are known."""

import warnings
from typing import NamedTuple

import torch

from mergevq.config.evaluation import TrunkName
from mergevq.evaluate.subject import json_numbers
from mergevq.metrics.comparison import Originals, comparison
from mergevq.metrics.extractor import FeatureExtractor
from mergevq.metrics.frechet import MIN_SAMPLES, FrechetStatistics, Gaussian, frechet_distance
from mergevq.metrics.lpips import load_perceptual
from mergevq.runtime.device import resolve_device
from mergevq.runtime.random import step_generator


class Check(NamedTuple):
    """A metric where its value is known."""

    name: str
    found: float
    wanted: str
    """In words."""
    passed: bool


def check_metrics(
    extractor: str | None = None,
    lpips: str | None = None,
    trunk: TrunkName = "alex",
    device: str = "auto",
) -> list[Check]:
    """Measure images that come back exactly, and Gaussians whose distance has a closed form.

    Args:
        extractor: TorchScript file whose distance is measured too.
        lpips: file or folder with LPIPS weights, to measure it too.
        trunk: network of LPIPS.
        device: where to compute.

    Raises:
        ValueError: a file is not there, or a number is NaN.
        RuntimeError: a file is damaged.
    """
    place = resolve_device(device)
    network = None if extractor is None else FeatureExtractor(extractor, place)
    perceptual = None if lpips is None else load_perceptual(trunk, lpips)
    perceptual = None if perceptual is None else perceptual.to(place)
    # Smooth, as images are: all noise looks alike to a network.
    coarse = 2 * torch.rand(32, 3, 8, 8, generator=step_generator(0, "images", 0)) - 1
    image = torch.nn.functional.interpolate(coarse, size=64, mode="bilinear").to(place)
    originals = Originals(perceptual, network)
    compared = comparison(perceptual, network)
    compared.update(originals.update(image), image, torch.arange(len(image)))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="a Frechet distance of")
        numbers = compared.compute(originals.compute())
    written = json_numbers(numbers)
    checks = [
        Check(
            name="psnr",
            found=numbers["psnr"],
            wanted="infinite, and written as null",
            passed=written["infinite"] == ["psnr"] and written["metrics"]["psnr"] is None,
        )
    ]
    known = {"ssim": 1.0, "l1": 0.0, "lpips": 0.0}
    if network is not None:
        known[network.metric_name("frechet")] = 0.0
    checks += [
        Check(name, numbers[name], f"{value:g}, to 0.001", abs(numbers[name] - value) < 1e-3)
        for name, value in known.items()
        if name in numbers
    ]
    return [*checks, *_check_gaussians()]


def _check_gaussians() -> list[Check]:
    """Distances of covariances with the same axes, one of less than full rank, and of a shift."""
    numbers = torch.rand(
        2 * 6 + 6 * 6 + MIN_SAMPLES * 6, generator=step_generator(0, "gaussians", 0)
    )
    means, axes, samples = numbers.double().split([2 * 6, 6 * 6, MIN_SAMPLES * 6])
    means, axes = means.view(2, 6), torch.linalg.qr(axes.view(6, 6)).Q
    spreads = torch.tensor([[1, 2, 3, 4, 5, 6], [3, 0, 1, 0, 2, 2]], dtype=torch.float64)
    first, second = (
        Gaussian(mean, axes @ spread.square().diag() @ axes.T, None)
        for mean, spread in zip(means, spreads, strict=True)
    )
    apart = (means[0] - means[1]).square().sum() + (spreads[0] - spreads[1]).square().sum()
    here, there = FrechetStatistics(6), FrechetStatistics(6)
    for part in samples.view(-1, 6).split(500):
        here.update(part)
        there.update(part + 0.5)
    checks = []
    for name, found, wanted in (
        ("frechet, of Gaussians", frechet_distance(first, second), float(apart)),
        ("frechet, of a shift", frechet_distance(here.compute(), there.compute()), 6 * 0.5**2),
    ):
        checks.append(Check(name, found, f"{wanted:.6g}", abs(found - wanted) < 1e-6))
    return checks
