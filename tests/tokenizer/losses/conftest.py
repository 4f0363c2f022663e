"""Fixtures that several test files of this folder share."""

import pytest

from tests.support.frozen import write_dinov2, write_extractor


@pytest.fixture(scope="module")
def dinov2_folder(tmp_path_factory):
    """A tiny random DINOv2 in the format of the real one."""
    return write_dinov2(tmp_path_factory.mktemp("dinov2"))


@pytest.fixture(scope="module")
def extractor_file(tmp_path_factory):
    """A tiny feature extractor as a TorchScript file."""
    return write_extractor(tmp_path_factory.mktemp("extractor") / "colours.pt")
