"""Tests of `mergevq.runtime.logs`."""

import io
import json
import math
import re
import sys
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import distributed
from torch.testing._internal.distributed.fake_pg import FakeStore

from mergevq.config.training import OptimConfig, TokenizerRun, TrainConfig
from mergevq.runtime.distributed import World
from mergevq.runtime.logs import MetricsLog, Progress, describe_batch, format_line, read_metrics
from mergevq.runtime.run import RunDirectory

CPU = torch.device("cpu")
RUN = TokenizerRun()


class Terminal(io.StringIO):
    """A stream that says it is a terminal."""

    def isatty(self) -> bool:
        return True


def read_lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


# ------------------------------------------------------------------------------------- logging


def test_a_log_line_is_the_same_numbers_for_people_and_programs(tmp_path, capsys):
    log = MetricsLog(tmp_path / "metrics.jsonl")
    log.write(20, {"loss": 0.123456789, "images": 1280})
    # Read before closing: a killed run keeps every line it has shown.
    assert read_lines(tmp_path / "metrics.jsonl") == [
        {"step": 20, "loss": 0.123456789, "images": 1280}
    ]
    log.close()
    assert capsys.readouterr().err == "step      20  loss    0.1235  images      1280\n"


def test_a_note_is_shown_and_is_no_line_of_the_log(tmp_path, capsys):
    log = MetricsLog(tmp_path / "metrics.jsonl")
    log.note("batch of 4 images")
    log.write(3, {"loss": 0.5})
    log.close()
    assert capsys.readouterr().err.splitlines()[0] == "batch of 4 images"
    assert read_metrics(tmp_path / "metrics.jsonl") == [{"step": 3, "loss": 0.5}]


def test_the_batch_is_described_as_it_is_cut_and_with_the_rate_that_is_used():
    world = World(rank=1, world_size=4, local_rank=1, device=CPU)
    train = TrainConfig(batch_size=48, accumulation=3)
    optim = OptimConfig(lr=1e-3, base_batch_size=96)
    assert describe_batch(train, optim, world, unit="images") == (
        "batch of 48 images: ranks 4 x accumulation 3 x 4; peak learning rate 0.0005 "
        "(optim.lr 0.001 at a batch of 96)"
    )
    unscaled = describe_batch(train, replace(optim, base_batch_size=None), world, unit="images")
    assert unscaled.endswith("peak learning rate 0.001 (optim.lr 0.001 at a batch of 48)")


def test_log_lines_are_aligned():
    lines = [format_line(7, {"loss": 12.5}), format_line(70000, {"loss": -1.25e-7})]
    assert len(lines[0]) == len(lines[1])


def test_numbers_that_are_not_finite_leave_the_json_valid(tmp_path, capsys):
    log = MetricsLog(tmp_path / "metrics.jsonl")
    log.write(1, {"loss": math.nan, "norm": math.inf, "rate": 0.1})
    log.close()
    text = (tmp_path / "metrics.jsonl").read_text()
    assert json.loads(text, parse_constant=pytest.fail) == {
        "step": 1,
        "loss": None,
        "norm": None,
        "rate": 0.1,
        "nonfinite": ["loss", "norm"],
    }
    assert "nan" in capsys.readouterr().err


def test_a_value_cannot_replace_the_step(tmp_path):
    with (
        closing(MetricsLog(tmp_path / "metrics.jsonl")) as log,
        pytest.raises(ValueError, match=r"values \['step'\] must not be named step"),
    ):
        log.write(1, {"step": 2})


def test_a_resumed_log_has_no_step_twice(tmp_path):
    path = tmp_path / "metrics.jsonl"
    log = MetricsLog(path)
    for step in (0, 10, 20, 30):
        log.write(step, {"loss": float(step)})
    log.close()
    resumed = MetricsLog(path, first_step=20)
    resumed.write(20, {"loss": -1.0})
    resumed.close()
    assert [(line["step"], line["loss"]) for line in read_lines(path)] == [
        (0, 0.0),
        (10, 10.0),
        (20, -1.0),
    ]


