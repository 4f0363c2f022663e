"""The state of a run comes back bit for bit, or the message says what to go on from."""

import json
import math
import os
import pickle

import pytest
import torch
from torch import nn

from mergevq.runtime import checkpoints as run_state
from mergevq.runtime.artefacts import load_strict
from mergevq.runtime.checkpoints import CheckpointManager, load_state, restoring, save_state


@pytest.fixture
def no_pickle(monkeypatch):
    def refuse(*arguments, **keywords):
        raise RuntimeError("pickle used")

    monkeypatch.setattr(pickle, "load", refuse)
    monkeypatch.setattr(pickle, "loads", refuse)
    monkeypatch.setattr(torch, "load", refuse)


def layer(seed: int = 0) -> nn.Linear:
    module = nn.Linear(3, 2)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(generator=generator)
    return module


def write_text(text: str):
    return lambda directory: (directory / "text").write_text(text)


# ----------------------------------------------------------------------------- state of a run


@pytest.mark.usefixtures("no_pickle")
def test_plain_values_and_tensors_of_every_type_come_back_exactly(tmp_path, generator):
    dtypes = (torch.float64, torch.bfloat16, torch.float16, torch.int64, torch.uint8, torch.bool)
    tensors = {str(d): torch.randn(2, 3, generator=generator).mul(9).to(d) for d in dtypes}
    state = {
        "tensors": tensors,
        "transposed": tensors["torch.float64"].T,
        "empty": torch.zeros(0, 4),
        "scalar": torch.tensor(-0.0),
        "special": torch.tensor([math.nan, math.inf, 1e-45]),
        "values": [True, 1, -(2**70), 0.1, -0.0, 1e300, None, "", "tensor", [], (), {}],
        "tuple": (1, (2.5, [None, (False,)])),
        "mixed keys": {0: "int", "0": "str", -3: {1: torch.ones(1)}},
        "tensor": {"tensor": "a name, not a tensor"},
        "a.b": torch.zeros(1),
        "a": {"b": torch.ones(1)},
        "infinite": -math.inf,
        "generator": generator.get_state(),
    }
    save_state(tmp_path / "state", state)
    loaded = load_state(tmp_path / "state")
    assert str(loaded) == str(state)  # types, key types, order and signs
    assert torch.equal(loaded["generator"], state["generator"])
    assert torch.equal(loaded["special"].view(torch.int32), state["special"].view(torch.int32))
    assert all(torch.equal(loaded["tensors"][d], tensors[d]) for d in tensors)
    assert torch.signbit(loaded["scalar"])


def test_not_a_number_comes_back(tmp_path):
    save_state(tmp_path, {"loss": math.nan})
    assert math.isnan(load_state(tmp_path)["loss"])


@pytest.mark.usefixtures("no_pickle")
def test_training_continues_to_the_same_bits(tmp_path):
    def trained(module: nn.Module, optimizer: torch.optim.Optimizer, draws: torch.Generator):
        for _ in range(3):
            optimizer.zero_grad()
            module(torch.randn(5, 3, generator=draws)).square().mean().backward()
            optimizer.step()

    module, draws = layer(), torch.Generator().manual_seed(1)
    optimizer = torch.optim.AdamW(module.parameters(), lr=0.1, betas=(0.5, 0.9))
    trained(module, optimizer, draws)
    state = {"optimizer": optimizer.state_dict(), "draws": draws.get_state()}
    save_state(tmp_path, state | {"module": module.state_dict()})
    trained(module, optimizer, draws)

    loaded = load_state(tmp_path)
    resumed, resumed_draws = layer(5), torch.Generator()
    load_strict(resumed, loaded["module"])
    resumed_optimizer = torch.optim.AdamW(resumed.parameters(), lr=9.0)
    resumed_optimizer.load_state_dict(loaded["optimizer"])
    resumed_draws.set_state(loaded["draws"])
    trained(resumed, resumed_optimizer, resumed_draws)
    assert torch.equal(resumed.weight, module.weight)
    assert torch.equal(resumed.bias, module.bias)


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({"a": {"b": [{1}]}}, r"state\.a\.b\.0 \(set\) must be a tensor, bool, int"),
        ({"a": {(1, 2): 3}}, r"state\.a has a key \(1, 2\); it must be a string or an integer"),
    ],
)
def test_what_cannot_be_kept_exactly_is_refused(tmp_path, state, message):
    with pytest.raises(ValueError, match=message):
        save_state(tmp_path / "state", state)
    assert not (tmp_path / "state").exists()


