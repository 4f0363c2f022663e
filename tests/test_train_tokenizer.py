"""The loop: both sides' gradients are their own, a resumed run is the same run, ranks are one."""

import json
import os
import signal
import subprocess
import sys
import textwrap
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from mergevq import distributed
from mergevq.checkpoint import load_state
from mergevq.config import TokenizerRun
from mergevq.data import Batch
from mergevq.recipes import digits32, shrink, tiny64_gr
from mergevq.tokenizer import Tokenizer
from mergevq.train_tokenizer import (
    build,
    draw_num_kept,
    tokenizer_losses,
    train,
    train_step,
    update_discriminator,
    update_tokenizer,
)

WORLD = distributed.World(rank=0, world_size=1, local_rank=0, device=torch.device("cpu"))


def small(**train_settings: object) -> TokenizerRun:
    """A run of seconds with a discriminator from the first step."""
    run = shrink(tiny64_gr())
    return replace(
        run,
        data=replace(run.data, path="digits", max_images=16, num_workers=0),
        loss=replace(
            run.loss,
            perceptual_weight=0.0,
            discriminator_start_step=0,
            adversarial_start_step=0,
            adversarial_ramp_steps=2,
        ),
        teacher=replace(run.teacher, kind="self"),
        train=replace(run.train, precision="float32", **train_settings),
    )


def batch(size: int = 4, side: int = 32) -> Batch:
    """Random images with a student's view."""
    image = torch.rand(size, 3, side, side) * 2 - 1
    view = torch.rand(size, 3, 24, 24) * 2 - 1
    return Batch(image, torch.zeros(size, dtype=torch.int64), view, None, torch.arange(size))


def equal(first: object, second: object) -> bool:
    """Whether two nested states are the same to the bit."""
    if isinstance(first, dict) and isinstance(second, dict):
        return first.keys() == second.keys() and all(equal(first[k], second[k]) for k in first)
    if isinstance(first, list | tuple) and isinstance(second, list | tuple):
        return len(first) == len(second) and all(map(equal, first, second))
    if isinstance(first, torch.Tensor) and isinstance(second, torch.Tensor):
        return torch.equal(first, second)
    return first == second


@pytest.mark.parametrize("accumulation", [1, 2])
def test_the_discriminators_gradient_is_its_own_losss(accumulation):
    state, setting = build(small(), WORLD, num_classes=0)
    parts = [batch(), batch()][:accumulation]
    _, fakes = update_tokenizer(state, setting, parts, 16)
    assert all(p.grad is None for p in state.discriminator.parameters())
    before = [p.detach().clone() for p in state.discriminator.parameters()]
    update_discriminator(state, setting, parts, fakes)
    gradients = [p.grad.clone() for p in state.discriminator.parameters() if p.grad is not None]
    # Again with gradients set free before: what the tokenizer's side left must not matter.
    for parameter, value in zip(state.discriminator.parameters(), before, strict=True):
        parameter.data.copy_(value)
        parameter.grad = torch.full_like(parameter, 7.0)
    state.lecam.real.zero_()
    state.lecam.fake.zero_()
    update_discriminator(state, setting, parts, fakes)
    again = [p.grad for p in state.discriminator.parameters() if p.grad is not None]
    assert equal(gradients, again)


def test_the_tokenizers_gradient_does_not_reach_discriminator_or_teacher():
    state, setting = build(small(), WORLD, num_classes=0)
    losses, _ = tokenizer_losses(state, setting, batch(), 16)
    assert losses.adversarial > 0
    state.discriminator.requires_grad_(requires_grad=False)
    losses.total(setting.run.loss, 0.1).backward()
    assert state.teacher_encoder is not None
    frozen = [*state.discriminator.parameters(), *state.teacher_encoder.parameters()]
    assert all(parameter.grad is None for parameter in frozen)


def test_every_parameter_of_the_tokenizer_gets_a_gradient():
    state, setting = build(small(), WORLD, num_classes=0)
    losses, _ = tokenizer_losses(state, setting, batch(), 16)
    losses.total(setting.run.loss, 0.1).backward()
    without = [n for n, p in state.tokenizer.named_parameters() if p.grad is None]
    assert without == []