def test_a_line_cut_by_a_crash_is_dropped(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 0}\n{"step": 1, "lo')
    MetricsLog(path, first_step=9).close()
    assert path.read_text() == '{"step": 0}\n'


@pytest.mark.parametrize("line", ["noise", "[1]", '{"loss": 1}'])
def test_a_file_that_is_no_log_is_not_cut(tmp_path, line):
    path = tmp_path / "metrics.jsonl"
    path.write_text(f'{{"step": 0}}\n{line}\n')
    with pytest.raises(ValueError, match=r"line 2 of .* is no log line"):
        MetricsLog(path, first_step=9)
    assert path.read_text() == f'{{"step": 0}}\n{line}\n'


def test_tensorboard_gets_the_same_numbers(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    log = MetricsLog(tmp_path / "metrics.jsonl", tensorboard=True)
    log.write(20, {"loss": 0.5})
    log.close()
    events = EventAccumulator(str(tmp_path)).Reload().Scalars("loss")
    assert [(event.step, event.value) for event in events] == [(20, 0.5)]


def test_tensorboard_without_the_extra_names_the_command(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(RuntimeError, match="pip install tensorboard"):
        MetricsLog(tmp_path / "metrics.jsonl", tensorboard=True)


def test_progress_off_a_terminal_is_lines(capsys):
    progress = Progress(10, done=4, unit="image", interval_seconds=0.0)
    progress.update()
    progress.update(5)
    progress.close()
    first, last = capsys.readouterr().err.splitlines()
    assert re.fullmatch(r"image 5/10, [\d.e+]+ image/s, \d\d:\d\d left", first)
    assert re.fullmatch(r"image 10/10, [\d.e+]+ image/s, 00:00 left", last)


def test_progress_lines_are_rare_but_the_last_is_shown(capsys):
    progress = Progress(100, interval_seconds=3600.0)
    for _ in range(100):
        progress.update()
    progress.close()
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("step 100/100, ")


def test_progress_on_a_terminal_is_a_bar(monkeypatch):
    stream = Terminal()
    monkeypatch.setattr(sys, "stderr", stream)
    progress = Progress(10, done=5)
    progress.update(5)
    progress.close()
    assert "50%" in stream.getvalue()
    assert "10/10" in stream.getvalue()


@pytest.fixture
def second_rank():
    """This process is rank 1 of 2, in a group that sends nothing."""
    distributed.init_process_group("fake", rank=1, world_size=2, store=FakeStore())
    yield
    distributed.destroy_process_group()


@pytest.mark.usefixtures("second_rank")
def test_other_ranks_write_and_show_nothing(tmp_path, capsys):
    with closing(MetricsLog(tmp_path / "metrics.jsonl", tensorboard=True)) as log:
        log.write(1, {"loss": 0.5})
        log.note("batch of 4 images")
    RunDirectory(tmp_path / "new").open(RUN, device=CPU, resume=False)
    with closing(Progress(1, interval_seconds=0.0)) as progress:
        progress.update()
    assert list(tmp_path.iterdir()) == []
    assert capsys.readouterr().err == ""


def test_a_brief_log_shows_validations_at_one_k_and_keeps_all(tmp_path, capsys):
    log = MetricsLog(tmp_path / "metrics.jsonl", brief=16)
    log.note("a long line")
    log.write(0, {"loss": 3.0})
    log.write(1, {"loss": 2.0, "psnr@16": 20.0, "psnr@24": 21.0}, shown={"loss"})
    log.close()
    assert [line.split() for line in capsys.readouterr().err.splitlines()] == [
        ["step", "1", "psnr@16", "20"]
    ]
    assert [line["loss"] for line in read_metrics(tmp_path / "metrics.jsonl")] == [3.0, 2.0]
