"""Collectives of a step, besides those of gradients: one, and those that a loss is made of."""

import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from mergevq.config.objective import NoTeacher
from mergevq.config.parts import EmaUpdate
from mergevq.config.recipes.digits import (
    digits32,
    digits32_dual,
    digits32_fsq,
    digits32_global_map,
    digits32_preserve,
)
from mergevq.config.training import TokenizerRun
from mergevq.data.tokens.dataset import open_tokens
from mergevq.runtime import distributed
from mergevq.runtime.artefacts import tokens_hash
from mergevq.tokenizer.tokenizer import Tokenizer
from mergevq.training import tokenizer_step
from mergevq.training.decoder import step as decoder_step
from mergevq.training.generator_step import build as build_generator_learner
from mergevq.training.tokenizer import train
from tests.support.collectives import collectives
from tests.support.ranks import free_port, run_on_ranks, take_place
from tests.support.small import shrink
from tests.support.steps import judged
from tests.training import test_codebooks as codebooks
from tests.training import test_generator as generators
from tests.training import test_tokenizer as tokenizers
from tests.training.decoder import test_run as decoders

pytestmark = pytest.mark.slow

CPU = torch.device("cpu")
TARGET = "tokenizer/losses/teachers.target"
ENTROPY = "tokenizer/bits._mean_assignments"
LAYERS = "tokenizer/losses/distillation.loss"
ALIGNMENT = "tokenizer/reducers/global_map.alignment"
STEP = "runtime/optim.take_steps"


def plain(recipe) -> TokenizerRun:
    """A recipe without a teacher and an adversary."""
    run = shrink(recipe())
    loss = replace(run.loss, perceptual_weight=0.0, adversarial_weight=0.0)
    train = replace(run.train, precision="float32")
    return replace(run, teacher=NoTeacher(), loss=loss, train=train)


def following() -> TokenizerRun:
    """Sums of codes of two branches, of which each table has running means."""
    run = plain(digits32_dual)
    quantizer = replace(run.model.quantizer, update=EmaUpdate())
    return judged(replace(run, model=replace(run.model, quantizer=quantizer)))


TOKENIZERS = {
    "a teacher, signs, an adversary": (tokenizers.small, [TARGET, ENTROPY, STEP]),
    "two parts": (
        lambda: tokenizers.small(accumulation=2),
        [TARGET, ENTROPY, ENTROPY, STEP],
    ),
    "signs": (lambda: plain(digits32), [ENTROPY, STEP]),
    "no entropy": (lambda: plain(digits32_fsq), [STEP]),
    "running means and an adversary": (lambda: judged(codebooks.small()), [STEP]),
    "several running means": (following, [STEP]),
    "weights of layers": (lambda: plain(digits32_preserve), [ENTROPY, LAYERS, STEP]),
    "a map of all images": (lambda: plain(digits32_global_map), [ALIGNMENT, ENTROPY, STEP]),
}
"""Runs of tokenizers, and where their collectives are."""
OTHERS = {
    "generator": ["runtime/optim.check"],
    # Gradients lie in shards, whose norm is that of all.
    "sharded generator": ["runtime/optim.clip", "runtime/optim.check"],
    "decoder": ["runtime/optim.check"],
}


def seen_by(learner, batch) -> list[str]:
    """Collectives of a step that is not the first."""
    learner.step(batch)
    learner.state.step += 1
    with collectives() as found:
        learner.step(batch)
    return found


def others(world: distributed.World, folder: Path) -> dict[str, list[str]]:
    """Collectives of a step of other stages."""
    found = {}
    for name, parallel in (("generator", "ddp"), ("sharded generator", "fsdp")):
        run = replace(generators.small(folder, "random"), parallel=parallel)
        tokens = open_tokens(run.tokens.path)
        learner = build_generator_learner(run, world, tokens.record)
        batch = tokens.batch(range(4), learner.state.generator.config.num_kept)
        found[name] = seen_by(learner, batch)
    run = decoders.small(folder)
    tokenizer = Tokenizer.from_pretrained(run.tokenizer)
    learner = decoder_step.build(run, world, tokenizer, decoders.SCALE)
    return found | {"decoder": seen_by(learner, decoders.batch())}


def fitting(folder: Path) -> list[str]:
    """Collectives of a run of twelve steps that is logged after the first and the last one."""
    loop = {"num_steps": 12, "log_every": 99, "save_every": 99, "eval_every": 99}
    run = codebooks.small(**loop, image_every=99, max_minutes=60.0, batch_size=4)
    with collectives() as found:
        train(replace(run, out=str(folder / "run")))
    return found


CASES = ("neither", "loss", "gradient", "judge")


