"""A run's directory, log, device, random numbers and end, as the loops use them."""

import io
import json
import math
import os
import re
import signal
import subprocess
import sys
import threading
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import distributed
from torch.testing._internal.distributed.fake_pg import FakeStore

from mergevq.config import (
    FORMAT_VERSION,
    OptimConfig,
    TokenizerRun,
    TrainConfig,
)
from mergevq.config_generator import GeneratorRun
from mergevq.distributed import World
from mergevq.identity import Identity
from mergevq.run import (
    MetricsLog,
    Progress,
    RunDirectory,
    autocast,
    command_line,
    describe_batch,
    environment,
    format_line,
    on_sigterm,
    read_metrics,
    resolve_device,
    resolve_precision,
    step_generator,
)

CPU = torch.device("cpu")
RUN = TokenizerRun()


class Terminal(io.StringIO):
    """A stream that says it is a terminal."""

    def isatty(self) -> bool:
        return True


def read_lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


# ------------------------------------------------------------------------------- run directory


@pytest.mark.parametrize("program", ["bin/mergevq", "site-packages/mergevq/__main__.py"])
def test_a_new_run_records_what_it_is_and_where_it_came_from(tmp_path, monkeypatch, program):
    monkeypatch.setattr(sys, "argv", [program, "train", "digits32", "--out", "a b"])
    directory = RunDirectory(tmp_path / "runs/new")
    directory.open(RUN, device=CPU, resume=False)
    record = json.loads((tmp_path / "runs/new/run.json").read_text())
    assert record["format_version"] == FORMAT_VERSION
    assert record["run"]["model"]["num_kept"] == RUN.model.num_kept
    assert record["environment"]["torch"] == str(torch.__version__)
    assert record["environment"]["device"] == "cpu"
    assert record["command"] == "mergevq train digits32 --out 'a b'"
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\+00:00", record["started_at"])
    assert record["resumed"] == []


def test_a_directory_with_anything_in_it_is_not_overwritten(tmp_path):
    directory = RunDirectory(tmp_path)
    (tmp_path / "thesis.tex").write_text("precious")
    with pytest.raises(ValueError, match="is not empty; continue the run in it with --resume, ch"):
        directory.open(RUN, device=CPU, resume=False)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_an_empty_directory_may_be_used(tmp_path):
    RunDirectory(tmp_path).open(RUN, device=CPU, resume=False)
    assert (tmp_path / "run.json").is_file()


def test_resuming_needs_a_run(tmp_path):
    with pytest.raises(ValueError, match=r"holds no run to resume: there is no run\.json"):
        RunDirectory(tmp_path).open(RUN, device=CPU, resume=True)


def test_resuming_keeps_the_beginning_and_notes_what_changed(tmp_path):
    directory = RunDirectory(tmp_path)
    directory.open(RUN, device=CPU, resume=False)
    started_at = json.loads(directory.record.read_text())["started_at"]
    longer = replace(RUN, train=TrainConfig(num_steps=9), optim=OptimConfig(betas=(0.9, 0.95)))
    directory.open(RUN, device=CPU, resume=True)
    directory.open(longer, device=CPU, resume=True)
    record = json.loads(directory.record.read_text())
    assert record["started_at"] == started_at
    assert record["run"]["train"]["num_steps"] == 9
    assert [entry["changed"] for entry in record["resumed"]] == [
        {},
        {"optim.betas": [[0.5, 0.9], [0.9, 0.95]], "train.num_steps": [1000, 9]},
    ]


def test_a_setting_that_differs_is_said_and_one_of_the_model_is_refused(tmp_path, caplog):
    """Every setting: it is kept, or it is printed with both values, or it is refused with both."""
    directory = RunDirectory(tmp_path)
    directory.open(RUN, device=CPU, resume=False)
    # Equal shapes: nothing but the settings tells the difference.
    heads = replace(RUN, model=replace(RUN.model, num_heads=4))
    message = r"another model: model\.num_heads \(4\) must be 8; resume with these settings"
    with pytest.raises(ValueError, match=message):
        directory.open(heads, device=CPU, resume=True)
    assert json.loads(directory.record.read_text())["run"]["model"]["num_heads"] == 8
    other = replace(
        RUN,
        data=replace(RUN.data, path="elsewhere"),
        loss=replace(RUN.loss, adversarial_weight=0.0),
        train=TrainConfig(seed=3, batch_size=32),
        out=str(tmp_path),
    )
    directory.open(other, device=CPU, resume=True)
    said = [record.getMessage() for record in caplog.records]
    assert [line.partition("another ")[2] for line in said] == [
        "data.path: digits before, elsewhere now",
        "loss.adversarial_weight: 0.1 before, 0.0 now",
        "train.batch_size: 64 before, 32 now",
        "train.seed: 0 before, 3 now",
    ]


def test_a_setting_that_came_later_had_its_default(tmp_path, caplog):
    directory = RunDirectory(tmp_path)
    directory.open(RUN, device=CPU, resume=False)
    record = json.loads(directory.record.read_text())
    del record["run"]["train"]["tensorboard"], record["run"]["model"]["num_heads"]
    del record["made_from"]
    directory.record.write_text(json.dumps(record))
    directory.open(RUN, device=CPU, resume=True, made_from=Identity(class_names=("a",)))
    assert caplog.text == ""


