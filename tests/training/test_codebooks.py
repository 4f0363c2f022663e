"""Training with codes that follow latents: once a step that was taken, resumed, and on ranks."""

import copy
from dataclasses import replace

import pytest
import torch

from mergevq.config.parts import Codebook, EmaUpdate, GradientUpdate
from mergevq.config.recipes.digits import digits32_vq
from mergevq.config.training import TokenizerRun
from mergevq.data.batches import Batch
from mergevq.runtime import distributed
from mergevq.runtime.checkpoints import load_state
from mergevq.training.fit import put_state, state_of
from mergevq.training.tokenizer import train
from mergevq.training.tokenizer_step import build
from tests.support.ranks import train_on_two_ranks
from tests.support.small import shrink
from tests.support.steps import update_tokenizer

WORLD = distributed.World(rank=0, world_size=1, local_rank=0, device=torch.device("cpu"))
RESTARTING = EmaUpdate(decay=0.9, restart_below=0.5)


def small(update=RESTARTING, **train_settings) -> TokenizerRun:
    """A run of seconds, whose codes start again often."""
    run = shrink(digits32_vq())
    quantizer = Codebook(codebook_size=32, dim=4, update=update)
    return replace(
        run,
        model=replace(run.model, quantizer=quantizer),
        data=replace(run.data, max_images=32),
        optim=replace(run.optim, warmup_steps=0),
        train=replace(run.train, precision="float32", **train_settings),
    )


def batch(size: int, value: float | None = None) -> Batch:
    """Random images, the first of which has this value in a corner."""
    numbers = torch.Generator().manual_seed(size)
    image = torch.rand(size, 3, 32, 32, generator=numbers) * 2 - 1
    if value is not None:
        image[0, 0, 0, 0] = value
    return Batch(image, torch.zeros(size, dtype=torch.int64), None, None, torch.arange(size))


def codes_after(run: TokenizerRun, parts: list[Batch]) -> dict[str, torch.Tensor]:
    """State of the quantizer after one step of some parts."""
    learner = build(run, WORLD, num_classes=10)
    update_tokenizer(learner, parts, 16)
    return learner.state.tokenizer.quantizer.state_dict()


def parts_of(whole: Batch, number: int) -> list[Batch]:
    """A batch in equal parts."""
    size = len(whole.image) // number
    starts = range(0, len(whole.image), size)
    return [Batch(*(c if c is None else c[i : i + size] for c in whole)) for i in starts]


def test_codes_follow_once_a_step_however_it_is_cut():
    whole = codes_after(small(), [batch(8)])
    for number in (2, 4):
        cut = codes_after(small(), parts_of(batch(8), number))
        for name, value in whole.items():
            torch.testing.assert_close(cut[name], value, rtol=1e-4, atol=1e-5)


def test_a_step_that_is_not_finite_moves_no_code():
    fresh = build(small(), WORLD, num_classes=10).state.tokenizer.quantizer.state_dict()
    skipped, taken = (codes_after(small(), [batch(4, value)]) for value in (torch.nan, None))
    assert all(torch.equal(skipped[name], value) for name, value in fresh.items())
    assert not any(torch.equal(taken[name], value) for name, value in fresh.items())


def test_a_learned_codebook_is_trained_by_its_own_loss_alone():
    weights = {}
    for weight in (0.0, 1.0):
        run = small(GradientUpdate(codebook_weight=weight))
        learner = build(run, WORLD, num_classes=10)
        numbers, _ = update_tokenizer(learner, [batch(4)], 16)
        weights[weight] = learner.state.tokenizer.quantizer.table.entries.weight
        assert float(numbers["codebook"]) > 0
    assert weights[0.0].grad.count_nonzero() == 0
    assert weights[1.0].grad.count_nonzero() > 0


@pytest.mark.parametrize("update", [GradientUpdate(), EmaUpdate()], ids=lambda each: each.kind)
def test_encoder_and_codes_stay_where_the_encoder_has_no_rate(update):
    run = small(update)
    learner = build(replace(run, encoder_lr_ratio=0.0), WORLD, num_classes=10)
    before = copy.deepcopy(learner.state.tokenizer.state_dict())
    for _ in range(2):
        learner.step(batch(4))
        learner.state.step += 1
    after = learner.state.tokenizer.state_dict()
    stay = {name for name in before if name.startswith(("encoder.", "quantizer."))}
    assert all(torch.equal(before[name], after[name]) for name in stay)
    # In the warm-up the first step has a rate of 0, and the second one has not.
    assert not torch.equal(before["decoder.conv_out.weight"], after["decoder.conv_out.weight"])


def test_a_state_that_was_saved_goes_on_with_the_same_codes():
    run = small()
    whole, resumed = (build(run, WORLD, num_classes=10) for _ in range(2))
    for step in range(2):
        whole.step(batch(4))
        whole.state.step = step + 1
    put_state(resumed.state, copy.deepcopy(state_of(whole.state)))
    for learner in (whole, resumed):
        learner.step(batch(8))
    first, second = (each.state.tokenizer.state_dict() for each in (whole, resumed))
    assert {name for name in first if name.startswith("quantizer.")} == {
        "quantizer.table.entries.counts",
        "quantizer.table.entries.sums",
    }
    assert all(torch.equal(value, second[name]) for name, value in first.items())
    shadows = (each.state.ema.shadow for each in (whole, resumed))
    first, second = (shadow["quantizer.table.entries.sums"] for shadow in shadows)
    assert torch.equal(first, second)


@pytest.mark.slow
def test_two_ranks_equal_one_process(tmp_path):
    pytest.importorskip("sklearn")
    run = small(batch_size=8, num_steps=2, save_every=2, eval_every=2, image_every=2)
    train(replace(run, out=str(tmp_path / "one")))
    train_on_two_ranks(replace(run, out=str(tmp_path / "two")))
    first, second = (
        load_state(tmp_path / name / "checkpoints/step-00000002/state")["tokenizer"]
        for name in ("one", "two")
    )
    for name in ("quantizer.table.entries.counts", "quantizer.table.entries.sums"):
        torch.testing.assert_close(first[name], second[name], rtol=1e-3, atol=2e-3)
