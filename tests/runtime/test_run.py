"""A run's directory, log, device, random numbers and end, as the loops use them."""

import json
import os
import re
import signal
import subprocess
import sys
import threading
from dataclasses import replace

import pytest
import torch

from mergevq.config.base import FORMAT_VERSION
from mergevq.config.identity import Identity
from mergevq.config.objective import (
    Cosine,
    Dino,
    HuggingFace,
    Kl,
    Labels,
    NoTeacher,
    SelfDistillation,
)
from mergevq.config.training import GeneratorRun, OptimConfig, TokenizerRun, TokenizerTrainConfig
from mergevq.runtime import run as runtime_run
from mergevq.runtime.run import (
    RunDirectory,
    command_line,
    environment,
    on_sigterm,
    read_run_record,
)
from mergevq.runtime.settings import to_json
from tests.support.parts import changed

CPU = torch.device("cpu")
RUN = TokenizerRun()


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
    longer = replace(
        RUN, train=TokenizerTrainConfig(num_steps=9), optim=OptimConfig(betas=(0.9, 0.95))
    )
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
    heads = replace(RUN, model=changed(RUN.model, num_heads=4))
    message = r"another model: model\.reducer\.num_heads \(4\) must be 8; resume with these"
    with pytest.raises(ValueError, match=message):
        directory.open(heads, device=CPU, resume=True)
    assert json.loads(directory.record.read_text())["run"]["model"]["reducer"]["num_heads"] == 8
    other = replace(
        RUN,
        data=replace(RUN.data, path="elsewhere"),
        loss=replace(RUN.loss, adversarial_weight=0.0),
        train=TokenizerTrainConfig(seed=3, batch_size=32),
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
    del record["run"]["train"]["tensorboard"], record["run"]["model"]["reducer"]["num_heads"]
    del record["run"]["init_codes"]
    del record["made_from"]
    directory.record.write_text(json.dumps(record))
    directory.open(RUN, device=CPU, resume=True, made_from=Identity(class_names=("a",)))
    assert caplog.text == ""


@pytest.mark.parametrize(
    ("run", "own", "foreign"),
    [
        (replace(RUN, quantize_start_step=7), ("quantize_start_step", 7), ("parallel", "ddp")),
        (GeneratorRun(parallel="fsdp"), ("parallel", "fsdp"), ("quantize_start_step", 0)),
    ],
)
def test_settings_that_moved_out_of_the_loops_are_read_where_they_were(
    tmp_path, caplog, run, own, foreign
):
    directory = RunDirectory(tmp_path)
    directory.open(run, device=CPU, resume=False)
    record = json.loads(directory.record.read_text())
    assert record["run"].pop(own[0]) == own[1]
    record["run"]["train"] |= dict([own, foreign])
    directory.record.write_text(json.dumps(record))
    assert read_run_record(directory.record)["run"] == json.loads(json.dumps(to_json(run)))
    directory.open(run, device=CPU, resume=True)
    assert caplog.text == ""


@pytest.mark.parametrize(
    ("kind", "others", "teacher"),
    [
        ("none", {}, NoTeacher()),
        ("labels", {"label_smoothing": 0.25}, Labels(label_smoothing=0.25)),
        (
            "self",
            {"momentum": 0.5, "teacher_temperature": 0.5},
            SelfDistillation(momentum=0.5, teacher_temperature=0.5),
        ),
        ("dinov2", {"teacher_size": 98}, HuggingFace(teacher_size=98)),
        (
            "huggingface",
            {"path": "a folder", "loss": "dino", "student_temperature": 0.5},
            HuggingFace(path="a folder", loss=Dino(student_temperature=0.5)),
        ),
        ("huggingface", {"loss": "kl", "temperature": 2.0}, HuggingFace(loss=Kl(temperature=2.0))),
        ("huggingface", {"loss": "cosine"}, HuggingFace(loss=Cosine())),
    ],
)
def test_a_teacher_from_before_there_was_a_class_for_each_is_read(
    tmp_path, caplog, kind, others, teacher
):
    flat = {
        "kind": kind,
        "path": None,
        "loss": "kl",
        "temperature": 4.0,
        "view_size": None,
        "teacher_size": 224,
        "num_head_layers": 3,
        "num_prototypes": 1024,
        "momentum": 0.996,
        "student_temperature": 0.1,
        "teacher_temperature": 0.04,
        "label_smoothing": 0.1,
    }
    run = replace(RUN, teacher=teacher)
    directory = RunDirectory(tmp_path)
    directory.open(run, device=CPU, resume=False)
    record = json.loads(directory.record.read_text())
    record["run"]["teacher"] = flat | others
    directory.record.write_text(json.dumps(record))
    directory.open(run, device=CPU, resume=True)
    assert caplog.text == ""


@pytest.mark.parametrize("teacher", [3, {}, {"kind": 3}, {"kind": "owl", "momentum": 1}])
def test_a_teacher_that_never_was_is_refused_where_its_run_is_resumed(tmp_path, teacher):
    directory = RunDirectory(tmp_path)
    directory.open(RUN, device=CPU, resume=False)
    record = json.loads(directory.record.read_text())
    record["run"]["teacher"] = teacher
    directory.record.write_text(json.dumps(record))
    with pytest.raises(ValueError, match="teacher"):
        directory.open(RUN, device=CPU, resume=True)


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
    monkeypatch.setattr("mergevq.runtime.run._LOCK_SECONDS", 0.05)
    with RunDirectory(tmp_path / "run") as directory:
        directory.open(RUN, device=CPU, resume=False)
        code = (
            "import sys, torch\n"
            "from mergevq.runtime import run\n"
            "from mergevq.config.training import TokenizerRun\n"
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


# ------------------------------------------------------------------------------------- the end


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_becomes_a_request_and_handlers_return(number):
    numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
    before = [signal.getsignal(each) for each in numbers]
    with on_sigterm() as stop:
        assert not stop.requested
        os.kill(os.getpid(), number)
        assert stop.requested
    assert [signal.getsignal(each) for each in numbers] == before


def test_a_run_that_ignores_a_closed_terminal_goes_on_ignoring_it():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
    try:
        with on_sigterm() as stop:
            os.kill(os.getpid(), signal.SIGHUP)
            assert not stop.requested
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.slow
def test_a_second_interrupt_kills():
    code = (
        "import os, signal\n"
        "from mergevq.runtime.run import on_sigterm\n"
        # A shell lets what it runs in the background ignore interrupts.
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
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


# ----------------------------------------------------------------------------------- provenance


def test_a_commit_is_a_hash_or_unknown(monkeypatch, tmp_path):
    commit = runtime_run.git_commit()
    assert commit is None or set(commit.removesuffix("-dirty")) <= set("0123456789abcdef")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert runtime_run.git_commit() is None
