"""Tests of `mergevq.training.bench_device`."""

import json
from pathlib import Path

import pytest

from mergevq.cli.main import main

REFERENCE = Path(__file__).resolve().parents[2] / "benchmarks" / "reference_generator.py"


def test_a_lent_machine_is_measured_with_one_command(tmp_path, capsys):
    out = tmp_path / "found" / "gpu.json"
    options = ["--recipe", "photos64", "--images", "1", "--size", "tiny", "--grid-tokens", "4"]
    options += ["--batch-sizes", "1", "--device", "cpu", "--out", str(out)]
    assert main(["bench", "gpu", *options, "--reference", str(REFERENCE)]) == 0
    record = json.loads(out.read_text())
    assert record["left_out"] == []
    assert record["flops_per_second"] > 0
    for what in ("encode", "decode", "train step"):
        measured = record["images"][what]
        # A pass with gradients has about three times the products.
        assert measured["flops"] > 0
        seconds = sorted(measured["seconds"])[len(measured["seconds"]) // 2]
        share = measured["flops"] / seconds / record["flops_per_second"]
        assert measured["utilisation"] == pytest.approx(share)
    assert record["images"]["train step"]["flops"] > 2 * record["images"]["decode"]["flops"]
    ways = {(speed["order"], speed["way"]) for speed in record["speeds"]}
    assert {("merge", "mergevq"), ("random", "mergevq"), ("raster", "buffer")} <= ways
    assert "product's rate" in capsys.readouterr().out


def test_after_the_time_is_up_nothing_is_begun(tmp_path):
    out = tmp_path / "gpu.json"
    options = ["--recipe", "photos64", "--images", "1", "--size", "tiny", "--grid-tokens", "4"]
    assert main(["bench", "gpu", *options, "--minutes", "0", "--out", str(out)]) == 0
    record = json.loads(out.read_text())
    assert record["left_out"] == [
        "encode, decode and train step",
        "sampling 1 at once",
        "sampling 64 at once",
    ]
    assert record["images"] == {}
    assert record["speeds"] == []
