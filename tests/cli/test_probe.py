"""The commands of `mergevq probe`: options arrive, and mistakes are explained."""

import dataclasses
import subprocess
import sys

import pytest
import torch
import tyro

from mergevq.cli.probe import COMMANDS
from mergevq.config.probing import FinetuneConfig, KnnConfig, LinearConfig
from mergevq.evaluate.probe import run as run_module
from tests.support.probes import tiny_tokenizer, write_colours


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    torch.manual_seed(0)
    root = tmp_path_factory.mktemp("cli_probe")
    tiny_tokenizer().save_pretrained(root / "model")
    write_colours(root / "data", 8)
    return root


def call(name, folder, out, *options):
    arguments = ["--model", str(folder / "model"), "--data", str(folder / "data")]
    arguments += ["--out", str(out), "--num-workers", "0", "--device", "cpu", *options]
    tyro.cli(COMMANDS[name], args=arguments, prog=f"mergevq probe {name}")


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("linear", ["--epochs", "2", "--rates", "0.01", "--num-kept", "9,20", "--pools", "mean"]),
        ("knn", ["--k", "1", "3", "--num-kept", "9", "20", "--pools", "mean"]),
        ("finetune", ["--epochs", "1", "--num-kept", "9,20", "--linear-epochs", "1"]),
    ],
)
def test_a_table_is_printed_for_every_number_of_tokens(folder, tmp_path, capsys, name, options):
    call(name, folder, tmp_path / "out", *options)
    printed = capsys.readouterr().out
    for text in ("9 tokens", "20 tokens", "64 tokens (no merging)", "raw pixels", "PCA of pixels"):
        assert text in printed
    assert str(tmp_path / "out") in printed
    assert (tmp_path / "out/probe.json").is_file()


METHODS = {
    "linear": LinearConfig(
        rates=(0.5, 0.25),
        held_out_fraction=0.3,
        num_epochs=7,
        batch_size=11,
        weight_decay=0.125,
        warmup_fraction=0.4,
        num_crops=3,
    ),
    "knn": KnnConfig(num_neighbours=(2, 5), temperature=0.5, leave_one_out=True),
    "finetune": FinetuneConfig(
        stage="unmerged",
        pool="class",
        num_epochs=7,
        batch_size=11,
        rate=0.5,
        layer_decay=0.75,
        weight_decay=0.125,
        warmup_fraction=0.4,
        clip_norm=5.0,
        label_smoothing=0.3,
        mixup=0.6,
        cutmix=0.7,
        augmentation="crop",
        randaugment=2.0,
        erasing=0.9,
        drop_path=0.45,
        precision="float32",
        linear=LinearConfig(num_epochs=13),
    ),
}
OPTIONS = {"num_epochs": "epochs", "num_crops": "crops", "num_neighbours": "k"}
"""Options by name of a setting, where they differ."""


@pytest.mark.parametrize("name", METHODS)
def test_every_option_of_a_probe_is_its_setting(folder, tmp_path, monkeypatch, name):
    runs = []

    def seen(run):
        runs.append(run)
        return {"rows": []}

    monkeypatch.setattr(run_module, "probe", seen)
    monkeypatch.setattr(run_module, "summary", lambda _: [])
    given = []
    for field in dataclasses.fields(METHODS[name]):
        value = getattr(METHODS[name], field.name)
        option = f"--{OPTIONS.get(field.name, field.name).replace('_', '-')}"
        if field.name == "linear":
            given += ["--linear-epochs", str(value.num_epochs)]
        elif value is True:
            given += [option]
        elif field.name != "clip_norm":  # It has no option.
            given += [option, *map(str, value if isinstance(value, tuple) else (value,))]
    call(name, folder, tmp_path / "out", *given)
    (run,) = runs
    assert run.method == METHODS[name]


def test_tokens_that_are_no_numbers_are_an_error(folder, tmp_path):
    with pytest.raises(ValueError, match=r"tokens \(9,many\) must be numbers, as in 36,144"):
        call("knn", folder, tmp_path / "out", "--num-kept", "9,many")


def test_help_does_not_wait_for_torch():
    code = "import sys, mergevq.cli.probe; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
