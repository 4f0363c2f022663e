import json
from pathlib import Path

import pytest

from mergevq.cli import bench as cli_bench
from mergevq.cli.main import main
from tests.support.generators import KINDS

REFERENCE = Path(__file__).resolve().parents[2] / "benchmarks" / "reference_generator.py"


def test_the_command_prints_every_row_and_writes_them_with_the_conditions(tmp_path, capsys):
    cli_bench.generator(
        recipe="digits32_ar",
        grid_tokens="4",
        batch_sizes="1",
        repeats=1,
        max_steps=1,
        weights=("bf16",),
        reference=tmp_path / "none.py",
        device="cpu",
        out=tmp_path / "speeds.json",
    )
    printed = capsys.readouterr().out
    assert "measuring without comparison" in printed
    for name in ("full cache", "MergeAR", "RandAR", "anchored", "MaskGIT"):
        assert f" {name} " in printed
    written = json.loads((tmp_path / "speeds.json").read_text())
    assert [speed["order"] for speed in written["speeds"]] == list(KINDS)
    assert written["conditions"]["max_steps"] == 1
    assert written["conditions"]["torch"]
    assert written["generators"][0]["grid_size"] == [2, 2]


def test_what_the_command_cannot_read_is_an_error():
    with pytest.raises(ValueError, match=r"recipe \(tiny64_gr\) must be a recipe for a generator"):
        cli_bench.generator(recipe="tiny64_gr")
    with pytest.raises(ValueError, match=r"grid_tokens \(a,4\) must be whole numbers from 1"):
        cli_bench.generator(grid_tokens="a,4")


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
