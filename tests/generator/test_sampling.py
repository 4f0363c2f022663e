"""Tests of `mergevq.generator.sampling`."""

import math
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from mergevq.config.generator import (
    OneByOne,
    SamplingSettings,
    Several,
)
from mergevq.generator.sampling import (
    arccos_schedule,
    draw,
    guidance_scales,
    image_seed,
    pick,
    sample_in_steps,
)
from mergevq.generator.seams import Sequences
from tests.support.generators import KINDS, ORDERS, tiny_batch, tiny_generator
from tests.support.sampling import inpainted, run

GREEDY = SamplingSettings(temperature=0.0)
GUIDED = SamplingSettings(guidance_scale=3.0)
SEQUENTIAL = ("raster", "merge", "anchor")


def test_rows_of_a_merged_batch_are_ragged():
    # The batch above is a test of raggedness only if its rows differ in number of tokens.
    indices = tiny_batch("merge").indices
    assert len({len(row.unique()) for row in indices}) > 1


# ------------------------------------------------------------------------------------ draws


@pytest.mark.parametrize(
    "settings", [GREEDY, replace(GREEDY, guidance_scale=2.5)], ids=["1", "2.5"]
)
@pytest.mark.parametrize("order", ORDERS)
def test_greedy_is_the_argmax_of_the_full_forward(order, settings):
    model = tiny_generator(order)
    settings = replace(settings, passes=OneByOne(budget=False))
    sampled = run(model, [0, 1, 2, 2], settings)
    given = Sequences(sampled.indices, torch.tensor([0, 1, 2, 2]), 5, anchors=sampled.anchors)
    if order == "random":
        given = given._replace(slots=draw(0, range(4), 5, 2, model.device).order)
    conditional = model.logits(given)
    unconditional = model.logits(given._replace(class_label=torch.full((4,), 3)))
    parts = model.parts(given)
    if order == "anchor":
        parts[:, 1:, 0] = parts[:, :, 0].diff(dim=1)
    for part, (with_class, without) in enumerate(zip(conditional, unconditional, strict=True)):
        guided = without + settings.guidance_scale * (with_class - without)
        guided = guided.where(torch.isfinite(with_class), -torch.inf)
        assert torch.equal(guided.argmax(-1), parts[..., part])


def test_no_two_images_of_a_run_share_their_draws():
    shared = draw(50, [6897, 12847], 8, 1, torch.device("cpu")).uniforms
    assert not torch.equal(shared[0], shared[1])
    seeds = {image_seed(50, image) for image in range(100_000)}
    assert len(seeds) == 100_000
    assert all(0 <= seed < 2**32 for seed in seeds)


def test_a_value_is_the_place_of_a_number_in_the_distribution_function():
    logits = torch.tensor([0.2, 0.5, 0.3]).log().expand(5, 3)
    uniforms = torch.tensor([0.0, 0.19, 0.21, 0.69, 0.71])
    assert pick(logits, uniforms).tolist() == [0, 0, 1, 1, 2]


def test_impossible_values_are_never_picked():
    logits = torch.tensor([-torch.inf, 0.0, -torch.inf, 0.0, -torch.inf]).expand(4, 5)
    uniforms = torch.tensor([0.0, 0.4, 0.6, 1 - 2**-24])
    assert pick(logits, uniforms).tolist() == [1, 1, 3, 3]


def test_the_largest_number_picks_the_last_possible_value(generator):
    logits = 5 * torch.randn(5000, 40, generator=generator)
    logits[:, 30:] = -torch.inf
    picked = pick(logits, torch.full((5000,), 1 - 2**-24))
    assert picked.max() < 30
    assert picked.float().mean() > 20


def test_temperature_sharpens_and_zero_is_the_mode():
    logits = torch.tensor([0.3, 0.4, 0.3]).log().expand(3, 3)
    uniforms = torch.tensor([0.05, 0.5, 0.95])
    assert pick(logits, uniforms, temperature=0.01).tolist() == [1, 1, 1]
    assert pick(logits, uniforms, temperature=0.0).tolist() == [1, 1, 1]
    assert pick(logits, uniforms, temperature=1e-38).tolist() == [1, 1, 1]
    assert pick(logits, uniforms, temperature=9.0).tolist() == [0, 1, 2]


