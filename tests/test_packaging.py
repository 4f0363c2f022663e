"""What the project asks of a user's machine."""

import re
import tomllib
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))["project"]
EXTRAS = PROJECT["optional-dependencies"]
CONSTRAINTS = [
    line
    for line in (REPOSITORY / "constraints.txt").read_text(encoding="ascii").splitlines()
    if line and not line.startswith("#")
]


def normalized(requirement):
    """Return the package's name as indexes compare it."""
    name = re.match(r"[\w.-]+", requirement)[0]
    return re.sub(r"[-_.]+", "-", name).lower()


def test_the_core_is_small():
    core = {normalized(requirement) for requirement in PROJECT["dependencies"]}
    assert core == {"jaxtyping", "numpy", "pillow", "safetensors", "torch", "tqdm", "tyro"}


def test_extras_are_the_documented_ones():
    documented = {"data", "eval", "teacher", "hub", "demo", "export", "log", "quickstart", "dev"}
    assert set(EXTRAS) == documented


@pytest.mark.parametrize("name", ["torchvision", "timm", "lightning", "flash-attn", "einops"])
def test_no_extra_brings_what_the_project_does_without(name):
    requirements = [requirement for extra in EXTRAS.values() for requirement in extra]
    assert name not in {normalized(requirement) for requirement in requirements}


def test_constraints_pin_every_requirement_of_the_default_suite():
    suite = ["data", "dev", "hub", "log", "quickstart", "teacher"]
    requirements = PROJECT["dependencies"] + [name for extra in suite for name in EXTRAS[extra]]
    required = {normalized(requirement) for requirement in requirements} - {"mergevq"}
    assert required <= {normalized(line) for line in CONSTRAINTS}


def test_constraints_name_a_version_and_no_place():
    """A local version such as +cpu, or an address, would tie every user to one index."""
    assert [line for line in CONSTRAINTS if not re.fullmatch(r"[\w.-]+==[\d.]+", line)] == []


def test_the_citation_carries_the_version_of_the_package():
    citation = (REPOSITORY / "CITATION.cff").read_text(encoding="utf-8")
    assert f"\nversion: {PROJECT['version']}\n" in citation
