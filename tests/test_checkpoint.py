"""What is written comes back bit for bit, whole or not at all, and nothing is guessed."""

import json
import math
import pickle
import socket
import sys
from dataclasses import asdict, dataclass, replace

import PIL
import pytest
import torch
from torch import nn

from mergevq import checkpoint
from mergevq.checkpoint import (
    CheckpointManager,
    atomic_directory,
    changed_settings,
    from_json,
    load_model,
    load_state,
    load_strict,
    model_hash,
    resolve,
    save_model,
    save_state,
    to_json,
    tokens_hash,
)
from mergevq.config import (
    FORMAT_VERSION,
    DataConfig,
    KeptConfig,
    OptimConfig,
    TokenizerConfig,
    TokenizerRun,
    TrainConfig,
)

SMALL = TokenizerConfig(image_size=32, num_kept=36, kept_range=(16, 64))


@dataclass(frozen=True, kw_only=True)
class NoDefault:
    """A field that must be given."""

    size: int


@dataclass(frozen=True, kw_only=True)
class Unkeepable:
    """A field that JSON cannot carry."""

    names: set


@pytest.fixture
def no_network(monkeypatch):
    def refuse(*arguments):
        raise OSError(f"network used: {arguments}")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


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


# ------------------------------------------------------------------------------------ settings


def test_a_run_survives_json():
    run = TokenizerRun(
        model=SMALL,
        kept=KeptConfig(candidates=(16, 36), distribution="gaussian"),
        data=DataConfig(val_path="elsewhere", max_images=7, flip=True),
        optim=OptimConfig(clip_norm=None, betas=(0.9, 0.95)),
    )
    assert from_json(TokenizerRun, json.loads(json.dumps(to_json(run)))) == run


def test_json_holds_lists_and_nested_objects():
    values = to_json(TokenizerRun(model=SMALL, kept=KeptConfig(candidates=(36,))))
    assert values["model"]["kept_range"] == [16, 64]
    assert values["train"] == asdict(TrainConfig()) | {"eval_num_kept": []}


def test_a_whole_number_is_a_valid_float_and_becomes_one():
    assert repr(from_json(OptimConfig, {"lr": 1}).lr) == "1.0"


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"model": {"num_keptt": 3}}, r"model\.num_keptt is not a setting .* num_kept,"),
        ({"model": {"num_heads": "8"}}, r"model\.num_heads \('8'\) must be of type int"),
        ({"model": {"num_heads": 8.0}}, r"model\.num_heads \(8\.0\) must be of type int"),
        ({"model": {"num_heads": True}}, r"model\.num_heads \(True\) must be of type int"),
        ({"model": {"num_heads": None}}, r"model\.num_heads \(None\) must be of type int"),
        ({"model": {"stem": "vit"}}, r"model\.stem \('vit'\) must be one of 'cnn', 'patch'"),
        ({"model": {"kept_range": [1, 2, 3]}}, r"kept_range \(.*\) must have 2 values, not 3"),
        ({"model": {"kept_range": 5}}, r"model\.kept_range \(5\) must be a list"),
        ({"kept": {"candidates": [36, "9"]}}, r"kept\.candidates\[1\] \('9'\) must be of type int"),
        ({"teacher": {"num_head_layers": 4}}, r"num_head_layers \(4\) must be one of 2, 3"),
        ({"teacher": {"num_head_layers": 2.0}}, r"num_head_layers \(2\.0\) must be one of 2, 3"),
        ({"data": 3}, r"data \(3\) must be an object with fields path,"),
        ({"optim": {"clip_norm": 0}}, r"clip_norm \(0\.0\) must be above 0"),
    ],
)
def test_a_wrong_setting_is_named_with_what_is_allowed(values, message):
    with pytest.raises(ValueError, match=message):
        from_json(TokenizerRun, values)


def test_a_field_without_default_must_be_there():
    with pytest.raises(ValueError, match="size is missing and has no default in NoDefault"):
        from_json(NoDefault, {})


def test_a_field_json_cannot_carry_is_a_mistake_in_the_class():
    with pytest.raises(TypeError, match="names has type"):
        from_json(Unkeepable, {"names": []})


# --------------------------------------------------------------------------------------- models


@pytest.mark.usefixtures("no_network", "no_pickle")
def test_a_model_comes_back_exactly(tmp_path):
    state = layer().state_dict() | {"half": torch.randn(3).bfloat16()}
    save_model(tmp_path / "model", state, SMALL, kind="tokenizer", extra={"rfid": 1.5})
    record, loaded = load_model(tmp_path / "model", "tokenizer")
    torch.testing.assert_close(loaded, state, rtol=0, atol=0)
    assert from_json(TokenizerConfig, record["config"]) == SMALL
    assert record["extra"] == {"rfid": 1.5}
    assert record["format_version"] == FORMAT_VERSION
    assert record["versions"]["torch"] == str(torch.__version__)
    assert record["versions"]["pillow"] == PIL.__version__
    assert sorted(path.name for path in tmp_path.rglob("*")) == [
        "config.json",
        "model",
        "model.safetensors",
    ]