def test_a_run_of_another_recipe_is_refused_in_one_line(tmp_path):
    directory = RunDirectory(tmp_path)
    directory.open(RUN, device=CPU, resume=False)
    message = r"holds a run with the settings model, kept, data.*this one has model, tokens"
    with pytest.raises(ValueError, match=message):
        directory.open(GeneratorRun(), device=CPU, resume=True)


def test_other_classes_are_refused_where_they_are_learned_and_said_where_not(tmp_path, caplog):
    directory = RunDirectory(tmp_path)
    pets, cars = (Identity(class_names=names) for names in (("cat", "dog"), ("bus", "van")))
    directory.open(RUN, device=CPU, resume=False, made_from=pets)
    with pytest.raises(ValueError, match=r"cat, dog \(of 2\) there and bus, van \(of 2\) here"):
        directory.open(RUN, device=CPU, resume=True, made_from=cars, learns_labels=True)
    directory.open(RUN, device=CPU, resume=True, made_from=cars)
    assert "another data: class_names: ['cat', 'dog'] before, ['bus', 'van'] now" in caplog.text
    with pytest.raises(ValueError, match="trained on tokens of tokenizer , and these are of abc"):
        directory.open(RUN, device=CPU, resume=True, made_from=replace(cars, tokenizer="abc"))


def test_two_processes_are_not_in_one_directory(tmp_path, monkeypatch):
    monkeypatch.setattr("mergevq.run._LOCK_SECONDS", 0.05)
    with RunDirectory(tmp_path / "run") as directory:
        directory.open(RUN, device=CPU, resume=False)
        code = (
            "import sys, torch\n"
            "from mergevq import run\n"
            "from mergevq.config import TokenizerRun\n"
            "run._LOCK_SECONDS = 0.05\n"
            "try:\n"
            "    run.RunDirectory(sys.argv[1]).open(\n"
            "        TokenizerRun(), device=torch.device('cpu'), resume=True)\n"
            "except ValueError as error:\n"
            "    print(error)\n"
        )
        command = [sys.executable, "-c", code, str(directory.path)]
        refused = subprocess.run(command, capture_output=True, text=True, check=True)
        assert "another process is training in" in refused.stdout
        with pytest.raises(ValueError, match="another process is training"):
            RunDirectory(tmp_path / "run").open(RUN, device=CPU, resume=True)
        assert json.loads(directory.record.read_text())["resumed"] == []
    RunDirectory(tmp_path / "run").open(RUN, device=CPU, resume=True)


def test_a_lock_that_is_left_behind_does_not_fill_a_directory(tmp_path):
    (tmp_path / "run.lock").touch()
    RunDirectory(tmp_path).open(RUN, device=CPU, resume=False)


def test_a_run_directory_has_a_place_for_everything(tmp_path):
    directory = RunDirectory(tmp_path)
    places = (directory.metrics, directory.checkpoints, directory.model, directory.images)
    assert [place.name for place in places] == ["metrics.jsonl", "checkpoints", "model", "images"]
    assert directory.curves == tmp_path / "curves.png"
    assert {place.parent for place in places} == {tmp_path}


def test_the_environment_is_json():
    assert json.loads(json.dumps(environment(CPU)))["num_threads"] == torch.get_num_threads()


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


# -------------------------------------------------------------------------- device and precision


def test_the_cpu_is_always_there_and_auto_finds_something():
    assert resolve_device("cpu") == CPU
    assert torch.ones(1, device=resolve_device("auto")).item() == 1


def test_auto_prefers_a_gpu_and_falls_back_to_the_cpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    assert resolve_device("auto").type == "cpu"
    with pytest.raises(ValueError, match=r"device \(cuda\) must be .*: auto or cpu$"):
        resolve_device("cuda")
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert resolve_device("auto").type == "mps"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert resolve_device("auto").type == "cuda"


def test_an_unknown_device_is_refused_with_those_there_are():
    with pytest.raises(ValueError, match=r"device \(tpu\) must be one .* auto or .*cpu"):
        resolve_device("tpu")


@pytest.mark.parametrize(
    ("capabilities", "expected"),
    [
        ({"avx512_bf16": True}, torch.bfloat16),
        ({"amx_bf16": True}, torch.bfloat16),
        ({"avx512_f": True, "avx512_bf16": False}, None),
    ],
)
def test_auto_precision_on_a_cpu_is_what_it_multiplies(monkeypatch, capabilities, expected):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities)
    assert resolve_precision("auto", CPU) is expected


@pytest.mark.parametrize(("native", "expected"), [(True, torch.bfloat16), (False, None)])
def test_auto_precision_on_a_gpu_does_not_count_emulation(monkeypatch, native, expected):
    monkeypatch.setattr(
        torch.cuda, "is_bf16_supported", lambda including_emulation: including_emulation or native
    )
    assert resolve_precision("auto", torch.device("cuda")) is expected


