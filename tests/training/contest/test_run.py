"""Two arms with two seeds, trained for two steps, and what is made of them."""

import json
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from mergevq.config.contest import Arm, ContestSettings
from mergevq.config.recipes.digits import digits32, digits32_pool
from mergevq.config.training import DataConfig
from mergevq.report.plots import has_plots
from mergevq.runtime.artefacts import model_hash
from mergevq.tokenizer.tokenizer import Tokenizer
from mergevq.training import fit
from mergevq.training import train as training
from mergevq.training.contest.run import compare
from mergevq.training.tokenizer import TokenizerTask
from tests.support.small import shrink
from tests.support.tables import table_of


def settings_for(folder, **given):
    """Small arms of pictures of two classes, which are measured at one K and at equal bits."""
    arms = []
    for name, recipe in (("merge", digits32), ("pool", digits32_pool)):
        run = shrink(recipe())
        train = replace(run.train, device="cpu", precision="float32", eval_num_kept=(16,))
        data = DataConfig(path=str(folder / "images"), val_fraction=0.3, num_workers=0)
        arms.append(Arm(name=name, run=replace(run, data=data, train=train)))
    values = {"arms": tuple(arms), "out": str(folder / "out"), "seeds": (0, 1), "num_shown": 2}
    return ContestSettings(**values | {"num_kept": (20,), "bits": (400,)} | given)


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """Settings and record of a comparison."""
    folder = tmp_path_factory.mktemp("contest")
    for number in range(24):
        path = folder / "images" / "ab"[number % 2] / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(number).integers(0, 256, (4, 4, 3), dtype=np.uint8)
        Image.fromarray(pixels).resize((32, 32)).save(path)
    settings = settings_for(folder, against="merge")
    with pytest.MonkeyPatch.context() as patch:
        # Curves and grids of each run take longer than its steps.
        patch.setattr(fit, "has_plots", lambda _: False)
        patch.setattr(TokenizerTask, "picture", lambda *_: None)
        return settings, compare(settings), folder


def test_every_arm_is_measured_with_every_seed_at_all_that_was_asked_for(done):
    _, record, folder = done
    assert json.loads((folder / "out" / "compare.json").read_text("utf-8")) == record
    found = {
        (arm["name"], seed["seed"], point["label"]): point["num_kept"]
        for arm in record["arms"]
        for seed in arm["seeds"]
        for point in seed["points"]
    }
    assert found == {
        ("merge", 0, "K = 20"): 20,
        ("merge", 1, "K = 20"): 20,
        ("merge", 0, "400 bits"): 23,
        ("merge", 1, "400 bits"): 23,
        ("pool", 0, "K = 20"): 20,
        ("pool", 1, "K = 20"): 20,
        ("pool", 0, "400 bits"): 32,
        ("pool", 1, "400 bits"): 32,
    }
    merge, pool = ([s["points"][1] for s in arm["seeds"]] for arm in record["arms"])
    assert all(390 < p["bits_tokens"] + p["bits_layout"] <= 400 for p in merge)
    assert all(p["bits_tokens"] + p["bits_layout"] == 256 for p in pool)
    assert all(100 < p["bits_layout_coded"] < 400 for p in merge)
    assert all(p["bits_layout_coded"] is None for p in pool)
    psnr = {p["metrics"]["psnr"] for points in (merge, pool) for p in points}
    assert len(psnr) == 4, "seeds and arms differ"
    assert all("psnr_recovered" in p["metrics"] for p in merge)
    assert not any("psnr_recovered" in p["metrics"] for p in pool)


