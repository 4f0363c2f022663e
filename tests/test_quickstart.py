"""The quickstart end to end on a tiny model, and what a second call does."""

import json
import os
import shutil
import signal
import threading
import time
from dataclasses import replace

import pytest
from PIL import Image

from mergevq.cli import main
from mergevq.merge import source_bits
from mergevq.quickstart import (
    examine,
    numbers_section,
    quickstart,
    run_and_report,
    training_seconds,
)
from mergevq.recipes import digits32, shrink
from mergevq.tokenizer import Tokenizer

pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")

SHRUNK = shrink(digits32())
RUN = replace(
    SHRUNK,
    data=replace(SHRUNK.data, val_fraction=0.04),
    # Validation looks at every held-out image, as the report does.
    train=replace(
        SHRUNK.train,
        precision="float32",
        num_eval_images=1000,
        eval_num_kept=(16, 24),
        save_every=1,
    ),
)
PICTURES = {"reconstructions", "tokens", "losses", "psnr", "bits", "codebook"}


def with_steps(num_steps):
    return replace(RUN, train=replace(RUN.train, num_steps=num_steps))


def contents(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """Directory of a finished quickstart; tests that change it take a copy."""
    out = tmp_path_factory.mktemp("quickstart") / "out"
    assert run_and_report(RUN, out) == out / "report.html"
    return out


@pytest.fixture(scope="module")
def trial(finished):
    return examine(replace(RUN, out=str(finished / "tokenizer")))


# -------------------------------------------------------------------------------- what it makes


def test_a_quickstart_leaves_a_report_pictures_and_a_tokenizer(finished):
    page = (finished / "report.html").read_text(encoding="utf-8")
    for title in ("Reconstructions", "Numbers", "Training", "Codes", "This run"):
        assert f"<h2>{title}</h2>" in page
    assert {path.stem for path in finished.glob("*.png")} == PICTURES
    assert page.count("data:image/png;base64,") == len(PICTURES)
    assert Tokenizer.from_pretrained(finished / "tokenizer" / "model").config.num_bits == 12


def test_the_report_names_command_hardware_and_time(finished):
    page = (finished / "report.html").read_text(encoding="utf-8")
    record = json.loads((finished / "tokenizer" / "run.json").read_text())
    for name in ("Command", "Training time", "Images per second", "Hardware", "Commit"):
        assert f'<th scope="row">{name}</th>' in page
    assert record["environment"]["platform"] in page


def test_the_numbers_are_those_of_the_last_validation(trial):
    last = trial.log[-1]
    rows = {name: values for name, *values in numbers_section(trial).tables[0].rows}
    for row, name, digits in (
        ("PSNR, given source (dB)", "psnr", 2),
        ("PSNR, recovered source (dB)", "psnr_recovered", 2),
        ("SSIM, given source", "ssim", 4),
        ("SSIM, recovered source", "ssim_recovered", 4),
    ):
        assert rows[row] == [f"{last[f'{name}@{k}']:.{digits}f}" for k in (16, 24)]
    assert rows["Source accuracy"][1] == f"{100 * last['source_accuracy@24']:.1f} %"


def test_bits_are_those_of_the_tokens_and_of_the_source(trial):
    table = numbers_section(trial).tables[0]
    rows = {name: values for name, *values in table.rows}
    totals = [192 + source_bits(64, 16), 288 + source_bits(64, 24)]
    assert table.header == ["", "K = 16", "K = 24"]
    assert rows["Bits per image: tokens"] == ["192", "288"]
    assert rows["Bits per image: source"] == [f"{source_bits(64, k):.1f}" for k in (16, 24)]
    assert rows["Bits per image: total"] == [f"{total:.1f}" for total in totals]
    assert rows["Bits per pixel"] == [f"{total / 32**2:.3f}" for total in totals]


def test_one_digit_of_each_class_is_pictured(trial, finished):
    assert trial.labels == list("0123456789")
    assert [len(pictured.given) for pictured in trial.pictured] == [10, 10]
    with Image.open(finished / "reconstructions.png") as four_columns:
        width, height = four_columns.size
    with Image.open(finished / "tokens.png") as five_columns:
        assert five_columns.size == (width + 140, height)
    assert height > 10 * 128


def test_every_token_of_the_held_out_images_is_counted(trial):
    assert trial.usage.num_tokens == 16 * trial.num_images
    assert len(trial.usage.bit_probs) == 12


def test_training_time_is_added_up_from_the_logged_rates():
    log = [
        {"step": 0, "images_per_second": 8.0},
        {"step": 10, "images_per_second": 4.0},
        {"step": 11, "psnr@16": 20.0},
        {"step": 12, "images_per_second": 4.0},
    ]
    assert training_seconds(log, batch_size=8) == pytest.approx(1 + 20 + 4)


# --------------------------------------------------------------------------------- second calls


def test_a_finished_quickstart_is_only_reported_on_again(finished, tmp_path, caplog):
    # Moved, to show that a run may be.
    out = tmp_path / "moved"
    shutil.copytree(finished, out)
    (out / "report.html").unlink()
    before = contents(out / "tokenizer")
    run_and_report(RUN, out)
    assert contents(out / "tokenizer") == before
    assert (out / "report.html").is_file()
    assert "only the report is made again" in caplog.text


def test_an_interrupted_quickstart_goes_on(finished, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(finished, out)
    shutil.rmtree(out / "tokenizer" / "model")
    shutil.rmtree(out / "tokenizer" / "checkpoints" / "step-00000002")
    run_and_report(RUN, out)
    assert len(json.loads((out / "tokenizer" / "run.json").read_text())["resumed"]) == 1
    weights = "tokenizer/model/model.safetensors"
    assert (out / weights).read_bytes() == (finished / weights).read_bytes()
    assert '<th scope="row">Interruptions</th><td>1</td>' in (out / "report.html").read_text()


def test_an_interruption_says_how_to_go_on(tmp_path):
    log = tmp_path / "out" / "tokenizer" / "metrics.jsonl"

    def interrupt():
        while not (log.is_file() and log.stat().st_size):
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGTERM)

    thread = threading.Thread(target=interrupt, daemon=True)
    thread.start()
    with pytest.raises(RuntimeError, match=r"step \d+ of 5000; the same command goes on"):
        run_and_report(with_steps(5000), tmp_path / "out")
    thread.join()
    assert not (tmp_path / "out" / "report.html").exists()


def test_other_settings_are_refused_and_nothing_is_touched(finished):
    before = contents(finished)
    with pytest.raises(
        ValueError, match=r"train.num_steps is 2 there and 3 here.*--out, or delete"
    ):
        run_and_report(with_steps(3), finished)
    assert contents(finished) == before


def test_a_directory_of_something_else_is_refused(tmp_path, capsys):
    (tmp_path / "report.html").write_text("mine")
    assert main(["quickstart", "--out", str(tmp_path)]) == 1
    assert "is not empty and holds no quickstart" in capsys.readouterr().err
    assert contents(tmp_path) == {tmp_path / "report.html": b"mine"}


def test_an_impossible_number_of_steps_leaves_nothing_behind(tmp_path):
    with pytest.raises(ValueError, match=r"num_steps \(0\) must be at least 1"):
        quickstart(tmp_path / "out", num_steps=0)
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_the_command_runs_the_recipe_and_says_where_the_report_is(tmp_path, capsys):
    assert main(["quickstart", "--out", str(tmp_path / "out"), "--num-steps", "1"]) == 0
    printed = capsys.readouterr().out
    assert f"report: {tmp_path / 'out' / 'report.html'}" in printed
    assert printed.count("picture: ") == len(PICTURES)
