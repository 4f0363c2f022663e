"""The quickstart end to end on a tiny model, and what a second call does."""

import json
import os
import re
import shlex
import shutil
import signal
import sys
import threading
import time
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import replace
from io import StringIO
from pathlib import Path
from typing import NamedTuple

import pytest
from PIL import Image

from mergevq.cli.main import _after_quickstart, main
from mergevq.config.probing import LinearConfig
from mergevq.config.recipes.digits import digits32, digits32_ar
from mergevq.data.batches import open_train_val
from mergevq.data.layouts import source_bits
from mergevq.data.prepare import load_square, to_tensor
from mergevq.demo import quickstart as quickstart_module
from mergevq.demo import trial as trial_module
from mergevq.demo.quickstart import quickstart, run_and_report
from mergevq.demo.sections import generator_sections, numbers_section
from mergevq.demo.trial import GeneratorTrial, Trial, examine, examine_generator
from mergevq.tokenizer.tokenizer import Tokenizer
from tests.support.small import shrink, shrink_generator

pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")

SHRUNK = shrink(digits32())
RUN = replace(
    SHRUNK,
    data=replace(SHRUNK.data, val_fraction=0.04, max_images=400),
    # Validation looks at every held-out image, as the report does.
    train=replace(
        SHRUNK.train,
        precision="float32",
        num_eval_images=1000,
        eval_num_kept=(16, 24),
        save_every=1,
    ),
)
GENERATOR = shrink_generator(digits32_ar())
PICTURES = {"reconstructions", "tokens", "losses", "psnr", "bits", "codebook"}
PICTURES |= {"samples", "memory", "likelihood"}


def with_steps(num_steps):
    return replace(RUN, train=replace(RUN.train, num_steps=num_steps))


