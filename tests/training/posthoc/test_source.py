"""Fine-tuning changes the source predictor and nothing else, and pays where tokens are made up."""

from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from mergevq.config.generator import (
    GeneratorConfig,
)
from mergevq.config.parts.heads import (
    Subindices,
)
from mergevq.config.training import OptimConfig, SourceRun
from mergevq.data.layouts import Source, canonicalize
from mergevq.data.tokens.dataset import open_tokens
from mergevq.data.tokens.files import TokenRecord, TokenRows, require_tokenizer
from mergevq.data.tokens.writing import claim, finish, write_shard
from mergevq.generator.build import build_generator, save_generator
from mergevq.generator.generation import load_pair
from mergevq.runtime.artefacts import load_model, model_hash, tokens_hash
from mergevq.tokenizer.tokenizer import Tokenizer
from mergevq.training.posthoc import source as train_source
from mergevq.training.posthoc.part import replace_tokens
from mergevq.training.posthoc.source import finetune_source
from tests.support.generators import KINDS
from tests.training.test_generator import NUM_BITS, small_tokenizer

CPU = torch.device("cpu")
NUM_IMAGES = 40
NUM_KEPT = 16


@pytest.fixture(scope="module")
def material(tmp_path_factory):
    """Tokenizer, generator and tokens: every image is one of four, which its codes tell apart."""
    folder = tmp_path_factory.mktemp("material")
    small_tokenizer().save_pretrained(folder / "tokenizer")
    tokenizer = tokens_hash(folder / "tokenizer")
    for order in ("random", "merge"):
        torch.manual_seed(1)
        generator = build_generator(
            GeneratorConfig(
                order=KINDS[order](),
                dim=16,
                num_layers=1,
                num_heads=2,
                ffn_dim=16,
                grid_size=(8, 8),
                num_kept=NUM_KEPT,
                kept_candidates=(NUM_KEPT, 24),
                head=Subindices(sizes=(8, 8)),
            )
        )
        save_generator(
            generator, folder / ("generator" if order == "random" else order), tokenizer=tokenizer
        )
    record = TokenRecord(
        tokenizer=tokenizer,
        num_kept=(NUM_KEPT,),
        sizes=(2**NUM_BITS,),
        grid_shape=(8, 8),
        data="made up",
        images="a" * 64,
        num_images=NUM_IMAGES,
        class_names=(),
    )
    numbers = torch.Generator().manual_seed(2)
    index = torch.randint(NUM_KEPT, (4, 64), generator=numbers)
    for row in index:
        row[torch.randperm(64, generator=numbers)[:NUM_KEPT]] = torch.arange(NUM_KEPT)
    source, _ = canonicalize(Source(index, NUM_KEPT))
    kind = torch.arange(NUM_IMAGES) % 4
    codes = torch.randint(2**NUM_BITS, (4, NUM_KEPT), generator=numbers)
    claim(folder / "tokens", record, {})
    rows = TokenRows(
        parts=codes[kind][..., None],
        source=source.index[kind],
        label=torch.full_like(kind, -1),
        position=torch.arange(NUM_IMAGES),
        mirrored=torch.zeros_like(kind),
    )
    write_shard(folder / "tokens", record, 0, rows, broken=[])
    finish(folder / "tokens")
    return folder


def run_of(material, out="out", **changes):
    run = SourceRun(
        tokenizer=str(material / "tokenizer"),
        tokens=str(material / "tokens"),
        generator=str(material / "generator"),
        out=str(out),
        num_passes=3,
        num_steps=3,
        batch_size=8,
        num_eval_images=8,
        val_fraction=0.2,
        optim=OptimConfig(lr=3e-3, ema_decay=0.9),
        precision="float32",
        device="cpu",
    )
    return replace(run, **changes)


# ------------------------------------------------------------------------------ what changes


@pytest.fixture(scope="module")
def tuned(material, tmp_path_factory):
    out = tmp_path_factory.mktemp("tuned") / "model"
    return finetune_source(run_of(material, out))


def test_only_the_source_predictor_changes(material, tuned):
    old, new = (
        load_file(directory / "model.safetensors")
        for directory in (material / "tokenizer", tuned.directory)
    )
    assert old.keys() == new.keys()
    changed = {name for name in old if not torch.equal(old[name], new[name])}
    assert changed
    assert all(name.startswith("expander.predictor.") for name in changed)


def test_tokens_and_pictures_of_given_sources_are_the_same(material, tuned):
    image = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(3)) * 2 - 1
    old, new = (
        Tokenizer.from_pretrained(directory).reconstruct(image, NUM_KEPT)
        for directory in (material / "tokenizer", tuned.directory)
    )
    assert torch.equal(old.encoded.indices, new.encoded.indices)
    assert torch.equal(old.encoded.source.index, new.encoded.source.index)
    assert torch.equal(old.image, new.image)


def test_tokens_and_generators_go_with_the_result(material, tuned):
    require_tokenizer(open_tokens(material / "tokens").record, tokens_hash(tuned.directory))
    pair = load_pair(material / "generator", tuned.directory, CPU)
    assert pair.tokenizer_hash == model_hash(tuned.directory) != model_hash(material / "tokenizer")


