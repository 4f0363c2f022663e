"""Tests of `mergevq.training.bench.device`."""

import json
import math
import time
from pathlib import Path

import pytest
import torch
from torch import nn

from mergevq.cli.main import main
from mergevq.training.bench import device as bench_device
from mergevq.training.bench.device import _in_time, count_flops
from tests.support.generators import KINDS

REFERENCE = Path(__file__).resolve().parents[3] / "benchmarks" / "reference_generator.py"
SMALL = ["--recipes", "photos64", "--images", "1", "--size", "tiny", "--grid-tokens", "4"]
SMALL += ["--device", "cpu", "--no-compiled"]


def measured(tmp_path, *options):
    """The record of a small run."""
    out = tmp_path / "found" / "gpu.json"
    assert main(["bench", "gpu", *SMALL, "--out", str(out), *options]) == 0
    return json.loads(out.read_text())


@pytest.mark.slow
def test_a_lent_machine_is_measured_with_one_command(tmp_path, capsys):
    record = measured(tmp_path, "--batch-sizes", "1", "--reference", str(REFERENCE))
    assert record["left_out"] == []
    assert record["errors"] == {}
    assert record["flops_per_second"] > 0
    images = record["images"]["photos64"]
    for what in ("encode", "decode", "train step"):
        # A pass with gradients has about three times the products.
        assert images[what]["flops"] > 0
        seconds = sorted(images[what]["seconds"])[len(images[what]["seconds"]) // 2]
        assert images[what]["images_per_second"] == pytest.approx(1 / seconds)
        share = images[what]["flops"] / seconds / record["flops_per_second"]
        assert images[what]["utilisation"] == pytest.approx(share)
    assert images["train step"]["flops"] > 2 * images["decode"]["flops"]
    ways = {(speed["order"], speed["way"]) for speed in record["speeds"]}
    assert ways == {
        *((kind, "mergevq") for kind in KINDS),
        *(("raster", way) for way in ("recompute", "concatenate", "buffer")),
    }
    ratios = {speed["order"]: speed["times_plain"] for speed in record["speeds"]}
    assert ratios["merge"] is None
    assert "product's rate" in capsys.readouterr().out


def test_an_error_in_a_part_is_in_the_record_and_the_others_go_on(tmp_path, monkeypatch, capsys):
    def broken(config, *, orders, **options):
        if orders == ["merge"]:
            raise RuntimeError("no kernel for this\nand more")
        yield from speeds(config, orders=orders, **options)

    speeds = bench_device.bench_generator
    monkeypatch.setattr(bench_device, "bench_generator", broken)
    monkeypatch.setattr(bench_device, "_measure_product", lambda *_: 1 / 0)
    monkeypatch.setattr(bench_device, "_image_calls", lambda *_: {"encode": lambda: None})
    monkeypatch.setattr(bench_device, "_training", lambda *_: (None, None))
    record = measured(tmp_path, "--batch-sizes", "1", "--reference", "nowhere")
    assert set(record["errors"]) == {"product", "sampling 1 at once, merge"}
    assert "no kernel for this\nand more" in record["errors"]["sampling 1 at once, merge"]
    assert {speed["order"] for speed in record["speeds"]} == set(KINDS) - {"merge"}
    # Without the product there is nothing to compare with.
    assert "utilisation" not in record["images"]["photos64"]["encode"]
    said = capsys.readouterr().out
    assert "sampling 1 at once, merge: FAILED, RuntimeError: no kernel for this\n" in said


def test_after_the_time_is_up_nothing_is_begun(tmp_path):
    record = measured(tmp_path, "--minutes", "0", "--compiled", "--reference", "nowhere")
    assert record["left_out"] == [
        "product",
        "photos64, model",
        *(f"sampling {number} at once, {kind}" for number in (1, 64) for kind in KINDS),
        "photos64, train step, compiled",
    ]
    assert record["speeds"] == []


def test_what_takes_too_long_in_another_process_is_ended():
    started_at = time.monotonic()
    with pytest.raises(TimeoutError, match="not done after 1 s"):
        _in_time(time.sleep, 60.0, 1.0)
    assert time.monotonic() - started_at < 30


@pytest.mark.slow
def test_an_error_in_another_process_is_shown():
    with pytest.raises(RuntimeError, match=r"(?s)ValueError: math domain error.*Traceback"):
        _in_time(math.log, -1.0, 60.0)


def test_products_are_counted_forward_and_backward():
    layers = nn.Sequential(nn.Linear(3, 5), nn.Conv1d(2, 4, 1))
    x = torch.randn(2, 2, 3)
    # Twice the multiply-adds: 4 rows of 3 x 5, then 2 x 4 weights at 5 places of 2 sequences.
    forward = 2 * (4 * 3 * 5) + 2 * (2 * 4 * 5 * 2)
    with torch.no_grad():
        assert count_flops(lambda: layers(x)) == forward
    # The gradient of the first input is of no use.
    assert count_flops(lambda: layers(x).sum().backward()) == 3 * forward - 2 * (4 * 3 * 5)
