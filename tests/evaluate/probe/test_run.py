"""Whole probes: what is written, what is the same again, and what is refused."""

import json
import logging
from dataclasses import replace

import pytest
import torch
from PIL import Image

from mergevq.config.probing import FeatureConfig, FinetuneConfig, KnnConfig, LinearConfig, ProbeRun
from mergevq.config.records import FinetuneRow, KnnRow, LinearRow, ProbeRecord
from mergevq.config.training import DataConfig
from mergevq.evaluate.probe.run import probe, summary
from mergevq.runtime.artefacts import model_hash
from tests.support.probes import COLOURS, tiny_tokenizer, write_colours
from tests.support.records import assert_declared, problems
from tests.support.tables import table_of

LINEAR = LinearConfig(rates=(1e-2, 1e-1), num_epochs=5)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tokenizer, training images and other images."""
    torch.manual_seed(0)
    root = tmp_path_factory.mktemp("probing")
    tiny_tokenizer().save_pretrained(root / "model")
    write_colours(root / "train", 12)
    write_colours(root / "val", 4, seed=1)
    return root


def run(folder, out, method=LINEAR):
    return ProbeRun(
        model=str(folder / "model"),
        out=str(out),
        method=method,
        data=DataConfig(path=str(folder / "train"), val_path=str(folder / "val"), num_workers=0),
        features=FeatureConfig(num_kept=(20,), pools=("mean",)),
        device="cpu",
    )


def test_a_linear_probe_writes_its_settings_hashes_and_pictures(folder, tmp_path):
    record = probe(run(folder, tmp_path / "out"))
    written = json.loads((tmp_path / "out/probe.json").read_text())
    assert written == record
    assert_declared(written, ProbeRecord)
    for row in written["rows"]:
        assert_declared(row, LinearRow)
    assert written["method"] == "linear"
    assert written["run"]["method"]["rates"] == [1e-2, 1e-1]
    assert written["model"]["sha256"] == model_hash(folder / "model")
    assert written["environment"]["torch"] == torch.__version__
    assert written["data"]["train"]["num_images"] == 36
    assert written["data"]["val"]["num_images"] == 12
    assert written["data"]["num_in_both"] == 0
    assert written["data"]["class_names"] == sorted(COLOURS)
    assert [row["name"] for row in written["rows"]][-2:] == [
        "raw pixels",
        "PCA of pixels, 16 components",
    ]
    for row in written["rows"]:
        rates = [result["rate"] for result in row["sweep"]]
        assert rates == [1e-2, 1e-1]
        chosen = row["sweep"][rates.index(row["rate"])]
        assert chosen["held_out_accuracy"] == max(x["held_out_accuracy"] for x in row["sweep"])
        assert chosen["accuracy"] == row["accuracy"]
        counts = [[int(count) for count in line.split()] for line in row["confusion"]]
        assert [sum(line) for line in counts] == [4, 4, 4]
        assert sum(counts[i][i] for i in range(3)) == round(12 * row["accuracy"])
        for picture in row["pictures"]:
            Image.open(tmp_path / "out" / picture).verify()
    again = probe(run(folder, tmp_path / "again"))
    assert again["rows"] == record["rows"]
    words = "\n".join(summary(record))
    assert "36 training images, 12 test images; 3 classes" in words
    assert "chosen on held-out training images, not on the test images" in words
    assert "raw pixels" in words


def test_neighbours_are_pictured_and_every_k_is_reported(folder, tmp_path):
    record = probe(run(folder, tmp_path / "out", KnnConfig(num_neighbours=(3, 1))))
    assert_declared(json.loads((tmp_path / "out/probe.json").read_text()), ProbeRecord)
    for row in record["rows"]:
        assert_declared(row, KnnRow)
    pixels = record["rows"][-2]
    assert [entry["k"] for entry in pixels["by_k"]] == [3, 1]
    assert pixels["accuracy"] == pixels["by_k"][0]["accuracy"] == 1
    assert [name.partition("-")[0] for name in pixels["pictures"]] == ["confusion", "neighbours"]
    assert all((tmp_path / "out" / name).is_file() for name in pixels["pictures"])
    assert " ".join(summary(record)[2].split()).startswith("features channels k = 3 k = 1 +-")
    probe(run(folder, tmp_path / "linear"))
    both = {
        "probe_knn": tmp_path / "out/probe.json",
        "probe_linear": tmp_path / "linear/probe.json",
    }
    rows, below = table_of(tmp_path, "probe", **both)
    assert [row["3 nearest neighbours"] for row in rows][-2] == "100.0 %"
    assert "training images 36; of `train`; test images 12; their file `val`" in below


@pytest.mark.parametrize("leave_one_out", [False, True])
def test_pictures_larger_than_asked_for_are_not_read(folder, tmp_path, leave_one_out):
    probed = run(folder, tmp_path, KnnConfig(num_neighbours=(1,), leave_one_out=leave_one_out))
    data = replace(probed.data, val_path=None, val_fraction=0.3, max_pixels=1)
    with pytest.raises(ValueError, match=r"pixels, more than max_pixels \(1\)"):
        probe(replace(probed, data=data))


def test_leaving_one_out_uses_the_training_images_alone(folder, tmp_path):
    method = KnnConfig(num_neighbours=(1,), leave_one_out=True)
    alone = run(folder, tmp_path / "out", method)
    with pytest.raises(ValueError, match="leave out one of it and val_data"):
        probe(alone)
    record = probe(replace(alone, data=replace(alone.data, val_path=None)))
    assert problems(json.loads((tmp_path / "out/probe.json").read_text()), ProbeRecord) == []
    assert record["data"]["num_in_both"] is None
    assert record["data"]["val"] == record["data"]["train"]
    assert record["data"]["train"]["num_images"] == 36
    assert "36 images, each classified by the others" in summary(record)[0]


def test_a_part_of_the_data_is_held_out_without_other_images(folder, tmp_path):
    settings = run(folder, tmp_path / "out")
    data = replace(settings.data, val_path=None, val_fraction=0.4)
    record = probe(replace(settings, data=data))
    counts = [record["data"][name]["num_images"] for name in ("train", "val")]
    assert sum(counts) == 36
    assert min(counts) > 3
    assert "held out of the data" in summary(record)[0]


@pytest.mark.slow
def test_fine_tuning_stands_beside_frozen_features_and_pixels(folder, tmp_path):
    method = FinetuneConfig(num_epochs=2, batch_size=12, precision="float32", linear=LINEAR)
    record = probe(run(folder, tmp_path / "out", method))
    assert [row["name"] for row in record["rows"]] == [
        "linear probe: 20 tokens, merged, mean",
        "linear probe: 64 tokens (no merging), mean",
        "linear probe: raw pixels",
        "linear probe: PCA of pixels, 16 components",
        "fine-tuned: 20 tokens, merged, mean",
        "fine-tuned: 64 tokens (no merging), mean",
    ]
    assert_declared(json.loads((tmp_path / "out/probe.json").read_text()), ProbeRecord)
    for row in record["rows"]:
        assert_declared(row, FinetuneRow if row["name"].startswith("fine-tuned") else LinearRow)
    tuned = record["rows"][-1]
    assert tuned["num_steps"] == 6
    assert len(tuned["losses"]) == 2
    assert "after the last epoch" in "\n".join(summary(record))


def test_images_in_both_sets_are_counted_and_warned_of(folder, tmp_path, caplog):
    mixed = tmp_path / "mixed"
    for name in COLOURS:
        (mixed / name).mkdir(parents=True)
        for source, number in (("train", 0), ("val", 1)):
            data = (folder / source / name / f"{number:03d}.png").read_bytes()
            (mixed / name / f"{source}.png").write_bytes(data)
    settings = run(folder, tmp_path / "out", KnnConfig(num_neighbours=(1,)))
    with caplog.at_level(logging.WARNING):
        record = probe(replace(settings, data=replace(settings.data, val_path=str(mixed))))
    assert record["data"]["num_in_both"] == 3
    assert "3 of 6 validation images are also training images" in caplog.text


def test_only_some_images_are_used_when_asked(folder, tmp_path):
    settings = run(folder, tmp_path / "out", KnnConfig(num_neighbours=(1,)))
    record = probe(replace(settings, max_images=6))
    assert record["data"]["train"]["num_images"] == record["data"]["val"]["num_images"] == 6
    assert record["data"]["most_frequent_class_accuracy"] == pytest.approx(1 / 3)


def test_the_teacher_of_labels_is_said(folder, tmp_path):
    (tmp_path / "run").mkdir()
    tiny_tokenizer().save_pretrained(tmp_path / "run/model")
    text = '{"format_version": 1, "run": {"teacher": {"kind": "labels"}}, "resumed": []}'
    (tmp_path / "run/run.json").write_text(text)
    settings = run(folder, tmp_path / "out", KnnConfig(num_neighbours=(1,)))
    record = probe(replace(settings, model=str(tmp_path / "run/model")))
    assert record["model"]["teacher"] == "labels"
    assert "trained with labels" in "\n".join(summary(record))


def test_what_cannot_be_probed_is_refused_before_any_work(folder, tmp_path):
    settings = run(folder, tmp_path / "out")
    plain = tmp_path / "plain"
    plain.mkdir()
    Image.new("RGB", (16, 16)).save(plain / "a.png")
    Image.new("RGB", (16, 16)).save(plain / "b.png")
    for path, val_path, message in (
        (folder / "train", folder / "train", "must be other images than data"),
        (plain, None, r"1 of 1 images of data .* have no label"),
        (folder / "train/red", None, r"images of data .* have no label"),
    ):
        data = DataConfig(path=str(path), val_path=val_path and str(val_path), num_workers=0)
        with pytest.raises(ValueError, match=message):
            probe(replace(settings, data=data))
        assert not (tmp_path / "out").exists()
    with pytest.raises(ValueError, match="choose another directory with --out"):
        probe(run(folder, folder / "model"))


def test_crops_are_of_the_images_whose_place_they_have(folder, tmp_path):
    # Each image has one colour, so its crops are the image again, in whatever order they come.
    for number in range(24):
        place = tmp_path / "plain" / str(number % 2)
        place.mkdir(parents=True, exist_ok=True)
        colour = (10 * number, 240 - 7 * number, 90 * (number % 3))
        Image.new("RGB", (16, 16), colour).save(place / f"{number}.png")
    hard = replace(LINEAR, num_epochs=2, rates=(1e-3, 1e-2))
    sweeps = []
    for name, method in (("plain", hard), ("crops", replace(hard, num_crops=2))):
        job = run(folder, tmp_path / f"out-{name}", method)
        data = DataConfig(path=str(tmp_path / "plain"), val_fraction=0.3, num_workers=0)
        rows = probe(replace(job, data=data))["rows"]
        sweeps.append({row["name"]: row["sweep"] for row in rows})
    assert sweeps[0]["raw pixels"] == sweeps[1]["raw pixels"]
    assert sweeps[0].keys() == sweeps[1].keys()


def test_crops_of_pictures_change_what_is_learnt(folder, tmp_path, monkeypatch):
    seen = []
    from mergevq.evaluate.probe import linear
    from mergevq.evaluate.probe import run as probing

    whole = linear.linear_probe
    monkeypatch.setattr(
        probing, "linear_probe", lambda *a, crops, **k: seen.append(crops) or whole(*a, **k)
    )
    probe(run(folder, tmp_path / "out", replace(LINEAR, num_crops=3)))
    assert {len(crops) for crops in seen} == {3}
    for crops in seen:
        assert not torch.equal(crops[0], crops[1])
        assert not torch.equal(crops[1], crops[2])
