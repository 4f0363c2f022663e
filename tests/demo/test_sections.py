"""Sections of the report for given numbers; test_quickstart.py has the whole."""

from dataclasses import replace

import pytest
from PIL import Image

from mergevq.config.objective import SelfDistillation
from mergevq.config.recipes.digits import digits32, digits32_ar
from mergevq.demo.sections import (
    duration,
    generator_sections,
    highlights,
    next_section,
    probe_section,
)
from mergevq.demo.trial import GeneratorTrial, Trial
from mergevq.evaluate.probe.linear import ProbeRow

pytest.importorskip("matplotlib")

SQUARE = Image.new("RGB", (32, 32))
RUN = digits32()
LOG = [{"step": 0, "images_per_second": 32.0}]
TRIAL = Trial(
    run=RUN,
    record={},
    log=LOG,
    num_parameters=1,
    num_images=40,
    measured={20: {"bits": 374.2, "bits_per_pixel": 0.3654, "psnr": 20.04, "psnr_recovered": 15.5}},
    recognised={},
    probes=[ProbeRow("raw pixels", 256, 0.95, 0.9875)],
    usage=None,
    originals=[SQUARE],
    labels=[],
    pictured=[],
)
GENERATOR = GeneratorTrial(
    run=digits32_ar(),
    record={},
    log=[
        {"step": 0, "nll": 5.5, "sequences_per_second": 1.0},
        {"step": 1, "val_nll@20": 5.0},
    ],
    num_parameters=1,
    guidance=2.0,
    class_names=["cat", "dog"],
    samples=[[SQUARE] * 3, [SQUARE] * 3],
    nearest=[SQUARE, SQUARE],
    accuracy=0.8333,
    real_accuracy=0.996,
    num_real=500,
)


def test_samples_and_real_images_are_judged_side_by_side():
    (section,) = generator_sections(GENERATOR)
    assert section.tables[0].rows == [
        ["Images", "500", "6"],
        ["Taken for the class they are of", "99.6 %", "83.3 %"],
    ]
    assert "5.55 nats" in section.pictures[-1].caption
    assert "Guidance is 2;" in section.text


def test_probes_say_what_the_tokens_were_trained_with():
    supervised = probe_section(TRIAL)
    assert supervised.tables[0].rows == [["raw pixels", "256", "95.0 %", "98.8 %"]]
    assert "trained with the labels" in supervised.text
    alone = replace(RUN, teacher=SelfDistillation())
    assert "trained with the labels" not in probe_section(TRIAL._replace(run=alone)).text


def test_the_first_numbers_are_of_both_models():
    shown = {each.label: each.value for each in highlights(TRIAL, GENERATOR)}
    assert shown["PSNR, given source"] == "20.0 dB"
    assert shown["training time"] == "1 min 06 s"
    assert "83 %" in shown.values()
    assert len(highlights(TRIAL)) == len(shown) - 1


@pytest.mark.parametrize(("seconds", "words"), [(59.4, "59 s"), (60, "1 min 00 s")])
def test_durations_are_in_words(seconds, words):
    assert duration(seconds) == words


def test_the_page_says_what_to_run_next():
    (table,) = next_section(TRIAL).tables
    commands = [row[1] for row in table.rows]
    assert f"mergevq demo --model {TRIAL.run.out}/model" in commands
    assert any(command.startswith("mergevq train photos64 --data.path") for command in commands)
