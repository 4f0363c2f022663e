"""A published model: what its card says and leaves out, and what is put on the hub."""

import json
import shutil
import socket
import sys
from types import SimpleNamespace

import pytest
from PIL import Image

from mergevq.cli.main import main
from mergevq.config.recipes import recipe
from mergevq.generator.build import load_generator
from mergevq.report.publication import Facts, upload, write_publication
from mergevq.runtime.artefacts import model_hash, resolve
from mergevq.runtime.settings import to_json
from mergevq.tokenizer.tokenizer import Tokenizer

HOME = "/home/someone"
OTHER = Facts(licence="other")


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    def refuse(*arguments):
        raise OSError(f"network used: {arguments}")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


@pytest.fixture
def hub(monkeypatch):
    """A hub that only notes what it is asked for."""
    calls = []

    class HfApi:
        def create_repo(self, name, *, exist_ok):
            calls.append((name, exist_ok))

        def upload_folder(self, *, repo_id, folder_path, commit_message):
            names = sorted(path.name for path in folder_path.iterdir())
            calls.append((repo_id, names, (folder_path / "README.md").read_text(), commit_message))
            return SimpleNamespace(oid="1f2e3d")

    monkeypatch.setitem(sys.modules, "huggingface_hub", SimpleNamespace(HfApi=HfApi))
    return calls


@pytest.fixture
def trained(tmp_path):
    """A run as training leaves it, of a recipe with two settings changed, on someone's machine."""
    folder = tmp_path / "runs" / "mine"
    shutil.copytree(resolve("digits32"), folder / "model")
    run = to_json(recipe("digits32"))
    run["optim"]["lr"] = 0.001
    run["data"]["path"] = f"{HOME}/pictures of cats"
    record = {
        "format_version": 2,
        "run": run,
        "made_from": {"class_names": ["cat", "dog"], "num_images": 1234},
        "command": f"mergevq train digits32 --optim.lr 0.001 --data.path '{HOME}/pictures of cats'",
        "resumed": [],
    }
    (folder / "run.json").write_text(json.dumps(record))
    return folder / "model"


def evaluation(path, model):
    metrics = {"psnr": 21.4179, "lpips": None}
    record = {
        "format_version": 2,
        "model": {"hash": model_hash(model)},
        "data": {"path": f"{HOME}/val.parquet", "num_images": 384, "crop": "centre square"},
        "results": [
            {"num_kept": 20, "given": {"metrics": metrics}, "recovered": {"metrics": metrics}}
        ],
    }
    path.write_text(json.dumps(record))
    return path


def test_a_card_has_the_recipe_with_its_changes_the_data_by_name_and_the_numbers(trained, tmp_path):
    Image.new("RGB", (4, 4)).save(tmp_path / "digits.png")
    facts = Facts(
        licence="cc-by-nc-4.0",
        evaluation=evaluation(tmp_path / "evaluation.json", trained),
        pictures=[tmp_path / "digits.png"],
    )
    out = write_publication(trained, "owner/cats", facts, tmp_path / "out")
    card = (out / "README.md").read_text()
    assert card.startswith("---\nlicense: cc-by-nc-4.0\n")
    assert "`digits32`, with these changes:" in card
    changed = [line for line in card.splitlines() if line.startswith("| `")]
    assert changed == [
        "| `data.path` | digits | pictures of cats |",
        "| `optim.lr` | 0.002 | 0.001 |",
    ]
    assert "`pictures of cats`. 1,234 images. 2 classes: cat, dog." in card
    assert "384 images of `val.parquet`, centre square." in card
    assert "| K 20, given | 21.42 | infinite |" in card
    assert "1,752,827" in card
    assert 'from_pretrained(\n    "owner/cats", revision="main"\n)' in card
    assert "![digits](digits.png)" in card
    assert {path.name for path in out.iterdir()} == {
        "README.md",
        "config.json",
        "digits.png",
        "model.safetensors",
    }
    for path in ("README.md", "config.json"):
        assert HOME not in (out / path).read_text()


def test_what_is_published_is_the_same_model(trained, tmp_path):
    out = write_publication(trained, "owner/cats", Facts(licence="apache-2.0"), tmp_path / "out")
    assert model_hash(out) == model_hash(trained)
    assert Tokenizer.from_pretrained(out).config == Tokenizer.from_pretrained(trained).config