def contents(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module", autouse=True)
def _short_measurements():
    """Fewer samples and a shorter probe: every report of this file is measured anew."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trial_module, "_SAMPLES_PER_CLASS", 4)
        patch.setattr(trial_module, "_PROBE", LinearConfig(rates=(1e-2,), num_epochs=2))
        yield


class Done(NamedTuple):
    """One quickstart by its command, for all tests of this file."""

    out: Path
    printed: str
    told: str
    """Lines of the standard error."""
    report: Path
    trial: Trial
    generator_trial: GeneratorTrial


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    out = tmp_path_factory.mktemp("quickstart") / "out"
    printed, told, found = StringIO(), StringIO(), {}

    def noted(name, function):
        def call(*args):
            found[name] = function(*args)
            return found[name]

        return call

    with (
        pytest.MonkeyPatch.context() as patch,
        redirect_stdout(printed),
        redirect_stderr(told),
    ):
        whole = noted("finished", lambda _: run_and_report(RUN, GENERATOR, out))
        patch.setattr(quickstart_module, "run_and_report", lambda *_: whole(None))
        patch.setattr(quickstart_module, "examine", noted("trial", examine))
        patch.setattr(
            quickstart_module, "examine_generator", noted("generator_trial", examine_generator)
        )
        assert main(["quickstart", "--out", str(out)]) == 0
    return Done(
        out,
        printed.getvalue(),
        told.getvalue(),
        found["finished"].report,
        found["trial"],
        found["generator_trial"],
    )


@pytest.fixture(scope="module")
def finished(done):
    """Directory of a finished quickstart; tests that change it take a copy."""
    return done.out


@pytest.fixture(scope="module")
def trial(done):
    return done.trial


@pytest.fixture(scope="module")
def generator_trial(done):
    return done.generator_trial


# -------------------------------------------------------------------------------- what it makes


def test_a_quickstart_leaves_a_report_pictures_and_a_tokenizer(done, finished):
    page = done.report.read_text(encoding="utf-8")
    assert done.report == finished / "report.html"
    for title in ("Reconstructions", "Numbers", "Training", "Codes", "This run"):
        assert f"<h2>{title}</h2>" in page
    assert {path.stem for path in finished.glob("*.png")} == PICTURES
    assert page.count("data:image/png;base64,") == len(PICTURES)
    assert Tokenizer.from_pretrained(finished / "tokenizer" / "model").quantizer.spec.bits == 8


def test_the_report_names_command_hardware_and_time(finished):
    page = (finished / "report.html").read_text(encoding="utf-8")
    record = json.loads((finished / "tokenizer" / "run.json").read_text())
    for name in ("Command", "Tokenizer: time", "Generator: time", "Hardware", "Commit"):
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


def test_a_classifier_says_how_many_digits_it_still_knows(trial):
    rows = {name: values for name, *values in numbers_section(trial).tables[0].rows}
    shares = [trial.recognised[k] for k in (16, 24)]
    given, recovered = rows["Recognised, given source"], rows["Recognised, recovered source"]
    assert given == [f"{100 * share.given:.1f} %" for share in shares]
    assert recovered == [f"{100 * share.recovered:.1f} %" for share in shares]
    # Twelve steps teach the tokenizer nothing, and real digits are real digits.
    assert all(share.given < 0.6 < 0.95 < share.real for share in shares)


def test_nobody_recognises_images_without_classes(trial):
    alone = numbers_section(trial._replace(recognised={}))
    assert not any(name.startswith("Recognised") for name, *_ in alone.tables[0].rows)
    assert "ecognised" not in alone.text


def test_bits_are_those_of_the_tokens_and_of_the_source(trial):
    table = numbers_section(trial).tables[0]
    rows = {name: values for name, *values in table.rows}
    totals = [128 + source_bits(64, 16), 192 + source_bits(64, 24)]
    assert table.header == ["", "K = 16", "K = 24"]
    assert rows["Bits per image: tokens"] == ["128", "192"]
    assert rows["Bits per image: source"] == [f"{source_bits(64, k):.1f}" for k in (16, 24)]
    assert rows["Bits per image: total"] == [f"{total:.1f}" for total in totals]
    coded = [float(bits) for bits in rows["Bits per image: source as coded"]]
    assert all(64 < bits < source_bits(64, k) + 64 for bits, k in zip(coded, (16, 24), strict=True))
    assert rows["Bits per pixel, given source"] == [f"{total / 32**2:.3f}" for total in totals]


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
    assert len(trial.usage.bit_probs) == 8


def test_as_many_samples_of_each_class_are_judged(generator_trial):
    assert generator_trial.class_names == list("0123456789")
    assert [len(row) for row in generator_trial.samples] == [4] * 10
    assert generator_trial.num_real == 62
    # Fitted to 1,735 real digits it knows the others; the generator has learned nothing yet.
    assert generator_trial.real_accuracy > 0.95
    assert generator_trial.accuracy < 0.5
    (section,) = generator_sections(generator_trial)
    assert section.tables[0].rows == [
        ["Images", "62", "40"],
        [
            "Taken for the class they are of",
            f"{100 * generator_trial.real_accuracy:.1f} %",
            f"{100 * generator_trial.accuracy:.1f} %",
        ],
    ]


def test_the_nearest_training_image_is_one(generator_trial):
    train_set, _ = open_train_val(RUN.data)
    real = {load_square(train_set.read(i), 32).numpy().tobytes() for i in range(len(train_set))}
    assert len(generator_trial.nearest) == 10
    assert all(to_tensor(image).numpy().tobytes() in real for image in generator_trial.nearest)


# ------------------------------------------------------------------------------- what is printed


def test_a_quickstart_prints_little_and_ends_with_numbers_and_what_is_next(done):
    noise = ("image ", "sequence ", "row ", "step")  # Bars without a terminal are lines.
    lines = [line for line in done.told.splitlines() if line.strip()]
    validations = [line for line in lines if line.startswith("step")]
    assert [line.split()[2::2] for line in validations] == [
        ["psnr@16", "psnr_recovered@16"],
        ["val_nll@16"],
    ]
    assert len([line for line in lines if not line.startswith(noise)]) <= 10
    assert max(map(len, lines)) < 200
    told = done.printed.splitlines()
    assert told[0] == "reached:"
    assert any("dB" in line and "PSNR, recovered source" in line for line in told)
    assert any("training time" in line for line in told)
    assert [line.split()[1] for line in told[told.index("next:") + 1 :]] == [
        "sample",
        "reconstruct",
        "demo",
        "train",
    ]


def test_what_is_next_after_a_quickstart_can_be_done(finished, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text = _after_quickstart(finished / "tokenizer/model", finished / "generator/model")
    _, *lines = text.splitlines()
    Image.new("RGB", (40, 30)).save("PICTURE.png")
    for line in lines[:2]:
        words = shlex.split(line.replace("PICTURE", "PICTURE.png"))
        assert main(words[1:]) == 0
    assert Path("samples/grid.png").is_file()
    assert Path("reconstructions/PICTURE.png").is_file()


# --------------------------------------------------------------------------------- second calls


def test_a_finished_quickstart_is_only_reported_on_again(done, tmp_path, monkeypatch, caplog):
    # The same measurements: only what is done with them is new.
    monkeypatch.setattr(quickstart_module, "examine", lambda _: done.trial)
    monkeypatch.setattr(quickstart_module, "examine_generator", lambda *_: done.generator_trial)
    finished = done.out
    # Moved, to show that a run may be.
    out = tmp_path / "moved"
    shutil.copytree(finished, out)
    (out / "report.html").unlink()
    before = contents(out / "tokenizer")
    run_and_report(RUN, GENERATOR, out)
    assert contents(out / "tokenizer") == before
    assert (out / "report.html").is_file()
    assert "only the report is made again" in caplog.text


@pytest.mark.slow
def test_without_matplotlib_the_report_has_all_but_its_plots(
    finished, tmp_path, monkeypatch, caplog
):
    out = tmp_path / "out"
    shutil.copytree(finished, out)
    for path in (*out.glob("*.png"), out / "report.html"):
        path.unlink()
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    page = run_and_report(RUN, GENERATOR, out).report.read_text(encoding="utf-8")
    assert {path.stem for path in out.glob("*.png")} == {
        *("reconstructions", "tokens", "samples", "memory")
    }
    for title in ("Reconstructions", "Numbers", "Codes", "Samples", "This run"):
        assert f"<h2>{title}</h2>" in page
    assert sum("needs matplotlib" in message for message in caplog.messages) == 1


@pytest.mark.slow
def test_an_interrupted_quickstart_goes_on(finished, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(finished, out)
    shutil.rmtree(out / "tokenizer" / "model")
    shutil.rmtree(out / "tokenizer" / "checkpoints" / "step-00000002")
    run_and_report(RUN, GENERATOR, out)
    assert len(json.loads((out / "tokenizer" / "run.json").read_text())["resumed"]) == 1
    weights = "tokenizer/model/model.safetensors"
    assert (out / weights).read_bytes() == (finished / weights).read_bytes()
    page = (out / "report.html").read_text()
    assert re.search(r'<th scope="row">Interruptions</th><td[^>]*>1</td>', page)


@pytest.mark.slow
def test_an_interruption_says_how_to_go_on(tmp_path):
    log = tmp_path / "out" / "tokenizer" / "metrics.jsonl"

    def interrupt():
        while not (log.is_file() and log.stat().st_size):
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGTERM)

    thread = threading.Thread(target=interrupt, daemon=True)
    thread.start()
    with pytest.raises(RuntimeError, match=r"step \d+ of 5000; the same command goes on"):
        run_and_report(with_steps(5000), GENERATOR, tmp_path / "out")
    thread.join()
    assert not (tmp_path / "out" / "report.html").exists()


@pytest.mark.slow
def test_the_generator_is_trained_when_it_is_missing(finished, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(finished, out)
    shutil.rmtree(out / "generator")
    run_and_report(RUN, GENERATOR, out)
    weights = "generator/model/model.safetensors"
    assert (out / weights).read_bytes() == (finished / weights).read_bytes()


def test_other_settings_are_refused_and_nothing_is_touched(finished):
    before = contents(finished)
    with pytest.raises(
        ValueError, match=r"train.num_steps is 2 there and 3 here.*--out, or delete"
    ):
        run_and_report(with_steps(3), GENERATOR, finished)
    assert contents(finished) == before


def test_a_directory_of_something_else_is_refused(tmp_path, capsys):
    (tmp_path / "report.html").write_text("mine")
    assert main(["quickstart", "--out", str(tmp_path)]) == 1
    assert "is not empty and holds no quickstart" in capsys.readouterr().err
    assert contents(tmp_path) == {tmp_path / "report.html": b"mine"}


def test_an_impossible_number_of_steps_leaves_nothing_behind(tmp_path):
    with pytest.raises(ValueError, match=r"num_steps \(0\) must be between 1 and"):
        quickstart(tmp_path / "out", num_steps=0)
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_the_command_runs_the_recipe_and_says_where_the_report_is(tmp_path, capsys):
    assert main(["quickstart", "--out", str(tmp_path / "out"), "--num-steps", "1"]) == 0
    printed = capsys.readouterr().out
    assert f"report: {tmp_path / 'out' / 'report.html'}" in printed
    assert {path.stem for path in (tmp_path / "out").glob("*.png")} == PICTURES