def test_what_was_done_is_written_beside_the_weights(material, tuned):
    note = load_model(tuned.directory, kind="tokenizer").record["extra"]["source_finetuning"]
    assert note["run"]["max_replaced"] == 0.5
    assert note["tokenizer"] == model_hash(material / "tokenizer")
    assert note["generator"] == model_hash(material / "generator")
    assert note["tokens"]["images"] == "a" * 64
    assert note["after"][f"new@{NUM_KEPT}"]["loss"] == tuned.after[f"new@{NUM_KEPT}"].loss


def test_the_same_run_gives_the_same_weights(material, tuned, tmp_path):
    again = finetune_source(run_of(material, tmp_path / "again")).directory
    first, second = (load_file(d / "model.safetensors") for d in (tuned.directory, again))
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.slow
def test_learning_from_made_up_tokens_pays_on_made_up_tokens(material, tmp_path):
    losses = {}
    for share in (0.0, 0.7):
        run = run_of(material, tmp_path / str(share), num_steps=200, max_replaced=share)
        directory = finetune_source(run).directory
        # Looked at alike, by a run that hardly learns.
        look = run_of(material, tmp_path / f"look{share}", num_steps=1, max_replaced=0.7)
        look = replace(look, tokenizer=str(directory), optim=OptimConfig(lr=1e-12))
        losses[share] = finetune_source(look).before
    made_up, clean = f"new@{NUM_KEPT}", f"clean@{NUM_KEPT}"
    assert losses[0.7][made_up].loss < 0.8 * losses[0.0][made_up].loss
    assert losses[0.7][made_up].accuracy > losses[0.0][made_up].accuracy
    # Uniform guesses cost 2.77 nats.
    assert losses[0.0][clean].loss < min(2.4, losses[0.0][made_up].loss)


# --------------------------------------------------------------------------- what is replaced


def replaced(material, share, rows, **changes):
    """Tokens of some images after the generator had its part."""
    pair = load_pair(material / "generator", material / "tokenizer", CPU)
    batch = open_tokens(material / "tokens").batch(rows, NUM_KEPT)
    run = run_of(material, **changes)
    ids = range(rows[0], rows[0] + len(rows))
    count = int(share * NUM_KEPT)
    new = replace_tokens(
        *(run, pair, batch.parts, batch.label), num_replaced=count, image_ids=ids, purpose="test"
    )
    return batch.parts, new


def test_the_share_says_how_many_tokens_are_new(material):
    # An untrained generator is uniform: of 6 bits, one in 64 happens to be what it was.
    for share, most in ((0.0, 0), (0.25, 4), (0.99, 15)):
        old, new = replaced(material, share, range(40))
        num_new = (old != new).any(-1).sum(1)
        assert int(num_new.max()) == most, share
        assert float(num_new.float().mean()) == pytest.approx(most * 63 / 64, abs=0.15)


def test_each_step_makes_a_share_of_its_own_anew_evenly_from_none_to_the_largest(
    material, tmp_path, monkeypatch
):
    counts = []

    def look(run, pair, parts, label, *, num_replaced, image_ids, purpose):
        if purpose == "training":
            counts.append(num_replaced)
        return parts

    monkeypatch.setattr(train_source, "replace_tokens", look)
    finetune_source(run_of(material, tmp_path / "out", num_steps=60, max_replaced=0.8))
    # Of 16 tokens: 0 to 12, all alike.
    drawn = sorted(counts)
    even = [int(16 * 0.8 * (number + 0.5) / 60) for number in range(60)]
    assert max(abs(a - b) for a, b in zip(drawn, even, strict=True)) < 0.15 * 16
    assert (drawn[0], drawn[-1]) == (0, 12)


def test_what_is_new_does_not_depend_on_the_batch_and_does_on_the_seed(material):
    _, together = replaced(material, 0.5, range(6))
    _, alone = replaced(material, 0.5, range(4, 5))
    assert torch.equal(together[4:5], alone)
    _, other = replaced(material, 0.5, range(6), seed=1)
    assert not torch.equal(together, other)


# ------------------------------------------------------------------------------------ refusals


def test_a_generator_that_leaves_no_source_to_find_is_refused(material, tmp_path):
    run = run_of(material, tmp_path / "out", generator=str(material / "merge"))
    with pytest.raises(ValueError, match="must be of order 'random', not 'merge'"):
        finetune_source(run)


def test_a_k_without_tokens_is_refused(material, tmp_path):
    with pytest.raises(ValueError, match=r"num_kept \(24,\) must be among"):
        finetune_source(run_of(material, tmp_path / "out", num_kept=(24,)))


def test_another_tokenizer_is_refused(material, tmp_path):
    small_tokenizer(seed=7).save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match="trained on tokens of tokenizer"):
        finetune_source(run_of(material, tmp_path / "out", tokenizer=str(tmp_path / "other")))


def test_tokens_of_other_classes_than_the_generators_are_refused(material, tmp_path):
    config = replace(
        load_pair(material / "generator", material / "tokenizer", CPU).generator.config,
        num_classes=2,
    )
    save_generator(
        build_generator(config),
        tmp_path / "pets",
        tokenizer=tokens_hash(material / "tokenizer"),
        class_names=["cat", "dog"],
    )
    run = run_of(material, tmp_path / "out", generator=str(tmp_path / "pets"))
    with pytest.raises(ValueError, match=r"cat, dog \(of 2\) there and none \(of 0\) here; give"):
        finetune_source(run)


def test_nothing_is_overwritten(material, tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ValueError, match="is not empty"):
        finetune_source(run_of(material, tmp_path))
