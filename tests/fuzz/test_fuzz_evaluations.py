"""Damaged and forged references, arrays and records of samples are used, or refused in a line."""

import io
import json
import shutil
import warnings
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

from mergevq.cli.errors import speaks_for_itself
from mergevq.config.generator import (
    GeneratorConfig,
    SampleRun,
)
from mergevq.config.parts.heads import (
    Subindices,
)
from mergevq.config.parts.orders import (
    Merge,
)
from mergevq.data.arrays import ImageArray
from mergevq.generator.build import build_generator, save_generator
from mergevq.generator.writing import make_again, write_samples
from mergevq.metrics.extractor import FeatureExtractor
from mergevq.metrics.frechet import Gaussian
from mergevq.metrics.references import (
    Described,
    open_reference,
    reference_features,
    write_reference,
)
from mergevq.runtime.artefacts import tokens_hash
from tests.fuzz.test_fuzz_models import (
    STRANGE,
    TEXTS,
    bounded,
    mutate_bytes,
    mutate_file,
    mutate_json,
    needs_linux,
    pick,
)
from tests.support.evaluations import write_network, write_tokenizer

CONFIG = GeneratorConfig(
    order=Merge(),
    dim=32,
    num_layers=1,
    num_heads=2,
    ffn_dim=32,
    num_classes=3,
    grid_size=(4, 4),
    kept_candidates=(8,),
    num_kept=8,
    head=Subindices(sizes=(4, 4)),
)
FORGED_SHAPES = [(2**40,), (2**20, 2**20), (-1, 5), (0,), (), (5, 5, 5), (2**62, 2**62, 4)]


@pytest.fixture(scope="module")
def material(tmp_path_factory):
    """A reference, images as an array, and samples of a tiny generator."""
    folder = tmp_path_factory.mktemp("material")
    write_network(folder / "colours.pt")
    extractor = FeatureExtractor(folder / "colours.pt")
    described = Described(
        Gaussian(torch.zeros(5).double(), torch.eye(5).double(), 7),
        torch.ones(3, 5),
        "a" * 64,
        7,
        ("a",),
    )
    write_reference(
        folder / "reference.npz",
        described,
        "generation",
        extractor=extractor,
        image_size=16,
        data="d",
    )
    images = np.zeros((4, 16, 16, 3), np.uint8)
    images[1:] = np.arange(48, dtype=np.uint8).reshape(16, 3)
    np.savez_compressed(folder / "array.npz", images)
    write_tokenizer(folder / "tokenizer")
    torch.manual_seed(0)
    save_generator(
        build_generator(CONFIG),
        folder / "generator",
        tokenizer=tokens_hash(folder / "tokenizer"),
        class_names=["a", "b", "c"],
    )
    run = SampleRun(
        model=str(folder / "generator"),
        tokenizer=str(folder / "tokenizer"),
        num_images=2,
        batch_size=2,
        device="cpu",
    )
    write_samples(run, folder / "samples")
    return folder


def use_reference(file, extractor):
    """Read it as each kind of evaluation does."""
    open_reference(file, "generation", extractor=extractor, image_size=16)
    reference_features(file, extractor, 4)


def use_array(file, extractor):
    """Read it as samples and as a reference."""
    assert sum(map(len, ImageArray(file).batches(2))) == len(ImageArray(file))
    open_reference(file, "generation", extractor=extractor, image_size=16)


def use_samples(file, _extractor):
    """Make an image again."""
    make_again(file, [0], device="cpu")


USES = {
    "reference.npz": use_reference,
    "array.npz": use_array,
    "samples/samples.json": use_samples,
}


def mutate_archive(file: Path, numbers: np.random.Generator) -> None:
    """Change one member of an archive: its values, its type, or only what its header says."""
    with zipfile.ZipFile(file) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    name = pick(numbers, members)
    way = numbers.integers(6)
    method = pick(numbers, [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_LZMA])
    buffer = io.BytesIO()
    if way == 0:
        members[pick(numbers, ["more.npy", "mu", "metadata.npy"])] = members.pop(name)
    elif way == 1:
        values = [np.full((5, 5), np.nan), np.zeros(5, "c8"), np.array([None]), np.zeros(0)]
        texts = [np.array(json.dumps(value)[:2000]) for value in STRANGE]
        texts += [np.array(text.decode("latin1")[:90_000]) for text in TEXTS]
        np.save(buffer, pick(numbers, [*values, *texts, np.zeros((9, 9)), np.array(-3)]))
        members[name] = buffer.getvalue()
    elif way == 2:
        shape = pick(numbers, FORGED_SHAPES)
        header = {"descr": pick(numbers, ["<f8", "|u1", "<U9", "|O"]), "fortran_order": False}
        np.lib.format.write_array_header_1_0(buffer, header | {"shape": shape})
        members[name] = buffer.getvalue() + bytes(64)
    elif way == 3:
        # A gigabyte of zeros in a megabyte.
        np.lib.format.write_array_header_1_0(
            buffer, {"descr": "<f8", "fortran_order": False, "shape": (2**27,)}
        )
        members[name] = buffer.getvalue() + bytes(2**24)
        method = zipfile.ZIP_DEFLATED
    elif way == 4:
        members[name] = members[name][: int(numbers.integers(len(members[name])))]
    else:
        del members[name]
    with zipfile.ZipFile(file, "w", method) as archive:
        for each, content in members.items():
            archive.writestr(each, content)


def attempt(material: Path, scratch: Path, number: int) -> str | None:
    """Make one mutation and use it; what is wrong with what happened, None if nothing."""
    kind = list(USES)[number % len(USES)]
    numbers = np.random.default_rng(number)
    file = scratch / Path(kind).name
    if file.is_dir():
        shutil.rmtree(file)
    file.unlink(missing_ok=True)
    shutil.copy(material / kind, file)
    way = numbers.random()
    if way < 0.05:
        mutate_file(file, numbers)
    elif way < 0.3:
        mutate_bytes(file, numbers)
    else:
        {".npz": mutate_archive, ".json": mutate_json}[file.suffix](file, numbers)
    extractor = FeatureExtractor(material / "colours.pt")
    try:
        with bounded(), warnings.catch_warnings(action="ignore"):
            USES[kind](file, extractor)
    except Exception as error:  # noqa: BLE001 - whatever it is, it is reported
        if not speaks_for_itself(error) or len(str(error)) > 3000:
            return f"mutation {number} of {kind}: {type(error).__name__}: {str(error)[:300]}"
    return None


def failures(material, scratch, numbers):
    """Faults that some of these mutations brought to light."""
    found = (attempt(material, scratch, number) for number in numbers)
    return [problem for problem in found if problem is not None]


def test_what_is_not_mutated_is_used(material):
    extractor = FeatureExtractor(material / "colours.pt")
    for kind, use in USES.items():
        with warnings.catch_warnings(action="ignore"):
            use(material / kind, extractor)


@pytest.mark.slow
@needs_linux
def test_some_mutations_end_in_a_message(material, tmp_path):
    assert failures(material, tmp_path, range(90)) == []


@needs_linux
@pytest.mark.slow
def test_many_mutations_end_in_a_message(material, tmp_path):
    assert failures(material, tmp_path, range(90, 900)) == []
