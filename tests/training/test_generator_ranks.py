"""A generator cut into shards over two gloo processes is the generator of one process."""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from mergevq.config.training import GeneratorRun
from mergevq.runtime import device
from mergevq.runtime.artefacts import load_model, tokens_hash
from mergevq.runtime.checkpoints import load_state
from mergevq.training.generator import train
from tests.training.test_generator import equal, small, small_tokenizer, write_tokens

pytestmark = pytest.mark.slow

# Sums over ranks are added in another order: four steps of Adam keep 1e-3 of a weight.
CLOSE = {"rtol": 1e-3, "atol": 2e-4}


def sharded(folder: Path, name: str, num_steps: int, **settings: object) -> GeneratorRun:
    """Four steps at most, a checkpoint after every two; rank 1 has no batch to validate."""
    every = {"save_every": 2, "eval_every": 2, "image_every": 4, "num_eval_images": 5}
    run = small(folder, "random", num_steps=num_steps, batch_size=8, **every)
    run = replace(run, train=replace(run.train, **settings))
    run = replace(run, model=replace(run.model, dropout=0.2, class_dropout=0.5))
    return replace(run, parallel="fsdp", out=str(folder / name))


def on_each_rank(folder: Path) -> None:
    """Runs of both processes, in one process group after the other."""
    train(sharded(folder, "whole", 4))
    train(sharded(folder, "cut", 2))
    train(sharded(folder, "cut", 4), resume=True)
    train(sharded(folder, "from_one", 4), resume=True)
    train(sharded(folder, "parts", 4, accumulation=2, checkpointing=True))
    train(sharded(folder, "bf16", 4, precision="bf16"))
    # As on GPUs, whose verdicts on steps are not read in every step.
    device._STEPS_BETWEEN_READS["cpu"] = 10
    train(sharded(folder, "unread", 4))


def checkpoint(folder: Path, name: str, step: int) -> Path:
    return folder / name / f"checkpoints/step-{step:08d}"


def halfway(folder: Path, name: str, copy: str) -> None:
    """A copy of a run as it was after two steps."""
    shutil.copytree(checkpoint(folder, name, 2), checkpoint(folder, copy, 2))
    shutil.copy(folder / name / "run.json", folder / copy)


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    small_tokenizer().save_pretrained(folder / "tokenizer")
    write_tokens(folder / "tokens", tokens_hash(folder / "tokenizer"))
    train(sharded(folder, "one", 4))
    train(sharded(folder, "one_bf16", 4, precision="bf16"))
    halfway(folder, "one", "from_one")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    repository = Path(__file__).parents[2]
    subprocess.run(
        [*torchrun, "--nproc-per-node", "2", __file__, str(folder)],
        check=True,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(repository)},
        timeout=180,
    )
    return folder


def test_two_shards_equal_one_process_at_the_same_global_batch(runs):
    assert not (checkpoint(runs, "one", 4) / "state/shards").exists()
    assert len(list((checkpoint(runs, "whole", 4) / "state/shards").iterdir())) == 2
    one, two = (load_state(checkpoint(runs, name, 4) / "state") for name in ("one", "whole"))
    for part in ("generator", "ema"):
        torch.testing.assert_close(one[part], two[part], **CLOSE)
    assert not torch.equal(
        two["generator"]["network.class_embedding.weight"],
        two["ema"]["shadow"]["network.class_embedding.weight"],
    )
    first, second = (
        json.loads((runs / name / "metrics.jsonl").read_text().splitlines()[-1])
        for name in ("one", "whole")
    )
    for term in ("loss", "nll", "val_nll@16", "grad_norm"):
        assert first[term] == pytest.approx(second[term], rel=1e-3), term


def test_shards_are_updated_alike_where_the_host_does_not_read(runs):
    whole, unread = (
        load_state(checkpoint(runs, name, 4) / "state") for name in ("whole", "unread")
    )
    assert equal(whole, unread)


def test_the_saved_model_is_whole_and_has_the_averaged_weights(runs):
    weights = load_model(runs / "whole/model", kind="generator").state
    shadow = load_state(checkpoint(runs, "whole", 4) / "state")["ema"]["shadow"]
    assert equal(dict(weights), shadow)
    assert (runs / "whole/images/step-00000004.png").is_file()


def test_a_resumed_sharded_run_is_bit_equal_to_an_uninterrupted_one(runs):
    whole, cut = (load_state(checkpoint(runs, name, 4) / "state") for name in ("whole", "cut"))
    assert whole["step"] == 4
    assert equal(whole, cut)


def test_shards_go_on_in_one_process_and_one_process_goes_on_in_shards(runs):
    halfway(runs, "whole", "from_two")
    train(sharded(runs, "from_two", 4), resume=True)
    one = load_state(checkpoint(runs, "one", 4) / "state")
    for name in ("from_two", "from_one"):
        state = load_state(checkpoint(runs, name, 4) / "state")
        for part in ("generator", "ema", "optimizer"):
            torch.testing.assert_close(state[part], one[part], **CLOSE)


def test_parts_and_recomputed_activations_give_the_same_shards(runs):
    whole, parts = (load_state(checkpoint(runs, name, 4) / "state") for name in ("whole", "parts"))
    torch.testing.assert_close(parts["generator"], whole["generator"], **CLOSE)


def test_shards_learn_in_bf16_as_one_process_does(runs):
    # Gains are rounded to bf16 in shards and are not in one process, besides all else.
    one, two = (
        json.loads((runs / name / "metrics.jsonl").read_text().splitlines()[-1])
        for name in ("one_bf16", "bf16")
    )
    assert one["nll"] == pytest.approx(two["nll"], rel=2e-2)
    weights = load_state(checkpoint(runs, "bf16", 4) / "state")["generator"]
    assert {tensor.dtype for tensor in weights.values()} == {torch.float32}


def test_a_checkpoint_of_another_architecture_is_refused(runs):
    halfway(runs, "whole", "other")
    run = sharded(runs, "other", 4)
    run = replace(run, model=replace(run.model, num_layers=run.model.num_layers + 1))
    with pytest.raises(ValueError, match=r"has another model: model\.num_layers"):
        train(run, resume=True)


if __name__ == "__main__":
    torch.set_num_threads(1)
    on_each_rank(Path(sys.argv[1]))
