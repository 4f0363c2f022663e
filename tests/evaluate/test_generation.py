"""Samples are the same however they are made, and are compared with what they should be."""

import json
import warnings
from dataclasses import fields, replace

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from mergevq.cli.main import main
from mergevq.config.generator import (
    SamplingSettings,
)
from mergevq.config.records import GenerationRecord
from mergevq.data.arrays import ImageArray
from mergevq.data.images import open_images
from mergevq.evaluate.generation import evaluate_generation
from mergevq.evaluate.samples import sample_missing
from mergevq.generator.build import build_generator, save_generator
from mergevq.generator.generation import class_labels
from mergevq.metrics.extractor import FeatureExtractor
from mergevq.metrics.references import make_reference
from mergevq.runtime.artefacts import tokens_hash
from tests.support.evaluate_generation import files, sample_run, settings, write_reference
from tests.support.evaluations import ALONE, GENERATOR, write_images
from tests.support.ranks import run_on_two_ranks
from tests.support.records import assert_declared
from tests.support.tables import table_of

pytestmark = pytest.mark.filterwarnings(
    "ignore:a (Frechet distance|reference) of:UserWarning",
    "ignore:.*is enlarged:UserWarning",
    "ignore:.*images are not as many of each:UserWarning",
)


@pytest.mark.parametrize("as_samples", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_stray_pictures_change_no_number(tmp_path, sampled_folder, pair, as_samples):
    run = sample_run(sampled_folder)
    sample_missing(pair, run, tmp_path / "out", ALONE)
    expected = evaluate_generation(settings(sampled_folder, tmp_path / "out", run=run))
    (tmp_path / "out/evaluation.json").unlink()
    for name in ("0.png", "00000000a.png", "00000007.png"):
        Image.new("RGB", (16, 16), "red").save(tmp_path / "out/samples" / name)
    changes = {"run": run}
    out = tmp_path / "out"
    if as_samples:
        changes, out = {"samples": str(tmp_path / "out/samples")}, tmp_path / "other"
    with pytest.warns(UserWarning, match=r"3 pictures in .* not evaluated: 0.png is the first"):
        record = evaluate_generation(settings(sampled_folder, out, **changes))
    assert record["samples"]["pixels_sha256"] == expected["samples"]["pixels_sha256"]
    assert record["metrics"] == expected["metrics"]


# -------------------------------------------------------------------------------- evaluation


def test_a_generator_is_evaluated_and_everything_recorded(tmp_path, sampled_folder):
    record = evaluate_generation(
        settings(
            sampled_folder,
            tmp_path,
            run=sample_run(sampled_folder),
            classifier=str(sampled_folder / "colours.pt"),
            data=str(sampled_folder / "images"),
            num_looked_up=2,
            write_array=True,
        )
    )
    assert json.loads((tmp_path / "evaluation.json").read_text()) == record
    assert_declared(record, GenerationRecord)
    written = {"generation": tmp_path / "evaluation.json"}
    written["generator"] = sampled_folder / "generator" / "config.json"
    (row,), below = table_of(tmp_path, "generation", **written)
    assert row["K"] == "8"
    assert f"samples {record['samples']['num_images']}; height and width" in below
    sampling = record["settings"]["run"]["settings"]
    assert sampling.keys() == {field.name for field in fields(SamplingSettings)}
    assert {"guidance_scale", "guidance_schedule", "temperature", "top_k", "top_p"} <= set(sampling)
    assert record["reference"]["crop"] == "short side resized (bicubic), centre square"
    assert record["world_size"] == 1
    assert record["environment"]["torch"] == torch.__version__
    assert set(record["metrics"]) == {
        *("frechet_colours", "num_images", "class_score_colours", "class_score_colours_std"),
        *("kernel_colours", "kernel_colours_std", "precision_colours", "recall_colours"),
        *("num_reference_features", "class_accuracy"),
    }
    assert record["left_out"] == []
    assert record["samples"]["num_images"] == len(ImageArray(tmp_path / "samples.npz")) == 7
    assert np.array(record["nearest_distances"]).shape == (2, 3)
    for digest in (record["generator"], record["tokenizer"], record["reference"]["sha256"]):
        assert len(digest) == 64
    assert record["settings"]["run"]["seed"] == 0
    assert (tmp_path / "nearest_neighbours.png").is_file()
    with pytest.raises(ValueError, match="is there already"):
        evaluate_generation(settings(sampled_folder, tmp_path, run=sample_run(sampled_folder)))


@pytest.fixture(scope="module")
def named(sampled_folder, tmp_path_factory):
    """A generator of named classes, images of these and of others, and a reference of each."""
    folder = tmp_path_factory.mktemp("named")
    for data, names in (("own", ("cat", "dog", "eel")), ("others", ("bus", "van", "zonda"))):
        for number, name in enumerate(names):
            write_images(folder / data / name, 2, first_seed=10 * number)
        with pytest.warns(UserWarning, match="biases"):
            make_reference(
                str(folder / data),
                folder / f"{data}.npz",
                "generation",
                extractor=sampled_folder / "colours.pt",
                image_size=16,
                batch_size=6,
                device="cpu",
            )
    tokenizer = sampled_folder / "tokenizer"
    save_generator(
        build_generator(GENERATOR),
        folder / "generator",
        tokenizer=tokens_hash(tokenizer),
        class_names=("cat", "dog", "eel"),
    )
    return folder


@pytest.mark.parametrize(
    ("reference", "data", "message"),
    [
        ("others", None, r"reference .*others.npz was made from other classes: .*bus, van, zonda"),
        (
            "own",
            "others",
            r"generator in .* was made from other classes: .*cat, dog, eel",
        ),
    ],
)
def test_a_reference_or_training_images_of_other_classes_are_refused(
    named, sampled_folder, tmp_path, reference, data, message
):
    run = sample_run(sampled_folder, model=str(named / "generator"))
    changes = {"run": run, "reference": str(named / f"{reference}.npz")}
    changes |= {} if data is None else {"data": str(named / data)}
    with pytest.raises(ValueError, match=message):
        evaluate_generation(settings(sampled_folder, tmp_path / "out", **changes))
    assert not (tmp_path / "out").exists(), "before anything is sampled"


def test_a_reference_and_training_images_of_the_same_classes_are_taken(
    named, sampled_folder, tmp_path
):
    run = sample_run(sampled_folder, model=str(named / "generator"))
    changes = {"run": run, "reference": str(named / "own.npz"), "data": str(named / "own")}
    record = evaluate_generation(settings(sampled_folder, tmp_path / "out", **changes))
    assert record["reference"]["class_names"] == ["cat", "dog", "eel"]
    # Nothing is known of the classes of a flat folder.
    changes |= {"reference": str(sampled_folder / "generation.npz")}
    evaluate_generation(settings(sampled_folder, tmp_path / "flat", **changes))


def test_the_training_set_itself_is_perfect_in_any_form(tmp_path, sampled_folder):
    write_reference(
        sampled_folder, tmp_path / "reference.npz", "generation", tmp_path / "array.npz"
    )
    records = [
        evaluate_generation(
            settings(
                sampled_folder,
                tmp_path / name,
                samples=str(samples),
                reference=str(tmp_path / "reference.npz"),
            )
        )
        for name, samples in (
            ("sampled_folder", sampled_folder / "images"),
            ("array", tmp_path / "array.npz"),
        )
    ]
    for record in records:
        assert_declared(record, GenerationRecord)
    assert records[0]["metrics"] == records[1]["metrics"]
    assert records[0]["samples"]["pixels_sha256"] == records[1]["samples"]["pixels_sha256"]
    metrics = records[0]["metrics"]
    assert metrics["frechet_colours"] < 1e-3
    assert metrics["precision_colours"] == metrics["recall_colours"] == 1


def test_classes_come_in_turn(tmp_path, sampled_folder):
    record = evaluate_generation(
        settings(
            sampled_folder,
            tmp_path,
            run=sample_run(sampled_folder, num_images=6),
            classifier=str(sampled_folder / "colours.pt"),
        )
    )
    extractor = FeatureExtractor(sampled_folder / "colours.pt")
    images = open_images(str(tmp_path / "samples"))
    pixels = torch.stack([torch.from_numpy(np.array(images.read(i))) for i in range(6)])
    chosen = extractor.probabilities(pixels.permute(0, 3, 1, 2)).argmax(1)
    expected = (chosen == torch.tensor([0, 1, 2, 0, 1, 2])).float().mean()
    assert record["metrics"]["class_accuracy"] == pytest.approx(float(expected))


def test_real_images_are_measured_beside_as_many_samples(tmp_path, sampled_folder):
    run = sample_run(sampled_folder, num_images=6)
    images = str(sampled_folder / "images")
    record = evaluate_generation(settings(sampled_folder, tmp_path, run=run, val_data=images))
    metrics = record["metrics"]
    ratio = metrics["frechet_colours"] / metrics["frechet_real_colours"]
    assert metrics["frechet_ratio_colours"] == pytest.approx(ratio)
    assert "class_accuracy_real" not in metrics


def test_as_many_images_of_each_class_and_a_warning_if_not(tmp_path, sampled_folder):
    numbers = range(6)
    labels = class_labels(sample_run(sampled_folder, num_images=6), 3, numbers)
    assert labels.bincount().tolist() == [2, 2, 2]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        evaluate_generation(
            settings(sampled_folder, tmp_path / "six", run=sample_run(sampled_folder, num_images=6))
        )
    assert not [each for each in caught if "of each of" in str(each.message)]
    with pytest.warns(UserWarning, match=r"7 images are .* of 3 classes: 1 of .* --num 9"):
        evaluate_generation(
            settings(sampled_folder, tmp_path / "seven", run=sample_run(sampled_folder))
        )


class Logits(nn.Module):
    """Gives no probabilities where classes are asked for."""

    def forward(self, images: Tensor, return_features: bool = False) -> Tensor:
        features = torch.cat([images.mean([2, 3]), images.std([2, 3])], 1)
        return features if return_features else features - 100


class Unclassed(nn.Module):
    """Refuses to give classes."""

    def forward(self, images: Tensor, return_features: bool = False) -> Tensor:
        if not return_features:
            raise NotImplementedError("there are no classes")
        return torch.cat([images.mean([2, 3]), images.std([2, 3])], 1)


@pytest.mark.parametrize(
    ("network", "reason"),
    [(Logits(), "these are logits or features"), (Unclassed(), "there are no classes")],
)
def test_an_extractor_without_classes_leaves_their_score_out(
    tmp_path, sampled_folder, network, reason
):
    torch.jit.script(network).save(tmp_path / "net.pt")
    make_reference(
        str(sampled_folder / "images"),
        tmp_path / "reference.npz",
        "generation",
        extractor=tmp_path / "net.pt",
        image_size=16,
        batch_size=5,
        device="cpu",
    )
    given = {"reference": str(tmp_path / "reference.npz"), "extractor": str(tmp_path / "net.pt")}
    with pytest.warns(UserWarning, match=f"gives no class probabilities, .*{reason}"):
        record = evaluate_generation(
            settings(
                sampled_folder,
                tmp_path / "out",
                run=sample_run(sampled_folder, num_images=3),
                **given,
            )
        )
    assert_declared(record, GenerationRecord)
    assert "frechet_net" in record["metrics"]
    assert not [name for name in record["metrics"] if name.startswith("class_score")]
    assert record["left_out"][0].startswith("class_score_net: the extractor gives no class")


def test_lighter_weights_sample_and_say_what_they_cost(tmp_path, sampled_folder):
    run = sample_run(sampled_folder, num_images=6, weights="int8")
    record = evaluate_generation(settings(sampled_folder, tmp_path / "int8", run=run))
    assert 0 < record["logit_error"] < 0.2
    (tmp_path / "int8/evaluation.json").unlink()
    other = replace(run, weights="float32")
    with pytest.raises(ValueError, match=r"weights \(int8, now float32\)"):
        evaluate_generation(settings(sampled_folder, tmp_path / "int8", run=other))


@pytest.mark.slow
def test_two_processes_sample_and_measure_what_one_does(tmp_path, sampled_folder):
    models = [
        "--generator",
        str(sampled_folder / "generator"),
        "--model",
        str(sampled_folder / "tokenizer"),
    ]
    networks = ["--extractor", str(sampled_folder / "colours.pt"), "--classifier"]
    networks += [
        str(sampled_folder / "colours.pt"),
        "--reference",
        str(sampled_folder / "generation.npz"),
    ]
    options = ["--num-images", "6", "--batch-size", "2", "--guidance", "2", "--device", "cpu"]
    options += ["--precision", "float32"]
    command = ["evaluate", "generation", *models, *networks, *options, "--out"]
    assert main([*command, str(tmp_path / "one")]) == 0
    run_on_two_ranks([*command, str(tmp_path / "two")])
    assert files(tmp_path / "one") == files(tmp_path / "two")
    one, two = (
        json.loads((tmp_path / name / "evaluation.json").read_text()) for name in ("one", "two")
    )
    assert (one["world_size"], two["world_size"]) == (1, 2)
    assert one["samples"] == two["samples"]
    assert one["metrics"] == pytest.approx(two["metrics"], rel=1e-9)


# ------------------------------------------------------------------------------ what is refused


def test_a_reference_for_reconstruction_is_refused_before_sampling(tmp_path, sampled_folder):
    with pytest.raises(ValueError, match=r"is for reconstruction.*--kind generation --data"):
        evaluate_generation(
            settings(
                sampled_folder,
                tmp_path,
                run=sample_run(sampled_folder),
                reference=str(sampled_folder / "reconstruction.npz"),
            )
        )
    assert not (tmp_path / "samples").exists()


@pytest.mark.parametrize("of", ["samples", "data"])
def test_pictures_larger_than_asked_for_are_not_read(tmp_path, sampled_folder, of):
    large = write_images(tmp_path / "large", 3, size=20)
    given = dict.fromkeys(("samples", "data"), str(sampled_folder / "images"))
    evaluate_generation(settings(sampled_folder, tmp_path / "in", max_pixels=256, **given))
    given |= {of: str(large)}
    with pytest.raises(ValueError, match=r"400 pixels, more than max_pixels \(256\)"):
        evaluate_generation(settings(sampled_folder, tmp_path / "out", max_pixels=256, **given))


def test_samples_of_another_size_are_refused_with_both_numbers(tmp_path, sampled_folder):
    large = write_images(tmp_path / "large", 3, size=32)
    with pytest.raises(ValueError, match=r"is of 16 x 16 pixels .* have 32 x 32"):
        evaluate_generation(settings(sampled_folder, tmp_path / "out", samples=str(large)))
    write_images(tmp_path / "large", 1, size=24)
    with pytest.raises(ValueError, match=r"16 x 16 pixels .* have 24 x 24"):
        evaluate_generation(settings(sampled_folder, tmp_path / "out", samples=str(large)))


def test_samples_of_several_sizes_are_refused(tmp_path, sampled_folder):
    mixed = write_images(tmp_path / "mixed", 4)
    write_images(tmp_path / "one", 1, size=20)
    (tmp_path / "one" / "000.png").rename(mixed / "003.png")
    with pytest.raises(ValueError, match=r"003\.png has 20 x 20 pixels and the first has 16 x 16"):
        evaluate_generation(settings(sampled_folder, tmp_path / "out", samples=str(mixed)))


def test_a_classifier_of_other_classes_is_refused(tmp_path, sampled_folder, pair):
    generator = build_generator(replace(GENERATOR, num_classes=4))
    save_generator(
        generator,
        tmp_path / "four",
        tokenizer=tokens_hash(sampled_folder / "tokenizer"),
        class_names=list("abcd"),
    )
    run = sample_run(sampled_folder, model=str(tmp_path / "four"))
    with pytest.raises(ValueError, match="tells 3 classes and the generator has 4"):
        evaluate_generation(
            settings(
                sampled_folder,
                tmp_path / "out",
                run=run,
                classifier=str(sampled_folder / "colours.pt"),
            )
        )