def test_accumulation_equals_the_whole_batch_but_for_entropy_and_self_teacher():
    # The codebook entropy and the self-teacher's centre are of each part; see docs/deviations.md.
    gradients = []
    for accumulation in (1, 2):
        run = small(accumulation=accumulation)
        loss = replace(run.loss, entropy_weight=0.0)
        run = replace(run, loss=loss, teacher=replace(run.teacher, kind="none"))
        state, setting = build(run, WORLD, num_classes=0)
        torch.manual_seed(0)
        whole = batch(4)
        parts = [
            Batch(*(None if c is None else c[i : i + 4 // accumulation] for c in whole))
            for i in range(0, 4, 4 // accumulation)
        ]
        update_tokenizer(state, setting, parts, 16)
        gradients.append([p.grad.clone() for p in state.tokenizer.parameters()])
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-3, atol=1e-6)


def test_a_step_that_is_not_finite_changes_nothing_and_is_counted():
    state, setting = build(small(), WORLD, num_classes=0)
    before = {name: t.clone() for name, t in state.tokenizer.state_dict().items()}
    broken = batch()
    broken.image[0, 0, 0, 0] = torch.nan
    train_step(state, setting, broken)
    assert equal(before, dict(state.tokenizer.state_dict()))
    assert state.guard.num_skipped == 1
    train_step(state, setting, batch())
    assert not equal(before, dict(state.tokenizer.state_dict()))


def test_too_many_such_steps_stop_the_run_and_name_the_term():
    state, setting = build(small(max_nonfinite=2), WORLD, num_classes=0)
    broken = batch()
    broken.image[:] = torch.nan
    train_step(state, setting, broken)
    with pytest.raises(RuntimeError, match="reconstruction"):
        train_step(state, setting, broken)


def test_before_quantization_starts_the_decoder_sees_latents():
    state, setting = build(small(quantize_start_step=1), WORLD, num_classes=0)
    one = batch()
    _, output = tokenizer_losses(state, setting, one, 16)
    expected = state.tokenizer.decode(output.encoded.latents.tanh(), output.encoded.source)
    torch.testing.assert_close(output.reconstruction, expected)
    state.step = 1
    _, output = tokenizer_losses(state, setting, one, 16)
    expected = state.tokenizer.decode(output.encoded.codes, output.encoded.source)
    torch.testing.assert_close(output.reconstruction, expected)


def test_batch_size_one_trains_finite():
    state, setting = build(small(), WORLD, num_classes=0)
    numbers = train_step(state, setting, batch(1))
    assert all(value == value for value in numbers.values())
    assert state.guard.num_skipped == 0


def test_k_is_drawn_from_the_distribution_and_again_after_a_resume():
    run = tiny64_gr()
    draws = [draw_num_kept(run, step) for step in range(2000)]
    assert draws == [draw_num_kept(run, step) for step in range(2000)]
    share = draws.count(144) / len(draws)
    assert share == pytest.approx(run.kept.probabilities[1], abs=0.03)
    assert set(draws) == set(run.kept.candidates)


def test_a_resumed_run_is_bit_equal_to_an_uninterrupted_one(tmp_path):
    pytest.importorskip("sklearn")
    whole = replace(small(num_steps=4, save_every=4), out=str(tmp_path / "whole"))
    train(whole)
    run = replace(small(num_steps=4, save_every=2), out=str(tmp_path / "cut"))
    stopped = replace(run, train=replace(run.train, num_steps=2))
    train(stopped)
    train(run, resume=True)
    first, second = (
        load_state(tmp_path / name / "checkpoints" / "step-00000004" / "state")
        for name in ("whole", "cut")
    )
    assert equal(first, second)
    lines = (tmp_path / "cut" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [0, 1, 2, 3]


def test_training_reduces_the_loss_and_writes_everything(tmp_path):
    pytest.importorskip("sklearn")
    run = shrink(digits32())
    run = replace(
        run,
        data=replace(run.data, max_images=64),
        optim=replace(run.optim, warmup_steps=0, lr=3e-3),
        train=replace(run.train, num_steps=25, batch_size=8, image_every=25, eval_every=25),
        out=str(tmp_path / "run"),
    )
    model = train(run)
    numbers = [
        json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()
    ]
    assert numbers[-1]["reconstruction"] < 0.6 * numbers[0]["reconstruction"]
    assert "psnr@16" in numbers[-1]
    assert "psnr_recovered@16" in numbers[-1]
    assert (tmp_path / "run/images/step-00000025.png").is_file()
    tokenizer = Tokenizer.from_pretrained(model)
    assert tokenizer.config.kept_range == (16, 32)
    names = (tmp_path / "run/model").iterdir()
    assert sorted(path.name for path in names) == ["config.json", "model.safetensors"]


@pytest.mark.parametrize("num_workers", [0, 1])
def test_sigterm_to_all_processes_saves_and_the_run_goes_on(tmp_path, num_workers):
    pytest.importorskip("sklearn")
    script = textwrap.dedent(f"""
        from dataclasses import replace
        from mergevq.recipes import digits32, shrink
        from mergevq.train_tokenizer import train
        run = shrink(digits32())
        run = replace(run, out={str(tmp_path / "run")!r},
            data=replace(run.data, max_images=16, num_workers={num_workers}),
            train=replace(run.train, num_steps=100000, save_every=100000, eval_every=100000,
                          image_every=100000))
        train(run)
    """)
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [sys.executable, "-c", script],
        stderr=subprocess.PIPE,
        env=environment,
        text=True,
        start_new_session=True,
    )
    assert process.stderr is not None
    for line in process.stderr:
        if "step       2" in line:
            break
    # As a scheduler does.
    os.killpg(process.pid, signal.SIGTERM)
    _, rest = process.communicate(timeout=60)
    assert process.returncode == 0, rest
    assert list((tmp_path / "run/checkpoints").iterdir())
    assert "--resume" in rest


TWO_RANKS = """
import sys
from dataclasses import replace
from mergevq.recipes import digits32, shrink
from mergevq.train_tokenizer import train
run = shrink(digits32())
run = replace(run, data=replace(run.data, max_images=32), out=sys.argv[1],
    optim=replace(run.optim, warmup_steps=0),
    train=replace(run.train, precision="float32", batch_size=8, num_steps=3, save_every=3,
                  eval_every=3, image_every=3),
    loss=replace(run.loss, adversarial_weight=0.1, adversarial_start_step=0,
                 adversarial_ramp_steps=1))
train(run)
"""


def test_two_ranks_equal_one_process_at_the_same_global_batch(tmp_path):
    pytest.importorskip("sklearn")
    script = tmp_path / "run.py"
    script.write_text(TWO_RANKS)
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path.cwd())}
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    for name, launcher in (("one", []), ("two", torchrun)):
        command = [sys.executable, *launcher, str(script), str(tmp_path / name)]
        subprocess.run(command, check=True, env=environment, capture_output=True, timeout=120)
    states = [
        load_state(tmp_path / name / "checkpoints/step-00000003/state") for name in ("one", "two")
    ]
    for part in ("tokenizer", "discriminator", "lecam"):
        # Sums over ranks are added in another order: three steps of Adam keep 1e-3 of a weight.
        torch.testing.assert_close(states[0][part], states[1][part], rtol=1e-3, atol=2e-4)
    first, second = (
        json.loads((tmp_path / name / "metrics.jsonl").read_text().splitlines()[-1])
        for name in ("one", "two")
    )
    for term in ("loss", "entropy", "source", "discriminator_loss", "psnr@16"):
        # A latent next to 0 may get another sign by rounding, and with it another code.
        assert first[term] == pytest.approx(second[term], rel=5e-3), term


def test_a_failing_step_says_on_which_rank_and_at_which_step(tmp_path):
    pytest.importorskip("sklearn")
    run = replace(small(num_steps=3, max_nonfinite=1), out=str(tmp_path / "run"))
    # A rate beyond float32 makes the second step's loss non-finite.
    run = replace(run, optim=replace(run.optim, lr=1e38, warmup_steps=0, clip_norm=None))
    with pytest.raises(RuntimeError, match="not finite") as failure:
        train(run)
    assert failure.value.__notes__ == ["on rank 0 of 1, at step 1"]
