"""Tests of `mergevq.evaluate.selftest`."""

import pytest
import torch

from mergevq.evaluate import selftest
from mergevq.evaluate.selftest import check_metrics
from mergevq.metrics import frechet


def test_metrics_are_right_where_the_answer_is_known(folder, monkeypatch):
    checks = {check.name: check for check in check_metrics(str(folder / "colours.pt"))}
    assert list(checks) == [
        *("psnr", "ssim", "l1", "frechet_colours"),
        *("frechet, of Gaussians", "frechet, of a shift"),
    ]
    assert all(check.passed for check in checks.values())
    assert checks["psnr"].found == float("inf")
    assert checks["frechet, of a shift"].found == pytest.approx(1.5)
    # A distance that forgot the means is found out; so would be any other.
    whole = frechet.frechet_distance
    same = torch.zeros(6, dtype=torch.float64)
    monkeypatch.setattr(
        selftest,
        "frechet_distance",
        lambda one, other: whole(one._replace(mean=same), other._replace(mean=same)),
    )
    wrong = [check.name for check in check_metrics() if not check.passed]
    assert wrong == ["frechet, of Gaussians", "frechet, of a shift"]


def test_lpips_of_the_same_image_is_nothing(shared):
    (check,) = [c for c in check_metrics(lpips=str(shared / "weights")) if c.name == "lpips"]
    assert check.passed
    assert check.found == 0
