"""The commands as they are typed: options reach what they set, and tables show what was found."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import tyro

from mergevq.cli.evaluate import COMMANDS
from mergevq.cli.main import main
from mergevq.config.generator import (
    SamplingSettings,
    Several,
)
from mergevq.evaluate import generation as evaluate_generation
from mergevq.evaluate.selftest import Check
from tests.support.evaluations import write_images, write_network, write_tokenizer

pytestmark = pytest.mark.filterwarnings(
    "ignore:a (Frechet distance|reference) of:UserWarning",
)
REPOSITORY = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cli_evaluate")
    write_images(folder / "images", 6)
    write_network(folder / "colours.pt")
    write_tokenizer(folder / "model")
    return folder


def run(name, *options):
    tyro.cli(COMMANDS[name], args=[*map(str, options)], prog=f"mergevq evaluate {name}")


def subject(folder, *options):
    return (
        *("--model", folder / "model", "--data", folder / "images", "--device", "cpu"),
        *("--num-workers", 0, *options),
    )


def test_help_does_not_wait_for_torch():
    code = (
        "import sys, tyro\nfrom mergevq.cli.evaluate import COMMANDS\n"
        "for name, command in COMMANDS.items():\n"
        "    try: tyro.cli(command, args=['--help'])\n"
        "    except SystemExit: pass\n"
        "sys.exit('torch' in sys.modules)"
    )
    finished = subprocess.run(
        [sys.executable, "-c", code], cwd=REPOSITORY, check=False, capture_output=True
    )
    assert finished.returncode == 0, finished.stderr


@pytest.mark.slow
def test_reconstruction_prints_a_column_for_each_k(tmp_path, folder, capsys):
    run(
        "reconstruction",
        *subject(folder, "--num-kept", "8,12", "16", "--extractor", folder / "colours.pt"),
        *("--max-images", 4, "--show", 1, "--baseline-images", 2, "--batch-size", 3),
        *("--precision", "float32", "--image-size", 16, "--out", tmp_path),
    )
    printed = capsys.readouterr().out
    assert "K = 8" in printed
    assert "K = 16" in printed
    for name in ("psnr, given", "frechet_colours, recovered", "bits, source", "images per second"):
        assert f"\n{name} " in printed
    for name in ("codebook usage", "bits per pixel, given", "bits per pixel, recovered"):
        assert f"\n{name} " in printed
    assert "4 images of 16 pixels" in printed
    assert "\nWebP " in printed
    assert "give its weights with --lpips" in printed
    record = json.loads((tmp_path / "evaluation.json").read_text())
    assert [result["num_kept"] for result in record["results"]] == [8, 12, 16]
    assert len(record["results"][0]["worst"]) == 1
    assert record["baselines"][0]["num_images"] == 2
    assert record["settings"]["subject"]["batch_size"] == 3


def test_robustness_prints_a_row_for_each_fraction(tmp_path, folder, capsys):
    options = ("--num-kept", 8, "--fractions", "0,0.5", "--radius", 2, "--seed", 3)
    run("robustness", *subject(folder, *options, "--out", tmp_path))
    printed = capsys.readouterr().out
    assert "\n0.5          2 " in printed
    assert "at most 2 other bits, 62.500% of the codebook" in printed
    assert "without the mean of the Frechet distances: it needs --extractor" in printed
    record = json.loads((tmp_path / "evaluation.json").read_text())
    assert record["settings"]["seed"] == 3


def test_robustness_is_one_number_too(tmp_path, folder, capsys):
    run("robustness", *subject(folder, "--extractor", folder / "colours.pt", "--out", tmp_path))
    printed = capsys.readouterr().out
    assert "25.000% of the codebook, for 200 and 280 and 360 of 4096" in printed
    assert "\nperturbed_frechet_colours " in printed


@pytest.mark.parametrize(
    ("made", "wanted"), [("generation", "reconstruction"), ("reconstruction", "generation")]
)
def test_the_wrong_reference_ends_with_an_error_that_names_the_right_one(
    tmp_path, folder, capsys, made, wanted
):
    path, network = str(tmp_path / "reference.npz"), ["--extractor", str(folder / "colours.pt")]
    make = ["evaluate", "reference", "--data", str(folder / "images"), "--out", path, "--kind"]
    options = ["--image-size", "16", "--device", "cpu", "--num-workers", "0"]
    assert main([*make, made, *network, *options]) == 0
    images = {
        "reconstruction": [*map(str, subject(folder))],
        "generation": ["--samples", str(folder / "images"), "--device", "cpu"],
    }
    command = ["evaluate", wanted, *images[wanted], *network, "--reference", path]
    assert main([*command, "--out", str(tmp_path / "out")]) == 1
    printed = capsys.readouterr().err
    assert f"is for {made}, and {wanted} is compared with" in printed
    assert f"`mergevq evaluate reference --kind {wanted} --data" in printed
    assert not (tmp_path / "out").exists()


def test_the_metrics_test_themselves(folder, monkeypatch, capsys):
    command = ["evaluate", "selftest", "--extractor", str(folder / "colours.pt")]
    assert main([*command, "--device", "cpu"]) == 0
    printed = capsys.readouterr().out
    assert "\npsnr " in printed
    assert "inf  infinite, and written as null  ok\n" in printed
    assert "\nfrechet_colours " in printed
    wrong = [Check("ssim", 0.5, "1", passed=False), Check("l1", 0.0, "0", passed=True)]
    monkeypatch.setattr("mergevq.evaluate.selftest.check_metrics", lambda *_: wrong)
    assert main(command) == 1
    printed = capsys.readouterr()
    assert "WRONG" in printed.out
    assert "error: ssim: not what it must be" in printed.err


def test_a_reference_is_written_and_the_wrong_kind_refused(tmp_path, folder, capsys):
    network = ("--extractor", folder / "colours.pt")
    for kind in ("generation", "reconstruction"):
        run(
            "reference",
            *("--data", folder / "images", "--out", tmp_path / f"{kind}.npz", "--kind", kind),
            *(*network, "--image-size", 16, "--device", "cpu", "--num-workers", 0),
            *("--array", tmp_path / "array.npz"),
        )
    assert "for generation, 6 images of 16 x 16 pixels" in capsys.readouterr().out
    out = ("--out", tmp_path / "out")
    wrong = ("--reference", tmp_path / "generation.npz")
    with pytest.raises(ValueError, match="--kind reconstruction"):
        run("reconstruction", *subject(folder, *network, *wrong, *out))
    samples = ("--samples", tmp_path / "array.npz", "--device", "cpu")
    with pytest.raises(ValueError, match="--kind generation"):
        run("generation", *samples, *network, "--reference", tmp_path / "reconstruction.npz", *out)
    run("generation", *samples, *network, "--reference", tmp_path / "generation.npz", *out)
    printed = capsys.readouterr().out
    assert "\nprecision_colours " in printed
    assert "without class accuracy: no classifier was given" in printed


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("reconstruction", "--num-kept", "8;9"), r"num_kept \(8;9\) must be whole numbers"),
        (("robustness", "--fractions", "half"), r"fractions \(half\) must be numbers"),
    ],
)
def test_what_is_no_number_is_said(folder, options, message):
    with pytest.raises(ValueError, match=message):
        run(options[0], *subject(folder, *options[1:]))


def test_options_of_sampling_reach_the_run(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(evaluate_generation, "evaluate_generation", seen.append)
    run(
        "generation",
        *("--generator", "m", "--model", "t", "--reference", "r.npz", "--extractor", "e.pt"),
        *("--out", tmp_path, "--num", 6, "--num-kept", 5, "--seed", 7, "--weights", "int8"),
        *("--guidance", 3, "--guidance-schedule", "power", "--guidance-power", 1.5),
        *("--guidance-interval", 0.1, 0.9, "--temperature", 1, 0.8, "--top-k", 0, 4),
        *("--top-p", 0.9, "--steps", 2, "--batch-size", 3, "--device", "cpu"),
    )
    (settings,) = seen
    sampled = settings.run
    assert (sampled.num_images, sampled.num_kept, sampled.seed) == (6, 5, 7)
    assert (sampled.weights, sampled.batch_size, sampled.device) == ("int8", 3, "cpu")
    assert (settings.batch_size, settings.device) == (3, "cpu")
    assert sampled.settings == SamplingSettings(
        guidance_scale=3.0,
        guidance_schedule="power",
        guidance_power=1.5,
        guidance_interval=(0.1, 0.9),
        temperature=(1.0, 0.8),
        top_k=(0, 4),
        top_p=0.9,
        passes=Several(num_steps=2),
    )


def test_torchrun_leaves_every_option_to_the_command():
    from torch.distributed.run import get_args_parser

    for name in ("model", "tokenizer", "num-images", "reference", "max-images", "tokens", "out"):
        given = get_args_parser().parse_args(["-m", "mergevq", "evaluate", f"--{name}", "1"])
        assert given.training_script_args == ["evaluate", f"--{name}", "1"]


def test_the_number_of_images_has_two_names(tmp_path):
    for name in ("--num", "--num-images"):
        with pytest.raises(ValueError, match=r"num_images \(0\) must be between 1 and"):
            run(
                "generation",
                *("--generator", "m", "--model", "t", name, 0, "--out", tmp_path),
                *("--reference", "r.npz", "--extractor", "e.pt"),
            )


def test_neighbours_is_the_number_of_samples_that_are_looked_up(monkeypatch):
    seen = []
    monkeypatch.setattr(evaluate_generation, "evaluate_generation", seen.append)
    files = ["--reference", "r.safetensors", "--extractor", "e.pt", "--samples", "s"]
    assert main(["evaluate", "generation", *files, "--neighbours", "3"]) == 0
    assert seen[0].num_looked_up == 3
