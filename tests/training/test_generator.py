"""The generator's loop: a resumed run is the same run, ranks are one, tokens are its own."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import textwrap
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from mergevq.cli.main import main
from mergevq.config.generator import (
    GeneratorConfig,
)
from mergevq.config.identity import Identity
from mergevq.config.parts.heads import (
    Subindices,
)
from mergevq.config.parts.orders import (
    Merge,
    Random,
    Raster,
)
from mergevq.config.recipes import GENERATOR_RECIPES
from mergevq.config.recipes.digits import digits32_ar
from mergevq.config.tokenizer import KeptConfig
from mergevq.config.training import GeneratorRun, TokensConfig
from mergevq.data.layouts import Source, canonicalize
from mergevq.data.tokens.batches import split, token_batches
from mergevq.data.tokens.dataset import open_tokens
from mergevq.data.tokens.files import TokenRecord, TokenRows
from mergevq.data.tokens.writing import claim, finish, write_shard
from mergevq.generator.build import build_generator, load_generator, save_generator
from mergevq.runtime import distributed
from mergevq.runtime.artefacts import load_model, tokens_hash
from mergevq.runtime.checkpoints import load_state, save_state
from mergevq.runtime.optim import Ema
from mergevq.runtime.random import draw_num_kept
from mergevq.tokenizer.tokenizer import Tokenizer
from mergevq.training.generator import GeneratorTask, train
from mergevq.training.generator_step import GeneratorLearner, build, fitted_config, to_sequences
from mergevq.training.initial import initialize_generator_from
from tests.support.generators import KINDS
from tests.support.parts import tokenizer_config
from tests.support.reads import host_reads
from tests.support.small import shrink_generator

WORLD = distributed.World(rank=0, world_size=1, local_rank=0, device=torch.device("cpu"))
ORDERS = ("raster", "merge", "random", "anchor")
QUICK_AND_SLOW = [
    "random",
    *(pytest.param(order, marks=pytest.mark.slow) for order in ("anchor", "raster", "merge")),
]
"""Orders of which those with a short sequence are always trained."""
NUM_IMAGES = 24
NUM_BITS = 6
KEPT = (16, 24, 64)


def small_tokenizer(seed: int = 0) -> Tokenizer:
    """Random: 16 pixels, a grid of 8 x 8, 6 bits."""
    torch.manual_seed(seed)
    config = tokenizer_config(
        image_size=16,
        channels=8,
        channel_mult=(1, 1),
        num_res_blocks=1,
        num_layers=2,
        num_heads=2,
        num_kept=16,
        num_bits=NUM_BITS,
        num_decoder_layers=1,
        num_decoder_heads=2,
        source_dim=16,
        num_source_layers=1,
        num_source_heads=2,
    )
    return Tokenizer(config).eval()


def write_tokens(folder: Path, tokenizer: str, *, num_classes: int = 3, flip: bool = False) -> Path:
    """Tokens of a few images that are the same again and again, so that they can be learned."""
    record = TokenRecord(
        tokenizer=tokenizer,
        num_kept=KEPT,
        sizes=(2**NUM_BITS,),
        grid_shape=(8, 8),
        data="made up",
        images="a" * 64,
        num_images=NUM_IMAGES,
        class_names=tuple(f"class {number}" for number in range(num_classes)),
        flip=flip,
        shard_size=16,
    )
    claim(folder, record, {})
    rows_per_image = 1 + flip
    for number in range(record.num_shards):
        images = torch.tensor(record.images_of(number)).repeat_interleave(rows_per_image)
        for num_kept in KEPT:
            numbers = torch.Generator().manual_seed(num_kept)
            index = torch.randint(num_kept, (64,), generator=numbers)
            index[torch.randperm(64, generator=numbers)[:num_kept]] = torch.arange(num_kept)
            source, _ = canonicalize(Source(index[None], num_kept))
            codes = torch.randint(2**NUM_BITS, (3, num_kept), generator=numbers)
            rows = TokenRows(
                parts=codes[images % 3][..., None],
                source=source.index.repeat(len(images), 1),
                label=images % num_classes if num_classes else torch.full_like(images, -1),
                position=images,
                mirrored=torch.arange(len(images)) % rows_per_image,
            )
            write_shard(folder, record, number, rows, broken=[])
    finish(folder)
    return folder


@pytest.fixture(scope="module")
def material(tmp_path_factory):
    """A random tokenizer and tokens that say they are its own."""
    folder = tmp_path_factory.mktemp("material")
    small_tokenizer().save_pretrained(folder / "tokenizer")
    write_tokens(folder / "tokens", tokens_hash(folder / "tokenizer"))
    return folder


def small(material: Path, order: str = "merge", **train_settings: object) -> GeneratorRun:
    """A run of seconds, with dropout."""
    kept = (64,) if order == "raster" else (16, 24)
    run = shrink_generator(digits32_ar())
    model = replace(run.model, head=Subindices(sizes=(8, 8)))
    return replace(
        run,
        model=replace(model, order=KINDS[order](), num_kept=kept[0], kept_candidates=kept),
        tokens=TokensConfig(
            path=str(material / "tokens"), tokenizer=str(material / "tokenizer"), val_fraction=0.25
        ),
        kept=KeptConfig(candidates=kept),
        optim=replace(run.optim, warmup_steps=0, lr=1e-2, schedule="constant"),
        train=replace(run.train, precision="float32", device="cpu", **train_settings),
    )


def built(run: GeneratorRun):
    dataset = open_tokens(run.tokens.path)
    return build(run, WORLD, dataset.record), dataset


def equal(first: object, second: object) -> bool:
    """Whether two nested states are the same to the bit."""
    if isinstance(first, dict) and isinstance(second, dict):
        return first.keys() == second.keys() and all(equal(first[k], second[k]) for k in first)
    if isinstance(first, list | tuple) and isinstance(second, list | tuple):
        return len(first) == len(second) and all(map(equal, first, second))
    if isinstance(first, torch.Tensor) and isinstance(second, torch.Tensor):
        return torch.equal(first, second)
    return first == second


# ------------------------------------------------------------------------------------- learning


@pytest.mark.parametrize("order", QUICK_AND_SLOW)
def test_the_loss_falls_and_everything_is_written(material, tmp_path, order):
    run = small(material, order, num_steps=40, image_every=40, eval_every=20, batch_size=8)
    run = replace(run, kept=replace(run.kept, candidates=run.kept.candidates[:1]))
    run = replace(run, out=str(tmp_path / "run"))
    model = train(run)
    lines = (tmp_path / "run/metrics.jsonl").read_text().splitlines()
    numbers = [json.loads(line) for line in lines]
    # Six bits: a uniform guess costs 4.16 nats, and an anchor's gap some more.
    assert numbers[-1]["nll"] < 0.75 * numbers[0]["nll"]
    kept = run.model.num_kept
    assert numbers[-1][f"val_nll@{kept}"] < numbers[0]["nll"]
    assert (tmp_path / "run/images/step-00000040.png").is_file()
    generator = load_generator(model)
    assert generator.config.num_classes == 3
    assert not generator.training
    extra = load_model(model, kind="generator").record["extra"]
    assert extra["tokenizer"] == tokens_hash(material / "tokenizer")
    assert extra["class_names"] == ["class 0", "class 1", "class 2"]
    assert extra["step"] == 40


def test_a_run_that_is_broken_keeps_its_last_good_checkpoint_and_stops(
    material, tmp_path, monkeypatch
):
    run = replace(small(material, num_steps=4, save_every=1, keep_last=1), out=str(tmp_path / "r"))

    step = GeneratorLearner.step

    def breaking(learner, *given):
        numbers, state = step(learner, *given), learner.state
        if state.step == 2:
            next(state.generator.parameters()).data.view(-1)[0] = torch.nan
        return numbers

    monkeypatch.setattr(GeneratorLearner, "step", breaking)
    message = r"not finite are generator\..*step-00000002 is the last good one"
    with pytest.raises(RuntimeError, match=message):
        train(run)
    assert [path.name for path in (tmp_path / "r/checkpoints").iterdir()] == ["step-00000002"]
    assert load_model(tmp_path / "r/model", "generator").record["extra"]["step"] == 2


@pytest.mark.slow
def test_a_damaged_newest_checkpoint_is_named_with_the_one_to_go_on_from(material, tmp_path):
    run = replace(small(material, num_steps=2, save_every=1, keep_last=2), out=str(tmp_path / "r"))
    train(run)
    newest = tmp_path / "r/checkpoints/step-00000002"
    file = newest / "state/state.safetensors"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    longer = replace(run, train=replace(run.train, num_steps=3))
    with pytest.raises(ValueError, match=r"newest good checkpoint is .*step-00000001: delete"):
        train(longer, resume=True)
    shutil.rmtree(newest)
    train(longer, resume=True)
    assert load_model(tmp_path / "r/model", "generator").record["extra"]["step"] == 3


def test_a_checkpoint_of_another_form_is_one_line(material, tmp_path):
    run = replace(small(material, num_steps=1), out=str(tmp_path / "r"))
    train(run)
    directory = tmp_path / "r/checkpoints/step-00000001/state"
    state = load_state(directory)
    longer = replace(run, train=replace(run.train, num_steps=2))
    for name, value in (("ema", {}), ("guard", 3), ("generator", {}), ("optimizer", [1])):
        save_state(directory, state | {name: value})
        with pytest.raises(ValueError, match="is not a checkpoint of this run") as caught:
            train(longer, resume=True)
        assert "\n" not in str(caught.value)


@pytest.mark.slow
def test_while_steps_are_skipped_older_checkpoints_stay(material, tmp_path, monkeypatch):
    run = replace(small(material, num_steps=3, save_every=1, keep_last=1), out=str(tmp_path / "r"))

    step = GeneratorLearner.step

    def skipping(learner, *given):
        numbers, state = step(learner, *given), learner.state
        state.guard.num_in_a_row = int(state.step >= 1)
        return numbers

    monkeypatch.setattr(GeneratorLearner, "step", skipping)
    train(run)
    names = sorted(path.name for path in (tmp_path / "r/checkpoints").iterdir())
    assert names == ["step-00000001", "step-00000002", "step-00000003"]


def test_a_step_that_went_too_far_does_not_cost_the_last_good_checkpoint(
    material, tmp_path, monkeypatch
):
    run = small(material, num_steps=30, save_every=1, keep_last=1, max_nonfinite=3)

    step = GeneratorLearner.step

    def too_far(learner, *given):
        numbers, state = step(learner, *given), learner.state
        if state.step == 1:
            # Finite, and so large that no loss is.
            for parameter in state.generator.parameters():
                parameter.data.mul_(1e30)
        return numbers

    monkeypatch.setattr(GeneratorLearner, "step", too_far)
    with pytest.raises(RuntimeError, match="not finite"):
        train(replace(run, out=str(tmp_path / "r")))
    names = sorted(path.name for path in (tmp_path / "r/checkpoints").iterdir())
    assert names[:2] == ["step-00000001", "step-00000002"]
    assert len(names) == 4
    assert all((tmp_path / "r/checkpoints" / name / "suspect").exists() for name in names[2:])


@pytest.mark.slow
def test_a_run_that_has_had_its_minutes_is_complete_and_goes_on_with_more(material, tmp_path):
    run = small(material, num_steps=3, save_every=100, max_minutes=1e-9)
    run = replace(run, out=str(tmp_path / "r"))
    train(run)
    assert (tmp_path / "r/model/model.safetensors").is_file()
    assert (tmp_path / "r/checkpoints/step-00000001").is_dir()
    train(replace(run, train=replace(run.train, max_minutes=None)), resume=True)
    whole = replace(run, train=replace(run.train, max_minutes=None), out=str(tmp_path / "whole"))
    train(whole)
    first, second = (
        load_state(tmp_path / name / "checkpoints/step-00000003/state") for name in ("r", "whole")
    )
    assert first.pop("budget")["seconds"] > second.pop("budget")["seconds"] == 0
    assert equal(first, second)


@pytest.mark.usefixtures("curves")
@pytest.mark.slow
def test_training_says_what_a_step_consists_of_and_draws_its_log(material, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    run = replace(small(material, num_steps=2, eval_every=1), out=str(tmp_path / "run"))
    train(run)
    line = "batch of 4 sequences: ranks 1 x accumulation 1 x 4; peak learning rate 0.01"
    assert capsys.readouterr().err.count(line) == 1
    first = (tmp_path / "run/curves.png").read_bytes()
    train(replace(run, train=replace(run.train, num_steps=3)), resume=True)
    assert (tmp_path / "run/curves.png").read_bytes() != first


def test_the_saved_model_has_the_averaged_weights(material, tmp_path):
    model = train(replace(small(material), out=str(tmp_path / "run")))
    state = load_state(tmp_path / "run/checkpoints/step-00000002/state")
    assert equal(dict(load_file(model / "model.safetensors")), state["ema"]["shadow"])
    assert not equal(state["generator"], state["ema"]["shadow"])


@pytest.mark.parametrize("order", QUICK_AND_SLOW)
def test_a_resumed_run_is_bit_equal_to_an_uninterrupted_one(material, tmp_path, order):
    whole = small(material, order, num_steps=4, save_every=4)
    train(replace(whole, out=str(tmp_path / "whole")))
    run = replace(small(material, order, num_steps=4), out=str(tmp_path / "cut"))
    train(replace(run, train=replace(run.train, num_steps=2)))
    train(run, resume=True)
    first, second = (
        load_state(tmp_path / name / "checkpoints/step-00000004/state") for name in ("whole", "cut")
    )
    assert first["step"] == second["step"] == 4
    assert equal(first, second)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_accumulation_equals_the_whole_batch(material, checkpointing):
    gradients = []
    for accumulation in (1, 2, 4):
        run = small(material, "random", accumulation=accumulation, checkpointing=checkpointing)
        run = replace(run, model=replace(run.model, dropout=0.3))
        learner, dataset = built(run)
        state = learner.state
        learner.step(dataset.batch(range(4), 16))
        gradients.append([p.grad.clone() for p in state.generator.parameters()])
    for other in gradients[1:]:
        torch.testing.assert_close(gradients[0], other, rtol=1e-4, atol=1e-7)


def test_every_parameter_gets_a_gradient(material):
    for order in ORDERS:
        learner, dataset = built(small(material, order))
        state = learner.state
        learner.step(dataset.batch(range(4), state.generator.config.num_kept))
        without = [n for n, p in state.generator.named_parameters() if p.grad is None]
        assert without == [], order


def test_sequences_are_in_random_order_until_their_share_of_the_steps(material):
    run = small(material, "raster", num_steps=4)
    order = Raster(annealing=(0.5, 0.5))
    learner, dataset = built(replace(run, model=replace(run.model, order=order)))
    batch, seen = dataset.batch(range(4), 64), []
    learner.wrapped.register_forward_pre_hook(lambda _, given: seen.append(given[0].slots))
    for step in range(4):
        learner.state.step = step
        learner.step(batch)
    is_permuted = [(slots != torch.arange(64)).any(-1).tolist() for slots in seen]
    assert is_permuted == [[True] * 4] * 2 + [[False] * 4] * 2
    # Of a run that was cut and goes on the same.
    learner.state.step = 1
    learner.step(batch)
    assert torch.equal(seen[4], seen[1])


@pytest.mark.parametrize("order", ["merge", "random"])
def test_a_step_reads_the_ranges_of_its_batch_and_whether_it_is_finite(material, order):
    learner, dataset = built(small(material, order))
    batch = dataset.batch(range(4), learner.state.generator.config.num_kept)
    learner.step(batch)
    with host_reads() as reads:
        learner.step(batch)
    # Indices, labels, and the guard of the step.
    assert reads == ["tolist"] * 3


def test_a_step_that_is_not_finite_changes_nothing_and_is_counted(material):
    learner, dataset = built(small(material))
    state = learner.state
    batch = dataset.batch(range(4), 16)
    learner.step(batch)
    healthy = state.generator.network.head.norm.weight.data.clone()
    state.generator.network.head.norm.weight.data[0] = torch.nan
    before = {name: t.clone() for name, t in state.generator.state_dict().items()}
    shadow = {name: t.clone() for name, t in state.ema.shadow.items()}
    learner.step(batch)
    after = state.generator.state_dict()
    assert all(torch.equal(before[n].nan_to_num(), after[n].nan_to_num()) for n in before)
    assert equal(shadow, state.ema.shadow)
    assert state.guard.num_skipped == 1
    state.generator.network.head.norm.weight.data.copy_(healthy)
    learner.step(batch)
    assert state.guard.num_in_a_row == 0


def test_a_step_that_is_skipped_names_its_rows(material, tmp_path, caplog, monkeypatch):
    run = small(material, num_steps=3, batch_size=3, max_nonfinite=2)
    # A rate beyond float32 makes all steps after the first non-finite.
    optim = replace(run.optim, clip_norm=None)
    monkeypatch.setattr("mergevq.training.generator_step.learning_rate", lambda *_: 1e38)
    with pytest.raises(RuntimeError, match="not finite"):
        train(replace(run, optim=optim, out=str(tmp_path / "run")))
    train_set, _ = split(open_tokens(run.tokens.path), run.tokens.val_fraction)
    stream = token_batches(
        train_set,
        batch_size=3,
        num_steps=2,
        start_step=1,
        seed=run.train.seed,
        num_kept=lambda step: draw_num_kept(run.kept, run.train.seed, step),
    )
    batch = next(stream)
    named = re.search(
        r"step 1 is not finite and is skipped; rows (\[.*\]) of the training set, "
        r"images (\[.*\]) of the data",
        caplog.text,
    )
    assert named
    rows, images = map(json.loads, named.groups())
    again = train_set.batch(rows, batch.source.num_kept)
    assert torch.equal(again.indices, batch.indices)
    assert torch.equal(again.label, batch.label)
    assert images == train_set.origin(rows).position.tolist()


def test_dropout_leaves_torchs_own_generator_as_it_was(material):
    learner, dataset = built(small(material))
    before = torch.get_rng_state()
    learner.step(dataset.batch(range(4), 16))
    assert torch.equal(before, torch.get_rng_state())


# --------------------------------------------------------------------------------- what is fed


def test_each_order_is_fed_its_own_sequence(material):
    dataset = open_tokens(material / "tokens")
    batch = dataset.batch([0, 5], 16)
    cells = torch.stack([batch.indices[i][batch.source.index[i]] for i in range(2)])
    fed = {}
    for order in ORDERS:
        state = built(small(material, order))[0].state
        fed[order] = to_sequences(state.generator, batch)
    assert torch.equal(fed["merge"].indices, cells)
    assert torch.equal(fed["random"].indices, batch.indices)
    assert torch.equal(fed["anchor"].indices, batch.indices)
    opened = [[int((row == k).nonzero()[0, 0]) for k in range(16)] for row in batch.source.index]
    assert fed["anchor"].anchors.tolist() == opened
    whole = dataset.batch([0, 5], 64)
    state = built(small(material, "raster"))[0].state
    assert torch.equal(to_sequences(state.generator, whole).indices, whole.indices)


def test_a_sequence_without_label_has_no_class(tmp_path, material):
    tokens = write_tokens(tmp_path / "tokens", tokens_hash(material / "tokenizer"), num_classes=0)
    run = small(material)
    run = replace(run, tokens=replace(run.tokens, path=str(tokens)))
    learner, dataset = built(run)
    state = learner.state
    assert state.generator.config.num_classes == 0
    fed = to_sequences(state.generator, dataset.batch([0, 1], 16))
    assert fed.class_label.tolist() == [0, 0]


@pytest.mark.parametrize("flip", [False, True])
def test_held_out_images_are_not_trained_on_nor_their_mirror_images(tmp_path, flip):
    dataset = open_tokens(write_tokens(tmp_path / "tokens", "b" * 64, flip=flip))
    train_set, val_set = split(dataset, 0.25)
    trained, held_out = (
        set(side.origin(range(len(side))).position.tolist()) for side in (train_set, val_set)
    )
    assert trained | held_out == set(range(NUM_IMAGES))
    assert len(held_out) == 6
    assert trained.isdisjoint(held_out)
    seen = next(token_batches(train_set, batch_size=4, num_steps=1, seed=0, num_kept=lambda _: 16))
    assert seen.indices.shape == (4, 16)


def test_validation_is_the_likelihood_of_the_held_out_images(material):
    run = small(material, num_eval_images=5)
    learner, dataset = built(run)
    state = learner.state
    _, val_set = split(dataset, 0.25)
    state.generator.eval()
    sequences = to_sequences(state.generator, val_set.batch(range(5), 16))
    with torch.no_grad():
        expected = -state.generator.log_likelihood(sequences)
    tokenizer = Tokenizer.from_pretrained(material / "tokenizer")
    task = GeneratorTask(learner=learner, train_set=dataset, val_set=val_set, tokenizer=tokenizer)
    found = task.validate()["val_nll@16"]
    assert found == pytest.approx(float(expected.mean()) / 64, rel=1e-5)


# ------------------------------------------------------------------------------------ refusals


def test_tokens_of_another_tokenizer_are_refused(material, tmp_path):
    small_tokenizer(seed=1).save_pretrained(tmp_path / "other")
    run = small(material)
    run = replace(run, tokens=replace(run.tokens, tokenizer=str(tmp_path / "other")))
    with pytest.raises(ValueError, match="must be of " + tokens_hash(tmp_path / "other")):
        built(run)


def test_tokens_must_fit_the_architecture(material):
    run = small(material)
    record = open_tokens(material / "tokens").record
    with pytest.raises(ValueError, match=r"the product of model.head.sizes \(64\) must be 256"):
        fitted_config(run, replace(record, sizes=(2**8,)))
    with pytest.raises(ValueError, match=r"model.grid_size \(\(8, 8\)\) must be \(4, 16\)"):
        fitted_config(run, replace(record, grid_shape=(4, 16)))
    with pytest.raises(ValueError, match=r"--num-kept 24"):
        fitted_config(run, replace(record, num_kept=(16,)))
    wrong = replace(run, model=replace(run.model, num_classes=10))
    with pytest.raises(ValueError, match=r"model.num_classes \(10\) must be 3"):
        fitted_config(wrong, record)


def test_another_number_of_classes_makes_only_the_class_embedding_anew(material, tmp_path, caplog):
    state = built(small(material))[0].state
    config = state.generator.config
    other = build_generator(replace(config, num_classes=7))
    save_generator(other, tmp_path / "other", tokenizer="c" * 64)
    fresh = state.generator.network.class_embedding.weight.detach().clone()
    initialize_generator_from(state.generator, tmp_path / "other")
    assert "7 classes" in caplog.text
    assert "class embedding" in caplog.text
    for name, value in state.generator.state_dict().items():
        expected = fresh if name == "network.class_embedding.weight" else other.state_dict()[name]
        assert torch.equal(value, expected), name


def test_fine_tuning_keeps_the_classes_where_they_are_as_many(material, tmp_path, caplog):
    state = built(small(material))[0].state
    other = build_generator(state.generator.config)
    save_generator(other, tmp_path / "other", tokenizer="c" * 64)
    initialize_generator_from(state.generator, tmp_path / "other")
    assert equal(dict(state.generator.state_dict()), dict(other.state_dict()))
    assert caplog.text == ""


def test_fine_tuning_on_other_classes_keeps_those_of_the_same_name(material, tmp_path, caplog):
    state = built(small(material))[0].state
    other = build_generator(state.generator.config)
    save_generator(other, tmp_path / "a", tokenizer="c" * 64, class_names=["cat", "dog", "eel"])
    fresh = state.generator.network.class_embedding.weight.detach().clone()
    made_from = Identity(class_names=("bus", "cat", "zonda"), tokenizer="d" * 64)
    initialize_generator_from(state.generator, tmp_path / "a", made_from)
    table, theirs = (
        state.generator.network.class_embedding.weight,
        other.network.class_embedding.weight,
    )
    assert torch.equal(table[1], theirs[0])
    assert torch.equal(table[[0, 2, 3]], fresh[[0, 2, 3]])
    assert "fresh class embedding for bus, zonda" in caplog.text
    assert "3 classes (cat, dog, eel) and these tokens have 3 (bus, cat, zonda)" in caplog.text
    assert f"trained on tokens of tokenizer {'c' * 64}; these are of {'d' * 64}" in caplog.text


def test_a_run_does_not_go_on_with_tokens_of_other_classes(material, tmp_path, caplog):
    run = replace(small(material, num_steps=1), out=str(tmp_path / "run"))
    train(run)
    extra = load_model(tmp_path / "run/model", "generator").record["extra"]
    assert extra["made_from"]["class_names"] == ["class 0", "class 1", "class 2"]
    shutil.copytree(material / "tokens", tmp_path / "tokens")
    record = tmp_path / "tokens/tokens.json"
    record.write_text(record.read_text().replace("class 2", "dog"))
    longer = replace(run, train=replace(run.train, num_steps=2))
    moved = replace(longer, tokens=replace(run.tokens, path=str(tmp_path / "tokens")))
    with pytest.raises(ValueError, match=r"class 2 \(of 3\) there and dog \(of 3\) here; resume"):
        train(moved, resume=True)
    train(longer, resume=True)


def test_a_run_does_not_go_on_with_another_k(material, tmp_path):
    run = replace(small(material, num_steps=1), out=str(tmp_path / "run"))
    train(run)
    kept = replace(run.kept, candidates=(16, 64))
    model = replace(run.model, kept_candidates=(16, 64))
    with pytest.raises(ValueError, match=r"model\.kept_candidates \(\[16, 64\]\) must be \[16, 24"):
        train(replace(run, kept=kept, model=model), resume=True)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        (
            {"num_kept": 9, "kept_candidates": (9, 24)},
            r"kept_candidates \(\[16, 24\]\) must be \[9, ",
        ),
        ({"head": Subindices(sizes=(4, 16))}, r"head.sizes \(\[8, 8\]\) must be \[4, 16\]"),
        ({"order": Random()}, r"order.kind \(merge\) must be random"),
    ],
)
def test_fine_tuning_refuses_what_shapes_cannot_tell(material, tmp_path, changes, named):
    state = built(small(material))[0].state
    other = build_generator(replace(state.generator.config, **changes))
    save_generator(other, tmp_path / "other", tokenizer="c" * 64)
    with pytest.raises(ValueError, match=rf"^model\.{named}.*, as in the generator of init_from"):
        initialize_generator_from(state.generator, tmp_path / "other")


def test_fine_tuning_may_change_how_a_generator_is_trained(material, tmp_path):
    state = built(small(material))[0].state
    freely = {"dropout": 0.5, "class_dropout": 0.2, "label_smoothing": 0.0}
    other = build_generator(
        replace(
            state.generator.config, order=Merge(groups="source", window=5), num_kept=24, **freely
        )
    )
    save_generator(other, tmp_path / "other", tokenizer="c" * 64)
    initialize_generator_from(state.generator, tmp_path / "other")
    assert equal(dict(state.generator.state_dict()), dict(other.state_dict()))


def test_the_average_starts_from_the_weights_that_are_fine_tuned(material, tmp_path):
    model = train(replace(small(material), out=str(tmp_path / "run")))
    state = built(replace(small(material), init_from=str(model)))[0].state
    assert isinstance(state.ema, Ema)
    assert equal(state.ema.shadow, dict(load_file(model / "model.safetensors")))


@pytest.mark.parametrize("name", ["raster", "merge"])
def test_impossible_runs_are_refused(name):
    model = GeneratorConfig(
        order=KINDS[name](), grid_size=(8, 8), num_kept=16, kept_candidates=(16,)
    )
    run = digits32_ar()
    kept = replace(run.kept, candidates=(20,))
    with pytest.raises(ValueError, match=r"must be the 64 cells|must be one of kept_candidates"):
        GeneratorRun(model=model, kept=kept)


# ---------------------------------------------------------------------------- many processes


@pytest.mark.slow
def test_sigterm_saves_and_the_run_goes_on(material, tmp_path):
    script = textwrap.dedent(f"""
        import sys
        sys.path.insert(0, "tests")
        from dataclasses import replace
        from pathlib import Path
        from tests.training.test_generator import small
        from mergevq.training.generator import train
        run = small(Path({str(material)!r}), num_steps=100000, save_every=100000,
                    eval_every=100000, image_every=100000)
        train(replace(run, out={str(tmp_path / "run")!r}))
    """)
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [sys.executable, "-c", script], stderr=subprocess.PIPE, env=environment, text=True
    )
    assert process.stderr is not None
    for line in process.stderr:
        if "step       2" in line:
            break
    process.send_signal(signal.SIGTERM)
    _, rest = process.communicate(timeout=60)
    assert process.returncode == 0, rest
    assert list((tmp_path / "run/checkpoints").iterdir())
    assert "--resume" in rest


TWO_RANKS = """
import sys
sys.path.insert(0, "tests")
from dataclasses import replace
from pathlib import Path
from tests.training.test_generator import small
from mergevq.training.generator import train
run = small(Path(sys.argv[1]), "random", num_steps=3, save_every=3, eval_every=3, image_every=3,
            batch_size=8)
