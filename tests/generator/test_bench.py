from dataclasses import replace
from pathlib import Path

import pytest
import torch

from mergevq.config.generator import (
    OneByOne,
    SamplingSettings,
    Several,
)
from mergevq.generator import bench as bench_generator
from mergevq.generator.bench import grid_config, spread_steps
from mergevq.generator.build import build_generator
from mergevq.generator.sampling import arccos_schedule, draw, sample
from mergevq.runtime import device as places
from mergevq.runtime.device import resolve_precision
from mergevq.training.bench.tokenizer import load_reference
from tests.support.generators import KINDS, ORDERS, TINY, changed, tiny_generator

REFERENCE = Path(__file__).resolve().parents[2] / "benchmarks" / "reference_generator.py"
PLAIN = load_reference(REFERENCE)


def greedy_tokens(model, way, labels, order, num_steps=None, guidance=None):
    """Tokens that a plain loop decodes, in all steps."""
    config = model.config
    state = model.network.state_dict() | {
        name.removeprefix("order."): weight
        for name, weight in model.state_dict().items()
        if name.startswith("order.")
    }
    loop = PLAIN.Loop(
        state,
        config,
        labels,
        5,
        way,
        greedy=True,
        guidance=guidance,
        order=order if config.order.kind == "random" else None,
        counts=arccos_schedule(5, num_steps or 5),
    )
    while loop.parts.shape[1] < loop.length:
        loop.step()
    return loop.parts


@pytest.mark.parametrize("way", PLAIN.WAYS)
@pytest.mark.parametrize("order", ORDERS)
def test_plain_loops_decode_the_tokens_that_we_decode(order, way):
    model = tiny_generator(order, qk_norm=True, num_kv_heads=1)
    num_steps = 3 if order == "random" else None
    labels = torch.tensor([0, 1, 2])
    sampled = sample(
        model,
        labels=labels,
        num_kept=5,
        seed=0,
        image_ids=range(3),
        settings=SamplingSettings(
            temperature=0.0,
            passes=Several(num_steps=3) if num_steps else OneByOne(budget=False),
        ),
    )
    slots = draw(0, range(3), 5, 2, model.device).order
    parts = greedy_tokens(model, way, labels, slots, num_steps)
    indices = model.network.indices(parts)
    if order == "random":
        indices = torch.zeros_like(indices).scatter(1, slots, indices)
    assert torch.equal(indices, sampled.indices)
    if order == "anchor":
        assert torch.equal(parts[..., 0], sampled.anchors)


@pytest.mark.parametrize("order", ["raster", "random"])
def test_plain_loops_guide_as_we_do(order):
    model, labels = tiny_generator(order), torch.tensor([0, 1, 2])
    settings = SamplingSettings(
        temperature=0.0,
        guidance_scale=3.0,
        passes=Several(num_steps=3) if order == "random" else OneByOne(),
    )
    sampled = sample(
        model, labels=labels, num_kept=5, seed=0, image_ids=range(3), settings=settings
    )
    slots = draw(0, range(3), 5, 2, model.device).order.repeat(2, 1)
    rows = torch.cat([labels, torch.full_like(labels, model.config.null_class)])
    num_steps = 3 if order == "random" else None
    parts = greedy_tokens(model, "buffer", rows, slots, num_steps, guidance=3.0)
    indices = model.network.indices(parts)
    if order == "random":
        indices = torch.zeros_like(indices).scatter(1, slots, indices)
    assert torch.equal(indices[:3], sampled.indices)
    assert torch.equal(indices[3:], sampled.indices)


# ----------------------------------------------------------------------------- what is measured


CPU = torch.device("cpu")
NUM_OURS = 2 * len(KINDS)
"""Our rows without guidance, before those of the plain loops; then the same with guidance."""
CONFIG = replace(TINY, grid_size=(4, 4), num_kept=4, kept_candidates=(4,))


@pytest.fixture(scope="module")
def found():
    return list(
        bench_generator.bench_generator(
            CONFIG,
            batch_sizes=(2,),
            num_repeats=1,
            max_steps=4,
            weights=("bf16", "int8"),
            device=CPU,
            plain=PLAIN,
            guidance=(1.0, 3.0),
        )
    )