def test_tied_weights_are_saved_under_both_names(tmp_path):
    weight = torch.randn(4, 2)
    save_model(tmp_path, {"a": weight, "b": weight, "c": weight.T}, SMALL, kind="generator")
    state = load_model(tmp_path, "generator").state
    assert torch.equal(state["a"], weight)
    assert torch.equal(state["b"], weight)
    assert torch.equal(state["c"], weight.T)


def test_another_kind_is_refused(tmp_path):
    save_model(tmp_path, {}, SMALL, kind="tokenizer")
    with pytest.raises(ValueError, match="holds a tokenizer, and a generator is needed here"):
        load_model(tmp_path, "generator")


def test_a_newer_format_asks_for_an_upgrade(tmp_path):
    save_model(tmp_path, {}, SMALL, kind="tokenizer")
    record = json.loads((tmp_path / "config.json").read_text())
    newer = FORMAT_VERSION + 2
    (tmp_path / "config.json").write_text(json.dumps(record | {"format_version": newer}))
    message = f"was written by version {newer} of the format and this is version {FORMAT_VERSION}"
    with pytest.raises(ValueError, match=message + "; upgrade mergevq"):
        load_model(tmp_path, "tokenizer")


@pytest.mark.parametrize(
    ("text", "message"),
    [("{", "is not JSON"), ("{}", "it has no format_version"), ("[1]", "it has no format_version")],
)
def test_a_config_that_is_not_ours_is_refused(tmp_path, text, message):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ValueError, match=message):
        load_model(tmp_path, "tokenizer")


def test_replaced_weights_are_noticed(tmp_path):
    save_model(tmp_path / "one", layer(1).state_dict(), SMALL, kind="tokenizer")
    save_model(tmp_path / "two", layer(2).state_dict(), SMALL, kind="tokenizer")
    (tmp_path / "two/model.safetensors").replace(tmp_path / "one/model.safetensors")
    with pytest.raises(ValueError, match="is damaged or replaced"):
        load_model(tmp_path / "one", "tokenizer")


def test_weights_of_other_settings_are_told_apart_by_them(tmp_path):
    other = replace(SMALL, num_bits=SMALL.num_bits + 1)
    save_model(tmp_path / "one", layer(1).state_dict(), SMALL, kind="tokenizer")
    save_model(tmp_path / "two", layer(1).state_dict(), other, kind="tokenizer")
    (tmp_path / "two/model.safetensors").replace(tmp_path / "one/model.safetensors")
    there, here = other.num_bits, SMALL.num_bits
    with pytest.raises(ValueError, match=f"num_bits is {there} there and {here} here"):
        load_model(tmp_path / "one", "tokenizer")


def test_settings_that_came_or_went_are_changes():
    old, new = {"a": 1, "b": {"c": 2}}, {"b": {"c": 2, "d": 3}}
    assert changed_settings(old, new) == {"a": [1, None], "b.d": [None, 3]}


def test_a_directory_without_a_model_says_where_one_is(tmp_path):
    save_model(tmp_path / "model", {}, SMALL, kind="tokenizer")
    with pytest.raises(ValueError, match=r"holds no model: .* did you mean .*model\?"):
        load_model(tmp_path, "tokenizer")


def test_the_hash_follows_weights_and_settings_and_nothing_else(tmp_path):
    def saved(name: str, seed: int, config: TokenizerConfig) -> str:
        state = layer(seed).state_dict()
        save_model(tmp_path / name, state, config, kind="tokenizer", extra={"name": name})
        return model_hash(tmp_path / name)

    first = saved("first", 1, SMALL)
    assert len(first) == 64
    assert saved("same", 1, SMALL) == first
    assert saved("weights", 2, SMALL) != first
    assert saved("config", 1, replace(SMALL, merge_shape="square")) != first


def test_the_hash_of_tokens_follows_the_encoder_and_nothing_else(tmp_path):
    def saved(config: TokenizerConfig = SMALL, **changed: float) -> str:
        state = {name: torch.zeros(2, 3) for name in ("encoder.a", "encoder.b", "decoder.a")}
        for name, value in changed.items():
            state[name.replace("_", ".")][1, 2] = value
        save_model(tmp_path / "model", state, config, kind="tokenizer", extra=changed)
        return tokens_hash(tmp_path / "model")

    first = saved()
    assert len(first) == 64
    assert saved(decoder_a=1.0) == first
    assert saved(replace(SMALL, source_dim=8, num_decoder_layers=7, num_kept=9)) == first
    others = {saved(encoder_a=1.0), saved(encoder_b=1.0), saved(encoder_a=2.0)}
    others |= {saved(replace(SMALL, merge_shape="square")), saved(replace(SMALL, num_bits=7))}
    assert len(others | {first}) == 6


def test_loading_copies_every_weight():
    target = layer(1)
    load_strict(target, layer(2).state_dict())
    torch.testing.assert_close(target.state_dict(), layer(2).state_dict(), rtol=0, atol=0)