def test_a_state_in_shards_comes_back_whole_and_exact(tmp_path):
    state = {
        "weights": {"a": torch.randn(3, 2), "b": torch.randn(5).bfloat16(), 7: torch.tensor(3.0)},
        "plain": [1, 2.5, None, ("x", math.inf), True],
    }
    CheckpointManager(tmp_path, keep_last=1).save_sharded(4, state)
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000004"]
    directory = tmp_path / "step-00000004/state"
    assert sorted(path.name for path in directory.iterdir()) == ["shards", "state.json"]
    found = load_state(directory)
    assert found["plain"] == state["plain"]
    assert found["weights"].keys() == state["weights"].keys()
    for name, tensor in state["weights"].items():
        assert found["weights"][name].dtype == tensor.dtype
        assert torch.equal(found["weights"][name], tensor)


def test_shards_of_another_run_are_refused(tmp_path):
    CheckpointManager(tmp_path, keep_last=1).save_sharded(4, {"a": torch.ones(3), "step": 1})
    directory = tmp_path / "step-00000004/state"
    with pytest.raises(ValueError, match=r"a: saved \(3,\), needed \(4,\)"):
        load_state(directory, {"a": torch.ones(4), "step": 1})
    mine = {"a": torch.zeros(3), "step": 0}
    assert load_state(directory, mine)["a"] is mine["a"]
    assert mine["a"].tolist() == [1, 1, 1]


def test_an_interrupted_checkpoint_in_shards_leaves_the_one_before(tmp_path):
    manager = CheckpointManager(tmp_path, keep_last=1)
    manager.save_sharded(4, {"a": torch.ones(3)})
    with pytest.raises(ValueError, match="must be a tensor"):
        manager.save_sharded(8, {"a": torch.ones(3), "b": object()})
    assert manager.latest() == tmp_path / "step-00000004"
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000004"]


# ------------------------------------------------------------------------------------- damage


def save_steps(folder, *steps, sharded=False):
    """Checkpoints of a run, each of the number of its step."""
    manager = CheckpointManager(folder, keep_last=len(steps))
    for step in steps:
        state = {"weight": torch.full((40,), float(step)), "step": step}
        if sharded:
            manager.save_sharded(step, state)
        else:
            manager.save(step, lambda path, state=state: save_state(path / "state", state))
    return manager


def flip(path, place: int) -> None:
    """Change one bit of a file."""
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)


def some_tensor_file(directory):
    """A file of tensors of a state."""
    return next(path for path in sorted(directory.rglob("*.safetensors")))


@pytest.mark.parametrize("sharded", [False, True])
@pytest.mark.parametrize("place", [0, 60, -1])
def test_a_flipped_bit_of_the_newest_checkpoint_names_the_newest_good_one(tmp_path, place, sharded):
    latest = save_steps(tmp_path, 5, 10, 20, 30, sharded=sharded).latest()
    flip(some_tensor_file(tmp_path / "step-00000020"), -1)
    flip(some_tensor_file(latest), place)
    message = r"is damaged: its digest .*good checkpoint is .*step-00000010: delete .*30 .*--resume"
    with pytest.raises(ValueError, match=message):
        load_state(latest / "state")
    assert load_state(tmp_path / "step-00000010/state")["step"] == 10


def test_a_changed_number_of_the_record_is_damage(tmp_path):
    latest = save_steps(tmp_path, 10).latest()
    record = latest / "state/state.json"
    record.write_text(record.read_text().replace("10", "11"))
    with pytest.raises(ValueError, match=r"state.json is damaged.*start the run anew"):
        load_state(latest / "state")


def test_a_file_that_is_missing_or_more_than_was_written_is_damage(tmp_path):
    latest = save_steps(tmp_path, 10, sharded=True).latest()
    shard = some_tensor_file(latest)
    (shard.parent / "more.safetensors").write_bytes(shard.read_bytes())
    with pytest.raises(ValueError, match=r"has not the files that state\.json lists"):
        load_state(latest / "state")
    (shard.parent / "more.safetensors").unlink()
    shard.unlink()
    with pytest.raises(ValueError, match=r"has not the files that state\.json lists"):
        load_state(latest / "state")


def test_a_state_without_digests_is_refused(tmp_path):
    save_state(tmp_path, {"step": 1})
    record = json.loads((tmp_path / "state.json").read_text())
    for name in ("sha256", "digest"):
        (tmp_path / "state.json").write_text(
            json.dumps({key: value for key, value in record.items() if key != name})
        )
        with pytest.raises(ValueError, match=f"is damaged: {name} must be there"):
            load_state(tmp_path)


def test_tensors_that_are_a_pipe_are_not_waited_for(tmp_path):
    save_state(tmp_path, {"step": torch.ones(1)})
    (tmp_path / "state.safetensors").unlink()
    os.mkfifo(tmp_path / "state.safetensors")
    with pytest.raises(ValueError, match="must be a regular file"):
        load_state(tmp_path)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_run_that_is_not_finite_is_not_worth_keeping(tmp_path, value):
    manager = save_steps(tmp_path, 10)
    state = {"tokenizer": {"a": torch.ones(3)}, "ema": {"b": torch.tensor([1.0, value])}}
    message = r"not finite are ema\.b; .*step-00000010 is the last good one.*lower optim\.lr"
    with pytest.raises(RuntimeError, match=message):
        manager.require_finite(state)
    manager.require_finite({"tokenizer": torch.ones(3), "count": torch.tensor([2**62])})


