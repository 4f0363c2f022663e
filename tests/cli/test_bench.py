import json

import pytest

from mergevq.cli import bench as cli_bench
from tests.support.generators import KINDS


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
    assert printed.splitlines()[-3:] == [
        f"results: {tmp_path / 'speeds.json'}",
        "next:",
        "  mergevq sample --generator GENERATOR --weights bf16",
    ]
    written = json.loads((tmp_path / "speeds.json").read_text())
    found = [(speed["guidance"], speed["order"]) for speed in written["speeds"]]
    assert found == [(scale, kind) for scale in (1.0, 4.0) for kind in KINDS]
    assert written["conditions"]["guidance"] == [1.0, 4.0]
    assert written["conditions"]["max_steps"] == 1
    assert written["conditions"]["torch"]
    assert written["generators"][0]["grid_size"] == [2, 2]


def test_what_the_command_cannot_read_is_an_error():
    with pytest.raises(ValueError, match=r"recipe \(tiny64_gr\) must be a recipe for a generator"):
        cli_bench.generator(recipe="tiny64_gr")
    with pytest.raises(ValueError, match=r"grid_tokens \(a,4\) must be whole numbers from 1"):
        cli_bench.generator(grid_tokens="a,4")