def test_loading_lists_what_does_not_fit():
    state = {"weight": torch.zeros(2, 4), "scale": torch.zeros(1)}
    with pytest.raises(ValueError, match="the saved weights do not fit Linear") as caught:
        load_strict(layer(), state)
    assert str(caught.value).splitlines()[1:] == [
        "  missing (1): bias",
        "  unexpected (1): scale",
        "  of another shape (1): weight: saved (2, 4), needed (2, 3)",
    ]


def test_a_long_list_of_differences_is_cut():
    state = {f"extra{i:02d}": torch.zeros(1) for i in range(20)} | layer().state_dict()
    with pytest.raises(ValueError, match=r"unexpected \(20\): extra00, .*, extra11 and 8 more$"):
        load_strict(layer(), state)


# ---------------------------------------------------------------------------------- local or hub


@pytest.mark.usefixtures("no_network")
def test_an_existing_directory_is_used_without_the_network(tmp_path, monkeypatch):
    (tmp_path / "owner/name").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert resolve("owner/name").samefile(tmp_path / "owner/name")


@pytest.mark.usefixtures("no_network")
@pytest.mark.parametrize("path", ["runs/nothing", "nothing", "./a/b", "a/b/c", "/no/where"])
def test_a_path_that_is_not_there_is_not_looked_up(tmp_path, monkeypatch, path):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    with pytest.raises(ValueError, match=r"no directory /.*; give the directory of a model"):
        resolve(path)


def test_an_id_without_the_extra_names_the_command(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(RuntimeError, match=r"pip install 'mergevq\[hub\]'"):
        resolve("owner/name")


def test_an_id_fetches_only_the_two_files_of_a_model(tmp_path, monkeypatch):
    hub = pytest.importorskip("huggingface_hub")
    calls = []

    def fetch(repo_id: str, allow_patterns: list[str]) -> str:
        calls.append((repo_id, allow_patterns))
        return str(tmp_path)

    monkeypatch.setattr(hub, "snapshot_download", fetch)
    monkeypatch.chdir(tmp_path)
    assert resolve("owner/name-1.0") == tmp_path
    assert calls == [("owner/name-1.0", ["model.safetensors", "config.json"])]


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


def test_a_replacement_killed_between_its_renames_is_found_again(tmp_path):
    directory = tmp_path / "model"
    save_model(directory, {}, SMALL, kind="tokenizer", extra={"which": "old"})
    directory.rename(tmp_path / ".model.previous")
    assert load_model(directory, "tokenizer").record["extra"] == {"which": "old"}
    assert load_model(resolve(directory), "tokenizer").record["extra"] == {"which": "old"}
    # A reader may come while the writer is between its renames, so it moves nothing.
    assert not directory.exists()

    save_model(directory, {}, SMALL, kind="tokenizer", extra={"which": "new"})
    assert load_model(directory, "tokenizer").record["extra"] == {"which": "new"}
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_checkpoint_killed_while_replaced_is_found_again(tmp_path):
    manager = CheckpointManager(tmp_path, keep_last=2)
    for step in (4, 5):
        manager.save(step, write_text(str(step)))
    (tmp_path / "step-00000005").rename(tmp_path / ".step-00000005.previous")
    assert (manager.latest() / "text").read_text() == "5"
    manager.save(5, write_text("again"))
    assert (manager.latest() / "text").read_text() == "again"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-00000004", "step-00000005"]


def test_a_failed_replacement_leaves_the_old_one(tmp_path):
    save_model(tmp_path / "model", {}, SMALL, kind="tokenizer", extra={"which": "old"})
    with pytest.raises(ValueError, match="not JSON compliant"):
        save_model(tmp_path / "model", {}, SMALL, kind="tokenizer", extra={"rfid": math.nan})
    assert load_model(tmp_path / "model", "tokenizer").record["extra"] == {"which": "old"}
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_replacing_a_directory_leaves_only_the_new_files(tmp_path):
    for name in ("old", "new"):
        with atomic_directory(tmp_path / "here") as partial:
            (partial / name).write_text(name)
    assert [path.name for path in tmp_path.rglob("*")] == ["here", "new"]


def test_the_newest_checkpoints_are_kept(tmp_path):
    manager = CheckpointManager(tmp_path, keep_last=2)
    for step in (10, 20, 30, 123456789):
        manager.save(step, write_text(str(step)))
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
    assert manager.save(10, write_text("ten")).is_dir()
    assert manager.latest() == tmp_path / "step-00000020"


def test_there_may_be_no_checkpoint(tmp_path):
    assert CheckpointManager(tmp_path / "nothing", keep_last=1).latest() is None
    with pytest.raises(ValueError, match=r"keep_last \(0\) must be at least 1"):
        CheckpointManager(tmp_path, keep_last=0)


# ----------------------------------------------------------------------------------- provenance


def test_a_commit_is_a_hash_or_unknown(monkeypatch, tmp_path):
    commit = checkpoint.git_commit()
    assert commit is None or set(commit.removesuffix("-dirty")) <= set("0123456789abcdef")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert checkpoint.git_commit() is None
