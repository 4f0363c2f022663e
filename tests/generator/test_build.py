import json
import re
from pathlib import Path

import pytest
import torch

from mergevq.config.generator import (
    OneByOne,
    SamplingSettings,
    Several,
)
from mergevq.config.parts.heads import (
    Subindices,
)
from mergevq.config.parts.orders import (
    Merge,
    Random,
)
from mergevq.generator.build import build_generator, load_generator, save_generator
from mergevq.generator.network import Head
from mergevq.generator.sampling import sample
from mergevq.generator.seams import Generator, Order, Sequences
from mergevq.generator.writing import read_sample_run
from mergevq.runtime.migrate import migrate_generator
from tests.support.generators import ORDERS, TINY, tiny_batch, tiny_generator

V1 = Path(__file__).resolve().parents[1] / "data" / "format1"
EXPECTED = json.loads((V1 / "generators.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("order", ORDERS)
def test_a_generator_of_format_1_has_the_likelihoods_and_samples_that_it_had(order):
    model, expected = load_generator(V1 / f"generator-{order}"), EXPECTED[order]
    given = expected["given"] | {"slots": expected["given"].get("order")}
    given.pop("order", None)
    sequences = Sequences(
        **{
            name: torch.tensor(value) if isinstance(value, list) else value
            for name, value in given.items()
        }
    )
    found = model.log_likelihood(sequences)
    torch.testing.assert_close(found, torch.tensor(expected["log_likelihood"]))
    sampled = sample(
        model,
        labels=torch.tensor([0, 1, 0, 2]),
        num_kept=3,
        seed=7,
        image_ids=range(4),
        settings=SamplingSettings(
            guidance_scale=2.0, passes=Several(num_steps=2) if order == "random" else OneByOne()
        ),
    )
    assert sampled.indices.tolist() == expected["sampled"]
    anchors = None if sampled.anchors is None else sampled.anchors.tolist()
    assert anchors == expected["anchors"]


@pytest.mark.parametrize("order", ORDERS)
def test_settings_of_an_order_of_format_1_are_kept(order):
    config = load_generator(V1 / f"generator-{order}").config
    assert config.order.kind == order
    assert config.head == Subindices(sizes=(4, 4))
    if order == "merge":
        assert config.order == Merge(window=1)
    if order == "random":
        assert config.order == Random(rotate_instruction=False)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"order": "spiral"}, "order ('spiral') must be one of raster, merge, random, anchor"),
        ({"factor_bits": "9"}, "factor_bits ('9') must be a list of numbers of bits"),
        ({"factor_bits": [0, 18]}, "factor_bits ([0, 18]) must be a list of numbers of bits"),
        ({"factor_bits": [9, 8]}, "factor_bits (9, 8) must sum to num_bits (18)"),
    ],
)
def test_settings_of_format_1_that_never_were_are_refused(changes, message):
    with pytest.raises(ValueError, match="^" + re.escape(message)):
        migrate_generator(changes)


def test_a_run_of_samples_of_format_1_is_read():
    old = json.loads((V1 / "sample-run.json").read_text(encoding="utf-8"))
    written = {"format_version": 1, "kind": "samples", "run": old, "images": []}
    written |= {"generator": "a", "tokenizer": "b"}
    settings = read_sample_run(written, where="samples.json").settings
    assert settings == SamplingSettings(temperature=(0.5, 1.0), passes=Several(num_steps=3))
    old["settings"]["num_steps"] = None
    settings = read_sample_run(written, where="samples.json").settings
    assert settings.passes == OneByOne(budget=False)
    old["settings"] = 3
    with pytest.raises(ValueError, match=r"samples.json: run.settings \(3\) must be an object"):
        read_sample_run(written, where="samples.json")


@pytest.mark.parametrize("order", ORDERS)
def test_what_is_saved_is_what_is_loaded(order, tmp_path):
    model, given = tiny_generator(order), tiny_batch(order)
    save_generator(model, tmp_path, tokenizer="a" * 64, class_names=("a", "b", "c"))
    loaded = load_generator(tmp_path)
    assert loaded.config == model.config
    assert not loaded.training
    assert torch.equal(loaded.log_likelihood(given), model.log_likelihood(given))


@pytest.mark.parametrize("order", ORDERS)
def test_what_is_built_fits_the_seams(order):
    model = tiny_generator(order)
    assert isinstance(model, Generator)
    assert isinstance(model.order, Order)
    assert isinstance(model.network.head, Head)


def test_building_draws_from_the_default_generator():
    states = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        states.append(build_generator(TINY).network.class_embedding.weight.detach())
    assert torch.equal(states[0], states[1])
    assert not torch.equal(states[0], states[2])


@pytest.mark.parametrize("order", ORDERS)
def test_a_generator_is_shown_in_a_few_lines(order):
    model = tiny_generator(order)
    shown = repr(model)
    assert len(shown.splitlines()) == 8
    assert f"order {order}, grid of " in shown
    count = sum(each.numel() for each in model.parameters())
    assert f"{count:,} parameters, float32 on cpu" in shown
