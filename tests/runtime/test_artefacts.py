"""Artefacts come back bit for bit, whole or not at all, and nothing is guessed."""

import hashlib
import json
import math
import os
import pickle
import resource
import shutil
import socket
import sys
from dataclasses import replace

import PIL
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from mergevq.config.base import FORMAT_VERSION
from mergevq.config.parts import ClassCondition, MaskTokens, Queries, TwoBranches
from mergevq.config.tokenizer import TokenizerConfig
from mergevq.runtime.artefacts import (
    load_model,
    load_strict,
    model_hash,
    resolve,
    save_model,
    tokens_hash,
)
from mergevq.runtime.settings import from_json
from mergevq.tokenizer.tokenizer import Tokenizer
from tests.support.parts import changed, tokenizer_config
from tests.support.probes import CONFIG, tiny_tokenizer

SMALL = tokenizer_config(image_size=32, num_kept=36, kept_range=(16, 64))


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


def change_record(directory, **changes) -> None:
    """Write other entries into the `config.json` of a model; None takes one out."""
    record = json.loads((directory / "config.json").read_text()) | changes
    record = {name: value for name, value in record.items() if value is not None}
    (directory / "config.json").write_text(json.dumps(record))


def replace_weights(directory, weights) -> None:
    """Give a model other weights, as its own."""
    save_file(weights, directory / "model.safetensors")
    content = (directory / "model.safetensors").read_bytes()
    change_record(directory, weights_sha256=hashlib.sha256(content).hexdigest())


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


def test_a_model_can_be_read_by_those_who_can_read_any_new_file(tmp_path):
    save_model(tmp_path / "model", layer().state_dict(), SMALL, kind="tokenizer")
    (tmp_path / "new").touch()
    for name in ("model.safetensors", "config.json"):
        mode = (tmp_path / "model" / name).stat().st_mode
        assert mode == (tmp_path / "new").stat().st_mode, name


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_model_with_a_weight_that_is_not_finite_is_not_saved(tmp_path, value):
    good = layer().state_dict()
    save_model(tmp_path, good, SMALL, kind="tokenizer")
    broken = {name: tensor.clone() for name, tensor in good.items()}
    broken["weight"][1, 2] = value
    with pytest.raises(RuntimeError, match=r"weight has 1 of 6 values that are not finite"):
        save_model(tmp_path, broken, SMALL, kind="tokenizer")
    torch.testing.assert_close(load_model(tmp_path, "tokenizer").state, good, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("weight", "message"),
    [
        (torch.tensor([1.0, math.nan]), r"weight has 1 of 2 values that are not finite"),
        (torch.tensor([1e300], dtype=torch.float64), r"weight has 1 of 1 values that are not"),
        (torch.tensor([1, 2]), r"weight is of type torch.int64 and weights are floating point"),
        (torch.tensor([1j]), r"weight is of type torch.complex64 and weights are"),
    ],
)
def test_a_model_with_a_weight_that_is_no_finite_number_is_not_loaded(tmp_path, weight, message):
    save_model(tmp_path, layer().state_dict(), SMALL, kind="tokenizer")
    replace_weights(tmp_path, {"weight": weight})
    with pytest.raises(ValueError, match=r"model\.safetensors are broken: " + message):
        load_model(tmp_path, "tokenizer")


@pytest.mark.parametrize("name", ["kind", "config", "extra", "weights_sha256"])
@pytest.mark.parametrize("value", [None, [1], 3])
def test_a_record_that_lacks_something_is_damaged(tmp_path, name, value):
    save_model(tmp_path, {}, SMALL, kind="tokenizer")
    change_record(tmp_path, **{name: value})
    with pytest.raises(ValueError, match=rf"config.json is damaged: {name} must be there"):
        load_model(tmp_path, "tokenizer")


def test_weights_that_are_a_pipe_are_refused_and_not_waited_for(tmp_path):
    save_model(tmp_path, {}, SMALL, kind="tokenizer")
    (tmp_path / "model.safetensors").unlink()
    os.mkfifo(tmp_path / "model.safetensors")
    for read in (lambda path: load_model(path, "tokenizer"), model_hash, tokens_hash):
        with pytest.raises(ValueError, match="must be a regular file"):
            read(tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "it is empty"),
        (b"<!DOCTYPE html><html>", "it is a web page"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0", "Git LFS pointer"),
        (b"\xff" * 50, "is not a readable safetensors file"),
    ],
)
def test_what_was_fetched_in_place_of_weights_is_named(tmp_path, content, message):
    save_model(tmp_path, {}, SMALL, kind="tokenizer")
    (tmp_path / "model.safetensors").write_bytes(content)
    digest = hashlib.sha256(content).hexdigest()
    change_record(tmp_path, weights_sha256=digest)
    with pytest.raises(ValueError, match=message):
        load_model(tmp_path, "tokenizer")


