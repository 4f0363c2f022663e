import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from mergevq.cli.main import main
from mergevq.config.objective import LossConfig, SelfDistillation
from mergevq.config.tokenizer import KeptConfig
from mergevq.config.training import TokenizerRun, TokenizerTrainConfig
from mergevq.training.bench import tokenizer as bench
from mergevq.training.bench.tokenizer import LfqSize, Measurement, MergeSize
from mergevq.training.profile import Part
from tests.support.parts import tokenizer_config

CPU = torch.device("cpu")
REFERENCE = Path(__file__).resolve().parents[3] / "benchmarks" / "reference.py"
LINUX = pytest.mark.skipif(sys.platform != "linux", reason="needs /proc")
RUN = TokenizerRun(
    model=tokenizer_config(
        image_size=32,
        channels=8,
        channel_mult=(1, 2),
        num_res_blocks=1,
        num_layers=2,
        num_heads=2,
        num_kept=100,
        num_bits=6,
        num_decoder_layers=1,
        num_decoder_heads=2,
        source_dim=16,
        num_source_heads=2,
    ),
    kept=KeptConfig(candidates=(100, 200)),
    loss=LossConfig(
        perceptual_weight=0.0,
        discriminator_channels=8,
        adversarial_start_step=0,
        adversarial_ramp_steps=1,
    ),
    teacher=SelfDistillation(num_prototypes=8),
    train=TokenizerTrainConfig(num_steps=2, batch_size=2, precision="float32", device="cpu"),
)


# ------------------------------------------------------------------------ taking times


def test_ways_take_turns_after_one_call_each_to_warm_up():
    called = []
    calls = {name: lambda name=name: called.append(name) for name in "ab"}
    times = bench._in_turns(calls, CPU, num_repeats=2)
    assert called == ["a", "b"] * 3
    assert [len(seconds) for seconds in times.values()] == [2, 2]


def test_ratios_are_of_medians_and_of_extra_memory():
    ours, plain = bench._compare(
        "loss",
        {"ours": [1.0, 9.0, 2.0], "plain": [8.0, 6.0, 5.0]},
        against="plain",
        extra_bytes={"ours": 10, "plain": 500},
    )
    assert (ours.seconds, ours.shortest, ours.num_repeats) == (2.0, 1.0, 3)
    assert (ours.speedup, ours.memory_ratio, ours.against) == (3.0, 50.0, "plain")
    assert (plain.speedup, plain.memory_ratio, plain.against) == (None, None, None)


def test_without_the_way_to_compare_with_there_are_no_ratios():
    (ours,) = bench._compare("loss", {"ours": [1.0]}, against="plain")
    assert ours.speedup is None


def test_ways_that_disagree_are_an_error():
    results = {"ours": torch.ones(3), "plain": torch.tensor([1.0, 1.0, 1.01])}
    with pytest.raises(RuntimeError, match=r"merging: plain differs from ours by 0.0058"):
        bench._check_equal("merging", results)


def test_a_result_that_is_no_number_is_an_error():
    with pytest.raises(RuntimeError, match="differs"):
        bench._check_equal("merging", {"ours": torch.ones(1), "plain": torch.tensor([torch.nan])})


