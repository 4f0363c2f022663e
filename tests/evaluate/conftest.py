"""Fixtures that several test files of this folder share."""

import pytest
import torch

from mergevq.generator.generation import load_pair
from tests.support.evaluate_generation import write_reference
from tests.support.evaluations import write_generator, write_images, write_network, write_tokenizer


@pytest.fixture(scope="module")
def sampled_folder(tmp_path_factory):
    sampled_folder = tmp_path_factory.mktemp("generation")
    write_tokenizer(sampled_folder / "tokenizer")
    write_generator(sampled_folder / "generator", sampled_folder / "tokenizer")
    write_images(sampled_folder / "images", 12)
    write_network(sampled_folder / "colours.pt")
    for kind in ("generation", "reconstruction"):
        write_reference(sampled_folder, sampled_folder / f"{kind}.npz", kind)
    return sampled_folder


@pytest.fixture(scope="module")
def pair(sampled_folder):
    return load_pair(
        sampled_folder / "generator", sampled_folder / "tokenizer", torch.device("cpu")
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("evaluate")
    write_images(folder / "images", 7)
    write_images(folder / "others", 7, first_seed=50)
    write_network(folder / "colours.pt")
    write_tokenizer(folder / "model")
    return folder
