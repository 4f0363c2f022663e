"""Settings that make no sense are refused before anything is loaded."""

from dataclasses import fields

import pytest

from mergevq.config.evaluation import (
    GenerationSettings,
    ReconstructionSettings,
    RobustnessSettings,
    Subject,
)
from mergevq.config.generator import (
    SampleRun,
)

SUBJECT = Subject(model="model", data="data")
PATHS = {"reference": "r.npz", "extractor": "e.pt", "out": "out"}


@pytest.mark.parametrize("name", ["batch_size", "max_images"])
def test_a_subject_needs_images(name):
    with pytest.raises(ValueError, match=rf"{name} \(0\) must be between 1 and"):
        Subject(model="model", data="data", **{name: 0})


@pytest.mark.parametrize("max_pixels", [0, 10**9])
def test_a_limit_on_pixels_is_possible(max_pixels):
    message = rf"max_pixels \({max_pixels}\) must be between 1 and 178956970"
    with pytest.raises(ValueError, match=message):
        Subject(model="model", data="data", max_pixels=max_pixels)
    with pytest.raises(ValueError, match=message):
        GenerationSettings(**PATHS, samples="there", max_pixels=max_pixels)


def test_processes_cannot_be_negative():
    with pytest.raises(ValueError, match=r"num_workers \(-1\) must be between 0 and"):
        Subject(model="model", data="data", num_workers=-1)


@pytest.mark.parametrize("name", ["num_shown", "num_baseline_images"])
def test_nothing_may_be_shown_and_no_less(name):
    assert getattr(ReconstructionSettings(subject=SUBJECT, out="out", **{name: 0}), name) == 0
    with pytest.raises(ValueError, match=rf"{name} \(-1\) must be between 0 and"):
        ReconstructionSettings(subject=SUBJECT, out="out", **{name: -1})


@pytest.mark.parametrize("fraction", [-0.1, 1.5])
def test_fractions_are_shares(fraction):
    with pytest.raises(ValueError, match=r"fractions .* must all be between 0 and 1"):
        RobustnessSettings(subject=SUBJECT, out="out", fractions=(0.0, fraction))
    with pytest.raises(ValueError, match="at least one"):
        RobustnessSettings(subject=SUBJECT, out="out", fractions=())


def test_either_a_generator_or_samples_is_needed():
    for given in ({}, {"run": SampleRun(), "samples": "there"}):
        with pytest.raises(ValueError, match="either a generator"):
            GenerationSettings(**PATHS, **given)
    with pytest.raises(ValueError, match="--classifier needs the classes"):
        GenerationSettings(**PATHS, samples="there", classifier="net.pt")
    with pytest.raises(ValueError, match=r"num_looked_up \(0\) must be between 1 and"):
        GenerationSettings(**PATHS, samples="there", num_looked_up=0)


def test_each_setting_has_a_default_but_what_it_is_about():
    required = {
        field.name
        for settings in (Subject, ReconstructionSettings, RobustnessSettings, GenerationSettings)
        for field in fields(settings)
        if field.default is field.default_factory
    }
    assert required == {"data", "subject", "out", "reference", "extractor"}