def test_the_record_says_what_the_numbers_are_of(done):
    _, record, folder = done
    merge, pool = record["arms"]
    assert record["num_train_images"] + record["num_images"] == 24
    assert record["settings"]["seeds"] == [0, 1]
    tokenizer = Tokenizer(settings_for(folder).arms[0].run.model)
    assert merge["num_parameters"] == sum(each.numel() for each in tokenizer.parameters())
    for seed in (*merge["seeds"], *pool["seeds"]):
        assert seed["model_hash"] == model_hash(folder / "out" / seed["run"] / "model")
        assert seed["images_per_second"] > 0
    assert {each["label"] for each in record["verdicts"]} == {"K = 20", "400 bits"}
    names = [each["name"] for each in record["yardsticks"]]
    assert names[:3] == ["mean image", "class mean", "nearest training image"]
    assert names[-2:] == ["components"] * 2


def test_table_plot_and_pictures_are_written(done):
    _, _, folder = done
    assert "## 400 bits" in (folder / "out" / "compare.md").read_text("utf-8")
    for name in ("pictures.png", "maps.png"):
        with Image.open(folder / "out" / name) as sheet:
            assert sheet.width > 3 * 128
            assert sheet.height > 2 * 128
    assert (folder / "out" / "rate_distortion.png").is_file() == has_plots("the plot")


def test_the_documents_take_the_record(done, tmp_path):
    _, record, folder = done
    rows, below = table_of(tmp_path, "compare", compare=folder / "out" / "compare.json")
    arms = [row for row in rows if row["at"] != "-"]
    assert [(row["model"], row["at"]) for row in arms] == [
        (f"`{name}`", label) for name in ("merge", "pool") for label in ("K = 20", "400 bits")
    ]
    gaps = [v for v in record["verdicts"] if v["metric"] == "psnr"]
    assert [row["gap"] for row in arms] == [
        *("-", "-"),
        *(f"{gap['gap']:+.2f}, {gap['verdict']}" for gap in gaps),
    ]
    psnr = [seed["points"][0]["metrics"]["psnr"] for seed in record["arms"][0]["seeds"]]
    mean, each = sum(psnr) / 2, ", ".join(f"{value:.2f}" for value in psnr)
    assert arms[0]["PSNR (dB)"] == f"{mean:.2f} ({each})"
    assert {row["model"] for row in rows[4:]} >= {"mean image", "components"}
    assert "seeds 0 and 1" in below


@pytest.mark.slow
def test_nothing_is_trained_twice_and_what_was_stopped_goes_on(done, monkeypatch, capsys):
    settings, record, folder = done
    trained = []
    # Training that is stopped at once.
    monkeypatch.setattr(
        training, "train_tokenizer", lambda run, **how: trained.append((run.out, how["resume"]))
    )
    again = compare(replace(settings, num_shown=0, seeds=(1, 0), num_yardstick_images=0))
    assert trained == []
    count = 4 * record["num_images"]
    assert f"image {count}/{count}" in capsys.readouterr().err
    assert again["arms"][0]["seeds"] == record["arms"][0]["seeds"][::-1]
    # A run that was stopped after its first save has a model of fewer steps.
    path = folder / "out" / "pool" / "1" / "model" / "config.json"
    before = path.read_text("utf-8")
    path.write_text(json.dumps(json.loads(before) | {"extra": {"step": 1}}), encoding="utf-8")
    with pytest.raises(RuntimeError, match=r"stopped at step 1 of 2; the same command goes on"):
        compare(replace(settings, num_shown=0, num_yardstick_images=0))
    assert trained == [(str(folder / "out" / "pool" / "1"), True)]
    path.write_text(before, encoding="utf-8")


def test_other_settings_under_the_same_name_are_refused(done):
    settings, _, _ = done
    first, second = settings.arms
    other = replace(second, run=replace(second.run, quantize_start_step=7))
    with pytest.raises(ValueError, match=r"quantize_start_step is 0 there and 7 here.*--out"):
        compare(replace(settings, arms=(first, other)))


def test_a_k_or_as_few_bits_that_no_arm_has_are_refused_before_training(tmp_path):
    settings = settings_for(tmp_path, num_kept=(), bits=(9,))
    with pytest.raises(ValueError, match=r"nothing to measure: merge at 9 bits.*pool at 9 bits"):
        compare(settings)
    assert not (tmp_path / "out").exists()