def test_float16_is_never_chosen_but_given_on_request():
    assert resolve_precision("auto", torch.device("mps")) is None
    assert resolve_precision("float32", CPU) is None
    assert resolve_precision("bf16", CPU) is torch.bfloat16
    assert resolve_precision("float16", CPU) is torch.float16


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_autocast_multiplies_in_the_given_dtype(dtype):
    with autocast(CPU, dtype):
        product = torch.ones(2, 2) @ torch.ones(2, 2)
    assert product.dtype == (dtype or torch.float32)


def test_no_dtype_means_float32_even_inside_another_autocast():
    with autocast(CPU, torch.bfloat16), autocast(CPU, None):
        product = torch.ones(2, 2) @ torch.ones(2, 2)
    assert product.dtype == torch.float32


# -------------------------------------------------------------------------------- random numbers


def draw(seed: int, *ids: int | str) -> float:
    return torch.rand((), generator=step_generator(seed, *ids), dtype=torch.float64).item()


def test_draws_depend_on_seed_and_ids_alone():
    expected = draw(0, "image", 5)
    torch.manual_seed(123)
    draw(0, "image", 4)
    assert draw(0, "image", 5) == expected


def test_every_seed_purpose_and_number_has_its_own_draws():
    keys = [(0, "a", 1), (1, "a", 1), (0, "b", 1), (0, "a", 2), (0, "a", 1, 1), (0, 1), (0, "1", 1)]
    assert len({draw(*key) for key in keys}) == len(keys)


def test_no_two_images_of_a_large_run_share_a_seed():
    # Torch's CPU generator sees the low 32 bits only, so those must differ.
    seeds = [step_generator(0, "image", k).initial_seed() for k in (0, 1, 2, 10**6, 2**32 - 1)]
    assert [(seed - seeds[0]) % 2**32 for seed in seeds] == [0, 1, 2, 10**6, 2**32 - 1]


def test_draws_are_the_same_on_every_machine_and_in_every_process():
    assert step_generator(0, "image", 5).initial_seed() == 14599848757542540231


@pytest.mark.parametrize("ids", [(), (3, "image")])
def test_ids_end_with_a_number(ids):
    with pytest.raises(ValueError, match="must end with a number"):
        step_generator(0, *ids)


# ------------------------------------------------------------------------------------- the end


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_becomes_a_request_and_handlers_return(number):
    numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
    before = [signal.getsignal(each) for each in numbers]
    with on_sigterm() as stop:
        assert not stop.requested
        os.kill(os.getpid(), number)
        assert stop.requested
        assert stop.is_due
    assert [signal.getsignal(each) for each in numbers] == before


def test_a_run_that_ignores_a_closed_terminal_goes_on_ignoring_it():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
    try:
        with on_sigterm() as stop:
            os.kill(os.getpid(), signal.SIGHUP)
            assert not stop.requested
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_run_stops_when_its_minutes_are_over(monkeypatch):
    now = [100.0]
    monkeypatch.setattr("mergevq.run.time.monotonic", lambda: now[0])
    with on_sigterm(max_minutes=2.0) as stop, on_sigterm() as endless:
        assert not stop.is_due
        now[0] += 119.9
        assert not stop.is_due
        now[0] += 0.1
        assert stop.is_due
        assert not endless.is_due


@pytest.mark.slow
def test_a_second_interrupt_kills():
    code = (
        "import os, signal\n"
        "from mergevq.run import on_sigterm\n"
        "with on_sigterm() as stop:\n"
        "    os.kill(os.getpid(), signal.SIGINT)\n"
        "    print(stop.requested, flush=True)\n"
        "    os.kill(os.getpid(), signal.SIGINT)\n"
        "    print('survived')\n"
    )
    finished = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False
    )
    assert (finished.stdout, finished.returncode) == ("True\n", -signal.SIGINT)


def test_outside_the_main_thread_nothing_is_installed():
    seen = []

    def work() -> None:
        with on_sigterm() as stop:
            seen.append(stop.requested)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [False]


@pytest.mark.parametrize("program", ["/opt/bin/mergevq", "/opt/lib/mergevq/__main__.py"])
def test_a_command_does_not_say_where_its_program_lies(program, monkeypatch):
    monkeypatch.setattr("sys.argv", [program, "train", "digits32", "--out", "a b"])
    assert command_line() == "mergevq train digits32 --out 'a b'"


@pytest.mark.parametrize("name", ["run", "resumed"])
@pytest.mark.parametrize("value", [3, None])
def test_a_record_of_a_run_that_lacks_something_is_not_resumed(tmp_path, name, value):
    directory = RunDirectory(tmp_path / "run")
    directory.open(TokenizerRun(), device=torch.device("cpu"), resume=False)
    record = json.loads(directory.record.read_text()) | {name: value}
    directory.record.write_text(json.dumps(record))
    with pytest.raises(ValueError, match=rf"run.json is damaged: {name} must be there"):
        directory.open(TokenizerRun(), device=torch.device("cpu"), resume=True)


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