def decided(world: distributed.World, case: str) -> dict[str, object]:
    """A step in which only the second rank has something that is not finite."""
    learner = tokenizer_step.build(judged(codebooks.small()), world, num_classes=10)
    state, bad = learner.state, world.rank == 1
    nan = torch.tensor(torch.nan)
    # Not the same losses, so that messages are a rank's own.
    batch = codebooks.batch(4 + 2 * world.rank)
    batch = type(batch)(*(column if column is None else column[:4] for column in batch))
    before = [state_of(part) for part in (state.tokenizer, state.discriminator)]
    with pytest.MonkeyPatch.context() as patch:
        if bad and case == "loss":
            # Its gradients are finite.
            plainly = tokenizer_step.total
            patch.setattr(tokenizer_step, "total", lambda *each: plainly(*each) + nan)
        if bad and case == "judge":
            loss = tokenizer_step.discriminator_loss
            patch.setattr(tokenizer_step, "discriminator_loss", lambda *each: loss(*each) + nan)
        if bad and case == "gradient":
            state.tokenizer.decoder.conv_out.weight.register_hook(lambda each: each * nan)
        learner.step(batch)
        after = [state_of(part) for part in (state.tokenizer, state.discriminator)]
        result = {
            "is_skipped": [guard.num_skipped == 1 for guard in state.guards],
            "is_unchanged": [tokenizers.equal(*each) for each in zip(before, after, strict=True)],
            "after": after,
            "said": "",
        }
        for guard in state.guards:
            guard.limit = 1
        try:
            learner.step(batch)
        except RuntimeError as error:
            result["said"] = str(error)
    return result


def state_of(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in module.state_dict().items()}


def run_rank(rank: int, port: int, folder: str) -> None:
    take_place(rank, port)
    world = distributed.init(CPU)
    counts = {}
    for name, (make, _) in TOKENIZERS.items():
        learner = tokenizer_step.build(make(), world, num_classes=10)
        batch = tokenizers.batch()
        if name == "a map of all images":
            batch = batch._replace(student_view=None)
        counts[name] = seen_by(learner, batch)
    counts |= others(world, Path(folder))
    verdicts = {case: decided(world, case) for case in CASES}
    distributed.shutdown()
    torch.save((counts, verdicts), Path(folder) / f"{rank}.pt")
    fit = fitting(Path(folder))
    torch.save(fit, Path(folder) / f"fit-{rank}.pt")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Results of both ranks."""
    path = tmp_path_factory.mktemp("ranks")
    generators.small_tokenizer().save_pretrained(path / "tokenizer")
    generators.write_tokens(path / "tokens", tokens_hash(path / "tokenizer"))
    Tokenizer(shrink(digits32()).model).save_pretrained(path / "source")
    run_on_ranks(run_rank, free_port(), str(path))
    return path


@pytest.fixture(scope="module")
def ranks(folder) -> list[tuple[dict, dict]]:
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(2)]


@pytest.mark.parametrize("name", [*TOKENIZERS, *OTHERS])
def test_a_step_has_one_collective_and_those_of_its_losses(ranks, name):
    expected = TOKENIZERS[name][1] if name in TOKENIZERS else OTHERS[name]
    assert [counts[name] for counts, _ in ranks] == [expected, expected]


def test_ranks_ask_for_time_and_stops_once_in_ten_steps_and_for_tokens_where_they_are_logged(
    folder,
):
    for rank in range(2):
        found = torch.load(folder / f"fit-{rank}.pt", weights_only=True)
        assert found.count(STEP) == 12
        assert found.count("runtime/optim.update") == 1
        assert found.count("training/fit._agree_to_stop") == 1
        assert found.count("training/fit.read_numbers") == 2
        # In the log of two steps; the checkpoint has nothing to add.
        assert found.count("metrics/codes._join") == 2


@pytest.mark.parametrize(
    ("case", "is_skipped", "bad"),
    [
        ("neither", [False, False], None),
        ("loss", [True, False], "loss"),
        ("gradient", [True, False], "grad_norm"),
        ("judge", [False, True], "discriminator_loss"),
    ],
)
def test_no_rank_skips_alone(ranks, case, is_skipped, bad):
    first, second = (verdicts[case] for _, verdicts in ranks)
    assert first["is_skipped"] == second["is_skipped"] == is_skipped
    assert first["is_unchanged"] == second["is_unchanged"] == is_skipped
    assert tokenizers.equal(first["after"], second["after"])
    for found, value in ((first, r"-?\d.* on this rank"), (second, "nan on this rank")):
        if bad is None:
            assert found["said"] == ""
            continue
        assert "steps in a row were not finite, up to step 0: " in found["said"]
        value = "nan on this rank" if case == "gradient" else value
        assert re.search(rf"{bad} \({value}\)", found["said"]), found["said"]
