"""Common ground of all tests: one thread, a seeded generator, and the optional real data."""

import os
from pathlib import Path

import pytest
import torch

REPOSITORY = Path(__file__).resolve().parents[1]
pytest_plugins = ["tests.support.browser", "tests.support.shapes"]


@pytest.fixture(autouse=True, scope="session")
def _one_thread():
    """The order of a sum, so its last bits, follows the number of threads."""
    torch.set_num_threads(1)


@pytest.fixture(autouse=True, scope="session")
def _exact():
    """Precision `auto` is float32: exact values are compared. Tests of bf16 ask for it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cpu, "get_capabilities", dict)
        yield


@pytest.fixture(autouse=True)
def _global_seed():
    """Layers initialise from torch's global generator; start each test at the same point."""
    torch.manual_seed(0)


@pytest.fixture
def generator() -> torch.Generator:
    """A seeded source of random numbers, fresh for each test."""
    return torch.Generator().manual_seed(0)


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of real images and reference weights; tests that need it skip without it."""
    folder = Path(os.environ.get("MERGEVQ_SHARED", REPOSITORY.parent / "shared"))
    if not folder.is_dir():
        pytest.skip(f"no reference data at {folder}; set MERGEVQ_SHARED to its folder")
    return folder
