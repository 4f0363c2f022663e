"""Training a decoder on changes it and nothing else, and as many tokens are new as asked for."""

from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from mergevq.config.training import DataConfig, OptimConfig, PostTraining
from mergevq.data.batches import Batch
from mergevq.generator.generation import load_pair
from mergevq.generator.seams import Sampled
from mergevq.runtime.artefacts import load_model, model_hash, tokens_hash
from mergevq.training.posthoc import part
from mergevq.training.posthoc.decoder import finetune_decoder, mixture
from tests.training.posthoc.test_source import CPU, NUM_KEPT, material  # noqa: F401 - a fixture


def run_of(folder, out, **changes):
    run = PostTraining(
        tokenizer=str(folder / "tokenizer"),
        generator=str(folder / "generator"),
        data=DataConfig(path="digits", max_images=40, num_workers=0),
        out=str(out),
        num_kept=(NUM_KEPT,),
        num_passes=3,
        num_steps=2,
        batch_size=8,
        num_eval_images=8,
        optim=OptimConfig(lr=1e-3, ema_decay=0.5),
        device="cpu",
    )
    return replace(run, **changes)


@pytest.fixture(scope="module")
def tuned(material, tmp_path_factory):  # noqa: F811
    return finetune_decoder(run_of(material, tmp_path_factory.mktemp("tuned") / "model"))


def weights(directory):
    return load_file(directory / "model.safetensors")


def test_only_the_decoder_changes_and_tokens_stay_valid(material, tuned):  # noqa: F811
    old, new = weights(material / "tokenizer"), weights(tuned.directory)
    changed = {name for name in old if not torch.equal(old[name], new[name])}
    assert changed
    assert all(name.startswith("decoder.") for name in changed)
    assert tokens_hash(tuned.directory) == tokens_hash(material / "tokenizer")
    load_pair(material / "generator", tuned.directory, CPU)


def test_what_was_done_is_written_beside_the_weights(material, tuned):  # noqa: F811
    note = load_model(tuned.directory, kind="tokenizer").record["extra"]["decoder_finetuning"]
    assert note["run"]["preserve"] == 0.7
    assert note["tokenizer"] == model_hash(material / "tokenizer")
    assert note["before"] == tuned.before
    assert tuned.before.keys() == {f"own@{NUM_KEPT}", f"mixed@{NUM_KEPT}"}
    assert note["after"] == tuned.after != tuned.before


def test_the_same_run_gives_the_same_weights(material, tuned, tmp_path):  # noqa: F811
    again = weights(finetune_decoder(run_of(material, tmp_path / "again")).directory)
    assert all(torch.equal(again[name], value) for name, value in weights(tuned.directory).items())


def test_where_all_tokens_stay_no_generator_is_asked(material, tmp_path, monkeypatch):  # noqa: F811
    monkeypatch.setattr(part, "inpaint", None)
    done = finetune_decoder(run_of(material, tmp_path / "out", preserve=1.0))
    assert done.before[f"own@{NUM_KEPT}"] == done.before[f"mixed@{NUM_KEPT}"]


@pytest.mark.parametrize(("preserve", "stay"), [(0.5, 8), (0.7, 11), (0.0, 0)])
def test_as_many_tokens_stay_as_are_asked_for(material, tmp_path, monkeypatch, preserve, stay):  # noqa: F811
    run = run_of(material, tmp_path, preserve=preserve)
    pair = load_pair(run.generator, run.tokenizer, CPU)

    def zeros(_, *, indices, keep, **rest):
        assert rest["settings"].passes.num_steps == run.num_passes
        return Sampled(torch.where(keep, indices, 0), None, None, run.num_passes, 0)

    monkeypatch.setattr(part, "inpaint", zeros)
    image = torch.rand(4, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    encoded = pair.tokenizer.encode(image, NUM_KEPT)
    encoded = encoded._replace(parts=torch.full_like(encoded.parts, 5))
    batch = Batch(image, torch.tensor([-1, 0, 1, 2]), None, None, torch.arange(4))
    mixed = mixture(run, pair, batch, encoded, range(4), "test")
    assert (mixed == 5).sum((1, 2)).tolist() == [stay] * 4
    assert (mixed == 0).sum((1, 2)).tolist() == [NUM_KEPT - stay] * 4


# ------------------------------------------------------------------------------------ refusals


def test_what_does_not_fit_is_refused(material, tmp_path):  # noqa: F811
    with pytest.raises(ValueError, match="must be of order 'random', not 'merge'"):
        finetune_decoder(run_of(material, tmp_path / "a", generator=str(material / "merge")))
    with pytest.raises(ValueError, match=r"num_kept \(20,\) must be among the K of the generator"):
        finetune_decoder(run_of(material, tmp_path / "b", num_kept=(20,)))
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ValueError, match="is not empty"):
        finetune_decoder(run_of(material, tmp_path))