@LINUX
@pytest.mark.parametrize("block", [2**18, 2**26])
def test_extra_memory_is_what_a_call_had_at_once(block):
    size = 64 * 2**20
    # An earlier, higher mark must not hide the call's own, nor must memory that was kept.
    large = [bytearray(block) for _ in range(4 * size // block)]
    del large
    extra = bench._extra_memory(lambda: [bytearray(block) for _ in range(size // block)], CPU)
    assert 0.95 * size < extra < 1.2 * size  # The kernel counts in batches of pages.


# ------------------------------------------------------------------- merging, quantizer


def test_merging_equals_the_dense_source_matrix():
    plain = bench.load_reference(REFERENCE)
    size = MergeSize(num_tokens=33, num_kept=10, num_layers=3, dim=8, num_images=2)
    found = list(bench.measure_merge(size, CPU, num_repeats=1, plain=plain))
    assert [(m.what, m.way) for m in found] == [
        ("merge 33 to 10, 2 images", "mergevq"),
        ("merge 33 to 10, 2 images", "dense source matrix"),
        ("merge 33 to 10, 2 images, gradient", "mergevq"),
        ("merge 33 to 10, 2 images, gradient", "dense source matrix"),
        ("merge 33 to 10, 2 images, matching alone", "mergevq"),
    ]
    assert found[0].speedup == found[1].seconds / found[0].seconds


def test_a_wrong_plain_definition_is_found(tmp_path):
    wrong = tmp_path / "reference.py"
    wrong.write_text(REFERENCE.read_text().replace('"amax"', '"sum"').replace("/ sizes", "* 1"))
    size = MergeSize(num_tokens=33, num_kept=10, num_layers=3, dim=8, num_images=2)
    measuring = bench.measure_merge(size, CPU, num_repeats=1, plain=bench.load_reference(wrong))
    with pytest.raises(RuntimeError, match="merging: dense source matrix differs from mergevq"):
        list(measuring)


@pytest.mark.parametrize("num_bits", [4, 9])
def test_losses_and_gradient_equal_the_dense_softmax(num_bits):
    size, loss = LfqSize(num_bits, num_tokens=30, temperature=0.1), LossConfig()
    ours = bench._lfq_in_this_process(size, loss, CPU, 1, None)
    plain = bench._lfq_in_this_process(size, loss, CPU, 1, REFERENCE)
    torch.testing.assert_close(ours.values, plain.values, rtol=1e-4, atol=1e-6)
    assert ours.values[1] > 0.05  # Not the corner where every token is decided.


@pytest.mark.slow
def test_each_loss_is_measured_in_a_process_of_its_own():
    ours, plain = bench.measure_lfq(
        LfqSize(12, 512), LossConfig(), CPU, num_repeats=1, reference=REFERENCE
    )
    assert (ours.way, plain.way) == ("mergevq", "dense softmax")
    assert ours.memory_ratio is None or ours.memory_ratio > 5


@pytest.mark.slow
def test_a_table_that_is_too_large_is_not_filled():
    size = LfqSize(18, 1025)
    (ours,) = bench.measure_lfq(size, LossConfig(), CPU, num_repeats=1, reference=REFERENCE)
    assert (ours.way, ours.speedup) == ("mergevq", None)


def test_a_missing_reference_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"reference \(.*none.py\) must be a Python file"):
        bench.load_reference(tmp_path / "none.py")


def test_measuring_takes_at_least_one_repetition():
    with pytest.raises(ValueError, match=r"num_repeats \(0\) must be at least 1"):
        next(bench.bench_tokenizer(RUN, num_repeats=0, reference=None))


# -------------------------------------------------------------------- images, train step


@pytest.mark.slow
def test_images_are_measured_in_both_precisions_and_layouts():
    found = list(bench.measure_images(RUN, CPU, num_repeats=1))
    ways = ["float32", "bf16", "float32, channels_last", "bf16, channels_last"]
    assert [(m.what, m.way) for m in found] == [
        (what, way) for what in ("encode", "decode", "train step") for way in ways
    ]
    assert [m.way for m in found if m.speedup is None] == ["float32"] * 3
    assert {m.num_images for m in found} == {2}


@pytest.mark.slow
def test_the_parts_of_a_step_are_all_of_it():
    parts = bench.profile_train_step(RUN, num_repeats=1)
    assert sum(part.share for part in parts) == pytest.approx(1)
    names = {part.name for part in parts}
    assert names >= {
        "encoder.stem",
        "encoder.reducer.blocks",
        "encoder.reducer.blocks, between layers",
        "losses",
        "expander.predictor",
        "decoder",
        "decoder.blocks",
        "discriminator",
        "alignment",
        "teacher",
        "Optimizer.step",
        "other",
    }
    assert "perceptual" not in names
    assert all(part.seconds > 0 for part in parts)


# ---------------------------------------------------------------------------- what is said


def test_a_line_has_all_numbers():
    measurement = Measurement(
        what="LFQ loss",
        way="mergevq",
        seconds=0.25,
        shortest=0.2,
        num_repeats=5,
        num_images=4,
        extra_bytes=2_000_000,
        against="dense softmax",
        speedup=120.0,
        memory_ratio=60.0,
    )
    words = " ".join(bench.line(measurement).split())
    assert words == (
        "LFQ loss mergevq 250.0 ms (best 200.0 of 5) 16 images/s 2.0 MB "
        "120 x as fast as dense softmax in 1/60 of its memory"
    )


def test_the_record_is_json():
    (measurement,) = bench._compare("merge", {"mergevq": [1.0]}, against="")
    part = Part("stem", 1.0, 0.5)
    text = json.dumps(bench.record(bench.conditions(RUN), [measurement], [part]), allow_nan=False)
    found = json.loads(text)
    assert found["conditions"]["num_threads"] == torch.get_num_threads()
    assert found["measurements"][0]["seconds"] == 1.0
    assert found["parts"] == [{"name": "stem", "seconds": 1.0, "share": 0.5}]


def test_the_k_of_a_measured_step_is_the_nominal_one():
    run = replace(RUN, kept=KeptConfig(candidates=(70, 90)))
    learner, _ = bench._training(run, CPU)
    assert learner.run.kept.candidates == (100,)


def test_an_unknown_recipe_is_named(capsys):
    assert main(["bench", "tokenizer", "--recipe", "tiny65"]) == 1
    assert "recipe (tiny65) must be a recipe for a tokenizer: digits32" in capsys.readouterr().err
