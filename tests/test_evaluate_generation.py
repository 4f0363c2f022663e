"""Samples are the same however they are made, and are compared with what they should be."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from evaluations import ALONE, write_images, write_network, write_tokenizer

from mergevq import distributed
from mergevq.checkpoint import tokens_hash
from mergevq.config import GeneratorConfig, SampleRun
from mergevq.config_evaluate import GenerationSettings
from mergevq.evaluate_generation import (
    evaluate_generation,
    nearest_neighbours,
    sample_missing,
)
from mergevq.extractor import FeatureExtractor
from mergevq.generation import load_pair
from mergevq.generator import Generator
from mergevq.image_arrays import ImageArray
from mergevq.images import open_images
from mergevq.references import make_reference

pytestmark = pytest.mark.filterwarnings(
    "ignore:a (Frechet distance|reference) of:UserWarning",
    "ignore:.*is enlarged:UserWarning",
)
GENERATOR = GeneratorConfig(
    order="merge",
    dim=32,
    num_layers=1,
    num_heads=2,
    ffn_dim=32,
    num_classes=3,
    grid_size=(4, 4),
    kept_candidates=(8,),
    num_kept=8,
    num_bits=4,
    factor_bits=(2, 2),
)


def write_reference(folder, path, kind, array=None):
    with pytest.warns(UserWarning, match="biases"):
        make_reference(
            str(folder / "images"),
            path,
            kind,
            extractor=folder / "colours.pt",
            image_size=16,
            batch_size=5,
            num_features=12,
            array=array,
            device="cpu",
        )


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("generation")
    write_tokenizer(folder / "tokenizer")
    torch.manual_seed(0)
    generator = Generator(GENERATOR)
    with torch.no_grad():
        for parameter in generator.parameters():
            parameter.add_(torch.randn(parameter.shape) * 0.3)
    generator.save_pretrained(
        folder / "generator",
        tokenizer=tokens_hash(folder / "tokenizer"),
        class_names=["a", "b", "c"],
    )
    write_images(folder / "images", 12)
    write_network(folder / "colours.pt")
    for kind in ("generation", "reconstruction"):
        write_reference(folder, folder / f"{kind}.npz", kind)
    return folder


def sample_run(folder, **changes):
    models = {"model": str(folder / "generator"), "tokenizer": str(folder / "tokenizer")}
    return SampleRun(**models | {"num_images": 7, "batch_size": 3, "device": "cpu"} | changes)


def settings(folder, out, **changes):
    given = {
        "reference": str(folder / "generation.npz"),
        "extractor": str(folder / "colours.pt"),
        "out": str(out),
        "batch_size": 4,
        "device": "cpu",
    }
    return GenerationSettings(**given | changes)


def files(out):
    return {path.name: path.read_bytes() for path in (out / "samples").iterdir()}


@pytest.fixture(scope="module")
def pair(folder):
    return load_pair(folder / "generator", folder / "tokenizer", torch.device("cpu"))


# ---------------------------------------------------------------------------------- sampling


def test_samples_are_the_same_on_any_ranks_and_after_a_stop(tmp_path, folder, pair):
    run = sample_run(folder)
    sample_missing(pair, run, tmp_path / "one", ALONE)
    expected = files(tmp_path / "one")
    assert sorted(expected) == [f"{number:08d}.png" for number in range(7)]
    for rank in (1, 0):
        world = distributed.World(rank=rank, world_size=2, local_rank=0, device=torch.device("cpu"))
        sample_missing(pair, run, tmp_path / "two", world)
    assert files(tmp_path / "two") == expected
    for name in ("00000001.png", "00000006.png"):
        (tmp_path / "one" / "samples" / name).unlink()
    sample_missing(pair, run, tmp_path / "one", ALONE)
    assert files(tmp_path / "one") == expected


def test_more_samples_and_other_batches_change_none_that_are_there(tmp_path, folder, pair):
    sample_missing(pair, sample_run(folder, num_images=4), tmp_path / "some", ALONE)
    sample_missing(pair, sample_run(folder), tmp_path / "some", ALONE)
    sample_missing(pair, sample_run(folder, batch_size=7), tmp_path / "all", ALONE)
    assert files(tmp_path / "some") == files(tmp_path / "all")


def test_what_is_there_is_not_made_again(tmp_path, folder, pair):
    sample_missing(pair, sample_run(folder), tmp_path, ALONE)
    marked = tmp_path / "samples" / "00000002.png"
    marked.write_bytes(b"mark")
    sample_missing(pair, sample_run(folder), tmp_path, ALONE)
    assert marked.read_bytes() == b"mark"


def test_samples_of_another_run_are_refused(tmp_path, folder, pair):
    sample_missing(pair, sample_run(folder), tmp_path, ALONE)
    with pytest.raises(ValueError, match=r"samples of another run, .* seed \(0, now 1\)"):
        sample_missing(pair, sample_run(folder, seed=1), tmp_path, ALONE)
    (tmp_path / "sampling.json").unlink()
    with pytest.raises(ValueError, match="images of unknown origin"):
        sample_missing(pair, sample_run(folder), tmp_path, ALONE)


# -------------------------------------------------------------------------------- evaluation


def test_a_generator_is_evaluated_and_everything_recorded(tmp_path, folder):
    record = evaluate_generation(
        settings(
            folder,
            tmp_path,
            run=sample_run(folder),
            classifier=str(folder / "colours.pt"),
            data=str(folder / "images"),
            num_looked_up=2,
            write_array=True,
        )
    )
    assert json.loads((tmp_path / "evaluation.json").read_text()) == record
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
        evaluate_generation(settings(folder, tmp_path, run=sample_run(folder)))


def test_the_training_set_itself_is_perfect_in_any_form(tmp_path, folder):
    write_reference(folder, tmp_path / "reference.npz", "generation", tmp_path / "array.npz")
    records = [
        evaluate_generation(
            settings(
                folder,
                tmp_path / name,
                samples=str(samples),
                reference=str(tmp_path / "reference.npz"),
            )
        )
        for name, samples in (
            ("folder", folder / "images"),
            ("array", tmp_path / "array.npz"),
        )
    ]
    assert records[0]["metrics"] == records[1]["metrics"]
    assert records[0]["samples"]["pixels_sha256"] == records[1]["samples"]["pixels_sha256"]
    metrics = records[0]["metrics"]
    assert metrics["frechet_colours"] < 1e-3
    assert metrics["precision_colours"] == metrics["recall_colours"] == 1


def test_a_copied_training_image_is_at_no_distance(folder):
    extractor, images = FeatureExtractor(folder / "colours.pt"), open_images(str(folder / "images"))
    pixels = torch.from_numpy(np.array(images.read(5))).permute(2, 0, 1)[None]
    for batch_size in (1, 5, 12):
        found = nearest_neighbours(
            extractor.features(pixels), images, extractor, ALONE, image_size=16,
            batch_size=batch_size,
        )  # fmt: skip
        assert found.position[0, 0] == 5
        assert found.distance[0, 0] == pytest.approx(0, abs=1e-3)
        assert (found.distance[0].diff() >= 0).all()


def test_classes_come_in_turn(tmp_path, folder):
    record = evaluate_generation(
        settings(
            folder,
            tmp_path,
            run=sample_run(folder, num_images=6),
            classifier=str(folder / "colours.pt"),
        )
    )
    extractor = FeatureExtractor(folder / "colours.pt")
    images = open_images(str(tmp_path / "samples"))
    pixels = torch.stack([torch.from_numpy(np.array(images.read(i))) for i in range(6)])
    chosen = extractor.probabilities(pixels.permute(0, 3, 1, 2)).argmax(1)
    expected = (chosen == torch.tensor([0, 1, 2, 0, 1, 2])).float().mean()
    assert record["metrics"]["class_accuracy"] == pytest.approx(float(expected))


# ------------------------------------------------------------------------------ what is refused


def test_a_reference_for_reconstruction_is_refused_before_sampling(tmp_path, folder):
    with pytest.raises(ValueError, match=r"is for reconstruction.*--kind generation --data"):
        evaluate_generation(
            settings(
                folder,
                tmp_path,
                run=sample_run(folder),
                reference=str(folder / "reconstruction.npz"),
            )
        )
    assert not (tmp_path / "samples").exists()


def test_samples_of_another_size_are_refused_with_both_numbers(tmp_path, folder):
    large = write_images(tmp_path / "large", 3, size=32)
    with pytest.raises(ValueError, match=r"is of 16 x 16 pixels .* have 32 x 32"):
        evaluate_generation(settings(folder, tmp_path / "out", samples=str(large)))
    write_images(tmp_path / "large", 1, size=24)
    with pytest.raises(ValueError, match=r"16 x 16 pixels .* have 24 x 24"):
        evaluate_generation(settings(folder, tmp_path / "out", samples=str(large)))


def test_samples_of_several_sizes_are_refused(tmp_path, folder):
    mixed = write_images(tmp_path / "mixed", 4)
    write_images(tmp_path / "one", 1, size=20)
    (tmp_path / "one" / "000.png").rename(mixed / "003.png")
    with pytest.raises(ValueError, match=r"003\.png has 20 x 20 pixels and the first has 16 x 16"):
        evaluate_generation(settings(folder, tmp_path / "out", samples=str(mixed)))


def test_a_classifier_of_other_classes_is_refused(tmp_path, folder, pair):
    generator = Generator(replace(GENERATOR, num_classes=4))
    generator.save_pretrained(
        tmp_path / "four", tokenizer=tokens_hash(folder / "tokenizer"), class_names=list("abcd")
    )
    run = sample_run(folder, model=str(tmp_path / "four"))
    with pytest.raises(ValueError, match="tells 3 classes and the generator has 4"):
        evaluate_generation(
            settings(folder, tmp_path / "out", run=run, classifier=str(folder / "colours.pt"))
        )