@pytest.mark.parametrize(
    "settings",
    [
        {"reducer": {"num_layers": 10**9}},
        {"decoder": {"num_layers": 10**15}},
        {"expander": {"num_layers": 10**9}},
        {"stem": {"num_res_blocks": 10**9}},
        {"stem": {"channels": 2**40}},
        {"expander": {"dim": 2**11}},
        {"expander": {"dim": 2**40}},
        {"decoder": {"channels": 2**62}},
        {"quantizer": {"num_bits": 12}},
    ],
)
def test_settings_that_are_not_the_weights_are_found_before_memory_is_taken(tmp_path, settings):
    tiny_tokenizer().save_pretrained(tmp_path)
    record = json.loads((tmp_path / "config.json").read_text())
    parts = {name: record["config"][name] | values for name, values in settings.items()}
    changed = record["config"] | parts
    change_record(tmp_path, config=changed)
    state = load_file(tmp_path / "model.safetensors")
    save_file(state, tmp_path / "model.safetensors", {"config": json.dumps(changed)})
    sha256 = hashlib.sha256((tmp_path / "model.safetensors").read_bytes()).hexdigest()
    change_record(tmp_path, weights_sha256=sha256)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(ValueError, match=r"must be (at most|between)|do not fit|cannot be built"):
        Tokenizer.from_pretrained(tmp_path)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000


def test_a_model_that_is_loaded_draws_no_more_random_numbers_than_one_that_is_built(tmp_path):
    tiny_tokenizer().save_pretrained(tmp_path)
    torch.manual_seed(5)
    Tokenizer(CONFIG)
    expected = torch.get_rng_state()
    torch.manual_seed(5)
    Tokenizer.from_pretrained(tmp_path)
    assert torch.equal(torch.get_rng_state(), expected)


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
    other = changed(SMALL, num_bits=SMALL.quantizer.num_bits + 1)
    save_model(tmp_path / "one", layer(1).state_dict(), SMALL, kind="tokenizer")
    save_model(tmp_path / "two", layer(1).state_dict(), other, kind="tokenizer")
    (tmp_path / "two/model.safetensors").replace(tmp_path / "one/model.safetensors")
    there, here = other.quantizer.num_bits, SMALL.quantizer.num_bits
    with pytest.raises(ValueError, match=f"quantizer.num_bits is {there} there and {here} here"):
        load_model(tmp_path / "one", "tokenizer")


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
    assert saved("config", 1, changed(SMALL, merge_shape="square")) != first


def test_the_hash_of_tokens_follows_the_encoder_and_nothing_else(tmp_path):
    def saved(config: TokenizerConfig = SMALL, **numbers: float) -> str:
        state = {name: torch.zeros(2, 3) for name in ("encoder.a", "quantizer.b", "decoder.a")}
        for name, value in numbers.items():
            state[name.replace("_", ".")][1, 2] = value
        save_model(tmp_path / "model", state, config, kind="tokenizer", extra=numbers)
        return tokens_hash(tmp_path / "model")

    first = saved()
    assert len(first) == 64
    assert saved(decoder_a=1.0) == first
    assert saved(changed(SMALL, source_dim=8, num_decoder_layers=7, num_kept=9)) == first
    assert saved(changed(SMALL, decoder="patch", decoder_width=8)) == first
    two = TwoBranches(taps=(1,))
    branched = {
        decodes: saved(replace(SMALL, branches=replace(two, decodes=decodes)))
        for decodes in ("pixel", "both")
    }
    assert branched["pixel"] == branched["both"] != first
    assert saved(replace(SMALL, branches=replace(two, taps=(2,)))) not in {
        first,
        *branched.values(),
    }
    ordered = replace(SMALL, reducer=Queries(num_heads=1), expander=MaskTokens())
    told = {
        sees: saved(replace(ordered, condition=ClassCondition(sees=sees)))
        for sees in ("both", "decoder")
    }
    assert saved(replace(ordered, condition=ClassCondition(dropout=0.5))) == told["both"]
    assert len({saved(ordered), *told.values()}) == 3
    others = {saved(encoder_a=1.0), saved(quantizer_b=1.0), saved(encoder_a=2.0)}
    others |= {saved(changed(SMALL, merge_shape="square")), saved(changed(SMALL, num_bits=7))}
    others.add(saved(replace(SMALL, reducer=replace(SMALL.reducer, locality=0.1))))
    assert len(others | {first}) == 7
    # As from before there was the setting.
    record = json.loads((tmp_path / "model" / "config.json").read_text("utf-8"))
    reducer = {n: v for n, v in record["config"]["reducer"].items() if n != "locality"}
    assert saved() == first
    change_record(tmp_path / "model", config=record["config"] | {"reducer": reducer})
    assert tokens_hash(tmp_path / "model") == first


