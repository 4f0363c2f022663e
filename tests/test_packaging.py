"""Requirements of the project on a user's machine."""

import hashlib
import re
import tomllib
from pathlib import Path

import pytest

from mergevq.config.base import BUNDLED_GENERATOR, BUNDLED_TOKENIZER
from mergevq.runtime.environment import bundled_models

REPOSITORY = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))["project"]
EXTRAS = PROJECT["optional-dependencies"]
CONSTRAINTS = [
    line
    for line in (REPOSITORY / "constraints.txt").read_text(encoding="ascii").splitlines()
    if line and not line.startswith("#")
]
PACKAGE = REPOSITORY / "mergevq"
# In any of the formats that weights come in.
ENDINGS = {".safetensors", ".pt", ".pth", ".ckpt", ".bin", ".npz", ".onnx"}
WEIGHTS = sorted(path for path in PACKAGE.rglob("*") if path.suffix in ENDINGS)


def normalized(requirement):
    """Return the package's name as indexes compare it."""
    name = re.match(r"[\w.-]+", requirement)[0]
    return re.sub(r"[-_.]+", "-", name).lower()


def test_the_core_is_small():
    core = {normalized(requirement) for requirement in PROJECT["dependencies"]}
    needed = {"filelock", "jaxtyping", "numpy", "pillow", "safetensors", "torch", "tqdm", "tyro"}
    assert core == needed


def test_extras_are_the_documented_ones():
    documented = {
        "codec",
        "data",
        "eval",
        "export",
        "docs",
        "teacher",
        "hub",
        "demo",
        "log",
        "quickstart",
        "text",
        "dev",
    }
    assert set(EXTRAS) == documented


@pytest.mark.parametrize("name", ["torchvision", "timm", "lightning", "flash-attn", "einops"])
def test_no_extra_brings_what_the_project_does_without(name):
    requirements = [requirement for extra in EXTRAS.values() for requirement in extra]
    assert name not in {normalized(requirement) for requirement in requirements}


def test_constraints_pin_every_requirement():
    requirements = PROJECT["dependencies"] + [name for extra in EXTRAS.values() for name in extra]
    required = {normalized(requirement) for requirement in requirements} - {"mergevq"}
    assert required <= {normalized(line) for line in CONSTRAINTS}


def test_constraints_name_a_version_and_no_place():
    """A local version such as +cpu, or an address, would tie every user to one index."""
    version = re.compile(r"[\w.-]+==[\d.]+(\.post\d+)?")
    assert [line for line in CONSTRAINTS if not version.fullmatch(line)] == []


def test_the_citation_carries_the_version_of_the_package():
    citation = (REPOSITORY / "CITATION.cff").read_text(encoding="utf-8")
    assert f"\nversion: {PROJECT['version']}\n" in citation


def card_of(weights):
    """Text of the card beside a file of weights."""
    return (weights.parent / "README.md").read_text(encoding="utf-8")


def test_the_weights_of_the_package_are_its_named_models():
    assert [path.parent.relative_to(PACKAGE).as_posix() for path in WEIGHTS] == [
        f"bundled/{each.name}" for each in bundled_models()
    ]


def test_a_model_without_a_name_is_one_of_them():
    assert {BUNDLED_TOKENIZER, BUNDLED_GENERATOR} <= {each.name for each in bundled_models()}


@pytest.mark.parametrize("weights", WEIGHTS, ids=lambda path: path.parent.name)
def test_shipped_weights_have_a_card_with_data_licence_and_teacher(weights):
    card = card_of(weights)
    for heading in ("Data", "Licence", "Teacher", "Command", "Numbers"):
        assert re.search(rf"\*\*{heading}\b[^*]*\*\*[^*]{{20,}}", card), heading
    assert f"`{weights.parent.name}/{weights.name}`" in card


@pytest.mark.parametrize("weights", WEIGHTS, ids=lambda path: path.parent.name)
def test_a_card_is_of_the_weights_that_are_there(weights):
    """Weights that are made anew need new numbers on their card."""
    assert hashlib.sha256(weights.read_bytes()).hexdigest() in card_of(weights)


@pytest.mark.parametrize("document", ["THIRD_PARTY.md", "CONTRIBUTING.md"])
def test_what_is_said_of_weights_leads_to_those_that_are_shipped(document):
    assert "mergevq/bundled/" in (REPOSITORY / document).read_text(encoding="utf-8")


@pytest.mark.parametrize("name", ["LPIPS", "VGG-16", "Inception-2015", "DINOv2"])
def test_the_terms_of_weights_that_users_bring_are_listed(name):
    third_party = (REPOSITORY / "THIRD_PARTY.md").read_text(encoding="utf-8")
    assert re.search(rf"(?m)^\| {name}\b", third_party)