def test_top_k_and_top_p_keep_the_most_likely():
    logits = torch.tensor([0.1, 0.4, 0.2, 0.3]).log().expand(100, 4)
    uniforms = torch.linspace(0, 0.999, 100)
    assert set(pick(logits, uniforms).tolist()) == {0, 1, 2, 3}
    assert set(pick(logits, uniforms, top_k=2).tolist()) == {1, 3}
    assert set(pick(logits, uniforms, top_k=9).tolist()) == {0, 1, 2, 3}
    assert set(pick(logits, uniforms, top_p=0.65).tolist()) == {1, 3}
    assert set(pick(logits, uniforms, top_p=0.75).tolist()) == {1, 2, 3}
    assert set(pick(logits, uniforms, top_p=1e-6).tolist()) == {1}


# --------------------------------------------------------------------------------- guidance


def test_guidance_per_step_by_hand():
    def scales(schedule, **changes):
        settings = SamplingSettings(guidance_scale=5.0, guidance_schedule=schedule, **changes)
        return guidance_scales(settings, range(4), 4)

    # After t of 4 tokens the schedule is t / 4 of the way.
    assert scales("constant") == [5, 5, 5, 5]
    assert scales("linear") == [1, 2, 3, 4]
    assert scales("power") == [1, 1.25, 2, 3.25]
    half = math.sqrt(0.5)
    assert scales("cosine") == pytest.approx([1, 3 - 2 * half, 3, 3 + 2 * half])
    assert scales("linear", guidance_interval=(0.25, 0.5)) == [1, 2, 3, 1]
    assert guidance_scales(GUIDED, [0, 1, 3], 4) == [3, 3, 3]
    linear = SamplingSettings(guidance_scale=5.0, guidance_schedule="linear")
    assert guidance_scales(linear, [0, 1, 3], 4) == [1, 2, 4]
    assert guidance_scales(linear, [0], 1) == [1]


# ----------------------------------------------------------------------------------- random


def test_parallel_passes_follow_the_arccos_schedule():
    # 1 - cos(pi/2 * s/4) is 0.076, 0.293, 0.617 and 1: of 16 tokens 2, 5, 10 and 16 are decoded.
    assert arccos_schedule(16, 4) == [2, 3, 5, 6]
    assert arccos_schedule(5, 1) == [5]
    assert sum(arccos_schedule(256, 88)) == 256


@pytest.mark.parametrize("num_tokens", [1, 2, 7, 36, 144])
def test_no_pass_is_empty(num_tokens):
    for num_steps in range(1, num_tokens + 1):
        counts = arccos_schedule(num_tokens, num_steps)
        assert len(counts) == num_steps
        assert min(counts) >= 1
        assert sum(counts) == num_tokens


def test_greedy_inpainting_is_the_argmax_given_what_is_kept():
    model, given = tiny_generator("random"), tiny_batch("random", batch=1, num_codes=20)
    keep = torch.tensor([[1, 1, 0, 1, 1]]).bool()
    sampled = inpainted(model, given.indices, keep, [1], temperature=0.0)
    shuffled = draw(0, [0], 5, 2, model.device).order[0].tolist()
    slots = torch.tensor([[slot for slot in shuffled if slot != 2] + [2]])
    given = Sequences(sampled.indices, torch.tensor([1]), 5, slots=slots)
    expected = [int(part[0, 2].argmax()) for part in model.logits(given)]
    assert model.parts(given)[0, 2].tolist() == expected