def test_a_tokenizer_with_the_encoder_of_another_can_keep_the_hash_of_its_tokens(tmp_path):
    state = {"encoder.a": torch.zeros(2, 3)}
    save_model(tmp_path, state, SMALL, kind="tokenizer", tokens_id="a" * 64)
    assert tokens_hash(tmp_path) == "a" * 64
    change_record(tmp_path, tokens_id=3)
    with pytest.raises(ValueError, match="tokens_id"):
        tokens_hash(tmp_path)


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
def test_a_name_of_the_package_is_its_model_unless_a_model_lies_here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    bundled = resolve("digits32")
    # A folder of pictures may have the name; only a model is meant before the package's.
    (tmp_path / "digits32").mkdir()
    assert resolve("digits32") == bundled
    shutil.copytree(bundled, tmp_path / "digits32", dirs_exist_ok=True)
    assert resolve("digits32").samefile(tmp_path / "digits32")


@pytest.mark.usefixtures("no_network")
def test_a_mistyped_name_is_told_the_names_there_are(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=r"digits32, digits32_ar.*did you mean 'digits32'"):
        resolve("digit32")


@pytest.mark.usefixtures("no_network")
@pytest.mark.parametrize(
    "path", ["runs/nothing", "run/model", "owner/name", "nothing", "./a/b", "a/b/c", "/no/where"]
)
def test_a_path_that_is_not_there_is_not_looked_up(tmp_path, monkeypatch, path):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    with pytest.raises(ValueError, match=r"no directory /.*; give the directory .*@revision"):
        resolve(path)


def test_an_id_without_the_extra_names_the_command(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(RuntimeError, match="pip install huggingface_hub"):
        resolve("owner/name@main")


def test_an_id_fetches_only_the_two_files_of_a_model_at_its_revision(tmp_path, monkeypatch):
    hub = pytest.importorskip("huggingface_hub")
    calls = []

    def fetch(repo_id: str, revision: str, allow_patterns: list[str]) -> str:
        calls.append((repo_id, revision, allow_patterns))
        return str(tmp_path)

    monkeypatch.setattr(hub, "snapshot_download", fetch)
    monkeypatch.chdir(tmp_path)
    assert resolve("owner/name-1.0@refs/pr/1") == tmp_path
    assert resolve("owner/name", "1f2e") == tmp_path
    files = ["model.safetensors", "config.json"]
    assert calls == [("owner/name-1.0", "refs/pr/1", files), ("owner/name", "1f2e", files)]


@pytest.mark.usefixtures("no_network")
@pytest.mark.parametrize("name", ["owner/name@main", "digits32", "a/b/c", "runs/model"])
def test_a_revision_is_of_a_name_on_the_hub_alone(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    save_model(tmp_path / "runs/model", {}, SMALL, kind="tokenizer")
    with pytest.raises(ValueError, match=r"revision \(1f2e\) is of a model on Hugging Face, and"):
        resolve(name, "1f2e")


# ------------------------------------------------------------------------------- interruptions


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


def test_a_failed_replacement_leaves_the_old_one(tmp_path):
    save_model(tmp_path / "model", {}, SMALL, kind="tokenizer", extra={"which": "old"})
    with pytest.raises(ValueError, match="not JSON compliant"):
        save_model(tmp_path / "model", {}, SMALL, kind="tokenizer", extra={"rfid": math.nan})
    assert load_model(tmp_path / "model", "tokenizer").record["extra"] == {"which": "old"}
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
