"""Folders of graphs: the manifest, what is refused, and the files in other hands."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from mergevq.data.prepare import to_tensor
from mergevq.generator.build import load_generator
from mergevq.generator.export import folder
from mergevq.generator.export.folder import CARD, MANIFEST, export_folder
from mergevq.generator.seams import Sequences
from mergevq.runtime.artefacts import model_hash, resolve
from mergevq.runtime.environment import EXTRAS
from mergevq.runtime.files import sha256_of
from mergevq.tokenizer.tokenizer import Tokenizer
from tests.generator.export.test_step import chained
from tests.support.evaluations import write_generator, write_tokenizer
from tests.support.export import export, size_of

EXAMPLE = Path(__file__).parents[3] / "examples" / "onnx_only.py"
COUNTS = (12, 20)


@pytest.fixture
def _unwritten(monkeypatch):
    """Files without graphs in them: tracing takes seconds each."""

    def write(graphs, into, form):
        for graph in graphs:
            (into / f"{graph.name}.{form}").write_text(graph.name)
        return [{"file": f"{graph.name}.{form}"} for graph in graphs]

    monkeypatch.setattr(folder, "write_graphs", write)


@pytest.mark.usefixtures("_unwritten")
def test_the_manifest_says_what_is_needed(tmp_path):
    written = export_folder("digits32", tmp_path / "out", "pt2", num_kept=(20, 12, 20))
    record = json.loads((written.folder / MANIFEST).read_text(encoding="utf-8"))
    assert record["model"] == {"name": "digits32", "sha256": model_hash(resolve("digits32"))}
    assert (record["format"], record["opset"], record["num_kept"]) == ("pt2", None, [12, 20])
    assert (record["image_size"], record["grid_size"], record["num_codes"]) == (32, [8, 8], 256)
    assert [each["tokens"] for each in record["bits"]] == [12 * 8, 20 * 8]
    assert record["versions"]["torch"] == torch.__version__
    names = ["encoder_12", "encoder_20", "decoder", "recovery"]
    assert [each["file"] for each in record["graphs"]] == [f"{name}.pt2" for name in names]
    assert set(record["files"]) == {f"{name}.pt2" for name in names} | {CARD}
    assert record["files"][CARD] == sha256_of(written.folder / CARD)
    assert CARD in record["licence"]
    assert "generator" not in record
    assert written.num_bytes == size_of(written.folder)


@pytest.mark.usefixtures("_unwritten")
def test_a_generator_is_described_beside_its_tokenizer(tmp_path):
    written = export_folder("digits32", tmp_path / "out", "pt2", generator="digits32_ar")
    told = json.loads((written.folder / MANIFEST).read_text(encoding="utf-8"))["generator"]
    config = load_generator("digits32_ar").config
    assert told["sha256"] == model_hash(resolve("digits32_ar"))
    assert (told["null_class"], told["num_kept"]) == (10, list(config.kept_candidates))
    assert (told["window"], told["num_prefix"]) == (config.order.window, config.num_prefix)
    assert [each["file"] for each in written.graphs][-3:] == [
        "generator_start.pt2",
        "generator_step.pt2",
        "generator_head.pt2",
    ]


def test_a_generator_of_other_tokens_is_refused(tmp_path):
    model = write_tokenizer(tmp_path / "model")
    generator = write_generator(tmp_path / "generator", model)
    with pytest.raises(ValueError, match="was trained on tokens of tokenizer"):
        export_folder("digits32", tmp_path / "out", "pt2", generator=str(generator))
    assert not (tmp_path / "out").exists()


def test_a_folder_of_something_else_is_not_replaced(tmp_path):
    (tmp_path / "notes.txt").touch()
    with pytest.raises(ValueError, match=r"holds other files and no export\.json"):
        export_folder("digits32", tmp_path, "pt2")
    assert (tmp_path / "notes.txt").exists()


def test_a_missing_extra_is_one_line_with_the_way_out(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(RuntimeError, match=rf"needs onnx, .*: .* install {EXTRAS['export'][0]}"):
        export_folder("digits32", tmp_path / "out", "onnx")


# --------------------------------------------------------------------------- the files themselves


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """The bundled tokenizer and generator as ONNX."""
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    into = tmp_path_factory.mktemp("export") / "out"
    counts = ",".join(map(str, COUNTS))
    options = ["--out", into, "--num-kept", counts, "--generator", "digits32_ar"]
    done = export("onnx", "digits32", *options)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return into


def sessions(into):
    import onnxruntime

    found = {}
    for path in into.glob("*.onnx"):
        session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
        names = [each.name for each in session.get_inputs()]

        def run(inputs, session=session, names=names):
            given = {name: each.numpy() for name, each in zip(names, inputs, strict=True)}
            return [torch.from_numpy(each) for each in session.run(None, given)]

        found[path.stem] = run
    return found


@pytest.mark.slow
@pytest.mark.parametrize("batch", [1, 3])
def test_files_give_the_tokens_and_pixels_of_the_library(exported, batch):
    run, model = sessions(exported), Tokenizer.from_pretrained("digits32", precision="float32")
    image = torch.rand(batch, 3, 32, 32, generator=torch.Generator().manual_seed(batch)) * 2 - 1
    for num_kept in COUNTS:
        encoded = model.encode(image, num_kept)
        indices, source = run[f"encoder_{num_kept}"]([image])
        assert torch.equal(indices, encoded.indices)
        assert torch.equal(source, encoded.source.index)
        (inferred,) = run["recovery"]([indices])
        layout = model.recover(indices)
        assert torch.equal(inferred, layout.index)
        for index, given in ((source, encoded.layout), (inferred, layout)):
            (decoded,) = run["decoder"]([indices, index])
            torch.testing.assert_close(decoded, model.decode(indices, given), atol=1e-4, rtol=0)


@pytest.mark.slow
@pytest.mark.parametrize("batch", [1, 3])
def test_steps_in_files_give_the_generators_logits(exported, batch):
    model = load_generator("digits32_ar").requires_grad_(False)
    numbers = torch.Generator().manual_seed(batch)
    indices = torch.randint(20, (batch, 64), generator=numbers)
    labels = torch.arange(batch)
    sequences = Sequences(indices=indices, class_label=labels, num_kept=20)
    with torch.no_grad():
        wanted = model.logits(sequences)
    for part, right in zip(chained(sessions(exported), model, sequences), wanted, strict=True):
        torch.testing.assert_close(part, right, atol=1e-3, rtol=1e-4)


@pytest.mark.slow
def test_no_path_of_this_machine_is_in_the_files(exported):
    for path in exported.iterdir():
        if path.suffix in {".onnx", ".json"}:
            assert b".py" not in path.read_bytes(), path.name


@pytest.mark.slow
def test_weights_are_stored_once(exported):
    models = [resolve(name) / "model.safetensors" for name in ("digits32", "digits32_ar")]
    assert size_of(exported) < 1.25 * sum(path.stat().st_size for path in models)


@pytest.mark.slow
def test_the_example_needs_no_torch(exported, tmp_path):
    picture = tmp_path / "picture.png"
    coarse = Image.fromarray(np.random.default_rng(0).integers(0, 256, (6, 6, 3), np.uint8))
    coarse.resize((32, 32), Image.Resampling.BICUBIC).save(picture)
    out = tmp_path / "again.png"
    code = (
        "import runpy, sys; sys.modules |= dict.fromkeys(['torch', 'mergevq', 'jaxtyping']);"
        "sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0], run_name='__main__')"
    )
    command = [sys.executable, "-c", code, EXAMPLE, exported, picture, "--num-kept", "20"]
    done = subprocess.run(
        [*map(str, command), "--out", str(out)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    model = Tokenizer.from_pretrained("digits32", precision="float32")
    with Image.open(picture) as opened:
        indices = model.encode(to_tensor(opened)[None], 20).indices[0]
    assert f"tokens: {' '.join(map(str, indices.tolist()))}" in done.stdout
    with Image.open(out) as opened:
        assert opened.size == (96, 32)


@pytest.mark.slow
def test_programs_give_the_tokens_and_pixels_of_the_library(tmp_path):
    done = export("pt2", "digits32", "--out", tmp_path / "out", "--num-kept", "20")
    assert done.returncode == 0, done.stderr
    record = json.loads((tmp_path / "out" / MANIFEST).read_text(encoding="utf-8"))
    assert [each["equal"] for each in record["graphs"]] == [1, 1, 1]
    assert max(each["largest_difference"] for each in record["graphs"]) < 1e-5