def test_while_steps_are_skipped_nothing_is_deleted(tmp_path):
    manager = CheckpointManager(tmp_path, keep_last=1)
    manager.save(1, write_text("good"))
    for step in (2, 3):
        manager.save(step, write_text("suspect"), prune=False)
    assert len(list(tmp_path.iterdir())) == 3
    manager.settle()
    # One step was finite after them; none of them is known to be good.
    assert len(list(tmp_path.iterdir())) == 3
    manager.save(4, write_text("good"))
    manager.settle()
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000004"]


def test_the_last_good_checkpoint_stays_until_a_step_has_gone_on_from_the_next(tmp_path):
    manager = CheckpointManager(tmp_path, keep_last=1)
    manager.save(1, write_text("good"))
    manager.settle()
    # Its weights are finite and far off: only the next loss will tell.
    manager.save(2, write_text("too far"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000001", "step-00000002"]
    manager.settle()
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000002"]


def test_a_forged_record_that_stands_for_no_value_is_named(tmp_path):
    save_state(tmp_path, {"step": torch.ones(1)})
    record = json.loads((tmp_path / "state.json").read_text()) | {"state": {"tensor": "another"}}
    record["digest"] = run_state._digest({n: v for n, v in record.items() if n != "digest"})
    (tmp_path / "state.json").write_text(json.dumps(record))
    with pytest.raises(
        ValueError, match=r"state\.json is damaged: .*another.* stands for no value"
    ):
        load_state(tmp_path)


@pytest.mark.parametrize(
    "error", [KeyError("a"), TypeError("a"), RuntimeError("x\n\ty"), IndexError()]
)
def test_a_state_that_a_run_cannot_take_is_one_line(tmp_path, error):
    with (
        pytest.raises(ValueError, match="is not a checkpoint of this run") as caught,
        restoring(tmp_path),
    ):
        raise error
    assert "\n" not in str(caught.value)


# ------------------------------------------------------------------------------- interruptions


def test_a_failing_writer_changes_nothing(tmp_path):
    manager = CheckpointManager(tmp_path, keep_last=1)
    manager.save(1, write_text("good"))

    def fail(directory) -> None:
        write_text("half")(directory)
        raise KeyboardInterrupt

    for step in (1, 2):
        with pytest.raises(KeyboardInterrupt):
            manager.save(step, fail)
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]
    assert (manager.latest() / "text").read_text() == "good"


def test_a_killed_writer_leaves_nothing_that_counts_and_is_cleaned_up(tmp_path):
    manager = CheckpointManager(tmp_path, keep_last=2)
    manager.save(1, write_text("good"))
    (tmp_path / ".step-00000002.partial").mkdir()
    (tmp_path / ".step-00000002.partial/text").write_text("half")
    assert manager.latest() == tmp_path / "step-00000001"
    manager.save(3, write_text("next"))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-00000001", "step-00000003"]


def test_a_checkpoint_killed_while_replaced_is_found_again(tmp_path):
    manager = CheckpointManager(tmp_path, keep_last=2)
    for step in (4, 5):
        manager.save(step, write_text(str(step)))
    (tmp_path / "step-00000005").rename(tmp_path / ".step-00000005.previous")
    assert (manager.latest() / "text").read_text() == "5"
    manager.save(5, write_text("again"))
    assert (manager.latest() / "text").read_text() == "again"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-00000004", "step-00000005"]


def test_the_newest_checkpoints_are_kept(tmp_path):
    manager = CheckpointManager(tmp_path, keep_last=2)
    for step in (10, 20, 30, 123456789):
        manager.save(step, write_text(str(step)))
        manager.settle()
    (tmp_path / "step-notes").mkdir()
    assert manager.latest() == tmp_path / "step-123456789"
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "step-00000030",
        "step-123456789",
        "step-notes",
    ]


def test_a_checkpoint_just_written_is_never_deleted(tmp_path):
    manager = CheckpointManager(tmp_path, keep_last=1)
    manager.save(20, write_text("twenty"))
    written = manager.save(10, write_text("ten"))
    manager.settle()
    assert written.is_dir()
    assert manager.latest() == tmp_path / "step-00000020"


def test_there_may_be_no_checkpoint(tmp_path):
    assert CheckpointManager(tmp_path / "nothing", keep_last=1).latest() is None
    with pytest.raises(ValueError, match=r"keep_last \(0\) must be at least 1"):
        CheckpointManager(tmp_path, keep_last=0)
