"""A sweep of guidance is one evaluation for each scale, and nothing of it is done twice."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from mergevq.cli.main import main
from mergevq.config.evaluation import GenerationSettings
from mergevq.config.generator import (
    SampleRun,
    SamplingSettings,
)
from mergevq.config.records import GuidanceRecord, GuidanceSettings
from mergevq.evaluate import guidance_sweep
from mergevq.evaluate.generation import evaluate_generation
from mergevq.evaluate.guidance_sweep import best_scales, evaluate_guidance
from mergevq.metrics.references import make_reference
from tests.support.evaluations import write_generator, write_images, write_network, write_tokenizer
from tests.support.records import assert_declared

pytestmark = pytest.mark.filterwarnings(
    "ignore:a (Frechet distance|reference) of:UserWarning",
    "ignore:.*images are not as many of each:UserWarning",
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("guidance")
    write_tokenizer(folder / "tokenizer")
    write_generator(folder / "generator", folder / "tokenizer")
    write_images(folder / "images", 12)
    make_reference(
        str(folder / "images"),
        folder / "reference.npz",
        "generation",
        extractor=write_network(folder / "colours.pt"),
        image_size=16,
        batch_size=5,
        num_features=12,
        device="cpu",
    )
    return folder


def settings(folder, out, *, first=1.0, stop=2.0, step=0.5, model="generator", **changes):
    run = SampleRun(
        model=str(folder / model),
        tokenizer=str(folder / "tokenizer"),
        num_images=6,
        batch_size=3,
        device="cpu",
        settings=SamplingSettings(guidance_scale=first, guidance_schedule="linear"),
    )
    evaluation = GenerationSettings(
        reference=str(folder / "reference.npz"),
        extractor=str(folder / "colours.pt"),
        out=str(out),
        run=replace(run, **changes),
        device="cpu",
    )
    return GuidanceSettings(evaluation=evaluation, stop=stop, step=step)


@pytest.fixture
def evaluated(monkeypatch):
    """Scales that are evaluated, as they are."""
    seen = []

    def noted(each):
        seen.append(each.run.settings.guidance_scale)
        return evaluate_generation(each)

    monkeypatch.setattr(guidance_sweep, "evaluate_generation", noted)
    return seen


# ------------------------------------------------------------------------------------- settings


def test_the_default_sweep_is_that_of_the_paper_to_the_last_digit(tmp_path, folder):
    plain = settings(folder, tmp_path)
    scales = GuidanceSettings(evaluation=plain.evaluation).scales
    assert scales[:4] == (1.0, 1.1, 1.2, 1.3)
    assert scales[-1] == 4.0
    assert len(scales) == 31
    assert settings(folder, tmp_path, first=1.5, stop=1.5).scales == (1.5,)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"step": 0.0}, r"step \(0.0\) must be between 0.001 and 1000"),
        ({"stop": 0.5}, r"stop \(0.5\) must be at least the first guidance_scale \(1.0\)"),
        ({"stop": 1001.0}, r"stop \(1001.0\) must be"),
        ({"stop": 2.25}, r"stop \(2.25\) must be a whole number of steps \(0.5\).*such as 2"),
        ({"stop": 900.0}, r"from 1.0 to 900.0 in steps of 0.5 are 1799 scales, and at most 1000"),
    ],
)
def test_a_range_that_has_no_such_end_is_refused(tmp_path, folder, changes, message):
    with pytest.raises(ValueError, match=message):
        settings(folder, tmp_path, **changes)


def test_images_that_are_there_cannot_be_guided(tmp_path, folder):
    evaluation = replace(settings(folder, tmp_path).evaluation, run=None, samples="there")
    with pytest.raises(ValueError, match="a sweep of guidance needs a generator: --generator"):
        GuidanceSettings(evaluation=evaluation)


# ---------------------------------------------------------------------------------------- sweep


@pytest.mark.slow
def test_each_scale_is_the_evaluation_of_that_scale(tmp_path, folder, capsys):
    swept = settings(folder, tmp_path / "sweep")
    record = evaluate_guidance(swept)
    assert json.loads((tmp_path / "sweep/evaluation.json").read_text()) == record
    assert_declared(record, GuidanceRecord)
    assert (tmp_path / "sweep/guidance.png").is_file()
    assert [result["scale"] for result in record["results"]] == [1.0, 1.5, 2.0]
    for result in record["results"]:
        alone = replace(swept.at(result["scale"]), out=str(tmp_path / f"alone-{result['scale']}"))
        expected = evaluate_generation(alone)
        assert result["metrics"] == expected["metrics"]
        assert result["pixels_sha256"] == expected["samples"]["pixels_sha256"]
        made = json.loads((tmp_path / "sweep" / result["folder"] / "evaluation.json").read_text())
        assert made["settings"]["run"]["settings"]["guidance_scale"] == result["scale"]
    assert len({result["pixels_sha256"] for result in record["results"]}) == 3
    assert "scale 3/3" in capsys.readouterr().err


def test_the_best_is_the_lowest_distance_and_the_highest_score():
    extractor = {"name": "net", "sha256": "-"}
    numbers = {3.0: (5.0, 2.0), 1.0: (4.0, 1.0), 2.0: (4.0, 3.0), 4.0: (9.0, 3.0)}
    records = {
        scale: {
            "extractor": extractor,
            "metrics": {"frechet_net": distance, "class_score_net": score, "recall_net": 0.0},
        }
        for scale, (distance, score) in numbers.items()
    }
    assert best_scales(records) == [
        {"metric": "frechet_net", "scale": 1.0, "value": 4.0},
        {"metric": "class_score_net", "scale": 2.0, "value": 3.0},
    ]
    for record in records.values():
        del record["metrics"]["class_score_net"]
    assert [best["metric"] for best in best_scales(records)] == ["frechet_net"]


@pytest.mark.slow
def test_a_sweep_goes_on_where_it_was(tmp_path, folder, evaluated, monkeypatch):
    swept = settings(folder, tmp_path)

    def stopped(each):
        if each.run.settings.guidance_scale == 2.0:
            raise KeyboardInterrupt
        return evaluate_generation(each)

    with monkeypatch.context() as patch:
        patch.setattr(guidance_sweep, "evaluate_generation", stopped)
        with pytest.raises(KeyboardInterrupt):
            evaluate_guidance(swept)
    record = evaluate_guidance(swept)
    assert evaluated == [2.0]
    (tmp_path / "evaluation.json").unlink()
    assert evaluate_guidance(swept)["results"] == record["results"]
    assert evaluated == [2.0]
    with pytest.raises(ValueError, match="is there already"):
        evaluate_guidance(swept)
    (tmp_path / "evaluation.json").unlink()
    finer = evaluate_guidance(replace(swept, step=0.25))
    assert evaluated == [2.0, 1.25, 1.75]
    assert finer["results"][::2] == record["results"]


@pytest.mark.slow
def test_models_and_folders_may_be_moved(tmp_path, folder, evaluated):
    evaluate_guidance(settings(folder, tmp_path / "old"))
    (tmp_path / "old/evaluation.json").unlink()
    (tmp_path / "old").rename(tmp_path / "new")
    (tmp_path / "link").symlink_to(folder / "generator")
    evaluate_guidance(settings(folder, tmp_path / "new", model=tmp_path / "link"))
    assert evaluated == [1.0, 1.5, 2.0]


@pytest.mark.slow
def test_scales_of_another_evaluation_are_refused_and_kept(tmp_path, folder, evaluated):
    evaluate_guidance(settings(folder, tmp_path / "out"))
    (tmp_path / "out/evaluation.json").unlink()
    with pytest.raises(ValueError, match=r"1.0/evaluation.json is another.* run.seed \(0, now 1\)"):
        evaluate_guidance(settings(folder, tmp_path / "out", seed=1))
    write_generator(tmp_path / "other", folder / "tokenizer", seed=1)
    with pytest.raises(ValueError, match=r"differs in generator \(\w+, now \w+\); choose another"):
        evaluate_guidance(settings(folder, tmp_path / "out", model=tmp_path / "other"))
    (tmp_path / "out/1.5/evaluation.json").write_text('{"format_version": 1}')
    with pytest.raises(ValueError, match=r"1.5/evaluation.json is another .*kind \(None, now gen"):
        evaluate_guidance(settings(folder, tmp_path / "out"))
    assert evaluated == [1.0, 1.5, 2.0]
    assert len(list((tmp_path / "out/2.0/samples").glob("*.png"))) == 6


@pytest.mark.slow
def test_without_a_class_score_it_is_left_out(tmp_path, folder):
    class Unclassed(torch.nn.Module):
        def forward(self, images: torch.Tensor, return_features: bool = False) -> torch.Tensor:
            if not return_features:
                raise NotImplementedError("there are no classes")
            return torch.cat([images.mean([2, 3]), images.std([2, 3])], 1)

    torch.jit.script(Unclassed()).save(tmp_path / "net.pt")
    make_reference(
        str(folder / "images"),
        tmp_path / "reference.npz",
        "generation",
        extractor=tmp_path / "net.pt",
        image_size=16,
        batch_size=5,
        device="cpu",
    )
    swept = settings(folder, tmp_path / "out", stop=1.5)
    evaluation = replace(
        swept.evaluation,
        extractor=str(tmp_path / "net.pt"),
        reference=str(tmp_path / "reference.npz"),
    )
    with pytest.warns(UserWarning, match="gives no class probabilities"):
        record = evaluate_guidance(replace(swept, evaluation=evaluation))
    assert_declared(record, GuidanceRecord)
    assert [best["metric"] for best in record["best"]] == ["frechet_net"]
    assert record["left_out"][0].startswith("class_score_net")


def command_line(folder, out):
    models = ["--generator", str(folder / "generator"), "--model", str(folder / "tokenizer")]
    networks = ["--extractor", str(folder / "colours.pt")]
    networks += ["--reference", str(folder / "reference.npz"), "--num-images", "6"]
    options = ["--guidance", "1.9", "--stop", "2", "--batch-size", "2", "--device", "cpu"]
    return ["evaluate", "guidance", *models, *networks, *options, "--out", str(out)]


@pytest.mark.slow
def test_the_command_prints_a_row_for_each_scale_and_the_best(tmp_path, folder, capsys):
    assert main(command_line(folder, tmp_path)) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("guidance  frechet_colours  class_score_colours")
    for text in ("\n1.9 ", "\n2.0 ", "\nbest frechet_colours: ", "\nbest class_score_colours: "):
        assert text in printed
    record = json.loads((tmp_path / "evaluation.json").read_text())
    assert record["settings"]["evaluation"]["run"]["settings"]["guidance_schedule"] == "linear"


@pytest.mark.slow
def test_two_ranks_find_what_one_process_finds(tmp_path, folder):
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path.cwd())}
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    for name, launcher in (("one", []), ("two", torchrun)):
        given = command_line(folder, tmp_path / name)
        command = [sys.executable, *launcher, "-m", "mergevq", *given]
        subprocess.run(command, check=True, env=environment, capture_output=True, timeout=120)
    one, two = (
        json.loads((tmp_path / name / "evaluation.json").read_text()) for name in ("one", "two")
    )
    assert (one["world_size"], two["world_size"]) == (1, 2)
    best = [[(each["metric"], each["scale"]) for each in record["best"]] for record in (one, two)]
    assert best[0] == best[1]
    for first, second in zip(one["results"], two["results"], strict=True):
        assert first["pixels_sha256"] == second["pixels_sha256"]
        assert first["metrics"] == pytest.approx(second["metrics"], rel=1e-9)