@pytest.fixture(scope="module")
def speeds(found):
    """Those without guidance."""
    return [speed for speed in found if speed.guidance == 1]


def test_guided_images_have_two_rows_in_the_cache(found, speeds):
    guided = [speed for speed in found if speed.guidance == 3]
    assert found == [*speeds, *guided]
    for one, two in zip(speeds, guided, strict=True):
        assert (one.order, one.way, one.weights) == (two.order, two.way, two.weights)
        assert two.kv_bytes == 2 * one.kv_bytes
        assert two.num_images == one.num_images == 2
    raster = guided[[speed.order for speed in guided].index("raster")]
    plain = {speed.way: speed.tokens_per_second for speed in guided[NUM_OURS:]}
    ratios = {way: raster.tokens_per_second / speed for way, speed in plain.items()}
    assert raster.times_plain == ratios


def test_every_order_is_timed_with_every_type_and_beside_every_plain_loop(speeds):
    ours = {(speed.order, speed.weights) for speed in speeds if speed.way == "mergevq"}
    assert ours == {(order, weights) for order in KINDS for weights in ("bf16", "int8")}
    assert [speed.way for speed in speeds[NUM_OURS:]] == list(PLAIN.WAYS)
    weights = "float32" if resolve_precision("auto", CPU) is None else "bf16"
    assert all(speed.order == "raster" and speed.weights == weights for speed in speeds[NUM_OURS:])


@pytest.mark.parametrize(("has_bf16", "weights"), [(True, "bf16"), (False, "float32")])
def test_plain_loops_have_bf16_where_the_device_multiplies_it(has_bf16, weights, monkeypatch):
    monkeypatch.setattr(places, "_has_bf16", lambda _: has_bf16)
    given = {"batch_sizes": (1,), "num_repeats": 1, "max_steps": 1, "weights": ("float32",)}
    found = bench_generator.bench_generator(
        CONFIG, **given, device=CPU, plain=PLAIN, orders=["raster"]
    )
    ours, *plain = found
    assert [speed.weights for speed in plain] == [weights] * len(PLAIN.WAYS)
    assert set(ours.times_plain) == set(PLAIN.WAYS)


def test_rates_agree_with_each_other(speeds):
    lengths = dict.fromkeys(("random", "anchor", "ordered", "scale"), 4) | {"holistic": 4 + 16}
    for speed in speeds:
        assert speed.num_tokens == lengths.get(speed.order, 16)
        # The first scale has one token, and the second has room for the other three.
        assert speed.num_steps == (2 if speed.order == "scale" else speed.num_tokens)
        assert speed.images_per_second * speed.num_tokens == pytest.approx(speed.tokens_per_second)
        seconds = speed.seconds_per_step * speed.num_steps / speed.num_images
        assert speed.images_per_second == pytest.approx(1 / seconds)


def test_ratios_are_those_of_the_rows(speeds):
    raster, merge = (
        next(speed for speed in speeds if (speed.order, speed.weights) == (order, "int8"))
        for order in ("raster", "merge")
    )
    assert merge.times_raster == merge.images_per_second / raster.images_per_second
    assert merge.cache_share == merge.kv_bytes / raster.kv_bytes
    assert raster.times_raster is raster.cache_share is merge.times_plain is None
    expected = {s.way: raster.tokens_per_second / s.tokens_per_second for s in speeds[NUM_OURS:]}
    assert raster.times_plain == expected


def test_only_int8_has_a_logit_error(speeds):
    for speed in speeds:
        assert (speed.logit_error is not None) == (speed.weights == "int8")
        assert speed.logit_error is None or 0 < speed.logit_error < 0.2