STEP = """
import sys
import torch
from mergevq.generator.seams import Sequences
from tests.support.generators import tiny_generator
from mergevq.config.generator import (
    SamplingSettings,
)
from mergevq.generator.decoding import prefill

model = tiny_generator(sys.argv[1])
order, model = model.order, model.network
cache = order.cache(model, batch=2, num_kept=5, settings=SamplingSettings())
prefill(model, cache, torch.zeros(2, dtype=torch.int64), 5)
mask = cache.place(torch.zeros(2, dtype=torch.int64))
inputs, turns = torch.randn(2, 1, 32), model.turns(torch.zeros(2, 1, 2))
step = torch.compile(model.transform, fullgraph=True, backend="eager")
with torch.no_grad():
    expected = model.transform(inputs, turns, mask, cache)
    torch.testing.assert_close(step(inputs, turns, mask, cache), expected)
"""


@pytest.mark.slow
@pytest.mark.parametrize("order", SEQUENTIAL)
def test_a_step_is_one_graph(order):
    # In a process of its own: shape checks of these tests are nothing a compiler can trace.
    finished = subprocess.run(
        [sys.executable, "-c", STEP, order],
        cwd=Path(__file__).parent,
        check=False,
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
    )
    assert finished.returncode == 0, finished.stderr


# ------------------------------------------------------------------------------------ errors


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"guidance_scale": -1.0}, r"guidance_scale \(-1.0\) must be between 0 and 1000"),
        ({"guidance_scale": math.nan}, r"guidance_scale \(nan\) must be between 0 and"),
        ({"guidance_power": 0.0}, r"guidance_power \(0.0\) must be above 0"),
        ({"guidance_interval": (0.5, 0.2)}, r"guidance_interval \(0.5, 0.2\) must be two shares"),
        ({"temperature": -0.1}, r"temperature \(-0.1\) must be between 0 and 1000"),
        ({"temperature": (1.0, -2.0)}, r"temperature \(1.0, -2.0\) must all be between 0 and"),
        ({"top_k": -1}, r"top_k \(-1\) must be between 0 and"),
        ({"top_p": 0.0}, r"top_p \(0.0\) must be between 1e-06 and 1"),
    ],
)
def test_settings_that_are_no_distribution_are_errors(changes, message):
    with pytest.raises(ValueError, match=message):
        SamplingSettings(**changes)


# ------------------------------------------------------------------------------ step by step


def in_steps(model, settings, every):
    return sample_in_steps(
        model,
        labels=torch.tensor([0, 1, 2]),
        num_kept=5,
        seed=4,
        image_ids=range(3),
        settings=settings,
        every=every,
    )


@pytest.mark.parametrize("order", KINDS)
def test_looking_at_every_step_changes_no_token(order):
    model = tiny_generator(order)
    settings = GUIDED
    if model.config.order.in_parallel:
        settings = replace(GUIDED, passes=Several(num_steps=3))
    whole = run(model, [0, 1, 2], settings, seed=4)
    parts = list(in_steps(model, settings, 1))
    assert [part.share for part in parts] == pytest.approx(
        [(step + 1) / len(parts) for step in range(len(parts))]
    )
    before = torch.zeros(3, 0)
    for part in parts:
        known, indices = part.known, part.sampled.indices
        assert known.shape == indices.shape
        # What is decoded stays, there is more of it in every step, and it is that of the end.
        assert known[:, : before.shape[1]][before.bool()].all()
        assert torch.equal(indices[known], whole.indices[:, : indices.shape[1]][known])
        counts = known.sum(1)
        assert (counts > before.sum(1)).all()
        assert (counts == counts[0]).all()
        before = known
    assert before.all()
    last = parts[-1].sampled
    for name in ("indices", "source_index", "anchors"):
        one, other = getattr(last, name), getattr(whole, name)
        assert (one is None) == (other is None)
        assert one is None or torch.equal(one, other)


def test_a_look_is_taken_after_every_so_many_steps_and_the_last():
    model = tiny_generator("raster")
    shares = [part.share for part in in_steps(model, GREEDY, 5)]
    assert shares == pytest.approx([5 / 12, 10 / 12, 1])
    with pytest.raises(ValueError, match=r"every \(0\) must be at least 1"):
        next(in_steps(model, GREEDY, 0))
