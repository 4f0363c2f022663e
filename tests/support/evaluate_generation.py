"""Helpers that the tests of `mergevq.evaluate.generation` share."""

import pytest

from mergevq.config.evaluation import GenerationSettings
from mergevq.config.generator import (
    SampleRun,
)
from mergevq.metrics.references import make_reference


def write_reference(sampled_folder, path, kind, array=None):
    with pytest.warns(UserWarning, match="biases"):
        make_reference(
            str(sampled_folder / "images"),
            path,
            kind,
            extractor=sampled_folder / "colours.pt",
            image_size=16,
            batch_size=5,
            num_features=12,
            array=array,
            device="cpu",
        )


def sample_run(sampled_folder, **changes):
    models = {
        "model": str(sampled_folder / "generator"),
        "tokenizer": str(sampled_folder / "tokenizer"),
    }
    return SampleRun(**models | {"num_images": 7, "batch_size": 3, "device": "cpu"} | changes)


def settings(sampled_folder, out, **changes):
    given = {
        "reference": str(sampled_folder / "generation.npz"),
        "extractor": str(sampled_folder / "colours.pt"),
        "out": str(out),
        "batch_size": 4,
        "device": "cpu",
    }
    return GenerationSettings(**given | changes)


def files(out):
    return {path.name: path.read_bytes() for path in (out / "samples").glob("*.png")}