def test_cache_bytes_by_formula(speeds):
    # Prefix 2, then: all but the last token; K and window; an instruction and a token for each slot
    # but the last token; all kept tokens but the last; all kept tokens.
    slots = {"raster": 2 + 15, "merge": 2 + 4 + 2, "random": 2 + 7, "anchor": 2 + 3, "masked": 0}
    slots |= {"stream": slots["raster"], "ordered": slots["anchor"], "holistic": 2 + 4 + 15}
    slots["scale"] = 2 + 4
    # Keys and values of two layers, two images, two heads of 16 channels: ours on CPUs in float32,
    # those of the plain loops in the type of their weights.
    one = 2 * 2 * 2 * 2 * 16 * 4
    for speed in speeds[:NUM_OURS]:
        assert speed.kv_bytes == slots[speed.order] * one
    per_cell = [speed.kv_bytes / (one / 4) for speed in speeds[NUM_OURS:]]
    bytes_each = 4 if speeds[-1].weights == "float32" else 2
    assert per_cell == [0, bytes_each * (2 + 16), bytes_each * (2 + 16)]


def test_timed_steps_are_spread_evenly():
    assert spread_steps(5, None) == spread_steps(5, 9) == [[0, 1, 2, 3, 4]]
    assert spread_steps(32, 8) == [[6, 7, 8, 9], [22, 23, 24, 25]]
    assert spread_steps(100, 3) == [[48, 49, 50]]
    for num_steps, max_steps in [(256, 32), (64, 32), (1024, 10), (7, 6), (5, 1)]:
        runs = spread_steps(num_steps, max_steps)
        flat = [step for run in runs for step in run]
        assert flat == sorted(set(flat))
        assert 0 <= flat[0] <= flat[-1] < num_steps
        assert len(flat) <= max_steps


@pytest.mark.parametrize("order", KINDS)
def test_a_decoder_can_start_anywhere(order):
    model = bench_generator.random_generator(changed(CONFIG, order=order), CPU)
    decoder = bench_generator.OurDecoder(model, 2, most_steps=3)
    lengths = []
    hook = model.network.blocks[0].register_forward_hook(
        lambda _, inputs, __: lengths.append(inputs[0])
    )
    for start in (decoder.num_steps - 1, 0, 1):
        decoder.seek(start)
        for _ in range(start, decoder.num_steps):
            decoder.step()
    hook.remove()
    assert all(inputs.isfinite().all() for inputs in lengths)


@pytest.mark.parametrize("way", PLAIN.WAYS)
def test_a_plain_loop_can_start_anywhere(way):
    model = bench_generator.random_generator(changed(CONFIG, order="raster"), CPU)
    decoder = bench_generator.PlainDecoder(PLAIN, way, model, 2)
    for start in (13, 0, 5):
        decoder.seek(start)
        for _ in range(start, 16):
            decoder.step()
        assert decoder.loop.parts.shape == (2, 16, 2)


def test_grids_have_the_nominal_number_of_kept_tokens():
    sizes = {cells: grid_config(CONFIG, cells).num_kept for cells in (64, 256, 1024)}
    assert sizes == {64: 16, 256: 144, 1024: 256}
    assert grid_config(CONFIG, 1024).grid_size == (32, 32)
    with pytest.raises(ValueError, match=r"grid_tokens \(200\) must be the square"):
        grid_config(CONFIG, 200)


def test_a_size_is_as_large_as_its_name_says():
    config = bench_generator.size_config("B")
    with torch.device("meta"):
        count = sum(p.numel() for p in build_generator(config).parameters())
    assert count == pytest.approx(111e6, rel=0.03)
    with pytest.raises(ValueError, match=r"size \(huge\) must be one of tiny, small, B"):
        bench_generator.size_config("huge")


@pytest.mark.parametrize(
    "changes",
    [
        {"num_repeats": 0},
        {"batch_sizes": (0,)},
        {"max_steps": 0},
        {"weights": ()},
        {"guidance": ()},
    ],
)
def test_nothing_to_time_is_an_error(changes):
    given = {
        "batch_sizes": (1,),
        "num_repeats": 1,
        "max_steps": 1,
        "weights": ("bf16",),
        "device": CPU,
        "plain": None,
    }
    with pytest.raises(ValueError, match="nothing to time otherwise"):
        next(bench_generator.bench_generator(CONFIG, **(given | changes)))
