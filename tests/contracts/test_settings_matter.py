"""A setting that is ignored is a setting that lies: each changes how a tokenizer is trained.

The settings are found, not listed: one that is added has to change something, or to be named below
with the reason why it does not, or where it is tested.
"""

import functools
import re
import typing
from dataclasses import replace

import pytest
import torch

from mergevq.config.recipes.tiny64 import tiny64_gr
from mergevq.config.tokenizer import KeptConfig
from mergevq.config.training import DataConfig, TokenizerRun
from mergevq.data.batches import open_train_val
from mergevq.runtime import distributed
from mergevq.training.fit import read_numbers
from mergevq.training.tokenizer import run_batches
from mergevq.training.tokenizer_step import build
from tests.support.leaves import leaf_kinds, replaced, value_at, with_parts_of
from tests.support.small import shrink

WORLD = distributed.World(rank=0, world_size=1, local_rank=0, device=torch.device("cpu"))
NUM_STEPS = 3
SECTIONS = ("kept", "data", "loss", "teacher", "optim", "train")
CHANGED = {
    "kept.candidates": (20,),
    "kept.rate": 0.0,
    "kept.mean": 9.0,
    "kept.std": 50.0,
    "kept.floor": 50.0,
    "data.val_fraction": 0.5,
    "data.max_images": 3,
    "loss.discriminator_channels": 16,
    "loss.lecam_weight": 0.5,
    "loss.adversarial_start_step": 2,
    "teacher.kind": "none",
    "teacher[self].view_size": 16,
    "optim.base_batch_size": 8,
    "optim.clip_norm": 1e-3,
    "optim.ema_decay": 0.05,
    "optim.milestones": (0.1, 0.2),
    "train.num_steps": 9,
    "train.precision": "bf16",
}
"""Values of settings that have to be special; others are found by their type."""
BASES = {
    "kept.rate": {"kept.distribution": "exponential"},
    "kept.mean": {"kept.distribution": "gaussian"},
    "kept.std": {"kept.distribution": "gaussian"},
    "kept.floor": {"kept.distribution": "gaussian", "kept.mean": 0.0, "kept.std": 0.1},
    "loss.recovered_start_step": {"loss.recovered_share": 0.5},
    "optim.milestones": {"optim.schedule": "step"},
    "optim.final_lr_ratio": {"optim.schedule": "cosine"},
    "train.num_steps": {"optim.schedule": "cosine"},
}
"""Other settings without which a setting has no meaning."""
ELSEWHERE = {
    "data.path": "the images themselves",
    "data.val_path": "validation: test_data",
    "data.crop": "images that are no squares: test_data",
    "data.max_pixels": "larger pictures than digits: test_data",
    "data.num_workers": "changes nothing: test_data",
    "data.reduced_jpeg": "large photographs: data/test_batches",
    "data.cache": "changes where pixels are kept and none of them: data/test_cached",
    "loss.perceptual_weight": "needs weights: test_perceptual",
    "loss.perceptual_trunk": "needs weights: test_perceptual",
    "loss.perceptual_path": "needs weights: test_perceptual",
    "loss.gram.weight": "needs weights: contracts/test_effects",
    "loss.gram.num_taps": "needs weights: contracts/test_effects",
    "train.device": "changes where",
    "train.checkpointing": "changes memory: test_layers",
    "train.compile": "changes speed: test_tokenizer",
    "train.accumulation": "changes memory: test_train_tokenizer",
    "train.log_every": "what is written: test_train_tokenizer",
    "train.image_every": "what is written: test_train_tokenizer",
    "train.eval_every": "what is written: test_train_tokenizer",
    "train.num_eval_images": "validation: test_train_tokenizer",
    "train.eval_num_kept": "validation: test_train_tokenizer",
    "train.save_every": "what is written: test_train_tokenizer",
    "train.keep_last": "what is written: test_run_state",
    "train.max_nonfinite": "broken runs: test_train_tokenizer",
    "train.tensorboard": "what is written: test_run",
    "train.max_minutes": "when it stops: test_train_tokenizer",
}
"""Settings that change nothing in three steps of this run, and why."""
KINDS = {
    name: kind
    for name, kind in leaf_kinds(TokenizerRun).items()
    if re.split(r"[.\[]", name)[0] in SECTIONS
}
FROZEN = ("teacher[huggingface]", "teacher[torchscript]")
"""Teachers that need a file: contracts/test_effects, test_teachers."""
NAMES = [name for name in KINDS if name not in ELSEWHERE and not name.startswith(FROZEN)]


def start() -> TokenizerRun:
    """A run in which every term takes part."""
    run = shrink(tiny64_gr())
    return replace(
        run,
        kept=KeptConfig(candidates=(16, 24, 32)),
        data=replace(run.data, path="digits", max_images=16, num_workers=0, val_fraction=0.05),
        loss=replace(
            run.loss,
            perceptual_weight=0.0,
            discriminator_start_step=0,
            adversarial_start_step=1,
            adversarial_ramp_steps=2,
        ),
        teacher=replace(run.teacher, momentum=0.9),
        optim=replace(run.optim, lr=1e-3, warmup_steps=0, schedule="constant"),
        train=replace(run.train, precision="float32", num_steps=NUM_STEPS),
    )


def another(kind: object, value: object) -> object:
    """Another value of a setting of this type."""
    if typing.get_origin(kind) is typing.Literal:
        return next(choice for choice in typing.get_args(kind) if choice != value)
    match value:
        case bool():
            return not value
        case int():
            return value + 1
        case float():
            return value * 0.5 if value else 0.5
        case tuple():
            return tuple(0.5 * item for item in value)
    raise AssertionError(f"CHANGED needs another value than {value!r}")


@functools.cache
def digits(path: str, val_fraction: float, max_images: int):
    data = DataConfig(path=path, val_fraction=val_fraction, max_images=max_images)
    return open_train_val(data)[0]


@functools.cache
def trained(run: TokenizerRun) -> list[torch.Tensor | float]:
    """Every number of a run after three steps: of its log, its weights, its moments."""
    data = run.data
    dataset = digits(data.path, data.val_fraction, data.max_images)
    learner = build(run, WORLD, num_classes=dataset.num_classes)
    state = learner.state
    numbers: list[torch.Tensor | float] = []
    for _, batch in zip(range(NUM_STEPS), run_batches(run, WORLD, dataset, 0), strict=False):
        numbers += read_numbers(learner.step(batch), WORLD.device).values()
        state.step += 1
    for module in (state.tokenizer, state.discriminator, state.teacher, state.teacher_encoder):
        numbers += [] if module is None else list(module.state_dict().values())
    return [*numbers, *state.ema.shadow.values()]


def differ(first: list, second: list) -> bool:
    """Whether two runs differ in any number."""
    pairs = zip(first, second, strict=False)
    return len(first) != len(second) or any(
        not torch.equal(torch.as_tensor(a), torch.as_tensor(b)) for a, b in pairs
    )


def test_a_run_is_the_same_again():
    pytest.importorskip("sklearn")
    again = trained.__wrapped__(start())
    assert not differ(trained(start()), again)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.slow
def test_every_setting_changes_how_a_tokenizer_is_trained(name):
    pytest.importorskip("sklearn")
    base = with_parts_of(replaced(start(), BASES.get(name, {})), name)
    value = value_at(base, name)
    changed = CHANGED[name] if name in CHANGED else another(KINDS[name], value)
    other = replaced(base, {name: changed})
    assert differ(trained(base), trained(other)), f"{name}: {value} and {changed} are the same run"