def test_a_generator_keeps_a_tokenizer_that_has_a_name_and_no_place(tmp_path):
    for place, kept in ((f"{HOME}/runs/model", False), ("owner/tokenizer@1f2e", True)):
        shutil.copytree(resolve("digits32_ar"), tmp_path / "model", dirs_exist_ok=True)
        record = json.loads((tmp_path / "model" / "config.json").read_text())
        record["extra"]["tokenizer_path"] = place
        record["extra"]["note"] = {"log": [f"{HOME}/log"], "steps": 3}
        (tmp_path / "model" / "config.json").write_text(json.dumps(record))
        out = write_publication(tmp_path / "model", "a/b", OTHER, tmp_path / "out")
        extra = json.loads((out / "config.json").read_text())["extra"]
        assert ("tokenizer_path" in extra) == kept
        assert extra["note"] == {"log": ["log"], "steps": 3}
        assert "load_generator(" in (out / "README.md").read_text()
        load_generator(out)


def test_a_run_without_a_recipe_shows_all_settings_and_one_without_a_record_says_so(
    trained, tmp_path
):
    record = json.loads((trained.parent / "run.json").read_text())
    (tmp_path / "run.json").write_text(json.dumps(record | {"command": "python train.py"}))
    facts = Facts(licence="other", run=tmp_path)
    card = (write_publication(trained, "a/b", facts, tmp_path / "o") / "README.md").read_text()
    assert '"lr": 0.001' in card
    assert HOME not in card
    shutil.copytree(trained, tmp_path / "alone" / "model")
    (tmp_path / "run.json").unlink()
    out = write_publication(tmp_path / "alone" / "model", "a/b", OTHER, tmp_path / "o")
    assert "**Recipe.** Not recorded" in (out / "README.md").read_text()


@pytest.mark.parametrize(
    ("name", "licence", "message"),
    [
        ("owner", "other", r"name \(owner\) must be owner/name"),
        ("a/b@main", "other", r"name \(a/b@main\) must be owner/name"),
        ("a/b", "Apache 2", r"licence \('Apache 2'\) must be .* apache-2.0"),
    ],
)
def test_a_name_or_licence_that_the_hub_has_not_is_an_error(
    trained, tmp_path, name, licence, message
):
    with pytest.raises(ValueError, match=message):
        write_publication(trained, name, Facts(licence=licence), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_numbers_of_another_model_are_refused(trained, tmp_path):
    other = evaluation(tmp_path / "evaluation.json", resolve("digits32_ar"))
    message = "has the numbers of model [0-9a-f]{64} and this is"
    with pytest.raises(ValueError, match=message):
        write_publication(
            trained, "a/b", Facts(licence="other", evaluation=other), tmp_path / "out"
        )


def test_pictures_do_not_take_the_place_of_the_model(trained, tmp_path):
    pictures = [tmp_path / "config.json"]
    with pytest.raises(ValueError, match=r"pictures \(config.json\) must have names of their own"):
        write_publication(
            trained, "a/b", Facts(licence="other", pictures=pictures), tmp_path / "out"
        )


def test_a_folder_goes_to_the_hub_and_comes_back_as_a_name_with_its_commit(hub, trained, tmp_path):
    out = write_publication(trained, "owner/cats", OTHER, tmp_path / "out")
    assert upload(out, "owner/cats") == "owner/cats@1f2e3d"
    names = ["README.md", "config.json", "model.safetensors"]
    assert hub == [
        ("owner/cats", True),
        ("owner/cats", names, (out / "README.md").read_text(), "Model and card, by mergevq"),
    ]


def test_a_tokenizer_in_memory_publishes_itself(hub, trained):
    tokenizer = Tokenizer.from_pretrained(trained)
    facts = Facts(licence="other", run=trained.parent)
    assert tokenizer.push_to_hub("owner/cats", facts) == "owner/cats@1f2e3d"
    assert "| `optim.lr` | 0.002 | 0.001 |" in hub[1][2]


def test_a_dry_run_writes_and_uploads_nothing(hub, trained, tmp_path, capsys):
    command = ["publish", str(trained), "a/b", "--licence", "other", "--out", str(tmp_path / "o")]
    assert main([*command, "--dry-run"]) == 0
    assert hub == []
    assert capsys.readouterr().out == f"{tmp_path / 'o'}: model and card\n"
    assert main(command) == 0
    assert len(hub) == 2
    assert "published: a/b@1f2e3d" in capsys.readouterr().out


def test_without_the_extra_the_command_is_named(monkeypatch, trained, tmp_path):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    out = write_publication(trained, "owner/cats", OTHER, tmp_path / "out")
    with pytest.raises(RuntimeError, match=r"publishing owner/cats .*install huggingface_hub"):
        upload(out, "owner/cats")