run = replace(run, model=replace(run.model, dropout=0.3, class_dropout=0.5))
train(replace(run, out=sys.argv[2]))
"""


@pytest.mark.slow
def test_two_ranks_equal_one_process_at_the_same_global_batch(material, tmp_path):
    script = tmp_path / "run.py"
    script.write_text(TWO_RANKS)
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path.cwd())}
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    for name, launcher in (("one", []), ("two", torchrun)):
        command = [sys.executable, *launcher, str(script), str(material), str(tmp_path / name)]
        subprocess.run(command, check=True, env=environment, capture_output=True, timeout=120)
    states = [
        load_state(tmp_path / name / "checkpoints/step-00000003/state") for name in ("one", "two")
    ]
    # Sums over ranks are added in another order: three steps of Adam keep 1e-3 of a weight.
    torch.testing.assert_close(states[0]["generator"], states[1]["generator"], rtol=1e-3, atol=2e-4)
    first, second = (
        json.loads((tmp_path / name / "metrics.jsonl").read_text().splitlines()[-1])
        for name in ("one", "two")
    )
    for term in ("loss", "nll", "val_nll@16"):
        assert first[term] == pytest.approx(second[term], rel=1e-4), term


def test_the_command_trains_and_samples(material, tmp_path, capsys):
    options = ["--tokens.path", str(material / "tokens")]
    options += ["--tokens.tokenizer", str(material / "tokenizer"), "--model.dim", "32"]
    options += ["--model.head.sizes", "8", "8", "--model.num-kept", "16"]
    options += ["--model.kept-candidates", "16", "24", "--kept.candidates", "16", "24"]
    options += ["--train.num-steps", "2", "--train.batch-size", "4", "--train.device", "cpu"]
    command = ["train", "digits32_ar", *options, "--out", str(tmp_path / "run")]
    assert main(command) == 0
    model = str(tmp_path / "run/model")
    goes_on = f"next:\n  mergevq sample --generator {model} --out samples"
    assert capsys.readouterr().out == f"trained generator: {model}\n{goes_on}\n"
    models = ["--generator", model, "--model", str(material / "tokenizer"), "--device", "cpu"]
    command = ["sample", *models, "--classes", "2", "--num", "3", "--out", str(tmp_path / "out")]
    assert main(command) == 0
    assert (tmp_path / "out/000002.png").is_file()


def test_help_of_a_generator_recipe_says_what_its_fields_mean(capsys):
    with pytest.raises(SystemExit) as exit_:
        main(["train", "digits32_ar", "--help"])
    assert exit_.value.code == 0
    printed = capsys.readouterr().out
    for option in (
        "--tokens.tokenizer",
        "--model.order.window",
        "--sampling.guidance-scale",
        "--resume",
    ):
        assert option in printed


def shrunk(name):
    """A recipe's run, on tokens of 64 codes."""
    run = shrink_generator(GENERATOR_RECIPES[name]())
    return replace(run, model=replace(run.model, head=Subindices(sizes=(8, 8))))


# One of all recipes that are the same network and sampler when shrunk.
SHRUNK_APART = {
    repr((run.model, run.kept, run.sampling)): name
    for name in GENERATOR_RECIPES
    for run in [shrunk(name)]
    # Ordered tokens are of another tokenizer: tests/generator/orders/test_ordered.py.
    if run.model.order.layout == "source"
}.values()


@pytest.mark.parametrize("name", SHRUNK_APART)
@pytest.mark.slow  # .ci/run trains them for the ledger.
def test_a_shrunk_recipe_trains(name, tmp_path, material):
    tokens = TokensConfig(path=str(material / "tokens"), tokenizer=str(material / "tokenizer"))
    made = train(replace(shrunk(name), tokens=tokens, out=str(tmp_path / "run")))
    assert (made / "model.safetensors").is_file()
